//! The worker: the process in which foreign bytes are parsed and decoded.
//!
//! In, on standard input: objects as [`crate::wire`] frames them. Out, on standard output: facts, tensors, reasons. Before the
//! first byte is read the process limits itself: address space, processor time, no core file, no file may be
//! written, killed with its parent; parsing runs on a thread whose stack has a known size. What breaks a
//! limit ends the process, and [`crate::supervisor`] notices. Before the first object it [confines](crate::confinement) itself to its two streams. What the bytes mean is `shared::dicom`'s business.

use std::io::{self, Read, Write};
use std::process::ExitCode;

use rustix::process::{Resource, Rlimit, Signal};
use shared::TENSOR_BYTES;
use shared::dicom::{self, CopiedElement, Identity, Object, Slice};
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;

use crate::confinement;
use crate::result::Element;
use crate::wire::{self, Kind, ObjectFacts, Reason, Refused, SliceFacts};

/// Most bytes of an object.
pub(crate) const MAX_OBJECT_BYTES: u64 = 144 << 20;
/// Address space of the worker in bytes: the object, one frame of it, a decoder's buffers, the program itself.
pub(crate) const ADDRESS_SPACE_BYTES: u64 = 272 << 20;
/// Stack of the parsing thread in bytes.
pub(crate) const STACK_BYTES: usize = 2 << 20;
/// Processor time of one worker in seconds; one that has used it up is replaced. A single object is bounded by the supervisor's deadline.
pub(crate) const CPU_SECONDS: u64 = 3_600;

/// Hexadecimal digits of a pixel digest.
const DIGEST_DIGITS: usize = 32;

/// Runs as the worker until standard input ends.
pub(crate) fn run() -> ExitCode {
    let worked = limit_process().and_then(|()| {
        let thread = std::thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(serve)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("panic")))
    });
    match worked {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn limit_process() -> io::Result<()> {
    let fixed = |resource, value| {
        let limit = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        rustix::process::setrlimit(resource, limit)
    };
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    fixed(Resource::Core, 0)?;
    fixed(Resource::Fsize, 0)?;
    fixed(Resource::As, ADDRESS_SPACE_BYTES)?;
    Ok(fixed(Resource::Cpu, CPU_SECONDS)?)
}

fn serve() -> io::Result<()> {
    let mut input = io::stdin().lock();
    let mut output = io::BufWriter::with_capacity(TENSOR_BYTES, io::stdout().lock());
    let mut payload = Vec::new();
    let Some(Kind::Spec) = read_frame(&mut input, &mut payload)? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let spec: PreprocessSpec = serde_json::from_slice(&payload)?;
    let mut preprocessor = Preprocessor::new(&spec).map_err(io::Error::other)?;
    let mut tensor = vec![0; TENSOR_BYTES];
    // From here on there is nothing but the two streams and memory.
    confinement::confine()?;
    while let Some((bytes, first_frame)) = read_object(&mut input, &mut payload)? {
        match dicom::read(&bytes) {
            Ok(object) => {
                send_json(&mut output, Kind::Object, &object_facts(&object))?;
                for frame_index in first_frame..object.n_frames() {
                    match slice(&object, frame_index, &mut preprocessor, &mut tensor) {
                        Ok(facts) => {
                            send_json(&mut output, Kind::Slice, &facts)?;
                            send(&mut output, Kind::Tensor, &tensor)?;
                        }
                        Err(reason) => send_json(&mut output, Kind::SliceRefused, &reason)?,
                    }
                    output.flush()?;
                }
            }
            Err(error) => {
                let refused = Refused {
                    reason: Reason::new(error.code(), error.to_string()),
                    facts: dicom::identify(&bytes)
                        .map(|(identity, copied)| facts(&identity, copied)),
                };
                send_json(&mut output, Kind::ObjectRefused, &refused)?;
            }
        }
        send(&mut output, Kind::Done, &[])?;
        output.flush()?;
    }
    Ok(())
}

fn object_facts(object: &Object<'_>) -> ObjectFacts {
    ObjectFacts {
        n_frames: object.n_frames(),
        is_multi_frame: object.is_multi_frame(),
        ..facts(object.identity(), object.copied())
    }
}

/// The facts of an object of which no frame is known.
fn facts(identity: &Identity, copied: Vec<CopiedElement>) -> ObjectFacts {
    let elements = copied.into_iter().map(|element| Element {
        tag: element.tag,
        vr: element.vr.to_owned(),
        value: element.value,
    });
    ObjectFacts {
        study_uid: identity.study_uid.clone(),
        series_uid: identity.series_uid.clone(),
        sop_uid: identity.sop_uid.clone(),
        sop_class: identity.sop_class.clone(),
        elements: elements.collect(),
        n_frames: 0,
        is_multi_frame: false,
    }
}

/// One frame to `tensor`.
fn slice(
    object: &Object<'_>,
    frame_index: u32,
    preprocessor: &mut Preprocessor,
    tensor: &mut [u8],
) -> Result<SliceFacts, Reason> {
    let slice = object
        .frame(frame_index)
        .map_err(|refusal| Reason::new(refusal.code(), refusal.to_string()))?;
    preprocessor
        .tensor(&slice.pixels(), tensor)
        .map_err(|error| Reason::new("pixels", error.to_string()))?;
    Ok(slice_facts(&slice))
}

fn slice_facts(slice: &Slice) -> SliceFacts {
    let attributes = &slice.attributes;
    let is = |index: usize, word: &str| {
        let value = attributes.image_type.get(index);
        value.is_some_and(|value| value == word)
    };
    SliceFacts {
        z_mm: attributes.z_mm,
        thickness_mm: attributes.slice_thickness_mm,
        acquisition_number: attributes.acquisition_number,
        image_type: attributes.image_type.join("\\"),
        kernel: attributes.convolution_kernel.clone(),
        orientation: attributes.orientation,
        pixel_digest: pixel_digest(slice),
        is_original_primary: is(0, "ORIGINAL") && is(1, "PRIMARY"),
        is_lossy: attributes.is_lossy,
        size: [slice.rows, slice.columns],
    }
}

/// Digest of what the network sees of a slice, before any rounding: stored values, their format and padding, slope and intercept.
fn pixel_digest(slice: &Slice) -> String {
    let mut digest = blake3::Hasher::new();
    let format = &slice.format;
    let shape = format!(
        "{} {} {format:?} {:?} {:016x} {:016x} ",
        slice.rows,
        slice.columns,
        slice.padding,
        slice.rescale.slope.to_bits(),
        slice.rescale.intercept.to_bits()
    );
    digest.update(shape.as_bytes()).update(&slice.pixels);
    let digest = digest.finalize().to_hex();
    digest[..DIGEST_DIGITS].to_owned()
}

/// One whole object and the first frame wanted; `None` at the end of the input.
fn read_object(input: &mut impl Read, payload: &mut Vec<u8>) -> io::Result<Option<(Vec<u8>, u32)>> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    match read_frame(input, payload)? {
        Some(Kind::Begin) => {}
        Some(_) => return Err(invalid()),
        None => return Ok(None),
    }
    let size = payload.as_slice().try_into().map(u64::from_le_bytes);
    let size = size.map_err(|_| invalid())?.min(MAX_OBJECT_BYTES);
    let size = usize::try_from(size).map_err(|_| invalid())?;
    let mut bytes = Vec::with_capacity(size);
    loop {
        match read_frame(input, payload)? {
            Some(Kind::Chunk) if bytes.len() + payload.len() <= size => {
                bytes.extend_from_slice(payload);
            }
            Some(Kind::Go) => break,
            _ => return Err(invalid()),
        }
    }
    let first_frame = payload.as_slice().try_into().map(u32::from_le_bytes);
    Ok(Some((bytes, first_frame.map_err(|_| invalid())?)))
}

/// The next frame's kind, its payload in `payload`; `None` at the end of the input.
fn read_frame(input: &mut impl Read, payload: &mut Vec<u8>) -> io::Result<Option<Kind>> {
    let mut header = [0; wire::HEADER_BYTES];
    match input.read_exact(&mut header) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let (kind, n_bytes) = wire::parse_header(header)?;
    payload.resize(n_bytes, 0);
    input.read_exact(payload)?;
    Ok(Some(kind))
}

fn send_json(output: &mut impl Write, kind: Kind, value: &impl serde::Serialize) -> io::Result<()> {
    send(output, kind, &serde_json::to_vec(value)?)
}

fn send(output: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    output.write_all(&wire::header(kind, payload.len()))?;
    output.write_all(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        send(&mut bytes, kind, payload).unwrap();
        bytes
    }

    #[test]
    fn an_object_is_put_together_from_its_chunks() {
        let input = [
            frame(Kind::Begin, &5_u64.to_le_bytes()),
            frame(Kind::Chunk, b"abc"),
            frame(Kind::Chunk, b"de"),
            frame(Kind::Go, &7_u32.to_le_bytes()),
        ]
        .concat();
        let (bytes, first) = read_object(&mut input.as_slice(), &mut Vec::new())
            .unwrap()
            .unwrap();
        assert_eq!((bytes.as_slice(), first), (&b"abcde"[..], 7));
        assert!(
            read_object(&mut io::empty(), &mut Vec::new())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn an_object_longer_than_announced_is_a_fault() {
        let input = [
            frame(Kind::Begin, &2_u64.to_le_bytes()),
            frame(Kind::Chunk, &[0; 4096]),
        ]
        .concat();
        assert!(read_object(&mut input.as_slice(), &mut Vec::new()).is_err());
    }
}
