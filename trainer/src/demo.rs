//! `trainer` without a command: the whole pipeline on a phantom that this machine can train in minutes.
//!
//! Phantom, cache, training, evaluation on held-out studies, f32 and int8 model files, the gate between them, and a held-out study (and
//! the user's files) through the int8 file in the engine that the board runs. Everything lies in one run folder; a killed demo goes on where it was.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use shared::RESEARCH_USE;
use shared::manifest::Manifest;
use shared::phantom::{Finding, StudyPlan, UidRole, dicom_file};
use shared::spec::PreprocessSpec;

use crate::batches::Sampling;
use crate::cache::{Cache, make_folder, write_atomically};
use crate::evaluate::{self, Evaluation};
use crate::exit::Exit;
use crate::index::Part;
use crate::predict::Predictor;
use crate::source::Source;
use crate::split::{Split, SplitBy};
use crate::train::{self, Schedule, TrainOptions};
use crate::{architecture, classify, export, prepare, quantize, split, verify};

/// Rows and columns of the phantom.
const MATRIX: u16 = 512;
/// Explicit VR Little Endian.
const TRANSFER_SYNTAX: &str = "1.2.840.10008.1.2.1";
/// A network this narrow dies of Adam's usual 0.001 while emboli still look like nothing.
const LEARNING_RATE: f64 = 0.0004;
/// What `trainer verify --json` prints.
const VERIFY_FILE: &str = "verify.json";
/// What `trainer verify --plot` draws.
const NOISE_FILE: &str = "snr.svg";
/// Slices on which the gate measures each tensor's noise.
const N_NOISE_SLICES: usize = 16;

/// Arguments of `trainer` without a command.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// Classify these DICOM files too
    #[arg(long, value_name = "DIR")]
    pub dicom: Option<PathBuf>,
    /// Run folder
    #[arg(long, value_name = "RUN", default_value = "runs/demo")]
    pub out: PathBuf,
    /// Seed of everything
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// Synthetic studies
    #[arg(long, value_name = "N", default_value_t = 2400)]
    pub studies: u32,
    /// Slices of a study
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub slices: u32,
    /// Width of the network
    #[arg(long, value_name = "F", default_value_t = 0.0625, value_parser = architecture::parse_width)]
    pub width: f64,
    /// Passes over the training part
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub epochs: u32,
    /// Images in a step
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch: usize,
}

/// Runs the pipeline.
///
/// # Errors
/// What any stage says.
pub fn run(args: &DemoArgs) -> Result<ExitCode> {
    let began = Instant::now();
    let out = &args.out;
    make_folder(out)?;
    tell("1/6 phantom -> cache");
    let cache = cache(args)?;
    tell("2/6 train");
    let stop = crate::interrupt::watch().context("waiting for Ctrl-C")?;
    let summary = train::train_until(&options(args), &cache, out, stop)?;
    if summary.is_stopped {
        tell("stopped; the same command continues");
        return Ok(Exit::Ok.into());
    }
    tell("3/6 evaluate on held-out studies");
    let mut float = Predictor::open(&summary.weights)?;
    let split = Split {
        by: SplitBy::Study,
        seed: args.seed,
    };
    let evaluation = evaluate::evaluate(&mut float, &cache, Part::Test, split, args.seed)?;
    tell("4/6 export and quantize");
    let files = model_files(args, &cache, &summary.weights, &evaluation)?;
    let (path, kind) = files.deployable();
    tell(&format!(
        "5/6 evaluate the {kind} file and write the report"
    ));
    let mut model = Predictor::open(path)?;
    let evaluation = evaluate::evaluate(&mut model, &cache, Part::Test, split, args.seed)?;
    let manifest = model.manifest().context("the model file has a manifest")?;
    evaluate::write_all(&evaluation, &cache, manifest, out, out)?;
    tell(&format!("6/6 classify with the {kind} file"));
    let study = held_out_study(args)?;
    let mut text = String::from("\nheld-out synthetic study (with embolus):\n");
    text += &classify::table(&classify::folder(&mut model, &study)?, model.manifest());
    if let Some(dicom) = &args.dicom {
        text += &format!("\n{}:\n", dicom.display());
        text += &classify::table(&classify::folder(&mut model, dicom)?, model.manifest());
    }
    text += &format!("\nheld-out studies, {kind} file through the engine:\n");
    text += &evaluate::table(&evaluation);
    text += &closing(out, &files, &study, began);
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(match files.int8 {
        Some(_) => Exit::Ok.into(),
        None => Exit::FailedCheck.into(),
    })
}

/// What lies where, and what to do next.
fn closing(out: &Path, files: &Files, study: &Path, began: Instant) -> String {
    let kilobytes =
        |path: &Path| std::fs::metadata(path).map_or(0, |file| file.len().div_ceil(1024));
    let mut text = format!(
        "\ndemonstration model, trained on synthetic data; {RESEARCH_USE}\n\
         {}\n",
        files.verdict
    );
    let int8 = files.int8.clone();
    for (path, what) in [
        (out.join("report.html"), "report, for a browser"),
        (out.join("metrics.json"), "figures with intervals"),
        (out.join("model-card.md"), "intended use, data, limits"),
        (files.float.clone(), "f32 model"),
    ]
    .into_iter()
    .chain(int8.map(|path| (path, "int8 model, for the board")))
    .chain([
        (out.join(VERIFY_FILE), "f32 against int8"),
        (out.join(NOISE_FILE), "signal-to-noise ratio of each tensor"),
        (out.join("cache"), "tensors and index"),
        (study.to_owned(), "the held-out study as DICOM"),
    ]) {
        text += &format!("{:<34} {what}", path.display());
        if path.is_file() {
            text += &format!(", {} kB", kilobytes(&path));
        }
        text.push('\n');
    }
    text += &format!(
        "\n{:.0} s. Next:\n  cargo run --release -p edge -- classify {} --model {}\n",
        began.elapsed().as_secs_f64(),
        study.display(),
        files.deployable().0.display()
    );
    text
}

#[expect(clippy::print_stderr, reason = "messages go to standard error")]
fn tell(stage: &str) {
    eprintln!("{stage}");
}

fn cache(args: &DemoArgs) -> Result<Cache> {
    let folder = args.out.join("cache");
    let source = Source::phantom(args.studies, args.seed, args.slices, MATRIX, true);
    prepare::prepare(
        &source,
        &PreprocessSpec::default(),
        args.seed,
        None,
        &folder,
    )?;
    Cache::open(&folder)
}

fn options(args: &DemoArgs) -> TrainOptions {
    TrainOptions {
        model: "final".into(),
        width: args.width,
        epochs: Some(args.epochs),
        batch: args.batch,
        seed: args.seed,
        learning_rate: Some(LEARNING_RATE),
        schedule: Schedule::Cosine,
        sampling: Sampling::Matched,
        resume: true,
        ..TrainOptions::default()
    }
}

/// The model files and what the gate says.
struct Files {
    float: PathBuf,
    /// `None` where the gate did not let it through.
    int8: Option<PathBuf>,
    verdict: String,
}

impl Files {
    /// The file to go on with, and its kind.
    fn deployable(&self) -> (&Path, &'static str) {
        match &self.int8 {
            Some(int8) => (int8, "int8"),
            None => (&self.float, "f32"),
        }
    }
}

fn model_files(
    args: &DemoArgs,
    cache: &Cache,
    weights: &Path,
    evaluation: &Evaluation,
) -> Result<Files> {
    let architecture = architecture::find("final").context("the table has a row `final`")?;
    let mut manifest: Manifest = export::new_manifest(architecture, args.width);
    evaluate::complete(&mut manifest, evaluation, cache)?;
    let out = &args.out;
    write_atomically(&out.join("manifest.json"), manifest.to_json().as_bytes())?;
    let (float, int8) = (out.join("model.onnx"), out.join("model-int8.onnx"));
    export::export(weights, &manifest, &float)?;
    let float_bytes = std::fs::read(&float)?;
    let (int8_bytes, _) = quantize::quantize(&float_bytes, cache, &quantize::Options::default())?;
    let margins = verify::Margins::default();
    let report = verify::verify(&float_bytes, &int8_bytes, cache, margins, N_NOISE_SLICES)?;
    let json = serde_json::to_string_pretty(&report)?;
    write_atomically(&out.join(VERIFY_FILE), json.as_bytes())?;
    let plot = verify::noise_plot(&report.tensors);
    write_atomically(&out.join(NOISE_FILE), plot.as_bytes())?;
    let deployable = verify::deployable(&int8_bytes, &report, false)?;
    match &deployable {
        Some(bytes) => write_atomically(&int8, bytes)?,
        // What an earlier run left there is not this model's.
        None if int8.exists() => std::fs::remove_file(&int8)?,
        None => {}
    }
    Ok(Files {
        float,
        int8: deployable.is_some().then_some(int8),
        verdict: verify::text(&report),
    })
}

/// Writes the first held-out study with an embolus as DICOM files.
fn held_out_study(args: &DemoArgs) -> Result<PathBuf> {
    let plan = (0..args.studies)
        .map(|index| StudyPlan::new(args.seed, index, args.slices, MATRIX))
        .find(|plan| {
            let study = plan.uid(UidRole::Study);
            let is_test = split::part(SplitBy::Study, args.seed, &study, "") == Part::Test;
            is_test && (0..plan.n_slices()).any(|slice| plan.pe_present(slice))
        })
        // So few studies that none is held out: one that the training never saw.
        .unwrap_or_else(|| {
            StudyPlan::with_finding(
                args.seed,
                args.studies,
                args.slices,
                MATRIX,
                Finding::Positive,
            )
        });
    let folder = args.out.join("study");
    make_folder(&folder)?;
    for slice in 0..plan.n_slices() {
        let bytes = dicom_file(&plan, slice, TRANSFER_SYNTAX)?;
        write_atomically(&folder.join(format!("{slice:04}.dcm")), &bytes)?;
    }
    Ok(folder)
}
