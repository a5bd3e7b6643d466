//! Finding the data set: Part 10 preamble and file meta information, or a bare data set.
//!
//! In: all bytes of a file or of a received data set. Out: the transfer syntax, the data set's first byte, and the UIDs that the
//! file meta information names. PS3.10 section 7.1 (preamble, prefix, group 0002 in Explicit VR Little Endian). A missing or
//! wrong group length is tolerated: the group ends where its elements end. Elements of the data set are left to
//! [`super::prescan`].

use super::ReadError;
use super::prescan::{Cursor, is_known_vr};
use super::source::{Data, Window};
use super::transfer_syntax::{self, Encoding, TransferSyntax};
use dicom_core::Tag;

/// Length of the preamble before `DICM` (PS3.10 section 7.1).
const PREAMBLE_BYTES: usize = 128;
/// The prefix after the preamble.
const PREFIX: &[u8] = b"DICM";
/// Most elements in the file meta information; the standard defines 14.
const MAX_META_ELEMENTS: usize = 64;
/// Longest UID (PS3.5 section 9.1), with one padding byte to spare.
const MAX_UID_BYTES: usize = 65;

const FILE_META_GROUP: u16 = 0x0002;
/// Identifying group: every composite instance begins in it (PS3.5 section 7.1, ascending tags).
const IDENTIFYING_GROUP: u16 = 0x0008;
const TRANSFER_SYNTAX_UID: Tag = Tag(0x0002, 0x0010);

/// Where the data set lies and how it is encoded.
#[derive(Debug)]
pub(super) struct Container {
    /// Transfer Syntax UID as written; for a data set without file meta information, as detected.
    pub(super) transfer_syntax_uid: String,
    /// Its row in the table, `None` where this crate knows no such row.
    pub(super) transfer_syntax: Option<&'static TransferSyntax>,
    /// Offset of the data set's first byte.
    pub(super) data_set_start: usize,
}

impl Container {
    /// Encoding of the data set's elements. Every syntax outside the table encapsulates its frames, hence is Explicit VR
    /// Little Endian (PS3.5 section A.4).
    pub(super) fn encoding(&self) -> Encoding {
        self.transfer_syntax
            .map_or(Encoding::ExplicitLittle, |row| row.encoding)
    }
}

/// Finds the data set.
///
/// # Errors
///
/// [`ReadError::NotDicom`] where neither a prefix nor an identifying group is found; [`ReadError::FileMeta`] and others where the
/// file meta information breaks off or exceeds its bounds.
pub(super) fn locate(data: &Data<'_>) -> Result<Container, ReadError> {
    let after_preamble = PREAMBLE_BYTES + PREFIX.len();
    let has = |start: usize, wanted: &[u8]| {
        let found = data.get(start..start + wanted.len());
        found.as_deref() == Some(wanted)
    };
    if has(PREAMBLE_BYTES, PREFIX) {
        return with_file_meta(data, after_preamble);
    }
    if has(0, PREFIX) {
        return with_file_meta(data, PREFIX.len());
    }
    if has(0, &FILE_META_GROUP.to_le_bytes()) {
        return with_file_meta(data, 0);
    }
    bare(data, 0)
}

/// Reads the file meta information that begins at `start`.
fn with_file_meta(data: &Data<'_>, start: usize) -> Result<Container, ReadError> {
    let mut cursor = Cursor::new(data, start, Encoding::ExplicitLittle);
    let mut transfer_syntax_uid = None;
    for _ in 0..=MAX_META_ELEMENTS {
        if cursor.peek_group() != Some(FILE_META_GROUP) {
            return finish(data, cursor.position(), transfer_syntax_uid);
        }
        let header = cursor.header()?;
        let value = cursor.value(&header)?;
        if header.tag == TRANSFER_SYNTAX_UID {
            transfer_syntax_uid = Some(uid_text(&value)?);
        }
    }
    Err(ReadError::FileMeta {
        found: "more elements than allowed",
    })
}

/// The container from a complete file meta information; guesses where it names no transfer syntax.
fn finish(data: &Data<'_>, start: usize, uid: Option<String>) -> Result<Container, ReadError> {
    match uid {
        Some(uid) if !uid.is_empty() => Ok(Container {
            transfer_syntax: transfer_syntax::find(&uid),
            transfer_syntax_uid: uid,
            data_set_start: start,
        }),
        _ => bare(data, start),
    }
}

/// Detects the encoding of a data set that nothing announces, from its first element.
fn bare(data: &Data<'_>, start: usize) -> Result<Container, ReadError> {
    let first = Window::default().array(data, start);
    let Some([g0, g1, e0, e1, v0, v1, l0, l1]) = first else {
        return Err(ReadError::NotDicom);
    };
    let is_explicit = is_known_vr([v0, v1]);
    let row = if u16::from_le_bytes([g0, g1]) == IDENTIFYING_GROUP {
        let length = u32::from_le_bytes([v0, v1, l0, l1]) as usize;
        if is_explicit {
            transfer_syntax::EXPLICIT_LITTLE
        } else if length <= data.len() - start && u16::from_le_bytes([e0, e1]) < 0x3000 {
            transfer_syntax::IMPLICIT_LITTLE
        } else {
            return Err(ReadError::NotDicom);
        }
    } else if u16::from_be_bytes([g0, g1]) == IDENTIFYING_GROUP && is_explicit {
        transfer_syntax::EXPLICIT_BIG
    } else {
        return Err(ReadError::NotDicom);
    };
    Ok(Container {
        transfer_syntax_uid: row.uid.to_owned(),
        transfer_syntax: Some(row),
        data_set_start: start,
    })
}

/// A UID as text, without padding.
fn uid_text(value: &[u8]) -> Result<String, ReadError> {
    let malformed = ReadError::FileMeta {
        found: "a transfer syntax UID that is none",
    };
    if value.len() > MAX_UID_BYTES {
        return Err(malformed);
    }
    let text = std::str::from_utf8(value)
        .map_err(|_| malformed)?
        .trim_matches(['\0', ' ']);
    if text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        Ok(text.to_owned())
    } else {
        Err(ReadError::FileMeta {
            found: "a transfer syntax UID that is none",
        })
    }
}
