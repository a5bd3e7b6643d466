//! The messages of an accepted association: commands and data sets put together from values, each answered in its turn.

use dicom_ul::pdu::{PDataValue, PDataValueType, Pdu};
use tokio::io::{AsyncRead, AsyncWrite};

use super::super::classes::Use;
use super::super::dimse::{self, MAX_COMMAND_BYTES, Request, Status, field};
use super::super::store::Store;
use super::super::wire::{MAX_PDU_BYTES, Patience};
use super::{Association, Ending, encode};
use crate::commitment::message::MAX_BYTES;
use crate::config::Limits;

const P_DATA: u8 = 0x04;
const RELEASE_RQ: u8 = 0x05;
/// Message control header of a PDV: command or data set, last fragment or not (PS3.8 annex E).
const IS_COMMAND: u8 = 1;
const IS_LAST: u8 = 2;

/// How much of a message has come.
#[derive(Debug)]
pub(super) enum Message {
    /// Nothing.
    None,
    /// Part of a command.
    Command { context_id: u8, bytes: Vec<u8> },
    /// A C-STORE command and part of its data set.
    Store { context_id: u8, store: Box<Store> },
    /// A command about commitment and part of its data set.
    Commitment {
        context_id: u8,
        request: Request,
        bytes: Vec<u8>,
    },
    /// Another command and part of a data set that is of no use.
    Ignored { context_id: u8, request: Request },
}

impl<S: AsyncRead + AsyncWrite + Unpin> Association<S> {
    /// Serves messages until the release.
    pub(super) async fn run(&mut self) -> Result<(), Ending> {
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
                super::ABORT => return Err(Ending::Aborted),
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
            Message::Commitment {
                context_id: of,
                bytes,
                ..
            } if *of == context_id => {
                if bytes.len() + data.len() > MAX_BYTES {
                    return Err(Ending::Protocol("data set of a commitment is too long"));
                }
                bytes.extend_from_slice(data);
            }
            Message::Ignored { context_id: of, .. } if *of == context_id => {}
            _ => return Err(Ending::Protocol("data set without a command")),
        }
        if is_last {
            self.wire.measure_rate(false);
            match std::mem::replace(&mut self.message, Message::None) {
                Message::Store { store, .. } => self.stored(context_id, *store).await?,
                Message::Commitment { request, bytes, .. } => {
                    self.committed(context_id, &request, bytes).await?;
                }
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
        let purpose = context.class.purpose;
        let is_storage = purpose.is_storage();
        if purpose == Use::Commitment {
            return self.commitment(context_id, request).await;
        }
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
            field::ECHO if purpose == Use::Verification => {
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
    pub(super) async fn decline(
        &mut self,
        context_id: u8,
        request: &Request,
    ) -> Result<(), Ending> {
        if request.field & field::RESPONSE != 0 {
            return Err(Ending::Protocol("response without a request"));
        }
        let status = match request.field {
            field::STORE => Status::SopClassNotSupported,
            _ => Status::UnrecognizedOperation,
        };
        self.respond(context_id, request, status, "").await
    }

    pub(super) async fn respond(
        &mut self,
        context_id: u8,
        request: &Request,
        status: Status,
        comment: &str,
    ) -> Result<(), Ending> {
        let command = dimse::response(request, status, comment);
        self.send(context_id, &[(PDataValueType::Command, &command)])
            .await
    }

    /// Sends a command, and the data set that may belong to it, in PDUs that the peer takes.
    pub(super) async fn send(
        &mut self,
        context_id: u8,
        parts: &[(PDataValueType, &[u8])],
    ) -> Result<(), Ending> {
        // A PDV's length, context and control header take six bytes of a PDU.
        let most = usize::try_from(self.max_pdu_bytes).unwrap_or(usize::MAX) - 6;
        let within = self.around.config.limits.pdu_timeout;
        let mut bytes = Vec::with_capacity(512);
        for (value_type, part) in parts {
            let n_chunks = part.len().div_ceil(most);
            for (index, chunk) in part.chunks(most).enumerate() {
                bytes.extend_from_slice(&encode(&Pdu::PData {
                    data: vec![PDataValue {
                        presentation_context_id: context_id,
                        value_type: value_type.clone(),
                        is_last: index + 1 == n_chunks,
                        data: chunk.to_vec(),
                    }],
                }));
            }
        }
        Ok(self.wire.write(&bytes, within).await?)
    }
}
