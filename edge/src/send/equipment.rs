//! What every object that this node makes says of the patient, of the study and of itself.
//!
//! Patient, General Study, Patient Study (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2) are copied as they came; General and Enhanced General Equipment (C.7.5.1,
//! C.7.5.2) and SOP Common (C.12.1) are ours.

use dicom_core::{Tag, VR};
use dicom_dictionary_std::tags;
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::{Offset, TimeZone};
use shared::uid::Uid;

use super::data_set::DataSet;
use super::structured_report::is_copied;
use crate::result::{Element, StudyResult};

/// Manufacturer (0008,0070).
pub(crate) const MANUFACTURER: &str = "PE-Edge";
/// Manufacturer's Model Name (0008,1090).
pub(crate) const MODEL_NAME: &str = "PE-Edge research node";
/// Longest copied value; the longest of a text VR in these modules has 10,240 characters.
const MAX_COPIED_BYTES: usize = 40 << 10;

/// This node, as its documents name it.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    /// Device UID, made once for an installation.
    pub(crate) uid: Uid,
    /// Device Serial Number.
    pub(crate) serial: String,
    /// Station name: the AE title.
    pub(crate) station: String,
    /// The time zone that dates are written in where the images name none.
    pub(crate) time_zone: TimeZone,
}

#[cfg(test)]
impl Device {
    /// A node for tests.
    pub(crate) fn sample() -> Self {
        Self {
            uid: Uid::new("2.25.1").unwrap(),
            serial: "1".to_owned(),
            station: "PEEDGE".to_owned(),
            time_zone: TimeZone::UTC,
        }
    }
}

/// Copies patient and study attributes; what must be there and is not known is there and empty (type 2).
pub(crate) fn copy_patient(set: &mut DataSet, result: &StudyResult) {
    for element in &result.patient.elements {
        let tag = Tag(element.tag.0, element.tag.1);
        if let Some(vr) = copied_vr(tag, element) {
            set.bytes(tag, vr, element.value.clone());
        }
    }
    for (tag, vr) in [
        (tags::PATIENT_NAME, VR::PN),
        (tags::PATIENT_ID, VR::LO),
        (tags::PATIENT_BIRTH_DATE, VR::DA),
        (tags::PATIENT_SEX, VR::CS),
        (tags::STUDY_DATE, VR::DA),
        (tags::STUDY_TIME, VR::TM),
        (tags::STUDY_ID, VR::SH),
        (tags::ACCESSION_NUMBER, VR::SH),
        (tags::REFERRING_PHYSICIAN_NAME, VR::PN),
    ] {
        set.or_empty(tag, vr);
    }
    set.text(tags::STUDY_INSTANCE_UID, VR::UI, result.study_uid.as_str());
}

/// Equipment and time of making.
pub(crate) fn describe(set: &mut DataSet, result: &StudyResult, device: &Device) {
    let made = decided(result, device);
    let date = made.strftime("%Y%m%d").to_string();
    let time = made.strftime("%H%M%S%.3f").to_string();
    set.text(tags::MANUFACTURER, VR::LO, MANUFACTURER)
        .text(tags::MANUFACTURER_MODEL_NAME, VR::LO, MODEL_NAME)
        .text(tags::DEVICE_SERIAL_NUMBER, VR::LO, &device.serial)
        .text(tags::STATION_NAME, VR::SH, &device.station)
        .text(tags::SOFTWARE_VERSIONS, VR::LO, &versions(result))
        .text(tags::INSTANCE_CREATION_DATE, VR::DA, &date)
        .text(tags::INSTANCE_CREATION_TIME, VR::TM, &time)
        .text(tags::CONTENT_DATE, VR::DA, &date)
        .text(tags::CONTENT_TIME, VR::TM, &time);
}

/// When the result was decided, in the images' time zone where they name it: (0008,0201) holds for every date of an object.
pub(crate) fn decided(result: &StudyResult, device: &Device) -> DateTime {
    let at = Timestamp::from_millisecond(result.decided_ms).unwrap_or(Timestamp::UNIX_EPOCH);
    let elements = &result.patient.elements;
    let named = elements
        .iter()
        .find(|element| element.tag == (0x0008, 0x0201));
    match named.and_then(|element| offset(&element.value)) {
        Some(offset) => offset.to_datetime(at),
        None => device.time_zone.to_datetime(at),
    }
}

/// Timezone Offset From UTC: `&ZZXX`.
fn offset(value: &[u8]) -> Option<Offset> {
    let text = std::str::from_utf8(value).ok()?.trim();
    let (sign, digits) = match text.split_at_checked(1)? {
        ("+", digits) => (1, digits),
        ("-", digits) => (-1, digits),
        _ => return None,
    };
    if digits.len() != 4 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let digits: i32 = digits.parse().ok()?;
    Offset::from_seconds(sign * (digits / 100 * 3600 + digits % 100 * 60)).ok()
}

/// Two values: the program's version and the model's digest.
fn versions(result: &StudyResult) -> String {
    let digest = &result.model.digest;
    let digest = digest.get(..32).unwrap_or(digest);
    format!("{}\\{digest}", env!("CARGO_PKG_VERSION"))
}

/// The value representation of an element that may be copied: not a sequence, not private, not too long.
fn copied_vr(tag: Tag, element: &Element) -> Option<VR> {
    let vr = <[u8; 2]>::try_from(element.vr.as_bytes()).ok()?;
    let vr = VR::from_binary(vr).filter(|vr| *vr != VR::SQ)?;
    (is_copied(tag) && element.value.len() <= MAX_COPIED_BYTES).then_some(vr)
}
