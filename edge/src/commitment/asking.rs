//! Asks the PACS to commit to the documents that it accepted, and hears its reports where they come on the same association.
//!
//! A request that gets no report within the configured time is made again, at most [`MAX_REQUESTS`] times in all; then, and where the PACS refuses
//! that often, the document is given up as not committed. A PACS that cannot be reached is waited for, by the monotonic clock.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use dicom_core::VR;
use dicom_dictionary_std::tags;
use tokio::sync::watch;
use tokio::time::Instant;

use super::asked::{Asked, Wanted};
use super::message::{Reference, Transaction};
use super::{ACTION, EVENT_REPORT, REQUEST_ACTION, SOP_CLASS_UID, SOP_INSTANCE_UID};
use crate::send::association::{Association, AssociationError, Message};
use crate::send::back_off::{BackOff, Patience};
use crate::send::data_set::{DataSet, Syntax};
use crate::send::outbox::OutboxError;
use crate::send::pacs::Pacs;

/// Requests for a document before it is given up.
pub(crate) const MAX_REQUESTS: u32 = 3;
/// How often the documents are looked at unasked.
const IDLE: Duration = Duration::from_secs(5);

/// How the PACS is asked.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    /// The PACS.
    pub(crate) pacs: Pacs,
    /// How long a report may take.
    pub(crate) answer_within: Duration,
    /// How long an association is kept open for reports.
    pub(crate) linger: Duration,
    /// Back-off and deadlines.
    pub(crate) patience: Patience,
}

/// The asker.
#[derive(Debug)]
pub(crate) struct Asking {
    asked: Arc<Asked>,
    way: RwLock<Option<Arc<Way>>>,
}

/// What is known only while the program runs: after a start every report has its whole time again.
#[derive(Default)]
struct Memory {
    asked_at: HashMap<u64, Instant>,
    back_off: BackOff,
}

impl Asking {
    /// An asker; without a way nothing is asked.
    pub(crate) fn new(asked: Arc<Asked>, way: Option<Way>) -> Arc<Self> {
        let way = RwLock::new(way.map(Arc::new));
        Arc::new(Self { asked, way })
    }

    /// Uses another configuration from the next pass on.
    pub(crate) fn configure(&self, way: Option<Way>) {
        *self.way.write().unwrap_or_else(PoisonError::into_inner) = way.map(Arc::new);
        self.asked.bell.notify_waiters();
    }

    /// Asks until `shutdown` becomes true.
    pub(crate) async fn run(self: Arc<Self>, mut shutdown: watch::Receiver<bool>) {
        tokio::select! {
            () = self.serve() => {}
            _ = shutdown.wait_for(|is_down| *is_down) => {}
        }
    }

    async fn serve(&self) {
        let mut memory = Memory::default();
        loop {
            let mut bell = std::pin::pin!(self.asked.bell.notified());
            bell.as_mut().enable();
            let mut pause = IDLE;
            if let Some(way) = self.way() {
                pause = pause.min(way.answer_within).min(way.patience.longest);
                if let Err(error) = self.pass(&way, &mut memory).await {
                    tracing::error!(%error, "commitments cannot be read");
                }
            }
            tokio::select! {
                () = &mut bell => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn way(&self) -> Option<Arc<Way>> {
        let way = self.way.read().unwrap_or_else(PoisonError::into_inner);
        way.clone()
    }

    async fn pass(&self, way: &Way, memory: &mut Memory) -> Result<(), OutboxError> {
        let waiting = on_disk(&self.asked, Asked::waiting).await?;
        let is_waiting = |sequence: u64| waiting.iter().any(|(waiting, _)| *waiting == sequence);
        memory.asked_at.retain(|sequence, _| is_waiting(*sequence));
        memory.back_off.keep(is_waiting);
        let now = Instant::now();
        let mut due = Vec::new();
        for (sequence, wanted) in waiting {
            if wanted.transactions > 0 && !memory.asked_at.contains_key(&sequence) {
                memory.asked_at.insert(sequence, now);
            }
            let asked_at = memory.asked_at.get(&sequence);
            let is_open = asked_at.is_some_and(|at| now - *at < way.answer_within);
            if is_open || !memory.back_off.pause(sequence, now).is_zero() {
                continue;
            }
            if wanted.attempts >= MAX_REQUESTS {
                let seconds = way.answer_within.as_secs();
                let reason = format!("no report within {seconds} s, asked {MAX_REQUESTS} times");
                self.refused(sequence, reason).await?;
            } else {
                due.push((sequence, wanted));
            }
        }
        if due.is_empty() {
            return Ok(());
        }
        match way
            .pacs
            .open_for(&[SOP_CLASS_UID], way.patience.deadline)
            .await
        {
            Ok(association) => self.ask(association, way, due, memory).await,
            Err(error @ (AssociationError::NoContext | AssociationError::Rejected(_))) => {
                for (sequence, wanted) in due {
                    on_disk(&self.asked, move |asked| asked.begin(sequence, &wanted)).await?;
                    memory.back_off.letter_failed(sequence, &way.patience);
                    self.refused(sequence, error.to_string()).await?;
                }
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "the PACS cannot be asked to commit");
                memory.back_off.receiver_failed(&way.patience);
                Ok(())
            }
        }
    }

    /// One request after another, then what reports come while the association is open.
    async fn ask(
        &self,
        mut association: Association,
        way: &Way,
        due: Vec<(u64, Wanted)>,
        memory: &mut Memory,
    ) -> Result<(), OutboxError> {
        memory.back_off.receiver_answered();
        let mut n_open = 0;
        for (sequence, wanted) in due {
            let document = wanted.document.clone();
            let uid = on_disk(&self.asked, move |asked| asked.begin(sequence, &wanted)).await?;
            let request = Transaction {
                uid,
                references: vec![Reference {
                    sop_class_uid: document.sop_class_uid,
                    sop_instance_uid: document.sop_instance_uid.as_str().to_owned(),
                }],
                failed: Vec::new(),
            };
            match action(&mut association, &request, way.patience.deadline).await {
                Ok(0) => {
                    memory.asked_at.insert(sequence, Instant::now());
                    n_open += 1;
                }
                Ok(status) => {
                    memory.asked_at.remove(&sequence);
                    memory.back_off.letter_failed(sequence, &way.patience);
                    let reason = format!("N-ACTION status {status:04X}H");
                    self.refused(sequence, reason).await?;
                }
                Err(error) => {
                    tracing::warn!(%error, "the PACS was not asked to commit");
                    memory.back_off.receiver_failed(&way.patience);
                    association.abort().await;
                    return Ok(());
                }
            }
        }
        let end = Instant::now() + way.linger;
        while n_open > 0 {
            let left = end.saturating_duration_since(Instant::now());
            match association.asked(left).await {
                Ok(message) => {
                    let syntax = association.syntax(message.context_id);
                    let status = self.event(&message, syntax).await;
                    let said = association.answer(&message, status, way.patience.deadline);
                    if said.await.is_err() {
                        break;
                    }
                    n_open -= 1;
                }
                // Not in time: it will come on an association of its own. Or the PACS has ended this one.
                Err(AssociationError::Deadline(_)) => break,
                Err(_) => return Ok(()),
            }
        }
        association.release().await;
        Ok(())
    }

    async fn event(&self, message: &Message, syntax: Syntax) -> u16 {
        if message.command.number(tags::COMMAND_FIELD) != Some(EVENT_REPORT) {
            return 0x0211;
        }
        heard(
            &self.asked,
            message.data.clone().unwrap_or_default(),
            syntax,
        )
        .await
    }

    async fn refused(&self, sequence: u64, reason: String) -> Result<(), OutboxError> {
        tracing::warn!(sequence, reason, "not committed");
        let refused = move |asked: &Asked| asked.refused(sequence, &reason, MAX_REQUESTS);
        on_disk(&self.asked, refused).await
    }
}

/// Takes the data set of an N-EVENT-REPORT. Out: the status to answer with (PS3.7 section 10.1.1).
pub(crate) async fn heard(asked: &Arc<Asked>, data: Vec<u8>, syntax: Syntax) -> u16 {
    let Ok(report) = Transaction::read(&data, syntax) else {
        return 0x0115;
    };
    match on_disk(asked, move |asked| asked.reported(&report)).await {
        Ok(true) => 0x0000,
        // Invalid argument value: no transaction of ours.
        Ok(false) => 0x0115,
        Err(error) => {
            tracing::error!(%error, "a commitment cannot be recorded");
            0x0110
        }
    }
}

/// N-ACTION (PS3.7 section 10.1.4). The status of the response.
async fn action(
    association: &mut Association,
    request: &Transaction,
    deadline: Duration,
) -> Result<u16, AssociationError> {
    let mut command = DataSet::default();
    command
        .text(tags::REQUESTED_SOP_CLASS_UID, VR::UI, SOP_CLASS_UID)
        .text(tags::REQUESTED_SOP_INSTANCE_UID, VR::UI, SOP_INSTANCE_UID)
        .u16(tags::COMMAND_FIELD, ACTION)
        .u16(tags::ACTION_TYPE_ID, REQUEST_ACTION);
    let data = request.data_set().encode(Syntax::Explicit);
    association
        .ask_status(SOP_CLASS_UID, command, &data, deadline)
        .await
}

/// Runs where blocking is allowed: a commit waits for the medium.
pub(crate) async fn on_disk<D: Send + Sync + 'static, T: Send + 'static>(
    database: &Arc<D>,
    work: impl FnOnce(&D) -> Result<T, OutboxError> + Send + 'static,
) -> Result<T, OutboxError> {
    let database = Arc::clone(database);
    let done = tokio::task::spawn_blocking(move || work(&database)).await;
    done.unwrap_or(Err(OutboxError::Stopped))
}
