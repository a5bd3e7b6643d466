//! The rules of deciding, each on a store of its own. Slices are made up: a tensor's first bytes are the logit that the network "gives".

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shared::TENSOR_BYTES;
use shared::phantom::MANUFACTURER;
use shared::study::StudyRule;
use shared::uid::Uid;
use tokio::sync::broadcast;

use super::again::Again;
use super::arrivals::Arrivals;
use super::counters::Counters;
use super::decider::{Decider, Network, Parts};
use super::handoff::Handoff;
use super::store::{Store, StoreError};
use super::studies::Judge;
use super::{Item, Part};
use crate::result::{Attempt, Element, ModelIdentity, Outcome, State, StudyResult};
use crate::series::Limits;
use crate::supervisor::Tensor;
use crate::wire::{ObjectFacts, Reason, SliceFacts};

const CT: &str = "1.2.840.10008.5.1.4.1.1.2";
const DOSE_REPORT: &str = "1.2.840.10008.5.1.4.1.1.88.67";
/// 2026-01-01.
const RECEIVED_MS: i64 = 1_767_225_600_000;
const FOREVER: Duration = Duration::from_secs(3_600);
const RULE: StudyRule = StudyRule {
    smoothing_slices: 1,
    top_slices: 3,
    logit_threshold: 0.0,
};

/// A node's store over several runs of its decider.
struct Bench {
    folder: tempfile::TempDir,
    said: Arc<Mutex<Vec<StudyResult>>>,
    n_inferences: Arc<AtomicU64>,
    next_sequence: u64,
    is_demonstration: bool,
    absent: Option<Reason>,
    model: &'static str,
    again: Arc<Again>,
}

/// A slice to come.
#[derive(Clone)]
struct Slice {
    series: String,
    sop: String,
    class: &'static str,
    patient: &'static str,
    manufacturer: &'static str,
    pixels: u8,
    logit: f32,
    facts: SliceFacts,
    reason: Option<Reason>,
}

impl Slice {
    fn new(series: &str, index: u32, logit: f32) -> Self {
        Self {
            series: series.to_owned(),
            sop: format!("{series}.{index}"),
            class: CT,
            patient: "P1",
            manufacturer: "Scanner Ltd",
            pixels: 0,
            logit,
            facts: SliceFacts {
                z_mm: Some(f64::from(index) * 2.0),
                thickness_mm: Some(2.0),
                image_type: "ORIGINAL\\PRIMARY\\AXIAL".into(),
                is_original_primary: true,
                orientation: [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
                ..SliceFacts::default()
            },
            reason: None,
        }
    }

    fn refused(mut self, code: &str) -> Self {
        self.reason = Some(Reason::new(code, "as the test says"));
        self
    }
}

/// 60 slices of one series, 2 mm apart.
fn series(name: &str, logit: f32) -> Vec<Slice> {
    (0..60)
        .map(|index| Slice::new(name, index, logit))
        .collect()
}

fn study_uid() -> Uid {
    Uid::new("1.9").unwrap()
}

impl Bench {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            said: Arc::default(),
            n_inferences: Arc::default(),
            next_sequence: 1,
            is_demonstration: false,
            absent: None,
            model: "d1",
            again: Arc::default(),
        }
    }

    fn store(&self) -> Arc<Store> {
        Store::open(&self.folder.path().join("results.redb")).unwrap()
    }

    /// One run of the decider over `slices`.
    fn run(&mut self, slices: &[Slice], quiet_time: Duration) {
        let said = Arc::clone(&self.said);
        let network = match &self.absent {
            Some(reason) => Network::Absent(reason.clone()),
            None => Network::Scripted(Arc::clone(&self.n_inferences)),
        };
        let parts = Parts {
            store: self.store(),
            network,
            judge: Judge {
                model: ModelIdentity {
                    name: "test".into(),
                    digest: self.model.into(),
                    is_demonstration: self.is_demonstration,
                },
                rule: Some(RULE),
                limits: Limits::default(),
                unassigned: Vec::new(),
            },
            quiet_time,
            again: Arc::clone(&self.again),
            arrivals: Arc::new(Arrivals::new(0, Instant::now())),
            enqueue: Box::new(move |_, result| {
                if result.may_leave(false) {
                    said.lock().unwrap().push(result.clone());
                }
                Ok(())
            }),
            changed: broadcast::Sender::new(8),
            finished: Box::new(|_| {}),
            counters: Arc::new(Counters::default()),
            now_ms: || RECEIVED_MS,
        };
        let decider = Decider::new(parts, Instant::now()).unwrap();
        let handoff = Handoff::default();
        std::thread::scope(|scope| {
            scope.spawn(|| decider.run(&handoff));
            for slice in slices {
                for item in items(slice, self.next_sequence) {
                    handoff.push(item).unwrap();
                }
                self.next_sequence += 1;
            }
            handoff.close();
        });
    }

    /// Slices come; the study stays open.
    fn receive(&mut self, slices: &[Slice]) {
        self.run(slices, FOREVER);
    }

    /// The quiet time passes.
    fn complete(&mut self) -> StudyResult {
        self.run(&[], Duration::ZERO);
        self.result()
    }

    fn result(&self) -> StudyResult {
        self.store().study(&study_uid()).unwrap().unwrap()
    }

    fn said(&self) -> Vec<(u32, State, Outcome)> {
        let said = self.said.lock().unwrap();
        let one = |result: &StudyResult| (result.revision, result.state, result.outcome.clone());
        said.iter().map(one).collect()
    }

    fn n_inferences(&self) -> u64 {
        self.n_inferences.load(Ordering::Relaxed)
    }
}

fn items(slice: &Slice, sequence: u64) -> [Item; 2] {
    let element = |tag, value: &str| Element {
        tag,
        vr: "LO".into(),
        value: value.as_bytes().to_vec(),
    };
    let object = Arc::new(ObjectFacts {
        study_uid: Some(study_uid()),
        series_uid: Uid::new(&slice.series).ok(),
        sop_uid: Uid::new(&slice.sop).ok(),
        sop_class: Uid::new(slice.class).ok(),
        elements: vec![
            element((0x0010, 0x0020), slice.patient),
            element((0x0008, 0x0070), slice.manufacturer),
        ],
        n_frames: 1,
        is_multi_frame: false,
    });
    let mut bytes = vec![0; TENSOR_BYTES];
    bytes[..4].copy_from_slice(&slice.logit.to_le_bytes());
    let mut facts = slice.facts.clone();
    facts.pixel_digest = format!("{}-{}", slice.sop, slice.pixels);
    let answer = match &slice.reason {
        Some(reason) => Err(reason.clone()),
        None => Ok(Box::new(Tensor { facts, bytes })),
    };
    let item = |part| Item {
        sequence,
        is_again: false,
        received_ms: RECEIVED_MS,
        sop_uid: Uid::new(&slice.sop).ok(),
        sop_class_uid: slice.class.to_owned(),
        object: Arc::clone(&object),
        part,
    };
    [item(Part::Slice(0, answer)), item(Part::End)]
}

fn codes(outcome: &Outcome) -> &str {
    match outcome {
        Outcome::NotAnalysed { code, .. } => code,
        Outcome::Pending => "pending",
        Outcome::Positive => "positive",
        Outcome::NotDetected => "not-detected",
    }
}

#[test]
fn not_detected_is_said_only_after_the_quiet_time_and_counts_its_slices() {
    let mut bench = Bench::new();
    let mut slices = series("1.2", -1.0);
    slices[7] = slices[7].clone().refused("pixel-bytes");
    bench.receive(&slices);
    let growing = bench.result();
    assert_eq!(
        (growing.state, codes(&growing.outcome)),
        (State::Receiving, "pending")
    );
    assert!(bench.said().is_empty());
    let result = bench.complete();
    assert_eq!(
        (result.state, codes(&result.outcome)),
        (State::Complete, "not-detected")
    );
    assert_eq!(result.words(), "not detected on 59 of 60 slices");
    assert_eq!(result.attempt(), Some(Attempt::PartiallySucceeded));
    assert_eq!(bench.said(), [(1, State::Complete, Outcome::NotDetected)]);
}

#[test]
fn a_positive_is_said_at_once_and_again_when_complete() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", 1.0));
    assert_eq!(bench.result().state, State::Provisional);
    bench.complete();
    assert_eq!(
        bench.said(),
        [
            (1, State::Provisional, Outcome::Positive),
            (2, State::Complete, Outcome::Positive)
        ]
    );
    // Nothing new, nothing said.
    bench.complete();
    assert_eq!(bench.said().len(), 2);
}

#[test]
fn a_few_slices_of_a_monitoring_scan_are_no_provisional_positive() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", 9.0)[..30]);
    assert_eq!(codes(&bench.result().outcome), "pending");
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "coverage");
    assert_eq!(result.attempt(), Some(Attempt::NotAttempted));
}

#[test]
fn the_same_slices_again_need_no_inference_and_say_nothing_new() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    let first = bench.complete();
    bench.receive(&series("1.2", -1.0));
    assert_eq!(bench.result().outcome, Outcome::NotDetected);
    let second = bench.complete();
    assert_eq!(bench.n_inferences(), 60);
    assert_eq!(bench.said().len(), 1);
    assert_eq!((first.revision, second.revision), (1, 1));
    assert_eq!(second.slices.len(), 60);
}

#[test]
fn other_pixels_under_the_same_uid_are_analysed_anew_and_flagged() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    bench.complete();
    let mut changed = series("1.2", 5.0);
    changed.iter_mut().for_each(|slice| slice.pixels = 1);
    bench.receive(&changed[..3]);
    let result = bench.complete();
    assert_eq!(bench.n_inferences(), 63);
    assert_eq!(codes(&result.outcome), "positive");
    assert_eq!(result.remarks.len(), 1);
    assert!(
        result.remarks[0].starts_with("3 slices came again"),
        "{:?}",
        result.remarks
    );
}

#[test]
fn a_bad_copy_does_not_take_a_good_answer_away() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    bench.receive(&[Slice::new("1.2", 3, 0.0).refused("truncated")]);
    let result = bench.complete();
    assert_eq!(result.words(), "not detected on 60 of 60 slices");
    assert!(result.remarks[0].starts_with("1 slices came again in a form"));
}

#[test]
fn corrected_demographics_are_a_revision_without_inference() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    bench.complete();
    let mut corrected = series("1.2", -1.0);
    corrected.iter_mut().for_each(|slice| slice.patient = "P2");
    bench.receive(&corrected);
    let result = bench.complete();
    assert_eq!(bench.n_inferences(), 60);
    assert_eq!(
        (result.revision, codes(&result.outcome)),
        (2, "not-detected")
    );
    assert_eq!(result.patient.elements[0].value, b"P2");
    let statements = bench.store().statements(&study_uid()).unwrap();
    assert_eq!(statements[0].superseded_by, Some(2));
    assert_eq!(bench.said().len(), 2);
}

#[test]
fn two_patients_in_one_study_are_held_and_nothing_is_sent() {
    let mut bench = Bench::new();
    let mut slices = series("1.2", 9.0);
    slices[0].patient = "P2";
    bench.receive(&slices);
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "identity-conflict");
    assert!(bench.said().is_empty());
    // The sender corrects the one slice.
    bench.receive(&series("1.2", 9.0)[..1]);
    let result = bench.complete();
    assert_eq!((result.revision, codes(&result.outcome)), (3, "positive"));
    assert_eq!(bench.said().last().unwrap().0, 3);
    assert_eq!(bench.n_inferences(), 60);
}

#[test]
fn a_demonstration_model_says_nothing_about_patients() {
    for (manufacturer, n_said) in [("Scanner Ltd", 0), (MANUFACTURER, 2)] {
        let mut bench = Bench::new();
        bench.is_demonstration = true;
        let mut slices = series("1.2", 9.0);
        slices
            .iter_mut()
            .for_each(|slice| slice.manufacturer = manufacturer);
        bench.receive(&slices);
        let result = bench.complete();
        assert_eq!(codes(&result.outcome), "positive");
        assert_eq!(result.is_phantom, n_said > 0);
        assert_eq!(bench.said().len(), n_said);
    }
}

/// Six series as a chest CT brings them: monitoring, soft and lung kernel, thick, a projection that is refused, coronal.
fn six_series() -> Vec<Vec<Slice>> {
    let soft = series("1.1", 2.0);
    let mut lung = series("1.2", 7.0);
    lung.iter_mut()
        .for_each(|slice| slice.facts.kernel = Some("B70f".into()));
    let mut thick = series("1.3", -3.0);
    thick
        .iter_mut()
        .for_each(|slice| slice.facts.thickness_mm = Some(5.0));
    let mut monitoring = series("1.4", 8.0);
    monitoring
        .iter_mut()
        .for_each(|slice| slice.facts.z_mm = Some(40.0));
    let mut derived = series("1.5", 6.0);
    for slice in &mut derived {
        slice.facts.image_type = "DERIVED\\SECONDARY\\AXIAL".into();
        slice.facts.is_original_primary = false;
    }
    let refused = series("1.6", 0.0)
        .into_iter()
        .map(|slice| slice.refused("image-type"));
    vec![soft, lung, thick, monitoring, derived, refused.collect()]
}

/// What the order of arrival must not change.
fn verdict(result: &StudyResult) -> (Option<String>, Option<f32>, String, usize, Vec<String>) {
    let mut others: Vec<String> = result
        .not_judged
        .iter()
        .map(|other| format!("{:?} {} {}", other.series_uid, other.n_slices, other.reason))
        .collect();
    others.sort();
    (
        result.series_uid.as_ref().map(Uid::to_string),
        result.score,
        codes(&result.outcome).to_owned(),
        result.slices.len(),
        others,
    )
}

#[test]
fn six_series_in_any_order_of_arrival_give_one_verdict() {
    let all = six_series();
    let mut interleaved = Vec::new();
    for index in 0..60 {
        interleaved.extend(all.iter().map(|series| series[59 - index].clone()));
    }
    let orders = [
        all.concat(),
        all.iter().rev().flatten().cloned().collect(),
        interleaved,
    ];
    let verdicts = orders.map(|slices| {
        let mut bench = Bench::new();
        bench.receive(&slices);
        verdict(&bench.complete())
    });
    assert_eq!(verdicts[0].0.as_deref(), Some("1.1"));
    assert_eq!((verdicts[0].1, verdicts[0].4.len()), (Some(2.0), 5));
    assert_eq!(verdicts[0], verdicts[1]);
    assert_eq!(verdicts[0], verdicts[2]);
}

#[test]
fn a_better_series_that_comes_later_is_judged_in_a_revision() {
    let all = six_series();
    let mut bench = Bench::new();
    bench.receive(&all[2]);
    let first = bench.complete();
    assert_eq!((first.revision, codes(&first.outcome)), (1, "not-detected"));
    for series in [&all[4], &all[3], &all[5], &all[1], &all[0]] {
        bench.receive(series);
        bench.complete();
    }
    let last = bench.result();
    let mut at_once = Bench::new();
    at_once.receive(&all.concat());
    assert_eq!(verdict(&last), verdict(&at_once.complete()));
    assert_eq!(codes(&last.outcome), "positive");
    // Not detected, then provisionally positive with the better series, then complete.
    let revisions: Vec<u32> = bench.said().iter().map(|said| said.0).collect();
    assert_eq!(revisions, [1, 2, 3]);
}

#[test]
fn a_gap_forbids_not_detected_but_takes_no_positive_away() {
    let with_gap = |logit| {
        let slices = series("1.2", logit).into_iter().enumerate();
        let kept = slices.filter(|(index, _)| !(20..32).contains(index));
        kept.map(|(_, slice)| slice).collect::<Vec<Slice>>()
    };
    let mut bench = Bench::new();
    bench.receive(&with_gap(-1.0));
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "gap");
    let mut bench = Bench::new();
    bench.receive(&with_gap(1.0));
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "positive");
    assert!(result.remarks[0].contains("no analysed slice"));
}

#[test]
fn every_study_with_a_ct_object_has_a_result_and_no_other() {
    let mut bench = Bench::new();
    let mut report = Slice::new("1.8", 1, 0.0).refused("sop-class");
    report.class = DOSE_REPORT;
    bench.receive(&[report]);
    assert_eq!(bench.store().study(&study_uid()).unwrap(), None);
    bench.receive(&[Slice::new("1.2", 1, 0.0).refused("worker")]);
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "worker");
    assert_eq!(result.attempt(), Some(Attempt::Failed));
    assert_eq!((result.n_other_objects, result.slices.len()), (1, 1));
    assert_eq!(bench.said().len(), 1);
}

#[test]
fn without_a_sound_model_slices_have_the_reason_and_are_analysed_again_later() {
    let mut bench = Bench::new();
    bench.absent = Some(Reason::new("self-test", "other bits"));
    bench.receive(&series("1.2", 1.0));
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "self-test");
    assert_eq!(result.slices.len(), 60);
    assert_eq!(
        bench.store().again().unwrap(),
        (1..=60).collect::<Vec<u64>>()
    );
}

#[test]
fn answers_of_another_model_do_not_count_and_are_asked_for_again() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", 9.0));
    assert_eq!(bench.result().state, State::Provisional);
    bench.model = "d2";
    bench.receive(&series("1.2", -1.0)[..1]);
    let asked: Vec<u64> = std::iter::from_fn(|| bench.again.next()).collect();
    assert_eq!(asked, (1..=60).collect::<Vec<u64>>());
    assert_eq!(bench.store().again().unwrap(), asked);
    let result = bench.complete();
    assert_eq!((result.slices.len(), result.n_analysed()), (60, 1));
    assert_eq!(codes(&result.outcome), "coverage");
}

#[test]
fn a_database_of_a_later_version_is_refused_with_a_message() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.redb");
    drop(Store::open(&path).unwrap());
    let database = redb::Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("meta");
    transaction
        .open_table(meta)
        .unwrap()
        .insert("schema", 99)
        .unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Newer { found: 99, .. }));
    assert!(error.to_string().contains("install the later version"));
}

#[test]
fn what_is_too_old_is_forgotten_with_everything_that_belongs_to_it() {
    let mut bench = Bench::new();
    let mut slices = series("1.2", 1.0);
    let mut report = Slice::new("1.8", 1, 0.0).refused("sop-class");
    report.class = DOSE_REPORT;
    slices.push(report);
    bench.receive(&slices);
    bench.complete();
    let store = bench.store();
    assert_eq!(store.forget(RECEIVED_MS, 0).unwrap(), []);
    assert_eq!(store.forget(RECEIVED_MS + 1, 0).unwrap(), [study_uid()]);
    assert_eq!(store.studies().unwrap(), []);
    let (rows, elements) = store.slices(&study_uid()).unwrap();
    assert!(rows.is_empty() && elements.is_empty());
    assert_eq!(store.statements(&study_uid()).unwrap(), []);
}

#[test]
fn an_object_that_names_no_study_is_remarked_on_the_study_among_which_it_came() {
    let mut bench = Bench::new();
    let mut slices = series("1.2", -1.0);
    slices[30].sop = "not a uid".into();
    bench.receive(&slices);
    let result = bench.complete();
    assert_eq!(result.words(), "not detected on 59 of 59 slices");
    assert!(
        result.remarks[0].contains("name no study"),
        "{:?}",
        result.remarks
    );
}

#[test]
fn objects_without_an_image_are_forgotten_too() {
    let mut bench = Bench::new();
    let mut report = Slice::new("1.8", 1, 0.0).refused("sop-class");
    report.class = DOSE_REPORT;
    bench.receive(&[report]);
    let store = bench.store();
    assert_eq!(store.slices(&study_uid()).unwrap().0.len(), 1);
    assert_eq!(store.forget(RECEIVED_MS + 1, 0).unwrap(), []);
    assert_eq!(store.slices(&study_uid()).unwrap().0.len(), 0);
}
