//! One association, from its request to its release (PS3.8 section 9, PS3.7 section 9).
//!
//! In: a connection. Out: how it ended; on the way, objects in the spool. Commands are answered one after another, success only
//! for what is durable ([`messages`]; [`commitment`] for one class). Every wait has a deadline ([`super::wire`]), every fault an answer: a rejection, a status or an abort. While the node
//! stops, a message that is under way is finished and answered, then the association is aborted.

mod commitment;
mod messages;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use dicom_ul::pdu::{
    AbortRQServiceProviderReason, AbortRQSource, AssociationAC, AssociationRQ, Pdu,
    UserVariableItem,
};
use dicom_ul::{read_pdu, write_pdu};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use commitment::Reports;
use messages::Message;

use super::admit::{self, Context, Rejection, Roles};
use super::slots::Slot;
use super::wire::{MAX_PDU_BYTES, MAX_REQUEST_BYTES, Patience, Wire, WireError};
use super::{Intake, part10};
use crate::config::Config;
use crate::operate::visitors::Visit;

const ASSOCIATE_RQ: u8 = 0x01;
const ABORT: u8 = 0x07;
/// Smallest PDU that we send a peer that names a smaller one.
const MIN_PEER_PDU_BYTES: u32 = 128;

/// Why an association ended before its release.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ending {
    /// The connection failed, or a deadline passed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// We rejected it.
    #[error("rejected: {0}")]
    Rejected(#[from] Rejection),
    /// The peer sent something that has no place here.
    #[error("{0}")]
    Protocol(&'static str),
    /// The peer aborted.
    #[error("aborted by the peer")]
    Aborted,
    /// The peer is not who it should be, or does not speak TLS.
    #[error("TLS: {0}")]
    Handshake(std::io::Error),
    /// The node stops.
    #[error("the node stops")]
    Stopping,
}

impl Ending {
    /// The reason that an A-ABORT gives, `None` where none is sent.
    fn abort(&self) -> Option<AbortRQServiceProviderReason> {
        match self {
            Self::Rejected(_)
            | Self::Handshake(_)
            | Self::Aborted
            | Self::Wire(WireError::Closed | WireError::Io(_)) => None,
            Self::Wire(WireError::TooLong { .. }) => {
                Some(AbortRQServiceProviderReason::InvalidPduParameter)
            }
            Self::Protocol(_) => Some(AbortRQServiceProviderReason::UnexpectedPdu),
            Self::Wire(_) | Self::Stopping => {
                Some(AbortRQServiceProviderReason::ReasonNotSpecified)
            }
        }
    }
}

/// What a connection needs to know of the node.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    pub(super) intake: Arc<Intake>,
    pub(super) config: Arc<Config>,
    pub(super) address: IpAddr,
    /// True as soon as the node stops.
    pub(super) stopping: watch::Receiver<bool>,
}

/// An accepted association.
struct Association<S> {
    wire: Wire<S>,
    around: Surroundings,
    contexts: BTreeMap<u8, Context>,
    calling_ae: String,
    max_pdu_bytes: u32,
    message: Message,
    /// Reports of commitment that the peer has not answered.
    reports: Reports,
    /// Counts what it sends.
    visit: Visit,
    /// Given back when the association ends.
    _slot: Slot,
}

/// Serves one connection to its end. `admitted` is called when the association is accepted.
pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    around: Surroundings,
    admitted: impl FnOnce(),
) -> Result<(), Ending> {
    let mut wire = Wire::new(stream);
    let within = around.config.limits.pdu_timeout;
    let request = request(&mut wire, &around).await;
    let accepted = match request {
        Ok(request) => accept(&request, &around)
            .inspect_err(|ending| {
                let calling_ae = &request.calling_ae_title;
                let visitors = &around.intake.visitors;
                visitors.turned_away(calling_ae, around.address, &ending.to_string());
            })
            .map(|accepted| (accepted, request)),
        Err(ending) => Err(ending),
    };
    let ((answer, contexts, max_pdu_bytes, slot), request) = match accepted {
        Ok(accepted) => accepted,
        Err(ending) => {
            farewell(&mut wire, &around, &ending).await;
            return Err(ending);
        }
    };
    admitted();
    let intake = Arc::clone(&around.intake);
    intake.counters.associations.add();
    tracing::info!(calling_ae = %request.calling_ae_title, address = %around.address, contexts = contexts.len(), "association accepted");
    let mut association = Association {
        visit: intake
            .visitors
            .enter(&request.calling_ae_title, around.address),
        wire,
        around,
        contexts,
        calling_ae: request.calling_ae_title,
        max_pdu_bytes,
        message: Message::None,
        reports: Reports::new(Arc::clone(&intake.commitments.promised)),
        _slot: slot,
    };
    let answered = association.wire.write(&encode(&answer), within).await;
    let done = match answered {
        Ok(()) => association.run().await,
        Err(error) => Err(error.into()),
    };
    match &done {
        Ok(()) => association.wire.close(within).await,
        Err(ending) => farewell(&mut association.wire, &association.around, ending).await,
    }
    done
}

/// Tells the peer why, where there is a word for it, and closes.
async fn farewell<S: AsyncRead + AsyncWrite + Unpin>(
    wire: &mut Wire<S>,
    around: &Surroundings,
    ending: &Ending,
) {
    let within = around.config.limits.pdu_timeout;
    let pdu = match ending {
        Ending::Rejected(rejection) => Some(Pdu::AssociationRJ(rejection.pdu())),
        ending => ending.abort().map(|reason| Pdu::AbortRQ {
            source: AbortRQSource::ServiceProvider(reason),
        }),
    };
    if let Some(pdu) = pdu
        && wire.write(&encode(&pdu), within).await.is_ok()
    {
        wire.close(std::time::Duration::from_secs(1).min(within))
            .await;
    }
}

async fn request<S: AsyncRead + AsyncWrite + Unpin>(
    wire: &mut Wire<S>,
    around: &Surroundings,
) -> Result<AssociationRQ, Ending> {
    let limits = &around.config.limits;
    let patience = Patience {
        first_byte: limits.request_timeout,
        whole: limits.request_timeout,
        max_bytes: MAX_REQUEST_BYTES,
    };
    let read = tokio::time::timeout(limits.request_timeout, wire.read(patience, limits)).await;
    let (kind, body) = read.map_err(|_| WireError::Slow(limits.request_timeout))??;
    if kind != ASSOCIATE_RQ {
        return Err(Ending::Protocol("first PDU is no A-ASSOCIATE-RQ"));
    }
    let buffer = wire.lend();
    let request = read_pdu(&buffer[..body.end], MAX_REQUEST_BYTES, true);
    wire.restore(buffer);
    match request {
        Ok(Some(Pdu::AssociationRQ(request))) => Ok(request),
        _ => Err(Ending::Protocol("A-ASSOCIATE-RQ cannot be read")),
    }
}

type Accepted = (Pdu, BTreeMap<u8, Context>, u32, Slot);

/// Decides on a request. Out: the answer, the contexts, the largest PDU the peer takes, and the place.
fn accept(request: &AssociationRQ, around: &Surroundings) -> Result<Accepted, Ending> {
    let config = &around.config;
    if request.protocol_version & 1 == 0 {
        return Err(Rejection::ProtocolVersion.into());
    }
    if admit::trim_uid(&request.application_context_name) != admit::APPLICATION_CONTEXT {
        return Err(Rejection::ApplicationContext.into());
    }
    let (calling, called) = (&request.calling_ae_title, &request.called_ae_title);
    admit::peer(config, calling, called, around.address)?;
    let is_listed = !config.peers.is_empty();
    let slots = &around.intake.slots;
    let slot = slots.take(around.address, calling, is_listed, &config.limits);
    let slot = slot.ok_or(Rejection::Limit)?;
    let ours = Roles {
        is_user: config
            .pacs
            .as_ref()
            .is_some_and(|pacs| pacs.storage_commitment),
        is_provider: config.commitment.is_some(),
    };
    let (roles, role_items) = ours.agreed(&request.user_variables);
    let (contexts, results) = admit::negotiate(&request.presentation_contexts, roles);
    let asked = request.user_variables.iter().find_map(|item| match item {
        UserVariableItem::MaxLength(bytes) => Some(*bytes),
        _ => None,
    });
    // 0 says: no limit.
    let max_pdu_bytes = match asked {
        None | Some(0) => MAX_PDU_BYTES,
        Some(bytes) => bytes.clamp(MIN_PEER_PDU_BYTES, MAX_PDU_BYTES),
    };
    let mut user_variables = vec![
        UserVariableItem::MaxLength(MAX_PDU_BYTES),
        UserVariableItem::ImplementationClassUID(part10::IMPLEMENTATION_CLASS_UID.to_owned()),
        UserVariableItem::ImplementationVersionName(part10::IMPLEMENTATION_VERSION_NAME.to_owned()),
    ];
    user_variables.extend(role_items);
    let answer = Pdu::AssociationAC(AssociationAC {
        protocol_version: 1,
        calling_ae_title: calling.clone(),
        called_ae_title: called.clone(),
        application_context_name: admit::APPLICATION_CONTEXT.to_owned(),
        presentation_contexts: results,
        user_variables,
    });
    Ok((answer, contexts, max_pdu_bytes, slot))
}

/// The bytes of a PDU of ours.
fn encode(pdu: &Pdu) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(512);
    if let Err(error) = write_pdu(&mut bytes, pdu) {
        // Our own PDUs have texts of known length; should one not encode, the peer gets an abort.
        tracing::error!(%error, "PDU not encoded");
        return vec![ABORT, 0, 0, 0, 0, 4, 0, 0, 2, 0];
    }
    bytes
}
