//! Patient and study attributes as text for people.
//!
//! In: the elements of a result, bytes in the character set of (0008,0005). Out: text, escaped by whoever prints it. Bytes that
//! their character set does not allow become U+FFFD; control characters are left out. PS3.5 sections 6.1 and 6.2.1 govern names.

use dicom_encoding::text::{DefaultCharacterSetCodec, SpecificCharacterSet, TextCodec};

use crate::result::Patient;

/// Specific Character Set.
const CHARACTER_SET: (u16, u16) = (0x0008, 0x0005);
/// Study Date.
const STUDY_DATE: (u16, u16) = (0x0008, 0x0020);
/// Accession Number.
const ACCESSION: (u16, u16) = (0x0008, 0x0050);
/// Study Description.
const DESCRIPTION: (u16, u16) = (0x0008, 0x1030);
/// Patient's Name.
const NAME: (u16, u16) = (0x0010, 0x0010);
/// Patient ID.
const PATIENT_ID: (u16, u16) = (0x0010, 0x0020);
/// Patient's Birth Date.
const BIRTH_DATE: (u16, u16) = (0x0010, 0x0030);
/// Longest text shown, in characters.
const MAX_SHOWN: usize = 80;

/// What the page says of a patient and a study.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Person {
    /// Family name, then given names.
    pub(crate) name: String,
    /// Patient ID.
    pub(crate) patient_id: String,
    /// `1961-02-28`, or as it came.
    pub(crate) birth_date: String,
    /// Accession number.
    pub(crate) accession: String,
    /// Study description.
    pub(crate) description: String,
    /// `2026-11-23`, or as it came.
    pub(crate) study_date: String,
}

impl Person {
    /// Reads the attributes.
    pub(crate) fn new(patient: &Patient) -> Self {
        let codec = codec(patient);
        let text = |tag| text(patient, tag, &codec);
        Self {
            name: name(&text(NAME)),
            patient_id: text(PATIENT_ID),
            birth_date: date(&text(BIRTH_DATE)),
            accession: text(ACCESSION),
            description: text(DESCRIPTION),
            study_date: date(&text(STUDY_DATE)),
        }
    }
}

/// One attribute as text, empty where it is not there; at most [`MAX_SHOWN`] characters.
pub(crate) fn attribute(patient: &Patient, tag: (u16, u16)) -> String {
    text(patient, tag, &codec(patient))
}

fn value(patient: &Patient, tag: (u16, u16)) -> &[u8] {
    let found = patient.elements.iter().find(|element| element.tag == tag);
    found.map_or(&[], |element| &element.value)
}

/// The first value of Specific Character Set that names one; code extensions (ISO 2022) of the later values are read by it too.
fn codec(patient: &Patient) -> SpecificCharacterSet {
    let terms = String::from_utf8_lossy(value(patient, CHARACTER_SET));
    let named = terms
        .split('\\')
        .map(str::trim)
        .find(|term| !term.is_empty());
    named
        .and_then(SpecificCharacterSet::from_code)
        .unwrap_or(SpecificCharacterSet::ISO_IR_6)
}

fn text(patient: &Patient, tag: (u16, u16), codec: &SpecificCharacterSet) -> String {
    let bytes = value(patient, tag);
    let decoded = codec
        .decode(bytes)
        .or_else(|_| DefaultCharacterSetCodec.decode(bytes));
    let decoded = decoded.unwrap_or_else(|_| String::from_utf8_lossy(bytes).into_owned());
    let shown = decoded.chars().filter(|c| !c.is_control()).take(MAX_SHOWN);
    shown.collect::<String>().trim().to_owned()
}

/// `Doe^John^M^Dr^Jr=ideographic=phonetic` as `Doe, John M`.
fn name(value: &str) -> String {
    let group = value.split('=').find(|group| !group.trim().is_empty());
    let mut components = group.unwrap_or_default().split('^').map(str::trim);
    let family = components.next().unwrap_or_default();
    let given: Vec<&str> = components.take(2).filter(|part| !part.is_empty()).collect();
    match (family.is_empty(), given.is_empty()) {
        (_, true) => family.to_owned(),
        (true, false) => given.join(" "),
        (false, false) => format!("{family}, {}", given.join(" ")),
    }
}

/// `20261123` as `2026-11-23`.
fn date(value: &str) -> String {
    let is_date = value.len() == 8 && value.bytes().all(|byte| byte.is_ascii_digit());
    if is_date {
        format!("{}-{}-{}", &value[..4], &value[4..6], &value[6..])
    } else {
        value.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Element;

    fn person(charset: &str, name: &[u8]) -> String {
        let element = |tag, value: &[u8]| Element {
            tag,
            vr: "LO".into(),
            value: value.to_vec(),
        };
        let elements = vec![
            element(CHARACTER_SET, charset.as_bytes()),
            element(NAME, name),
        ];
        Person::new(&Patient { elements }).name
    }

    #[test]
    fn names_are_read_in_their_character_set() {
        assert_eq!(person("", b"DOE^JOHN^^^"), "DOE, JOHN");
        assert_eq!(person("ISO_IR 100", b"M\xFCller^J\xF6rg"), "Müller, Jörg");
        assert_eq!(
            person("ISO_IR 192", "Łuczak^Żaneta".as_bytes()),
            "Łuczak, Żaneta"
        );
        assert_eq!(person("ISO_IR 192", "=山田^太郎=".as_bytes()), "山田, 太郎");
        assert_eq!(person("", b"^Anna"), "Anna");
    }

    #[test]
    fn hostile_names_are_bounded_and_hold_no_control_characters() {
        let hostile = [b"\x1B[2J\0<script>".to_vec(), vec![b'x'; 4096]].concat();
        let shown = person("NO SUCH SET", &hostile);
        assert!(
            shown.chars().count() <= MAX_SHOWN && !shown.contains('\x1B'),
            "{shown}"
        );
    }

    #[test]
    fn dates_are_shown_as_iso_dates() {
        assert_eq!(date("19610228"), "1961-02-28");
        assert_eq!(date("unknown"), "unknown");
    }
}
