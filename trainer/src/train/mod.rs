//! Training: from a cache to weights.
//!
//! In: a cache and options. Out, in the run folder: `config.toml`, `model.safetensors`, `history.csv` (`step,epoch,loss`, one row a
//! step), `epochs.csv` (one row an epoch), `checkpoint.safetensors` (see [`crate::checkpoint`]). The arithmetic is Keras':
//! Glorot uniform, Adam with epsilon-hat 1e-7 or SGD 0.01, cross-entropy from logits, shuffling in each epoch, the last
//! partial batch kept. For a seed the weights are the same bits on one kind of CPU, whatever the number of threads and
//! however often the run was killed and resumed. Evaluation is left to `evaluate`.

mod arguments;
#[cfg(not(feature = "cuda"))]
mod no_gpu;
#[cfg(feature = "cuda")]
mod on_gpu;
mod plan;
mod processor;
mod progress;
mod run;
mod step;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use shared::{CHANNELS, RESEARCH_USE, SIDE};

pub use self::arguments::TrainArgs;
pub use self::plan::checked;
use self::plan::{Plan, fingerprint};
pub use self::processor::{GpuFigures, Precision, Processor};
use self::run::{Run, Watch};
use crate::batches::{Augmentation, Batch, Sampling, for_each_batch, read_batch};
use crate::cache::{Cache, make_folder, refuse_as_output};
use crate::checkpoint::Position;
use crate::claim::claim;
use crate::exit::{Exit, fault};
use crate::features::Features;
use crate::interrupt;
use crate::network::Network;
use crate::operators::optimiser::Moments;
use crate::provenance;
use crate::quantize::WeightBits;
use crate::ranks::{Place, Ranks};
use crate::split::{Split, SplitBy};

/// The publication's batch.
const DEFAULT_BATCH: usize = 50;
/// Images in one batch of validation: bounds its memory.
const VALIDATION_BATCH: usize = 16;
/// Training images that the statistics of a transfer learner's random weights are taken from.
const SETTLING_IMAGES: usize = 32;
/// Weights of the best epoch, kept where early stopping is on.
const BEST_FILE: &str = "best.safetensors";
/// The trained weights in the run folder.
pub const WEIGHTS_FILE: &str = "model.safetensors";

/// How the learning rate changes over the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// It stays (Keras' default).
    Constant,
    /// Half a cosine from the whole rate to a hundredth of it.
    Cosine,
    /// A tenth after each third of the run.
    Step,
}

/// What makes a run; written to `config.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainOptions {
    /// Name of the architecture.
    pub model: String,
    /// Width factor, above 0.
    pub width: f64,
    /// Passes over the training part; `None`: the architecture's.
    pub epochs: Option<u32>,
    /// Images in a step.
    pub batch: usize,
    /// Seed of weights, sampling, order and augmentation.
    pub seed: u64,
    /// How the parts were made; `Image` draws them anew and leaks.
    pub split: SplitBy,
    /// Which slices are used.
    pub sampling: Sampling,
    /// Whether each class weighs the same in the loss: n / (2 x n of the class), as Keras' users do it.
    pub class_weights: bool,
    /// At most that many slices of the training part.
    pub images: Option<usize>,
    /// Learning rate; `None`: Keras' default of the architecture's optimiser.
    pub learning_rate: Option<f64>,
    /// How it changes.
    pub schedule: Schedule,
    /// Stop when the validation loss has not fallen for that many epochs, and take the best epoch's weights.
    pub patience: Option<u32>,
    /// Small changes of the images.
    pub augmentation: Augmentation,
    /// First weights; `None`: drawn from the seed.
    pub init: Option<PathBuf>,
    /// Whether a transfer learner may begin with random weights.
    pub random_init: bool,
    /// The rows of each step; overrides split, sampling and epochs.
    pub order: Option<PathBuf>,
    /// How many of the last epochs compute as the int8 graph does.
    pub qat_epochs: u32,
    /// Bits of a weight in them.
    pub qat_weight_bits: WeightBits,
    /// Whether to continue the run in the folder, where there is one.
    #[serde(skip)]
    pub resume: bool,
    /// Where to compute; a run may go on elsewhere.
    #[serde(skip)]
    pub processor: Processor,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            model: "final".into(),
            width: 1.0,
            epochs: None,
            batch: DEFAULT_BATCH,
            seed: 1,
            split: SplitBy::Study,
            sampling: Sampling::Balanced,
            class_weights: false,
            images: None,
            learning_rate: None,
            schedule: Schedule::Constant,
            patience: None,
            augmentation: Augmentation::default(),
            init: None,
            random_init: false,
            order: None,
            qat_epochs: 0,
            qat_weight_bits: WeightBits::default(),
            resume: false,
            processor: Processor::Cpu,
        }
    }
}

/// A step whose loss is not finite ended the run.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("step {step}: the loss is {loss}; try a smaller learning rate")]
pub struct Diverged {
    /// The step, from 1.
    pub step: u64,
    /// Its loss.
    pub loss: f32,
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunSummary {
    /// Name of the architecture.
    pub model: String,
    /// Width factor.
    pub width: f64,
    /// Values in the weights.
    pub n_parameters: usize,
    /// Slices trained on, with and without PE.
    pub n_train: (usize, usize),
    /// Slices of the validation part, with and without PE.
    pub n_val: (usize, usize),
    /// Whole epochs done.
    pub epochs: u32,
    /// The epoch whose weights these are, where early stopping chooses.
    pub best_epoch: Option<u32>,
    /// Steps done.
    pub steps: u64,
    /// Mean loss of the last epoch; absent where no step was ever done.
    pub loss: Option<f64>,
    /// Images that this process trained on; 0 where the run was finished before.
    pub n_images: u64,
    /// Loss on the validation part after the last epoch; absent without validation slices.
    pub val_loss: Option<f64>,
    /// Share of validation slices classified rightly at probability 0.5.
    pub val_accuracy: Option<f64>,
    /// Training speed of this process, validation not counted.
    pub images_per_second: f64,
    /// Time of this process in training steps in s.
    pub training_seconds: f64,
    /// Time before the first step in which the GPU's ways to compute were chosen in s.
    pub tuning_seconds: f64,
    /// Time of this process in s.
    pub seconds: f64,
    /// Of the GPU, where one computed.
    pub gpu: Option<GpuFigures>,
    /// Whether the run was stopped before its end; `--resume` continues it.
    pub is_stopped: bool,
    /// The weights; where stopped, the checkpoint.
    pub weights: PathBuf,
}

/// Runs `trainer train`. The first Ctrl-C saves and stops, the second ends at once.
///
/// # Errors
/// As [`train`]; a device that this build cannot use.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    let options = args.options()?;
    let cache = Cache::open(&args.data)?;
    cache.check_digests()?;
    let stop = interrupt::watch().context("waiting for Ctrl-C")?;
    let place = Place::from_environment(|name| std::env::var(name).ok())?;
    let summary = train_in(place.as_ref(), &options, &cache, &args.out, stop)?;
    if place.is_some_and(|place| place.rank > 0) {
        return Ok(Exit::Ok.into());
    }
    let text = if args.json {
        let told = Told {
            notice: RESEARCH_USE,
            leak: args.split.warning(),
            summary: &summary,
        };
        serde_json::to_string(&told)? + "\n"
    } else {
        text(&summary, args.split)
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Exit::Ok.into())
}

/// What `--json` prints.
#[derive(Serialize)]
struct Told<'a> {
    notice: &'static str,
    leak: Option<&'static str>,
    #[serde(flatten)]
    summary: &'a RunSummary,
}

/// The summary in lines.
fn text(summary: &RunSummary, split: SplitBy) -> String {
    let loss = summary
        .loss
        .map_or_else(|| "no loss yet".into(), |loss| format!("loss {loss:.4}"));
    let speed = if summary.n_images > 0 {
        format!("{:.1} images/s", summary.images_per_second)
    } else {
        "nothing was left to train".into()
    };
    let mut lines = vec![format!(
        "{} at width {}: {} epochs, {} steps, {loss}, {speed}",
        summary.model, summary.width, summary.epochs, summary.steps
    )];
    if let Some(best) = summary.best_epoch {
        lines.push(format!(
            "early stopping: the weights are those of epoch {best}"
        ));
    }
    if let (Some(loss), Some(accuracy)) = (summary.val_loss, summary.val_accuracy) {
        lines.push(format!(
            "validation: loss {loss:.4}, accuracy {accuracy:.4}"
        ));
    }
    lines.extend(split.warning().map(str::to_owned));
    if summary.is_stopped {
        lines.push("stopped; continue with --resume".to_owned());
    }
    lines.push(format!("{}: {RESEARCH_USE}\n", summary.weights.display()));
    lines.join("\n")
}

/// Trains into the folder `out`.
///
/// # Errors
/// Options out of range, a cache without slices of both classes, weights or a checkpoint that do not fit, a loss that
/// is not finite, files that cannot be written.
pub fn train(options: &TrainOptions, cache: &Cache, out: &Path) -> Result<RunSummary> {
    train_until(options, cache, out, &AtomicBool::new(false))
}

/// As [`train`]; saves a checkpoint and returns after the step in which `stop` became true.
///
/// # Errors
/// As [`train`].
pub fn train_until(
    options: &TrainOptions,
    cache: &Cache,
    out: &Path,
    stop: &AtomicBool,
) -> Result<RunSummary> {
    train_in(None, options, cache, out, stop)
}

/// As [`train_until`], as one of several processes where `place` says so: each step's batch is shared among them, rank 0 writes the files, and
/// every rank must see the cache and the run folder.
///
/// # Errors
/// As [`train`]; a rank that does not come, or is lost.
pub fn train_in(
    place: Option<&Place>,
    options: &TrainOptions,
    cache: &Cache,
    out: &Path,
    stop: &AtomicBool,
) -> Result<RunSummary> {
    let architecture = checked(options)?;
    if place.is_some() && options.qat_epochs > 0 {
        return Err(fault(
            Exit::Usage,
            "--qat trains on one process; fine-tune with it after a run on several",
        ));
    }
    refuse_as_output(out)?;
    make_folder(out)?;
    let is_root = place.is_none_or(|place| place.rank == 0);
    let _claim = is_root.then(|| claim(out)).transpose()?;
    let plan = Plan::new(options, architecture, cache)?;
    let mut network = Network::new(architecture, options.width, options.seed, &Device::Cpu)?;
    let split = Split {
        by: options.split,
        seed: options.seed,
    };
    network.provenance = provenance::of_training(split, cache)?;
    match &options.init {
        Some(path) if network.has_backbone() => network.set_pretrained(path)?,
        Some(path) => network.set_weights(path)?,
        None if network.has_backbone() => settle(&network, options, &plan, cache)?,
        None => {}
    }
    // Augmented images have features of their own in each epoch; a GPU makes them anew sooner than it could be told where they are.
    let keeps_features = network.is_frozen()
        && options.augmentation == Augmentation::default()
        && options.processor == Processor::Cpu;
    let mut run = Run {
        features: keeps_features.then(Features::default),
        options,
        plan: &plan,
        cache,
        out,
        moments: vec![Moments::default(); network.parameters().len()],
        network,
        gpu: None,
        ranks: Ranks::Alone,
        is_stop_agreed: false,
        position: Position {
            best_loss: f64::INFINITY,
            ..Position::default()
        },
        fingerprint: fingerprint(options, cache)?,
        watch: Watch::default(),
        validation: None,
        last_loss: None,
        last_rate: plan.learning_rate,
    };
    run.start(place)?;
    if let Processor::Gpu { ordinal, precision } = options.processor {
        run.open_gpu(ordinal, precision)?;
    }
    let is_stopped = run.epochs(stop)?;
    run.finish(is_stopped)
}

/// Gives a transfer learner's random weights statistics: those of the first images of the first step.
fn settle(network: &Network, options: &TrainOptions, plan: &Plan, cache: &Cache) -> Result<()> {
    let steps = plan.steps(options, 0);
    let rows: Vec<usize> = steps.into_iter().flatten().take(SETTLING_IMAGES).collect();
    let (images, _) = to_tensors(read_batch(cache, &rows, [1.0; 2]))?;
    Ok(network.settle(&images)?)
}

fn to_tensors(batch: Batch) -> Result<(Tensor, Tensor)> {
    let n_images = batch.n_images();
    let images = Tensor::from_vec(batch.images, (n_images, CHANNELS, SIDE, SIDE), &Device::Cpu)?;
    let targets = Tensor::from_vec(batch.targets, (n_images, 2), &Device::Cpu)?;
    Ok((images, targets))
}

/// Logits of cache rows, in their order.
///
/// # Errors
/// When the network fails.
pub fn logits(network: &Network, cache: &Cache, rows: &[usize]) -> Result<Vec<f32>> {
    let steps: Vec<Vec<usize>> = rows
        .chunks(VALIDATION_BATCH)
        .map(<[usize]>::to_vec)
        .collect();
    let mut logits = Vec::with_capacity(rows.len());
    for_each_batch(
        cache,
        &steps,
        0,
        [1.0; 2],
        |_, _| (),
        |_, batch| {
            let (images, _) = to_tensors(batch)?;
            logits.extend(network.forward(&images)?.flatten_all()?.to_vec1::<f32>()?);
            Ok(true)
        },
    )?;
    Ok(logits)
}

/// Mean loss and accuracy (at logit 0) of the logits of cache rows.
#[expect(
    clippy::cast_precision_loss,
    reason = "counts of slices are far below 2^53"
)]
fn judge(logits: &[f32], cache: &Cache, rows: &[usize]) -> (f64, f64) {
    let (mut loss, mut n_right) = (0.0, 0usize);
    for (logit, row) in logits.iter().zip(rows) {
        let (logit, pe_present) = (f64::from(*logit), cache.rows()[*row].pe_present);
        let label = f64::from(u8::from(pe_present));
        loss += logit.max(0.0) - logit * label + (-logit.abs()).exp().ln_1p();
        n_right += usize::from((logit > 0.0) == pe_present);
    }
    let n = rows.len() as f64;
    (loss / n, n_right as f64 / n)
}

#[cfg(test)]
mod tests;
