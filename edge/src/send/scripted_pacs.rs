//! A PACS for tests that does what a script says and logs every request.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dicom_core::VR;
use dicom_dictionary_std::tags;
use dicom_ul::association::server::ServerAssociationOptions;
use dicom_ul::pdu::{PDataValue, PDataValueType, Pdu};
use tokio::net::{TcpListener, TcpStream};

use super::connection::Connection;
use super::data_set::{DataSet, Syntax};
use super::pacs::Pacs;

/// How often tests look, every 10 ms, for what must come: longer than anything takes; only a hang reaches it.
pub(crate) const LOOKS: usize = 12_000;

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Answer with a status.
    Answer(u16),
    /// Take the object and cut the connection.
    Cut,
    /// Take the object and say nothing more.
    Hang,
    /// Answer success, and never a release of this association.
    IgnoreRelease,
}

/// A C-STORE that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Affected SOP Class UID.
    pub(crate) class: String,
    /// Affected SOP Instance UID.
    pub(crate) uid: String,
    /// The data set as it came.
    pub(crate) data: Vec<u8>,
}

/// A listening PACS.
#[derive(Clone, Debug)]
pub(crate) struct ScriptedPacs {
    /// Every request, the first first.
    pub(crate) log: Arc<Mutex<Vec<Request>>>,
    script: Arc<Mutex<VecDeque<Act>>>,
    port: u16,
}

impl ScriptedPacs {
    /// Takes `classes` in `syntax`; success once the script is through.
    pub(crate) async fn start(
        classes: &'static [&'static str],
        syntax: Syntax,
        script: &[Act],
    ) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let pacs = Self {
            log: Arc::default(),
            script: Arc::new(Mutex::new(script.iter().copied().collect())),
            port: listener.local_addr().unwrap().port(),
        };
        let serving = pacs.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let serving = serving.clone();
                tokio::spawn(async move { serving.serve(socket, classes, syntax).await });
            }
        });
        pacs
    }

    /// How to reach it.
    pub(crate) fn address(&self) -> Pacs {
        Pacs {
            calling: "PEEDGE".to_owned(),
            called: "PACS".to_owned(),
            connection: Connection {
                host: "127.0.0.1".to_owned(),
                port: self.port,
                tls: None,
            },
            has_captures: false,
            is_asked_to_commit: false,
        }
    }

    /// The requests so far.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// Waits until `count` requests came.
    pub(crate) async fn wait_for(&self, count: usize) -> Vec<Request> {
        for _ in 0..LOOKS {
            if self.requests().len() >= count {
                return self.requests();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} of {count} requests came", self.requests().len());
    }

    async fn serve(&self, socket: TcpStream, classes: &[&'static str], syntax: Syntax) {
        let mut options = ServerAssociationOptions::new()
            .accept_any()
            .with_transfer_syntax(syntax.uid());
        for class in classes {
            options = options.with_abstract_syntax(*class);
        }
        let Ok(mut association) = options.establish_async(socket).await else {
            return;
        };
        let mut command = Vec::new();
        let mut data = Vec::new();
        let mut is_release_answered = true;
        while let Ok(pdu) = association.receive().await {
            let values = match pdu {
                Pdu::PData { data } => data,
                Pdu::ReleaseRQ if !is_release_answered => continue,
                Pdu::ReleaseRQ => {
                    drop(association.send(&Pdu::ReleaseRP).await);
                    return;
                }
                _ => return,
            };
            for value in values {
                let id = value.presentation_context_id;
                match value.value_type {
                    PDataValueType::Command => command.extend(value.data),
                    PDataValueType::Data => data.extend(value.data),
                }
                let is_whole = value.value_type == PDataValueType::Data && value.is_last;
                if !is_whole {
                    continue;
                }
                let (set, data) = (std::mem::take(&mut command), std::mem::take(&mut data));
                let set = DataSet::decode(&set, Syntax::Implicit).unwrap();
                let act = self.act(&set, data);
                let status = match act {
                    Act::Cut => return,
                    Act::Hang => return tokio::time::sleep(Duration::from_secs(3600)).await,
                    Act::IgnoreRelease => 0,
                    Act::Answer(status) => status,
                };
                is_release_answered &= act != Act::IgnoreRelease;
                association.send(&response(&set, id, status)).await.unwrap();
            }
        }
    }

    fn act(&self, command: &DataSet, data: Vec<u8>) -> Act {
        let text = |tag| command.string(tag).unwrap().to_owned();
        self.log.lock().unwrap().push(Request {
            class: text(tags::AFFECTED_SOP_CLASS_UID),
            uid: text(tags::AFFECTED_SOP_INSTANCE_UID),
            data,
        });
        let act = self.script.lock().unwrap().pop_front();
        act.unwrap_or(Act::Answer(0))
    }
}

fn response(request: &DataSet, presentation_context_id: u8, status: u16) -> Pdu {
    let mut command = DataSet::default();
    for tag in [
        tags::AFFECTED_SOP_CLASS_UID,
        tags::AFFECTED_SOP_INSTANCE_UID,
    ] {
        command.text(tag, VR::UI, request.string(tag).unwrap());
    }
    command
        .u16(tags::COMMAND_FIELD, 0x8001)
        .u16(
            tags::MESSAGE_ID_BEING_RESPONDED_TO,
            request.number(tags::MESSAGE_ID).unwrap(),
        )
        .u16(tags::COMMAND_DATA_SET_TYPE, 0x0101)
        .u16(tags::STATUS, status);
    Pdu::PData {
        data: vec![PDataValue {
            presentation_context_id,
            value_type: PDataValueType::Command,
            is_last: true,
            data: command.encode_command(),
        }],
    }
}
