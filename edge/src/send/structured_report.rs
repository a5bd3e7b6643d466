//! A study's result as a structured report.
//!
//! In: a [`StudyResult`]. Out: the data set of a Comprehensive 3D SR (PS3.3 section A.35.13), or of a Comprehensive SR (A.35.3) for a peer
//! that takes no other, with the content of TID 1500 (PS3.16): language (TID 1204), device observer (TID 1002, 1004), procedure, and one measurement
//! group (TID 1501) with the finding, the algorithm (TID 4019), presence, probability and the slices it was seen on. What is not
//! known is left out: no "absent", no site in the lung, no vessel. Patient and study attributes are copied byte for byte with
//! their character set and time-zone offset.

use dicom_core::{Tag, VR};
use dicom_dictionary_std::{tags, uids};
use shared::probability::sigmoid;
use shared::uid::Uid;

use super::content::{self, Code, ImageReference, Relation};
use super::data_set::DataSet;
use super::equipment::{self, Device};
use super::identity;
use crate::result::{Outcome, State, StudyResult};

/// Slices referred to as the source of the measurement.
const MAX_SOURCES: usize = 5;

/// Which report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Comprehensive 3D SR, the first choice.
    Comprehensive3D,
    /// Comprehensive SR.
    Comprehensive,
}

impl Class {
    /// SOP Class UID.
    pub(crate) const fn uid(self) -> &'static str {
        match self {
            Self::Comprehensive3D => uids::COMPREHENSIVE3_DSR_STORAGE,
            Self::Comprehensive => uids::COMPREHENSIVE_SR_STORAGE,
        }
    }
}

/// A report that a revision replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Predecessor {
    /// SOP Class UID.
    pub(crate) sop_class_uid: String,
    /// Its series.
    pub(crate) series_uid: Uid,
    /// SOP Instance UID.
    pub(crate) sop_instance_uid: Uid,
}

/// The report of `result`; `None` while nothing can be said, and for a study whose identity is not certain.
pub(crate) fn report(
    result: &StudyResult,
    class: Class,
    device: &Device,
    predecessor: Option<&Predecessor>,
) -> Option<DataSet> {
    if !is_reported(&result.outcome) {
        return None;
    }
    let mut set = content::container(
        content::MEASUREMENT_REPORT,
        Some("1500"),
        root_content(result, device),
    );
    equipment::copy_patient(&mut set, result);
    equipment::describe(&mut set, result, device);
    let uid = identity::document_uid(result, class.uid());
    set.text(tags::SOP_CLASS_UID, VR::UI, class.uid()).text(
        tags::SOP_INSTANCE_UID,
        VR::UI,
        uid.as_str(),
    );
    series(&mut set, result);
    general(&mut set, result, predecessor);
    Some(set)
}

/// Whether an answer leaves the box as a document at all.
pub(crate) fn is_reported(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Pending => false,
        Outcome::Positive | Outcome::NotDetected => true,
        Outcome::NotAnalysed { code, .. } => code != "identity-conflict",
    }
}

/// SR Document Series module (PS3.3 C.17.1).
fn series(set: &mut DataSet, result: &StudyResult) {
    let uid = identity::series_uid(result, "SR");
    set.text(tags::MODALITY, VR::CS, "SR")
        .text(tags::SERIES_INSTANCE_UID, VR::UI, uid.as_str())
        .text(tags::SERIES_NUMBER, VR::IS, "9801")
        .text(
            tags::SERIES_DESCRIPTION,
            VR::LO,
            "PE-Edge result, research use only",
        )
        .items(tags::REFERENCED_PERFORMED_PROCEDURE_STEP_SEQUENCE, vec![]);
}

/// SR Document General module (PS3.3 C.17.2).
fn general(set: &mut DataSet, result: &StudyResult, predecessor: Option<&Predecessor>) {
    let (completion, preliminary) = match result.state {
        State::Complete => ("COMPLETE", "FINAL"),
        State::Receiving | State::Provisional => ("PARTIAL", "PRELIMINARY"),
    };
    set.text(tags::INSTANCE_NUMBER, VR::IS, &result.revision.to_string())
        .text(tags::COMPLETION_FLAG, VR::CS, completion)
        .text(tags::PRELIMINARY_FLAG, VR::CS, preliminary)
        .text(tags::VERIFICATION_FLAG, VR::CS, "UNVERIFIED")
        .items(tags::PERFORMED_PROCEDURE_CODE_SEQUENCE, vec![]);
    if result.state != State::Complete {
        let words = "Provisional: slices of the study may still arrive";
        set.text(tags::COMPLETION_FLAG_DESCRIPTION, VR::LO, words);
    }
    if let Some(predecessor) = predecessor {
        let instance = content::reference(
            &predecessor.sop_class_uid,
            predecessor.sop_instance_uid.as_str(),
        );
        let item = hierarchy(result, &predecessor.series_uid, vec![instance]);
        set.items(tags::PREDECESSOR_DOCUMENTS_SEQUENCE, vec![item]);
    }
    if let Some(series_uid) = &result.series_uid {
        let item = hierarchy(result, series_uid, instances(result));
        set.items(
            tags::CURRENT_REQUESTED_PROCEDURE_EVIDENCE_SEQUENCE,
            vec![item],
        );
    }
}

/// Hierarchical SOP Instance Reference macro (PS3.3 C.17.2.1).
fn hierarchy(result: &StudyResult, series_uid: &Uid, instances: Vec<DataSet>) -> DataSet {
    let mut series = DataSet::default();
    series
        .text(tags::SERIES_INSTANCE_UID, VR::UI, series_uid.as_str())
        .items(tags::REFERENCED_SOP_SEQUENCE, instances);
    let mut study = DataSet::default();
    study
        .text(tags::STUDY_INSTANCE_UID, VR::UI, result.study_uid.as_str())
        .items(tags::REFERENCED_SERIES_SEQUENCE, vec![series]);
    study
}

/// Every instance of the judged series once, whatever its frames.
fn instances(result: &StudyResult) -> Vec<DataSet> {
    let mut seen = std::collections::BTreeSet::new();
    result
        .slices
        .iter()
        .filter(|slice| seen.insert(&slice.sop_uid))
        .map(|slice| content::reference(&slice.sop_class_uid, slice.sop_uid.as_str()))
        .collect()
}

/// TID 1500, rows 2 and on.
fn root_content(result: &StudyResult, device: &Device) -> Vec<DataSet> {
    use Relation::{Contains, Context, Modifier};
    let measurements = content::container(content::MEASUREMENTS, None, vec![group(result)]);
    vec![
        content::code(Modifier, content::LANGUAGE, content::ENGLISH),
        content::code(Context, content::OBSERVER_TYPE, content::DEVICE),
        content::uid(Context, content::DEVICE_UID, device.uid.as_str()),
        content::text(Context, content::DEVICE_NAME, &device.station),
        content::text(
            Context,
            content::DEVICE_MANUFACTURER,
            equipment::MANUFACTURER,
        ),
        content::text(Context, content::DEVICE_MODEL, equipment::MODEL_NAME),
        content::text(Context, content::DEVICE_SERIAL, &device.serial),
        content::code(Modifier, content::PROCEDURE, content::CT),
        content::under(Contains, measurements),
    ]
}

/// TID 1501. A study that was not analysed has a group without finding, presence and probability.
fn group(result: &StudyResult) -> DataSet {
    use Relation::{Contains, Context, Modifier};
    let presence = match result.outcome {
        Outcome::Positive => Some(content::DETECTED),
        Outcome::NotDetected => Some(content::NOT_DETECTED),
        Outcome::Pending | Outcome::NotAnalysed { .. } => None,
    };
    let tracking = identity::tracking_uid(result);
    let mut items = vec![
        content::text(
            Context,
            content::TRACKING_IDENTIFIER,
            "Pulmonary embolism, whole study",
        ),
        content::uid(Context, content::TRACKING_UID, tracking.as_str()),
    ];
    if presence.is_some() {
        items.push(content::code(
            Contains,
            content::FINDING,
            content::PULMONARY_EMBOLISM,
        ));
        items.push(content::code(
            Modifier,
            content::FINDING_SITE,
            content::PULMONARY_ARTERY,
        ));
    }
    items.extend(algorithm(result));
    if let Some(presence) = presence {
        items.extend(measured(result));
        items.push(content::code(Contains, content::PRESENCE, presence));
    }
    items.push(content::code(Contains, content::SUMMARY, summary(result)));
    items.push(content::text(Contains, content::COMMENT, &words(result)));
    content::under(
        Contains,
        content::container(content::GROUP, Some("1501"), items),
    )
}

/// TID 4019.
fn algorithm(result: &StudyResult) -> Vec<DataSet> {
    let version = format!(
        "{}; model {}",
        env!("CARGO_PKG_VERSION"),
        result.model.digest
    );
    let mut items = vec![
        content::text(
            Relation::Modifier,
            content::ALGORITHM_NAME,
            &format!("PE-Edge {}", result.model.name),
        ),
        content::text(Relation::Modifier, content::ALGORITHM_VERSION, &version),
    ];
    if let Some(threshold) = result.threshold {
        items.push(content::text(
            Relation::Modifier,
            content::ALGORITHM_PARAMETERS,
            &format!("threshold {} %, logit {threshold}", percent(threshold)),
        ));
    }
    items
}

/// The slices with the highest answers, and the probability inferred from them.
fn measured(result: &StudyResult) -> Vec<DataSet> {
    let images = sources(result);
    let inferred = images
        .iter()
        .map(|image| content::image(Relation::InferredFrom, content::SOURCE, image))
        .collect();
    let mut items: Vec<_> = images
        .iter()
        .map(|image| content::image(Relation::Contains, content::SOURCE, image))
        .collect();
    if let Some(score) = result.score {
        items.push(content::number(
            content::PROBABILITY,
            &percent(score),
            content::PERCENT,
            inferred,
        ));
    }
    items
}

fn sources(result: &StudyResult) -> Vec<ImageReference<'_>> {
    let top = result.top.iter().take(MAX_SOURCES);
    top.filter_map(|&index| result.slices.get(index))
        .map(|slice| ImageReference {
            sop_class_uid: &slice.sop_class_uid,
            sop_instance_uid: slice.sop_uid.as_str(),
            frame: slice.frame,
        })
        .collect()
}

/// How far the analysis came.
fn summary(result: &StudyResult) -> Code {
    match &result.outcome {
        Outcome::NotAnalysed { .. } if result.n_analysed() == 0 => content::NOT_ATTEMPTED,
        Outcome::NotAnalysed { .. } | Outcome::Pending => content::FAILED,
        Outcome::Positive | Outcome::NotDetected if result.n_not_analysed() > 0 => {
            content::PARTIALLY_SUCCEEDED
        }
        Outcome::Positive | Outcome::NotDetected => content::SUCCEEDED,
    }
}

/// The result in one paragraph. Never "negative".
pub(crate) fn words(result: &StudyResult) -> String {
    let (analysed, all) = (result.n_analysed(), result.slices.len());
    let mut words = match &result.outcome {
        Outcome::Pending => "Nothing can be said yet.".to_owned(),
        Outcome::Positive if result.state == State::Complete => {
            format!("Suspected; {analysed} of {all} slices analysed.")
        }
        Outcome::Positive => {
            format!("Suspected, provisional; {analysed} of {all} slices analysed so far.")
        }
        Outcome::NotDetected => format!("Not detected on {analysed} of {all} slices."),
        Outcome::NotAnalysed { message, .. } => {
            format!("Not analysed: {message}. {analysed} of {all} slices analysed.")
        }
    };
    if result.n_not_analysed() > 0 {
        let left = result.n_not_analysed();
        words.push_str(&format!(" {left} could not be analysed."));
    }
    for remark in &result.remarks {
        words.push_str(&format!(" {remark}."));
    }
    if result.is_lossy {
        words.push_str(" Some slices came lossily compressed.");
    }
    if result.model.is_demonstration {
        words.push_str(" Demonstration model, trained on synthetic data.");
    }
    words.push_str(" Research use only, not a medical device.");
    words
}

/// A logit as percent with two decimals.
fn percent(logit: f32) -> String {
    format!("{:.2}", f64::from(sigmoid(logit)) * 100.0)
}

/// Tags that a report may carry over from the images; all others of [`crate::result::Patient`] stay behind.
pub(crate) fn is_copied(tag: Tag) -> bool {
    let Tag(group, element) = tag;
    match group {
        0x0008 => matches!(
            element,
            0x0005 | 0x0020 | 0x0030 | 0x0050 | 0x0090 | 0x0201 | 0x1030
        ),
        0x0010 => true,
        0x0020 => element == 0x0010,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::data_set::Syntax;
    use super::super::sample;
    use super::*;

    fn report_of(result: &StudyResult) -> DataSet {
        report(result, Class::Comprehensive3D, &Device::sample(), None).unwrap()
    }

    /// The code values of the items named `concept` anywhere below.
    fn coded_values(set: &DataSet, concept: Code) -> Vec<String> {
        let mut found = Vec::new();
        let name = set.sequence(tags::CONCEPT_NAME_CODE_SEQUENCE);
        if name.first().and_then(|name| name.string(tags::CODE_VALUE)) == Some(concept.value) {
            let values = set.sequence(tags::CONCEPT_CODE_SEQUENCE).iter();
            found.extend(
                values
                    .filter_map(|value| value.string(tags::CODE_VALUE))
                    .map(str::to_owned),
            );
        }
        let below = set.sequence(tags::CONTENT_SEQUENCE).iter();
        found.extend(below.flat_map(|item| coded_values(item, concept)));
        found
    }

    #[test]
    fn the_same_result_is_the_same_bytes() {
        let bytes = |result: &StudyResult| report_of(result).encode(Syntax::Explicit);
        assert_eq!(bytes(&sample::positive()), bytes(&sample::positive()));
    }

    #[test]
    fn the_words_are_whole_sentences_and_say_what_is_provisional() {
        let mut result = sample::provisional();
        result.remarks = vec!["2 slices came again".to_owned()];
        assert_eq!(
            words(&result),
            "Suspected, provisional; 4 of 4 slices analysed so far. 2 slices came again. Demonstration model, trained on synthetic data. Research use only, not a medical device."
        );
        result.state = State::Complete;
        assert!(words(&result).starts_with("Suspected; 4 of 4 slices analysed. "));
        result.outcome = Outcome::NotAnalysed {
            code: "gap".to_owned(),
            message: "a gap".to_owned(),
        };
        assert!(words(&result).starts_with("Not analysed: a gap. 4 of 4 slices analysed. "));
    }

    #[test]
    fn each_outcome_says_what_is_known_and_no_more() {
        for (text, presence, status, flag) in [
            (sample::ALL[0], Some("260373001"), "111223", "COMPLETE"),
            (sample::ALL[1], Some("260373001"), "111222", "PARTIAL"),
            (sample::ALL[2], Some("260415000"), "111222", "COMPLETE"),
            (sample::ALL[3], None, "111225", "COMPLETE"),
        ] {
            let result: StudyResult = serde_json::from_str(text).unwrap();
            let set = report_of(&result);
            let presence: Vec<_> = presence.into_iter().collect();
            assert_eq!(coded_values(&set, content::PRESENCE), presence);
            assert_eq!(coded_values(&set, content::SUMMARY), [status]);
            assert_eq!(set.string(tags::COMPLETION_FLAG), Some(flag));
            assert_eq!(set.string(tags::VERIFICATION_FLAG), Some("UNVERIFIED"));
            let words = words(&result).to_lowercase();
            assert!(words.contains("research use only") && !words.contains("negative"));
        }
    }

    #[test]
    fn nothing_is_said_while_pending_or_of_a_doubtful_identity() {
        let mut result = sample::positive();
        for outcome in [
            Outcome::Pending,
            Outcome::NotAnalysed {
                code: "identity-conflict".to_owned(),
                message: String::new(),
            },
        ] {
            result.outcome = outcome;
            let none = report(&result, Class::Comprehensive, &Device::sample(), None);
            assert_eq!(none, None);
        }
    }

    #[test]
    fn every_judged_instance_is_evidence_once() {
        let result = sample::positive();
        let evidence = |result: &StudyResult| {
            let set = report_of(result);
            let studies = set.sequence(tags::CURRENT_REQUESTED_PROCEDURE_EVIDENCE_SEQUENCE);
            let series = studies[0].sequence(tags::REFERENCED_SERIES_SEQUENCE);
            series[0].sequence(tags::REFERENCED_SOP_SEQUENCE).len()
        };
        assert_eq!(evidence(&result), 6);
        let frames: StudyResult = serde_json::from_str(sample::ALL[2]).unwrap();
        assert_eq!((evidence(&frames), frames.slices.len()), (1, 6));
    }

    #[test]
    fn patient_attributes_keep_their_bytes_and_dates_their_zone() {
        let set = report_of(&sample::positive());
        assert_eq!(
            set.value(tags::PATIENT_NAME),
            Some("M\u{fc}ller^J\u{fc}rgen".as_bytes())
        );
        assert_eq!(set.string(tags::SPECIFIC_CHARACTER_SET), Some("ISO_IR 192"));
        // 2026-11-23T10:17:00.123 in UTC; the images say +0100.
        assert_eq!(set.string(tags::CONTENT_DATE), Some("20261123"));
        assert_eq!(set.string(tags::CONTENT_TIME), Some("111700.123"));
        let set = report_of(&sample::provisional());
        assert_eq!(set.string(tags::CONTENT_TIME), Some("101700.123"));
    }

    #[test]
    fn private_elements_and_sequences_stay_behind() {
        let mut result = sample::positive();
        let before = report_of(&result);
        for (tag, vr) in [
            ((0x0009, 0x0010), "LO"),
            ((0x0010, 0x1002), "SQ"),
            ((0x0040, 0xA491), "CS"),
            ((0x0010, 0x4000), "zz"),
        ] {
            let value = b"planted".to_vec();
            let vr = vr.to_owned();
            result
                .patient
                .elements
                .push(crate::result::Element { tag, vr, value });
        }
        let mut after = report_of(&result);
        let uid = before.string(tags::SOP_INSTANCE_UID).unwrap();
        after.text(tags::SOP_INSTANCE_UID, VR::UI, uid);
        assert_eq!(after, before);
    }

    #[test]
    fn a_revision_names_the_document_that_it_replaces() {
        let device = Device::sample();
        let earlier = sample::provisional();
        let predecessor = Predecessor {
            sop_class_uid: Class::Comprehensive3D.uid().to_owned(),
            series_uid: identity::series_uid(&earlier, "SR"),
            sop_instance_uid: identity::document_uid(&earlier, Class::Comprehensive3D.uid()),
        };
        let set = report(
            &sample::positive(),
            Class::Comprehensive3D,
            &device,
            Some(&predecessor),
        );
        let set = set.unwrap();
        let item = &set.sequence(tags::PREDECESSOR_DOCUMENTS_SEQUENCE)[0];
        let series = &item.sequence(tags::REFERENCED_SERIES_SEQUENCE)[0];
        assert_eq!(
            series.string(tags::SERIES_INSTANCE_UID),
            set.string(tags::SERIES_INSTANCE_UID)
        );
        let instance = &series.sequence(tags::REFERENCED_SOP_SEQUENCE)[0];
        let named = instance.string(tags::REFERENCED_SOP_INSTANCE_UID);
        assert_eq!(named, Some(predecessor.sop_instance_uid.as_str()));
        assert_ne!(named, set.string(tags::SOP_INSTANCE_UID));
    }
}
