//! The page's sources, from the parts of a running node.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use tokio::sync::watch;

use super::{Settings, Sources};
use crate::commitment;
use crate::config::Config;
use crate::decide::store::{Origin, StoreError};
use crate::exit::said;
use crate::intake::unix_ms;
use crate::operate::board;
use crate::operate::metrics::Counts;
use crate::operate::status::{Peer, Status};
use crate::operate::visitors::Visitors;
use crate::send;
use crate::serve::NodeState;
use crate::vital;

/// What the page shows of `node`.
pub(crate) fn sources(node: &Arc<NodeState>) -> Sources {
    let of = |node: &Arc<NodeState>| Arc::clone(node);
    let (for_status, for_counts) = (of(node), of(node));
    let (for_studies, for_study, for_slice) = (of(node), of(node), of(node));
    Sources {
        studies: Box::new(move |show| read(for_studies.store.each_study(show))),
        study: Box::new(move |uid| read(for_study.store.study(uid))),
        slice: Box::new(move |slice, has_heatmap| {
            for_slice.slices.read(&for_slice.spool, slice, has_heatmap)
        }),
        status: Box::new(move || status(&for_status)),
        counts: Box::new(move || counts(&for_counts)),
        metrics: node.metrics.clone(),
        changed: node.page_changed.clone(),
        study_changed: node.changed.clone(),
    }
}

/// How the page is shown, by the configuration.
///
/// # Errors
/// The token's file cannot be read, or holds nothing.
pub(crate) fn settings(config: &Config) -> anyhow::Result<Settings> {
    let token = config.page.token_file.as_deref().map(token);
    Ok(Settings {
        is_anonymous: config.page.hide_patient_names,
        token: token.transpose()?,
    })
}

fn token(path: &Path) -> anyhow::Result<String> {
    let named = || format!("[page] token_file {}", path.display());
    let text = std::fs::read_to_string(path).with_context(named)?;
    let token = text.trim();
    if token.is_empty() {
        return Err(anyhow!("the file is empty").context(named()));
    }
    Ok(token.to_owned())
}

/// The settings, and those of each configuration that is read again; one whose token file cannot be read changes nothing.
pub(crate) fn follow_settings(
    node: &Arc<NodeState>,
    first: Settings,
) -> watch::Receiver<Arc<Settings>> {
    let (sender, receiver) = watch::channel(Arc::new(first));
    let mut config = node.config.clone();
    tokio::spawn(vital::task("page", async move {
        while config.changed().await.is_ok() {
            let config = Arc::clone(&config.borrow_and_update());
            match settings(&config) {
                Ok(settings) => drop(sender.send_replace(Arc::new(settings))),
                Err(error) => {
                    tracing::error!(error = said(&error), "the page's settings are not changed")
                }
            }
        }
    }));
    receiver
}

/// What the store says; nothing where it cannot be read, which is logged.
fn read<T: Default>(answer: Result<T, StoreError>) -> T {
    answer.unwrap_or_else(|error| {
        let error: &dyn std::error::Error = &error;
        tracing::error!(error, "the results database cannot be read");
        T::default()
    })
}

fn counts(node: &NodeState) -> Counts {
    let decided = node.counters.counts();
    let intake = &node.intake.counters;
    let spool = node.spool.counts();
    Counts {
        connections: intake.connections.get(),
        associations: intake.associations.get(),
        rejected_peer: intake.rejected_peer.get(),
        rejected_limit: intake.rejected_limit.get(),
        timed_out: intake.timed_out.get(),
        aborted: intake.aborted.get(),
        echoes: intake.echoes.get(),
        objects: intake.stored.get(),
        refused_room: intake.refused_room.get(),
        refused_object: intake.refused_object.get(),
        files_taken: intake.files_taken.get(),
        files_quarantined: intake.files_quarantined.get(),
        sync_calls: spool.sync_calls,
        written_bytes: spool.written_bytes,
        analysed: decided.n_analysed,
        not_analysed: decided.n_not_analysed,
        recognised: decided.n_recognised,
        workers_replaced: decided.n_workers_replaced,
        store_failures: decided.n_store_failures,
        results_lost: u64::from(*node.store.origin() != Origin::Found),
        letters_lost: node.outbox.n_lost(),
    }
}

fn status(node: &NodeState) -> Status {
    let config = Arc::clone(&node.config.borrow());
    let disk = board::disk_bytes(&config.state_dir).unwrap_or_default();
    let counts = counts(node);
    let model = node.model.borrow().clone();
    let letters = send::node::counts(&node.outbox);
    let commitments = commitment::node::counts(&node.intake.commitments.asked);
    let (studies, positive_studies) = read(node.store.count_studies());
    let cursor = node.counters.counts().cursor;
    let mut status = Status {
        problems: problems(node, cursor),
        version: env!("CARGO_PKG_VERSION").into(),
        ae_title: config.ae_title.clone(),
        dicom_port: config.dicom_port,
        received: counts.objects,
        analysed: counts.analysed,
        not_analysed: counts.not_analysed,
        waiting: node.spool.latest().borrow().saturating_sub(cursor),
        studies,
        positive_studies,
        outbox_waiting: letters.waiting,
        dead_letters: letters.dead,
        given_up: send::node::given_up(&node.outbox),
        commitments_waiting: commitments.waiting,
        not_committed: commitments.failed,
        model: model.name,
        model_digest: model.digest,
        model_notice: model.notice,
        is_demonstration: model.is_demonstration,
        self_test: model.self_test,
        disk_free_bytes: disk.0,
        disk_total_bytes: disk.1,
        spool_bytes: node.spool.counts().used_bytes,
        is_accepting: node.spool.room().is_ok(),
        associations_open: node.intake.slots.open() as u64,
        workers_replaced: counts.workers_replaced,
        peers: peers(&config, &node.intake.visitors),
        certificate_expires_s: certificate_expires_s(node),
        temperature_celsius: board::temperature_celsius(),
        is_clock_trusted: node.intake.clock.is_plausible(unix_ms()),
        is_deleting_by_age: node.intake.clock.ages(&config.retention).is_some(),
        uptime_s: node.started.elapsed().as_secs(),
        ..Status::default()
    };
    judge(&mut status);
    status
}

/// The problems that no figure shows.
fn problems(node: &NodeState, cursor: u64) -> Vec<String> {
    let mut problems = Vec::new();
    let rebuild_until = read(node.store.rebuild_until());
    if cursor < rebuild_until {
        problems.push(format!(
            "The results database was lost: stored studies are decided again, {} objects to go.",
            rebuild_until - cursor
        ));
    }
    if let Err(error) = node.spool.room() {
        problems.push(format!("Objects are refused: {error}."));
    }
    if node.counters.counts().is_unconfined {
        let text = "The worker runs without its seccomp filter: this kernel has none.";
        problems.push(text.into());
    }
    problems
}

/// The state, and the problems that follow from the figures.
fn judge(status: &mut Status) {
    if !status.is_clock_trusted {
        status
            .problems
            .push("The clock is not set: nothing is deleted by age.".into());
    }
    let is_model_known = !status.self_test.is_empty();
    if is_model_known && !status.is_model_sound() {
        let text = format!(
            "The model failed its self-test; slices are stored and not analysed. {}",
            status.self_test
        );
        status.problems.push(text);
    }
    if status.dead_letters > 0 {
        let text = format!(
            "{} results could not be delivered and were given up.",
            status.dead_letters
        );
        status.problems.push(text);
    }
    if status.not_committed > 0 {
        let text = format!(
            "{} results were delivered, but the PACS has not committed to them.",
            status.not_committed
        );
        status.problems.push(text);
    }
    status.state = match (status.is_accepting, status.problems.is_empty()) {
        (false, _) => "refusing",
        (true, false) => "degraded",
        (true, true) => "ready",
    }
    .into();
}

fn certificate_expires_s(node: &NodeState) -> Option<i64> {
    node.intake.tls.borrow().as_ref()?.expires_s
}

/// Who was heard, who is listed and silent, and where results go.
fn peers(config: &Config, visitors: &Visitors) -> Vec<Peer> {
    let seen = visitors.seen();
    let heard = seen.iter().map(|((ae_title, address), seen)| Peer {
        ae_title: ae_title.clone(),
        address: address.to_string(),
        role: "sends".into(),
        last_seen_ms: Some(seen.last_ms),
        n_objects: seen.n_objects,
    });
    let is_silent = |name: &str| !seen.iter().any(|((title, _), _)| title.trim() == name);
    let silent = config.peers.iter().filter(|(name, _)| is_silent(name));
    let silent = silent.map(|(name, peer)| Peer {
        ae_title: name.clone(),
        address: peer
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", "),
        role: "sends".into(),
        ..Peer::default()
    });
    let receivers = config.pacs.iter().map(|pacs| Peer {
        ae_title: pacs.ae_title.clone(),
        address: format!("{}:{}", pacs.host, pacs.port),
        role: "receives".into(),
        ..Peer::default()
    });
    heard.chain(silent).chain(receivers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn well() -> Status {
        Status {
            is_accepting: true,
            is_clock_trusted: true,
            self_test: "passed".into(),
            ..Status::default()
        }
    }

    #[track_caller]
    fn check(mut status: Status, state: &str, n_problems: usize) {
        judge(&mut status);
        assert_eq!(
            (status.state.as_str(), status.problems.len()),
            (state, n_problems)
        );
    }

    #[test]
    fn the_state_follows_from_the_figures() {
        check(well(), "ready", 0);
        check(
            Status {
                self_test: "other bits".into(),
                ..well()
            },
            "degraded",
            1,
        );
        check(
            Status {
                dead_letters: 2,
                is_clock_trusted: false,
                ..well()
            },
            "degraded",
            2,
        );
        check(
            Status {
                is_accepting: false,
                ..well()
            },
            "refusing",
            0,
        );
    }
}
