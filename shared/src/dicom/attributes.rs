//! Attributes: the values of the elements that the gate asks for.
//!
//! In: element positions from [`super::prescan`]. Out: text and numbers. Before dicom-rs sees them, the elements are written anew
//! as a small flat data set: known tags only, the VR of PS3.6, values of at most
//! [`MAX_VALUE_BYTES`](super::prescan::MAX_VALUE_BYTES), printable ASCII where they are text, no sequence, no undefined length. So
//! no nesting, no claimed length and no private or patient element of the file reaches it, and a VR that was written wrongly
//! (UN, or US for SS) makes no difference. What the values must be is left to [`super::gate`].

use super::ReadError;
use super::prescan::Element;
use super::source::Data;
use super::transfer_syntax::Encoding;
use dicom_core::{Tag, VR};
use dicom_object::InMemDicomObject;
use dicom_transfer_syntax_registry::entries;

pub(super) const IMAGE_TYPE: Tag = Tag(0x0008, 0x0008);
pub(super) const SOP_CLASS_UID: Tag = Tag(0x0008, 0x0016);
pub(super) const SOP_INSTANCE_UID: Tag = Tag(0x0008, 0x0018);
pub(super) const MODALITY: Tag = Tag(0x0008, 0x0060);
pub(super) const FRAME_TYPE: Tag = Tag(0x0008, 0x9007);
pub(super) const PIXEL_PRESENTATION: Tag = Tag(0x0008, 0x9205);
pub(super) const VOLUME_BASED_CALCULATION: Tag = Tag(0x0008, 0x9207);
pub(super) const BODY_PART_EXAMINED: Tag = Tag(0x0018, 0x0015);
pub(super) const SLICE_THICKNESS: Tag = Tag(0x0018, 0x0050);
pub(super) const GANTRY_TILT: Tag = Tag(0x0018, 0x1120);
pub(super) const CONVOLUTION_KERNEL: Tag = Tag(0x0018, 0x1210);
pub(super) const STUDY_INSTANCE_UID: Tag = Tag(0x0020, 0x000D);
pub(super) const SERIES_INSTANCE_UID: Tag = Tag(0x0020, 0x000E);
pub(super) const ACQUISITION_NUMBER: Tag = Tag(0x0020, 0x0012);
pub(super) const INSTANCE_NUMBER: Tag = Tag(0x0020, 0x0013);
pub(super) const IMAGE_POSITION: Tag = Tag(0x0020, 0x0032);
pub(super) const IMAGE_ORIENTATION: Tag = Tag(0x0020, 0x0037);
pub(super) const SAMPLES_PER_PIXEL: Tag = Tag(0x0028, 0x0002);
pub(super) const PHOTOMETRIC_INTERPRETATION: Tag = Tag(0x0028, 0x0004);
pub(super) const NUMBER_OF_FRAMES: Tag = Tag(0x0028, 0x0008);
pub(super) const ROWS: Tag = Tag(0x0028, 0x0010);
pub(super) const COLUMNS: Tag = Tag(0x0028, 0x0011);
pub(super) const PIXEL_SPACING: Tag = Tag(0x0028, 0x0030);
pub(super) const BITS_ALLOCATED: Tag = Tag(0x0028, 0x0100);
pub(super) const BITS_STORED: Tag = Tag(0x0028, 0x0101);
pub(super) const HIGH_BIT: Tag = Tag(0x0028, 0x0102);
pub(super) const PIXEL_REPRESENTATION: Tag = Tag(0x0028, 0x0103);
pub(super) const PIXEL_PADDING_VALUE: Tag = Tag(0x0028, 0x0120);
pub(super) const PIXEL_PADDING_RANGE_LIMIT: Tag = Tag(0x0028, 0x0121);
pub(super) const RESCALE_INTERCEPT: Tag = Tag(0x0028, 0x1052);
pub(super) const RESCALE_SLOPE: Tag = Tag(0x0028, 0x1053);
pub(super) const RESCALE_TYPE: Tag = Tag(0x0028, 0x1054);
pub(super) const LOSSY_IMAGE_COMPRESSION: Tag = Tag(0x0028, 0x2110);

/// The elements that are read, with their VRs (PS3.6). Padding is "US or SS": its bits are read, the gate gives them a sign.
const WANTED: [(Tag, VR); 33] = [
    (IMAGE_TYPE, VR::CS),
    (SOP_CLASS_UID, VR::UI),
    (SOP_INSTANCE_UID, VR::UI),
    (MODALITY, VR::CS),
    (FRAME_TYPE, VR::CS),
    (PIXEL_PRESENTATION, VR::CS),
    (VOLUME_BASED_CALCULATION, VR::CS),
    (BODY_PART_EXAMINED, VR::CS),
    (SLICE_THICKNESS, VR::DS),
    (GANTRY_TILT, VR::DS),
    (CONVOLUTION_KERNEL, VR::SH),
    (STUDY_INSTANCE_UID, VR::UI),
    (SERIES_INSTANCE_UID, VR::UI),
    (ACQUISITION_NUMBER, VR::IS),
    (INSTANCE_NUMBER, VR::IS),
    (IMAGE_POSITION, VR::DS),
    (IMAGE_ORIENTATION, VR::DS),
    (SAMPLES_PER_PIXEL, VR::US),
    (PHOTOMETRIC_INTERPRETATION, VR::CS),
    (NUMBER_OF_FRAMES, VR::IS),
    (ROWS, VR::US),
    (COLUMNS, VR::US),
    (PIXEL_SPACING, VR::DS),
    (BITS_ALLOCATED, VR::US),
    (BITS_STORED, VR::US),
    (HIGH_BIT, VR::US),
    (PIXEL_REPRESENTATION, VR::US),
    (PIXEL_PADDING_VALUE, VR::US),
    (PIXEL_PADDING_RANGE_LIMIT, VR::US),
    (RESCALE_INTERCEPT, VR::DS),
    (RESCALE_SLOPE, VR::DS),
    (RESCALE_TYPE, VR::LO),
    (LOSSY_IMAGE_COMPRESSION, VR::CS),
];

/// Whether an element of the data set itself is read.
pub(super) fn is_wanted(tag: Tag) -> bool {
    vr_of(tag).is_some()
}

fn vr_of(tag: Tag) -> Option<VR> {
    WANTED
        .iter()
        .find(|(wanted, _)| *wanted == tag)
        .map(|&(_, vr)| vr)
}

/// The values of one frame's (or one whole object's) elements.
#[derive(Debug)]
pub(super) struct Attributes {
    object: InMemDicomObject,
}

impl Attributes {
    /// Reads the values of `elements`, which lie in `data`; a later element replaces an earlier one of the same tag.
    ///
    /// # Errors
    ///
    /// [`ReadError::ValueLength`] where a binary number has another length than 2 bytes; [`ReadError::DataSet`] where dicom-rs
    /// refuses the small data set.
    pub(super) fn read<'e>(
        data: &Data<'_>,
        encoding: Encoding,
        elements: impl Iterator<Item = &'e Element>,
    ) -> Result<Self, ReadError> {
        let mut data_set = Vec::new();
        for element in elements {
            let Some(vr) = vr_of(element.tag) else {
                continue;
            };
            let value = data.get(element.value.clone()).unwrap_or_default();
            write(&mut data_set, element.tag, vr, &value, encoding)?;
        }
        let syntax = entries::EXPLICIT_VR_LITTLE_ENDIAN.erased();
        let object = InMemDicomObject::read_dataset_with_ts(&data_set[..], &syntax)
            .map_err(|source| ReadError::DataSet(Box::new(source)))?;
        Ok(Self { object })
    }

    /// The value as text, all values with backslashes between them; `None` where absent or empty.
    pub(super) fn text(&self, tag: Tag) -> Option<String> {
        let text = self.object.element(tag).ok()?.to_str().ok()?;
        let text = text.trim_matches([' ', '\0']);
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// The single values of a multi-valued text, each without surrounding spaces.
    pub(super) fn texts(&self, tag: Tag) -> Vec<String> {
        self.text(tag).map_or_else(Vec::new, |text| {
            text.split('\\')
                .map(|value| value.trim().to_owned())
                .collect()
        })
    }

    /// The 16 bits of a binary number. (dicom-rs turns padding values of signed images into negative numbers.)
    pub(super) fn u16(&self, tag: Tag) -> Option<u16> {
        let number: i32 = self.object.element(tag).ok()?.to_int().ok()?;
        let [low, high, ..] = number.to_le_bytes();
        Some(u16::from_le_bytes([low, high]))
    }

    /// `N` decimal numbers.
    ///
    /// # Errors
    ///
    /// The text, where it is not exactly `N` finite numbers.
    pub(super) fn numbers<const N: usize>(&self, tag: Tag) -> Result<Option<[f64; N]>, String> {
        let Some(text) = self.text(tag) else {
            return Ok(None);
        };
        let numbers: Option<Vec<f64>> = text
            .split('\\')
            .map(|value| {
                value
                    .trim()
                    .parse()
                    .ok()
                    .filter(|number: &f64| number.is_finite())
            })
            .collect();
        match numbers.and_then(|numbers| numbers.try_into().ok()) {
            Some(numbers) => Ok(Some(numbers)),
            None => Err(text),
        }
    }

    /// One decimal number.
    ///
    /// # Errors
    ///
    /// As [`Self::numbers`].
    pub(super) fn number(&self, tag: Tag) -> Result<Option<f64>, String> {
        Ok(self.numbers::<1>(tag)?.map(|[number]| number))
    }

    /// An integer string within `i32`, `None` where absent or malformed: for advisory values only.
    pub(super) fn integer(&self, tag: Tag) -> Option<i32> {
        self.text(tag)?.parse().ok()
    }
}

/// Appends one element in Explicit VR Little Endian.
fn write(
    data_set: &mut Vec<u8>,
    tag: Tag,
    vr: VR,
    value: &[u8],
    encoding: Encoding,
) -> Result<(), ReadError> {
    let mut clean = Vec::with_capacity(value.len() + 1);
    if vr == VR::US {
        match *value {
            [] => {}
            [b0, b1] => clean.extend(encoding.u16([b0, b1]).to_le_bytes()),
            _ => {
                return Err(ReadError::ValueLength {
                    tag,
                    found: value.len(),
                    allowed: 2,
                });
            }
        }
    } else {
        clean.extend(value.iter().map(|&byte| match byte {
            b' '..=b'~' => byte,
            0 => b' ',
            _ => b'?',
        }));
        if clean.len() % 2 == 1 {
            clean.push(b' ');
        }
    }
    let length = u16::try_from(clean.len()).map_err(|_| ReadError::ValueLength {
        tag,
        found: value.len(),
        allowed: super::prescan::MAX_VALUE_BYTES,
    })?;
    data_set.extend(tag.0.to_le_bytes());
    data_set.extend(tag.1.to_le_bytes());
    data_set.extend(vr.to_bytes());
    data_set.extend(length.to_le_bytes());
    data_set.extend(clean);
    Ok(())
}
