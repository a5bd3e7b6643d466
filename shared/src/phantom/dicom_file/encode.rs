//! Pixel Data in a transfer syntax, and the file around the data set.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use dicom_core::DicomValue;
use dicom_core::header::{DataElement, VR};
use dicom_core::smallvec::SmallVec;
use dicom_core::value::{PixelFragmentSequence, PrimitiveValue};
use dicom_dictionary_std::{tags, uids};
use dicom_encoding::adapters::EncodeOptions;
use dicom_encoding::transfer_syntax::{Codec, TransferSyntaxIndex};
use dicom_object::{FileMetaTableBuilder, InMemDicomObject};
use dicom_transfer_syntax_registry::TransferSyntaxRegistry;

use super::{DicomFileError, IMPLEMENTATION, Stored, refusal};
use crate::phantom::rle;

/// Adds Pixel Data in the transfer syntax and writes the file.
pub(super) fn finish(
    mut object: InMemDicomObject,
    frames: &[Vec<u8>],
    sop_class: &str,
    sop_uid: &str,
    transfer_syntax_uid: &str,
    stored: &Stored,
) -> Result<Vec<u8>, DicomFileError> {
    let meta = |uid: &str| {
        FileMetaTableBuilder::new()
            .media_storage_sop_class_uid(sop_class)
            .media_storage_sop_instance_uid(sop_uid)
            .transfer_syntax(uid)
            .implementation_class_uid(IMPLEMENTATION)
            .implementation_version_name("PE-EDGE-PHANTOM")
            .build()
            .map_err(|error| DicomFileError::Meta(Box::new(error)))
    };
    let columns = object
        .get(tags::COLUMNS)
        .and_then(|element| element.to_int::<u16>().ok())
        .unwrap_or(0);
    match transfer_syntax_uid {
        uids::RLE_LOSSLESS => {
            let fragments = frames
                .iter()
                .map(|frame| rle::encode(frame, usize::from(columns)))
                .collect();
            put_fragments(&mut object, fragments);
        }
        uids::JPEG_BASELINE8_BIT => {
            put_native(&mut object, frames, stored);
            let native = object.with_exact_meta(meta(uids::EXPLICIT_VR_LITTLE_ENDIAN)?);
            let codec = TransferSyntaxRegistry
                .get(transfer_syntax_uid)
                .map(|syntax| syntax.codec());
            let Some(Codec::EncapsulatedPixelData(_, Some(writer))) = codec else {
                return Err(refusal(transfer_syntax_uid));
            };
            let mut options = EncodeOptions::new();
            options.quality = Some(95);
            let mut jpeg = Vec::new();
            writer
                .encode_frame(&native, 0, options, &mut jpeg)
                .map_err(|error| DicomFileError::Encode(Box::new(error)))?;
            if jpeg.len() % 2 == 1 {
                jpeg.push(0);
            }
            object = native.into_inner();
            put_fragments(&mut object, vec![jpeg]);
        }
        _ => put_native(&mut object, frames, stored),
    }
    let mut file = Vec::new();
    object
        .with_exact_meta(meta(transfer_syntax_uid)?)
        .write_all(&mut file)
        .map_err(|error| DicomFileError::Write(Box::new(error)))?;
    Ok(file)
}

fn put_fragments(object: &mut InMemDicomObject, fragments: Vec<Vec<u8>>) {
    // Offsets count from the first fragment's item tag (PS3.5 A.4).
    let mut offset = 0_usize;
    let mut table: SmallVec<[u32; 2]> = SmallVec::new();
    for fragment in &fragments {
        table.push(u32::try_from(offset).unwrap_or(u32::MAX));
        offset += fragment.len() + 8;
    }
    let fragments: SmallVec<[Vec<u8>; 2]> = fragments.into();
    let value: DicomValue<InMemDicomObject, Vec<u8>> =
        DicomValue::PixelSequence(PixelFragmentSequence::new(table, fragments));
    object.put(DataElement::new(tags::PIXEL_DATA, VR::OB, value));
}

fn put_native(object: &mut InMemDicomObject, frames: &[Vec<u8>], stored: &Stored) {
    let bytes = frames.iter().flatten().copied();
    let (vr, value) = if stored.bits_allocated == 8 {
        (VR::OB, PrimitiveValue::U8(bytes.collect()))
    } else {
        // As words, so that the writer puts them into its byte order.
        let words = frames
            .iter()
            .flat_map(|frame| frame.chunks_exact(2))
            .map(|cell| u16::from_le_bytes([cell[0], cell[1]]));
        (VR::OW, PrimitiveValue::U16(words.collect()))
    };
    object.put(DataElement::new(tags::PIXEL_DATA, vr, value));
}
