//! The supervisor: keeps one worker process alive and gives every object an answer or a reason.
//!
//! In: an open file. Out, through a callback: the object's facts, then each frame's facts and tensor or its reason. A worker
//! that dies, is silent past its deadline or answers nonsense is replaced, and its object is tried once more from the frame
//! that was being worked on; then the rest of the object gets a reason with the code `worker`. The callback may block: deadlines run
//! only while the worker is waited for. What the bytes mean is left to [`crate::worker`].

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use rustix::process::Pid;
use shared::TENSOR_BYTES;
use shared::spec::PreprocessSpec;

use crate::launch::Launch;
use crate::watchdog::Watchdog;
use crate::wire::{self, Kind, ObjectFacts, Reason, Refused, SliceFacts};

/// Number of the signal that cannot be caught (signal(7)).
const SIGKILL: i32 = 9;
/// How often an object is given to a worker.
const MAX_ATTEMPTS: usize = 2;

/// How to start a worker, and how long it may be silent.
#[derive(Clone, Debug)]
pub(crate) struct WorkerCommand {
    /// The program.
    pub(crate) launch: Launch,
    /// Its arguments.
    pub(crate) arguments: Vec<OsString>,
    /// Longest silence while a chunk, an object's facts or a frame is waited for.
    pub(crate) deadline: Duration,
}

/// Where an object lies: a whole file, or a part of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    /// The file.
    pub(crate) file: &'a File,
    /// Where in it the object begins.
    pub(crate) offset: u64,
    /// Bytes of the object.
    pub(crate) bytes: u64,
}

/// What comes out of an object.
#[derive(Debug)]
pub(crate) enum Event {
    /// The object was read. Comes at most once, before its slices.
    Object(ObjectFacts),
    /// The object cannot be read.
    ObjectRefused(Refused),
    /// The frame `frame_index`, from 0, in order.
    Slice(u32, Result<Box<Tensor>, Reason>),
}

/// A slice that is ready for the network.
#[derive(Debug)]
pub(crate) struct Tensor {
    /// What series assembly needs.
    pub(crate) facts: SliceFacts,
    /// u8 `[3, 256, 256]`.
    pub(crate) bytes: Vec<u8>,
}

/// The receiver of events wants no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stop;

/// Receives events.
pub(crate) type Deliver<'a> = dyn FnMut(Event) -> Result<(), Stop> + 'a;

/// One supervised worker.
#[derive(Debug)]
pub(crate) struct Supervisor {
    command: WorkerCommand,
    spec: Vec<u8>,
    worker: Option<Worker>,
    n_replaced: u64,
}

/// How far an object has come, over all attempts.
#[derive(Debug, Default)]
struct Progress {
    object: Option<ObjectFacts>,
    next_frame: u32,
}

#[derive(Debug)]
enum Failure {
    /// The file, not the worker, is at fault.
    Source(io::Error),
    /// The worker is at fault.
    Worker(String),
    Stopped,
}

impl From<Stop> for Failure {
    fn from(Stop: Stop) -> Self {
        Self::Stopped
    }
}

impl Supervisor {
    /// A supervisor whose workers preprocess by `spec`; the first is started with the first object.
    pub(crate) fn new(command: WorkerCommand, spec: &PreprocessSpec) -> Self {
        let spec = serde_json::to_vec(spec).expect("a spec holds finite numbers and no maps");
        Self {
            command,
            spec,
            worker: None,
            n_replaced: 0,
        }
    }

    /// Workers that had to be replaced.
    pub(crate) fn n_replaced(&self) -> u64 {
        self.n_replaced
    }

    /// Whether the worker at hand has confined itself (proc(5): Seccomp is 2); `None` where there is no worker or the system does not tell.
    pub(crate) fn is_confined(&self) -> Option<bool> {
        let process = self.worker.as_ref()?.child.id();
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let mut lines = status.lines();
        let seccomp = lines.find_map(|line| line.strip_prefix("Seccomp:"))?;
        Some(seccomp.trim() == "2")
    }

    /// Has one object analysed, from the frame `first_frame` (from 0) on.
    ///
    /// # Errors
    /// [`Stop`] where `deliver` said so.
    pub(crate) fn analyse(
        &mut self,
        source: Source<'_>,
        first_frame: u32,
        deliver: &mut Deliver<'_>,
    ) -> Result<(), Stop> {
        let mut progress = Progress {
            next_frame: first_frame,
            ..Progress::default()
        };
        let mut fault = String::new();
        for _ in 0..MAX_ATTEMPTS {
            match self.attempt(source, &mut progress, deliver) {
                Ok(()) => return Ok(()),
                Err(Failure::Stopped) => {
                    self.worker = None;
                    return Err(Stop);
                }
                Err(Failure::Source(error)) => {
                    self.worker = None;
                    let reason = Reason::new("unreadable", error.to_string());
                    return refuse_rest(&progress, &reason, deliver);
                }
                Err(Failure::Worker(text)) => {
                    fault = match self.worker.take().map(Worker::end) {
                        Some(Some(ended)) => ended,
                        _ => text,
                    };
                    self.n_replaced += 1;
                }
            }
        }
        if progress.object.is_none() {
            self.identify(source, &mut progress, deliver)?;
        }
        let text = format!("the worker {fault}; tried {MAX_ATTEMPTS} times");
        refuse_rest(&progress, &Reason::new("worker", text), deliver)
    }

    /// Asks a last time for nothing but whose object it is, so that what is missing is missing from a known study.
    fn identify(
        &mut self,
        source: Source<'_>,
        progress: &mut Progress,
        deliver: &mut Deliver<'_>,
    ) -> Result<(), Stop> {
        let first_frame = std::mem::replace(&mut progress.next_frame, u32::MAX);
        let done = self.attempt(source, progress, deliver);
        progress.next_frame = first_frame;
        self.worker = None;
        match done {
            Err(Failure::Stopped) => Err(Stop),
            // A failure leaves the object unknown; without one it is known, and none of its frames was asked for.
            Err(Failure::Source(_) | Failure::Worker(_)) | Ok(()) => Ok(()),
        }
    }

    fn attempt(
        &mut self,
        source: Source<'_>,
        progress: &mut Progress,
        deliver: &mut Deliver<'_>,
    ) -> Result<(), Failure> {
        let worker = match &mut self.worker {
            Some(worker) => worker,
            empty => {
                let worker = empty.insert(Worker::start(&self.command)?);
                worker.send(Kind::Spec, &self.spec)?;
                worker
            }
        };
        worker.send(Kind::Begin, &source.bytes.to_le_bytes())?;
        worker.send(Kind::Go, &progress.next_frame.to_le_bytes())?;
        loop {
            let (kind, payload) = worker.receive()?;
            match kind {
                Kind::Want => worker.send_bytes(source, &payload)?,
                Kind::Object => {
                    let object: ObjectFacts = parse(&payload)?;
                    if progress.object.is_none() {
                        deliver(Event::Object(object.clone()))?;
                        progress.object = Some(object);
                    }
                }
                Kind::ObjectRefused if progress.object.is_none() => {
                    deliver(Event::ObjectRefused(parse(&payload)?))?;
                }
                Kind::Slice => {
                    let facts = parse(&payload)?;
                    let (Kind::Tensor, bytes) = worker.receive()? else {
                        return Err(malformed());
                    };
                    if bytes.len() != TENSOR_BYTES {
                        return Err(malformed());
                    }
                    let tensor = Box::new(Tensor { facts, bytes });
                    progress.slice(Ok(tensor), deliver)?;
                }
                Kind::SliceRefused => progress.slice(Err(parse(&payload)?), deliver)?,
                Kind::Done => return progress.finished(),
                _ => return Err(malformed()),
            }
        }
    }
}

impl Progress {
    fn slice(
        &mut self,
        slice: Result<Box<Tensor>, Reason>,
        deliver: &mut Deliver<'_>,
    ) -> Result<(), Failure> {
        match &self.object {
            Some(object) if self.next_frame < object.n_frames => {}
            _ => return Err(malformed()),
        }
        deliver(Event::Slice(self.next_frame, slice))?;
        self.next_frame += 1;
        Ok(())
    }

    fn finished(&self) -> Result<(), Failure> {
        match &self.object {
            Some(object) if self.next_frame != object.n_frames => Err(malformed()),
            _ => Ok(()),
        }
    }
}

/// Gives every frame that has no answer yet, or the object itself, the same reason.
fn refuse_rest(
    progress: &Progress,
    reason: &Reason,
    deliver: &mut Deliver<'_>,
) -> Result<(), Stop> {
    let Some(object) = &progress.object else {
        let reason = reason.clone();
        return deliver(Event::ObjectRefused(Refused {
            reason,
            facts: None,
        }));
    };
    (progress.next_frame..object.n_frames)
        .try_for_each(|frame| deliver(Event::Slice(frame, Err(reason.clone()))))
}

fn malformed() -> Failure {
    Failure::Worker("sent a malformed answer".into())
}

fn parse<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(payload).map_err(|_| malformed())
}

/// A running worker process.
#[derive(Debug)]
struct Worker {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    watchdog: Watchdog,
}

impl Worker {
    fn start(command: &WorkerCommand) -> Result<Self, Failure> {
        let cannot_start =
            |error: io::Error| Failure::Worker(format!("cannot be started: {error}"));
        let mut child = Command::new(&command.launch.program)
            .args(&command.launch.arguments)
            .args(&command.arguments)
            .env_clear()
            .envs(command.launch.environment.iter().cloned())
            // One heap: a second one would reserve address space that the limit counts.
            .env("MALLOC_ARENA_MAX", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(cannot_start)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(malformed());
        };
        let watchdog = Watchdog::start(Pid::from_child(&child), command.deadline);
        Ok(Self {
            watchdog: watchdog.map_err(cannot_start)?,
            child,
            input,
            output,
        })
    }

    /// Ends the process. How it ended, where it had done so by itself with a fault.
    fn end(mut self) -> Option<String> {
        // An error means that it has ended already.
        drop(self.child.kill());
        let status = self.child.wait().ok()?;
        match (status.signal(), status.code()) {
            // Killed: by us, or by somebody else; the failure at hand says more.
            (Some(SIGKILL), _) | (None, Some(0) | None) => None,
            (Some(signal), _) => Some(format!("was ended by signal {signal}")),
            (None, Some(code)) => Some(format!("ended with status {code}")),
        }
    }

    /// Answers a request for bytes of the object, within its bounds.
    fn send_bytes(&mut self, source: Source<'_>, request: &[u8]) -> Result<(), Failure> {
        let (offset, n_bytes) = wire::wanted(request).ok_or_else(malformed)?;
        let left = usize::try_from(source.bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut chunk = vec![0; n_bytes.min(left)];
        let mut filled = 0;
        while filled < chunk.len() {
            match source
                .file
                .read_at(&mut chunk[filled..], source.offset + offset + filled as u64)
            {
                // A file that has become shorter: the worker says what is missing.
                Ok(0) => break,
                Ok(n_read) => filled += n_read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Source(error)),
            }
        }
        self.send(Kind::Chunk, &chunk[..filled])
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Failure> {
        self.watchdog.arm();
        let header = wire::header(kind, payload.len());
        let sent = self
            .input
            .write_all(&header)
            .and_then(|()| self.input.write_all(payload));
        self.answered(&sent)
    }

    fn receive(&mut self) -> Result<(Kind, Vec<u8>), Failure> {
        self.watchdog.arm();
        let mut header = [0; wire::HEADER_BYTES];
        let received = self.output.read_exact(&mut header);
        self.answered(&received)?;
        let (kind, n_bytes) = wire::parse_header(header).map_err(|_| malformed())?;
        let mut payload = vec![0; n_bytes];
        self.watchdog.arm();
        let received = self.output.read_exact(&mut payload);
        self.answered(&received)?;
        Ok((kind, payload))
    }

    fn answered(&self, done: &io::Result<()>) -> Result<(), Failure> {
        let has_expired = self.watchdog.disarm();
        match done {
            Ok(()) => Ok(()),
            Err(_) if has_expired => Err(silent()),
            Err(_) => Err(Failure::Worker("was killed".into())),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Errors mean that it has ended and been waited for already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn silent() -> Failure {
    Failure::Worker("gave no answer within its deadline".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(path: &str) -> Launch {
        Launch {
            program: path.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// For a worker that never says more.
    const SHORT: Duration = Duration::from_millis(200);
    /// For a worker that says something first: on a busy machine a shell takes its time to start.
    const LONGER: Duration = Duration::from_secs(1);
    /// For a worker that ends by itself.
    const LONG: Duration = Duration::from_secs(120);

    /// The codes of what comes out when the worker is a shell script.
    fn outcome(script: &str, deadline: Duration) -> (Vec<String>, u64) {
        let command = WorkerCommand {
            launch: program("/bin/sh"),
            arguments: vec!["-c".into(), script.into()],
            deadline,
        };
        let mut supervisor = Supervisor::new(command, &PreprocessSpec::default());
        let mut source = tempfile::tempfile().unwrap();
        source.write_all(&[7; 300_000]).unwrap();
        let mut seen = Vec::new();
        let mut deliver = |event| {
            seen.push(match event {
                Event::Object(object) => format!("object {}", object.n_frames),
                Event::ObjectRefused(refused) => refused.reason.to_string(),
                Event::Slice(frame, slice) => format!("{frame}: {}", slice.unwrap_err()),
            });
            Ok(())
        };
        let source = Source {
            file: &source,
            offset: 0,
            bytes: 300_000,
        };
        supervisor.analyse(source, 0, &mut deliver).unwrap();
        (seen, supervisor.n_replaced())
    }

    #[track_caller]
    fn check(script: &str, deadline: Duration, expected: &[&str]) {
        let (seen, n_replaced) = outcome(script, deadline);
        assert_eq!(seen, expected);
        assert_eq!(n_replaced, 2);
    }

    #[test]
    fn a_worker_that_dies_is_replaced_once_and_then_the_object_has_a_reason() {
        check(
            "exit 3",
            LONG,
            &["worker: the worker ended with status 3; tried 2 times"],
        );
        check(
            "/bin/cat > /dev/null & /bin/sleep 0.05; kill -SEGV $$",
            LONG,
            &["worker: the worker was ended by signal 11; tried 2 times"],
        );
    }

    #[test]
    fn a_worker_that_hangs_is_replaced_and_then_the_object_has_a_reason() {
        let silent = "worker: the worker gave no answer within its deadline; tried 2 times";
        check("exec /bin/sleep 300", SHORT, &[silent]);
        check("exec 3>&1; exec /bin/cat > /dev/null", SHORT, &[silent]);
    }

    #[test]
    fn a_worker_that_answers_nonsense_is_replaced() {
        check(
            "echo nonsense; exec /bin/cat > /dev/null",
            LONG,
            &["worker: the worker sent a malformed answer; tried 2 times"],
        );
    }

    #[test]
    fn frames_that_were_not_reached_have_a_reason_each() {
        let facts = br#"{"study_uid":null,"series_uid":null,"sop_uid":null,"sop_class":null,"elements":[],"n_frames":2,"is_multi_frame":true}"#;
        let header = wire::header(Kind::Object, facts.len());
        let octal: String = header.iter().map(|byte| format!("\\{byte:03o}")).collect();
        let text = std::str::from_utf8(facts).unwrap();
        check(
            &format!("printf '{octal}%s' '{text}'; exec 3>&1; exec /bin/cat > /dev/null"),
            LONGER,
            &[
                "object 2",
                "0: worker: the worker gave no answer within its deadline; tried 2 times",
                "1: worker: the worker gave no answer within its deadline; tried 2 times",
            ],
        );
    }

    #[test]
    fn a_program_that_cannot_be_started_is_a_reason() {
        let command = WorkerCommand {
            launch: program("/nonexistent/worker"),
            arguments: Vec::new(),
            deadline: SHORT,
        };
        let mut supervisor = Supervisor::new(command, &PreprocessSpec::default());
        let mut seen = Vec::new();
        let mut deliver = |event| {
            seen.push(event);
            Ok(())
        };
        let source = Source {
            file: &tempfile::tempfile().unwrap(),
            offset: 0,
            bytes: 0,
        };
        supervisor.analyse(source, 0, &mut deliver).unwrap();
        assert!(
            matches!(&seen[..], [Event::ObjectRefused(refused)] if refused.reason.text.contains("cannot be started"))
        );
    }
}
