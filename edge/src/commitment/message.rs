//! The data set of a request for commitment and of its report (PS3.4 tables J.3-1 and J.3-2).
//!
//! In: bytes of a peer, bounded by the caller. Out: a [`Transaction`], or that the bytes are none. A peer may write sequences and items with or
//! without their lengths; elements that are not asked for are passed over, nested at most [`MAX_DEPTH`] deep.

use dicom_core::{Tag, VR};
use dicom_dictionary_std::tags;
use shared::uid::Uid;

use super::{ALL_COMMITTED, FAILURES_EXIST};
use crate::send::data_set::{DataSet, Syntax};

/// Most bytes of a request or report: some 8000 instances.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// Deepest nesting that is passed over.
const MAX_DEPTH: u32 = 8;
const ITEM: Tag = Tag(0xFFFE, 0xE000);
const ITEM_END: Tag = Tag(0xFFFE, 0xE00D);
const SEQUENCE_END: Tag = Tag(0xFFFE, 0xE0DD);
const UNDEFINED: u32 = u32::MAX;

/// Why an instance is not committed: Failure Reason (PS3.3 section C.14.1.1).
pub(crate) mod failure {
    /// Processing failure.
    pub(crate) const PROCESSING: u16 = 0x0110;
    /// No such object instance.
    pub(crate) const NO_SUCH_INSTANCE: u16 = 0x0112;
    /// Class / instance conflict.
    pub(crate) const CLASS_CONFLICT: u16 = 0x0119;
    /// Resource limitation.
    pub(crate) const RESOURCE_LIMITATION: u16 = 0x0213;

    /// A reason in words.
    pub(crate) fn words(reason: u16) -> &'static str {
        match reason {
            PROCESSING => "processing failure",
            NO_SUCH_INSTANCE => "no such object instance",
            RESOURCE_LIMITATION => "resource limitation",
            0x0122 => "SOP class not supported",
            CLASS_CONFLICT => "class and instance conflict",
            0x0131 => "duplicate transaction UID",
            _ => "unknown reason",
        }
    }
}

/// An instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    /// SOP Class UID.
    pub(crate) sop_class_uid: String,
    /// SOP Instance UID.
    pub(crate) sop_instance_uid: String,
}

/// A request: what is to be committed. A report: what is, and what is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transaction {
    /// Transaction UID.
    pub(crate) uid: Uid,
    /// Referenced SOP Sequence.
    pub(crate) references: Vec<Reference>,
    /// Failed SOP Sequence with its reasons.
    pub(crate) failed: Vec<(Reference, u16)>,
}

/// Bytes that are no transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no storage commitment data set")]
pub(crate) struct Malformed;

impl Transaction {
    /// Its Event Type ID as a report.
    pub(crate) fn event_type(&self) -> u16 {
        if self.failed.is_empty() {
            ALL_COMMITTED
        } else {
            FAILURES_EXIST
        }
    }

    /// The data set.
    pub(crate) fn data_set(&self) -> DataSet {
        let mut set = DataSet::default();
        set.text(tags::TRANSACTION_UID, VR::UI, self.uid.as_str());
        let item = |reference: &Reference| {
            let mut item = DataSet::default();
            item.text(
                tags::REFERENCED_SOP_CLASS_UID,
                VR::UI,
                &reference.sop_class_uid,
            )
            .text(
                tags::REFERENCED_SOP_INSTANCE_UID,
                VR::UI,
                &reference.sop_instance_uid,
            );
            item
        };
        if !self.references.is_empty() {
            let items = self.references.iter().map(item).collect();
            set.items(tags::REFERENCED_SOP_SEQUENCE, items);
        }
        if !self.failed.is_empty() {
            let failed = self.failed.iter().map(|(reference, reason)| {
                let mut item = item(reference);
                item.u16(tags::FAILURE_REASON, *reason);
                item
            });
            set.items(tags::FAILED_SOP_SEQUENCE, failed.collect());
        }
        set
    }

    /// Reads a peer's data set.
    ///
    /// # Errors
    /// It is none, names no transaction, or is larger than [`MAX_BYTES`].
    pub(crate) fn read(bytes: &[u8], syntax: Syntax) -> Result<Self, Malformed> {
        if bytes.len() > MAX_BYTES {
            return Err(Malformed);
        }
        let mut uid = None;
        let mut references = Vec::new();
        let mut failed = Vec::new();
        let rest = walk(bytes, syntax, MAX_DEPTH, false, &mut |tag, value| {
            match tag {
                tags::TRANSACTION_UID => uid = Uid::new(text(value)?).ok(),
                tags::REFERENCED_SOP_SEQUENCE => items(value, syntax, MAX_DEPTH, &mut |item| {
                    references.push(reference(item, syntax)?.0);
                    Ok(())
                })
                .map(|_| ())?,
                tags::FAILED_SOP_SEQUENCE => items(value, syntax, MAX_DEPTH, &mut |item| {
                    let (reference, reason) = reference(item, syntax)?;
                    failed.push((reference, reason.unwrap_or(failure::PROCESSING)));
                    Ok(())
                })
                .map(|_| ())?,
                _ => {}
            }
            Ok(())
        })?;
        if !rest.is_empty() {
            return Err(Malformed);
        }
        Ok(Self {
            uid: uid.ok_or(Malformed)?,
            references,
            failed,
        })
    }
}

/// An item of either sequence: the instance, and its failure reason.
fn reference(item: &[u8], syntax: Syntax) -> Result<(Reference, Option<u16>), Malformed> {
    let mut found = Reference {
        sop_class_uid: String::new(),
        sop_instance_uid: String::new(),
    };
    let mut reason = None;
    walk(item, syntax, MAX_DEPTH, false, &mut |tag, value| {
        match tag {
            tags::REFERENCED_SOP_CLASS_UID => found.sop_class_uid = text(value)?.to_owned(),
            tags::REFERENCED_SOP_INSTANCE_UID => found.sop_instance_uid = text(value)?.to_owned(),
            tags::FAILURE_REASON => {
                let value = value.try_into().map_err(|_| Malformed)?;
                reason = Some(u16::from_le_bytes(value));
            }
            _ => {}
        }
        Ok(())
    })?;
    let is_named = !found.sop_class_uid.is_empty() && !found.sop_instance_uid.is_empty();
    is_named.then_some((found, reason)).ok_or(Malformed)
}

/// A UID's text, its padding removed.
fn text(value: &[u8]) -> Result<&str, Malformed> {
    let text = std::str::from_utf8(value).map_err(|_| Malformed)?;
    let text = text.trim_matches(['\0', ' ']);
    if text.len() <= 64 {
        Ok(text)
    } else {
        Err(Malformed)
    }
}

/// What is done with an element.
type TakeElement<'t, 'a> = &'t mut dyn FnMut(Tag, &'a [u8]) -> Result<(), Malformed>;

/// Walks the elements of a data set, or of an item that ends with a delimiter. Out: what follows.
fn walk<'a>(
    mut rest: &'a [u8],
    syntax: Syntax,
    depth: u32,
    is_delimited: bool,
    take: TakeElement<'_, 'a>,
) -> Result<&'a [u8], Malformed> {
    while !rest.is_empty() {
        let (tag, after) = split_tag(rest)?;
        if tag == ITEM_END {
            let (_, after) = split_u32(after)?;
            return is_delimited.then_some(after).ok_or(Malformed);
        }
        let (length, after) = split_length(after, syntax)?;
        let value;
        (value, rest) = if length == UNDEFINED {
            let depth = depth.checked_sub(1).ok_or(Malformed)?;
            let behind = items(after, syntax, depth, &mut |_| Ok(()))?;
            (&after[..after.len() - behind.len()], behind)
        } else {
            split(after, length)?
        };
        take(tag, value)?;
    }
    (!is_delimited).then_some(rest).ok_or(Malformed)
}

/// Walks the items of a sequence to its delimiter, or to the end where it has none. Out: what follows.
fn items<'a>(
    mut rest: &'a [u8],
    syntax: Syntax,
    depth: u32,
    take: &mut dyn FnMut(&'a [u8]) -> Result<(), Malformed>,
) -> Result<&'a [u8], Malformed> {
    while !rest.is_empty() {
        let (tag, after) = split_tag(rest)?;
        let (length, after) = split_u32(after)?;
        if tag == SEQUENCE_END {
            return Ok(after);
        }
        if tag != ITEM {
            return Err(Malformed);
        }
        let item;
        (item, rest) = if length == UNDEFINED {
            let depth = depth.checked_sub(1).ok_or(Malformed)?;
            let behind = walk(after, syntax, depth, true, &mut |_, _| Ok(()))?;
            // Its delimiter, a tag and a length, is no part of it.
            (&after[..after.len() - behind.len() - 8], behind)
        } else {
            split(after, length)?
        };
        take(item)?;
    }
    Ok(rest)
}

fn split_length(bytes: &[u8], syntax: Syntax) -> Result<(u32, &[u8]), Malformed> {
    if syntax == Syntax::Implicit {
        return split_u32(bytes);
    }
    let (vr, rest) = bytes.split_first_chunk::<2>().ok_or(Malformed)?;
    let vr = VR::from_binary(*vr).ok_or(Malformed)?;
    let (short, rest) = rest.split_first_chunk::<2>().ok_or(Malformed)?;
    if crate::send::data_set::has_long_length(vr) {
        split_u32(rest)
    } else {
        Ok((u16::from_le_bytes(*short).into(), rest))
    }
}

fn split_tag(bytes: &[u8]) -> Result<(Tag, &[u8]), Malformed> {
    let (&[a, b, c, d], rest) = bytes.split_first_chunk::<4>().ok_or(Malformed)?;
    let tag = Tag(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    Ok((tag, rest))
}

fn split_u32(bytes: &[u8]) -> Result<(u32, &[u8]), Malformed> {
    let (value, rest) = bytes.split_first_chunk::<4>().ok_or(Malformed)?;
    Ok((u32::from_le_bytes(*value), rest))
}

fn split(bytes: &[u8], length: u32) -> Result<(&[u8], &[u8]), Malformed> {
    let length = usize::try_from(length).map_err(|_| Malformed)?;
    bytes.split_at_checked(length).ok_or(Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Transaction {
        let reference = |number: u32| Reference {
            sop_class_uid: "1.2.840.10008.5.1.4.1.1.2".to_owned(),
            sop_instance_uid: format!("1.2.3.{number}"),
        };
        Transaction {
            uid: Uid::new("2.25.7").unwrap(),
            references: vec![reference(1), reference(2)],
            failed: vec![(reference(3), failure::NO_SUCH_INSTANCE)],
        }
    }

    #[test]
    fn what_is_written_is_read_in_both_syntaxes() {
        for syntax in [Syntax::Explicit, Syntax::Implicit] {
            let bytes = report().data_set().encode(syntax);
            assert_eq!(Transaction::read(&bytes, syntax), Ok(report()));
        }
    }

    #[test]
    fn sequences_and_items_without_lengths_are_read() {
        let element = |element: u16, length: u32, value: &[u8]| {
            let mut bytes = vec![8, 0];
            bytes.extend(element.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(value);
            bytes
        };
        let mark = |element: u16, length: u32| {
            let mut bytes = vec![0xFE, 0xFF];
            bytes.extend(element.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes
        };
        let nested = [
            element(0x1140, UNDEFINED, &[]),
            mark(0xE000, UNDEFINED),
            element(0x1155, 4, b"9.9\0"),
            mark(0xE00D, 0),
            mark(0xE0DD, 0),
        ];
        let bytes = [
            element(0x1195, 6, b"2.25.7"),
            element(0x1199, UNDEFINED, &[]),
            mark(0xE000, UNDEFINED),
            nested.concat(),
            element(0x1150, 4, b"1.2\0"),
            element(0x1155, 6, b"1.2.3\0"),
            mark(0xE00D, 0),
            mark(0xE0DD, 0),
        ];
        let read = Transaction::read(&bytes.concat(), Syntax::Implicit).unwrap();
        assert_eq!(read.references.len(), 1);
        assert_eq!(read.references[0].sop_instance_uid, "1.2.3");
    }

    #[test]
    fn any_cut_or_foreign_byte_is_an_error_or_a_transaction_and_never_a_panic() {
        for syntax in [Syntax::Explicit, Syntax::Implicit] {
            let bytes = report().data_set().encode(syntax);
            for cut in 0..bytes.len() {
                drop(Transaction::read(&bytes[..cut], syntax));
                for value in [0, 0x7F, 0xFF] {
                    let mut broken = bytes.clone();
                    broken[cut] = value;
                    drop(Transaction::read(&broken, syntax));
                }
            }
            assert_eq!(Transaction::read(&bytes[..9], syntax), Err(Malformed));
        }
        let deep = [0xFE, 0xFF, 0, 0xE0, 0xFF, 0xFF, 0xFF, 0xFF].repeat(1000);
        let sequence = [8, 0, 0x99, 0x11, 0xFF, 0xFF, 0xFF, 0xFF];
        let bytes = [&sequence[..], &deep].concat();
        assert_eq!(Transaction::read(&bytes, Syntax::Implicit), Err(Malformed));
    }
}
