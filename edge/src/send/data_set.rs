//! Data sets as this node writes them, and back.
//!
//! In: elements whose values are bytes, so that what was copied from a peer keeps its character set. Out: Implicit or Explicit VR
//! Little Endian with defined lengths (PS3.5 sections 7.1 and 7.5), and whole files (PS3.10 section 7.1). [`DataSet::decode`] reads what
//! [`DataSet::encode`] wrote, and the flat command sets of a peer; objects of a peer are never read here.

use std::collections::BTreeMap;

use dicom_core::{Tag, VR};
use dicom_dictionary_std::{tags, uids};

use crate::intake::part10::{IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME};

/// Deepest sequence that [`DataSet::decode`] follows; a report has eight levels.
const MAX_DEPTH: u32 = 16;
/// Item (FFFE,E000), which the dictionary leaves out.
const ITEM: Tag = Tag(0xFFFE, 0xE000);

/// How a data set is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Syntax {
    /// Implicit VR Little Endian.
    Implicit,
    /// Explicit VR Little Endian.
    Explicit,
}

impl Syntax {
    /// Its transfer syntax UID.
    pub(crate) fn uid(self) -> &'static str {
        match self {
            Self::Implicit => uids::IMPLICIT_VR_LITTLE_ENDIAN,
            Self::Explicit => uids::EXPLICIT_VR_LITTLE_ENDIAN,
        }
    }
}

/// Elements by tag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DataSet(BTreeMap<Tag, (VR, Value)>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Bytes(Vec<u8>),
    Items(Vec<DataSet>),
}

/// Why bytes are no data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    /// A value or header reaches past the end.
    #[error("a value of the data set reaches past its end")]
    Short,
    /// Sequences deeper than [`MAX_DEPTH`].
    #[error("sequences nested more than {MAX_DEPTH} deep")]
    Deep,
    /// A value representation that the standard does not know, or an item that is none.
    #[error("an element has no valid header")]
    Header,
}

impl DataSet {
    /// Sets an element to bytes in the data set's character set; padded to even length here.
    pub(crate) fn bytes(&mut self, tag: Tag, vr: VR, value: impl Into<Vec<u8>>) -> &mut Self {
        self.0.insert(tag, (vr, Value::Bytes(value.into())));
        self
    }

    /// Sets an element to text; characters outside printable ASCII become `?`, which every character set of DICOM can hold.
    pub(crate) fn text(&mut self, tag: Tag, vr: VR, value: &str) -> &mut Self {
        let plain = |c: char| {
            let is_plain = c == ' ' || c.is_ascii_graphic() || (c == '\n' && vr == VR::UT);
            if is_plain { c } else { '?' }
        };
        let value: String = value.chars().map(plain).collect();
        self.bytes(tag, vr, value)
    }

    /// Sets a 16-bit number.
    pub(crate) fn u16(&mut self, tag: Tag, value: u16) -> &mut Self {
        self.bytes(tag, VR::US, value.to_le_bytes())
    }

    /// Sets a 32-bit number.
    pub(crate) fn u32(&mut self, tag: Tag, value: u32) -> &mut Self {
        self.bytes(tag, VR::UL, value.to_le_bytes())
    }

    /// Sets a sequence.
    pub(crate) fn items(&mut self, tag: Tag, items: Vec<Self>) -> &mut Self {
        self.0.insert(tag, (VR::SQ, Value::Items(items)));
        self
    }

    /// Adds an empty element where there is none (type 2).
    pub(crate) fn or_empty(&mut self, tag: Tag, vr: VR) -> &mut Self {
        let empty = match vr {
            VR::SQ => Value::Items(Vec::new()),
            _ => Value::Bytes(Vec::new()),
        };
        self.0.entry(tag).or_insert((vr, empty));
        self
    }

    /// The value of an element as bytes, without padding; `None` where it is not there or a sequence.
    #[cfg(test)]
    pub(crate) fn value(&self, tag: Tag) -> Option<&[u8]> {
        match &self.0.get(&tag)?.1 {
            Value::Bytes(bytes) => {
                let is_padding = |byte: &u8| matches!(byte, 0 | b' ');
                let kept = bytes.iter().rposition(|byte| !is_padding(byte));
                Some(&bytes[..kept.map_or(0, |last| last + 1)])
            }
            Value::Items(_) => None,
        }
    }

    /// The value of an element as ASCII text.
    #[cfg(test)]
    pub(crate) fn string(&self, tag: Tag) -> Option<&str> {
        self.value(tag)
            .and_then(|value| std::str::from_utf8(value).ok())
    }

    /// A 16-bit number, as in command sets.
    pub(crate) fn number(&self, tag: Tag) -> Option<u16> {
        match &self.0.get(&tag)?.1 {
            Value::Bytes(bytes) => Some(u16::from_le_bytes(bytes.as_slice().try_into().ok()?)),
            Value::Items(_) => None,
        }
    }

    /// The items of a sequence; none where it is not there.
    #[cfg(test)]
    pub(crate) fn sequence(&self, tag: Tag) -> &[Self] {
        match self.0.get(&tag) {
            Some((_, Value::Items(items))) => items,
            _ => &[],
        }
    }

    /// The data set as bytes.
    pub(crate) fn encode(&self, syntax: Syntax) -> Vec<u8> {
        let mut out = Vec::new();
        for (tag, (vr, value)) in &self.0 {
            let value = match value {
                Value::Bytes(bytes) => padded(*vr, bytes),
                Value::Items(items) => encode_items(items, syntax),
            };
            put_tag(&mut out, *tag);
            put_length(&mut out, *vr, value.len(), syntax);
            out.extend(value);
        }
        out
    }

    /// A command set with its group length (PS3.7 section 6.3.1).
    pub(crate) fn encode_command(&self) -> Vec<u8> {
        let body = self.encode(Syntax::Implicit);
        let mut whole = Self::default();
        whole.u32(tags::COMMAND_GROUP_LENGTH, length_u32(body.len()));
        let mut out = whole.encode(Syntax::Implicit);
        out.extend(body);
        out
    }

    /// Reads what [`DataSet::encode`] wrote; with implicit VR every value is bytes.
    ///
    /// # Errors
    /// [`DecodeError`] where the bytes are something else.
    pub(crate) fn decode(bytes: &[u8], syntax: Syntax) -> Result<Self, DecodeError> {
        decode_at(bytes, syntax, MAX_DEPTH)
    }
}

/// A whole file: preamble, meta information and `body`, which is encoded in Explicit VR Little Endian.
pub(crate) fn file(sop_class_uid: &str, sop_instance_uid: &str, body: &[u8]) -> Vec<u8> {
    let mut meta = DataSet::default();
    meta.bytes(tags::FILE_META_INFORMATION_VERSION, VR::OB, [0, 1])
        .text(tags::MEDIA_STORAGE_SOP_CLASS_UID, VR::UI, sop_class_uid)
        .text(
            tags::MEDIA_STORAGE_SOP_INSTANCE_UID,
            VR::UI,
            sop_instance_uid,
        )
        .text(tags::TRANSFER_SYNTAX_UID, VR::UI, Syntax::Explicit.uid())
        .text(
            tags::IMPLEMENTATION_CLASS_UID,
            VR::UI,
            IMPLEMENTATION_CLASS_UID,
        )
        .text(
            tags::IMPLEMENTATION_VERSION_NAME,
            VR::SH,
            IMPLEMENTATION_VERSION_NAME,
        );
    let meta = meta.encode(Syntax::Explicit);
    let mut length = DataSet::default();
    length.u32(
        tags::FILE_META_INFORMATION_GROUP_LENGTH,
        length_u32(meta.len()),
    );
    let mut out = vec![0; 128];
    out.extend(b"DICM");
    out.extend(length.encode(Syntax::Explicit));
    out.extend(meta);
    out.extend(body);
    out
}

/// Lengths of what this node writes; its bounds are far below 4 GiB.
fn length_u32(length: usize) -> u32 {
    u32::try_from(length).expect("documents are bounded far below 4 GiB")
}

fn put_tag(out: &mut Vec<u8>, tag: Tag) {
    out.extend(tag.0.to_le_bytes());
    out.extend(tag.1.to_le_bytes());
}

fn put_length(out: &mut Vec<u8>, vr: VR, length: usize, syntax: Syntax) {
    if syntax == Syntax::Explicit {
        out.extend(vr.to_bytes());
        if !has_long_length(vr) {
            // A value that a peer sent in a long form and that fits no short one cannot occur: copies are bounded.
            out.extend(u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes());
            return;
        }
        out.extend([0, 0]);
    }
    out.extend(length_u32(length).to_le_bytes());
}

/// Value representations with a 32-bit length in explicit VR (PS3.5 section 7.1.2).
pub(crate) fn has_long_length(vr: VR) -> bool {
    matches!(
        vr,
        VR::OB
            | VR::OD
            | VR::OF
            | VR::OL
            | VR::OV
            | VR::OW
            | VR::SQ
            | VR::SV
            | VR::UC
            | VR::UN
            | VR::UR
            | VR::UT
            | VR::UV
    )
}

fn padded(vr: VR, bytes: &[u8]) -> Vec<u8> {
    let mut value = bytes.to_vec();
    if !has_long_length(vr) {
        value.truncate(usize::from(u16::MAX) - 1);
    }
    if value.len() % 2 == 1 {
        value.push(match vr {
            VR::UI | VR::OB | VR::UN => 0,
            _ => b' ',
        });
    }
    value
}

fn encode_items(items: &[DataSet], syntax: Syntax) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        let body = item.encode(syntax);
        put_tag(&mut out, ITEM);
        out.extend(length_u32(body.len()).to_le_bytes());
        out.extend(body);
    }
    out
}

fn decode_at(mut bytes: &[u8], syntax: Syntax, depth: u32) -> Result<DataSet, DecodeError> {
    let depth = depth.checked_sub(1).ok_or(DecodeError::Deep)?;
    let mut set = DataSet::default();
    while !bytes.is_empty() {
        let tag = take_tag(&mut bytes)?;
        let (vr, length) = take_length(&mut bytes, syntax)?;
        let value = take(&mut bytes, length)?;
        let value = match vr {
            VR::SQ => Value::Items(decode_items(value, syntax, depth)?),
            _ => Value::Bytes(value.to_vec()),
        };
        set.0.insert(tag, (vr, value));
    }
    Ok(set)
}

fn decode_items(mut bytes: &[u8], syntax: Syntax, depth: u32) -> Result<Vec<DataSet>, DecodeError> {
    let mut items = Vec::new();
    while !bytes.is_empty() {
        if take_tag(&mut bytes)? != ITEM {
            return Err(DecodeError::Header);
        }
        let length = take_u32(&mut bytes)?;
        items.push(decode_at(take(&mut bytes, length)?, syntax, depth)?);
    }
    Ok(items)
}

fn take_length(bytes: &mut &[u8], syntax: Syntax) -> Result<(VR, usize), DecodeError> {
    if syntax == Syntax::Implicit {
        return Ok((VR::UN, take_u32(bytes)?));
    }
    let vr = <[u8; 2]>::try_from(take(bytes, 2)?).map_err(|_| DecodeError::Short)?;
    let vr = VR::from_binary(vr).ok_or(DecodeError::Header)?;
    if has_long_length(vr) {
        take(bytes, 2)?;
        Ok((vr, take_u32(bytes)?))
    } else {
        let length = <[u8; 2]>::try_from(take(bytes, 2)?).map_err(|_| DecodeError::Short)?;
        Ok((vr, u16::from_le_bytes(length).into()))
    }
}

fn take_tag(bytes: &mut &[u8]) -> Result<Tag, DecodeError> {
    match take(bytes, 4)? {
        &[a, b, c, d] => Ok(Tag(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))),
        _ => Err(DecodeError::Short),
    }
}

fn take_u32(bytes: &mut &[u8]) -> Result<usize, DecodeError> {
    let value = <[u8; 4]>::try_from(take(bytes, 4)?).map_err(|_| DecodeError::Short)?;
    usize::try_from(u32::from_le_bytes(value)).map_err(|_| DecodeError::Short)
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8], DecodeError> {
    let (taken, rest) = bytes.split_at_checked(length).ok_or(DecodeError::Short)?;
    *bytes = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> DataSet {
        let mut item = DataSet::default();
        item.text(tags::CODE_VALUE, VR::SH, "59282003");
        let mut set = DataSet::default();
        set.bytes(tags::PATIENT_NAME, VR::PN, "M\u{fc}ller".as_bytes())
            .text(tags::TEXT_VALUE, VR::UT, "two\nlines")
            .u16(tags::ROWS, 256)
            .items(tags::CONTENT_SEQUENCE, vec![item.clone(), item]);
        set
    }

    #[test]
    fn explicit_bytes_read_back_are_the_same_bytes() {
        let bytes = sample().encode(Syntax::Explicit);
        assert_eq!(bytes.len() % 2, 0);
        let read = DataSet::decode(&bytes, Syntax::Explicit).unwrap();
        assert_eq!(read.encode(Syntax::Explicit), bytes);
        assert_eq!(read.sequence(tags::CONTENT_SEQUENCE).len(), 2);
        assert_eq!(read.number(tags::ROWS), Some(256));
    }

    #[test]
    fn any_cut_or_foreign_byte_is_an_error_or_a_data_set_and_never_a_panic() {
        let bytes = sample().encode(Syntax::Explicit);
        for cut in 0..bytes.len() {
            drop(DataSet::decode(&bytes[..cut], Syntax::Explicit));
            for value in [0, 0x7F, 0xFF] {
                let mut broken = bytes.clone();
                broken[cut] = value;
                drop(DataSet::decode(&broken, Syntax::Explicit));
                drop(DataSet::decode(&broken, Syntax::Implicit));
            }
        }
        assert_eq!(
            DataSet::decode(&bytes[..bytes.len() - 1], Syntax::Explicit),
            Err(DecodeError::Short)
        );
    }

    #[test]
    fn text_of_ours_is_ascii() {
        let mut set = DataSet::default();
        set.text(tags::SERIES_DESCRIPTION, VR::LO, "caf\u{e9}\u{1}");
        assert_eq!(set.string(tags::SERIES_DESCRIPTION), Some("caf??"));
    }
}
