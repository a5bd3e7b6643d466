//! What passes between the program and its worker: frames of one byte of kind, a length and a payload, and the facts inside.
//!
//! To the worker, on its standard input: the preprocessing, then for each object its size and a request
//! that says at which frame to begin. Back, on its standard output: the object's facts or the reason why it is none, then for
//! each frame either its facts and its tensor or a reason, then the end. In between the worker asks for the bytes that it needs and gets them:
//! never the whole of a large object. Both sides distrust each other's lengths: a payload is
//! at most [`MAX_PAYLOAD_BYTES`]. JSON inside, except for chunks and tensors. No standard governs this; both sides are always
//! the same build.

use serde::{Deserialize, Serialize};
use shared::TENSOR_BYTES;
use shared::uid::Uid;

use crate::result::Element;

/// Largest payload: a tensor.
pub(crate) const MAX_PAYLOAD_BYTES: usize = TENSOR_BYTES;
/// Bytes of a frame's header.
pub(crate) const HEADER_BYTES: usize = 5;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// To the worker, once: [`shared::spec::PreprocessSpec`] as JSON.
    Spec,
    /// To the worker: an object begins; its size as u64, little endian.
    Begin,
    /// To the worker: the first frame wanted as u32, little endian.
    Go,
    /// From the worker: bytes of the object that it needs, offset as u64 and number as u32, little endian; at most [`MAX_PAYLOAD_BYTES`].
    Want,
    /// To the worker: these bytes; fewer where the object has become shorter.
    Chunk,
    /// From the worker: [`ObjectFacts`].
    Object,
    /// From the worker: [`Refused`] for the whole object; nothing but `Done` follows.
    ObjectRefused,
    /// From the worker: [`SliceFacts`]; its tensor follows.
    Slice,
    /// From the worker: a tensor, u8 `[3, 256, 256]`.
    Tensor,
    /// From the worker: [`Reason`] for one frame.
    SliceRefused,
    /// From the worker: nothing more about this object.
    Done,
}

impl Kind {
    const ALL: [(Self, u8); 11] = [
        (Self::Spec, b'p'),
        (Self::Begin, b'b'),
        (Self::Want, b'w'),
        (Self::Chunk, b'c'),
        (Self::Go, b'g'),
        (Self::Object, b'o'),
        (Self::ObjectRefused, b'x'),
        (Self::Slice, b's'),
        (Self::Tensor, b't'),
        (Self::SliceRefused, b'r'),
        (Self::Done, b'd'),
    ];

    fn code(self) -> u8 {
        let found = Self::ALL.iter().find(|(kind, _)| *kind == self);
        found.map_or(0, |&(_, code)| code)
    }

    fn of(code: u8) -> Option<Self> {
        let found = Self::ALL.iter().find(|&&(_, of)| of == code);
        found.map(|&(kind, _)| kind)
    }
}

/// What an object says it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ObjectFacts {
    /// Study Instance UID; `None` where absent or malformed, as the others.
    pub(crate) study_uid: Option<Uid>,
    /// Series Instance UID.
    pub(crate) series_uid: Option<Uid>,
    /// SOP Instance UID.
    pub(crate) sop_uid: Option<Uid>,
    /// SOP Class UID.
    pub(crate) sop_class: Option<Uid>,
    /// Whose study it is and what made it.
    pub(crate) elements: Vec<Element>,
    /// Frames to expect.
    pub(crate) n_frames: u32,
    /// Whether frames are numbered in results.
    pub(crate) is_multi_frame: bool,
}

/// What series assembly needs to know of a slice.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SliceFacts {
    /// Position along the slice's normal in mm, rising from feet to head.
    pub(crate) z_mm: Option<f64>,
    /// Slice Thickness in mm.
    pub(crate) thickness_mm: Option<f64>,
    /// Acquisition Number.
    pub(crate) acquisition_number: Option<i32>,
    /// Image Type or Frame Type, values between backslashes.
    pub(crate) image_type: String,
    /// Convolution Kernel.
    pub(crate) kernel: Option<String>,
    /// Image Orientation (Patient).
    pub(crate) orientation: [f64; 6],
    /// BLAKE3 over the stored values and what makes HU of them, 32 hexadecimal digits: equal for equal pixels in any lossless transfer syntax.
    pub(crate) pixel_digest: String,
    /// Whether Image Type begins with ORIGINAL, PRIMARY.
    pub(crate) is_original_primary: bool,
    /// Whether stored values have been through lossy compression.
    pub(crate) is_lossy: bool,
    /// Rows and columns.
    pub(crate) size: [usize; 2],
}

/// An object that cannot be read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Refused {
    /// Why.
    pub(crate) reason: Reason,
    /// What it says of itself before it breaks; `None` where nothing.
    pub(crate) facts: Option<ObjectFacts>,
}

/// Why something is not analysed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {text}")]
pub(crate) struct Reason {
    /// Stable and machine-readable, `[a-z0-9-]`.
    pub(crate) code: String,
    /// For people.
    pub(crate) text: String,
}

impl Reason {
    /// A reason from its two parts.
    pub(crate) fn new(code: &str, text: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            text: text.into(),
        }
    }
}

/// A header that cannot be one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a frame of the worker protocol: kind {kind}, length {length}")]
pub(crate) struct BadHeader {
    kind: u8,
    length: u32,
}

impl From<BadHeader> for std::io::Error {
    fn from(error: BadHeader) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, error)
    }
}

/// The payload of [`Kind::Want`].
pub(crate) fn want(offset: u64, n_bytes: u32) -> [u8; 12] {
    let mut payload = [0; 12];
    let (first, second) = payload.split_at_mut(8);
    first.copy_from_slice(&offset.to_le_bytes());
    second.copy_from_slice(&n_bytes.to_le_bytes());
    payload
}

/// Offset and number of bytes in the payload of [`Kind::Want`]; `None` where it is none.
pub(crate) fn wanted(payload: &[u8]) -> Option<(u64, usize)> {
    let (offset, rest) = payload.split_first_chunk()?;
    let n_bytes = u32::from_le_bytes(rest.try_into().ok()?);
    let n_bytes = usize::try_from(n_bytes).ok()?;
    (n_bytes <= MAX_PAYLOAD_BYTES).then_some((u64::from_le_bytes(*offset), n_bytes))
}

/// The header of a frame.
pub(crate) fn header(kind: Kind, payload_bytes: usize) -> [u8; HEADER_BYTES] {
    let length = u32::try_from(payload_bytes)
        .unwrap_or(u32::MAX)
        .to_le_bytes();
    [kind.code(), length[0], length[1], length[2], length[3]]
}

/// Kind and payload length of a header.
///
/// # Errors
/// An unknown kind, or a length above [`MAX_PAYLOAD_BYTES`].
pub(crate) fn parse_header(header: [u8; HEADER_BYTES]) -> Result<(Kind, usize), BadHeader> {
    let [kind, length @ ..] = header;
    let length = u32::from_le_bytes(length);
    match (Kind::of(kind), usize::try_from(length)) {
        (Some(kind), Ok(n)) if n <= MAX_PAYLOAD_BYTES => Ok((kind, n)),
        _ => Err(BadHeader { kind, length }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_wire() {
        for (kind, _) in Kind::ALL {
            assert_eq!(parse_header(header(kind, 4711)), Ok((kind, 4711)));
        }
    }

    #[test]
    fn what_is_wanted_is_bounded() {
        assert_eq!(wanted(&want(1 << 40, 77)), Some((1 << 40, 77)));
        assert_eq!(wanted(&want(0, u32::MAX)), None);
        assert_eq!(wanted(&[0; 11]), None);
    }

    #[test]
    fn unknown_kinds_and_long_payloads_are_refused() {
        assert!(parse_header([b'?', 0, 0, 0, 0]).is_err());
        assert!(parse_header(header(Kind::Tensor, MAX_PAYLOAD_BYTES)).is_ok());
        assert!(parse_header(header(Kind::Tensor, MAX_PAYLOAD_BYTES + 1)).is_err());
        assert!(parse_header([b't', 255, 255, 255, 255]).is_err());
    }
}
