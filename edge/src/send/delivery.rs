//! Takes letters from the outbox to their receivers, one task for each receiver.
//!
//! A letter is made and frozen before its first attempt, tried again with back-off while the receiver is down or says "later", and
//! given up with its reason where the receiver will never take it. What was accepted is recorded before the next letter of the same study.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::association::{Association, AssociationError};
use super::back_off::{BackOff, Patience};
use super::equipment::Device;
use super::hl7::Hl7;
use super::letter::{self, Capture, Made, NotMade};
use super::outbox::{Bounds, Channel, Letter, Outbox, OutboxError, Trimmed};
use super::pacs::{self, Pacs};
use super::stow::Stow;
use super::structured_report::Predecessor;
use super::webhook::Webhook;
use crate::result::StudyResult;
use crate::vital;

/// How often a receiver's task looks into the outbox unasked.
const IDLE: Duration = Duration::from_secs(30);

/// How one attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The receiver has it.
    Delivered,
    /// To be tried again.
    Retried,
    /// Given up: a dead letter.
    Dead,
}

/// What a receiver said to a letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It has it.
    Accepted(Option<String>),
    /// It may take it later; the receiver answers.
    Later(String),
    /// It will never take it.
    Refused(String),
    /// It does not answer.
    Down(String),
    /// It was not asked: the letter was given up or deleted meanwhile.
    Gone,
}

/// All receivers, as configured.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    /// The PACS.
    pub(crate) pacs: Option<Pacs>,
    /// Signed JSON.
    pub(crate) webhook: Option<Webhook>,
    /// HL7.
    pub(crate) hl7: Option<Hl7>,
    /// STOW-RS.
    pub(crate) stow: Option<Stow>,
    /// This node.
    pub(crate) device: Device,
    /// Back-off and deadlines.
    pub(crate) patience: Patience,
}

/// Told of every attempt: for metrics and audit.
pub(crate) type Observe = dyn Fn(&Letter, End) + Send + Sync;

/// The sender.
pub(crate) struct Delivery {
    /// Where letters lie.
    pub(crate) outbox: Arc<Outbox>,
    ways: RwLock<Arc<Ways>>,
    /// Draws secondary captures.
    capture: Arc<Capture>,
    observe: Box<Observe>,
    bounds: Bounds,
}

impl std::fmt::Debug for Delivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delivery").finish_non_exhaustive()
    }
}

/// A receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Receiver {
    Pacs,
    Webhook,
    Hl7,
    Stow,
}

impl Receiver {
    const ALL: [Self; 4] = [Self::Pacs, Self::Webhook, Self::Hl7, Self::Stow];

    fn channels(self) -> &'static [Channel] {
        match self {
            Self::Pacs => &[Channel::StructuredReport, Channel::SecondaryCapture],
            Self::Webhook => &[Channel::Webhook],
            Self::Hl7 => &[Channel::Hl7],
            Self::Stow => &[Channel::Stow],
        }
    }
}

impl Delivery {
    /// A sender over an outbox.
    pub(crate) fn new(
        outbox: Arc<Outbox>,
        ways: Ways,
        capture: Arc<Capture>,
        observe: Box<Observe>,
        bounds: Bounds,
    ) -> Arc<Self> {
        Arc::new(Self {
            outbox,
            ways: RwLock::new(Arc::new(ways)),
            capture,
            observe,
            bounds,
        })
    }

    /// Uses another configuration from the next pass on.
    pub(crate) fn configure(&self, ways: Ways) {
        *self.ways.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(ways);
        self.outbox.bell.notify_waiters();
    }

    /// Sends until `shutdown` becomes true; an exchange that is under way then is ended.
    pub(crate) async fn run(self: Arc<Self>, shutdown: watch::Receiver<bool>) {
        let mut tasks = JoinSet::new();
        let (mut down, delivery) = (shutdown.clone(), Arc::clone(&self));
        tasks.spawn(vital::task("outbox", async move {
            tokio::select! {
                () = delivery.keep_bounds() => {}
                _ = down.wait_for(|is_down| *is_down) => {}
            }
        }));
        for receiver in Receiver::ALL {
            let mut shutdown = shutdown.clone();
            let delivery = Arc::clone(&self);
            tasks.spawn(vital::task("outbox", async move {
                tokio::select! {
                    () = delivery.serve(receiver) => {}
                    _ = shutdown.wait_for(|is_down| *is_down) => {}
                }
            }));
        }
        while tasks.join_next().await.is_some() {}
    }

    /// Has the oldest letters given up where a receiver is away for so long that too many wait.
    async fn keep_bounds(&self) {
        let bounds = self.bounds;
        loop {
            let mut bell = std::pin::pin!(self.outbox.bell.notified());
            bell.as_mut().enable();
            let trimmed = self
                .on_disk(move |outbox| outbox.trim(bounds, now_ms()))
                .await;
            match trimmed {
                Ok(Trimmed { given_up, n_lost }) => {
                    for letter in &given_up {
                        let channel = letter.channel.name();
                        tracing::error!(channel, reason = letter.remark, "result given up");
                        (self.observe)(letter, End::Dead);
                    }
                    self.outbox.lose(n_lost);
                }
                Err(error) => tracing::error!(%error, "the outbox cannot be trimmed"),
            }
            tokio::select! {
                () = &mut bell => {}
                () = tokio::time::sleep(IDLE) => {}
            }
        }
    }

    async fn serve(&self, receiver: Receiver) {
        let mut back_off = BackOff::default();
        loop {
            let mut bell = std::pin::pin!(self.outbox.bell.notified());
            bell.as_mut().enable();
            let pause = match self.pass(receiver, &mut back_off).await {
                Ok(pause) => pause.min(IDLE),
                Err(error) => {
                    tracing::error!(%error, ?receiver, "the outbox cannot be read");
                    IDLE
                }
            };
            tokio::select! {
                () = &mut bell => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Tries every letter that is due; how long until the next.
    async fn pass(
        &self,
        receiver: Receiver,
        back_off: &mut BackOff,
    ) -> Result<Duration, OutboxError> {
        let ways = Arc::clone(&self.ways.read().unwrap_or_else(PoisonError::into_inner));
        let letters = self
            .on_disk(move |outbox| outbox.waiting(receiver.channels()))
            .await?;
        back_off.keep(|sequence| letters.iter().any(|(waiting, _)| *waiting == sequence));
        let now = Instant::now();
        let is_due = |sequence: u64, back_off: &BackOff| back_off.pause(sequence, now).is_zero();
        let (due, later): (Vec<_>, Vec<_>) = letters
            .into_iter()
            .partition(|(sequence, _)| is_due(*sequence, back_off));
        let soonest = later
            .iter()
            .map(|(sequence, _)| back_off.pause(*sequence, now));
        let soonest = soonest.min().unwrap_or(IDLE);
        if due.is_empty() {
            return Ok(soonest);
        }
        match (receiver, &ways.pacs) {
            (Receiver::Pacs, Some(pacs)) => self.to_pacs(&ways, pacs, due, back_off).await?,
            (Receiver::Pacs, None) => return Ok(IDLE),
            _ => self.to_one_after_another(&ways, due, back_off).await?,
        }
        // A letter that was held back by one that is through now, or one that failed just now.
        Ok(Duration::from_millis(1))
    }

    async fn to_pacs(
        &self,
        ways: &Arc<Ways>,
        pacs: &Pacs,
        due: Vec<(u64, Letter)>,
        back_off: &mut BackOff,
    ) -> Result<(), OutboxError> {
        let mut association = match pacs.open(ways.patience.deadline).await {
            Ok(association) => association,
            Err(AssociationError::NoContext) => {
                for (sequence, letter) in due {
                    let refused = Verdict::Refused("no presentation context accepted".to_owned());
                    self.settle(sequence, letter, refused, ways, back_off)
                        .await?;
                }
                return Ok(());
            }
            Err(error) => {
                tracing::warn!(%error, "the PACS cannot be reached");
                back_off.receiver_failed(&ways.patience);
                for (_, letter) in &due {
                    (self.observe)(letter, End::Retried);
                }
                return Ok(());
            }
        };
        for (sequence, mut letter) in due {
            let classes = Pacs::classes(letter.channel);
            let mut line = Line::Association(&mut association);
            let verdict = self
                .in_classes(ways, sequence, &mut letter, classes, &mut line)
                .await?;
            let is_down = matches!(verdict, Verdict::Down(_));
            self.settle(sequence, letter, verdict, ways, back_off)
                .await?;
            if is_down {
                association.abort().await;
                return Ok(());
            }
        }
        back_off.receiver_answered();
        association.release().await;
        Ok(())
    }

    /// Letters to a receiver that gets each by itself.
    async fn to_one_after_another(
        &self,
        ways: &Arc<Ways>,
        due: Vec<(u64, Letter)>,
        back_off: &mut BackOff,
    ) -> Result<(), OutboxError> {
        for (sequence, mut letter) in due {
            let classes = match letter.channel {
                Channel::Stow => Pacs::classes(Channel::StructuredReport),
                _ => &[""],
            };
            let verdict = self
                .in_classes(ways, sequence, &mut letter, classes, &mut Line::Own)
                .await?;
            let is_down = matches!(verdict, Verdict::Down(_));
            self.settle(sequence, letter, verdict, ways, back_off)
                .await?;
            if is_down {
                return Ok(());
            }
        }
        back_off.receiver_answered();
        Ok(())
    }

    /// One letter in the class it was frozen in; where the receiver refuses that, in the next.
    async fn in_classes(
        &self,
        ways: &Arc<Ways>,
        sequence: u64,
        letter: &mut Letter,
        classes: &[&str],
        line: &mut Line<'_>,
    ) -> Result<Verdict, OutboxError> {
        let frozen_as = letter.document.as_ref().and_then(|document| {
            let is_same = |class: &&str| *class == document.sop_class_uid;
            classes.iter().position(is_same)
        });
        let mut verdict = Verdict::Refused("no class to send it in".to_owned());
        for class in classes.iter().skip(frozen_as.unwrap_or(0)) {
            if !line.takes(class) {
                verdict = Verdict::Refused("presentation context rejected".to_owned());
                continue;
            }
            let bytes = match self.frozen(ways, sequence, letter, class).await? {
                Ok(bytes) => bytes,
                Err(verdict) => return Ok(verdict),
            };
            verdict = line.send(ways, class, letter, bytes).await;
            if !matches!(verdict, Verdict::Refused(_)) {
                break;
            }
        }
        Ok(verdict)
    }

    /// The bytes of a letter in a class, made and kept where they are not there yet; or why they cannot be made.
    async fn frozen(
        &self,
        ways: &Arc<Ways>,
        sequence: u64,
        letter: &mut Letter,
        class: &str,
    ) -> Result<Result<Vec<u8>, Verdict>, OutboxError> {
        let is_same = letter
            .document
            .as_ref()
            .is_none_or(|document| document.sop_class_uid == class);
        if letter.is_frozen && is_same {
            let kept = self.on_disk(move |outbox| outbox.frozen(sequence)).await?;
            return Ok(kept.ok_or_else(|| Verdict::Refused("its bytes are gone".to_owned())));
        }
        let asked = letter.clone();
        let (result, predecessor) = self
            .on_disk(move |outbox| Ok((outbox.result(sequence)?, outbox.predecessor(&asked)?)))
            .await?;
        let made = self.make(ways, letter, class, result, predecessor).await;
        let made = match made {
            Ok(made) => made,
            Err(NotMade::Later(reason)) => return Ok(Err(Verdict::Later(reason))),
            Err(NotMade::Never(reason)) => return Ok(Err(Verdict::Refused(reason))),
        };
        letter.document = made.document;
        letter.is_frozen = true;
        let (kept, bytes) = (letter.clone(), made.bytes);
        let kept = self
            .on_disk(move |outbox| Ok(outbox.freeze(sequence, &kept, &bytes)?.then_some(bytes)))
            .await?;
        Ok(kept.ok_or(Verdict::Gone))
    }

    /// Makes a letter where blocking is allowed: a capture waits for a worker and for the network.
    async fn make(
        &self,
        ways: &Arc<Ways>,
        letter: &Letter,
        class: &str,
        result: StudyResult,
        predecessor: Option<Predecessor>,
    ) -> Result<Made, NotMade> {
        let (ways, letter, class) = (Arc::clone(ways), letter.clone(), class.to_owned());
        let capture = Arc::clone(&self.capture);
        tokio::task::spawn_blocking(move || {
            letter::make(
                &letter,
                &class,
                &result,
                &ways,
                predecessor.as_ref(),
                &*capture,
            )
        })
        .await
        .unwrap_or_else(|error| Err(NotMade::Later(error.to_string())))
    }

    /// Records what a receiver said.
    async fn settle(
        &self,
        sequence: u64,
        letter: Letter,
        verdict: Verdict,
        ways: &Arc<Ways>,
        back_off: &mut BackOff,
    ) -> Result<(), OutboxError> {
        let channel = letter.channel.name();
        let end = match &verdict {
            Verdict::Accepted(_) => End::Delivered,
            Verdict::Refused(_) => End::Dead,
            Verdict::Later(_) | Verdict::Down(_) => End::Retried,
            // Who took it away has said so.
            Verdict::Gone => return Ok(()),
        };
        (self.observe)(&letter, end);
        match verdict {
            Verdict::Accepted(remark) => {
                tracing::info!(channel, sequence, "result delivered");
                let is_sent_to_pacs = Receiver::Pacs.channels().contains(&letter.channel);
                let pacs = ways.pacs.as_ref().filter(|_| is_sent_to_pacs);
                let is_wanted = pacs.is_some_and(|pacs| pacs.is_asked_to_commit);
                self.on_disk(move |outbox| {
                    outbox.accepted(sequence, letter, remark, now_ms(), is_wanted)
                })
                .await
            }
            Verdict::Refused(reason) => {
                tracing::error!(channel, sequence, reason, "result given up");
                self.on_disk(move |outbox| outbox.bury(sequence, letter, reason, now_ms()))
                    .await
            }
            Verdict::Later(reason) => {
                tracing::warn!(channel, sequence, reason, "result will be sent again");
                back_off.letter_failed(sequence, &ways.patience);
                Ok(())
            }
            Verdict::Down(reason) => {
                tracing::warn!(channel, sequence, reason, "receiver does not answer");
                back_off.receiver_failed(&ways.patience);
                Ok(())
            }
            Verdict::Gone => Ok(()),
        }
    }

    /// Runs where blocking is allowed: a commit waits for the medium.
    async fn on_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Outbox) -> Result<T, OutboxError> + Send + 'static,
    ) -> Result<T, OutboxError> {
        let outbox = Arc::clone(&self.outbox);
        match tokio::task::spawn_blocking(move || work(&outbox)).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(OutboxError::Stopped),
            },
        }
    }
}

/// What a letter goes over.
enum Line<'a> {
    /// An association that is open.
    Association(&'a mut Association),
    /// A connection of its own.
    Own,
}

impl Line<'_> {
    fn takes(&self, class: &str) -> bool {
        match self {
            Self::Own => true,
            Self::Association(association) => association.takes(class),
        }
    }

    async fn send(&mut self, ways: &Ways, class: &str, letter: &Letter, bytes: Vec<u8>) -> Verdict {
        let association = match self {
            Self::Own => return send_one(ways, class, letter, bytes).await,
            Self::Association(association) => association,
        };
        let uid = letter.instance_uid();
        let deadline = ways.patience.deadline;
        match association.store(class, uid, &bytes, deadline).await {
            Ok(status) => pacs::verdict(status),
            Err(error) => Verdict::Down(error.to_string()),
        }
    }
}

/// One letter by HTTP or MLLP.
async fn send_one(ways: &Ways, class: &str, letter: &Letter, bytes: Vec<u8>) -> Verdict {
    let deadline = ways.patience.deadline;
    let key = letter.key.clone();
    let blocking = match letter.channel {
        Channel::Hl7 => {
            return match &ways.hl7 {
                Some(hl7) => hl7.send(&key, &bytes, deadline).await,
                None => not_configured(),
            };
        }
        Channel::Webhook => ways.webhook.clone().map(|webhook| {
            tokio::task::spawn_blocking(move || webhook.send(&key, &bytes, deadline))
        }),
        Channel::Stow => ways.stow.clone().map(|stow| {
            let (class, uid) = (class.to_owned(), letter.instance_uid().to_owned());
            tokio::task::spawn_blocking(move || stow.send(&class, &uid, &bytes, deadline))
        }),
        Channel::StructuredReport | Channel::SecondaryCapture => None,
    };
    match blocking {
        Some(task) => task
            .await
            .unwrap_or_else(|error| Verdict::Down(error.to_string())),
        None => not_configured(),
    }
}

/// The section went from the configuration while a letter waited: it waits on.
fn not_configured() -> Verdict {
    Verdict::Down("not configured any more".to_owned())
}

/// Unix time in ms; what is kept beside a letter, never what decides when it is sent.
fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}
