//! Reports to peers whose association is gone: a new one to the address that the configuration names, as provider by role selection.
//!
//! In: what [`super::promised`] owes. A peer without an address in the configuration, or that cannot be reached, is tried again until the commitment ends.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use dicom_core::VR;
use dicom_dictionary_std::tags;
use tokio::sync::watch;

use super::asking::on_disk;
use super::message::Transaction;
use super::promised::Promised;
use super::{EVENT_REPORT, SOP_CLASS_UID, SOP_INSTANCE_UID};
use crate::intake::unix_ms;
use crate::send::association::{Association, AssociationError, Proposal};
use crate::send::connection::Connection;
use crate::send::data_set::{DataSet, Syntax};

/// How long after an association ended its report goes out on another, and then how often a peer is tried.
const PAUSE: Duration = Duration::from_secs(60);

/// Where reports go.
#[derive(Clone, Debug)]
pub(crate) struct Way {
    /// Our AE title.
    pub(crate) calling: String,
    /// Peers by AE title.
    pub(crate) peers: BTreeMap<String, Connection>,
    /// Longest time for one exchange.
    pub(crate) deadline: Duration,
}

/// The reporter.
#[derive(Debug)]
pub(crate) struct Reporting {
    promised: Arc<Promised>,
    way: RwLock<Option<Arc<Way>>>,
}

impl Reporting {
    /// A reporter; without a way nothing is reported.
    pub(crate) fn new(promised: Arc<Promised>, way: Option<Way>) -> Arc<Self> {
        let way = RwLock::new(way.map(Arc::new));
        Arc::new(Self { promised, way })
    }

    /// Uses another configuration from the next pass on.
    pub(crate) fn configure(&self, way: Option<Way>) {
        *self.way.write().unwrap_or_else(PoisonError::into_inner) = way.map(Arc::new);
        self.promised.bell.notify_waiters();
    }

    /// Reports until `shutdown` becomes true.
    pub(crate) async fn run(self: Arc<Self>, mut shutdown: watch::Receiver<bool>) {
        let serve = async {
            loop {
                let mut bell = std::pin::pin!(self.promised.bell.notified());
                bell.as_mut().enable();
                self.pass().await;
                tokio::select! {
                    () = &mut bell => {}
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
        };
        tokio::select! {
            () = serve => {}
            _ = shutdown.wait_for(|is_down| *is_down) => {}
        }
    }

    fn way(&self) -> Option<Arc<Way>> {
        let way = self.way.read().unwrap_or_else(PoisonError::into_inner);
        way.clone()
    }

    async fn pass(&self) {
        let Some(way) = self.way() else {
            return;
        };
        let owed = match on_disk(&self.promised, |promised| promised.owed(unix_ms())).await {
            Ok(owed) => owed,
            Err(error) => {
                tracing::error!(%error, "commitments cannot be read");
                return;
            }
        };
        for (calling_ae, report) in owed {
            let Some(peer) = way.peers.get(&calling_ae) else {
                tracing::warn!(
                    calling_ae,
                    "a report of storage commitment has no address: set [peers] report_to"
                );
                continue;
            };
            let association = match self.deliver(&way, &calling_ae, peer, &report).await {
                Ok(association) => association,
                Err(error) => {
                    tracing::warn!(calling_ae, %error, "storage commitment not reported");
                    continue;
                }
            };
            // Before the release, so that whoever has seen that is not told again.
            let uid = report.uid.clone();
            let done = on_disk(&self.promised, move |promised| promised.reported(&uid));
            if let Err(error) = done.await {
                tracing::error!(%error, "a report cannot be recorded");
            }
            association.release().await;
        }
    }

    /// Reports. Out: the association on which the peer has taken the report.
    async fn deliver(
        &self,
        way: &Way,
        called: &str,
        peer: &Connection,
        report: &Transaction,
    ) -> Result<Association, AssociationError> {
        let stream = peer.open(way.deadline).await?;
        let proposal = Proposal {
            calling: &way.calling,
            called,
            sop_classes: &[SOP_CLASS_UID],
            is_provider: true,
        };
        let mut association = Association::request(stream, &proposal, way.deadline).await?;
        let data = report.data_set().encode(Syntax::Explicit);
        let status = association
            .ask_status(SOP_CLASS_UID, command(report), &data, way.deadline)
            .await?;
        if status == 0 {
            return Ok(association);
        }
        association.release().await;
        Err(AssociationError::Protocol("the report was refused"))
    }
}

/// N-EVENT-REPORT-RQ (PS3.7 section 10.3.1), without message ID.
pub(crate) fn command(report: &Transaction) -> DataSet {
    let mut command = DataSet::default();
    command
        .text(tags::AFFECTED_SOP_CLASS_UID, VR::UI, SOP_CLASS_UID)
        .text(tags::AFFECTED_SOP_INSTANCE_UID, VR::UI, SOP_INSTANCE_UID)
        .u16(tags::COMMAND_FIELD, EVENT_REPORT)
        .u16(tags::EVENT_TYPE_ID, report.event_type());
    command
}
