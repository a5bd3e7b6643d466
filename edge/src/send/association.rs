//! An association that this node asks for, and the messages on it (PS3.8 section 9.3, PS3.7 section 6.3).
//!
//! In: a connected stream, plain or TLS, and the SOP classes wanted. Out: one request at a time with its response. `dicom-ul` encodes and
//! decodes the PDUs; each whole exchange has one deadline, so that a peer that drips cannot hold it open.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use dicom_core::VR;
use dicom_dictionary_std::{tags, uids};
use dicom_ul::pdu::{
    AbortRQSource, AssociationAC, AssociationRQ, PDataValue, PDataValueType, Pdu,
    PresentationContextProposed, PresentationContextResultReason, RequestorRoles, UserVariableItem,
};
use dicom_ul::{read_pdu, write_pdu};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::data_set::{DataSet, Syntax};
use crate::intake::part10::{IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME};

/// Largest PDU that we take; answers are small.
const MAX_PDU_BYTES: u32 = 32 << 10;
/// Largest PDU that we send, whatever the peer would take.
const MAX_SENT_PDU_BYTES: usize = 128 << 10;
/// Smallest PDU that a peer may ask for.
const MIN_SENT_PDU_BYTES: usize = 128;
/// Largest command or data set of a peer's message.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Requests of a peer that are kept while its response is waited for.
const MAX_ASKED: usize = 64;
/// This bit of the Command Field makes a request's a response's (PS3.7 annex E.1).
const RESPONSE: u16 = 0x8000;
/// Command Data Set Type that says: no data set.
const NO_DATA_SET: u16 = 0x0101;
/// How long a release or an abort may take, the closing of the connection with it.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);

/// What an association runs over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Who speaks to whom, and about what.
#[derive(Clone, Debug)]
pub(crate) struct Proposal<'a> {
    /// Our AE title.
    pub(crate) calling: &'a str,
    /// The peer's.
    pub(crate) called: &'a str,
    /// SOP classes, at most 128.
    pub(crate) sop_classes: &'a [&'a str],
    /// Whether we are the provider of these classes (SCP role selection, PS3.7 annex D.3.3.4), not their user.
    pub(crate) is_provider: bool,
}

/// Why there is no association any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AssociationError {
    /// The connection broke.
    #[error("connection: {0}")]
    Connection(#[source] io::Error),
    /// The peer took too long.
    #[error("no answer within {} s", .0.as_secs())]
    Deadline(Duration),
    /// A-ASSOCIATE-RJ.
    #[error("association rejected: {0}")]
    Rejected(String),
    /// Not one presentation context was accepted.
    #[error("no presentation context accepted")]
    NoContext,
    /// A-ABORT, or a release that nobody asked for.
    #[error("association ended by the peer")]
    Ended,
    /// What came is not DICOM.
    #[error("protocol: {0}")]
    Protocol(&'static str),
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Presentation context.
    pub(crate) context_id: u8,
    /// Command set.
    pub(crate) command: DataSet,
    /// Data set, encoded.
    pub(crate) data: Option<Vec<u8>>,
}

impl Message {
    fn is_request(&self) -> bool {
        let field = self.command.number(tags::COMMAND_FIELD);
        field.is_some_and(|field| field & RESPONSE == 0)
    }
}

/// An association that was accepted.
pub(crate) struct Association {
    stream: Box<dyn Stream>,
    /// Accepted contexts by abstract syntax.
    contexts: BTreeMap<String, (u8, Syntax)>,
    max_sent_bytes: usize,
    last_message_id: u16,
    /// Values of a PDU that belong to the message after.
    pending: Vec<PDataValue>,
    /// Requests of the peer that came while a response was waited for.
    asked: Vec<Message>,
}

impl std::fmt::Debug for Association {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Association")
            .field("contexts", &self.contexts)
            .finish_non_exhaustive()
    }
}

impl Association {
    /// Asks for an association on a connected stream.
    ///
    /// # Errors
    /// [`AssociationError`] says why there is none.
    pub(crate) async fn request(
        mut stream: Box<dyn Stream>,
        proposal: &Proposal<'_>,
        deadline: Duration,
    ) -> Result<Self, AssociationError> {
        let exchange = async {
            write(&mut stream, &request_pdu(proposal)).await?;
            read(&mut stream).await
        };
        let answer = within(deadline, exchange).await?;
        let accepted = match answer {
            Pdu::AssociationAC(accepted) => accepted,
            Pdu::AssociationRJ(rejected) => {
                let why = format!("{:?}, {:?}", rejected.result, rejected.source);
                return Err(AssociationError::Rejected(why));
            }
            Pdu::AbortRQ { .. } => return Err(AssociationError::Ended),
            _ => return Err(AssociationError::Protocol("no answer to A-ASSOCIATE-RQ")),
        };
        let contexts = accepted_contexts(&accepted, proposal);
        let association = Self {
            stream,
            max_sent_bytes: max_sent_bytes(&accepted),
            last_message_id: 0,
            pending: Vec::new(),
            asked: Vec::new(),
            contexts,
        };
        if association.contexts.is_empty() {
            association.release().await;
            return Err(AssociationError::NoContext);
        }
        Ok(association)
    }

    /// Whether objects of a class may be sent.
    pub(crate) fn takes(&self, sop_class_uid: &str) -> bool {
        self.contexts.contains_key(sop_class_uid)
    }

    /// Sends `data`, encoded in Explicit VR Little Endian, by C-STORE (PS3.7 section 9.1.1). The status of the response.
    ///
    /// # Errors
    /// The association is over.
    pub(crate) async fn store(
        &mut self,
        sop_class_uid: &str,
        sop_instance_uid: &str,
        data: &[u8],
        deadline: Duration,
    ) -> Result<u16, AssociationError> {
        let mut command = DataSet::default();
        command
            .text(tags::AFFECTED_SOP_CLASS_UID, VR::UI, sop_class_uid)
            .text(tags::AFFECTED_SOP_INSTANCE_UID, VR::UI, sop_instance_uid)
            .u16(tags::COMMAND_FIELD, 0x0001)
            .u16(tags::PRIORITY, 0);
        self.ask_status(sop_class_uid, command, data, deadline)
            .await
    }

    /// Sends a request with a data set, encoded in Explicit VR Little Endian. The status of the response.
    ///
    /// # Errors
    /// The association is over.
    pub(crate) async fn ask_status(
        &mut self,
        abstract_syntax: &str,
        command: DataSet,
        data: &[u8],
        deadline: Duration,
    ) -> Result<u16, AssociationError> {
        let response = self.ask(abstract_syntax, command, Some(data), deadline);
        let status = response.await?.command.number(tags::STATUS);
        status.ok_or(AssociationError::Protocol("a response without status"))
    }

    /// Sends a request and waits for its response.
    ///
    /// # Errors
    /// The association is over.
    pub(crate) async fn ask(
        &mut self,
        abstract_syntax: &str,
        mut command: DataSet,
        data: Option<&[u8]>,
        deadline: Duration,
    ) -> Result<Message, AssociationError> {
        let context = self.contexts.get(abstract_syntax);
        let &(context_id, syntax) = context.ok_or(AssociationError::NoContext)?;
        let data = data.map(|data| in_syntax(data, syntax)).transpose()?;
        self.last_message_id = self.last_message_id.wrapping_add(1);
        let id = self.last_message_id;
        command.u16(tags::MESSAGE_ID, id);
        let exchange = async {
            self.send(context_id, command, data.as_deref()).await?;
            loop {
                let message = self.receive_message().await?;
                if !message.is_request() {
                    return Ok(message);
                }
                if self.asked.len() == MAX_ASKED {
                    return Err(AssociationError::Protocol("too many requests of the peer"));
                }
                self.asked.push(message);
            }
        };
        let response = within(deadline, exchange).await?;
        let answered = response.command.number(tags::MESSAGE_ID_BEING_RESPONDED_TO);
        if answered != Some(id) {
            return Err(AssociationError::Protocol("a response to another message"));
        }
        Ok(response)
    }

    /// Waits for a request of the peer.
    ///
    /// # Errors
    /// None came within `deadline`, or the association is over.
    pub(crate) async fn asked(&mut self, deadline: Duration) -> Result<Message, AssociationError> {
        if !self.asked.is_empty() {
            return Ok(self.asked.remove(0));
        }
        let message = within(deadline, self.receive_message()).await?;
        if message.is_request() {
            Ok(message)
        } else {
            Err(AssociationError::Protocol("a response to nothing"))
        }
    }

    /// Answers a request of the peer.
    ///
    /// # Errors
    /// The association is over.
    pub(crate) async fn answer(
        &mut self,
        request: &Message,
        status: u16,
        deadline: Duration,
    ) -> Result<(), AssociationError> {
        let number = |tag| request.command.number(tag).unwrap_or(0);
        let mut command = DataSet::default();
        command
            .u16(tags::COMMAND_FIELD, number(tags::COMMAND_FIELD) | RESPONSE)
            .u16(
                tags::MESSAGE_ID_BEING_RESPONDED_TO,
                number(tags::MESSAGE_ID),
            )
            .u16(tags::STATUS, status);
        within(deadline, self.send(request.context_id, command, None)).await
    }

    /// What the data sets of a context are encoded in.
    pub(crate) fn syntax(&self, context_id: u8) -> Syntax {
        let mut contexts = self.contexts.values();
        contexts
            .find(|(id, _)| *id == context_id)
            .map_or(Syntax::Implicit, |(_, syntax)| *syntax)
    }

    /// Releases. A peer that does not answer is soon left: everything was answered before, and what is to be said next waits for this.
    pub(crate) async fn release(mut self) {
        let closing = async {
            drop(write(&mut self.stream, &Pdu::ReleaseRQ).await);
            drop(read(&mut self.stream).await);
            self.stream.shutdown().await
        };
        drop(timeout(CLOSE_DEADLINE, closing).await);
    }

    /// Aborts.
    pub(crate) async fn abort(mut self) {
        let pdu = Pdu::AbortRQ {
            source: AbortRQSource::ServiceUser,
        };
        let closing = async {
            drop(write(&mut self.stream, &pdu).await);
            self.stream.shutdown().await
        };
        drop(timeout(CLOSE_DEADLINE, closing).await);
    }

    async fn send(
        &mut self,
        presentation_context_id: u8,
        mut command: DataSet,
        data: Option<&[u8]>,
    ) -> Result<(), AssociationError> {
        let has_data = if data.is_some() { 0x0000 } else { NO_DATA_SET };
        command.u16(tags::COMMAND_DATA_SET_TYPE, has_data);
        let command = command.encode_command();
        let parts = [
            (PDataValueType::Command, Some(command.as_slice())),
            (PDataValueType::Data, data),
        ];
        for (value_type, bytes) in parts {
            let mut fragments = bytes.unwrap_or(&[]).chunks(self.max_sent_bytes).peekable();
            while let Some(fragment) = fragments.next() {
                let value = PDataValue {
                    presentation_context_id,
                    value_type: value_type.clone(),
                    is_last: fragments.peek().is_none(),
                    data: fragment.to_vec(),
                };
                write(&mut self.stream, &Pdu::PData { data: vec![value] }).await?;
            }
        }
        Ok(())
    }

    async fn receive_message(&mut self) -> Result<Message, AssociationError> {
        let (context_id, command) = self.receive_part(&PDataValueType::Command).await?;
        let command = DataSet::decode(&command, Syntax::Implicit)
            .map_err(|_| AssociationError::Protocol("a broken command set"))?;
        let data = match command.number(tags::COMMAND_DATA_SET_TYPE) {
            Some(NO_DATA_SET) => None,
            Some(_) => Some(self.receive_part(&PDataValueType::Data).await?.1),
            None => {
                return Err(AssociationError::Protocol(
                    "a command without data set type",
                ));
            }
        };
        Ok(Message {
            context_id,
            command,
            data,
        })
    }

    async fn receive_part(
        &mut self,
        expected: &PDataValueType,
    ) -> Result<(u8, Vec<u8>), AssociationError> {
        let mut bytes = Vec::new();
        loop {
            while self.pending.is_empty() {
                match read(&mut self.stream).await? {
                    Pdu::PData { data } => self.pending = data,
                    Pdu::AbortRQ { .. } | Pdu::ReleaseRQ => return Err(AssociationError::Ended),
                    _ => return Err(AssociationError::Protocol("a PDU out of place")),
                }
            }
            let value = self.pending.remove(0);
            if value.value_type != *expected || bytes.len() + value.data.len() > MAX_MESSAGE_BYTES {
                return Err(AssociationError::Protocol(
                    "a message out of order or too long",
                ));
            }
            bytes.extend(value.data);
            if value.is_last {
                return Ok((value.presentation_context_id, bytes));
            }
        }
    }
}

fn request_pdu(proposal: &Proposal<'_>) -> Pdu {
    let ids = (1..=u8::MAX).step_by(2);
    let contexts = ids.zip(proposal.sop_classes);
    let mut user_variables = vec![
        UserVariableItem::MaxLength(MAX_PDU_BYTES),
        UserVariableItem::ImplementationClassUID(IMPLEMENTATION_CLASS_UID.to_owned()),
        UserVariableItem::ImplementationVersionName(IMPLEMENTATION_VERSION_NAME.to_owned()),
    ];
    if proposal.is_provider {
        let role = |class: &&str| {
            let roles = RequestorRoles {
                scu: false,
                scp: true,
            };
            UserVariableItem::ScuScpRoleSelectionSubItem((*class).to_owned(), roles)
        };
        user_variables.extend(proposal.sop_classes.iter().map(role));
    }
    Pdu::AssociationRQ(AssociationRQ {
        protocol_version: 1,
        calling_ae_title: proposal.calling.to_owned(),
        called_ae_title: proposal.called.to_owned(),
        application_context_name: uids::DICOM_APPLICATION_CONTEXT.to_owned(),
        presentation_contexts: contexts
            .map(|(id, class)| PresentationContextProposed {
                id,
                abstract_syntax: (*class).to_owned(),
                transfer_syntaxes: [Syntax::Explicit, Syntax::Implicit]
                    .map(|syntax| syntax.uid().to_owned())
                    .to_vec(),
            })
            .collect(),
        user_variables,
    })
}

fn accepted_contexts(
    accepted: &AssociationAC,
    proposal: &Proposal<'_>,
) -> BTreeMap<String, (u8, Syntax)> {
    let mut contexts = BTreeMap::new();
    for context in &accepted.presentation_contexts {
        let index = usize::from(context.id / 2);
        let syntax = [Syntax::Explicit, Syntax::Implicit]
            .into_iter()
            .find(|syntax| syntax.uid() == context.transfer_syntax.trim_end_matches(['\0', ' ']));
        let is_in_role = |class: &str| !proposal.is_provider || is_provider(accepted, class);
        let is_accepted = context.reason == PresentationContextResultReason::Acceptance
            && proposal
                .sop_classes
                .get(index)
                .is_some_and(|class| is_in_role(class));
        if let (true, Some(class), Some(syntax)) =
            (is_accepted, proposal.sop_classes.get(index), syntax)
        {
            contexts.insert((*class).to_owned(), (context.id, syntax));
        }
    }
    contexts
}

/// Whether the peer lets us be the provider of a class.
fn is_provider(accepted: &AssociationAC, class: &str) -> bool {
    let is_it = |item: &UserVariableItem| match item {
        UserVariableItem::ScuScpRoleSelectionSubItem(uid, roles) => uid == class && roles.scp,
        _ => false,
    };
    accepted.user_variables.iter().any(is_it)
}

/// Bytes of a fragment: the peer's longest PDU less the header of a value (PS3.8 section 9.3.5.1). 0 is no limit.
fn max_sent_bytes(accepted: &AssociationAC) -> usize {
    let longest = accepted.user_variables.iter().find_map(|item| match item {
        UserVariableItem::MaxLength(length) => usize::try_from(*length).ok(),
        _ => None,
    });
    let longest = longest.filter(|longest| *longest > 0);
    let longest = longest.unwrap_or(MAX_SENT_PDU_BYTES);
    longest.clamp(MIN_SENT_PDU_BYTES, MAX_SENT_PDU_BYTES) - 6
}

/// Explicit VR Little Endian in the syntax that was negotiated.
fn in_syntax(data: &[u8], syntax: Syntax) -> Result<Vec<u8>, AssociationError> {
    if syntax == Syntax::Explicit {
        return Ok(data.to_vec());
    }
    DataSet::decode(data, Syntax::Explicit)
        .map(|set| set.encode(syntax))
        .map_err(|_| AssociationError::Protocol("our own data set cannot be read"))
}

async fn within<T>(
    deadline: Duration,
    exchange: impl Future<Output = Result<T, AssociationError>>,
) -> Result<T, AssociationError> {
    match timeout(deadline, exchange).await {
        Ok(done) => done,
        Err(_) => Err(AssociationError::Deadline(deadline)),
    }
}

async fn write(stream: &mut Box<dyn Stream>, pdu: &Pdu) -> Result<(), AssociationError> {
    let mut bytes = Vec::new();
    write_pdu(&mut bytes, pdu).map_err(|_| AssociationError::Protocol("a PDU of ours"))?;
    let sent = stream.write_all(&bytes).await;
    sent.map_err(AssociationError::Connection)?;
    stream.flush().await.map_err(AssociationError::Connection)
}

async fn read(stream: &mut Box<dyn Stream>) -> Result<Pdu, AssociationError> {
    let mut bytes = vec![0; 6];
    let header = stream.read_exact(&mut bytes).await;
    header.map_err(AssociationError::Connection)?;
    let length = u32::from_be_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]);
    if length > MAX_PDU_BYTES {
        return Err(AssociationError::Protocol("a PDU longer than we said"));
    }
    bytes.resize(6 + usize::try_from(length).unwrap_or(0), 0);
    let body = stream.read_exact(&mut bytes[6..]).await;
    body.map_err(AssociationError::Connection)?;
    read_pdu(bytes.as_slice(), MAX_PDU_BYTES, false)
        .ok()
        .flatten()
        .ok_or(AssociationError::Protocol("a PDU that cannot be read"))
}
