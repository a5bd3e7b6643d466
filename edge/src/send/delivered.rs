//! Tests: what reaches a PACS, how often, and what is left in the outbox.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dicom_dictionary_std::tags;
use redb::Database;
use shared::uid::Uid;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::back_off::Patience;
use super::connection::Connection;
use super::data_set::{DataSet, Syntax};
use super::delivery::{Delivery, End, Ways};
use super::equipment::Device;
use super::letter::NotMade;
use super::outbox::{Bounds, Channel, Channels, Counts, Outbox, enqueue};
use super::pacs::Pacs;
use super::sample;
use super::scripted_pacs::{Act, LOOKS, Request, ScriptedPacs};
use super::structured_report::Class;
use crate::intake::clock::Ages;
use crate::result::StudyResult;

const THREE_D: &str = Class::Comprehensive3D.uid();
const PLAIN: &str = Class::Comprehensive.uid();
const BOTH: &[&str] = &[THREE_D, PLAIN];

/// A node's outbox and sender over a database in a folder.
pub(super) struct Node {
    database: Arc<Database>,
    pub(super) outbox: Arc<Outbox>,
    delivery: Arc<Delivery>,
    channels: Channels,
    ends: Arc<Mutex<Vec<End>>>,
    task: JoinHandle<()>,
    _stop: watch::Sender<bool>,
}

/// The channels that are open with these receivers.
fn channels(ways: &Ways) -> Channels {
    let is_open = |channel: &Channel| match channel {
        Channel::StructuredReport => ways.pacs.is_some(),
        Channel::SecondaryCapture => ways.pacs.as_ref().is_some_and(|pacs| pacs.has_captures),
        Channel::Webhook => ways.webhook.is_some(),
        Channel::Hl7 => ways.hl7.is_some(),
        Channel::Stow => ways.stow.is_some(),
    };
    Channels {
        open: Channel::ALL.into_iter().filter(is_open).collect(),
        allow_demo_results: false,
    }
}

pub(super) fn impatient() -> Patience {
    Patience {
        first: Duration::from_millis(20),
        longest: Duration::from_millis(80),
        deadline: Duration::from_secs(120),
    }
}

fn ways(pacs: Pacs, patience: Patience) -> Ways {
    Ways {
        pacs: Some(pacs),
        ..no_ways(patience)
    }
}

pub(super) fn no_ways(patience: Patience) -> Ways {
    Ways {
        pacs: None,
        webhook: None,
        hl7: None,
        stow: None,
        device: Device::sample(),
        patience,
    }
}

impl Node {
    fn start(database: &Path, pacs: Pacs, patience: Patience) -> Self {
        Self::start_with(database, &ways(pacs, patience))
    }

    pub(super) fn start_with(database: &Path, ways: &Ways) -> Self {
        Self::start_bounded(database, ways, Bounds::default())
    }

    fn start_bounded(database: &Path, ways: &Ways, bounds: Bounds) -> Self {
        let database = Arc::new(Database::create(database).unwrap());
        let outbox = Arc::new(Outbox::open(Arc::clone(&database)).unwrap());
        let ends: Arc<Mutex<Vec<End>>> = Arc::default();
        let seen = Arc::clone(&ends);
        let delivery = Delivery::new(
            Arc::clone(&outbox),
            ways.clone(),
            Arc::new(|_, _| Err(NotMade::Never("no captures here".to_owned()))),
            Box::new(move |_, end| seen.lock().unwrap().push(end)),
            bounds,
        );
        let (stop, stopped) = watch::channel(false);
        Self {
            channels: channels(ways),
            database,
            outbox,
            ends,
            task: tokio::spawn(Arc::clone(&delivery).run(stopped)),
            delivery,
            _stop: stop,
        }
    }

    pub(super) fn decide(&self, result: &StudyResult) {
        let transaction = self.database.begin_write().unwrap();
        enqueue(&transaction, result, &self.channels).unwrap();
        transaction.commit().unwrap();
        self.outbox.bell.notify_waiters();
    }

    /// Waits until so many attempts ended, none of them in success.
    pub(super) async fn tried(&self, times: usize) {
        for _ in 0..LOOKS {
            if self.ends.lock().unwrap().len() >= times {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let ends = self.ends.lock().unwrap();
        assert!(ends.len() >= times && ends.iter().all(|end| *end == End::Retried));
    }

    /// Waits until nothing waits.
    pub(super) async fn settled(&self) -> Counts {
        for _ in 0..LOOKS {
            let counts = self.outbox.counts().unwrap();
            if counts.waiting == 0 {
                return counts;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("letters wait for ever: {:?}", self.ends.lock().unwrap());
    }
}

pub(super) fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let database = folder.path().join("results.redb");
    (folder, database)
}

/// One positive result to a PACS with a script: the requests, and how many letters died.
async fn deliver(classes: &'static [&'static str], script: &[Act]) -> (Vec<Request>, u64) {
    let (_folder, database) = folder();
    let pacs = ScriptedPacs::start(classes, Syntax::Explicit, script).await;
    let node = Node::start(&database, pacs.address(), impatient());
    node.decide(&sample::positive());
    let counts = node.settled().await;
    (pacs.requests(), counts.dead)
}

/// The data set of a request, which says the same UID as its command.
#[track_caller]
fn set_of(request: &Request) -> DataSet {
    let set = DataSet::decode(&request.data, Syntax::Explicit).unwrap();
    assert_eq!(
        set.string(tags::SOP_INSTANCE_UID),
        Some(request.uid.as_str())
    );
    assert_eq!(
        set.string(tags::SOP_CLASS_UID),
        Some(request.class.as_str())
    );
    set
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_arrives_once_however_often_it_is_decided() {
    let (_folder, database) = folder();
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &[]).await;
    let node = Node::start(&database, pacs.address(), impatient());
    let result = sample::positive();
    node.decide(&result);
    node.settled().await;
    node.decide(&result);
    let again = StudyResult {
        revision: 9,
        decided_ms: result.decided_ms + 1000,
        ..result
    };
    node.decide(&again);
    assert_eq!(node.settled().await, Counts::default());
    let requests = pacs.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].class, THREE_D);
    set_of(&requests[0]);
    assert_eq!(*node.ends.lock().unwrap(), [End::Delivered]);
}

#[tokio::test(flavor = "multi_thread")]
async fn accepted_with_a_warning_or_as_a_duplicate_is_accepted() {
    for status in [0xB000, 0xB007, 0x0111] {
        let (requests, dead) = deliver(BOTH, &[Act::Answer(status)]).await;
        assert_eq!((requests.len(), dead), (1, 0), "{status:04X}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_taken_later_is_sent_again_byte_for_byte() {
    for act in [Act::Answer(0xA700), Act::Cut] {
        let (requests, dead) = deliver(BOTH, &[act, act]).await;
        assert_eq!((requests.len(), dead), (3, 0), "{act:?}");
        assert!(requests.iter().all(|request| *request == requests[0]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pacs_that_hangs_meets_the_deadline_and_gets_the_same_bytes_again() {
    let (_folder, database) = folder();
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &[Act::Hang]).await;
    let patience = Patience {
        deadline: Duration::from_secs(1),
        ..impatient()
    };
    let node = Node::start(&database, pacs.address(), patience);
    node.decide(&sample::positive());
    node.settled().await;
    let requests = pacs.requests();
    assert!(requests.len() >= 2 && requests.iter().all(|request| *request == requests[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_report_falls_back_to_the_older_class_once_and_then_dies() {
    for status in [0xA900, 0xC000, 0x0122, 0x0124] {
        let (requests, dead) = deliver(BOTH, &[Act::Answer(status)]).await;
        let classes: Vec<_> = requests
            .iter()
            .map(|request| request.class.as_str())
            .collect();
        assert_eq!((classes.as_slice(), dead), (BOTH, 0), "{status:04X}");
        assert_ne!(requests[0].uid, requests[1].uid);
        set_of(&requests[1]);
        let (requests, dead) = deliver(BOTH, &[Act::Answer(status); 2]).await;
        assert_eq!((requests.len(), dead), (2, 1), "{status:04X}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejected_context_falls_back_and_no_context_is_a_dead_letter_with_its_reason() {
    let (requests, dead) = deliver(&[PLAIN], &[]).await;
    assert_eq!(
        (requests.len(), requests[0].class.as_str(), dead),
        (1, PLAIN, 0)
    );

    let (_folder, database) = folder();
    let echo_only = &["1.2.840.10008.1.1"];
    let pacs = ScriptedPacs::start(echo_only, Syntax::Explicit, &[]).await;
    let node = Node::start(&database, pacs.address(), impatient());
    node.decide(&sample::positive());
    assert_eq!(node.settled().await.dead, 1);
    let letter = node.outbox.dead_letters(1).unwrap().remove(0);
    assert!(letter.remark.unwrap().contains("presentation context"));
    assert_eq!(*node.ends.lock().unwrap(), [End::Dead]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_sent_when_it_is_revived() {
    let (_folder, database) = folder();
    let refusals = [Act::Answer(0xC000); 2];
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &refusals).await;
    let node = Node::start(&database, pacs.address(), impatient());
    node.decide(&sample::positive());
    assert_eq!(node.settled().await.dead, 1);
    assert_eq!(node.outbox.revive().unwrap(), 1);
    assert_eq!(node.settled().await, Counts::default());
    let requests = pacs.requests();
    assert_eq!((requests.len(), &requests[2]), (3, &requests[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_that_a_later_one_has_overtaken_stays_dead() {
    let (_folder, database) = folder();
    let refusals = [Act::Answer(0xC000); 2];
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &refusals).await;
    let node = Node::start(&database, pacs.address(), impatient());
    node.decide(&sample::provisional());
    assert_eq!(node.settled().await.dead, 1);
    node.decide(&sample::positive());
    assert_eq!(node.settled().await.dead, 1);
    assert_eq!(node.outbox.revive().unwrap(), 0);
    assert_eq!(node.settled().await.dead, 1);
    assert_eq!(pacs.requests().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pacs_with_implicit_vr_alone_gets_the_same_document() {
    let (_folder, database) = folder();
    let pacs = ScriptedPacs::start(BOTH, Syntax::Implicit, &[]).await;
    let node = Node::start(&database, pacs.address(), impatient());
    node.decide(&sample::positive());
    node.settled().await;
    let request = pacs.requests().remove(0);
    let set = DataSet::decode(&request.data, Syntax::Implicit).unwrap();
    assert_eq!(
        set.string(tags::SOP_INSTANCE_UID),
        Some(request.uid.as_str())
    );
    assert_eq!(set.encode(Syntax::Implicit), request.data);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_follows_the_document_that_it_replaces_and_never_overtakes() {
    let (_folder, database) = folder();
    let busy = [
        Act::Answer(0xA700),
        Act::Answer(0xA700),
        Act::Answer(0xA900),
    ];
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &busy).await;
    let node = Node::start(&database, pacs.address(), impatient());
    node.decide(&sample::provisional());
    node.decide(&sample::positive());
    assert_eq!(node.settled().await, Counts::default());
    let requests = pacs.requests();
    let flags: Vec<_> = requests
        .iter()
        .map(|request| {
            set_of(request)
                .string(tags::COMPLETION_FLAG)
                .unwrap()
                .to_owned()
        })
        .collect();
    assert_eq!(
        flags,
        ["PARTIAL", "PARTIAL", "PARTIAL", "PARTIAL", "COMPLETE"]
    );
    // The provisional report was taken in the older class; the final one refers to that.
    let last = set_of(&requests[4]);
    let study = &last.sequence(tags::PREDECESSOR_DOCUMENTS_SEQUENCE)[0];
    let series = &study.sequence(tags::REFERENCED_SERIES_SEQUENCE)[0];
    let replaced = &series.sequence(tags::REFERENCED_SOP_SEQUENCE)[0];
    let named = |tag| replaced.string(tag).unwrap();
    assert_eq!(named(tags::REFERENCED_SOP_INSTANCE_UID), requests[3].uid);
    assert_eq!(named(tags::REFERENCED_SOP_CLASS_UID), PLAIN);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demonstration_model_says_nothing_of_a_patient() {
    let (_folder, database) = folder();
    let database = Database::create(database).unwrap();
    let waiting = |result: &StudyResult, allow_demo_results: bool| {
        let transaction = database.begin_write().unwrap();
        let channels = Channels {
            allow_demo_results,
            open: Channel::ALL.to_vec(),
        };
        enqueue(&transaction, result, &channels).unwrap();
        let table = redb::TableDefinition::<u64, &[u8]>::new("outbox_waiting");
        let count = {
            let table = transaction.open_table(table).unwrap();
            redb::ReadableTableMetadata::len(&table).unwrap()
        };
        transaction.abort().unwrap();
        count
    };
    let phantom = sample::positive();
    let mut patient = phantom.clone();
    patient.is_phantom = false;
    let mut trained = patient.clone();
    trained.model.is_demonstration = false;
    assert_eq!(waiting(&phantom, false), 5);
    assert_eq!(waiting(&patient, false), 0);
    assert_eq!(waiting(&patient, true), 5);
    assert_eq!(waiting(&trained, false), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn too_old_letters_are_forgotten_with_all_that_they_say() {
    let (_folder, database) = folder();
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &[]).await;
    let node = Node::start(&database, pacs.address(), impatient());
    let result = sample::positive();
    node.decide(&result);
    node.settled().await;
    let forget = |oldest_ms| node.outbox.forget(Ages::before(oldest_ms)).unwrap();
    assert_eq!(forget(result.decided_ms), 0);
    node.decide(&result);
    assert_eq!(pacs.requests().len(), 1);
    assert_eq!(forget(result.decided_ms + 1), 0);
    node.task.abort();
    node.decide(&result);
    assert_eq!(node.outbox.counts().unwrap().waiting, 1);
    assert_eq!(forget(result.decided_ms + 1), 1);
    assert_eq!(node.outbox.counts().unwrap(), Counts::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_letter_of_a_wrong_clock_counts_from_when_the_clock_is_right() {
    let (_folder, database) = folder();
    let node = Node::start(&database, nowhere().await, impatient());
    node.task.abort();
    let right_ms = sample::positive().decided_ms;
    node.decide(&StudyResult {
        // Ten minutes after 1970 began.
        decided_ms: 600_000,
        ..sample::positive()
    });
    assert_eq!(node.outbox.counts().unwrap().waiting, 1);
    let forget = |oldest_ms| node.outbox.forget(Ages::before(oldest_ms)).unwrap();
    assert_eq!(forget(right_ms), 0);
    assert_eq!(forget(right_ms + 1000), 0, "from the first look on");
    assert_eq!(forget(right_ms + 1001), 1);
}

/// A PACS that does not answer.
async fn nowhere() -> Pacs {
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &[]).await;
    let mut nowhere = pacs.address();
    // No program is given this port by chance.
    nowhere.connection.port = 1;
    nowhere
}

/// The sample, of the study with this number.
fn numbered(study: u32) -> StudyResult {
    StudyResult {
        study_uid: Uid::new(&format!("2.25.{study}")).unwrap(),
        ..sample::positive()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_too_many_letters_the_oldest_are_given_up_and_then_lost_and_all_are_counted() {
    let (_folder, database) = folder();
    let bounds = Bounds {
        waiting: 3,
        dead: 2,
    };
    let ways = ways(nowhere().await, impatient());
    let node = Node::start_bounded(&database, &ways, bounds);
    for study in 1..=7 {
        node.decide(&numbered(study));
    }
    let wanted = Counts {
        waiting: 3,
        dead: 2,
    };
    for _ in 0..LOOKS {
        if node.outbox.n_lost() == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(
        (node.outbox.counts().unwrap(), node.outbox.n_lost()),
        (wanted, 2)
    );
    let dead = node.outbox.dead_letters(9).unwrap();
    let studies: Vec<_> = dead
        .iter()
        .map(|letter| letter.study_uid.as_str())
        .collect();
    assert_eq!(studies, ["2.25.4", "2.25.3"]);
    assert_eq!(dead[0].remark.as_deref(), Some("more than 3 letters wait"));
    let given_up = |end: &&End| **end == End::Dead;
    assert_eq!(node.ends.lock().unwrap().iter().filter(given_up).count(), 4);
    // When the receiver is back it gets all that are left.
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &[]).await;
    node.outbox.revive().unwrap();
    node.delivery
        .configure(self::ways(pacs.address(), impatient()));
    node.settled().await;
    assert!(pacs.requests().len() >= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pacs_that_never_answers_a_release_holds_nothing_up() {
    let (_folder, database) = folder();
    let script = [Act::Answer(0), Act::IgnoreRelease, Act::Answer(0)];
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &script).await;
    let patience = Patience {
        // Whoever waited for the release this long would wait for longer than the test does.
        deadline: Duration::from_secs(3600),
        ..impatient()
    };
    let node = Node::start(&database, pacs.address(), patience);
    for study in 1..=3 {
        node.decide(&numbered(study));
        pacs.wait_for(study as usize).await;
    }
    assert_eq!(node.settled().await, Counts::default());
}

/// Environment of [`sends_until_it_is_killed`]: the database, and the port of the PACS.
const CHILD: (&str, &str) = ("PE_EDGE_TEST_OUTBOX", "PE_EDGE_TEST_PORT");

/// The other side of [`whatever_is_killed_when_the_pacs_sees_one_document`]; by itself it does nothing.
#[tokio::test(flavor = "multi_thread")]
async fn sends_until_it_is_killed() {
    let (Ok(database), Ok(port)) = (std::env::var(CHILD.0), std::env::var(CHILD.1)) else {
        return;
    };
    let pacs = Pacs {
        calling: "PEEDGE".to_owned(),
        called: "PACS".to_owned(),
        connection: Connection {
            host: "127.0.0.1".to_owned(),
            port: port.parse().unwrap(),
            tls: None,
        },
        has_captures: false,
        is_asked_to_commit: false,
    };
    let node = Node::start(Path::new(&database), pacs, impatient());
    node.decide(&sample::positive());
    node.settled().await;
}

fn child(database: &Path, port: u16) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "send::delivered::sends_until_it_is_killed"])
        .env(CHILD.0, database)
        .env(CHILD.1, port.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_killed_when_the_pacs_sees_one_document() {
    let (_folder, database) = folder();
    // Three times the PACS has the object and the program dies before it hears so.
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &[Act::Hang; 3]).await;
    let port = pacs.address().connection.port;
    for kills in 1..=3 {
        let mut running = child(&database, port);
        pacs.wait_for(kills).await;
        running.kill().unwrap();
        running.wait().unwrap();
    }
    for _ in 0..2 {
        // The first of these delivers; the second decides the same again and finds it delivered.
        let mut running = child(&database, port);
        let done = tokio::task::spawn_blocking(move || running.wait().unwrap());
        assert!(done.await.unwrap().success());
    }
    let requests = pacs.requests();
    assert_eq!(requests.len(), 4);
    assert!(requests.iter().all(|request| *request == requests[0]));
    let outbox = Outbox::open(Arc::new(Database::create(&database).unwrap())).unwrap();
    assert_eq!(outbox.counts().unwrap(), Counts::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pacs_that_is_down_gets_the_result_when_it_is_back() {
    let (_folder, database) = folder();
    let pacs = ScriptedPacs::start(BOTH, Syntax::Explicit, &[]).await;
    let node = Node::start(&database, nowhere().await, impatient());
    node.decide(&sample::positive());
    node.tried(3).await;
    assert_eq!(node.outbox.counts().unwrap().waiting, 1);
    node.delivery.configure(ways(pacs.address(), impatient()));
    assert_eq!(node.settled().await, Counts::default());
    assert_eq!(pacs.requests().len(), 1);
}
