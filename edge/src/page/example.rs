//! Studies for the tests of the page.

use shared::uid::Uid;

use crate::result::{
    Element, ModelIdentity, OtherSeries, Outcome, Patient, SliceResult, State, StudyResult,
};

/// 2026-11-23 14:00 UTC.
const NOON_MS: i64 = 1_795_442_400_000;

fn uid(text: &str) -> Uid {
    Uid::new(text).unwrap()
}

/// A patient with the given name.
pub(crate) fn patient(name: &str, number: u32) -> Patient {
    let element = |tag, value: &str| Element {
        tag,
        vr: "LO".into(),
        value: value.as_bytes().to_vec(),
    };
    Patient {
        elements: vec![
            element((0x0008, 0x0005), "ISO_IR 192"),
            element((0x0008, 0x0020), "20261123"),
            element((0x0008, 0x0050), &format!("A{:06}", 48_000 + number)),
            element((0x0008, 0x1030), "CT pulmonary angiogram"),
            element((0x0010, 0x0010), name),
            element((0x0010, 0x0020), &format!("{:07}", 2_031_000 + number * 7)),
            element((0x0010, 0x0030), "19610228"),
        ],
    }
}

/// A study whose slices have an embolus around `centre`, where there is one.
pub(crate) fn study(
    number: u32,
    name: &str,
    n_slices: usize,
    centre: Option<usize>,
) -> StudyResult {
    let logit = |index: usize| {
        let noise = ((index * 7919 + number as usize * 104_729) % 97) as f32 / 97.0;
        let distance = centre.map_or(1e3, |centre| index.abs_diff(centre) as f32);
        -3.2 + 1.4 * noise + 6.5 * (-(distance / 9.0).powi(2)).exp()
    };
    let slices: Vec<SliceResult> = (0..n_slices)
        .map(|index| SliceResult {
            sequence: index as u64,
            sop_class_uid: "1.2.840.10008.5.1.4.1.1.2".into(),
            sop_uid: uid(&format!("1.2.826.0.1.{number}.3.{index}")),
            frame: None,
            z_mm: Some(-310.0 + 1.25 * index as f64),
            logit: Some(logit(index)),
            reason: None,
        })
        .collect();
    let mut top: Vec<usize> = (0..n_slices).collect();
    top.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)));
    top.truncate(5);
    let received = NOON_MS - i64::from(number) * 420_000;
    StudyResult {
        study_uid: uid(&format!("1.2.826.0.1.{number}")),
        revision: 1,
        state: State::Complete,
        outcome: if centre.is_some() {
            Outcome::Positive
        } else {
            Outcome::NotDetected
        },
        score: Some(if centre.is_some() { 2.9 } else { -2.1 }),
        threshold: Some(0.4),
        series_uid: Some(uid(&format!("1.2.826.0.1.{number}.2"))),
        series_choice: "original axial, thinnest slices (1.25 mm), covers 300 mm".into(),
        slices,
        top,
        not_judged: vec![OtherSeries {
            series_uid: Some(uid(&format!("1.2.826.0.1.{number}.4"))),
            n_slices: 2,
            n_analysed: 0,
            reason: "image-type: ImageType value 3 is LOCALIZER".into(),
        }],
        n_other_objects: 1,
        model: ModelIdentity {
            name: "final-0.125-int8-3fa9c1d2e4b7".into(),
            digest: "3fa9c1d2e4b7".repeat(5) + "3fa9",
            is_demonstration: false,
        },
        patient: patient(name, number),
        is_phantom: false,
        is_lossy: false,
        remarks: Vec::new(),
        first_received_ms: received - 31_000,
        last_received_ms: received,
        decided_ms: received + 60_000,
    }
}

/// Not detected on 238 of 240 slices.
pub(crate) fn not_detected() -> StudyResult {
    let mut result = study(4, "Novak^Petra", 240, None);
    for index in [17, 160] {
        result.slices[index].logit = None;
        result.slices[index].reason = Some("pixel-data: a JPEG scan ends early".into());
    }
    result
}

/// A study of each kind.
pub(crate) fn studies() -> Vec<StudyResult> {
    let mut provisional = study(1, "García Márquez^Lucía", 132, Some(96));
    provisional.state = State::Provisional;
    let mut pending = study(0, "Okafor^Chidi", 58, None);
    pending.state = State::Receiving;
    pending.outcome = Outcome::Pending;
    pending.score = None;
    let mut refused = study(3, "Lindqvist^Åsa", 64, None);
    refused.outcome = Outcome::NotAnalysed {
        code: "rescale-type".into(),
        message: "Rescale Type is \"IOD\", an iodine map; only HU is analysed".into(),
    };
    refused.score = None;
    refused.series_uid = None;
    refused.top.clear();
    for slice in &mut refused.slices {
        slice.logit = None;
        slice.reason = Some("rescale-type: Rescale Type is \"IOD\"; allowed: HU".into());
    }
    vec![
        not_detected(),
        study(6, "Haddad^Samir", 245, Some(140)),
        pending,
        refused,
        provisional,
        study(5, "<script>alert(1)</script>^Bobby", 301, None),
        study(8, "O'Brien^Niamh", 198, None),
        study(9, "Yamada^Tarō=山田^太郎", 260, None),
    ]
}
