//! Storage commitment within the node: what of the configuration it is given, and what it tells the audit log and the page.

use std::sync::Arc;
use std::time::Duration;

use redb::Database;
use rustls::ClientConfig;
use tokio::sync::broadcast;

use super::Commitments;
use super::asked::{Asked, Counts, End, Wanted};
use super::asking::{self, Asking, on_disk};
use super::promised::Promised;
use super::reporting::{self, Reporting};
use crate::config::Config;
use crate::exit::{Exit, Failure, failure};
use crate::intake::spool::Spool;
use crate::operate::audit::{Audit, Event};
use crate::send::back_off::Patience;
use crate::send::connection::Connection;
use crate::send::pacs::Pacs;
use crate::serve::NodeState;
use crate::vital;

/// How long an association with the PACS is kept open for its reports.
const LINGER: Duration = Duration::from_secs(5);

/// Opens what was asked and promised in the results database.
///
/// # Errors
/// `CannotWrite` where the medium fails.
pub(crate) fn open(
    database: &Arc<Database>,
    spool: &Arc<Spool>,
    audit: &Arc<Audit>,
    page_changed: &broadcast::Sender<()>,
) -> Result<Commitments, Failure> {
    let (audit, page_changed) = (Arc::clone(audit), page_changed.clone());
    let observe = move |wanted: &Wanted, end| {
        note(&audit, wanted, end);
        // An error means that nobody watches.
        drop(page_changed.send(()));
    };
    let cannot_write = failure(Exit::CannotWrite);
    let asked = Asked::open(Arc::clone(database), Box::new(observe)).map_err(cannot_write)?;
    let promised = Promised::open(Arc::clone(database), Arc::clone(spool));
    Ok(Commitments {
        asked: Arc::new(asked),
        promised: Arc::new(promised.map_err(failure(Exit::CannotWrite))?),
    })
}

fn note(audit: &Audit, wanted: &Wanted, end: End) {
    let event = Event::Commitment {
        study_uid: &wanted.study_uid,
        revision: wanted.revision,
        channel: wanted.channel.name(),
        how: match end {
            End::Committed => "committed",
            End::NotCommitted => "not_committed",
        },
        reason: wanted.remark.as_deref(),
    };
    if let Err(error) = audit.record(&event, jiff::Timestamp::now()) {
        tracing::error!(%error, "the audit log cannot be written");
    }
}

/// Starts to ask and to report.
pub(crate) fn start(node: &Arc<NodeState>) {
    let commitments = &node.intake.commitments;
    let config = Arc::clone(&node.config.borrow());
    let tls = client(node);
    let asking = Asking::new(
        Arc::clone(&commitments.asked),
        asking_way(&config, tls.clone()),
    );
    let reporting = Reporting::new(
        Arc::clone(&commitments.promised),
        reporting_way(&config, tls.as_ref()),
    );
    let asked = Arc::clone(&asking).run(node.stopping.clone());
    let reported = Arc::clone(&reporting).run(node.stopping.clone());
    let configuring = reconfigure(Arc::clone(node), asking, reporting);
    tokio::spawn(vital::task("commitment", asked));
    tokio::spawn(vital::task("commitment", reported));
    tokio::spawn(vital::task("commitment", configuring));
}

async fn reconfigure(node: Arc<NodeState>, asking: Arc<Asking>, reporting: Arc<Reporting>) {
    let mut config = node.config.clone();
    while config.changed().await.is_ok() {
        let config = Arc::clone(&config.borrow_and_update());
        let tls = client(&node);
        asking.configure(asking_way(&config, tls.clone()));
        reporting.configure(reporting_way(&config, tls.as_ref()));
        // What was refused may be taken now that the operator has changed something.
        match on_disk(&node.intake.commitments.asked, Asked::revive).await {
            Ok(0) => {}
            Ok(revived) => tracing::info!(revived, "commitment is asked for again"),
            Err(error) => tracing::error!(%error, "commitments cannot be written"),
        }
    }
}

/// How many documents wait for the PACS to commit, and to how many it did not; none where that cannot be read, which is logged.
pub(crate) fn counts(asked: &Asked) -> Counts {
    asked.counts().unwrap_or_else(|error| {
        tracing::error!(%error, "commitments cannot be read");
        Counts::default()
    })
}

/// TLS towards peers, where the node speaks it.
fn client(node: &NodeState) -> Option<Arc<ClientConfig>> {
    let identity = node.intake.tls.borrow();
    let identity = identity.as_ref();
    identity.map(|identity| Arc::clone(&identity.client))
}

fn asking_way(config: &Config, tls: Option<Arc<ClientConfig>>) -> Option<asking::Way> {
    let pacs = config
        .pacs
        .as_ref()
        .filter(|pacs| pacs.storage_commitment)?;
    Some(asking::Way {
        pacs: Pacs::configured(config, pacs, tls.filter(|_| pacs.tls)),
        answer_within: pacs.commitment_timeout,
        linger: LINGER,
        patience: Patience::default(),
    })
}

fn reporting_way(config: &Config, tls: Option<&Arc<ClientConfig>>) -> Option<reporting::Way> {
    config.commitment?;
    let peers = config.peers.iter().filter_map(|(title, peer)| {
        let (host, port) = peer.report_to.clone()?;
        let tls = tls.cloned();
        Some((title.clone(), Connection { host, port, tls }))
    });
    Some(reporting::Way {
        calling: config.ae_title.clone(),
        peers: peers.collect(),
        deadline: Patience::default().deadline,
    })
}
