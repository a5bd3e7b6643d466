//! Training: from a cache to weights.
//!
//! In: a cache and options. Out, in the run folder: `config.toml`, `model.safetensors`, `history.csv` (`step,epoch,loss`, one row a
//! step), `epochs.csv` (one row an epoch), `checkpoint.safetensors` (see [`crate::checkpoint`]). The arithmetic is Keras':
//! Glorot uniform, Adam with epsilon-hat 1e-7 or SGD 0.01, cross-entropy from logits, shuffling in each epoch, the last
//! partial batch kept. For a seed the weights are the same bits on one kind of CPU, whatever the number of threads and
//! however often the run was killed and resumed. Evaluation is left to `evaluate`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::{Device, Tensor};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};
use shared::{CHANNELS, SIDE};

use crate::architecture::{self, Architecture, Family, OptimiserKind};
use crate::backbone::backbone;
use crate::batches::{
    Augmentation, Batch, Sample, Sampling, augment, for_each_batch, read_batch, read_order,
};
use crate::cache::Cache;
use crate::checkpoint::{self, Position, write_atomically};
use crate::exit::{Exit, fault};
use crate::features::Features;
use crate::index::Part;
use crate::interrupt;
use crate::network::Network;
use crate::operators::loss::BinaryCrossEntropy;
use crate::operators::optimiser::{AdamStep, Moments, SgdStep};
use crate::quantization_aware;
use crate::split::{LEAK_WARNING, SplitBy};

/// Keras' default learning rate of SGD.
const SGD_RATE: f64 = 0.01;
/// Keras' default learning rate of Adam.
const ADAM_RATE: f64 = 0.001;
/// The publication's batch.
const DEFAULT_BATCH: usize = 50;
/// Images in one batch of validation: bounds its memory.
const VALIDATION_BATCH: usize = 16;
/// Training images that the statistics of a transfer learner's random weights are taken from.
const SETTLING_IMAGES: usize = 32;
/// Share of the learning rate that is left at the end of a cosine schedule, and after each third of a step schedule.
const FINAL_SHARE: f64 = 0.01;
const STEP_SHARE: f64 = 0.1;
/// Time between progress lines where standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
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
    /// Whether to continue the run in the folder, where there is one.
    #[serde(skip)]
    pub resume: bool,
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
            resume: false,
        }
    }
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
    /// Steps done.
    pub steps: u64,
    /// Mean loss of the last epoch.
    pub loss: f64,
    /// Loss on the validation part after the last epoch; absent without validation slices.
    pub val_loss: Option<f64>,
    /// Share of validation slices classified rightly at probability 0.5.
    pub val_accuracy: Option<f64>,
    /// Training speed of this process, validation not counted.
    pub images_per_second: f64,
    /// Time of this process in s.
    pub seconds: f64,
    /// Whether the run was stopped before its end; `--resume` continues it.
    pub is_stopped: bool,
    /// The weights; where stopped, the checkpoint.
    pub weights: PathBuf,
}

/// The arguments of `trainer train`.
#[derive(Debug, clap::Args)]
pub struct TrainArgs {
    /// Cache folder of `trainer prepare`
    #[arg(long, value_name = "CACHE")]
    pub data: PathBuf,
    /// Run folder
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
    /// Architecture, a row of the publication's table
    #[arg(long, value_name = "NAME", default_value = "final")]
    pub model: String,
    /// Factor on the units of every convolution and hidden dense layer
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub width: f64,
    /// Passes over the training part [default: the architecture's]
    #[arg(long, value_name = "N")]
    pub epochs: Option<u32>,
    /// Images in a step
    #[arg(long, value_name = "N", default_value_t = DEFAULT_BATCH)]
    pub batch: usize,
    /// Seed of weights, sampling, order and augmentation
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// What is kept together between the parts; `image` reproduces the publication's leak
    #[arg(long, value_enum, default_value = "study")]
    pub split: SplitBy,
    /// Which slices of the training part are used
    #[arg(long, value_enum, default_value = "balanced")]
    pub sampling: Sampling,
    /// Let both classes weigh the same in the loss
    #[arg(long)]
    pub class_weights: bool,
    /// At most that many slices of the training part
    #[arg(long, value_name = "N")]
    pub images: Option<usize>,
    /// Learning rate [default: 0.001 for Adam, 0.01 for SGD]
    #[arg(long, value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// How the learning rate changes over the run
    #[arg(long, value_enum, default_value = "constant")]
    pub schedule: Schedule,
    /// Stop when the validation loss has not fallen for that many epochs
    #[arg(long, value_name = "EPOCHS")]
    pub patience: Option<u32>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment here would become help text")]
    pub augmentation: Augmentation,
    /// Where to compute: `cpu`
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
    /// First weights, a safetensors file; for the transfer learners one of ImageNet weights in torchvision's naming
    #[arg(long, value_name = "FILE", conflicts_with = "random_init")]
    pub init: Option<PathBuf>,
    /// Draw the first weights from the seed (the default, except for the transfer learners)
    #[arg(long)]
    pub random_init: bool,
    /// The cache rows of each step, one line a step; overrides split, sampling and epochs
    #[arg(long, value_name = "FILE")]
    pub order: Option<PathBuf>,
    /// Compute as the int8 graph does in the last epochs (quantization-aware fine-tuning); writes ranges.json for `trainer quantize --ranges`
    #[arg(long, conflicts_with = "order")]
    pub qat: bool,
    /// How many epochs that are
    #[arg(long, value_name = "N", default_value_t = 1, requires = "qat", value_parser = clap::value_parser!(u32).range(1..))]
    pub qat_epochs: u32,
    /// Continue the run in the folder where there is one
    #[arg(long)]
    pub resume: bool,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

impl TrainArgs {
    fn options(&self) -> TrainOptions {
        TrainOptions {
            model: self.model.clone(),
            width: self.width,
            epochs: self.epochs,
            batch: self.batch,
            seed: self.seed,
            split: self.split,
            sampling: self.sampling,
            class_weights: self.class_weights,
            images: self.images,
            learning_rate: self.learning_rate,
            schedule: self.schedule,
            patience: self.patience,
            augmentation: self.augmentation,
            init: self.init.clone(),
            random_init: self.random_init,
            order: self.order.clone(),
            qat_epochs: if self.qat { self.qat_epochs } else { 0 },
            resume: self.resume,
        }
    }
}

/// Runs `trainer train`. The first Ctrl-C saves and stops, the second ends at once.
///
/// # Errors
/// As [`train`]; a device that this build cannot use.
pub fn run(args: &TrainArgs) -> Result<ExitCode> {
    if args.device != "cpu" {
        return Err(fault(
            Exit::PeerDown,
            format!(
                "device `{}`: this build computes on `cpu` only",
                args.device
            ),
        ));
    }
    let cache = Cache::open(&args.data)?;
    let stop = interrupt::watch().context("waiting for Ctrl-C")?;
    let summary = train_until(&args.options(), &cache, &args.out, stop)?;
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string(&summary)?)?;
    } else {
        let RunSummary {
            model,
            width,
            epochs,
            steps,
            loss,
            images_per_second,
            ..
        } = &summary;
        writeln!(
            stdout,
            "{model} at width {width}: {epochs} epochs, {steps} steps, loss {loss:.4}, {images_per_second:.1} images/s"
        )?;
        if let (Some(loss), Some(accuracy)) = (summary.val_loss, summary.val_accuracy) {
            writeln!(stdout, "validation: loss {loss:.4}, accuracy {accuracy:.4}")?;
        }
        if args.split == SplitBy::Image {
            writeln!(stdout, "{LEAK_WARNING}")?;
        }
        if summary.is_stopped {
            writeln!(stdout, "stopped; continue with --resume")?;
        }
        writeln!(
            stdout,
            "{}: {}",
            summary.weights.display(),
            shared::RESEARCH_USE
        )?;
    }
    Ok(Exit::Ok.into())
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
    let architecture = checked(options)?;
    fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    let plan = Plan::new(options, architecture, cache)?;
    let network = Network::new(architecture, options.width, options.seed, &Device::Cpu)?;
    match &options.init {
        Some(path) if network.has_backbone() => network.set_pretrained(path)?,
        Some(path) => network.set_weights(path)?,
        None if network.has_backbone() => settle(&network, options, &plan, cache)?,
        None => {}
    }
    // Augmented images have features of their own in each epoch.
    let keeps_features = network.is_frozen() && options.augmentation == Augmentation::default();
    let mut run = Run {
        features: keeps_features.then(Features::default),
        options,
        plan: &plan,
        cache,
        out,
        moments: vec![Moments::default(); network.parameters().len()],
        network,
        position: Position {
            best_loss: f64::INFINITY,
            ..Position::default()
        },
        fingerprint: fingerprint(options, cache)?,
        watch: Watch::default(),
        validation: None,
        last_loss: f64::NAN,
    };
    run.start()?;
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

fn checked(options: &TrainOptions) -> Result<&'static Architecture> {
    let usage = |message: String| fault(Exit::Usage, message);
    let architecture = architecture::find(&options.model).ok_or_else(|| {
        let names: Vec<&str> = architecture::ARCHITECTURES
            .iter()
            .map(|row| row.name)
            .collect();
        usage(format!(
            "no model `{}`; there are {}",
            options.model,
            names.join(", ")
        ))
    })?;
    if architecture.family == Family::Majority {
        return Err(usage("`baseline` has no weights to train".into()));
    }
    let backbone = backbone(architecture.family, options.width);
    if let (Some(backbone), None, false) = (backbone, &options.init, options.random_init) {
        return Err(usage(format!(
            "`{}` learns by transfer: give its ImageNet weights with --init FILE (torchvision's {}, as safetensors), or say --random-init",
            architecture.name, backbone.weights_name
        )));
    }
    if !(options.width > 0.0 && options.width <= 4.0) {
        return Err(usage(format!(
            "width {} is not above 0 and at most 4",
            options.width
        )));
    }
    if options.qat_epochs > 0 && architecture.family != Family::Convolutional {
        return Err(usage(format!(
            "`{}` is no chain of layers: the int8 graph does not take it, so there is nothing to train for with --qat",
            architecture.name
        )));
    }
    if !(1..=4096).contains(&options.batch) {
        return Err(usage(format!(
            "batch {} is not between 1 and 4096",
            options.batch
        )));
    }
    if let Some(rate) = options
        .learning_rate
        .filter(|rate| !(*rate > 0.0 && rate.is_finite()))
    {
        return Err(usage(format!("learning rate {rate} is not above 0")));
    }
    Ok(architecture)
}

/// What must be equal for a run to continue.
fn fingerprint(options: &TrainOptions, cache: &Cache) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for path in [&options.init, &options.order].into_iter().flatten() {
        hasher.update(&fs::read(path).with_context(|| format!("reading {}", path.display()))?);
    }
    let without_paths = TrainOptions {
        init: None,
        order: None,
        ..options.clone()
    };
    let files = hasher.finalize().to_hex();
    Ok(format!(
        "data {} files {} {}",
        &cache.digest()[..16],
        &files[..16],
        serde_json::to_string(&without_paths)?
    ))
}

/// What a run does, fixed before it starts.
struct Plan {
    optimiser: OptimiserKind,
    learning_rate: f64,
    n_epochs: u32,
    sample: Sample,
    validation: Sample,
    /// The steps of the order file.
    order: Option<Vec<Vec<usize>>>,
    /// Weights of the negative and the positive class.
    weights: [f32; 2],
}

impl Plan {
    fn new(options: &TrainOptions, architecture: &Architecture, cache: &Cache) -> Result<Self> {
        let part = |part| Sample::of_part(cache, part, options.split, options.seed);
        let order = options
            .order
            .as_ref()
            .map(|path| read_order(path, cache.n_rows()))
            .transpose()?;
        let sample = part(Part::Train).drawn(options.sampling, options.images, options.seed);
        let (positive, negative) = sample.counts();
        if order.is_none() {
            ensure!(
                positive > 0 && negative > 0,
                "the training part has {positive} slices with and {negative} without PE; both are needed"
            );
        }
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            reason = "counts are far below 2^53; weights are f32"
        )]
        let weight = |n: usize| ((positive + negative) as f64 / (2 * n) as f64) as f32;
        Ok(Self {
            optimiser: architecture.optimiser,
            learning_rate: options
                .learning_rate
                .unwrap_or(match architecture.optimiser {
                    OptimiserKind::Sgd => SGD_RATE,
                    OptimiserKind::Adam => ADAM_RATE,
                }),
            n_epochs: if order.is_some() {
                1
            } else {
                options.epochs.unwrap_or(architecture.epochs)
            },
            validation: if order.is_some() {
                Sample::default()
            } else {
                part(Part::Val)
            },
            weights: if options.class_weights && order.is_none() {
                [weight(negative), weight(positive)]
            } else {
                [1.0; 2]
            },
            sample,
            order,
        })
    }

    fn steps(&self, options: &TrainOptions, epoch: u32) -> Vec<Vec<usize>> {
        match &self.order {
            Some(steps) => steps.clone(),
            None => self
                .sample
                .epoch(options.sampling, options.batch, options.seed, epoch),
        }
    }

    /// The learning rate at `done`, the share of the run that is done.
    fn rate(&self, schedule: Schedule, done: f64) -> f64 {
        self.learning_rate
            * match schedule {
                Schedule::Constant => 1.0,
                Schedule::Cosine => {
                    FINAL_SHARE
                        + (1.0 - FINAL_SHARE) * (1.0 + (std::f64::consts::PI * done).cos()) / 2.0
                }
                Schedule::Step if done < 1.0 / 3.0 => 1.0,
                Schedule::Step if done < 2.0 / 3.0 => STEP_SHARE,
                Schedule::Step => STEP_SHARE * STEP_SHARE,
            }
    }
}

/// Time spent in training steps, and their images.
#[derive(Default)]
struct Watch {
    total: Duration,
    training: Duration,
    n_images: u64,
}

impl Watch {
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    fn images_per_second(&self) -> f64 {
        self.n_images as f64 / self.training.as_secs_f64().max(1e-9)
    }
}

/// A run in progress.
struct Run<'a> {
    options: &'a TrainOptions,
    plan: &'a Plan,
    cache: &'a Cache,
    out: &'a Path,
    network: Network,
    moments: Vec<Moments>,
    position: Position,
    fingerprint: String,
    watch: Watch,
    /// Loss and accuracy on the validation part.
    validation: Option<(f64, f64)>,
    /// Mean loss of the last whole epoch.
    last_loss: f64,
    /// Of a frozen backbone.
    features: Option<Features>,
}

impl Run<'_> {
    /// Begins anew or continues from the checkpoint, and brings the tables to that place.
    fn start(&mut self) -> Result<()> {
        let config = toml::to_string(self.options).context("writing the configuration")?;
        let found = if self.options.resume {
            checkpoint::load(self.out, self.network.parameters(), &self.fingerprint)?
        } else {
            None
        };
        if let Some((moments, position)) = found {
            (self.moments, self.position) = (moments, position);
        } else if self.out.join(checkpoint::FILE_NAME).exists() {
            bail!(
                "{} holds a run; continue it with --resume or choose another folder",
                self.out.display()
            );
        }
        write_atomically(&self.out.join("config.toml"), config.as_bytes())?;
        keep_rows(
            &self.out.join("history.csv"),
            "step,epoch,loss",
            self.position.step,
        )?;
        keep_rows(
            &self.out.join("epochs.csv"),
            "epoch,loss,val_loss,val_accuracy,learning_rate,images_per_second,seconds",
            u64::from(self.position.epoch),
        )
    }

    /// Trains to the end or to the stop; says whether it was stopped.
    fn epochs(&mut self, stop: &AtomicBool) -> Result<bool> {
        let begin = Instant::now();
        while self.position.epoch < self.plan.n_epochs && !self.has_stalled() {
            let epoch_begin = Instant::now();
            self.quantize_where_due()?;
            let is_whole = self.epoch(stop)?;
            if !is_whole {
                self.save()?;
                self.watch.total += begin.elapsed();
                return Ok(true);
            }
            self.end_epoch(epoch_begin.elapsed())?;
        }
        self.watch.total += begin.elapsed();
        Ok(false)
    }

    /// Makes the network compute as the int8 graph does where the epoch is one of the last `qat_epochs`. Ranges are found once, before the first of them.
    fn quantize_where_due(&mut self) -> Result<()> {
        let first = self.plan.n_epochs.saturating_sub(self.options.qat_epochs);
        if self.options.qat_epochs == 0 || self.position.epoch < first {
            return Ok(());
        }
        let is_begun = self.position.epoch > first || self.position.step_in_epoch > 0;
        let ranges = if is_begun {
            quantization_aware::read(&self.out.join(quantization_aware::FILE_NAME))?
        } else {
            quantization_aware::calibrate(&self.network, self.cache, self.out)?
        };
        Ok(self.network.quantize(&ranges)?)
    }

    /// Whether early stopping ends the run here.
    fn has_stalled(&self) -> bool {
        self.options.patience.is_some_and(|patience| {
            self.position.best_loss.is_finite()
                && self.position.epoch >= self.position.best_epoch + patience.max(1)
        })
    }

    /// The steps of one epoch that are left; false where it was stopped before its end.
    fn epoch(&mut self, stop: &AtomicBool) -> Result<bool> {
        let steps = self.plan.steps(self.options, self.position.epoch);
        let first = usize::try_from(self.position.step_in_epoch).context("steps of an epoch")?;
        let mut history = append(&self.out.join("history.csv"))?;
        let progress = Progress::new(self.plan.n_epochs, self.position.epoch, &steps, first);
        let (options, epoch) = (self.options, self.position.epoch);
        let (cache, weights) = (self.cache, self.plan.weights);
        let mut is_whole = true;
        for_each_batch(
            cache,
            &steps,
            first,
            weights,
            |step, batch| augment(options.augmentation, options.seed, epoch, step, batch),
            |index, batch| {
                if stop.load(Ordering::Relaxed) {
                    is_whole = false;
                    return Ok(false);
                }
                let n_images = batch.n_images() as u64;
                let begin = Instant::now();
                let loss = self.step(batch, &steps[index], steps.len())?;
                self.watch.training += begin.elapsed();
                self.watch.n_images += n_images;
                self.position.step += 1;
                self.position.step_in_epoch = index as u64 + 1;
                #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
                let weighted = f64::from(loss) * n_images as f64;
                self.position.loss_sum += weighted;
                self.position.n_images += n_images;
                ensure!(
                    loss.is_finite(),
                    "step {}: the loss is {loss}; try a smaller learning rate",
                    self.position.step
                );
                writeln!(history, "{},{},{loss}", self.position.step, epoch + 1)
                    .context("writing history.csv")?;
                progress.tell(n_images, self.mean_loss(), self.watch.images_per_second());
                Ok(true)
            },
        )?;
        Ok(is_whole)
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of images are far below 2^53"
    )]
    fn mean_loss(&self) -> f64 {
        self.position.loss_sum / self.position.n_images as f64
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of steps are far below 2^53"
    )]
    fn rate(&self, steps_in_epoch: usize) -> f64 {
        let in_epoch = self.position.step_in_epoch as f64 / steps_in_epoch.max(1) as f64;
        let done =
            (f64::from(self.position.epoch) + in_epoch) / f64::from(self.plan.n_epochs.max(1));
        self.plan.rate(self.options.schedule, done)
    }

    /// One optimiser step; returns the loss before it.
    fn step(&mut self, batch: Batch, rows: &[usize], steps_in_epoch: usize) -> Result<f32> {
        let (images, targets) = to_tensors(batch)?;
        let logits = match &mut self.features {
            Some(features) => {
                let features = features.of(&self.network, self.cache, rows)?;
                self.network.head(&features)?
            }
            None => self.network.forward(&images)?,
        };
        let loss = logits.apply_op2(&targets, BinaryCrossEntropy)?;
        let gradients = loss.backward()?;
        let rate = self.rate(steps_in_epoch);
        for (parameter, moments) in self.network.parameters().iter().zip(&mut self.moments) {
            if !parameter.is_trained {
                continue;
            }
            let variable = &parameter.variable;
            let gradient = gradients
                .get(variable)
                .with_context(|| format!("no gradient of {}", parameter.name))?;
            match self.plan.optimiser {
                OptimiserKind::Adam => AdamStep::new(moments, self.position.step + 1, rate)
                    .apply(variable, gradient)?,
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "a rate is rounded to the weights' precision"
                )]
                OptimiserKind::Sgd => SgdStep { rate: rate as f32 }.apply(variable, gradient)?,
            }
        }
        Ok(loss.to_scalar::<f32>()?)
    }

    /// Validation, the epoch's row, the checkpoint.
    fn end_epoch(&mut self, elapsed: Duration) -> Result<()> {
        let n_steps = usize::try_from(self.position.step_in_epoch).context("steps of an epoch")?;
        let rate = self.rate(n_steps);
        self.last_loss = self.mean_loss();
        self.validation = self.validate()?;
        self.position = Position {
            epoch: self.position.epoch + 1,
            step_in_epoch: 0,
            loss_sum: 0.0,
            n_images: 0,
            ..self.position
        };
        if let Some((loss, _)) = self.validation
            && loss < self.position.best_loss
        {
            self.position.best_loss = loss;
            self.position.best_epoch = self.position.epoch;
            if self.options.patience.is_some() {
                self.network.save(&self.out.join(BEST_FILE))?;
            }
        }
        let (val_loss, val_accuracy) = match self.validation {
            Some((loss, accuracy)) => (loss.to_string(), accuracy.to_string()),
            None => (String::new(), String::new()),
        };
        let mut epochs = append(&self.out.join("epochs.csv"))?;
        writeln!(
            epochs,
            "{},{},{val_loss},{val_accuracy},{rate},{:.2},{:.1}",
            self.position.epoch,
            self.last_loss,
            self.watch.images_per_second(),
            elapsed.as_secs_f64()
        )
        .context("writing epochs.csv")?;
        self.save()
    }

    /// Mean loss and accuracy (at logit 0) on the validation part; `None` where it is empty.
    fn validate(&mut self) -> Result<Option<(f64, f64)>> {
        let rows = self.plan.validation.rows();
        let logits = match &mut self.features {
            _ if rows.is_empty() => return Ok(None),
            Some(features) => {
                let features = features.of(&self.network, self.cache, &rows)?;
                self.network.head(&features)?.flatten_all()?.to_vec1()?
            }
            None => logits(&self.network, self.cache, &rows)?,
        };
        Ok(Some(judge(&logits, self.cache, &rows)))
    }

    fn save(&self) -> Result<()> {
        checkpoint::save(
            self.out,
            self.network.parameters(),
            &self.moments,
            &self.position,
            &self.fingerprint,
        )
    }

    fn finish(mut self, is_stopped: bool) -> Result<RunSummary> {
        let weights = self.out.join(if is_stopped {
            checkpoint::FILE_NAME
        } else {
            WEIGHTS_FILE
        });
        if !is_stopped {
            if self.options.patience.is_some() && self.out.join(BEST_FILE).exists() {
                self.network.set_weights(&self.out.join(BEST_FILE))?;
            }
            if self.validation.is_none() || self.options.patience.is_some() {
                self.validation = self.validate()?;
            }
            self.network.save(&weights)?;
        }
        Ok(RunSummary {
            model: self.options.model.clone(),
            width: self.options.width,
            n_parameters: self.network.n_parameters(),
            n_train: self.plan.sample.counts(),
            n_val: self.plan.validation.counts(),
            epochs: self.position.epoch,
            steps: self.position.step,
            loss: if self.position.n_images > 0 {
                self.mean_loss()
            } else {
                self.last_loss
            },
            val_loss: self.validation.map(|(loss, _)| loss),
            val_accuracy: self.validation.map(|(_, accuracy)| accuracy),
            images_per_second: self.watch.images_per_second(),
            seconds: self.watch.total.as_secs_f64(),
            is_stopped,
            weights,
        })
    }
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

/// Keeps the header and the rows whose first column is at most `last`: what was written after the checkpoint is done
/// again.
fn keep_rows(path: &Path, header: &str, last: u64) -> Result<()> {
    let before = fs::read_to_string(path).unwrap_or_default();
    let mut kept = format!("{header}\n");
    for line in before.lines().skip(1) {
        let number = line
            .split(',')
            .next()
            .and_then(|number| number.parse::<u64>().ok());
        if number.is_some_and(|number| number <= last) {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    write_atomically(path, kept.as_bytes()).with_context(|| format!("writing {}", path.display()))
}

fn append(path: &Path) -> Result<fs::File> {
    fs::OpenOptions::new()
        .append(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}

/// Progress of an epoch on standard error: a bar, or a line every ten seconds where it is not a terminal.
struct Progress {
    bar: ProgressBar,
    is_plain: bool,
    epoch: String,
    last_line: std::cell::Cell<Instant>,
}

impl Progress {
    fn new(n_epochs: u32, epoch: u32, steps: &[Vec<usize>], first: usize) -> Self {
        let count = |steps: &[Vec<usize>]| steps.iter().map(Vec::len).sum::<usize>() as u64;
        let target = ProgressDrawTarget::stderr();
        let is_plain = target.is_hidden();
        let bar = ProgressBar::with_draw_target(Some(count(steps)), target);
        if let Ok(style) = ProgressStyle::with_template(
            "{prefix} [{bar:30}] {pos}/{len} images, {msg}, {eta} left",
        ) {
            bar.set_style(style.progress_chars("=> "));
        }
        let epoch = format!("epoch {}/{n_epochs}", epoch + 1);
        bar.set_prefix(epoch.clone());
        bar.set_position(count(&steps[..first.min(steps.len())]));
        bar.reset_eta();
        Self {
            bar,
            is_plain,
            epoch,
            last_line: std::cell::Cell::new(Instant::now()),
        }
    }

    #[expect(clippy::print_stderr, reason = "progress belongs to standard error")]
    fn tell(&self, n_images: u64, loss: f64, images_per_second: f64) {
        self.bar.inc(n_images);
        if !self.is_plain {
            self.bar
                .set_message(format!("{images_per_second:.1} images/s, loss {loss:.4}"));
        } else if self.last_line.get().elapsed() >= LINE_INTERVAL {
            self.last_line.set(Instant::now());
            eprintln!(
                "{}: {} of {} images, {images_per_second:.1} images/s, loss {loss:.4}, {} s left",
                self.epoch,
                self.bar.position(),
                self.bar.length().unwrap_or(0),
                self.bar.eta().as_secs()
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{CacheManifest, FORMAT_VERSION};
    use crate::index::{Row, to_csv};
    use crate::random::Random;
    use shared::TENSOR_BYTES;
    use shared::manifest::DataKind;
    use shared::uid::Uid;

    /// A cache of `n` images of noise, those with PE a little brighter; two of ten are for validation.
    fn cache(folder: &Path, n: usize) -> Cache {
        let mut random = Random::new(9, 0);
        let (mut tensors, mut rows) = (Vec::new(), Vec::new());
        for index in 0..n {
            let pe_present = index % 2 == 1;
            let offset = if pe_present { 40 } else { 0 };
            tensors.extend(
                (0..TENSOR_BYTES).map(|_| u8::try_from(random.below(200) + offset).unwrap()),
            );
            let uid = |text: String| Uid::new(&text).unwrap();
            rows.push(Row {
                study_uid: uid(format!("1.2.{index}")),
                series_uid: uid(format!("1.2.{index}.1")),
                sop_uid: uid(format!("1.2.{index}.1.1")),
                part: if index % 10 < 8 {
                    Part::Train
                } else {
                    Part::Val
                },
                pe_present,
                exam_labels: None,
                z_mm: None,
                manufacturer: None,
                spacing_mm: None,
            });
        }
        let manifest = CacheManifest {
            format_version: FORMAT_VERSION,
            preprocess: shared::spec::PreprocessSpec::default(),
            kind: DataKind::Phantom,
            source: "test".into(),
            source_digest: "0".repeat(64),
            split: "study".into(),
            n_rows: n as u64,
            tensors_digest: "1".repeat(64),
            index_digest: "2".repeat(64),
            left_out: Vec::new(),
        };
        fs::create_dir_all(folder).unwrap();
        fs::write(folder.join("tensors.u8"), tensors).unwrap();
        fs::write(folder.join("index.csv"), to_csv(&rows).unwrap()).unwrap();
        fs::write(
            folder.join("manifest.json"),
            serde_json::to_string(&manifest).unwrap(),
        )
        .unwrap();
        Cache::open(folder).unwrap()
    }

    fn options() -> TrainOptions {
        TrainOptions {
            width: 0.001,
            epochs: Some(2),
            batch: 6,
            seed: 5,
            ..TrainOptions::default()
        }
    }

    fn weights(run: &Path) -> Vec<u8> {
        fs::read(run.join(WEIGHTS_FILE)).unwrap()
    }

    #[test]
    fn weights_are_the_same_bits_for_every_number_of_threads() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(&folder.path().join("cache"), 20);
        let mut found = Vec::new();
        for threads in [1, 2, 5] {
            let out = folder.path().join(threads.to_string());
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            let summary = pool.install(|| train(&options(), &cache, &out)).unwrap();
            assert_eq!(
                (summary.steps, summary.epochs, summary.is_stopped),
                (6, 2, false)
            );
            found.push(weights(&out));
        }
        assert!(found.iter().all(|weights| *weights == found[0]));
        let history = fs::read_to_string(folder.path().join("1/history.csv")).unwrap();
        assert_eq!(history.lines().count(), 7);
        assert!(history.starts_with("step,epoch,loss\n1,1,"));
    }

    #[test]
    fn stopped_run_continues_to_the_same_weights_and_tables() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(&folder.path().join("cache"), 20);
        let options = TrainOptions {
            augmentation: Augmentation {
                flip: true,
                shift: 3,
            },
            ..options()
        };
        let whole = folder.path().join("whole");
        train(&options, &cache, &whole).unwrap();
        let parts = folder.path().join("parts");
        // Stopped before its first step, which leaves a checkpoint; then, as by a kill, rows written past it.
        assert!(
            train_until(&options, &cache, &parts, &AtomicBool::new(true))
                .unwrap()
                .is_stopped
        );
        let resumed = TrainOptions {
            resume: true,
            ..options.clone()
        };
        writeln!(append(&parts.join("history.csv")).unwrap(), "1,1,9.5").unwrap();
        assert!(
            train(&options, &cache, &parts).is_err(),
            "a run is not overwritten without --resume"
        );
        train(&resumed, &cache, &parts).unwrap();
        assert!(weights(&whole) == weights(&parts));
        let history = |run: &Path| fs::read_to_string(run.join("history.csv")).unwrap();
        assert_eq!(history(&whole), history(&parts));
        let other = TrainOptions { seed: 6, ..resumed };
        let message = format!("{:#}", train(&other, &cache, &parts).unwrap_err());
        assert!(message.contains("was started as"), "{message}");
    }

    #[test]
    fn frozen_backbone_keeps_its_weights_and_needs_to_know_where_they_come_from() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(&folder.path().join("cache"), 10);
        let frozen = TrainOptions {
            model: "resnet50-frozen".into(),
            ..options()
        };
        let error = train(&frozen, &cache, &folder.path().join("none")).unwrap_err();
        assert!(format!("{error:#}").contains("--random-init"), "{error:#}");
        let random = TrainOptions {
            random_init: true,
            ..frozen.clone()
        };
        let run = folder.path().join("run");
        train(&random, &cache, &run).unwrap();
        // Its own weights are first weights too, as torchvision's are; those it began with come back from a run of no epochs.
        let first = folder.path().join("first");
        let begun = TrainOptions {
            epochs: Some(0),
            ..random
        };
        train(&begun, &cache, &first).unwrap();
        let read = |run: &Path| {
            crate::export::read_weights(&run.join(WEIGHTS_FILE))
                .unwrap()
                .2
        };
        let (before, after) = (read(&first), read(&run));
        for (name, weight) in &before {
            assert_eq!(*weight == after[name], !name.starts_with("fc."), "{name}");
        }
        let from_file = TrainOptions {
            init: Some(first.join(WEIGHTS_FILE)),
            ..frozen
        };
        let again = folder.path().join("again");
        train(&from_file, &cache, &again).unwrap();
        assert!(read(&again) == after);
    }

    #[test]
    fn quantization_aware_run_continues_to_the_same_weights() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(&folder.path().join("cache"), 20);
        let options = TrainOptions {
            model: "vanilla".into(),
            qat_epochs: 1,
            ..options()
        };
        let whole = folder.path().join("whole");
        train(&options, &cache, &whole).unwrap();
        assert!(whole.join(quantization_aware::FILE_NAME).exists());
        let parts = folder.path().join("parts");
        let stop = AtomicBool::new(true);
        assert!(
            train_until(&options, &cache, &parts, &stop)
                .unwrap()
                .is_stopped
        );
        let resumed = TrainOptions {
            resume: true,
            ..options.clone()
        };
        train(&resumed, &cache, &parts).unwrap();
        assert!(weights(&whole) == weights(&parts));
        let transfer = TrainOptions {
            model: "resnet50".into(),
            random_init: true,
            ..options
        };
        let error = train(&transfer, &cache, &folder.path().join("other")).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::Usage);
    }

    #[test]
    fn order_file_fixes_the_batches() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(&folder.path().join("cache"), 10);
        let order = folder.path().join("order.csv");
        fs::write(&order, "0 1 2\n3 4\n").unwrap();
        let ordered = TrainOptions {
            order: Some(order.clone()),
            ..options()
        };
        assert_eq!(
            train(&ordered, &cache, &folder.path().join("a"))
                .unwrap()
                .steps,
            2
        );
        fs::write(&order, "0 10\n").unwrap();
        assert!(train(&ordered, &cache, &folder.path().join("b")).is_err());
    }

    #[test]
    fn sgd_loss_falls_on_separable_images() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(&folder.path().join("cache"), 20);
        let vanilla = TrainOptions {
            model: "vanilla".into(),
            epochs: Some(6),
            learning_rate: Some(0.03),
            ..options()
        };
        train(&vanilla, &cache, &folder.path().join("run")).unwrap();
        let epochs = fs::read_to_string(folder.path().join("run/epochs.csv")).unwrap();
        let loss = |line: &str| line.split(',').nth(1).unwrap().parse::<f64>().unwrap();
        let losses: Vec<f64> = epochs.lines().skip(1).map(loss).collect();
        assert!(losses[5] < losses[0], "{losses:?}");
    }
}
