//! Pixels: one frame's stored values as little-endian bytes, whatever the transfer syntax.
//!
//! In: the data set's bytes, where its pixel data lies, the frame's size and format from [`super::gate`]. Out: rows x columns
//! samples in native layout. One frame at a time; a frame is at most [`MAX_FRAME_BYTES`]. PS3.5 sections 8 and A.4. HU are left
//! to the rest of the crate.
//!
//! RLE and lossy JPEG are decoded in this crate; lossless JPEG, JPEG-LS and JPEG 2000 go through dicom-rs after `codestream` has
//! compared their headers with the data set. A decoder that panics is caught in `guarded`, the one such place, and becomes a
//! refusal.

use super::Refusal;
use super::codestream;
use super::jpeg_dct;
use super::prescan::PixelData;
use super::rle;
use super::source::Data;
use super::transfer_syntax::{Encoding, PixelCoding, TransferSyntax};
use crate::stored::PixelFormat;
use dicom_core::value::C;
use dicom_encoding::adapters::{PixelDataObject, RawPixelData};
use dicom_encoding::transfer_syntax::{Codec, TransferSyntaxIndex};
use dicom_transfer_syntax_registry::TransferSyntaxRegistry;
use std::borrow::Cow;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Most bytes of one decoded frame.
pub const MAX_FRAME_BYTES: usize = 64 << 20;
/// Most pixels of one compressed frame: decoders need up to 16 bytes a pixel beside the result.
pub const MAX_COMPRESSED_PIXELS: usize = 2_048 * 2_048;

/// A frame to decode.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame<'a> {
    /// The data set's bytes.
    pub(super) data: &'a Data<'a>,
    /// Where its pixel data lies.
    pub(super) pixel_data: &'a PixelData,
    /// Which frame, from 0.
    pub(super) frame_index: usize,
    /// Where the object's frames lie among its fragments.
    pub(super) frames: &'a FrameFragments,
    /// Rows.
    pub(super) rows: u16,
    /// Columns.
    pub(super) columns: u16,
    /// Format of a stored value.
    pub(super) format: PixelFormat,
}

impl Frame<'_> {
    fn n_pixels(&self) -> usize {
        usize::from(self.rows) * usize::from(self.columns)
    }

    fn sample_bytes(&self) -> usize {
        usize::from(self.format.bits_allocated / 8)
    }

    fn n_bytes(&self) -> usize {
        self.n_pixels() * self.sample_bytes()
    }
}

/// Decodes `frame`.
///
/// # Errors
///
/// [`Refusal::TransferSyntax`] where this build does not read the syntax; [`Refusal::PixelBytes`], [`Refusal::FrameBounds`],
/// [`Refusal::Codestream`] and [`Refusal::Decoder`] where the bytes are not such a frame.
pub(super) fn decode(frame: &Frame<'_>, syntax: &TransferSyntax) -> Result<Vec<u8>, Refusal> {
    if let (Some(feature), false) = (syntax.feature, syntax.is_built_in()) {
        return Err(Refusal::TransferSyntax {
            name: syntax.name,
            feature,
        });
    }
    if frame.n_bytes() > MAX_FRAME_BYTES {
        return Err(Refusal::FrameSize {
            found: frame.n_bytes(),
            allowed: MAX_FRAME_BYTES,
        });
    }
    match (frame.pixel_data, syntax.coding) {
        (PixelData::Native { value, is_word }, PixelCoding::Native) => {
            native(frame, value.clone(), *is_word, syntax.encoding)
        }
        (PixelData::Encapsulated { fragments, .. }, coding) if coding != PixelCoding::Native => {
            let fragments = frame.frames.of(frame.frame_index, fragments)?;
            encapsulated(frame, &joined(frame.data, fragments), coding, syntax)
        }
        (PixelData::Native { .. }, _) => Err(Refusal::Encapsulation {
            found: "native pixel data",
            allowed: "fragments",
        }),
        (PixelData::Encapsulated { .. }, _) => Err(Refusal::Encapsulation {
            found: "fragments",
            allowed: "native pixel data",
        }),
    }
}

/// One frame out of native pixel data, turned to little endian.
fn native(
    frame: &Frame<'_>,
    value: Range<usize>,
    is_word: bool,
    encoding: Encoding,
) -> Result<Vec<u8>, Refusal> {
    let start = frame.n_bytes().saturating_mul(frame.frame_index);
    let end = start.saturating_add(frame.n_bytes());
    let too_short = Refusal::PixelBytes {
        found: value.len(),
        needed: end,
    };
    if end > value.len() {
        return Err(too_short);
    }
    let values = frame.data.get(value.start + start..value.start + end);
    let mut values = values.ok_or(too_short)?.into_owned();
    if encoding == Encoding::ExplicitBig {
        // OW holds 8-bit samples two to a word (PS3.5 section 8.1.1).
        let width = match frame.sample_bytes() {
            1 if is_word => 2,
            width => width,
        };
        for value in values.chunks_exact_mut(width) {
            value.reverse();
        }
    }
    Ok(values)
}

/// One frame out of a codestream.
fn encapsulated(
    frame: &Frame<'_>,
    codestream: &[u8],
    coding: PixelCoding,
    syntax: &TransferSyntax,
) -> Result<Vec<u8>, Refusal> {
    if frame.n_pixels() > MAX_COMPRESSED_PIXELS {
        return Err(Refusal::FrameSize {
            found: frame.n_pixels(),
            allowed: MAX_COMPRESSED_PIXELS,
        });
    }
    let header = match coding {
        PixelCoding::Native | PixelCoding::EncapsulatedNative => {
            let found = codestream.len();
            return match codestream.get(..frame.n_bytes()) {
                Some(values) => Ok(values.to_vec()),
                None => Err(Refusal::PixelBytes {
                    found,
                    needed: frame.n_bytes(),
                }),
            };
        }
        PixelCoding::Rle => {
            return rle::decode(codestream, frame.n_pixels(), frame.sample_bytes())
                .map_err(|found| Refusal::Codestream { found });
        }
        PixelCoding::Jpeg | PixelCoding::JpegLs => codestream::jpeg(codestream),
        PixelCoding::Jpeg2000 => codestream::jpeg2000(codestream),
    }
    .map_err(|found| Refusal::Codestream { found })?;
    check_header(frame, &header, coding)?;
    if matches!((coding, header.marker), (PixelCoding::Jpeg, 0xC0 | 0xC1)) {
        let values = jpeg_dct::decode(codestream, frame.rows, frame.columns)
            .map_err(|found| Refusal::Codestream { found })?;
        return resized(frame, &values, 2);
    }
    let coded = CodedFrame {
        syntax,
        codestream,
        rows: frame.rows,
        columns: frame.columns,
        // Decoders give one byte a sample up to 8 bits, whatever the data set allocates.
        bits_allocated: if header.precision <= 8 { 8 } else { 16 },
        bits_stored: frame.format.bits_stored,
    };
    let values = guarded(&coded)?;
    let width = usize::from(coded.bits_allocated / 8);
    if width == frame.sample_bytes() && values.len() == frame.n_bytes() {
        return Ok(values);
    }
    resized(frame, &values, width)
}

/// Compares a codestream's header with the data set.
fn check_header(
    frame: &Frame<'_>,
    header: &codestream::Header,
    coding: PixelCoding,
) -> Result<(), Refusal> {
    let refuse = |found| Err(Refusal::Codestream { found });
    if (header.rows, header.columns) != (u32::from(frame.rows), u32::from(frame.columns)) {
        return refuse("another size than Rows and Columns");
    }
    if header.n_components != 1 {
        return refuse("more than one component");
    }
    let precision = u16::from(header.precision);
    if !(2..=16).contains(&precision) || precision > frame.format.bits_allocated {
        return refuse("a precision outside 2 to Bits Allocated");
    }
    match (coding, header.marker) {
        (PixelCoding::Jpeg, 0xC0) if precision != 8 => {
            return refuse("baseline JPEG of other than 8 bits");
        }
        (PixelCoding::Jpeg, 0xC0 | 0xC1 | 0xC3)
        | (PixelCoding::JpegLs, 0xF7)
        | (PixelCoding::Jpeg2000, codestream::SIZ) => {}
        _ => return refuse("a coding process other than the transfer syntax says"),
    }
    // Samples narrower than Bits Stored have lost their sign bit; JPEG 2000 alone says so in the codestream.
    if frame.format.is_signed
        && precision < frame.format.bits_stored
        && coding != PixelCoding::Jpeg2000
    {
        return refuse("signed samples of fewer bits than Bits Stored");
    }
    Ok(())
}

/// Values of `from` bytes each in the data set's Bits Allocated, little endian; a value's upper bytes are its sign or cut off.
fn resized(frame: &Frame<'_>, values: &[u8], from: usize) -> Result<Vec<u8>, Refusal> {
    let needed = frame.n_pixels() * from;
    if values.len() != needed {
        return Err(Refusal::PixelBytes {
            found: values.len(),
            needed,
        });
    }
    let to = frame.sample_bytes();
    let mut resized = vec![0; frame.n_bytes()];
    for (target, value) in resized.chunks_exact_mut(to).zip(values.chunks_exact(from)) {
        let is_negative =
            frame.format.is_signed && value.last().is_some_and(|byte| byte & 0x80 != 0);
        for (index, byte) in target.iter_mut().enumerate() {
            let extension = if is_negative { 0xFF } else { 0 };
            *byte = value.get(index).copied().unwrap_or(extension);
        }
    }
    Ok(resized)
}

/// Where frames lie among fragments (PS3.5 section A.4); found once for an object, however many frames are asked for.
#[derive(Debug, Default)]
pub(super) struct FrameFragments {
    n_frames: usize,
    /// Each frame's first fragment; empty where nothing tells.
    starts: Vec<usize>,
}

impl FrameFragments {
    /// Finds the frames: one frame has all fragments; as many fragments as frames are one each; otherwise the Basic Offset Table
    /// tells, or what the codestreams begin with.
    pub(super) fn find(data: &Data<'_>, pixel_data: Option<&PixelData>, n_frames: usize) -> Self {
        let Some(PixelData::Encapsulated {
            offset_table,
            fragments,
        }) = pixel_data
        else {
            return Self::default();
        };
        let starts = if fragments.is_empty() {
            None
        } else if n_frames == 1 {
            Some(vec![0])
        } else if fragments.len() == n_frames {
            Some((0..n_frames).collect())
        } else {
            let table = data.get(offset_table.clone()).unwrap_or_default();
            starts_by_offsets(&table, fragments, n_frames)
                .or_else(|| starts_by_codestream(data, fragments))
                .filter(|starts| starts.len() == n_frames)
        };
        Self {
            n_frames,
            starts: starts.unwrap_or_default(),
        }
    }

    /// The fragments of one frame.
    ///
    /// # Errors
    ///
    /// [`Refusal::FrameBounds`] where nothing tells which they are.
    fn of<'f>(
        &self,
        frame_index: usize,
        fragments: &'f [Range<usize>],
    ) -> Result<&'f [Range<usize>], Refusal> {
        let start = self.starts.get(frame_index);
        let end = self.starts.get(frame_index + 1);
        start
            .and_then(|&start| fragments.get(start..end.copied().unwrap_or(fragments.len())))
            .ok_or(Refusal::FrameBounds {
                n_fragments: fragments.len(),
                n_frames: self.n_frames,
            })
    }
}

/// Each frame's first fragment, by the Basic Offset Table: offsets of items, counted from the first fragment's item. Every offset
/// must be that of a fragment, and they must rise.
fn starts_by_offsets(
    table: &[u8],
    fragments: &[Range<usize>],
    n_frames: usize,
) -> Option<Vec<usize>> {
    if table.len() != 4 * n_frames {
        return None;
    }
    let first = fragments.first()?.start;
    table
        .chunks_exact(4)
        .map(|entry| {
            let offset = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) as usize;
            fragments
                .binary_search_by_key(&first.saturating_add(offset), |fragment| fragment.start)
                .ok()
        })
        .collect::<Option<Vec<usize>>>()
        .filter(|starts| starts.first() == Some(&0) && starts.is_sorted_by(|a, b| a < b))
}

/// Each frame's first fragment, by what codestreams begin with.
fn starts_by_codestream(data: &Data<'_>, fragments: &[Range<usize>]) -> Option<Vec<usize>> {
    let begins = |index: &usize| {
        let fragment = &fragments[*index];
        let end = fragment
            .end
            .min(fragment.start.saturating_add(codestream::BEGIN_BYTES));
        data.get(fragment.start..end)
            .is_some_and(|bytes| codestream::begins(&bytes))
    };
    let starts: Vec<usize> = (0..fragments.len()).filter(begins).collect();
    (starts.first() == Some(&0)).then_some(starts)
}

/// The fragments' bytes in a row.
fn joined<'a>(data: &'a Data<'_>, fragments: &[Range<usize>]) -> Cow<'a, [u8]> {
    let bytes_of = |fragment: &Range<usize>| data.get(fragment.clone()).unwrap_or_default();
    match fragments {
        [fragment] => bytes_of(fragment),
        fragments => Cow::Owned(fragments.iter().map(bytes_of).collect::<Vec<_>>().concat()),
    }
}

/// Runs the decoder that dicom-rs registers for the syntax and turns its panics into refusals: the only place in this crate where
/// a panic is caught. The decoder owns all it works on, so nothing half-done outlives the panic.
fn guarded(coded: &CodedFrame<'_>) -> Result<Vec<u8>, Refusal> {
    let refuse = |found| Err(Refusal::Decoder { found });
    let Some(syntax) = TransferSyntaxRegistry.get(coded.syntax.uid) else {
        return refuse("no decoder for the transfer syntax");
    };
    let Codec::EncapsulatedPixelData(Some(reader), _) = syntax.codec() else {
        return refuse("no decoder for the transfer syntax");
    };
    let decoded = catch_unwind(AssertUnwindSafe(|| {
        let mut values = Vec::new();
        reader.decode_frame(coded, 0, &mut values).map(|()| values)
    }));
    match decoded {
        Ok(Ok(values)) => Ok(values),
        Ok(Err(_)) => refuse("an error"),
        Err(_) => refuse("a panic"),
    }
}

/// One frame as dicom-rs' decoders ask for it: an image of a single frame in a single fragment.
#[derive(Debug)]
struct CodedFrame<'a> {
    syntax: &'a TransferSyntax,
    codestream: &'a [u8],
    rows: u16,
    columns: u16,
    bits_allocated: u16,
    bits_stored: u16,
}

impl PixelDataObject for CodedFrame<'_> {
    fn transfer_syntax_uid(&self) -> &str {
        self.syntax.uid
    }

    fn rows(&self) -> Option<u16> {
        Some(self.rows)
    }

    fn cols(&self) -> Option<u16> {
        Some(self.columns)
    }

    fn samples_per_pixel(&self) -> Option<u16> {
        Some(1)
    }

    fn bits_allocated(&self) -> Option<u16> {
        Some(self.bits_allocated)
    }

    fn bits_stored(&self) -> Option<u16> {
        Some(self.bits_stored)
    }

    fn photometric_interpretation(&self) -> Option<&str> {
        Some("MONOCHROME2")
    }

    fn number_of_frames(&self) -> Option<u32> {
        Some(1)
    }

    fn number_of_fragments(&self) -> Option<u32> {
        Some(1)
    }

    fn fragment(&self, fragment: usize) -> Option<Cow<'_, [u8]>> {
        (fragment == 0).then_some(Cow::Borrowed(self.codestream))
    }

    fn offset_table(&self) -> Option<Cow<'_, [u32]>> {
        Some(Cow::Borrowed(&[]))
    }

    fn raw_pixel_data(&self) -> Option<RawPixelData> {
        Some(RawPixelData {
            fragments: C::from_elem(self.codestream.to_vec(), 1),
            offset_table: C::new(),
        })
    }
}
