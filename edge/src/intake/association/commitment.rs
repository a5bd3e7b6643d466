//! Storage commitment on an association of a peer: requests that are answered and reported, and reports about our own documents.
//!
//! Which of the two a context is for was agreed at the association's beginning ([`super::super::admit::Roles`]). What is promised or heard is
//! durable before it is answered ([`crate::commitment`]).

use std::sync::Arc;

use dicom_dictionary_std::tags;
use dicom_ul::pdu::PDataValueType;
use shared::uid::Uid;
use tokio::io::{AsyncRead, AsyncWrite};

use super::super::dimse::{Request, Status, field};
use super::super::unix_ms;
use super::messages::Message;
use super::{Association, Ending};
use crate::commitment::message::Transaction;
use crate::commitment::promised::{NotPromised, Promised, Terms};
use crate::commitment::{
    ALL_COMMITTED, FAILURES_EXIST, REQUEST_ACTION, SOP_CLASS_UID, SOP_INSTANCE_UID, asking,
    reporting,
};
use crate::intake::classes::IMPLICIT_LITTLE;
use crate::operate::audit::Event;
use crate::send::data_set::Syntax;

/// Reports on one association that the peer has not answered.
const MAX_REPORTS: usize = 16;

/// Reports that this association has sent. Those without an answer when it ends go out on another.
#[derive(Debug)]
pub(super) struct Reports {
    promised: Arc<Promised>,
    sent: Vec<(u16, Uid)>,
    last_message_id: u16,
}

impl Reports {
    pub(super) fn new(promised: Arc<Promised>) -> Self {
        Self {
            promised,
            sent: Vec::new(),
            last_message_id: 0,
        }
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        for (_, uid) in &self.sent {
            self.promised.let_go(uid);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Association<S> {
    /// Begins to do what a command about commitment asks for.
    pub(super) async fn commitment(
        &mut self,
        context_id: u8,
        request: Request,
    ) -> Result<(), Ending> {
        if request.field == field::EVENT_REPORT | field::RESPONSE {
            return self.answered(&request).await;
        }
        let is_known = matches!(request.field, field::ACTION | field::EVENT_REPORT);
        if request.has_data_set {
            self.message = if is_known {
                Message::Commitment {
                    context_id,
                    request,
                    bytes: Vec::new(),
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
            field::CANCEL => Ok(()),
            _ if is_known => {
                let status = Status::InvalidArgument;
                self.respond(context_id, &request, status, "no data set")
                    .await
            }
            _ => self.decline(context_id, &request).await,
        }
    }

    /// The data set of an N-ACTION or N-EVENT-REPORT has come.
    pub(super) async fn committed(
        &mut self,
        context_id: u8,
        request: &Request,
        data: Vec<u8>,
    ) -> Result<(), Ending> {
        let context = self.contexts.get(&context_id);
        let Some(context) = context else {
            return Ok(());
        };
        let (roles, syntax) = (context.roles, syntax(context.transfer_syntax));
        let is_instance = request.sop_instance_uid == SOP_INSTANCE_UID;
        let is_event = matches!(request.type_id, ALL_COMMITTED | FAILURES_EXIST);
        let status = if request.sop_class_uid != SOP_CLASS_UID {
            Status::NoSuchSopClass
        } else if !is_instance {
            Status::NoSuchInstance
        } else {
            match request.field {
                field::EVENT_REPORT if !roles.is_user => Status::UnrecognizedOperation,
                field::EVENT_REPORT if !is_event => Status::NoSuchEventType,
                field::EVENT_REPORT => {
                    let asked = &self.around.intake.commitments.asked;
                    match asking::heard(asked, data, syntax).await {
                        0 => Status::Success,
                        0x0115 => Status::InvalidArgument,
                        _ => Status::ProcessingFailure,
                    }
                }
                _ if !roles.is_provider => Status::UnrecognizedOperation,
                _ if request.type_id != REQUEST_ACTION => Status::NoSuchActionType,
                _ => return self.promise(context_id, request, &data, syntax).await,
            }
        };
        self.respond(context_id, request, status, "").await
    }

    /// Answers a request for commitment, then reports on it.
    async fn promise(
        &mut self,
        context_id: u8,
        request: &Request,
        data: &[u8],
        syntax: Syntax,
    ) -> Result<(), Ending> {
        let report = match self.promised(data, syntax).await {
            Ok(report) => report,
            Err((status, comment)) => {
                return self.respond(context_id, request, status, comment).await;
            }
        };
        let id = self.reports.last_message_id.wrapping_add(1);
        self.reports.last_message_id = id;
        // From here on the report is let go when the association ends, however it does.
        self.reports.sent.push((id, report.uid.clone()));
        self.respond(context_id, request, Status::Success, "")
            .await?;
        let mut command = reporting::command(&report);
        command
            .u16(tags::MESSAGE_ID, id)
            .u16(tags::COMMAND_DATA_SET_TYPE, 0x0001);
        let (command, data) = (command.encode_command(), report.data_set().encode(syntax));
        let parts = [
            (PDataValueType::Command, command.as_slice()),
            (PDataValueType::Data, data.as_slice()),
        ];
        self.send(context_id, &parts).await
    }

    async fn promised(
        &self,
        data: &[u8],
        syntax: Syntax,
    ) -> Result<Transaction, (Status, &'static str)> {
        let request = Transaction::read(data, syntax);
        let request = request.map_err(|_| (Status::InvalidArgument, "no action information"))?;
        let config = &self.around.config;
        let (Some(commitment), true) = (config.commitment, self.reports.sent.len() < MAX_REPORTS)
        else {
            return Err((Status::ResourceLimitation, "too many reports are open"));
        };
        let terms = Terms {
            keep: commitment.keep,
            max_age: config.retention.max_age,
            ages_known_from_ms: self
                .around
                .intake
                .clock
                .ages_known_from_ms(&config.retention),
        };
        let (promised, calling_ae) = (Arc::clone(&self.reports.promised), self.calling_ae.clone());
        let promise = move || promised.promise(&request, &calling_ae, terms, unix_ms());
        let report = match tokio::task::spawn_blocking(promise).await {
            Ok(Ok(report)) => report,
            Ok(Err(error @ NotPromised::Full)) => {
                tracing::warn!(%error, "storage commitment refused");
                return Err((Status::ResourceLimitation, "too many reports wait"));
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "storage commitment refused");
                return Err((Status::ProcessingFailure, ""));
            }
            Err(error) => {
                tracing::error!(%error, "storage commitment refused");
                return Err((Status::ProcessingFailure, ""));
            }
        };
        self.around.intake.visitors.record(&Event::Promised {
            calling_ae: &self.calling_ae,
            n_committed: report.references.len(),
            n_failed: report.failed.len(),
        });
        Ok(report)
    }

    /// The peer has answered a report; one that it refused goes out again on another association.
    async fn answered(&mut self, response: &Request) -> Result<(), Ending> {
        self.wire.measure_rate(false);
        let sent = &mut self.reports.sent;
        let is_it = |(id, _): &(u16, Uid)| *id == response.message_id;
        let index = sent.iter().position(is_it);
        let index = index.ok_or(Ending::Protocol("response without a request"))?;
        let (_, uid) = sent.remove(index);
        let promised = Arc::clone(&self.reports.promised);
        if response.status == 0 {
            let reported = uid.clone();
            let work = move |promised: &Promised| promised.reported(&reported);
            if let Err(error) = asking::on_disk(&promised, work).await {
                tracing::error!(%error, "a report cannot be recorded");
            }
        }
        promised.let_go(&uid);
        Ok(())
    }
}

fn syntax(transfer_syntax: &str) -> Syntax {
    if transfer_syntax == IMPLICIT_LITTLE {
        Syntax::Implicit
    } else {
        Syntax::Explicit
    }
}
