//! Elements that are copied as they came: whose study it is and what made it.
//!
//! In: element positions from [`super::prescan`]. Out: tag, VR of PS3.6 and the value's bytes without padding, in the character set that
//! (0008,0005) names; nothing is decoded or interpreted. They go into results and nowhere else. Longer values than the pre-scan
//! keeps are left out, not cut: half a name is worse than none.

use super::prescan::Element;
use super::source::Data;
use dicom_core::Tag;

/// An element of the Patient, General Study, Patient Study, General Series or General Equipment module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedElement {
    /// Group and element.
    pub tag: (u16, u16),
    /// Value representation by PS3.6, two letters.
    pub vr: &'static str,
    /// The value without trailing padding.
    pub value: Vec<u8>,
}

/// What is copied. All are text, so that byte order does not matter.
const COPIED: [(Tag, &str); 31] = [
    // SOP Common (PS3.3 C.12.1).
    (Tag(0x0008, 0x0005), "CS"),
    (Tag(0x0008, 0x0201), "SH"),
    // General Study (C.7.2.1) and Patient Study (C.7.2.2).
    (Tag(0x0008, 0x0020), "DA"),
    (Tag(0x0008, 0x0030), "TM"),
    (Tag(0x0008, 0x0050), "SH"),
    (Tag(0x0008, 0x0090), "PN"),
    (Tag(0x0008, 0x1030), "LO"),
    (Tag(0x0008, 0x1080), "LO"),
    (Tag(0x0010, 0x1010), "AS"),
    (Tag(0x0010, 0x1020), "DS"),
    (Tag(0x0010, 0x1030), "DS"),
    (Tag(0x0010, 0x2180), "SH"),
    (Tag(0x0020, 0x0010), "SH"),
    (Tag(0x0038, 0x0010), "LO"),
    // Patient (C.7.1.1).
    (Tag(0x0010, 0x0010), "PN"),
    (Tag(0x0010, 0x0020), "LO"),
    (Tag(0x0010, 0x0021), "LO"),
    (Tag(0x0010, 0x0030), "DA"),
    (Tag(0x0010, 0x0032), "TM"),
    (Tag(0x0010, 0x0040), "CS"),
    (Tag(0x0010, 0x1001), "PN"),
    (Tag(0x0010, 0x2160), "SH"),
    (Tag(0x0012, 0x0062), "CS"),
    // General Series (C.7.3.1), General Equipment (C.7.5.1) and Frame of Reference (C.7.4.1).
    (Tag(0x0008, 0x0070), "LO"),
    (Tag(0x0008, 0x0080), "LO"),
    (Tag(0x0008, 0x103E), "LO"),
    (Tag(0x0008, 0x1010), "SH"),
    (Tag(0x0008, 0x1090), "LO"),
    (Tag(0x0018, 0x1030), "LO"),
    (Tag(0x0020, 0x0011), "IS"),
    (Tag(0x0020, 0x0052), "UI"),
];

fn vr_of(tag: Tag) -> Option<&'static str> {
    let found = COPIED.iter().find(|(copied, _)| *copied == tag);
    found.map(|&(_, vr)| vr)
}

/// Whether the element is copied.
pub(super) fn is_copied(tag: Tag) -> bool {
    vr_of(tag).is_some()
}

/// The elements' values.
pub(super) fn copy(data: &Data<'_>, elements: &[Element]) -> Vec<CopiedElement> {
    let copied = elements.iter().filter_map(|element| {
        let value = data.get(element.value.clone())?;
        let is_padding = |byte: &u8| matches!(byte, b' ' | 0);
        let n_padding = value
            .iter()
            .rev()
            .take_while(|byte| is_padding(byte))
            .count();
        Some(CopiedElement {
            tag: (element.tag.0, element.tag.1),
            vr: vr_of(element.tag)?,
            value: value[..value.len() - n_padding].to_vec(),
        })
    });
    copied.filter(|element| !element.value.is_empty()).collect()
}
