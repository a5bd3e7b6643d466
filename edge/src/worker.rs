//! The worker: the process in which foreign bytes are parsed and decoded.
//!
//! In, on standard input: objects as [`crate::wire`] frames them. Out, on standard output: facts, tensors, reasons. Before the
//! first byte is read the process limits itself: address space, processor time, no core file, no file may be
//! written, killed with its parent; parsing runs on a thread whose stack has a known size. What breaks a
//! limit ends the process, and [`crate::supervisor`] notices. Before the first object it [confines](crate::confinement) itself to its two streams. What the bytes mean is `shared::dicom`'s business.

use std::cell::RefCell;
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

/// Most bytes of an object: what is scanned. Of it only headers and one frame are ever in memory.
pub(crate) const MAX_OBJECT_BYTES: u64 = dicom::prescan::MAX_OBJECT_BYTES as u64;
/// Address space of the worker in bytes: one frame, a decoder's buffers, positions of the object's parts, the program itself.
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
    let mut pipe = Pipe {
        input: io::stdin().lock(),
        output: io::BufWriter::with_capacity(TENSOR_BYTES, io::stdout().lock()),
        payload: Vec::new(),
    };
    let Some(Kind::Spec) = pipe.receive()? else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let spec: PreprocessSpec = serde_json::from_slice(&pipe.payload)?;
    let mut preprocessor = Preprocessor::new(&spec).map_err(io::Error::other)?;
    let mut tensor = vec![0; TENSOR_BYTES];
    // From here on there is nothing but the two streams and memory.
    confinement::confine()?;
    while let Some((n_bytes, first_frame)) = pipe.begin()? {
        let distant = Distant {
            n_bytes,
            pipe: RefCell::new(pipe),
            failure: RefCell::new(None),
        };
        object(&distant, first_frame, &mut preprocessor, &mut tensor)?;
        if let Some(failure) = distant.failure.into_inner() {
            return Err(failure);
        }
        pipe = distant.pipe.into_inner();
    }
    Ok(())
}

/// Answers for one object.
fn object(
    distant: &Distant<impl Read, impl Write>,
    first_frame: u32,
    preprocessor: &mut Preprocessor,
    tensor: &mut [u8],
) -> io::Result<()> {
    match dicom::read_from(distant) {
        Ok(object) => {
            distant.send_json(Kind::Object, &object_facts(&object))?;
            // Whose slice it is must be known also where decoding it ends this process.
            distant.pipe.borrow_mut().output.flush()?;
            for frame_index in first_frame..object.n_frames() {
                match slice(&object, frame_index, preprocessor, tensor) {
                    Ok(facts) => {
                        distant.send_json(Kind::Slice, &facts)?;
                        distant.send(Kind::Tensor, tensor)?;
                    }
                    Err(reason) => distant.send_json(Kind::SliceRefused, &reason)?,
                }
                distant.pipe.borrow_mut().output.flush()?;
            }
        }
        Err(error) => {
            let refused = Refused {
                reason: Reason::new(error.code(), error.to_string()),
                facts: dicom::identify(distant).map(|(identity, copied)| facts(&identity, copied)),
            };
            distant.send_json(Kind::ObjectRefused, &refused)?;
        }
    }
    distant.send(Kind::Done, &[])?;
    distant.pipe.borrow_mut().output.flush()
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

/// The two streams.
struct Pipe<R, W> {
    input: R,
    output: W,
    /// Of the frame that was received last.
    payload: Vec<u8>,
}

impl<R: Read, W: Write> Pipe<R, W> {
    /// The next object's bytes and the first frame wanted; `None` at the end of the input.
    fn begin(&mut self) -> io::Result<Option<(usize, u32)>> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        match self.receive()? {
            Some(Kind::Begin) => {}
            Some(_) => return Err(invalid()),
            None => return Ok(None),
        }
        let n_bytes = self.payload.as_slice().try_into().map(u64::from_le_bytes);
        let n_bytes = usize::try_from(n_bytes.map_err(|_| invalid())?).map_err(|_| invalid())?;
        let Some(Kind::Go) = self.receive()? else {
            return Err(invalid());
        };
        let first_frame = self.payload.as_slice().try_into().map(u32::from_le_bytes);
        Ok(Some((n_bytes, first_frame.map_err(|_| invalid())?)))
    }

    /// The next frame's kind, its payload in `payload`; `None` at the end of the input.
    fn receive(&mut self) -> io::Result<Option<Kind>> {
        let mut header = [0; wire::HEADER_BYTES];
        match self.input.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let (kind, n_bytes) = wire::parse_header(header)?;
        self.payload.resize(n_bytes, 0);
        self.input.read_exact(&mut self.payload)?;
        Ok(Some(kind))
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        self.output.write_all(&wire::header(kind, payload.len()))?;
        self.output.write_all(payload)
    }

    /// Asks for bytes of the object. Whether all of them came.
    fn ask(&mut self, offset: usize, buffer: &mut [u8]) -> io::Result<bool> {
        let mut at = offset as u64;
        for part in buffer.chunks_mut(wire::MAX_PAYLOAD_BYTES) {
            let n_bytes = u32::try_from(part.len()).map_err(io::Error::other)?;
            self.send(Kind::Want, &wire::want(at, n_bytes))?;
            self.output.flush()?;
            let Some(Kind::Chunk) = self.receive()? else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            if self.payload.len() != part.len() {
                return Ok(false);
            }
            part.copy_from_slice(&self.payload);
            at += part.len() as u64;
        }
        Ok(true)
    }
}

/// The object at the other end of the pipe.
struct Distant<R, W> {
    n_bytes: usize,
    pipe: RefCell<Pipe<R, W>>,
    /// What broke the pipe.
    failure: RefCell<Option<io::Error>>,
}

impl<R: Read, W: Write> Distant<R, W> {
    fn send_json(&self, kind: Kind, value: &impl serde::Serialize) -> io::Result<()> {
        self.send(kind, &serde_json::to_vec(value)?)
    }

    fn send(&self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        self.pipe.borrow_mut().send(kind, payload)
    }
}

impl<R: Read, W: Write> dicom::Source for Distant<R, W> {
    fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    fn read_at(&self, offset: usize, buffer: &mut [u8]) -> bool {
        let asked = self.pipe.borrow_mut().ask(offset, buffer);
        asked.unwrap_or_else(|error| {
            self.failure.borrow_mut().get_or_insert(error);
            false
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
        [&wire::header(kind, payload.len())[..], payload].concat()
    }

    fn distant(input: &[u8], n_bytes: usize) -> Distant<&[u8], Vec<u8>> {
        Distant {
            n_bytes,
            pipe: RefCell::new(Pipe {
                input,
                output: Vec::new(),
                payload: Vec::new(),
            }),
            failure: RefCell::new(None),
        }
    }

    #[test]
    fn bytes_are_asked_for_where_they_are_needed() {
        let input = frame(Kind::Chunk, b"def");
        let distant = distant(&input, 9);
        let mut buffer = [0; 3];
        assert!(dicom::Source::read_at(&distant, 3, &mut buffer));
        assert_eq!(&buffer, b"def");
        let asked = distant.pipe.into_inner().output;
        assert_eq!(asked, frame(Kind::Want, &wire::want(3, 3)));
    }

    #[test]
    fn a_short_answer_is_no_bytes_and_a_broken_pipe_is_remembered() {
        let input = frame(Kind::Chunk, b"d");
        let distant = distant(&input, 9);
        assert!(!dicom::Source::read_at(&distant, 3, &mut [0; 3]));
        assert!(distant.failure.borrow().is_none());
        assert!(!dicom::Source::read_at(&distant, 3, &mut [0; 3]));
        assert!(distant.failure.borrow().is_some());
    }

    #[test]
    fn an_object_begins_with_its_size_and_the_first_frame() {
        let begin = [
            frame(Kind::Begin, &5_u64.to_le_bytes()),
            frame(Kind::Go, &7_u32.to_le_bytes()),
        ];
        let input = begin.concat();
        let mut pipe = distant(&input, 0).pipe.into_inner();
        assert_eq!(pipe.begin().unwrap(), Some((5, 7)));
        assert_eq!(pipe.begin().unwrap(), None);
    }
}
