//! A run in progress: steps, epochs, validation, tables and checkpoints.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use candle_core::Tensor;

#[cfg(not(feature = "cuda"))]
use super::no_gpu::Gpu;
use super::plan::Plan;
use super::progress::Progress;
use super::step::Step;
use super::{BEST_FILE, Diverged, RunSummary, TrainOptions, WEIGHTS_FILE, judge, logits};
use crate::batches::{augment, for_each_batch};
use crate::cache::Cache;
use crate::checkpoint::{self, Fingerprint, Position, write_atomically};
use crate::exit::{Exit, fault};
use crate::features::Features;
#[cfg(feature = "cuda")]
use crate::gpu::Gpu;
use crate::network::Network;
use crate::operators::optimiser::Moments;
use crate::quantization_aware;
use crate::ranks::{Place, Ranks};

/// Time spent in training steps, and their images.
#[derive(Default)]
pub(super) struct Watch {
    pub(super) total: Duration,
    pub(super) training: Duration,
    /// Choosing how the GPU computes, before the first step.
    pub(super) tuning: Duration,
    pub(super) n_images: u64,
}

impl Watch {
    fn images_per_second(&self) -> f64 {
        self.images_per_second_with(Duration::ZERO)
    }

    /// With a time that is not counted yet.
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    fn images_per_second_with(&self, running: Duration) -> f64 {
        self.n_images as f64 / (self.training + running).as_secs_f64().max(1e-9)
    }
}

/// Where the steps of an epoch are told: `history.csv`, which rank 0 alone has, and the terminal.
pub(super) struct Record {
    history: Option<fs::File>,
    progress: Progress,
}

/// A run in progress.
pub(super) struct Run<'a> {
    pub(super) options: &'a TrainOptions,
    pub(super) plan: &'a Plan,
    pub(super) cache: &'a Cache,
    pub(super) out: &'a Path,
    pub(super) network: Network,
    /// The GPU that computes, where one does.
    pub(super) gpu: Option<Gpu>,
    /// The processes that share the batches.
    pub(super) ranks: Ranks,
    /// Whether a rank was asked to stop, as all of them know since the last step.
    pub(super) is_stop_agreed: bool,
    pub(super) moments: Vec<Moments>,
    pub(super) position: Position,
    pub(super) fingerprint: Fingerprint,
    pub(super) watch: Watch,
    /// Loss and accuracy on the validation part.
    pub(super) validation: Option<(f64, f64)>,
    /// Mean loss of the last whole epoch, of an earlier process too.
    pub(super) last_loss: Option<f64>,
    /// Learning rate of the last step.
    pub(super) last_rate: f64,
    /// Of a frozen backbone.
    pub(super) features: Option<Features>,
}

impl Run<'_> {
    /// Begins anew or continues from the checkpoint, meets the other ranks, and brings the tables to that place.
    pub(super) fn start(&mut self, place: Option<&Place>) -> Result<()> {
        let config = toml::to_string(self.options).context("writing the configuration")?;
        let found = if self.options.resume {
            checkpoint::load(self.out, self.network.parameters(), &self.fingerprint)?
        } else {
            None
        };
        if let Some((moments, position)) = found {
            (self.moments, self.position) = (moments, position);
        } else if self.out.join(checkpoint::FILE_NAME).exists() {
            return Err(fault(
                Exit::CannotWrite,
                format!(
                    "{} holds a run; continue it with --resume or choose another folder",
                    self.out.display()
                ),
            ));
        }
        let common = format!("{:?} {:?}", self.fingerprint, self.position);
        self.ranks = Ranks::meet(place, &common)?;
        self.spread_weights()?;
        if !self.ranks.is_root() {
            return Ok(());
        }
        write_atomically(&self.out.join("config.toml"), config.as_bytes())?;
        let epochs = self.out.join("epochs.csv");
        keep_rows(
            &self.out.join("history.csv"),
            "step,epoch,loss",
            self.position.step,
        )?;
        keep_rows(
            &epochs,
            "epoch,loss,val_loss,val_accuracy,learning_rate,images_per_second,seconds",
            u64::from(self.position.epoch),
        )?;
        self.last_loss = last_loss(&epochs);
        Ok(())
    }

    /// Gives every rank the weights of rank 0, so that they are the same bits though CPUs may differ.
    fn spread_weights(&mut self) -> Result<()> {
        if self.ranks.n() == 1 {
            return Ok(());
        }
        for parameter in self.network.parameters() {
            let variable = &parameter.variable;
            let mut values = variable.flatten_all()?.to_vec1::<f32>()?;
            self.ranks.spread(&mut values)?;
            let shape = variable.shape();
            variable.set(&Tensor::from_vec(values, shape, variable.device())?)?;
        }
        Ok(())
    }

    /// Trains to the end or to the stop; says whether it was stopped.
    pub(super) fn epochs(&mut self, stop: &AtomicBool) -> Result<bool> {
        let begin = Instant::now();
        while self.position.epoch < self.plan.n_epochs && !self.has_stalled() {
            let epoch_begin = Instant::now();
            self.quantize_where_due()?;
            let is_whole = if self.gpu.is_some() {
                self.epoch_on_gpu(stop)?
            } else {
                self.epoch(stop)?
            };
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
        let first = self.first_quantized_epoch();
        if self.options.qat_epochs == 0 || self.position.epoch < first {
            return Ok(());
        }
        if self.position.epoch == first && self.position.step_in_epoch == 0 {
            let bits = self.options.qat_weight_bits;
            quantization_aware::calibrate(&self.network, self.cache, bits, self.out)?;
        }
        self.quantize()
    }

    /// The first of the last `qat_epochs`, from 0.
    fn first_quantized_epoch(&self) -> u32 {
        self.plan.n_epochs.saturating_sub(self.options.qat_epochs)
    }

    /// Makes the network compute with the run's ranges, and its file name them.
    fn quantize(&mut self) -> Result<()> {
        let ranges = quantization_aware::read(&self.out.join(quantization_aware::FILE_NAME))?;
        let digest = quantization_aware::digest(&ranges)?;
        let provenance = &mut self.network.provenance;
        provenance.insert(quantization_aware::DIGEST.to_owned(), digest);
        Ok(self.network.quantize(&ranges)?)
    }

    /// Makes the network compute, and its file say, how the weights of `n_epochs` whole epochs were trained: a process that resumes a finished
    /// run trains none, and the best epoch may lie before the first quantized one.
    fn quantize_as_after(&mut self, n_epochs: u32) -> Result<()> {
        if self.options.qat_epochs > 0 && n_epochs > self.first_quantized_epoch() {
            return self.quantize();
        }
        self.network.provenance.remove(quantization_aware::DIGEST);
        self.network.compute_in_f32();
        Ok(())
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
        let mut record = self.record(&steps, first)?;
        // This rank's images of each step.
        let shares: Vec<std::ops::Range<usize>> = steps
            .iter()
            .map(|rows| self.ranks.share(rows.len()))
            .collect();
        let own = steps.iter().zip(&shares);
        let own: Vec<Vec<usize>> = own
            .map(|(rows, share)| rows[share.clone()].to_vec())
            .collect();
        let (options, epoch) = (self.options, self.position.epoch);
        let (cache, weights) = (self.cache, self.plan.weights);
        let mut is_whole = true;
        for_each_batch(
            cache,
            &own,
            first,
            weights,
            |step, batch| {
                let place = shares[step].start;
                augment(
                    options.augmentation,
                    options.seed,
                    epoch,
                    step,
                    place,
                    batch,
                );
            },
            |index, batch| {
                if self.is_stop_agreed || self.ranks.n() == 1 && stop.load(Ordering::Relaxed) {
                    is_whole = false;
                    return Ok(false);
                }
                let begin = Instant::now();
                let step = Step {
                    own: &own[index],
                    n_images: steps[index].len(),
                    n_steps: steps.len(),
                };
                let loss = self.step(batch, &step, stop.load(Ordering::Relaxed))?;
                self.watch.training += begin.elapsed();
                self.count(index, steps[index].len(), loss, &mut record, Duration::ZERO)?;
                Ok(true)
            },
        )?;
        Ok(is_whole)
    }

    /// Where the steps of an epoch from `first` on are told.
    pub(super) fn record(&self, steps: &[Vec<usize>], first: usize) -> Result<Record> {
        Ok(Record {
            history: self.table("history.csv")?,
            progress: Progress::new(self.plan.n_epochs, self.position.epoch, steps, first),
        })
    }

    /// Counts step `index` of the epoch, of `n_images` images of all ranks, and tells of it; `running` is training time that is not counted yet.
    pub(super) fn count(
        &mut self,
        index: usize,
        n_images: usize,
        loss: f32,
        record: &mut Record,
        running: Duration,
    ) -> Result<()> {
        let n_images = n_images as u64;
        self.watch.n_images += n_images;
        self.position.step += 1;
        self.position.step_in_epoch = index as u64 + 1;
        #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
        let weighted = f64::from(loss) * n_images as f64;
        self.position.loss_sum += weighted;
        self.position.n_images += n_images;
        let (step, epoch) = (self.position.step, self.position.epoch + 1);
        if !loss.is_finite() {
            return Err(Diverged { step, loss }.into());
        }
        if let Some(history) = &mut record.history {
            writeln!(history, "{step},{epoch},{loss}").context("writing history.csv")?;
            let speed = self.watch.images_per_second_with(running);
            record.progress.tell(n_images, self.mean_loss(), speed);
        }
        Ok(())
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of images are far below 2^53"
    )]
    fn mean_loss(&self) -> f64 {
        self.position.loss_sum / self.position.n_images as f64
    }

    pub(super) fn rate(&self, steps_in_epoch: usize) -> f64 {
        self.rate_ahead(steps_in_epoch, 0)
    }

    /// The learning rate of the step `ahead` steps behind the position.
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of steps are far below 2^53"
    )]
    pub(super) fn rate_ahead(&self, steps_in_epoch: usize, ahead: u64) -> f64 {
        let step = self.position.step_in_epoch + ahead;
        let in_epoch = step as f64 / steps_in_epoch.max(1) as f64;
        let done =
            (f64::from(self.position.epoch) + in_epoch) / f64::from(self.plan.n_epochs.max(1));
        self.plan.rate(self.options.schedule, done)
    }

    /// Validation, the epoch's row, the checkpoint.
    fn end_epoch(&mut self, elapsed: Duration) -> Result<()> {
        self.last_loss = Some(self.mean_loss());
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
            if self.options.patience.is_some() && self.ranks.is_root() {
                self.network.save(&self.out.join(BEST_FILE))?;
            }
        }
        let (val_loss, val_accuracy) = match self.validation {
            Some((loss, accuracy)) => (loss.to_string(), accuracy.to_string()),
            None => (String::new(), String::new()),
        };
        let Some(mut epochs) = self.table("epochs.csv")? else {
            return Ok(());
        };
        writeln!(
            epochs,
            "{},{},{val_loss},{val_accuracy},{},{:.2},{:.1}",
            self.position.epoch,
            self.last_loss.unwrap_or(f64::NAN),
            self.last_rate,
            self.watch.images_per_second(),
            elapsed.as_secs_f64()
        )
        .context("writing epochs.csv")?;
        self.save()
    }

    /// Mean loss and accuracy (at logit 0) on the validation part, which the ranks share; `None` where it is empty.
    fn validate(&mut self) -> Result<Option<(f64, f64)>> {
        let rows = self.plan.validation.rows();
        if rows.is_empty() {
            return Ok(None);
        }
        let share = self.ranks.share(rows.len());
        let own = &rows[share.clone()];
        let own = match &mut self.features {
            _ if own.is_empty() => Vec::new(),
            Some(features) => {
                let features = features.of(&self.network, self.cache, own)?;
                self.network.head(&features)?.flatten_all()?.to_vec1()?
            }
            None => match self.logits_on_gpu(own)? {
                Some(logits) => logits,
                None => logits(&self.network, self.cache, own)?,
            },
        };
        let mut all = vec![-0.0; rows.len()];
        all[share].copy_from_slice(&own);
        self.ranks.sum(&mut all)?;
        Ok(Some(judge(&all, self.cache, &rows)))
    }

    /// A table of the run folder to append to; rank 0 alone has it.
    fn table(&self, name: &str) -> Result<Option<fs::File>> {
        let is_root = self.ranks.is_root();
        is_root.then(|| append(&self.out.join(name))).transpose()
    }

    fn save(&self) -> Result<()> {
        if !self.ranks.is_root() {
            return Ok(());
        }
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
            let mut n_epochs = self.position.epoch;
            if self.options.patience.is_some() {
                let best = self.out.join(BEST_FILE);
                if self.ranks.is_root() && best.exists() {
                    self.network.set_weights(&best)?;
                    n_epochs = self.position.best_epoch;
                }
                self.spread_weights()?;
                self.set_gpu()?;
            }
            self.quantize_as_after(n_epochs)?;
            if self.validation.is_none() || self.options.patience.is_some() {
                self.validation = self.validate()?;
            }
            if self.ranks.is_root() {
                self.network.save(&weights)?;
            }
        }
        Ok(RunSummary {
            model: self.options.model.clone(),
            width: self.options.width,
            n_parameters: self.network.n_parameters(),
            n_train: self.plan.sample.counts(),
            n_val: self.plan.validation.counts(),
            epochs: self.position.epoch,
            best_epoch: self
                .options
                .patience
                .filter(|_| !is_stopped && self.position.best_loss.is_finite())
                .map(|_| self.position.best_epoch),
            steps: self.position.step,
            loss: if self.position.n_images > 0 {
                Some(self.mean_loss())
            } else {
                self.last_loss
            },
            n_images: self.watch.n_images,
            val_loss: self.validation.map(|(loss, _)| loss),
            val_accuracy: self.validation.map(|(_, accuracy)| accuracy),
            images_per_second: self.watch.images_per_second(),
            training_seconds: self.watch.training.as_secs_f64(),
            tuning_seconds: self.watch.tuning.as_secs_f64(),
            seconds: self.watch.total.as_secs_f64(),
            gpu: self.gpu.as_ref().map(Gpu::figures).transpose()?,
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

/// The mean loss of the last epoch in `epochs.csv`.
fn last_loss(epochs: &Path) -> Option<f64> {
    let text = fs::read_to_string(epochs).ok()?;
    let last = text.lines().skip(1).last()?;
    last.split(',').nth(1)?.parse().ok()
}

pub(super) fn append(path: &Path) -> Result<fs::File> {
    fs::OpenOptions::new()
        .append(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))
}
