//! `edge classify`: files and folders in, a line for each slice and each study out.
//!
//! Two threads: intake walks the paths, has each file parsed by the supervised worker and hands tensors over; this one runs
//! the network, prints, and judges the studies at the end. Between them stand at most [`QUEUE_SLICES`] slices: when the network is
//! slower, intake waits. Results come in the order of the walk.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::OFlags;
use shared::TENSOR_BYTES;
use shared::spec::PreprocessSpec;

use crate::cli::ClassifyArgs;
use crate::exit::{Exit, Failure, failure};
use crate::heatmap;
use crate::launch::launch;
use crate::model::{ReadyModel, micros};
use crate::report::{self, Answer, ModelWords, SliceResult};
use crate::series::{Limits, SliceRecord, assemble};
use crate::study::judge;
use crate::supervisor::{Event, Source, Stop, Supervisor, Tensor, WorkerCommand};
use crate::tensor_file;
use crate::walk::{self, walk};
use crate::wire::{ObjectFacts, Reason};
use crate::worker::MAX_OBJECT_BYTES;

/// Slices that wait between intake and network.
const QUEUE_SLICES: usize = 4;
/// Slices of one run that are kept for the studies; later ones are refused.
pub(crate) const MAX_SLICES: usize = 1_000_000;
/// Longest silence of the worker.
const WORKER_DEADLINE: Duration = Duration::from_secs(10);

/// A slice, or a file that is none, on its way from intake to the network.
#[derive(Debug)]
struct Item {
    file: Arc<str>,
    object: Arc<ObjectFacts>,
    /// From 1; `None` for an object that is one slice.
    frame: Option<u32>,
    slice: Result<Box<Tensor>, Reason>,
}

/// Runs the command.
///
/// # Errors
/// Where the model cannot be used or results cannot be written. What is wrong with an input file is a result, not an error.
pub(crate) fn run(arguments: &ClassifyArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let ready = ReadyModel::load(arguments.model.model.as_deref(), &arguments.model.options())?;
    if arguments.heatmap.is_some() {
        can_explain(&ready).map_err(failure(Exit::Configuration))?;
    }
    for folder in [&arguments.tensors, &arguments.heatmap]
        .into_iter()
        .flatten()
    {
        fs::create_dir_all(folder)
            .with_context(|| format!("folder {}", folder.display()))
            .map_err(failure(Exit::CannotWrite))?;
    }
    let launch = launch()
        .context("the program's own path")
        .map_err(failure(Exit::FailedCheck))?;
    let command = WorkerCommand {
        launch,
        arguments: vec![crate::cli::WORKER_COMMAND.into()],
        deadline: WORKER_DEADLINE,
    };
    let (send, receive) = sync_channel(QUEUE_SLICES);
    std::thread::scope(|scope| {
        let spec = &ready.manifest.preprocess;
        scope.spawn(move || intake(&arguments.paths, command, spec, &send));
        analyse(arguments, &ready, receive, out)
    })
}

/// Whether the engine can say where an answer comes from.
fn can_explain(ready: &ReadyModel) -> anyhow::Result<()> {
    let mut session = ready.model.session();
    session.logits(&[0; TENSOR_BYTES], &mut [0.0])?;
    session.contributions().map(drop).context(
        "--heatmap: only for int8 models with two dense layers, which run on the engine's own kernels",
    )
}

/// The thread that walks and parses. Ends early where the other side is gone.
fn intake(
    paths: &[PathBuf],
    command: WorkerCommand,
    spec: &PreprocessSpec,
    send: &SyncSender<Item>,
) {
    let mut supervisor = Supervisor::new(command, spec);
    // Broken off is as good as done: nobody listens any more.
    match walk(paths, &mut |path, found| {
        let file: Arc<str> = path.to_string_lossy().into();
        let mut intake = FileIntake {
            file,
            object: Arc::default(),
            send,
        };
        let done = match found.and_then(|()| open(path)) {
            Ok((file, bytes)) => {
                let source = Source {
                    file: &file,
                    offset: 0,
                    bytes,
                };
                supervisor.analyse(source, 0, &mut |event| intake.take(event))
            }
            Err(reason) => intake.deliver(None, Err(reason)),
        };
        match done {
            Ok(()) => ControlFlow::Continue(()),
            Err(Stop) => ControlFlow::Break(()),
        }
    }) {
        ControlFlow::Continue(()) | ControlFlow::Break(()) => {}
    }
}

/// Opens a regular file of a size that is read; never waits for a pipe's other end.
fn open(path: &Path) -> Result<(File, u64), Reason> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| walk::unreadable(&error))?;
    let metadata = file.metadata().map_err(|error| walk::unreadable(&error))?;
    if !metadata.is_file() {
        return Err(Reason::new("special-file", "no longer a regular file"));
    }
    match metadata.len() {
        0 => Err(Reason::new("empty", "the file has no bytes")),
        size if size > MAX_OBJECT_BYTES => {
            let text = format!("the file has {size} bytes, allowed {MAX_OBJECT_BYTES}");
            Err(Reason::new("file-size", text))
        }
        size => Ok((file, size)),
    }
}

/// What intake knows of the file at hand.
struct FileIntake<'a> {
    file: Arc<str>,
    object: Arc<ObjectFacts>,
    send: &'a SyncSender<Item>,
}

impl FileIntake<'_> {
    fn take(&mut self, event: Event) -> Result<(), Stop> {
        match event {
            Event::Object(object) => {
                self.object = Arc::new(object);
                Ok(())
            }
            Event::ObjectRefused(refused) => {
                self.object = Arc::new(refused.facts.unwrap_or_default());
                self.deliver(None, Err(refused.reason))
            }
            Event::Slice(frame_index, slice) => {
                let frame = self.object.is_multi_frame.then_some(frame_index + 1);
                self.deliver(frame, slice)
            }
        }
    }

    fn deliver(&self, frame: Option<u32>, slice: Result<Box<Tensor>, Reason>) -> Result<(), Stop> {
        let item = Item {
            file: Arc::clone(&self.file),
            object: Arc::clone(&self.object),
            frame,
            slice,
        };
        self.send.send(item).map_err(|_| Stop)
    }
}

/// Runs the network over what arrives, prints, and judges at the end. Intake ends when this drops the receiver, also early.
fn analyse(
    arguments: &ClassifyArgs,
    ready: &ReadyModel,
    receive: Receiver<Item>,
    out: &mut dyn Write,
) -> Result<Exit, Failure> {
    let cannot_write = |error: io::Error| failure(Exit::CannotWrite)(error);
    let words = ModelWords {
        name: &ready.name,
        notice: &ready.notice,
        temperature: ready.manifest.temperature.unwrap_or(1.0),
    };
    let form = arguments.output.form();
    let mut network = Network::new(arguments, ready);
    let mut records = Vec::new();
    report::begin(out, form, &words).map_err(cannot_write)?;
    for item in receive {
        let (record, answer) = network.answer(&item, records.len())?;
        let result = SliceResult {
            file: &item.file,
            record: &record,
            answer: answer.as_ref().map(|answer| *answer),
        };
        report::slice(out, form, &words, &result).map_err(cannot_write)?;
        // Whoever reads a pipe sees each slice as it is done.
        out.flush().map_err(cannot_write)?;
        if records.len() < MAX_SLICES {
            records.push(record);
        }
    }
    let is_any_analysed = records.iter().any(|record| record.logit.is_some());
    for study in assemble(records, &Limits::NONE) {
        let verdict = judge(&study, ready.manifest.study_rule.as_ref());
        report::study(out, form, &words, &study, &verdict).map_err(cannot_write)?;
    }
    out.flush().map_err(cannot_write)?;
    Ok(if is_any_analysed {
        Exit::Ok
    } else {
        Exit::BadData
    })
}

/// The network and what is written for each slice that it sees.
struct Network<'a> {
    arguments: &'a ClassifyArgs,
    session: engine::Session,
    threshold: Option<f32>,
    /// Names under which something was written; the first slice of a name keeps it.
    written: HashSet<String>,
}

impl<'a> Network<'a> {
    fn new(arguments: &'a ClassifyArgs, ready: &ReadyModel) -> Self {
        Self {
            arguments,
            session: ready.model.session(),
            threshold: ready.manifest.logit_threshold(),
            written: HashSet::new(),
        }
    }

    /// Runs the network where there is a tensor.
    fn answer(
        &mut self,
        item: &Item,
        n_records: usize,
    ) -> Result<(SliceRecord, Result<Answer, Reason>), Failure> {
        let mut record = SliceRecord {
            study_uid: item.object.study_uid.clone(),
            series_uid: item.object.series_uid.clone(),
            sop_uid: item.object.sop_uid.clone(),
            frame: item.frame,
            facts: None,
            logit: None,
        };
        let answer = match &item.slice {
            Err(reason) => Err(reason.clone()),
            Ok(_) if n_records >= MAX_SLICES => {
                let text = format!("this run has reached {MAX_SLICES} slices");
                Err(Reason::new("too-many-slices", text))
            }
            Ok(tensor) => {
                record.facts = Some(tensor.facts.clone());
                let answer = self.run(&tensor.bytes);
                if answer.is_ok() {
                    self.write(&record, &tensor.bytes)?;
                }
                answer
            }
        };
        record.logit = answer.as_ref().ok().map(|answer| answer.logit);
        Ok((record, answer))
    }

    fn run(&mut self, tensor: &[u8]) -> Result<Answer, Reason> {
        let start = Instant::now();
        let mut logits = [f32::NAN];
        let done = self.session.logits(tensor, &mut logits);
        let [logit] = logits;
        match done {
            Err(error) => Err(Reason::new("engine", error.to_string())),
            Ok(()) if !logit.is_finite() => {
                let text = format!("the network's answer is {logit}");
                Err(Reason::new("engine", text))
            }
            Ok(()) => Ok(Answer {
                logit,
                is_positive: self.threshold.map(|threshold| logit >= threshold),
                micros: micros(start),
            }),
        }
    }

    /// Writes the tensor and the heat map where they are asked for.
    fn write(&mut self, record: &SliceRecord, tensor: &[u8]) -> Result<(), Failure> {
        let Some(sop_uid) = &record.sop_uid else {
            return Ok(());
        };
        let folders = [&self.arguments.tensors, &self.arguments.heatmap];
        if folders.iter().all(|folder| folder.is_none()) {
            return Ok(());
        }
        let name = match record.frame {
            Some(frame) => format!("{sop_uid}.{frame}"),
            None => sop_uid.to_string(),
        };
        if !self.written.insert(name.clone()) {
            return Ok(());
        }
        if let Some(folder) = &self.arguments.heatmap {
            let path = folder.join(format!("{name}.png"));
            self.heat_map(tensor)
                .and_then(|bytes| Ok(tensor_file::write(&path, &bytes)?))
                .with_context(|| format!("heat map {}", path.display()))
                .map_err(failure(Exit::CannotWrite))?;
        }
        if let Some(folder) = &self.arguments.tensors {
            let path = folder.join(format!("{name}.npy"));
            tensor_file::write(&path, &tensor_file::npy(tensor))
                .with_context(|| format!("tensor {}", path.display()))
                .map_err(failure(Exit::CannotWrite))?;
        }
        Ok(())
    }

    /// The heat map of the slice that was run last.
    fn heat_map(&self, tensor: &[u8]) -> anyhow::Result<Vec<u8>> {
        let contributions = self
            .session
            .contributions()
            .context("the network has not been run")?;
        Ok(heatmap::png(tensor, &contributions)?)
    }
}
