//! What a run does, fixed before it starts: checked options, the slices, the steps and the learning rate.

use anyhow::{Result, bail, ensure};

use super::{Schedule, TrainOptions};
use crate::architecture::{self, Architecture, Family, OptimiserKind};
use crate::backbone::backbone;
use crate::batches::{Sample, read_order};
use crate::cache::{Cache, file_digest};
use crate::checkpoint::Fingerprint;
use crate::exit::{Exit, fault};
use crate::index::Part;

/// Keras' default learning rate of SGD.
const SGD_RATE: f64 = 0.01;
/// Keras' default learning rate of Adam.
const ADAM_RATE: f64 = 0.001;
/// Share of the learning rate that is left at the end of a cosine schedule, and after each third of a step schedule.
const FINAL_SHARE: f64 = 0.01;
const STEP_SHARE: f64 = 0.1;

/// The architecture of options that can be trained with.
///
/// # Errors
/// No such system, one without weights to train, an option out of range.
pub fn checked(options: &TrainOptions) -> Result<&'static Architecture> {
    let usage = |message: String| fault(Exit::Usage, message);
    let architecture = architecture::named(&options.model)?;
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
    if !architecture::is_width(options.width) {
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
    if let Some(images @ 0..2) = options.images {
        return Err(usage(format!(
            "images {images} is less than one of each class"
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

/// What must be equal for a run to continue: every option, with the contents of files in place of their paths, and the data.
pub(super) fn fingerprint(options: &TrainOptions, cache: &Cache) -> Result<Fingerprint> {
    let serde_json::Value::Object(options_by_name) = serde_json::to_value(options)? else {
        bail!("options are a table");
    };
    let mut fingerprint: Fingerprint = options_by_name
        .into_iter()
        .map(|(name, value)| (name, value.to_string()))
        .collect();
    fingerprint.insert("data".to_owned(), cache.digest());
    for (name, path) in [("init", &options.init), ("order", &options.order)] {
        if let Some(path) = path {
            fingerprint.insert(name.to_owned(), file_digest(path)?);
        }
    }
    Ok(fingerprint)
}

/// What a run does, fixed before it starts.
pub(super) struct Plan {
    pub(super) optimiser: OptimiserKind,
    pub(super) learning_rate: f64,
    pub(super) n_epochs: u32,
    pub(super) sample: Sample,
    pub(super) validation: Sample,
    /// The steps of the order file.
    pub(super) order: Option<Vec<Vec<usize>>>,
    /// Weights of the negative and the positive class.
    pub(super) weights: [f32; 2],
}

impl Plan {
    pub(super) fn new(
        options: &TrainOptions,
        architecture: &Architecture,
        cache: &Cache,
    ) -> Result<Self> {
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
        let validation = if order.is_some() {
            Sample::default()
        } else {
            part(Part::Val)
        };
        ensure!(
            options.patience.is_none() || !validation.is_empty(),
            "early stopping (--patience) needs validation slices, of which there are none"
        );
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
            validation,
            weights: if options.class_weights && order.is_none() {
                [weight(negative), weight(positive)]
            } else {
                [1.0; 2]
            },
            sample,
            order,
        })
    }

    pub(super) fn steps(&self, options: &TrainOptions, epoch: u32) -> Vec<Vec<usize>> {
        match &self.order {
            Some(steps) => steps.clone(),
            None => self
                .sample
                .epoch(options.sampling, options.batch, options.seed, epoch),
        }
    }

    /// The learning rate at `done`, the share of the run that is done.
    pub(super) fn rate(&self, schedule: Schedule, done: f64) -> f64 {
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
