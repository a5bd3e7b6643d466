//! Whose study it is: whether the objects of a study name one patient.
//!
//! In: the copied elements of every object. Out: whether two of them contradict each other in Patient ID, its issuer, the name, the birth
//! date or the accession number. A study in which they do is held: nothing of it is sent (a result in the wrong folder is worse
//! than none). An attribute that is absent or empty contradicts nothing: dose reports and captures often lack some. Names are compared
//! without trailing separators, and across character sets only where both are plain ASCII; values are compared as bytes.

use crate::result::Element;

const CHARACTER_SET: (u16, u16) = (0x0008, 0x0005);
const MANUFACTURER: (u16, u16) = (0x0008, 0x0070);

/// What must not differ, with its name for the message.
const COMPARED: [((u16, u16), &str); 5] = [
    ((0x0010, 0x0020), "Patient ID"),
    ((0x0010, 0x0021), "Issuer of Patient ID"),
    ((0x0010, 0x0010), "Patient's Name"),
    ((0x0010, 0x0030), "Patient's Birth Date"),
    ((0x0008, 0x0050), "Accession Number"),
];

/// The name of the first attribute in which two of `identities` contradict each other.
pub(super) fn conflict<'a>(
    identities: &(impl Iterator<Item = &'a [Element]> + Clone),
) -> Option<&'static str> {
    COMPARED.iter().find_map(|&(tag, name)| {
        let mut first: Option<&[Element]> = None;
        let differs = identities.clone().any(|elements| {
            if value(elements, tag).is_empty() {
                return false;
            }
            match first {
                Some(first) => !agree(first, elements, tag),
                None => {
                    first = Some(elements);
                    false
                }
            }
        });
        differs.then_some(name)
    })
}

/// Whether the object was made by the phantom.
pub(super) fn is_phantom(elements: &[Element]) -> bool {
    std::str::from_utf8(value(elements, MANUFACTURER)).is_ok_and(shared::phantom::is_phantom)
}

fn agree(a: &[Element], b: &[Element], tag: (u16, u16)) -> bool {
    let (left, right) = (value(a, tag), value(b, tag));
    let is_comparable =
        value(a, CHARACTER_SET) == value(b, CHARACTER_SET) || (left.is_ascii() && right.is_ascii());
    !is_comparable || left == right
}

/// The value without what does not count; empty where absent.
fn value(elements: &[Element], tag: (u16, u16)) -> &[u8] {
    let found = elements.iter().find(|element| element.tag == tag);
    let mut value = found.map_or(&[][..], |element| element.value.as_slice());
    while let [rest @ .., b' ' | b'^' | b'=' | 0] = value {
        value = rest;
    }
    while let [b' ', rest @ ..] = value {
        value = rest;
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(values: &[((u16, u16), &str)]) -> Vec<Element> {
        let element = |&(tag, value): &((u16, u16), &str)| Element {
            tag,
            vr: "LO".into(),
            value: value.as_bytes().to_vec(),
        };
        values.iter().map(element).collect()
    }

    #[track_caller]
    fn check(identities: &[Vec<Element>], expected: Option<&str>) {
        assert_eq!(conflict(&identities.iter().map(Vec::as_slice)), expected);
    }

    const ID: (u16, u16) = (0x0010, 0x0020);
    const NAME: (u16, u16) = (0x0010, 0x0010);

    #[test]
    fn two_patients_in_one_study_are_a_conflict() {
        for (tag, name) in COMPARED {
            let identities = [elements(&[(tag, "A")]), elements(&[(tag, "B")])];
            check(&identities, Some(name));
        }
    }

    #[test]
    fn padding_separators_and_absence_are_none() {
        let identities = [
            elements(&[(ID, "7"), (NAME, "DOE^JANE")]),
            elements(&[(ID, "7 "), (NAME, "DOE^JANE^^")]),
            elements(&[]),
            elements(&[(ID, ""), (NAME, "DOE^JANE")]),
        ];
        check(&identities, None);
        check(&[], None);
    }

    #[test]
    fn names_in_other_character_sets_are_not_compared() {
        let latin = elements(&[(CHARACTER_SET, "ISO_IR 100"), (NAME, "M\u{fc}ller")]);
        let utf8 = elements(&[(CHARACTER_SET, "ISO_IR 192"), (NAME, "Mu\u{308}ller")]);
        check(&[latin, utf8], None);
        let plain = elements(&[(CHARACTER_SET, "ISO_IR 100"), (NAME, "MEIER")]);
        let other = elements(&[(CHARACTER_SET, "ISO_IR 192"), (NAME, "MAIER")]);
        check(&[plain, other], Some("Patient's Name"));
    }
}
