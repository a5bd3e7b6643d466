//! DICOM: from the bytes of a file or a received data set to slices in stored values, or to a reason.
//!
//! In: bytes, or a [`Source`] of them; no file is opened here. Out: a [`Slice`] for each frame that the gate accepts, or a typed [`ReadError`] or
//! [`Refusal`] that says tag, found and allowed and has a stable [`code`](Refusal::code). The stages, in the order in which the
//! data meets them:
//!
//! 1. `container`: Part 10 preamble and file meta information, or a bare data set; `transfer_syntax`: the table of syntaxes;
//!    `inflate`: deflated data sets, bounded.
//! 2. [`prescan`]: one bounded pass over the element headers.
//! 3. `attributes` and `functional_groups`: the few values that are needed, for the object and for one frame.
//! 4. [`gate`]: the table of what is analysed.
//! 5. [`pixels`]: one frame's stored values; `codestream`, `rle` and `jpeg_dct` belong to it.
//!
//! Foreign bytes cannot make this module panic, recurse, or allocate more than one frame ([`pixels::MAX_FRAME_BYTES`]) and a few
//! megabytes of positions; third-party decoders get one checked frame each and are caught where they panic. Messages hold no
//! patient data: only the elements named in `attributes` are ever interpreted; those of `copied` are handed on as bytes. What concerns several slices (which series is
//! judged, gaps, repeated positions) is left to the daemon.

mod attributes;
mod codestream;
mod container;
mod copied;
mod functional_groups;
pub mod gate;
mod inflate;
mod jpeg_dct;
pub mod pixels;
pub mod prescan;
mod rle;
mod source;
mod transfer_syntax;

use crate::hounsfield::Rescale;
use crate::stored::{PixelFormat, PixelPadding, SlicePixels};
use crate::uid::Uid;
use attributes::Attributes;
use container::Container;
pub use copied::CopiedElement;
use pixels::FrameFragments;
use prescan::Scan;
use source::Data;
pub use source::Source;
use std::borrow::Cow;
use thiserror::Error;
use transfer_syntax::Loss;
pub use transfer_syntax::{Decodable, decodable};

/// Why bytes cannot be read as a DICOM object.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Neither a Part 10 file nor a data set.
    #[error("not DICOM: neither a file meta information nor an identifying group is found")]
    NotDicom,
    /// The object is larger than [`prescan::MAX_OBJECT_BYTES`].
    #[error("the object has {found} bytes, allowed {allowed}")]
    ObjectSize {
        /// Its bytes.
        found: usize,
        /// The bound.
        allowed: usize,
    },
    /// The file meta information is not one.
    #[error("the file meta information holds {found}")]
    FileMeta {
        /// What was found.
        found: &'static str,
    },
    /// The data set as a whole is coded in a way that this build does not read.
    #[error("transfer syntax {name} not supported in this build (feature {feature})")]
    TransferSyntax {
        /// Name of the transfer syntax.
        name: &'static str,
        /// Feature that reads it.
        feature: &'static str,
    },
    /// The deflated data set is broken.
    #[error("the deflated data set is broken")]
    Inflate,
    /// The deflated data set grows beyond [`MAX_INFLATED_BYTES`].
    #[error("the deflated data set has more than {allowed} bytes")]
    InflatedSize {
        /// The bound.
        allowed: usize,
    },
    /// The bytes end inside an element or before a delimiter.
    #[error("the data set ends too early, at byte {offset}")]
    Truncated {
        /// Where more bytes were needed.
        offset: usize,
    },
    /// An element claims more bytes than are left, or an undefined length where none is allowed.
    #[error("{tag} claims {found} bytes, {left} are left")]
    Length {
        /// The element.
        tag: dicom_core::Tag,
        /// The length that it claims; 4294967295 stands for "undefined".
        found: u32,
        /// Bytes left in what encloses it.
        left: usize,
    },
    /// A value that is interpreted is longer than such a value can be.
    #[error("{tag} has {found} bytes, allowed {allowed}")]
    ValueLength {
        /// The element.
        tag: dicom_core::Tag,
        /// Its bytes.
        found: usize,
        /// The bound.
        allowed: usize,
    },
    /// An element's VR is not two capital letters.
    #[error("{tag} has the VR bytes {found:02X?}, allowed are two capital letters")]
    Vr {
        /// The element.
        tag: dicom_core::Tag,
        /// The two bytes.
        found: [u8; 2],
    },
    /// An item, a delimiter or another tag where it cannot be.
    #[error("{tag} stands where no such item, delimiter or element can be")]
    Delimiter {
        /// The tag.
        tag: dicom_core::Tag,
    },
    /// An element that is interpreted appears twice.
    #[error("{tag} appears twice")]
    Duplicate {
        /// The element.
        tag: dicom_core::Tag,
    },
    /// Sequences are nested too deeply.
    #[error("sequences are nested deeper than {allowed} at {tag}")]
    Depth {
        /// The sequence or item.
        tag: dicom_core::Tag,
        /// The bound.
        allowed: usize,
    },
    /// There is more of something than allowed.
    #[error("more {what} than the {allowed} allowed")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// The bound.
        allowed: usize,
    },
    /// dicom-rs refuses the values.
    #[error("the values of the data set cannot be read")]
    DataSet(#[source] Box<dicom_object::ReadError>),
}

impl ReadError {
    /// Stable, machine-readable reason.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotDicom => "not-dicom",
            Self::ObjectSize { .. } => "object-size",
            Self::FileMeta { .. } => "file-meta",
            Self::TransferSyntax { .. } => "transfer-syntax",
            Self::Inflate => "inflate",
            Self::InflatedSize { .. } => "inflated-size",
            Self::Truncated { .. } => "truncated",
            Self::Length { .. } => "length",
            Self::ValueLength { .. } => "value-length",
            Self::Vr { .. } => "vr",
            Self::Delimiter { .. } => "delimiter",
            Self::Duplicate { .. } => "duplicate-element",
            Self::Depth { .. } => "nesting-depth",
            Self::TooMany { .. } => "too-many",
            Self::DataSet(_) => "data-set",
        }
    }
}

/// Why a frame is not analysed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A row of the [`gate`] is broken.
    #[error("({:04X},{:04X}) {}: found {found}, allowed {}", row.tag.0, row.tag.1, row.name, row.allowed)]
    Gate {
        /// The row.
        row: &'static gate::Row,
        /// What was found, at most [`gate::MAX_FOUND_CHARACTERS`] characters.
        found: String,
    },
    /// The object has no such frame.
    #[error("frame {frame_index} (from 0) of {n_frames}")]
    FrameIndex {
        /// The frame asked for, from 0.
        frame_index: u32,
        /// Frames of the object.
        n_frames: u32,
    },
    /// The frame's elements cannot be read.
    #[error("the frame's elements cannot be read: {code}")]
    FrameElements {
        /// Code of the [`ReadError`].
        code: &'static str,
    },
    /// This build does not read the transfer syntax.
    #[error("transfer syntax {name} not supported in this build (feature {feature})")]
    TransferSyntax {
        /// Name of the transfer syntax.
        name: &'static str,
        /// Feature that reads it.
        feature: &'static str,
    },
    /// No build reads the transfer syntax.
    #[error("transfer syntax {uid} not supported")]
    UnknownTransferSyntax {
        /// Its UID, digits and dots only.
        uid: String,
    },
    /// Pixel data is native where the transfer syntax wants fragments, or the other way round.
    #[error("(7FE0,0010) Pixel Data: found {found}, allowed {allowed}")]
    Encapsulation {
        /// What was found.
        found: &'static str,
        /// What the transfer syntax says.
        allowed: &'static str,
    },
    /// A frame is larger than [`pixels::MAX_FRAME_BYTES`] or [`pixels::MAX_COMPRESSED_PIXELS`].
    #[error("the frame has {found} bytes or compressed pixels, allowed {allowed}")]
    FrameSize {
        /// Its size.
        found: usize,
        /// The bound.
        allowed: usize,
    },
    /// Pixel data has fewer bytes than the frame needs.
    #[error("(7FE0,0010) Pixel Data: found {found} bytes, needed {needed}")]
    PixelBytes {
        /// Bytes found.
        found: usize,
        /// Bytes needed up to the frame's end.
        needed: usize,
    },
    /// It cannot be told which fragments are the frame's.
    #[error(
        "(7FE0,0010) Pixel Data: found {n_fragments} fragments for {n_frames} frames and no sign of where frames begin"
    )]
    FrameBounds {
        /// Fragments.
        n_fragments: usize,
        /// Frames.
        n_frames: usize,
    },
    /// The frame's codestream is not what the data set says.
    #[error("(7FE0,0010) Pixel Data: found {found}")]
    Codestream {
        /// What was found.
        found: &'static str,
    },
    /// The decoder gave up.
    #[error("(7FE0,0010) Pixel Data: the decoder ended in {found}")]
    Decoder {
        /// How.
        found: &'static str,
    },
}

impl Refusal {
    /// Stable, machine-readable reason.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Gate { row, .. } => row.code,
            Self::FrameIndex { .. } => "frame-index",
            Self::FrameElements { .. } => "frame-elements",
            Self::TransferSyntax { .. } | Self::UnknownTransferSyntax { .. } => "transfer-syntax",
            Self::Encapsulation { .. } => "encapsulation",
            Self::FrameSize { .. } => "frame-size",
            Self::PixelBytes { .. } => "pixel-bytes",
            Self::FrameBounds { .. } => "frame-bounds",
            Self::Codestream { .. } => "codestream",
            Self::Decoder { .. } => "decoder-failed",
        }
    }
}

/// What an object says it is. UIDs that are absent or malformed are `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Study Instance UID.
    pub study_uid: Option<Uid>,
    /// Series Instance UID.
    pub series_uid: Option<Uid>,
    /// SOP Instance UID.
    pub sop_uid: Option<Uid>,
    /// SOP Class UID.
    pub sop_class: Option<Uid>,
    /// Transfer Syntax UID; the detected one where the bytes announce none.
    pub transfer_syntax: String,
    /// Modality.
    pub modality: Option<String>,
}

/// A parsed object. Borrows the bytes, or the source, that it was read from; only a deflated data set is held in memory.
#[derive(Debug)]
pub struct Object<'a> {
    data: Data<'a>,
    container: Container,
    scan: Scan,
    /// The data set's own attributes, without any frame's.
    attributes: Attributes,
    frames: FrameFragments,
    identity: Identity,
}

/// One frame in stored values, with what it takes to make HU of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Slice {
    /// Geometry and what else is said of the slice.
    pub attributes: SliceAttributes,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Format of a stored value; always little endian.
    pub format: PixelFormat,
    /// Values that stand for "no pixel".
    pub padding: Option<PixelPadding>,
    /// From stored values to HU.
    pub rescale: Rescale,
    /// Stored values, `[row, column]`, `format.bits_allocated / 8` bytes each.
    pub pixels: Vec<u8>,
}

impl Slice {
    /// The slice as the preprocessing takes it.
    #[must_use]
    pub fn pixels(&self) -> SlicePixels<'_> {
        SlicePixels {
            rows: self.rows,
            columns: self.columns,
            format: self.format,
            padding: self.padding,
            rescale: self.rescale,
            bytes: &self.pixels,
        }
    }
}

/// What is said of an accepted slice.
#[derive(Debug, Clone, PartialEq)]
pub struct SliceAttributes {
    /// Image Position (Patient) in mm.
    pub position_mm: Option<[f64; 3]>,
    /// Image Orientation (Patient): direction of a row, then of a column.
    pub orientation: [f64; 6],
    /// Position along the slice's normal in mm, rising from feet to head; `None` without position. Never from Slice Location.
    pub z_mm: Option<f64>,
    /// Pixel Spacing in mm: between rows, between columns.
    pub pixel_spacing_mm: Option<[f64; 2]>,
    /// Slice Thickness in mm; advisory.
    pub slice_thickness_mm: Option<f64>,
    /// Image Type; advisory beyond the gate.
    pub image_type: Vec<String>,
    /// Convolution Kernel; advisory.
    pub convolution_kernel: Option<String>,
    /// Body Part Examined; advisory.
    pub body_part_examined: Option<String>,
    /// Acquisition Number; advisory.
    pub acquisition_number: Option<i32>,
    /// Instance Number; advisory.
    pub instance_number: Option<i32>,
    /// Whether stored values have been through lossy compression, now or earlier: by transfer syntax or Lossy Image Compression
    /// (0028,2110).
    pub is_lossy: bool,
}

/// Most bytes of a deflated data set after inflation.
pub const MAX_INFLATED_BYTES: usize = inflate::MAX_BYTES;

/// Reads an object: finds the data set, inflates it where it is deflated, scans it.
///
/// # Errors
///
/// Any [`ReadError`].
pub fn read(bytes: &[u8]) -> Result<Object<'_>, ReadError> {
    read_data(Data::Bytes(Cow::Borrowed(bytes)))
}

/// As [`read`], asking `source` for what is needed: headers, then a frame when it is asked for.
///
/// # Errors
///
/// Any [`ReadError`]; [`ReadError::Truncated`] where `source` does not give what it should have.
pub fn read_from(source: &dyn Source) -> Result<Object<'_>, ReadError> {
    read_data(Data::Source(source))
}

fn read_data(data: Data<'_>) -> Result<Object<'_>, ReadError> {
    if data.len() > prescan::MAX_OBJECT_BYTES {
        return Err(ReadError::ObjectSize {
            found: data.len(),
            allowed: prescan::MAX_OBJECT_BYTES,
        });
    }
    let container = container::locate(&data)?;
    let encoding = container.encoding();
    let start = container.data_set_start;
    let (data, start) = match container.transfer_syntax {
        Some(syntax) if syntax.is_deflated => {
            // Deflate makes nothing larger, but for a few bytes.
            if data.len() > MAX_INFLATED_BYTES {
                return Err(ReadError::InflatedSize {
                    allowed: MAX_INFLATED_BYTES,
                });
            }
            let deflated = data.get(start..data.len()).unwrap_or_default();
            let inflated = inflate::inflate(&deflated, syntax)?;
            (Data::Bytes(Cow::Owned(inflated)), 0)
        }
        _ => (data, start),
    };
    let scan = prescan::scan(&data, start, encoding)?;
    let attributes = Attributes::read(&data, encoding, scan.elements.iter())?;
    let identity = identity(&attributes, &container);
    let mut object = Object {
        data,
        container,
        scan,
        attributes,
        frames: FrameFragments::default(),
        identity,
    };
    let n_frames = object.n_frames() as usize;
    object.frames = FrameFragments::find(&object.data, object.scan.pixel_data.as_ref(), n_frames);
    Ok(object)
}

/// What an object that cannot be read says of itself before it breaks: so that what is missing is missing from a known study.
#[must_use]
pub fn identify(source: &dyn Source) -> Option<(Identity, Vec<CopiedElement>)> {
    let data = Data::Source(source);
    let container = container::locate(&data).ok()?;
    let encoding = container.encoding();
    let (scan, _) = prescan::scan_as_far_as_possible(&data, container.data_set_start, encoding);
    let attributes = Attributes::read(&data, encoding, scan.elements.iter()).ok()?;
    let identity = identity(&attributes, &container);
    Some((identity, copied::copy(&data, &scan.copied)))
}

fn identity(attributes: &Attributes, container: &Container) -> Identity {
    let uid = |tag| Uid::new(&attributes.text(tag)?).ok();
    Identity {
        study_uid: uid(attributes::STUDY_INSTANCE_UID),
        series_uid: uid(attributes::SERIES_INSTANCE_UID),
        sop_uid: uid(attributes::SOP_INSTANCE_UID),
        sop_class: uid(attributes::SOP_CLASS_UID),
        transfer_syntax: container.transfer_syntax_uid.clone(),
        modality: attributes.text(attributes::MODALITY),
    }
}

impl Object<'_> {
    /// Whose study it is and what made it, as it came. Patient data: for results alone, never for messages.
    #[must_use]
    pub fn copied(&self) -> Vec<CopiedElement> {
        copied::copy(&self.data, &self.scan.copied)
    }

    /// What the object says it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Frames to ask for: Number of Frames for Enhanced and Legacy Converted Enhanced CT whose functional groups agree with it,
    /// otherwise 1 (whose frame then says what is wrong).
    #[must_use]
    pub fn n_frames(&self) -> u32 {
        let n_groups = u32::try_from(self.scan.per_frame.len()).unwrap_or(u32::MAX);
        let claimed = self.attributes.text(attributes::NUMBER_OF_FRAMES);
        if self.is_multi_frame() && claimed.and_then(|text| text.parse().ok()) == Some(n_groups) {
            n_groups.max(1)
        } else {
            1
        }
    }

    /// Whether frames are described by functional groups: Enhanced and Legacy Converted Enhanced CT, also of one frame.
    #[must_use]
    pub fn is_multi_frame(&self) -> bool {
        gate::is_multi_frame(&self.attributes)
    }

    /// Gates and decodes the frame `frame_index`, from 0.
    ///
    /// # Errors
    ///
    /// Any [`Refusal`].
    pub fn frame(&self, frame_index: u32) -> Result<Slice, Refusal> {
        let n_frames = self.n_frames();
        if frame_index >= n_frames {
            return Err(Refusal::FrameIndex {
                frame_index,
                n_frames,
            });
        }
        let index = frame_index as usize;
        if !self.is_multi_frame() {
            return self.slice(&self.attributes, index);
        }
        let elements = functional_groups::elements_of_frame(&self.scan, index);
        let attributes = Attributes::read(&self.data, self.container.encoding(), elements)
            .map_err(|error| Refusal::FrameElements { code: error.code() })?;
        self.slice(&attributes, index)
    }

    /// Gates and decodes one frame whose attributes are known.
    fn slice(&self, attributes: &Attributes, frame_index: usize) -> Result<Slice, Refusal> {
        let accepted = gate::accept(&gate::Facts {
            attributes,
            has_pixel_data: self.scan.pixel_data.is_some(),
            has_modality_lut: self.scan.has_modality_lut,
            n_functional_groups: self.scan.per_frame.len(),
        })
        .map_err(|violation| Refusal::Gate {
            row: violation.row,
            found: violation.found,
        })?;
        let (Some(syntax), Some(pixel_data)) =
            (self.container.transfer_syntax, &self.scan.pixel_data)
        else {
            return Err(Refusal::UnknownTransferSyntax {
                uid: self.container.transfer_syntax_uid.clone(),
            });
        };
        let pixels = pixels::decode(
            &pixels::Frame {
                data: &self.data,
                pixel_data,
                frame_index,
                frames: &self.frames,
                rows: accepted.rows,
                columns: accepted.columns,
                format: accepted.format,
            },
            syntax,
        )?;
        let is_flagged = attributes.text(attributes::LOSSY_IMAGE_COMPRESSION);
        let is_lossy = is_flagged.as_deref().is_some_and(|flag| flag != "00")
            || match syntax.loss {
                Loss::Lossless => false,
                Loss::Possible => is_flagged.is_none(),
                Loss::Lossy => true,
            };
        Ok(Slice {
            attributes: slice_attributes(attributes, &accepted, is_lossy),
            rows: usize::from(accepted.rows),
            columns: usize::from(accepted.columns),
            format: accepted.format,
            padding: accepted.padding,
            rescale: accepted.rescale,
            pixels,
        })
    }
}

/// What is said of an accepted slice.
fn slice_attributes(
    attributes: &Attributes,
    accepted: &gate::Accepted,
    is_lossy: bool,
) -> SliceAttributes {
    let normal = gate::normal(&accepted.orientation);
    let along_normal = |position: [f64; 3]| {
        position
            .iter()
            .zip(normal)
            .map(|(mm, axis)| mm * axis)
            .sum()
    };
    let image_type = match attributes.texts(attributes::FRAME_TYPE) {
        values if values.is_empty() => attributes.texts(attributes::IMAGE_TYPE),
        values => values,
    };
    SliceAttributes {
        position_mm: accepted.position_mm,
        orientation: accepted.orientation,
        z_mm: accepted.position_mm.map(along_normal),
        pixel_spacing_mm: accepted.pixel_spacing_mm,
        slice_thickness_mm: attributes
            .number(attributes::SLICE_THICKNESS)
            .ok()
            .flatten(),
        image_type,
        convolution_kernel: attributes.text(attributes::CONVOLUTION_KERNEL),
        body_part_examined: attributes.text(attributes::BODY_PART_EXAMINED),
        acquisition_number: attributes.integer(attributes::ACQUISITION_NUMBER),
        instance_number: attributes.integer(attributes::INSTANCE_NUMBER),
        is_lossy,
    }
}
