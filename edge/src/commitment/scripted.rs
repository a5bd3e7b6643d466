//! Tests: a scripted PACS is asked to commit, and what becomes of the documents.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dicom_dictionary_std::tags;
use dicom_ul::association::server::ServerAssociationOptions;
use dicom_ul::pdu::{PDataValue, PDataValueType, Pdu};
use redb::Database;
use shared::uid::Uid;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::asked::{Asked, Counts, End, want};
use super::asking::{Asking, MAX_REQUESTS, Way};
use super::message::{Reference, Transaction};
use super::promised::{Promised, Terms};
use super::{ACTION, SOP_CLASS_UID, SOP_INSTANCE_UID, reporting};
use crate::intake::clock::Ages;
use crate::intake::spool::{Header, Spool, SpoolLimits};
use crate::send::back_off::Patience;
use crate::send::connection::Connection;
use crate::send::data_set::{DataSet, Syntax};
use crate::send::outbox::{Channel, Document, Letter};
use crate::send::pacs::Pacs;
use crate::send::scripted_pacs::LOOKS;

/// What the PACS does with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Takes it and reports at once that all is committed.
    Commit,
    /// Reports before it has answered the request.
    CommitEarly,
    /// Takes it and reports a failure reason.
    Fail(u16),
    /// Takes it and says nothing more.
    Silent,
    /// Refuses it with a status.
    Refuse(u16),
}

/// A listening PACS that takes the class `class`, and the transactions that it was asked.
#[derive(Clone)]
struct Archive {
    port: u16,
    script: Arc<Mutex<VecDeque<Act>>>,
    asked: Arc<Mutex<Vec<Transaction>>>,
}

impl Archive {
    async fn start(class: &'static str, script: &[Act]) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let archive = Self {
            port: listener.local_addr().unwrap().port(),
            script: Arc::new(Mutex::new(script.iter().copied().collect())),
            asked: Arc::default(),
        };
        let serving = archive.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                serving.serve(socket, class).await;
            }
        });
        archive
    }

    async fn serve(&self, socket: TcpStream, class: &'static str) {
        let options = ServerAssociationOptions::new()
            .accept_any()
            .with_transfer_syntax(Syntax::Explicit.uid())
            .with_abstract_syntax(class);
        let Ok(mut association) = options.establish_async(socket).await else {
            return;
        };
        let (mut command, mut data) = (Vec::new(), Vec::new());
        while let Ok(pdu) = association.receive().await {
            let Pdu::PData { data: values } = pdu else {
                drop(association.send(&Pdu::ReleaseRP).await);
                return;
            };
            for value in values {
                let is_command = value.value_type == PDataValueType::Command;
                let part = if is_command { &mut command } else { &mut data };
                part.extend(value.data);
            }
            let set = DataSet::decode(&command, Syntax::Implicit).unwrap();
            if set.number(tags::COMMAND_FIELD) != Some(ACTION) {
                command.clear();
                continue;
            }
            let Ok(request) = Transaction::read(&data, Syntax::Explicit) else {
                continue;
            };
            (command, data) = (Vec::new(), Vec::new());
            for pdu in self.answers(&set, &request) {
                association.send(&pdu).await.unwrap();
            }
        }
    }

    fn answers(&self, command: &DataSet, request: &Transaction) -> Vec<Pdu> {
        assert_eq!(
            command.string(tags::REQUESTED_SOP_INSTANCE_UID),
            Some(SOP_INSTANCE_UID)
        );
        assert_eq!(command.number(tags::ACTION_TYPE_ID), Some(1));
        self.asked.lock().unwrap().push(request.clone());
        let act = self.script.lock().unwrap().pop_front();
        let mut response = DataSet::default();
        let status = match act {
            Some(Act::Refuse(status)) => status,
            _ => 0,
        };
        let id = command.number(tags::MESSAGE_ID).unwrap();
        response
            .u16(tags::COMMAND_FIELD, ACTION | 0x8000)
            .u16(tags::MESSAGE_ID_BEING_RESPONDED_TO, id)
            .u16(tags::COMMAND_DATA_SET_TYPE, 0x0101)
            .u16(tags::STATUS, status);
        let response = part(PDataValueType::Command, response.encode_command());
        let mut report = request.clone();
        match act {
            Some(Act::Commit | Act::CommitEarly) => {}
            Some(Act::Fail(reason)) => {
                let references = report.references.drain(..);
                report.failed = references.map(|one| (one, reason)).collect();
            }
            _ => return vec![response],
        }
        let mut command = reporting::command(&report);
        command
            .u16(tags::MESSAGE_ID, 1)
            .u16(tags::COMMAND_DATA_SET_TYPE, 1);
        let mut answers = vec![
            response,
            part(PDataValueType::Command, command.encode_command()),
            part(
                PDataValueType::Data,
                report.data_set().encode(Syntax::Explicit),
            ),
        ];
        if act == Some(Act::CommitEarly) {
            answers.rotate_left(1);
        }
        answers
    }

    fn way(&self, linger: Duration) -> Way {
        Way {
            pacs: Pacs {
                calling: "PEEDGE".to_owned(),
                called: "PACS".to_owned(),
                connection: Connection {
                    host: "127.0.0.1".to_owned(),
                    port: self.port,
                    tls: None,
                },
                has_captures: false,
                is_asked_to_commit: true,
            },
            answer_within: Duration::from_millis(100),
            linger,
            patience: Patience {
                first: Duration::from_millis(20),
                longest: Duration::from_millis(50),
                deadline: Duration::from_secs(120),
            },
        }
    }
}

fn part(value_type: PDataValueType, data: Vec<u8>) -> Pdu {
    Pdu::PData {
        data: vec![PDataValue {
            presentation_context_id: 1,
            value_type,
            is_last: true,
            data,
        }],
    }
}

/// When it was enqueued.
const ENQUEUED_MS: i64 = 1_790_000_000_000;

/// A database with one document that the PACS has accepted, and how asking for it ended.
fn asked() -> (tempfile::TempDir, Arc<Asked>, Arc<Mutex<Vec<End>>>) {
    let folder = tempfile::tempdir().unwrap();
    let database = Database::create(folder.path().join("results.redb")).unwrap();
    let database = Arc::new(database);
    let ends: Arc<Mutex<Vec<End>>> = Arc::default();
    let seen = Arc::clone(&ends);
    let observe = Box::new(move |_: &_, end| seen.lock().unwrap().push(end));
    let asked = Asked::open(Arc::clone(&database), observe).unwrap();
    let uid = |text| Uid::new(text).unwrap();
    let document = Document {
        sop_class_uid: "1.2.840.10008.5.1.4.1.1.88.34".to_owned(),
        series_uid: uid("2.25.2"),
        sop_instance_uid: uid("2.25.3"),
    };
    let letter = Letter {
        channel: Channel::StructuredReport,
        key: uid("2.25.4"),
        study_uid: uid("2.25.1"),
        revision: 1,
        enqueued_ms: ENQUEUED_MS,
        document: Some(document.clone()),
        is_frozen: true,
        ended_ms: Some(2000),
        remark: None,
    };
    let transaction = database.begin_write().unwrap();
    want(&transaction, 7, &letter, &document).unwrap();
    transaction.commit().unwrap();
    (folder, Arc::new(asked), ends)
}

/// Asks a PACS with a script until the document is settled. Out: the transactions, how it ended, and why.
async fn settle(
    class: &'static str,
    script: &[Act],
) -> (Vec<Transaction>, Vec<End>, Option<String>) {
    let archive = Archive::start(class, script).await;
    let (_folder, asked, ends) = asked();
    // Where a report comes, there is time for it on a busy machine too.
    let is_silent = script.iter().all(|act| *act == Act::Silent);
    let way = archive.way(Duration::from_millis(if is_silent { 100 } else { 5000 }));
    let (_stop, stopped) = watch::channel(false);
    let asking = Asking::new(Arc::clone(&asked), Some(way));
    let task = tokio::spawn(asking.run(stopped));
    for _ in 0..LOOKS {
        if asked.counts().unwrap().waiting == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    task.abort();
    assert_eq!(asked.counts().unwrap().waiting, 0);
    let failed = asked.failed().unwrap();
    let remark = failed.first().and_then(|(_, wanted)| wanted.remark.clone());
    let (transactions, ends) = (archive.asked.lock().unwrap(), ends.lock().unwrap());
    (transactions.clone(), ends.clone(), remark)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_is_committed_by_a_report_on_the_same_association() {
    for act in [Act::Commit, Act::CommitEarly] {
        let (asked, ends, _) = settle(SOP_CLASS_UID, &[act]).await;
        assert_eq!((asked.len(), ends.as_slice()), (1, &[End::Committed][..]));
        let reference = Reference {
            sop_class_uid: "1.2.840.10008.5.1.4.1.1.88.34".to_owned(),
            sop_instance_uid: "2.25.3".to_owned(),
        };
        assert_eq!(asked[0].references, [reference], "{act:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_not_asked_again_and_keeps_its_reason() {
    let (asked, ends, remark) = settle(SOP_CLASS_UID, &[Act::Fail(0x0112)]).await;
    assert_eq!(
        (asked.len(), ends.as_slice()),
        (1, &[End::NotCommitted][..])
    );
    let remark = remark.unwrap();
    assert_eq!(remark, "failure reason 0112H, no such object instance");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_pacs_is_asked_three_times_with_new_transactions() {
    let (asked, ends, remark) = settle(SOP_CLASS_UID, &[Act::Silent; 9]).await;
    assert_eq!(
        (asked.len(), ends.as_slice()),
        (3, &[End::NotCommitted][..])
    );
    assert!(asked[0].uid != asked[1].uid && asked[1].uid != asked[2].uid);
    assert!(remark.unwrap().starts_with("no report within"));
    // One that answers the second time is enough.
    let (asked, ends, _) = settle(SOP_CLASS_UID, &[Act::Silent, Act::Commit]).await;
    assert_eq!((asked.len(), ends.as_slice()), (2, &[End::Committed][..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pacs_without_the_service_is_given_up_with_its_words() {
    let (asked, ends, remark) = settle(SOP_CLASS_UID, &[Act::Refuse(0x0110); 9]).await;
    assert_eq!(
        (asked.len(), ends.as_slice()),
        (3, &[End::NotCommitted][..])
    );
    assert_eq!(remark.unwrap(), "N-ACTION status 0110H");
    let (asked, ends, remark) = settle("1.2.840.10008.1.1", &[]).await;
    assert_eq!(
        (asked.len(), ends.as_slice()),
        (0, &[End::NotCommitted][..])
    );
    assert_eq!(remark.unwrap(), "no presentation context accepted");
}

#[test]
fn a_late_report_mends_what_was_given_up_and_a_stranger_changes_nothing() {
    let (_folder, asked, ends) = asked();
    let (sequence, wanted) = asked.waiting().unwrap().remove(0);
    let first = asked.begin(sequence, &wanted).unwrap();
    for _ in 1..MAX_REQUESTS {
        let (_, wanted) = asked.waiting().unwrap().remove(0);
        asked.begin(sequence, &wanted).unwrap();
    }
    asked.refused(sequence, "given up", MAX_REQUESTS).unwrap();
    assert_eq!(
        asked.counts().unwrap(),
        Counts {
            waiting: 0,
            failed: 1
        }
    );
    let report = |uid: &Uid, instance: &str| Transaction {
        uid: uid.clone(),
        references: vec![Reference {
            sop_class_uid: "1.2.840.10008.5.1.4.1.1.88.34".to_owned(),
            sop_instance_uid: instance.to_owned(),
        }],
        failed: Vec::new(),
    };
    let stranger = Uid::new("2.25.99").unwrap();
    assert!(!asked.reported(&report(&stranger, "2.25.3")).unwrap());
    assert!(asked.reported(&report(&first, "2.25.77")).unwrap());
    assert_eq!(asked.counts().unwrap().failed, 1, "another instance");
    assert!(asked.reported(&report(&first, "2.25.3")).unwrap());
    assert!(asked.reported(&report(&first, "2.25.3")).unwrap(), "again");
    assert_eq!(asked.counts().unwrap(), Counts::default());
    assert_eq!(*ends.lock().unwrap(), [End::NotCommitted, End::Committed]);
    asked.forget(Ages::before(ENQUEUED_MS + 1)).unwrap();
    assert!(!asked.reported(&report(&first, "2.25.3")).unwrap());
}

#[test]
fn an_operators_reload_asks_again_for_what_was_given_up() {
    let (_folder, asked, _) = asked();
    let (sequence, wanted) = asked.waiting().unwrap().remove(0);
    asked.begin(sequence, &wanted).unwrap();
    asked.refused(sequence, "given up", 1).unwrap();
    assert_eq!(asked.revive().unwrap(), 1);
    let (_, revived) = asked.waiting().unwrap().remove(0);
    assert_eq!((revived.attempts, revived.transactions), (0, 1));
}

#[test]
fn pins_hold_over_a_restart_and_end_with_the_commitment() {
    const NOW_MS: i64 = 1_790_000_000_000;
    let folder = tempfile::tempdir().unwrap();
    let limits = SpoolLimits {
        keep_free_bytes: 0,
        segment_bytes: 1 << 20,
        ..SpoolLimits::default()
    };
    let database = Arc::new(Database::create(folder.path().join("results.redb")).unwrap());
    let spool = Spool::open(folder.path(), &limits).unwrap();
    let mut entry = spool
        .begin(Header {
            received_ms: NOW_MS,
            sop_class_uid: "1.2.3".to_owned(),
            sop_instance_uid: "2.25.3".to_owned(),
            ..Header::default()
        })
        .unwrap();
    entry.write(b"an object").unwrap();
    let sequence = entry.commit_blocking().unwrap();
    let promised = Promised::open(Arc::clone(&database), Arc::clone(&spool)).unwrap();
    let request = Transaction {
        uid: Uid::new("2.25.1").unwrap(),
        references: vec![Reference {
            sop_class_uid: "1.2.3".to_owned(),
            sop_instance_uid: "2.25.3".to_owned(),
        }],
        failed: Vec::new(),
    };
    let terms = Terms {
        keep: Duration::from_secs(60),
        max_age: Duration::from_secs(3600),
        ages_known_from_ms: NOW_MS,
    };
    let strange = Terms {
        ages_known_from_ms: NOW_MS + 1,
        ..terms
    };
    let report = promised.promise(&request, "CT1", strange, NOW_MS).unwrap();
    assert_eq!(report.references, [], "from before the clock jumped");
    promised.reported(&report.uid).unwrap();
    promised.let_go(&report.uid);
    assert!(
        promised.promise(&request, "CT1", terms, 5000).is_err(),
        "no clock"
    );
    let report = promised.promise(&request, "CT1", terms, NOW_MS).unwrap();
    assert_eq!(report, request);
    assert_eq!(
        promised.owed(NOW_MS).unwrap(),
        [],
        "its association holds it"
    );
    drop((promised, spool));
    let spool = Spool::open(folder.path(), &limits).unwrap();
    let promised = Promised::open(database, Arc::clone(&spool)).unwrap();
    assert_eq!(spool.kept()[0].pinned_until_ms, NOW_MS + 60_000);
    let owed = promised.owed(NOW_MS + 59_999).unwrap();
    assert_eq!(owed, [("CT1".to_owned(), report)]);
    assert_eq!(promised.owed(NOW_MS + 60_000).unwrap(), [], "it has ended");
    promised.forget(Ages::before(NOW_MS + 58_999)).unwrap();
    assert_eq!(promised.owed(NOW_MS).unwrap().len(), 1);
    promised.forget(Ages::before(NOW_MS + 59_001)).unwrap();
    assert_eq!(promised.owed(NOW_MS).unwrap(), []);
    assert_eq!(sequence, 1);
}
