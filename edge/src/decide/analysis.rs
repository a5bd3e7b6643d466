//! Analysis: from the spool to slices that are ready for the network.
//!
//! In: sequences of the spool, in order; first those that are to be analysed again. Out, through the [hand-off](super::handoff): each object's
//! slices or reasons, then its end. One thread, one supervised worker process at a time: [`crate::supervisor`] replaces it where it
//! dies and tries the object once more. Analysis only reads the spool and never holds up intake.

use std::sync::Arc;
use std::time::Duration;

use shared::spec::PreprocessSpec;
use shared::uid::Uid;

use super::again::Again;
use super::arrivals::Arrivals;
use super::counters::Counters;
use super::handoff::Handoff;
use super::{Item, Part};
use crate::intake::spool::Spool;
use crate::supervisor::{Event, Source, Stop, Supervisor, WorkerCommand};
use crate::wire::{ObjectFacts, Reason};

/// How long the thread sleeps where nothing comes; it is woken before.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where analysis begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Start {
    /// Everything up to this is decided.
    pub(super) cursor: u64,
    /// Of this sequence, so many frames are.
    pub(super) partial: (u64, u32),
}

/// Runs until `arrivals` is closed or nobody takes what is handed over.
#[expect(
    clippy::too_many_arguments,
    reason = "the ends of a thread, each of another kind"
)]
pub(super) fn run(
    spool: &Spool,
    start: Start,
    command: WorkerCommand,
    spec: &PreprocessSpec,
    again: &Again,
    arrivals: &Arrivals,
    handoff: &Handoff<Item>,
    counters: &Counters,
) {
    let mut analysis = Analysis {
        spool,
        supervisor: Supervisor::new(command, spec),
        again,
        arrivals,
        handoff,
        counters,
        partial: start.partial,
        is_looked_at: false,
    };
    // Broken off is as good as done: nobody listens any more.
    match analysis.all(start.cursor) {
        Ok(()) | Err(Stop) => {}
    }
    handoff.close();
}

struct Analysis<'a> {
    spool: &'a Spool,
    supervisor: Supervisor,
    again: &'a Again,
    arrivals: &'a Arrivals,
    handoff: &'a Handoff<Item>,
    counters: &'a Counters,
    partial: (u64, u32),
    is_looked_at: bool,
}

impl Analysis<'_> {
    fn all(&mut self, mut cursor: u64) -> Result<(), Stop> {
        loop {
            while self.arrivals.is_open()
                && let Some(sequence) = self.again.next()
            {
                self.object(sequence, true)?;
            }
            if !self.arrivals.wait_beyond(cursor, PATIENCE) {
                return Ok(());
            }
            let latest = self.arrivals.latest();
            for sequence in self.spool.sequences_after(cursor) {
                if !self.arrivals.is_open() {
                    return Err(Stop);
                }
                self.object(sequence, false)?;
                cursor = sequence;
            }
            if cursor < latest {
                // What lay between has been purged.
                self.hand_over(&Facts::default(), latest, false, Part::End)?;
                cursor = latest;
            }
        }
    }

    fn object(&mut self, sequence: u64, is_again: bool) -> Result<(), Stop> {
        let read = self
            .spool
            .header(sequence)
            .and_then(|header| Ok((header, self.spool.object(sequence)?)));
        let (header, (file, offset, bytes)) = match read {
            Ok(read) => read,
            Err(error) => {
                // Nothing is known of it, and nothing can be done.
                let reason = Reason::new("unreadable", error.to_string());
                let facts = Facts::default();
                self.hand_over(&facts, sequence, is_again, Part::Refused(reason))?;
                return self.hand_over(&facts, sequence, is_again, Part::End);
            }
        };
        let mut facts = Facts {
            object: Arc::default(),
            sop_uid: Uid::new(&header.sop_instance_uid).ok(),
            sop_class_uid: header.sop_class_uid,
            received_ms: header.received_ms,
        };
        let source = Source {
            file: &file,
            offset,
            bytes,
        };
        let first_frame = match self.partial {
            (of, frames) if of == sequence && !is_again => frames,
            _ => 0,
        };
        let handoff = self.handoff;
        self.supervisor.analyse(source, first_frame, &mut |event| {
            let part = match event {
                Event::Object(object) => {
                    facts.object = Arc::new(object);
                    return Ok(());
                }
                Event::ObjectRefused(refused) => {
                    facts.object = Arc::new(refused.facts.unwrap_or_default());
                    Part::Refused(refused.reason)
                }
                Event::Slice(frame_index, slice) => Part::Slice(frame_index, slice),
            };
            let item = facts.item(sequence, is_again, part);
            handoff.push(item).map_err(|_| Stop)
        })?;
        self.counters.workers_replaced(self.supervisor.n_replaced());
        self.look_at_confinement();
        self.hand_over(&facts, sequence, is_again, Part::End)
    }

    /// Says once where the worker is not confined: the kernel knows no filters.
    fn look_at_confinement(&mut self) {
        if !self.is_looked_at
            && let Some(is_confined) = self.supervisor.is_confined()
        {
            self.is_looked_at = true;
            self.counters.confined(is_confined);
            if !is_confined {
                tracing::warn!("the worker is not confined: this system has no seccomp filters");
            }
        }
    }

    fn hand_over(
        &self,
        facts: &Facts,
        sequence: u64,
        is_again: bool,
        part: Part,
    ) -> Result<(), Stop> {
        let item = facts.item(sequence, is_again, part);
        self.handoff.push(item).map_err(|_| Stop)
    }
}

/// What is known of the object at hand.
#[derive(Default)]
struct Facts {
    object: Arc<ObjectFacts>,
    sop_uid: Option<Uid>,
    sop_class_uid: String,
    received_ms: i64,
}

impl Facts {
    fn item(&self, sequence: u64, is_again: bool, part: Part) -> Item {
        Item {
            sequence,
            is_again,
            received_ms: self.received_ms,
            sop_uid: self.sop_uid.clone(),
            sop_class_uid: self.sop_class_uid.clone(),
            object: Arc::clone(&self.object),
            part,
        }
    }
}
