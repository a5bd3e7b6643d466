//! One C-STORE: from its command to the status that it is answered with (PS3.4 annex B).
//!
//! In: the command, then the data set in pieces. Out: a status, success only after the object is durable. The first bytes of the
//! data set are compared with the command; everything else about it is found out later, in the worker process. A store that is refused
//! still takes its data set off the wire.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use shared::uid::Uid;

use super::admit::Context;
use super::dimse::{Request, Status};
use super::part10;
use super::spool::{Entry, Header, SpoolError};
use super::{Intake, unix_ms};

/// Bytes of the data set in which SOP Class UID and SOP Instance UID are looked for.
const HEAD_BYTES: usize = 4 << 10;
const SOP_CLASS: u32 = 0x0008_0016;
const SOP_INSTANCE: u32 = 0x0008_0018;
const DEFLATED: &str = "1.2.840.10008.1.2.1.99";
const EXPLICIT_BIG: &str = "1.2.840.10008.1.2.2";
const IMPLICIT_LITTLE: &str = "1.2.840.10008.1.2";

/// How often the log says that objects are refused for want of room.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// When the log last said that objects are refused.
#[derive(Debug, Default)]
pub(super) struct Said(Mutex<Option<Instant>>);

impl Said {
    /// Whether it is to be said now; if so it counts as said.
    fn is_due(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| now.saturating_duration_since(last) >= SAY_EVERY);
        if is_due {
            *last = Some(now);
        }
        is_due
    }
}

/// A store whose data set is coming.
#[derive(Debug)]
pub(super) struct Store {
    request: Request,
    transfer_syntax: &'static str,
    entry: Result<Entry, Refusal>,
    head: Vec<u8>,
}

/// Why a store is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: Status,
    pub(super) comment: &'static str,
}

impl Refusal {
    fn new(status: Status, comment: &'static str) -> Self {
        Self { status, comment }
    }
}

impl Store {
    pub(super) fn begin(
        intake: &Intake,
        request: Request,
        context: &Context,
        calling_ae: &str,
        address: &str,
    ) -> Self {
        let transfer_syntax = context.transfer_syntax;
        let entry = check_command(&request, context).and_then(|()| {
            let header = Header {
                sequence: 0,
                received_ms: unix_ms(),
                calling_ae: calling_ae.to_owned(),
                address: address.to_owned(),
                sop_class_uid: request.sop_class_uid.clone(),
                sop_instance_uid: request.sop_instance_uid.clone(),
                transfer_syntax_uid: transfer_syntax.to_owned(),
            };
            let mut entry = intake.spool.begin(header).map_err(|error| refuse(&error))?;
            let preamble = part10::preamble(
                &request.sop_class_uid,
                &request.sop_instance_uid,
                transfer_syntax,
                calling_ae,
            );
            entry.write(&preamble).map_err(|error| refuse(&error))?;
            Ok(entry)
        });
        Self {
            request,
            transfer_syntax,
            entry,
            head: Vec::new(),
        }
    }

    /// Takes a piece of the data set.
    pub(super) fn data(&mut self, bytes: &[u8]) {
        let missing = HEAD_BYTES.saturating_sub(self.head.len());
        self.head
            .extend_from_slice(&bytes[..bytes.len().min(missing)]);
        if let Ok(entry) = &mut self.entry
            && let Err(error) = entry.write(bytes)
        {
            self.entry = Err(refuse(&error));
        }
    }

    /// Makes the object durable. Out: the request and its answer.
    pub(super) async fn finish(self, intake: &Intake) -> (Request, Result<u64, Refusal>) {
        let checked = check_data_set(&self.head, self.transfer_syntax, &self.request);
        let done = match (self.entry, checked) {
            (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
            (Ok(entry), Ok(())) => entry.commit().await.map_err(|error| refuse(&error)),
        };
        match &done {
            Ok(_) => intake.counters.stored.add(),
            Err(refusal) if refusal.status == Status::OutOfResources => {
                intake.counters.refused_room.add();
                if intake.refusal_said.is_due(Instant::now()) {
                    tracing::warn!(why = refusal.comment, "objects are refused");
                }
            }
            Err(_) => intake.counters.refused_object.add(),
        }
        (self.request, done)
    }
}

/// What the peer is told of a fault of the spool.
fn refuse(error: &SpoolError) -> Refusal {
    match error {
        SpoolError::TooLarge { .. } => {
            Refusal::new(Status::NotAuthorized, "object is larger than allowed here")
        }
        SpoolError::Header => Refusal::new(Status::CannotUnderstand, "UID too long"),
        SpoolError::Quota { .. } | SpoolError::DiskFull { .. } | SpoolError::TooMany => {
            Refusal::new(Status::OutOfResources, "no room for more objects")
        }
        // The watermark counts neither inodes nor what was written since it was looked at.
        SpoolError::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => Refusal::new(
            Status::OutOfResources,
            "the disk has no more blocks or inodes",
        ),
        _ => {
            tracing::error!(%error, "object not stored");
            Refusal::new(Status::OutOfResources, "the medium failed")
        }
    }
}

fn check_command(request: &Request, context: &Context) -> Result<(), Refusal> {
    if request.sop_class_uid != context.class.uid {
        let comment = "SOP class is not the presentation context's";
        return Err(Refusal::new(Status::DataSetMismatch, comment));
    }
    if Uid::new(&request.sop_instance_uid).is_err() {
        let comment = "Affected SOP Instance UID is no UID";
        return Err(Refusal::new(Status::CannotUnderstand, comment));
    }
    Ok(())
}

/// Compares what the data set says of itself with the command.
fn check_data_set(head: &[u8], transfer_syntax: &str, request: &Request) -> Result<(), Refusal> {
    if head.is_empty() {
        return Err(Refusal::new(Status::CannotUnderstand, "data set is empty"));
    }
    if transfer_syntax == DEFLATED {
        return Ok(());
    }
    let elements = Elements {
        rest: head,
        is_explicit: transfer_syntax != IMPLICIT_LITTLE,
        is_big: transfer_syntax == EXPLICIT_BIG,
    };
    let mut found = [None; 2];
    let mut last = None;
    for element in elements {
        let Element { tag, value } = element.ok_or(Refusal::new(
            Status::CannotUnderstand,
            "data set does not begin with elements in order",
        ))?;
        if last.is_some_and(|last| tag <= last) {
            return Err(Refusal::new(
                Status::CannotUnderstand,
                "data set does not begin with elements in order",
            ));
        }
        last = Some(tag);
        match tag {
            SOP_CLASS => found[0] = Some(value),
            SOP_INSTANCE => found[1] = Some(value),
            _ if tag > SOP_INSTANCE => break,
            _ => {}
        }
    }
    let wanted = [&request.sop_class_uid, &request.sop_instance_uid];
    for (found, wanted) in found.iter().zip(wanted) {
        if found.is_some_and(|found| found.trim_ascii_end() != wanted.as_bytes()) {
            let comment = "data set and command name different objects";
            return Err(Refusal::new(Status::DataSetMismatch, comment));
        }
    }
    Ok(())
}

/// Walks the first elements of a data set as far as whole ones reach.
struct Elements<'a> {
    rest: &'a [u8],
    is_explicit: bool,
    is_big: bool,
}

struct Element<'a> {
    tag: u32,
    value: &'a [u8],
}

impl<'a> Iterator for Elements<'a> {
    /// `None` within: what follows is no element.
    type Item = Option<Element<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let (head, tail) = self.rest.split_first_chunk::<8>()?;
        let u16_of = |bytes: [u8; 2]| {
            if self.is_big {
                u16::from_be_bytes(bytes)
            } else {
                u16::from_le_bytes(bytes)
            }
        };
        let u32_of = |bytes: [u8; 4]| {
            if self.is_big {
                u32::from_be_bytes(bytes)
            } else {
                u32::from_le_bytes(bytes)
            }
        };
        let group = u16_of([head[0], head[1]]);
        let tag = u32::from(group) << 16 | u32::from(u16_of([head[2], head[3]]));
        let (length, tail) = if !self.is_explicit {
            (u32_of([head[4], head[5], head[6], head[7]]), tail)
        } else if !(head[4].is_ascii_uppercase() && head[5].is_ascii_uppercase()) {
            self.rest = &[];
            return Some(None);
        } else if is_long(&head[4..6]) {
            let (length, tail) = tail.split_first_chunk::<4>()?;
            (u32_of(*length), tail)
        } else {
            (u32::from(u16_of([head[6], head[7]])), tail)
        };
        if group < 8 {
            self.rest = &[];
            return Some(None);
        }
        // A value that reaches beyond the head, an undefined length too, ends the walk.
        let (value, rest) = tail.split_at_checked(usize::try_from(length).ok()?)?;
        self.rest = rest;
        let value = match value {
            [value @ .., 0] => value,
            value => value,
        };
        Some(Some(Element { tag, value }))
    }
}

/// VRs with a length of four bytes, PS3.5 section 7.1.2.
fn is_long(vr: &[u8]) -> bool {
    matches!(
        vr,
        b"OB"
            | b"OD"
            | b"OF"
            | b"OL"
            | b"OV"
            | b"OW"
            | b"SQ"
            | b"SV"
            | b"UC"
            | b"UN"
            | b"UR"
            | b"UT"
            | b"UV"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const CT: &str = "1.2.840.10008.5.1.4.1.1.2";

    fn explicit(elements: &[(u16, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (element, value) in elements {
            let mut value = value.as_bytes().to_vec();
            value.resize(value.len().next_multiple_of(2), 0);
            bytes.extend_from_slice(&[8, 0]);
            bytes.extend_from_slice(&element.to_le_bytes());
            bytes.extend_from_slice(b"UI");
            bytes.extend_from_slice(&u16::try_from(value.len()).unwrap().to_le_bytes());
            bytes.extend_from_slice(&value);
        }
        bytes
    }

    #[track_caller]
    fn check(head: &[u8], wanted: Option<Status>) {
        let request = Request {
            sop_class_uid: CT.to_owned(),
            sop_instance_uid: "1.2.3".to_owned(),
            ..Request::default()
        };
        let checked = check_data_set(head, "1.2.840.10008.1.2.1", &request);
        assert_eq!(checked.err().map(|refusal| refusal.status), wanted);
    }

    #[test]
    fn a_full_disk_is_named_and_said_once_a_minute() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let refusal = refuse(&SpoolError::Io(full));
        assert_eq!(refusal.status, Status::OutOfResources);
        assert!(refusal.comment.contains("inodes"));
        let (said, start) = (Said::default(), Instant::now());
        let due = [0, 1, 59, 60, 61, 120].map(|s| said.is_due(start + Duration::from_secs(s)));
        assert_eq!(due, [true, false, false, true, false, true]);
    }

    #[test]
    fn data_set_of_the_object_in_the_command_is_taken() {
        check(&explicit(&[(0x16, CT), (0x18, "1.2.3"), (0x20, "x")]), None);
    }

    #[test]
    fn data_set_of_another_object_is_a_mismatch() {
        let mismatch = Some(Status::DataSetMismatch);
        check(&explicit(&[(0x16, "1.2.3"), (0x18, "1.2.3")]), mismatch);
        check(&explicit(&[(0x16, CT), (0x18, "1.2.4")]), mismatch);
    }

    #[test]
    fn bytes_that_are_no_data_set_cannot_be_understood() {
        let not_understood = Some(Status::CannotUnderstand);
        check(b"", not_understood);
        check(b"GET / HTTP/1.1\r\n\r\n", not_understood);
        check(&explicit(&[(0x18, "1.2.3"), (0x16, CT)]), not_understood);
    }
}
