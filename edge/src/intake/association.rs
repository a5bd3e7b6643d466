//! One association, from its request to its release (PS3.8 section 9, PS3.7 section 9).
//!
//! In: a connection. Out: how it ended; on the way, objects in the spool. Commands are answered one after another, success only
//! for what is durable. Every wait has a deadline ([`super::wire`]), every fault an answer: a rejection, a status or an abort. While the node
//! stops, a message that is under way is finished and answered, then the association is aborted.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use dicom_ul::pdu::{
    AbortRQServiceProviderReason, AbortRQSource, AssociationAC, AssociationRQ, PDataValue,
    PDataValueType, Pdu, UserVariableItem,
};
use dicom_ul::{read_pdu, write_pdu};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use super::admit::{self, Context, Rejection, Slot, Use};
use super::dimse::{self, MAX_COMMAND_BYTES, Request, Status, field};
use super::store::Store;
use super::wire::{MAX_PDU_BYTES, MAX_REQUEST_BYTES, Patience, Wire, WireError};
use super::{Intake, part10};
use crate::config::{Config, Limits};
use crate::operate::visitors::Visit;

const ASSOCIATE_RQ: u8 = 0x01;
const P_DATA: u8 = 0x04;
const RELEASE_RQ: u8 = 0x05;
const ABORT: u8 = 0x07;
/// Message control header of a PDV: command or data set, last fragment or not (PS3.8 annex E).
const IS_COMMAND: u8 = 1;
const IS_LAST: u8 = 2;
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
    /// Counts what it sends.
    visit: Visit,
    /// Given back when the association ends.
    _slot: Slot,
}

/// How much of a message has come.
#[derive(Debug)]
enum Message {
    /// Nothing.
    None,
    /// Part of a command.
    Command { context_id: u8, bytes: Vec<u8> },
    /// A C-STORE command and part of its data set.
    Store { context_id: u8, store: Box<Store> },
    /// Another command and part of a data set that is of no use.
    Ignored { context_id: u8, request: Request },
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
    let (contexts, results) = admit::negotiate(&request.presentation_contexts);
    let asked = request.user_variables.iter().find_map(|item| match item {
        UserVariableItem::MaxLength(bytes) => Some(*bytes),
        _ => None,
    });
    // 0 says: no limit.
    let max_pdu_bytes = match asked {
        None | Some(0) => MAX_PDU_BYTES,
        Some(bytes) => bytes.clamp(MIN_PEER_PDU_BYTES, MAX_PDU_BYTES),
    };
    let answer = Pdu::AssociationAC(AssociationAC {
        protocol_version: 1,
        calling_ae_title: calling.clone(),
        called_ae_title: called.clone(),
        application_context_name: admit::APPLICATION_CONTEXT.to_owned(),
        presentation_contexts: results,
        user_variables: vec![
            UserVariableItem::MaxLength(MAX_PDU_BYTES),
            UserVariableItem::ImplementationClassUID(part10::IMPLEMENTATION_CLASS_UID.to_owned()),
            UserVariableItem::ImplementationVersionName(
                part10::IMPLEMENTATION_VERSION_NAME.to_owned(),
            ),
        ],
    });
    Ok((answer, contexts, max_pdu_bytes, slot))
}

impl<S: AsyncRead + AsyncWrite + Unpin> Association<S> {
    /// Serves messages until the release.
    async fn run(&mut self) -> Result<(), Ending> {
        let limits = self.around.config.limits.clone();
        let mut patience = Patience {
            first_byte: limits.idle_timeout,
            whole: limits.pdu_timeout,
            max_bytes: MAX_PDU_BYTES,
        };
        loop {
            if matches!(self.message, Message::None) {
                patience.first_byte = limits.idle_timeout;
                self.wait_for_message(patience, &limits).await?;
            } else {
                patience.first_byte = limits.pdu_timeout;
            }
            let (kind, body) = self.wire.read(patience, &limits).await?;
            match kind {
                P_DATA => {}
                RELEASE_RQ => {
                    let answer = encode(&Pdu::ReleaseRP);
                    return Ok(self.wire.write(&answer, limits.pdu_timeout).await?);
                }
                ABORT => return Err(Ending::Aborted),
                _ => return Err(Ending::Protocol("PDU has no place in an association")),
            }
            // A PDU holds many values; each is handled before the next PDU is read, so that the peer feels our pace.
            let buffer = self.wire.lend();
            let done = self.values(buffer.get(body).unwrap_or_default()).await;
            self.wire.restore(buffer);
            done?;
        }
    }

    /// Waits for a message, or for the node to stop.
    async fn wait_for_message(
        &mut self,
        patience: Patience,
        limits: &Limits,
    ) -> Result<(), Ending> {
        let mut stopping = self.around.stopping.clone();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|is_stopping| *is_stopping) => Err(Ending::Stopping),
            waited = self.wire.wait(patience, limits) => Ok(waited?),
        }
    }

    async fn values(&mut self, body: &[u8]) -> Result<(), Ending> {
        let malformed = Ending::Protocol("P-DATA-TF holds no whole values");
        let mut rest = body;
        while !rest.is_empty() {
            let Some((head, tail)) = rest.split_first_chunk::<4>() else {
                return Err(malformed);
            };
            let length = u32::from_be_bytes(*head) as usize;
            let Some((value, tail)) = tail.split_at_checked(length) else {
                return Err(malformed);
            };
            let [context_id, flags, data @ ..] = value else {
                return Err(malformed);
            };
            self.value(*context_id, *flags, data).await?;
            rest = tail;
        }
        Ok(())
    }

    async fn value(&mut self, context_id: u8, flags: u8, data: &[u8]) -> Result<(), Ending> {
        if !self.contexts.contains_key(&context_id) {
            return Err(Ending::Protocol("presentation context was not accepted"));
        }
        let is_command = flags & IS_COMMAND != 0;
        let is_last = flags & IS_LAST != 0;
        if is_command {
            return self.command(context_id, data, is_last).await;
        }
        match &mut self.message {
            Message::Store {
                context_id: of,
                store,
            } if *of == context_id => store.data(data),
            Message::Ignored { context_id: of, .. } if *of == context_id => {}
            _ => return Err(Ending::Protocol("data set without a command")),
        }
        if is_last {
            self.wire.measure_rate(false);
            match std::mem::replace(&mut self.message, Message::None) {
                Message::Store { store, .. } => self.stored(context_id, *store).await?,
                Message::Ignored { request, .. } => self.decline(context_id, &request).await?,
                Message::None | Message::Command { .. } => {}
            }
        }
        Ok(())
    }

    async fn command(&mut self, context_id: u8, data: &[u8], is_last: bool) -> Result<(), Ending> {
        if matches!(self.message, Message::None) {
            self.wire.measure_rate(true);
            self.message = Message::Command {
                context_id,
                bytes: Vec::new(),
            };
        }
        let Message::Command {
            context_id: of,
            bytes,
        } = &mut self.message
        else {
            return Err(Ending::Protocol("command within a data set"));
        };
        if *of != context_id || bytes.len() + data.len() > MAX_COMMAND_BYTES {
            return Err(Ending::Protocol("command set is no whole"));
        }
        bytes.extend_from_slice(data);
        if !is_last {
            return Ok(());
        }
        let request = dimse::parse(bytes).ok_or(Ending::Protocol("command set cannot be read"))?;
        self.message = Message::None;
        self.begin(context_id, request).await
    }

    /// Begins to do what a command asks for.
    async fn begin(&mut self, context_id: u8, request: Request) -> Result<(), Ending> {
        let Some(context) = self.contexts.get(&context_id) else {
            return Ok(());
        };
        let is_storage = context.class.purpose != Use::Verification;
        if request.has_data_set {
            self.message = if request.field == field::STORE && is_storage {
                let intake = &self.around.intake;
                let address = self.around.address.to_string();
                let store = Store::begin(intake, request, context, &self.calling_ae, &address);
                Message::Store {
                    context_id,
                    store: Box::new(store),
                }
            } else {
                Message::Ignored {
                    context_id,
                    request,
                }
            };
            return Ok(());
        }
        self.wire.measure_rate(false);
        match request.field {
            field::ECHO if !is_storage => {
                self.around.intake.counters.echoes.add();
                self.respond(context_id, &request, Status::Success, "")
                    .await
            }
            field::STORE if is_storage => {
                let comment = "C-STORE without a data set";
                self.respond(context_id, &request, Status::CannotUnderstand, comment)
                    .await
            }
            field::CANCEL => Ok(()),
            _ => self.decline(context_id, &request).await,
        }
    }

    async fn stored(&mut self, context_id: u8, store: Store) -> Result<(), Ending> {
        let (request, done) = store.finish(&self.around.intake).await;
        match done {
            Ok(sequence) => {
                self.visit.stored();
                tracing::debug!(sequence, sop_uid = %request.sop_instance_uid, "object stored");
                self.respond(context_id, &request, Status::Success, "")
                    .await
            }
            Err(refusal) => {
                self.visit.refused();
                let status = format!("{:04x}", refusal.status as u16);
                tracing::warn!(%status, reason = refusal.comment, calling_ae = %self.calling_ae, "object refused");
                self.respond(context_id, &request, refusal.status, refusal.comment)
                    .await
            }
        }
    }

    /// Answers a command that the context's class does not have.
    async fn decline(&mut self, context_id: u8, request: &Request) -> Result<(), Ending> {
        if request.field & field::RESPONSE != 0 {
            return Err(Ending::Protocol("response without a request"));
        }
        let status = match request.field {
            field::STORE => Status::SopClassNotSupported,
            _ => Status::UnrecognizedOperation,
        };
        self.respond(context_id, request, status, "").await
    }

    async fn respond(
        &mut self,
        context_id: u8,
        request: &Request,
        status: Status,
        comment: &str,
    ) -> Result<(), Ending> {
        let command = dimse::response(request, status, comment);
        // A PDV's length, context and control header take six bytes of a PDU.
        let most = usize::try_from(self.max_pdu_bytes).unwrap_or(usize::MAX) - 6;
        let n_chunks = command.len().div_ceil(most);
        let within = self.around.config.limits.pdu_timeout;
        let mut bytes = Vec::with_capacity(command.len() + 64);
        for (index, chunk) in command.chunks(most).enumerate() {
            bytes.extend_from_slice(&encode(&Pdu::PData {
                data: vec![PDataValue {
                    presentation_context_id: context_id,
                    value_type: PDataValueType::Command,
                    is_last: index + 1 == n_chunks,
                    data: chunk.to_vec(),
                }],
            }));
        }
        Ok(self.wire.write(&bytes, within).await?)
    }
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
