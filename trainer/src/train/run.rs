//! A run in progress: steps, epochs, validation, tables and checkpoints.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::plan::Plan;
use super::progress::Progress;
use super::{BEST_FILE, RunSummary, TrainOptions, WEIGHTS_FILE, judge, logits, to_tensors};
use crate::architecture::OptimiserKind;
use crate::batches::{Batch, augment, for_each_batch};
use crate::cache::Cache;
use crate::checkpoint::{self, Position, write_atomically};
use crate::features::Features;
use crate::network::Network;
use crate::operators::loss::BinaryCrossEntropy;
use crate::operators::optimiser::{AdamStep, Moments, SgdStep};
use crate::quantization_aware;

/// Time spent in training steps, and their images.
#[derive(Default)]
pub(super) struct Watch {
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
pub(super) struct Run<'a> {
    pub(super) options: &'a TrainOptions,
    pub(super) plan: &'a Plan,
    pub(super) cache: &'a Cache,
    pub(super) out: &'a Path,
    pub(super) network: Network,
    pub(super) moments: Vec<Moments>,
    pub(super) position: Position,
    pub(super) fingerprint: String,
    pub(super) watch: Watch,
    /// Loss and accuracy on the validation part.
    pub(super) validation: Option<(f64, f64)>,
    /// Mean loss of the last whole epoch.
    pub(super) last_loss: f64,
    /// Of a frozen backbone.
    pub(super) features: Option<Features>,
}

impl Run<'_> {
    /// Begins anew or continues from the checkpoint, and brings the tables to that place.
    pub(super) fn start(&mut self) -> Result<()> {
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
    pub(super) fn epochs(&mut self, stop: &AtomicBool) -> Result<bool> {
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

    pub(super) fn finish(mut self, is_stopped: bool) -> Result<RunSummary> {
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

pub(super) fn append(path: &Path) -> Result<fs::File> {
    fs::OpenOptions::new()
        .append(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}
