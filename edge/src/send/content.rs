//! Content items of a structured report (PS3.3 section C.17.3) and the codes that ours use.

use dicom_core::VR;
use dicom_dictionary_std::tags;

use super::data_set::DataSet;

/// A coded concept (PS3.3 section 8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code {
    /// Code Value.
    pub(crate) value: &'static str,
    /// Coding Scheme Designator.
    pub(crate) scheme: &'static str,
    /// Code Meaning.
    pub(crate) meaning: &'static str,
}

/// How an item belongs to the one above it (PS3.3 table C.17.3-8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Relation {
    /// CONTAINS.
    Contains,
    /// HAS OBS CONTEXT.
    Context,
    /// HAS CONCEPT MOD.
    Modifier,
    /// INFERRED FROM.
    InferredFrom,
}

/// One image, or one frame of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ImageReference<'a> {
    /// SOP Class UID.
    pub(crate) sop_class_uid: &'a str,
    /// SOP Instance UID.
    pub(crate) sop_instance_uid: &'a str,
    /// Frame, from 1.
    pub(crate) frame: Option<u32>,
}

const fn dcm(value: &'static str, meaning: &'static str) -> Code {
    let scheme = "DCM";
    Code {
        value,
        scheme,
        meaning,
    }
}

const fn sct(value: &'static str, meaning: &'static str) -> Code {
    let scheme = "SCT";
    Code {
        value,
        scheme,
        meaning,
    }
}

/// TID 1500.
pub(crate) const MEASUREMENT_REPORT: Code = dcm("126000", "Imaging Measurement Report");
/// TID 1204.
pub(crate) const LANGUAGE: Code = dcm("121049", "Language of Content Item and Descendants");
/// CID 5000.
pub(crate) const ENGLISH: Code = Code {
    value: "en-US",
    scheme: "RFC5646",
    meaning: "English (United States)",
};
/// TID 1002.
pub(crate) const OBSERVER_TYPE: Code = dcm("121005", "Observer Type");
/// CID 270.
pub(crate) const DEVICE: Code = dcm("121007", "Device");
/// TID 1004.
pub(crate) const DEVICE_UID: Code = dcm("121012", "Device Observer UID");
/// TID 1004.
pub(crate) const DEVICE_NAME: Code = dcm("121013", "Device Observer Name");
/// TID 1004.
pub(crate) const DEVICE_MANUFACTURER: Code = dcm("121014", "Device Observer Manufacturer");
/// TID 1004.
pub(crate) const DEVICE_MODEL: Code = dcm("121015", "Device Observer Model Name");
/// TID 1004.
pub(crate) const DEVICE_SERIAL: Code = dcm("121016", "Device Observer Serial Number");
/// TID 1500.
pub(crate) const PROCEDURE: Code = dcm("121058", "Procedure reported");
/// CID 100.
pub(crate) const CT: Code = Code {
    value: "25045-6",
    scheme: "LN",
    meaning: "CT unspecified body region",
};
/// TID 1500.
pub(crate) const MEASUREMENTS: Code = dcm("126010", "Imaging Measurements");
/// TID 1501.
pub(crate) const GROUP: Code = dcm("125007", "Measurement Group");
/// TID 4108.
pub(crate) const TRACKING_IDENTIFIER: Code = dcm("112039", "Tracking Identifier");
/// TID 4108.
pub(crate) const TRACKING_UID: Code = dcm("112040", "Tracking Unique Identifier");
/// TID 1501.
pub(crate) const FINDING: Code = dcm("121071", "Finding");
/// What is looked for.
pub(crate) const PULMONARY_EMBOLISM: Code = sct("59282003", "Pulmonary embolism");
/// TID 1501.
pub(crate) const FINDING_SITE: Code = sct("363698007", "Finding Site");
/// Where it is looked for.
pub(crate) const PULMONARY_ARTERY: Code = sct("81040000", "Pulmonary artery");
/// TID 4019.
pub(crate) const ALGORITHM_NAME: Code = dcm("111001", "Algorithm Name");
/// TID 4019.
pub(crate) const ALGORITHM_PARAMETERS: Code = dcm("111002", "Algorithm Parameters");
/// TID 4019.
pub(crate) const ALGORITHM_VERSION: Code = dcm("111003", "Algorithm Version");
/// The qualitative evaluation.
pub(crate) const PRESENCE: Code = sct("705057003", "Presence");
/// The score reaches the threshold.
pub(crate) const DETECTED: Code = sct("260373001", "Detected");
/// It does not. "Absent" would say more than is known.
pub(crate) const NOT_DETECTED: Code = sct("260415000", "Not detected");
/// The measurement.
pub(crate) const PROBABILITY: Code = dcm("122157", "Probability");
/// UCUM percent.
pub(crate) const PERCENT: Code = Code {
    value: "%",
    scheme: "UCUM",
    meaning: "Percent",
};
/// Purpose of an image reference (CID 7551).
pub(crate) const SOURCE: Code = dcm("121112", "Source of Measurement");
/// How far the analysis came; its values are CID 6042.
pub(crate) const SUMMARY: Code = dcm("111064", "Summary of Detections");
/// CID 6042.
pub(crate) const SUCCEEDED: Code = dcm("111222", "Succeeded");
/// CID 6042.
pub(crate) const PARTIALLY_SUCCEEDED: Code = dcm("111223", "Partially Succeeded");
/// CID 6042.
pub(crate) const FAILED: Code = dcm("111224", "Failed");
/// CID 6042.
pub(crate) const NOT_ATTEMPTED: Code = dcm("111225", "Not Attempted");
/// Words for the reader.
pub(crate) const COMMENT: Code = dcm("121106", "Comment");

/// The item of a code sequence.
pub(crate) fn coded(code: Code) -> DataSet {
    let mut item = DataSet::default();
    item.text(tags::CODE_VALUE, VR::SH, code.value)
        .text(tags::CODING_SCHEME_DESIGNATOR, VR::SH, code.scheme)
        .text(tags::CODE_MEANING, VR::LO, code.meaning);
    item
}

/// A CONTAINER of a template of PS3.16, without its relation: the root, or what [`under`] hangs somewhere.
pub(crate) fn container(concept: Code, template: Option<&str>, content: Vec<DataSet>) -> DataSet {
    let mut item = named("CONTAINER", concept);
    item.text(tags::CONTINUITY_OF_CONTENT, VR::CS, "SEPARATE")
        .items(tags::CONTENT_SEQUENCE, content);
    if let Some(template) = template {
        let mut identification = DataSet::default();
        identification
            .text(tags::MAPPING_RESOURCE, VR::CS, "DCMR")
            .text(tags::TEMPLATE_IDENTIFIER, VR::CS, template);
        item.items(tags::CONTENT_TEMPLATE_SEQUENCE, vec![identification]);
    }
    item
}

/// A CODE item.
pub(crate) fn code(relation: Relation, concept: Code, value: Code) -> DataSet {
    let mut item = named("CODE", concept);
    item.items(tags::CONCEPT_CODE_SEQUENCE, vec![coded(value)]);
    under(relation, item)
}

/// A TEXT item.
pub(crate) fn text(relation: Relation, concept: Code, value: &str) -> DataSet {
    let mut item = named("TEXT", concept);
    item.text(tags::TEXT_VALUE, VR::UT, value);
    under(relation, item)
}

/// A UIDREF item.
pub(crate) fn uid(relation: Relation, concept: Code, value: &str) -> DataSet {
    let mut item = named("UIDREF", concept);
    item.text(tags::UID, VR::UI, value);
    under(relation, item)
}

/// A NUM item, contained; `value` is a decimal string of at most 16 characters.
pub(crate) fn number(concept: Code, value: &str, unit: Code, content: Vec<DataSet>) -> DataSet {
    let mut measured = DataSet::default();
    measured
        .text(tags::NUMERIC_VALUE, VR::DS, value)
        .items(tags::MEASUREMENT_UNITS_CODE_SEQUENCE, vec![coded(unit)]);
    let mut item = named("NUM", concept);
    item.items(tags::MEASURED_VALUE_SEQUENCE, vec![measured]);
    if !content.is_empty() {
        item.items(tags::CONTENT_SEQUENCE, content);
    }
    under(Relation::Contains, item)
}

/// An IMAGE item with its purpose.
pub(crate) fn image(relation: Relation, purpose: Code, image: &ImageReference<'_>) -> DataSet {
    let mut reference = reference(image.sop_class_uid, image.sop_instance_uid);
    if let Some(frame) = image.frame {
        reference.text(tags::REFERENCED_FRAME_NUMBER, VR::IS, &frame.to_string());
    }
    let mut item = named("IMAGE", purpose);
    item.items(tags::REFERENCED_SOP_SEQUENCE, vec![reference]);
    under(relation, item)
}

/// The item of a sequence that refers to an instance.
pub(crate) fn reference(sop_class_uid: &str, sop_instance_uid: &str) -> DataSet {
    let mut item = DataSet::default();
    item.text(tags::REFERENCED_SOP_CLASS_UID, VR::UI, sop_class_uid)
        .text(tags::REFERENCED_SOP_INSTANCE_UID, VR::UI, sop_instance_uid);
    item
}

/// Gives an item its relation to the one above.
pub(crate) fn under(relation: Relation, mut item: DataSet) -> DataSet {
    let relation = match relation {
        Relation::Contains => "CONTAINS",
        Relation::Context => "HAS OBS CONTEXT",
        Relation::Modifier => "HAS CONCEPT MOD",
        Relation::InferredFrom => "INFERRED FROM",
    };
    item.text(tags::RELATIONSHIP_TYPE, VR::CS, relation);
    item
}

fn named(value_type: &str, concept: Code) -> DataSet {
    let mut item = DataSet::default();
    item.text(tags::VALUE_TYPE, VR::CS, value_type)
        .items(tags::CONCEPT_NAME_CODE_SEQUENCE, vec![coded(concept)]);
    item
}
