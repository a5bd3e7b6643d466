//! Follows the running node: what it decides goes to the audit log and the metrics, and a model that has served is confirmed.
//!
//! In: the node's announcements of changes. Out: audit lines, counters. It reads the store and changes nothing of it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use shared::uid::Uid;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::audit::{Audit, Event, MAX_FILE_BYTES};
use super::metrics::{Decided, DecidedOutcome};
use super::model_store::ModelStore;
use crate::config::Config;
use crate::decide::Changed;
use crate::decide::store::Origin;
use crate::exit::{Exit, Failure, failure};
use crate::intake::spool::Spool;
use crate::result::{Outcome, State, StudyResult};
use crate::serve::NodeState;
use crate::vital;

/// Slices after which a model has served.
const SERVED_SLICES: u64 = 10;
/// How long a node without work must have run for its model to be trusted.
const SERVED_TIME: Duration = Duration::from_secs(600);
/// Between two looks.
const LOOK: Duration = Duration::from_secs(30);
/// Between two looks for studies that are too old.
const FORGET_EVERY: Duration = Duration::from_secs(600);
/// Revisions that are remembered as recorded.
const MAX_RECORDED: usize = 1024;

/// Opens the audit log.
///
/// # Errors
/// `CannotWrite`.
pub(crate) fn open_audit(config: &Config) -> Result<Audit, Failure> {
    let folder = config.state_dir.join("audit");
    Audit::open(&folder, MAX_FILE_BYTES)
        .with_context(|| format!("audit log {}", folder.display()))
        .map_err(failure(Exit::CannotWrite))
}

/// Writes one line now. A line that cannot be written is logged: results matter more.
pub(crate) fn note(node: &NodeState, event: &Event<'_>) {
    if let Err(error) = node.audit.record(event, jiff::Timestamp::now()) {
        tracing::error!(%error, "the audit log cannot be written");
    }
}

/// Notes that the node works, with the model that it has, and where results were lost before.
pub(crate) fn started(node: &NodeState) {
    let why = match node.store.origin() {
        Origin::Found => None,
        Origin::Missing => Some("missing"),
        Origin::Broken(_) => Some("broken"),
    };
    if let Some(why) = why {
        note(node, &Event::ResultsLost { why });
    }
    let model = node.model.borrow().clone();
    note(
        node,
        &Event::Started {
            version: env!("CARGO_PKG_VERSION"),
            model: &model.name,
            self_test: &model.self_test,
        },
    );
}

/// Notes that the model before was brought back by the node itself.
pub(crate) fn rolled_back(node: &NodeState) {
    let state = node.models.state().unwrap_or_default();
    let digest = state.current.map(|entry| entry.digest).unwrap_or_default();
    note(
        node,
        &Event::Model {
            change: "rolled_back_by_itself",
            digest: &digest,
        },
    );
}

/// The task that follows.
#[derive(Debug)]
pub(crate) struct Watching {
    task: JoinHandle<()>,
    /// Sent when nothing more will be decided.
    end: oneshot::Sender<()>,
}

/// Begins to follow.
pub(crate) fn start(node: &Arc<NodeState>) -> Watching {
    let node = Arc::clone(node);
    // Before anything is decided: what changes from here on is heard.
    let changes = node.changed.subscribe();
    let (end, ended) = oneshot::channel();
    let task = tokio::spawn(vital::task("audit", async move {
        follow(&node, changes, ended).await;
    }));
    Watching { task, end }
}

/// Records what was decided last, confirms the model, because a stop in order is no crash, and notes the end.
pub(crate) async fn stopped(node: &Arc<NodeState>, watching: Watching) {
    // Errors mean that it has ended by itself.
    watching.end.send(()).unwrap_or_default();
    drop(watching.task.await);
    confirm(&node.models, digest_of(node)).await;
    note(node, &Event::Stopped);
}

async fn follow(
    node: &Arc<NodeState>,
    mut changes: Receiver<Changed>,
    mut ended: oneshot::Receiver<()>,
) {
    let mut recorded = VecDeque::with_capacity(MAX_RECORDED);
    let mut is_confirmed = false;
    let mut forgotten = tokio::time::Instant::now();
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            biased;
            change = changes.recv() => match change {
                Ok(change) if change.is_said => said(node, change.study_uid, &mut recorded).await,
                Ok(_) => {}
                Err(RecvError::Lagged(n_missed)) => {
                    tracing::warn!(n_missed, "decisions came too fast for the audit log");
                }
                Err(RecvError::Closed) => return,
            },
            // Looked at only when no change waits.
            _ = &mut ended => return,
            _ = look.tick() => {
                node.slices.rest();
                if forgotten.elapsed() >= FORGET_EVERY {
                    forgotten = tokio::time::Instant::now();
                    forget(node).await;
                }
                let has_served = node.counters.counts().n_analysed >= SERVED_SLICES
                    || node.started.elapsed() >= SERVED_TIME;
                if !is_confirmed && has_served {
                    is_confirmed = confirm(&node.models, digest_of(node)).await;
                }
            }
        }
    }
}

/// Deletes results of studies that are older than the maximum age. By a clock that may be wrong nothing is.
async fn forget(node: &Arc<NodeState>) {
    let config = Arc::clone(&node.config.borrow());
    let Some(ages) = node.intake.clock.ages(&config.retention) else {
        return;
    };
    let before_sequence = last_before_kept(&node.spool);
    let store = Arc::clone(&node.store);
    let forgotten = tokio::task::spawn_blocking(move || {
        if let Err(error) = store.forget_aside(ages) {
            tracing::error!(%error, "the broken results database cannot be deleted");
        }
        store.forget(ages, before_sequence)
    });
    match forgotten.await {
        Ok(Ok(studies)) if studies.is_empty() => {}
        Ok(Ok(studies)) => {
            tracing::info!(n_studies = studies.len(), "studies deleted by age");
            for study_uid in studies {
                note(
                    node,
                    &Event::Deleted {
                        study_uid: &study_uid,
                    },
                );
                // An error means that nobody watches.
                drop(node.changed.send(Changed {
                    study_uid,
                    is_said: false,
                }));
            }
        }
        Ok(Err(error)) => tracing::error!(%error, "old studies cannot be deleted"),
        Err(error) => tracing::error!(%error, "old studies cannot be deleted"),
    }
}

/// The sequence up to which nothing is in the spool any more.
fn last_before_kept(spool: &Spool) -> u64 {
    // Looked at first: what comes meanwhile lies above it.
    let latest = *spool.latest().borrow();
    let first_kept = spool.sequences_after(0).next();
    first_kept.map_or(latest, |first| first.saturating_sub(1))
}

fn digest_of(node: &NodeState) -> String {
    node.model.borrow().digest.clone()
}

/// Takes the model off trial. Whether that is written; where it is not, it is to be tried again.
async fn confirm(models: &ModelStore, digest: String) -> bool {
    let models = models.clone();
    match tokio::task::spawn_blocking(move || models.confirm(&digest)).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => tracing::error!(%error, "the model cannot be confirmed"),
        Err(error) => tracing::error!(%error, "the model cannot be confirmed"),
    }
    false
}

/// Records a revision once.
async fn said(node: &Arc<NodeState>, study_uid: Uid, recorded: &mut VecDeque<(Uid, u32)>) {
    let store = Arc::clone(&node.store);
    let wanted = study_uid.clone();
    let read = tokio::task::spawn_blocking(move || store.study(&wanted)).await;
    let Ok(Ok(Some(result))) = read else {
        // Forgotten in the meantime, or the store says by itself what is wrong with it.
        return;
    };
    let revision = (study_uid, result.revision);
    if recorded.contains(&revision) {
        return;
    }
    if recorded.len() == MAX_RECORDED {
        recorded.pop_front();
    }
    recorded.push_back(revision);
    let Some((outcome, event)) = decided(&result) else {
        return;
    };
    node.metrics
        .results
        .get_or_create(&Decided { outcome })
        .inc();
    note(node, &event);
}

/// A result as a line; `None` while nothing is said.
fn decided(result: &StudyResult) -> Option<(DecidedOutcome, Event<'_>)> {
    let is_complete = result.state == State::Complete;
    let (counted, outcome, code) = match &result.outcome {
        Outcome::Pending => return None,
        Outcome::Positive if is_complete => (DecidedOutcome::positive, "positive", None),
        Outcome::Positive => (DecidedOutcome::provisional, "positive", None),
        Outcome::NotDetected => (DecidedOutcome::not_detected, "not_detected", None),
        Outcome::NotAnalysed { code, .. } => (
            DecidedOutcome::not_analysed,
            "not_analysed",
            Some(code.as_str()),
        ),
    };
    let event = Event::Decided {
        study_uid: &result.study_uid,
        revision: result.revision,
        state: if is_complete {
            "complete"
        } else {
            "provisional"
        },
        outcome,
        code,
        score: result.score,
        n_slices: result.slices.len(),
        n_analysed: result.n_analysed(),
        model: &result.model.name,
    };
    Some((counted, event))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::spool::{Header, SpoolLimits};
    use crate::page::example;

    #[test]
    fn an_empty_spool_keeps_no_study_of_a_wrong_clock() {
        let folder = tempfile::tempdir().unwrap();
        let limits = SpoolLimits {
            keep_free_bytes: 0,
            ..SpoolLimits::default()
        };
        let spool = Spool::open(folder.path(), &limits).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            for kept in 0..2 {
                assert_eq!(last_before_kept(&spool), 0, "{kept} objects are kept");
                let mut entry = spool.begin(Header::default()).unwrap();
                entry.write(b"object").unwrap();
                entry.commit().await.unwrap();
            }
            spool.purge(vec![1]).await.unwrap();
            assert_eq!(last_before_kept(&spool), 1);
            spool.purge(vec![2]).await.unwrap();
            assert_eq!(last_before_kept(&spool), 2);
        });
    }

    #[test]
    fn a_decision_is_recorded_without_the_patient() {
        for result in example::studies() {
            let Some((_, event)) = decided(&result) else {
                assert_eq!(result.outcome, Outcome::Pending);
                continue;
            };
            let line = serde_json::to_string(&event).unwrap();
            assert!(line.contains(result.study_uid.as_str()));
            for element in &result.patient.elements {
                let value = String::from_utf8_lossy(&element.value).into_owned();
                assert!(!line.contains(&value), "{value} in {line}");
            }
        }
    }

    #[tokio::test]
    async fn a_model_that_cannot_be_confirmed_is_not_taken_as_confirmed() {
        let folder = tempfile::tempdir().unwrap();
        let models = ModelStore::new(folder.path());
        assert!(confirm(&models, String::new()).await);
        std::fs::write(folder.path().join("models"), "no folder").unwrap();
        assert!(!confirm(&models, String::new()).await);
    }

    #[test]
    fn a_provisional_positive_is_told_from_a_final_one() {
        let mut result = example::study(1, "A^B", 9, Some(4));
        assert_eq!(decided(&result).unwrap().0, DecidedOutcome::positive);
        result.state = State::Provisional;
        assert_eq!(decided(&result).unwrap().0, DecidedOutcome::provisional);
    }
}
