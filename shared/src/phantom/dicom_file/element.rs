//! Elements and items of a data set.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use dicom_core::header::{DataElement, Length, Tag, VR};
use dicom_core::value::{DataSetSequence, PrimitiveValue};
use dicom_object::InMemDicomObject;

pub(super) fn text(object: &mut InMemDicomObject, tag: Tag, vr: VR, value: &str) {
    object.put(DataElement::new(tag, vr, value));
}

pub(super) fn short(object: &mut InMemDicomObject, tag: Tag, value: u16) {
    object.put(DataElement::new(tag, VR::US, PrimitiveValue::from(value)));
}

pub(super) fn double(object: &mut InMemDicomObject, tag: Tag, value: f64) {
    object.put(DataElement::new(tag, VR::FD, PrimitiveValue::from(value)));
}

pub(super) fn sequence(object: &mut InMemDicomObject, tag: Tag, items: Vec<InMemDicomObject>) {
    object.put(DataElement::new(
        tag,
        VR::SQ,
        DataSetSequence::new(items, Length::UNDEFINED),
    ));
}

/// An item built by `fill`.
pub(super) fn item(fill: impl FnOnce(&mut InMemDicomObject)) -> InMemDicomObject {
    let mut object = InMemDicomObject::new_empty();
    fill(&mut object);
    object
}

/// A decimal string of at most 16 characters.
pub(super) fn decimal(value: f64) -> String {
    let written = format!("{value:.6}");
    let written = written.trim_end_matches('0').trim_end_matches('.');
    if written == "-0" {
        "0".to_string()
    } else {
        written.to_string()
    }
}

pub(super) fn decimals(values: &[f64]) -> String {
    values
        .iter()
        .map(|&value| decimal(value))
        .collect::<Vec<_>>()
        .join("\\")
}
