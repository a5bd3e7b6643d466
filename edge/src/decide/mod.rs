//! Deciding: from what lies in the spool to what is known and said of each study.
//!
//! The stages in the order in which the data meets them: [`analysis`] has the supervised worker read objects; [`handoff`] is the bounded queue behind
//! it; [`decider`] runs the network and writes; [`open_study`] keeps a study that is not complete, [`studies`] makes its result, with [`identity`];
//! [`arrivals`] says when quiet time began, [`again`] what is analysed anew; [`store`] is the database; [`counters`] counts. [`Deciding`] starts and ends it all, [`node`] within `edge serve`.

pub(crate) mod again;
pub(crate) mod analysis;
pub(crate) mod arrivals;
pub(crate) mod counters;
pub(crate) mod decider;
pub(crate) mod handoff;
mod identity;
pub(crate) mod node;
mod open_study;
pub(crate) mod store;
pub(crate) mod studies;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use shared::manifest::DataKind;
use shared::spec::PreprocessSpec;
use shared::uid::Uid;
use tokio::sync::broadcast;

use crate::exit::{Exit, Failure};
use crate::intake::spool::Spool;
use crate::launch::launch;
use crate::model::ReadyModel;
use crate::result::ModelIdentity;
use crate::series::Limits;
use crate::supervisor::{Tensor, WorkerCommand};
use crate::vital;
use crate::wire::{ObjectFacts, Reason};
use again::Again;
use analysis::Start;
use arrivals::Arrivals;
use counters::Counters;
use decider::{Decider, Network, Parts};
use handoff::Handoff;
use store::{Enqueue, Store};
use studies::Judge;

/// Longest silence of the worker.
pub(crate) const WORKER_DEADLINE: Duration = Duration::from_secs(20);

/// A study has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Changed {
    /// Which.
    pub(crate) study_uid: Uid,
    /// Whether something new was said of it: a revision.
    pub(crate) is_said: bool,
}

/// The model as status and the page show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ModelState {
    /// Its name; empty while it is loaded.
    pub(crate) name: String,
    /// Its digest.
    pub(crate) digest: String,
    /// What every result must say.
    pub(crate) notice: String,
    /// Whether it was trained on the phantom, or not at all.
    pub(crate) is_demonstration: bool,
    /// `passed`, or what went wrong; empty while it runs.
    pub(crate) self_test: String,
}

/// What analysis hands to the decider.
#[derive(Debug)]
pub(crate) struct Item {
    sequence: u64,
    /// Whether it was analysed before, without a sound model.
    is_again: bool,
    received_ms: i64,
    /// As its sender announced it, where the object itself does not say.
    sop_uid: Option<Uid>,
    sop_class_uid: String,
    object: Arc<ObjectFacts>,
    part: Part,
}

#[derive(Debug)]
enum Part {
    /// A frame, from 0.
    Slice(u32, Result<Box<Tensor>, Reason>),
    /// The object cannot be read.
    Refused(Reason),
    /// Nothing more of this sequence.
    End,
}

/// The model, or why there is none.
pub(crate) enum Sound {
    /// It has passed its self-test.
    Ready(Box<ReadyModel>),
    /// It has not, or cannot be loaded: the node stays up, slices are kept and get the reason.
    Degraded {
        /// Code `self-test` or `model`.
        reason: Reason,
    },
}

impl Sound {
    /// As status and the page show it.
    pub(crate) fn state(&self) -> ModelState {
        match self {
            Self::Ready(ready) => {
                let identity = identity_of(ready);
                let is_tested = !ready.manifest.self_test.is_empty();
                let self_test = if is_tested { "passed" } else { "absent" };
                ModelState {
                    name: identity.name,
                    digest: identity.digest,
                    notice: ready.notice.clone(),
                    is_demonstration: identity.is_demonstration,
                    self_test: self_test.to_owned(),
                }
            }
            Self::Degraded { reason } => ModelState {
                self_test: reason.to_string(),
                ..ModelState::default()
            },
        }
    }

    /// Loads the model file, or the demonstration model, and runs its self-test. A model that fails is a reason to go on without one.
    ///
    /// # Errors
    /// Where the configuration is at fault: there is no such file, or this machine cannot run the kernel that was asked for.
    pub(crate) fn load(path: Option<&Path>, options: &engine::Options) -> Result<Self, Failure> {
        match ReadyModel::load(path, options) {
            Ok(ready) => Ok(Self::Ready(Box::new(ready))),
            Err(failure) if failure.exit == Exit::Configuration => Err(failure),
            Err(failure) => {
                let code = match failure.exit {
                    Exit::FailedCheck => "self-test",
                    _ => "model",
                };
                let reason = Reason::new(code, failure.to_string());
                tracing::error!(%reason, "degraded: slices are kept and not analysed");
                Ok(Self::Degraded { reason })
            }
        }
    }
}

/// What deciding is given.
pub(crate) struct Given {
    /// Where objects lie.
    pub(crate) spool: Arc<Spool>,
    /// Where results lie.
    pub(crate) store: Arc<Store>,
    /// The model.
    pub(crate) model: Sound,
    /// How the worker is started.
    pub(crate) worker: WorkerCommand,
    /// Quiet time.
    pub(crate) quiet_time: Duration,
    /// What a series must have.
    pub(crate) limits: Limits,
    /// Puts what is said into the outbox.
    pub(crate) enqueue: Box<Enqueue>,
    /// Told of every change.
    pub(crate) changed: broadcast::Sender<Changed>,
    /// Where it is counted.
    pub(crate) counters: Arc<Counters>,
    /// Unix time in ms.
    pub(crate) now_ms: fn() -> i64,
}

/// The running threads.
#[derive(Debug)]
pub(crate) struct Deciding {
    arrivals: Arc<Arrivals>,
    handoff: Arc<Handoff<Item>>,
    threads: Vec<JoinHandle<()>>,
    watcher: tokio::task::JoinHandle<()>,
}

impl Deciding {
    /// Starts analysis and decision. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// The store cannot be read, or the system refuses a thread.
    pub(crate) fn start(given: Given) -> anyhow::Result<Self> {
        let (spool, store) = (Arc::clone(&given.spool), Arc::clone(&given.store));
        let mut latest = spool.latest();
        let start = Start {
            cursor: store.cursor()?,
            partial: store.partial()?,
        };
        let waiting = store.again()?;
        finish_decided(&spool, &start, &waiting);
        let again = Arc::new(Again::default());
        if matches!(given.model, Sound::Ready(_)) {
            again.ask(&waiting);
        }
        let now = Instant::now();
        let arrivals = Arc::new(Arrivals::new(*latest.borrow_and_update(), now));
        let handoff = Arc::new(Handoff::default());
        let counters = given.counters;
        let spec = match &given.model {
            Sound::Ready(ready) => ready.manifest.preprocess.clone(),
            Sound::Degraded { .. } => PreprocessSpec::default(),
        };
        let finished = Arc::clone(&spool);
        let (network, judge) = parts_of(given.model, given.limits);
        let decider = Decider::new(
            Parts {
                store,
                network,
                judge,
                quiet_time: given.quiet_time,
                again: Arc::clone(&again),
                arrivals: Arc::clone(&arrivals),
                enqueue: given.enqueue,
                changed: given.changed,
                finished: Box::new(move |sequence| finished.finish(sequence)),
                counters: Arc::clone(&counters),
                now_ms: given.now_ms,
            },
            now,
        )?;
        let command = given.worker;
        let threads = vec![
            thread("analysis", {
                let (arrivals, handoff) = (Arc::clone(&arrivals), Arc::clone(&handoff));
                move || {
                    analysis::run(
                        &spool, start, command, &spec, &again, &arrivals, &handoff, &counters,
                    );
                }
            })?,
            thread("decider", {
                let handoff = Arc::clone(&handoff);
                move || decider.run(&handoff)
            })?,
        ];
        let noted = Arc::clone(&arrivals);
        let noting = async move {
            while latest.changed().await.is_ok() {
                let sequence = *latest.borrow_and_update();
                noted.note(sequence, Instant::now());
            }
        };
        let watcher = tokio::spawn(vital::task("arrivals", noting));
        Ok(Self {
            arrivals,
            handoff,
            threads,
            watcher,
        })
    }

    /// Ends both threads after the object at hand; what is decided is written. Blocks until then.
    pub(crate) fn stop(self) {
        self.watcher.abort();
        self.arrivals.close();
        self.handoff.close();
        for thread in self.threads {
            // A panic has ended the program.
            drop(thread.join());
        }
    }
}

fn thread(
    name: &'static str,
    work: impl FnOnce() + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    let started: io::Result<_> = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || vital::work(name, work));
    started.with_context(|| format!("thread {name}"))
}

/// The spool forgets over a restart what is finished.
fn finish_decided(spool: &Spool, start: &Start, again: &[u64]) {
    for sequence in spool.sequences_after(0) {
        if sequence > start.cursor {
            break;
        }
        if again.binary_search(&sequence).is_err() {
            spool.finish(sequence);
        }
    }
}

fn parts_of(model: Sound, limits: Limits) -> (Network, Judge) {
    match model {
        Sound::Ready(ready) => {
            let judge = Judge {
                model: identity_of(&ready),
                rule: ready.manifest.study_rule,
                limits,
                unassigned: Vec::new(),
            };
            (Network::Ready(Box::new(ready.model.session())), judge)
        }
        Sound::Degraded { reason } => {
            let judge = Judge {
                model: ModelIdentity {
                    name: reason.code.clone(),
                    digest: String::new(),
                    is_demonstration: false,
                },
                rule: None,
                limits,
                unassigned: Vec::new(),
            };
            (Network::Absent(reason), judge)
        }
    }
}

/// How results name a model.
pub(crate) fn identity_of(ready: &ReadyModel) -> ModelIdentity {
    ModelIdentity {
        name: ready.name.clone(),
        digest: ready.model.digest().to_owned(),
        is_demonstration: matches!(
            ready.manifest.training_data.kind,
            DataKind::Phantom | DataKind::None
        ),
    }
}

/// How the worker of this program is started.
///
/// # Errors
/// Where the system does not tell the program's path.
pub(crate) fn worker_command() -> io::Result<WorkerCommand> {
    Ok(WorkerCommand {
        launch: launch()?,
        arguments: vec![crate::cli::WORKER_COMMAND.into()],
        deadline: WORKER_DEADLINE,
    })
}

/// Unix time in ms.
pub(crate) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

#[cfg(test)]
mod tests;
