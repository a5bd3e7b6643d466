//! DIMSE command sets: requests that are read, responses that are written (PS3.7 section 9.3, annex E).
//!
//! Command sets are Implicit VR Little Endian whatever was negotiated, and hold only group 0000.

use super::admit::trim_uid;

/// Largest command set; ours and those of all known peers have less than 1 KiB.
pub(super) const MAX_COMMAND_BYTES: usize = 16 << 10;
/// Command Data Set Type that says: no data set.
const NO_DATA_SET: u16 = 0x0101;

/// Command Field values, PS3.7 annex E.1.
pub(super) mod field {
    /// C-STORE-RQ.
    pub(in super::super) const STORE: u16 = 0x0001;
    /// N-EVENT-REPORT-RQ.
    pub(in super::super) const EVENT_REPORT: u16 = crate::commitment::EVENT_REPORT;
    /// N-ACTION-RQ.
    pub(in super::super) const ACTION: u16 = crate::commitment::ACTION;
    /// C-ECHO-RQ.
    pub(in super::super) const ECHO: u16 = 0x0030;
    /// C-CANCEL-RQ; has no response.
    pub(in super::super) const CANCEL: u16 = 0x0fff;
    /// This bit makes a request's field its response's.
    pub(in super::super) const RESPONSE: u16 = 0x8000;
}

/// A request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    /// (0000,0100).
    pub(super) field: u16,
    /// (0000,0110); of a response, the message that it answers (0000,0120).
    pub(super) message_id: u16,
    /// Whether a data set follows, from (0000,0800).
    pub(super) has_data_set: bool,
    /// Affected (0000,0002) or Requested (0000,0003) SOP Class UID.
    pub(super) sop_class_uid: String,
    /// Action (0000,1008) or Event Type ID (0000,1002).
    pub(super) type_id: u16,
    /// (0000,0900) of a response.
    pub(super) status: u16,
    /// Affected (0000,1000) or Requested (0000,1001) SOP Instance UID.
    pub(super) sop_instance_uid: String,
}

/// Status of a response, PS3.7 annex C and PS3.4 section B.2.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Success.
    Success = 0x0000,
    /// Processing failure.
    ProcessingFailure = 0x0110,
    /// No such SOP instance.
    NoSuchInstance = 0x0112,
    /// No such event type.
    NoSuchEventType = 0x0113,
    /// Invalid argument value.
    InvalidArgument = 0x0115,
    /// No such SOP class.
    NoSuchSopClass = 0x0118,
    /// SOP class not supported: the context's class has no such service.
    SopClassNotSupported = 0x0122,
    /// No such action type.
    NoSuchActionType = 0x0123,
    /// Not authorised: our policy for single objects, their size.
    NotAuthorized = 0x0124,
    /// Unrecognised operation.
    UnrecognizedOperation = 0x0211,
    /// Resource limitation.
    ResourceLimitation = 0x0213,
    /// Refused: out of resources.
    OutOfResources = 0xa700,
    /// Data set does not match SOP class.
    DataSetMismatch = 0xa900,
    /// Cannot understand.
    CannotUnderstand = 0xc000,
}

/// Reads a command set; `None` where it is none.
pub(super) fn parse(bytes: &[u8]) -> Option<Request> {
    let mut request = Request::default();
    let mut data_set_type = None;
    let mut field = None;
    let mut rest = bytes;
    while !rest.is_empty() {
        let (head, tail) = rest.split_first_chunk::<8>()?;
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let (value, tail) = tail.split_at_checked(usize::try_from(length).ok()?)?;
        rest = tail;
        if (head[0], head[1]) != (0, 0) {
            return None;
        }
        match u16::from_le_bytes([head[2], head[3]]) {
            0x0002 | 0x0003 => request.sop_class_uid = uid(value)?,
            0x0100 => field = Some(number(value)?),
            0x0110 | 0x0120 => request.message_id = number(value)?,
            0x0800 => data_set_type = Some(number(value)?),
            0x0900 => request.status = number(value)?,
            0x1002 | 0x1008 => request.type_id = number(value)?,
            0x1000 | 0x1001 => request.sop_instance_uid = uid(value)?,
            _ => {}
        }
    }
    request.field = field?;
    request.has_data_set = data_set_type? != NO_DATA_SET;
    Some(request)
}

/// The response to a request.
pub(super) fn response(request: &Request, status: Status, comment: &str) -> Vec<u8> {
    let mut elements = Vec::with_capacity(256);
    if !request.sop_class_uid.is_empty() {
        push(&mut elements, 0x0002, request.sop_class_uid.as_bytes(), 0);
    }
    let number = |elements: &mut Vec<u8>, element, value: u16| {
        push(elements, element, &value.to_le_bytes(), 0);
    };
    number(&mut elements, 0x0100, request.field | field::RESPONSE);
    number(&mut elements, 0x0120, request.message_id);
    number(&mut elements, 0x0800, NO_DATA_SET);
    number(&mut elements, 0x0900, status as u16);
    if !comment.is_empty() {
        let most = comment.len().min(64);
        push(&mut elements, 0x0902, &comment.as_bytes()[..most], b' ');
    }
    if !request.sop_instance_uid.is_empty() {
        push(
            &mut elements,
            0x1000,
            request.sop_instance_uid.as_bytes(),
            0,
        );
    }
    let mut command = Vec::with_capacity(elements.len() + 12);
    let length = u32::try_from(elements.len()).unwrap_or(0);
    push(&mut command, 0x0000, &length.to_le_bytes(), 0);
    command.extend_from_slice(&elements);
    command
}

fn push(command: &mut Vec<u8>, element: u16, value: &[u8], padding: u8) {
    let padded = value.len().next_multiple_of(2);
    command.extend_from_slice(&[0, 0]);
    command.extend_from_slice(&element.to_le_bytes());
    command.extend_from_slice(&u32::try_from(padded).unwrap_or(0).to_le_bytes());
    command.extend_from_slice(value);
    if padded > value.len() {
        command.push(padding);
    }
}

fn number(value: &[u8]) -> Option<u16> {
    value.try_into().ok().map(u16::from_le_bytes)
}

/// A UID of at most 64 characters, its padding removed. What it holds is checked where it is used.
fn uid(value: &[u8]) -> Option<String> {
    let text = trim_uid(std::str::from_utf8(value).ok()?);
    (text.len() <= 64).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request {
            field: field::STORE,
            message_id: 9,
            has_data_set: false,
            sop_class_uid: "1.2.840.10008.5.1.4.1.1.2".to_owned(),
            sop_instance_uid: "1.2.3".to_owned(),
            ..Request::default()
        }
    }

    #[test]
    fn response_names_the_request_and_is_even() {
        let bytes = response(&request(), Status::OutOfResources, "no room");
        let read = parse(&bytes).unwrap();
        assert_eq!(read.field, 0x8001);
        assert_eq!(read.sop_instance_uid, "1.2.3");
        assert!(!read.has_data_set);
        assert_eq!(bytes.len() % 2, 0);
        assert_eq!(
            bytes[8..12],
            u32::try_from(bytes.len() - 12).unwrap().to_le_bytes()
        );
    }

    #[test]
    fn command_cut_anywhere_is_none_or_lacks_its_field() {
        let bytes = response(&request(), Status::Success, "");
        for length in 0..bytes.len() {
            if let Some(read) = parse(&bytes[..length]) {
                assert_eq!(read.field, 0x8001, "cut at {length}");
            }
        }
        assert_eq!(parse(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]), None);
        assert_eq!(parse(&[8, 0, 0, 1, 0, 0, 0, 0]), None);
    }
}
