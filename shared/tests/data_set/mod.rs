//! Synthetic CT data sets, written by dicom-rs.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test crate uses a part of this module"
)]

use dicom_core::value::{C, DataSetSequence, PixelFragmentSequence};
use dicom_core::{DataElement, PrimitiveValue, Tag, VR};
use dicom_object::InMemDicomObject;
use dicom_transfer_syntax_registry::entries;

pub const IMPLICIT_LE: &str = "1.2.840.10008.1.2";
pub const EXPLICIT_LE: &str = "1.2.840.10008.1.2.1";
pub const EXPLICIT_BE: &str = "1.2.840.10008.1.2.2";
pub const RLE: &str = "1.2.840.10008.1.2.5";
pub const JPEG_BASELINE: &str = "1.2.840.10008.1.2.4.50";
pub const SIDE: u16 = 64;

pub const PIXEL_DATA: Tag = Tag(0x7FE0, 0x0010);
pub const CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2";
pub const ENHANCED_CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2.1";

/// Stored values of the synthetic image: every row and column differs, negative ones included.
pub fn stored_values() -> Vec<i16> {
    (0..i32::from(SIDE) * i32::from(SIDE))
        .map(|index| i16::try_from((index * 37) % 4001 - 1000).unwrap())
        .collect()
}

pub fn little_endian(values: &[i16]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

pub fn text(object: &mut InMemDicomObject, tag: (u16, u16), vr: VR, value: &str) {
    let values: C<String> = value.split('\\').map(str::to_owned).collect();
    object.put(DataElement::new(
        Tag(tag.0, tag.1),
        vr,
        PrimitiveValue::Strs(values),
    ));
}

pub fn number(object: &mut InMemDicomObject, tag: (u16, u16), value: u16) {
    object.put(DataElement::new(
        Tag(tag.0, tag.1),
        VR::US,
        PrimitiveValue::from(value),
    ));
}

pub fn sequence(object: &mut InMemDicomObject, tag: (u16, u16), items: Vec<InMemDicomObject>) {
    object.put(DataElement::new(
        Tag(tag.0, tag.1),
        VR::SQ,
        DataSetSequence::from(items),
    ));
}

/// What every CT data set here has in common: all but rescale, geometry and pixels.
fn common(sop_class: &str) -> InMemDicomObject {
    let mut object = InMemDicomObject::new_empty();
    text(
        &mut object,
        (0x0008, 0x0008),
        VR::CS,
        "ORIGINAL\\PRIMARY\\AXIAL",
    );
    text(&mut object, (0x0008, 0x0016), VR::UI, sop_class);
    text(&mut object, (0x0008, 0x0018), VR::UI, "1.2.3.4.5");
    text(&mut object, (0x0008, 0x0060), VR::CS, "CT");
    text(&mut object, (0x0010, 0x0010), VR::PN, "DOE^JANE");
    text(&mut object, (0x0020, 0x000D), VR::UI, "1.2.3");
    text(&mut object, (0x0020, 0x000E), VR::UI, "1.2.3.4");
    number(&mut object, (0x0028, 0x0002), 1);
    text(&mut object, (0x0028, 0x0004), VR::CS, "MONOCHROME2");
    number(&mut object, (0x0028, 0x0010), SIDE);
    number(&mut object, (0x0028, 0x0011), SIDE);
    number(&mut object, (0x0028, 0x0100), 16);
    number(&mut object, (0x0028, 0x0101), 16);
    number(&mut object, (0x0028, 0x0102), 15);
    number(&mut object, (0x0028, 0x0103), 1);
    object
}

fn rescale(object: &mut InMemDicomObject, slope: &str, intercept: &str) {
    text(object, (0x0028, 0x1052), VR::DS, intercept);
    text(object, (0x0028, 0x1053), VR::DS, slope);
}

/// A CT image that passes the gate.
pub fn ct() -> InMemDicomObject {
    let mut object = common(CT_IMAGE);
    text(&mut object, (0x0020, 0x0032), VR::DS, "-100\\-120\\-75.5");
    text(&mut object, (0x0020, 0x0037), VR::DS, "1\\0\\0\\0\\1\\0");
    text(&mut object, (0x0028, 0x0030), VR::DS, "0.7\\0.7");
    rescale(&mut object, "1", "-1024");
    let values = stored_values()
        .iter()
        .map(|value| value.cast_unsigned())
        .collect();
    object.put(DataElement::new(
        PIXEL_DATA,
        VR::OW,
        PrimitiveValue::U16(values),
    ));
    object
}

/// An Enhanced CT of `n_frames` frames; frame i lies at z = 10 i, has the intercept -1000 - i and its values raised by i.
pub fn enhanced_ct(n_frames: u16) -> InMemDicomObject {
    let mut object = common(ENHANCED_CT_IMAGE);
    text(&mut object, (0x0008, 0x9207), VR::CS, "NONE");
    text(&mut object, (0x0028, 0x0008), VR::IS, &n_frames.to_string());
    let mut orientation = InMemDicomObject::new_empty();
    text(
        &mut orientation,
        (0x0020, 0x0037),
        VR::DS,
        "1\\0\\0\\0\\1\\0",
    );
    let mut measures = InMemDicomObject::new_empty();
    text(&mut measures, (0x0028, 0x0030), VR::DS, "0.8\\0.8");
    let mut shared = InMemDicomObject::new_empty();
    sequence(&mut shared, (0x0020, 0x9116), vec![orientation]);
    sequence(&mut shared, (0x0028, 0x9110), vec![measures]);
    sequence(&mut object, (0x5200, 0x9229), vec![shared]);
    let frames = (0..n_frames).map(functional_groups).collect();
    sequence(&mut object, (0x5200, 0x9230), frames);
    let values: C<u16> = (0..n_frames)
        .flat_map(|frame| {
            stored_values()
                .into_iter()
                .map(move |value| value.cast_unsigned().wrapping_add(frame))
        })
        .collect();
    object.put(DataElement::new(
        PIXEL_DATA,
        VR::OW,
        PrimitiveValue::U16(values),
    ));
    object
}

/// The functional groups of frame `index` of [`enhanced_ct`].
pub fn functional_groups(index: u16) -> InMemDicomObject {
    let mut position = InMemDicomObject::new_empty();
    text(
        &mut position,
        (0x0020, 0x0032),
        VR::DS,
        &format!("0\\0\\{}", 10 * index),
    );
    let mut transformation = InMemDicomObject::new_empty();
    rescale(&mut transformation, "1", &format!("-{}", 1000 + index));
    text(&mut transformation, (0x0028, 0x1054), VR::LO, "HU");
    let mut frame_type = InMemDicomObject::new_empty();
    text(
        &mut frame_type,
        (0x0008, 0x9007),
        VR::CS,
        "ORIGINAL\\PRIMARY\\VOLUME\\NONE",
    );
    text(&mut frame_type, (0x0008, 0x9207), VR::CS, "NONE");
    let mut groups = InMemDicomObject::new_empty();
    sequence(&mut groups, (0x0018, 0x9329), vec![frame_type]);
    sequence(&mut groups, (0x0020, 0x9113), vec![position]);
    sequence(&mut groups, (0x0028, 0x9145), vec![transformation]);
    groups
}

/// Replaces native pixel data by fragments.
pub fn encapsulate(object: &mut InMemDicomObject, offset_table: &[u32], fragments: &[Vec<u8>]) {
    let sequence = PixelFragmentSequence::new(
        offset_table.iter().copied().collect::<C<u32>>(),
        fragments.iter().cloned().collect::<C<Vec<u8>>>(),
    );
    object.put(DataElement::new(PIXEL_DATA, VR::OB, sequence));
}

/// One frame of 16-bit values as RLE: literal runs only.
pub fn rle_frame(values: &[u8]) -> Vec<u8> {
    let mut segments = Vec::new();
    for byte_index in [1, 0] {
        let plane: Vec<u8> = values.iter().skip(byte_index).step_by(2).copied().collect();
        let mut segment = Vec::new();
        for run in plane.chunks(128) {
            segment.push(u8::try_from(run.len() - 1).unwrap());
            segment.extend_from_slice(run);
        }
        segments.push(segment);
    }
    let first = 64;
    let second = first + u32::try_from(segments[0].len()).unwrap();
    let mut frame = vec![0; 64];
    for (word, value) in [2, first, second].into_iter().enumerate() {
        frame[4 * word..4 * word + 4].copy_from_slice(&value.to_le_bytes());
    }
    frame.extend(segments.concat());
    frame
}

/// The data set's bytes, without file meta information.
pub fn bare(object: &InMemDicomObject, transfer_syntax: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let syntax = match transfer_syntax {
        IMPLICIT_LE => entries::IMPLICIT_VR_LITTLE_ENDIAN.erased(),
        EXPLICIT_BE => entries::EXPLICIT_VR_BIG_ENDIAN.erased(),
        _ => entries::EXPLICIT_VR_LITTLE_ENDIAN.erased(),
    };
    object.write_dataset_with_ts(&mut bytes, &syntax).unwrap();
    bytes
}

/// Preamble, prefix, and a file meta information of the transfer syntax alone.
pub fn part10_header(transfer_syntax: &str) -> Vec<u8> {
    let mut bytes = vec![0; 128];
    bytes.extend(b"DICM");
    let mut uid = transfer_syntax.as_bytes().to_vec();
    if uid.len() % 2 == 1 {
        uid.push(0);
    }
    bytes.extend([0x02, 0x00, 0x10, 0x00]);
    bytes.extend(b"UI");
    bytes.extend(u16::try_from(uid.len()).unwrap().to_le_bytes());
    bytes.extend(uid);
    bytes
}

/// A whole file.
pub fn part10(object: &InMemDicomObject, transfer_syntax: &str) -> Vec<u8> {
    let mut bytes = part10_header(transfer_syntax);
    bytes.extend(bare(object, transfer_syntax));
    bytes
}

/// Values of [`jpeg_frame`]: smooth, as JPEG likes them.
pub fn jpeg_values() -> impl Iterator<Item = u8> {
    (0..SIDE).flat_map(|row| (0..SIDE).map(move |column| u8::try_from(row + 2 * column).unwrap()))
}

/// An 8-bit image as one JPEG baseline frame, coded by dicom-rs' writer.
pub fn jpeg_frame() -> Vec<u8> {
    use dicom_encoding::adapters::EncodeOptions;
    use dicom_encoding::transfer_syntax::{Codec, TransferSyntaxIndex};
    let mut object = ct();
    for (tag, value) in [
        ((0x0028, 0x0100), 8),
        ((0x0028, 0x0101), 8),
        ((0x0028, 0x0102), 7),
        ((0x0028, 0x0103), 0),
    ] {
        number(&mut object, tag, value);
    }
    let values: C<u8> = jpeg_values().collect();
    object.put(DataElement::new(
        PIXEL_DATA,
        VR::OB,
        PrimitiveValue::U8(values),
    ));
    let meta = dicom_object::FileMetaTableBuilder::new().transfer_syntax(EXPLICIT_LE);
    let file = object.with_meta(meta).unwrap();
    let syntax = dicom_transfer_syntax_registry::TransferSyntaxRegistry
        .get(JPEG_BASELINE)
        .unwrap();
    let Codec::EncapsulatedPixelData(_, Some(writer)) = syntax.codec() else {
        panic!("no JPEG writer");
    };
    let mut frame = Vec::new();
    writer
        .encode_frame(&file, 0, EncodeOptions::default(), &mut frame)
        .unwrap();
    frame
}
