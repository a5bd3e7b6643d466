//! The rules of deciding, each on a store of its own: [`answers`] what is said when, [`series`] which series is judged, [`database`] what is kept. Slices are made up: a tensor's first bytes are the logit that the network "gives".

mod answers;
mod database;
mod series;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use shared::TENSOR_BYTES;
use shared::study::StudyRule;
use shared::uid::Uid;
use tokio::sync::broadcast;

use super::again::Again;
use super::arrivals::Arrivals;
use super::counters::Counters;
use super::decider::{Decider, Network, Parts};
use super::handoff::Handoff;
use super::store::{Present, Store};
use super::studies::Judge;
use super::{Item, Part};
use crate::result::{Element, ModelIdentity, Outcome, State, StudyResult};
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
    present: Present,
    study: &'static str,
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
    received_ms: i64,
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
            received_ms: RECEIVED_MS,
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
            present: Present::default(),
            study: "1.9",
        }
    }

    fn store(&self) -> Arc<Store> {
        Store::open(&self.folder.path().join("results.redb"), &self.present).unwrap()
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
                for item in items(self.study, slice, self.next_sequence) {
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

fn items(study: &str, slice: &Slice, sequence: u64) -> [Item; 2] {
    let element = |tag, value: &str| Element {
        tag,
        vr: "LO".into(),
        value: value.as_bytes().to_vec(),
    };
    let object = Arc::new(ObjectFacts {
        study_uid: Uid::new(study).ok(),
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
        received_ms: slice.received_ms,
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
