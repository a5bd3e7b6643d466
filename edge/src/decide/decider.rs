//! The decider: from slices that are ready for the network to results that are durable and said.
//!
//! In: what [`super::analysis`] hands over. Out: batches for the [store](super::store), [`Changed`] for whoever watches. One thread, one engine
//! session.
//!
//! - A slice that came before with the same pixels keeps its logit: no inference. With other pixels it is analysed anew and flagged.
//! - Answers are written in batches: at once where nothing else waits, otherwise every [`BATCH_TIME`] or [`BATCH_SLICES`].
//! - A study is complete when its quiet time has passed since its last object arrived, by the monotonic clock, and everything that had
//!   arrived by then is decided. A positive one is said at once, provisionally; everything else only then.
//! - While the store fails nothing is dropped: the thread waits and tries again, and the spool fills until intake refuses. Where the
//!   store is broken, the service's watchdog starts the node anew, which makes the store anew.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::uid::Uid;
use tokio::sync::broadcast;

use super::again::Again;
use super::arrivals::Arrivals;
use super::counters::Counters;
use super::handoff::Handoff;
use super::open_study::{OpenStudy, Settled, Stage};
use super::store::{Batch, Enqueue, SliceKey, SliceRow, Store, StoreError};
use super::studies::Judge;
use super::{Changed, Item, Part};
use crate::result::Element;
use crate::supervisor::Tensor;
use crate::wire::{ObjectFacts, Reason};

/// Slices of a batch.
const BATCH_SLICES: usize = 32;
/// Longest time from a slice's answer to its being written.
const BATCH_TIME: Duration = Duration::from_millis(200);
/// How often a study that only grows is written.
const STUDY_TIME: Duration = Duration::from_secs(1);
/// How long the thread waits for a slice before it looks at the clock.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long it waits after the store has failed.
const STORE_PATIENCE: Duration = Duration::from_secs(2);
/// Slices kept in memory over all open studies; beyond it, studies are read again when something comes.
const MAX_ROWS_IN_MEMORY: usize = 8_192;
/// Hexadecimal digits of a digest of elements.
const DIGEST_DIGITS: usize = 32;

/// What runs the network.
pub(crate) enum Network {
    /// A model that has passed its self-test.
    Ready(Box<engine::Session>),
    /// None: every slice gets this reason, and is analysed again when there is one.
    Absent(Reason),
    /// The tensor's first four bytes are the logit; counts how often it is asked.
    #[cfg(test)]
    Scripted(Arc<std::sync::atomic::AtomicU64>),
}

/// What the decider is given.
pub(crate) struct Parts {
    /// Where results lie.
    pub(crate) store: Arc<Store>,
    /// What runs the network.
    pub(crate) network: Network,
    /// What judges.
    pub(crate) judge: Judge,
    /// Quiet time.
    pub(crate) quiet_time: Duration,
    /// What is to be analysed again.
    pub(crate) again: Arc<Again>,
    /// When objects arrived.
    pub(crate) arrivals: Arc<Arrivals>,
    /// Puts what is said into the outbox.
    pub(crate) enqueue: Box<Enqueue>,
    /// Told of every change.
    pub(crate) changed: broadcast::Sender<Changed>,
    /// Told of every object that is decided for good.
    pub(crate) finished: Box<dyn Fn(u64) + Send>,
    /// Counts.
    pub(crate) counters: Arc<Counters>,
    /// Unix time in ms.
    pub(crate) now_ms: fn() -> i64,
}

/// The decider.
pub(crate) struct Decider {
    parts: Parts,
    studies: BTreeMap<Uid, OpenStudy>,
    batch: Batch,
    batch_began: Option<Instant>,
    /// Up to here everything is written.
    cursor: u64,
    /// A study of which nothing has come since is decided again, see [`Stage::Rebuilt`].
    rebuild_until: u64,
    /// Decided for good with the batch.
    finished: Vec<u64>,
    /// Whether a slice of the object at hand waits for a sound model.
    is_again: bool,
}

impl Decider {
    /// A decider that goes on where the store ends.
    ///
    /// # Errors
    /// The store cannot be read.
    pub(crate) fn new(mut parts: Parts, now: Instant) -> Result<Self, StoreError> {
        for (sequence, _) in parts.store.unassigned()? {
            parts.judge.remember_unassigned(sequence);
        }
        let mut studies = BTreeMap::new();
        for study_uid in parts.store.open_studies()? {
            // Its quiet time begins anew: how long the node was down is not known.
            let mut open = OpenStudy::load(&parts.store, &study_uid, now)?;
            open.is_dirty = true;
            studies.insert(study_uid, open);
        }
        let cursor = parts.store.cursor()?;
        parts.counters.reached(cursor, studies.len());
        Ok(Self {
            cursor,
            rebuild_until: parts.store.rebuild_until()?,
            parts,
            studies,
            batch: Batch::default(),
            batch_began: None,
            finished: Vec::new(),
            is_again: false,
        })
    }

    /// Runs until the hand-off is closed and empty.
    pub(crate) fn run(mut self, handoff: &Handoff<Item>) {
        loop {
            // With a batch begun, nothing is waited for: what there is, is written as soon as nothing else is there.
            let patience = self.batch_began.map_or(PATIENCE, |_| Duration::ZERO);
            let taken = handoff.pop(patience);
            self.parts.counters.beat();
            match taken {
                Ok(Some(item)) => {
                    self.until_it_works(|decider| decider.load_study_of(&item));
                    self.batch_began.get_or_insert_with(Instant::now);
                    self.take(item);
                    if self.is_batch_due() {
                        self.until_it_works(Self::write);
                    }
                }
                Ok(None) => self.until_it_works(Self::write),
                Err(_) => return self.until_it_works(Self::write),
            }
        }
    }

    fn until_it_works(&mut self, mut work: impl FnMut(&mut Self) -> Result<(), StoreError>) {
        while let Err(error) = work(self) {
            self.parts.counters.store_failed();
            if error.is_broken() {
                self.parts.store.suspect();
            }
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "the results database fails; trying again");
            std::thread::sleep(STORE_PATIENCE);
        }
    }

    fn is_batch_due(&self) -> bool {
        self.batch.rows.len() >= BATCH_SLICES
            || self
                .batch_began
                .is_some_and(|began| began.elapsed() >= BATCH_TIME)
    }

    /// Has the item's study in memory.
    fn load_study_of(&mut self, item: &Item) -> Result<(), StoreError> {
        let Some(study_uid) = &item.object.study_uid else {
            return Ok(());
        };
        let now = Instant::now();
        if !self.studies.contains_key(study_uid) {
            let open = OpenStudy::load(&self.parts.store, study_uid, now)?;
            self.studies.insert(study_uid.clone(), open);
        }
        if let Some(open) = self.studies.get_mut(study_uid)
            && open.known.is_none()
        {
            open.known = Some(self.parts.store.slices(study_uid)?);
            self.ask_again(study_uid);
        }
        Ok(())
    }

    /// Slices that another model has answered are analysed by this one, where the spool still has them.
    fn ask_again(&mut self, study_uid: &Uid) {
        if !matches!(self.parts.network, Network::Absent(_))
            && let Some((rows, _)) = self
                .studies
                .get(study_uid)
                .and_then(|open| open.known.as_ref())
        {
            let judge = &self.parts.judge;
            let other = rows.values().filter(|row| judge.is_of_another_model(row));
            let sequences: Vec<u64> = other.map(|row| row.sequence).collect();
            self.parts.again.ask(&sequences);
            self.batch.again.extend(sequences);
        }
    }

    fn take(&mut self, item: Item) {
        let (frame, slice) = match item.part {
            Part::End => return self.end_object(item.sequence, item.is_again),
            Part::Refused(reason) => (0, Err(reason)),
            Part::Slice(frame_index, slice) => {
                self.batch.partial = Some((item.sequence, frame_index + 1));
                let is_frame = item.object.is_multi_frame;
                (if is_frame { frame_index + 1 } else { 0 }, slice)
            }
        };
        let object = item.object;
        let sop_uid = object.sop_uid.clone().or(item.sop_uid);
        let (Some(study_uid), Some(sop_uid)) = (object.study_uid.clone(), sop_uid) else {
            // Of what is repeated the spool has nothing more to say; what is known of it stays.
            if !item.is_again {
                self.take_unassigned(item.sequence, slice.err());
            }
            return;
        };
        let arrival = self.parts.arrivals.moment(item.sequence, Instant::now());
        let Some(study) = self.studies.get_mut(&study_uid) else {
            return;
        };
        study.last_arrival = study.last_arrival.max(arrival);
        let key: SliceKey = (sop_uid, frame);
        let mut row = SliceRow {
            sequence: item.sequence,
            received_ms: item.received_ms,
            series_uid: object.series_uid.clone(),
            sop_class_uid: sop_class(&object, item.sop_class_uid),
            elements: elements_digest(&object.elements),
            facts: None,
            logit: None,
            model: None,
            reason: None,
            n_received: 1,
            is_replaced: false,
            is_spoilt: false,
        };
        match slice.and_then(|tensor| study.has_room().map(|()| tensor)) {
            Err(reason) => row.reason = Some(reason),
            Ok(tensor) => self.answer(&study_uid, &key, *tensor, &mut row),
        }
        self.parts.counters.slice(row.logit.is_some());
        self.keep(study_uid, key, row, &object.elements);
    }

    /// An object that names no study.
    fn take_unassigned(&mut self, sequence: u64, reason: Option<Reason>) {
        let reason = reason.unwrap_or_else(|| {
            Reason::new("no-uid", "the object has no Study or no SOP Instance UID")
        });
        self.parts.counters.unassigned();
        self.parts.judge.remember_unassigned(sequence);
        self.batch.unassigned.push((sequence, reason));
    }

    /// Puts the answer for a slice into its row: the one that is known for the same pixels, else the network's.
    fn answer(&mut self, study_uid: &Uid, key: &SliceKey, tensor: Tensor, row: &mut SliceRow) {
        let model = &self.parts.judge.model.digest;
        let study = self.studies.get(study_uid);
        let known =
            study.and_then(|study| study.known_logit(key, &tensor.facts.pixel_digest, model));
        let answer = match known {
            Some(logit) => {
                self.parts.counters.recognised();
                Ok(logit)
            }
            None => {
                let start = Instant::now();
                let answer = self.parts.network.logit(&tensor.bytes);
                let seconds = start.elapsed().as_secs_f64();
                self.parts.counters.inference_seconds.observe(seconds);
                answer
            }
        };
        row.facts = Some(tensor.facts);
        match answer {
            Ok(logit) => (row.logit, row.model) = (Some(logit), Some(model.clone())),
            Err(reason) => {
                self.is_again |= matches!(self.parts.network, Network::Absent(_));
                row.reason = Some(reason);
            }
        }
    }

    /// Keeps a row in its study and in the batch, and the elements that it names.
    fn keep(&mut self, study_uid: Uid, key: SliceKey, row: SliceRow, elements: &[Element]) {
        let Some(study) = self.studies.get_mut(&study_uid) else {
            return;
        };
        if let Some((_, sets)) = &mut study.known
            && !sets.contains_key(&row.elements)
        {
            sets.insert(row.elements.clone(), elements.to_vec());
            let entry = (study_uid.clone(), row.elements.clone(), elements.to_vec());
            self.batch.elements.push(entry);
        }
        let row = study.take(key.clone(), row);
        self.batch.rows.push((study_uid, key, row));
    }

    fn end_object(&mut self, sequence: u64, is_repeated: bool) {
        if is_repeated {
            if !self.is_again {
                self.batch.again_done.push(sequence);
            }
        } else {
            self.batch.cursor = Some(sequence);
            if self.is_again {
                self.batch.again.push(sequence);
            }
        }
        if !self.is_again {
            self.finished.push(sequence);
        }
        self.is_again = false;
    }

    /// Writes what there is, completes what is quiet, and tells.
    fn write(&mut self) -> Result<(), StoreError> {
        let now = Instant::now();
        let cursor = self.batch.cursor.unwrap_or(self.cursor);
        let mut settled: Vec<(Uid, Settled)> = Vec::new();
        let mut ended = Vec::new();
        for (study_uid, study) in &mut self.studies {
            let due = study.last_arrival + self.parts.quiet_time;
            let is_complete = now >= due && self.parts.arrivals.is_decided(due, cursor);
            if !is_complete && !study.is_dirty {
                continue;
            }
            if study.known.is_none() {
                study.known = Some(self.parts.store.slices(study_uid)?);
            }
            let stage = match is_complete {
                true => Stage::Complete,
                false if study.latest_sequence() <= self.rebuild_until => Stage::Rebuilt,
                false => Stage::Growing,
            };
            let now_ms = (self.parts.now_ms)();
            let found = study.settle(&self.parts.judge, study_uid, stage, now_ms);
            if is_complete {
                ended.push(study_uid.clone());
            }
            let is_old = |written: Instant| now - written >= STUDY_TIME;
            if let Some(found) = found
                && (found.is_urgent || is_complete || study.written.is_none_or(is_old))
            {
                settled.push((study_uid.clone(), found));
            }
        }
        self.batch.studies = settled
            .iter()
            .map(|(_, settled)| (settled.result.clone(), settled.statement.clone()))
            .collect();
        if !self.batch.is_empty() {
            self.parts.store.commit(&self.batch, &self.parts.enqueue)?;
        }
        self.written(cursor, now, &settled, &ended);
        Ok(())
    }

    /// The batch is durable.
    fn written(&mut self, cursor: u64, now: Instant, settled: &[(Uid, Settled)], ended: &[Uid]) {
        self.cursor = cursor;
        self.batch = Batch::default();
        self.batch_began = None;
        for sequence in self.finished.drain(..) {
            (self.parts.finished)(sequence);
        }
        for (study_uid, settled) in settled {
            if let Some(study) = self.studies.get_mut(study_uid) {
                study.wrote(settled, now);
            }
            if let Some(statement) = &settled.statement {
                let answer = settled.result.words();
                let (revision, is_provisional) = (statement.revision, statement.is_provisional);
                tracing::info!(revision, is_provisional, answer, "decided");
                tracing::debug!(study_uid = %study_uid, revision, "decided");
            }
            // An error means that nobody watches.
            drop(self.parts.changed.send(Changed {
                study_uid: study_uid.clone(),
                is_said: settled.statement.is_some(),
            }));
        }
        for study_uid in ended {
            self.studies.remove(study_uid);
        }
        self.parts.counters.reached(self.cursor, self.studies.len());
        let n_rows: usize = self.studies.values().map(OpenStudy::n_rows).sum();
        if n_rows > MAX_ROWS_IN_MEMORY {
            for study in self.studies.values_mut().filter(|study| !study.is_dirty) {
                study.known = None;
            }
        }
    }
}

impl Network {
    /// The logit of one tensor, u8 `[3, 256, 256]`.
    fn logit(&mut self, tensor: &[u8]) -> Result<f32, Reason> {
        let session = match self {
            Self::Ready(session) => session,
            Self::Absent(reason) => return Err(reason.clone()),
            #[cfg(test)]
            Self::Scripted(n_asked) => {
                n_asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                return Ok(f32::from_le_bytes([
                    tensor[0], tensor[1], tensor[2], tensor[3],
                ]));
            }
        };
        let mut logits = [f32::NAN];
        session
            .logits(tensor, &mut logits)
            .map_err(|error| Reason::new("engine", error.to_string()))?;
        let [logit] = logits;
        if logit.is_finite() {
            Ok(logit)
        } else {
            let text = format!("the network's answer is {logit}");
            Err(Reason::new("engine", text))
        }
    }
}

/// The object's own SOP class; what its sender said it was, where it cannot be read.
fn sop_class(object: &ObjectFacts, announced: String) -> String {
    match &object.sop_class {
        Some(uid) => uid.to_string(),
        None => announced,
    }
}

fn elements_digest(elements: &[Element]) -> String {
    let mut digest = blake3::Hasher::new();
    for element in elements {
        digest.update(&element.tag.0.to_le_bytes());
        digest.update(&element.tag.1.to_le_bytes());
        digest.update(&(element.value.len() as u64).to_le_bytes());
        digest.update(&element.value);
    }
    let digest = digest.finalize().to_hex();
    digest[..DIGEST_DIGITS].to_owned()
}
