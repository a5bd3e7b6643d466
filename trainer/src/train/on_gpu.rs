//! A run on the GPU: what it brings there, an epoch's steps, and what comes back.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};

use super::Precision;
use super::run::{Record, Run};
use crate::architecture::OptimiserKind;
use crate::batches::{changes, for_each_batch};
use crate::gpu::{Choice, Gpu, Mark, Work};
use crate::operators::optimiser::adam_rate;

/// Steps whose losses are fetched together, while as many others are under way.
const BLOCK: usize = 32;

impl Run<'_> {
    /// Brings the run to a GPU.
    pub(super) fn open_gpu(&mut self, ordinal: usize, precision: Precision) -> Result<()> {
        let rows: BTreeSet<usize> = match &self.plan.order {
            Some(steps) => steps.iter().flatten().copied().collect(),
            None => {
                let used = [self.plan.sample.rows(), self.plan.validation.rows()];
                used.into_iter().flatten().collect()
            }
        };
        let rows: Vec<usize> = rows.into_iter().collect();
        let largest = match &self.plan.order {
            Some(steps) => steps.iter().map(Vec::len).max().unwrap_or(1),
            None => self.options.batch.min(rows.len()),
        };
        let choice = Choice {
            ordinal,
            precision,
            most_images: largest.div_ceil(self.ranks.n() as usize),
            // A launcher's single process goes through NCCL as several do.
            has_communicator: self.ranks.n() > 1 || std::env::var_os("WORLD_SIZE").is_some(),
        };
        let (architecture, width) = (self.network.architecture(), self.network.width());
        let gpu = Gpu::open(
            choice,
            architecture,
            width,
            self.cache,
            &rows,
            &mut self.ranks,
        )?;
        self.gpu = Some(gpu);
        self.set_gpu()
    }

    /// Gives the GPU this run's weights and moments.
    pub(super) fn set_gpu(&mut self) -> Result<()> {
        match &mut self.gpu {
            Some(gpu) => gpu.set(self.network.parameters(), &self.moments),
            None => Ok(()),
        }
    }

    /// Logits of rows on the GPU, where there is one.
    pub(super) fn logits_on_gpu(&mut self, rows: &[usize]) -> Result<Option<Vec<f32>>> {
        let gpu = self.gpu.as_mut();
        gpu.map(|gpu| gpu.logits(self.cache, rows)).transpose()
    }

    /// As `Run::epoch`, on the GPU; afterwards this run's weights and moments are the GPU's.
    pub(super) fn epoch_on_gpu(&mut self, stop: &AtomicBool) -> Result<bool> {
        let steps = self.plan.steps(self.options, self.position.epoch);
        let first = usize::try_from(self.position.step_in_epoch).context("steps of an epoch")?;
        let work: Vec<Work> = (0..steps.len())
            .map(|index| self.work(index, &steps[index]))
            .collect();
        let begin = Instant::now();
        let mut gpu = self.gpu.take().context("a GPU")?;
        gpu.begin(&work)?;
        let tuned = Instant::now();
        let walk = Walk {
            stop,
            steps: &steps,
            next: first,
            marked: first,
            mark: None,
            is_over: false,
            record: self.record(&steps, first)?,
            begin: tuned,
        };
        let walked = self.walk(&mut gpu, &work, walk);
        let is_whole = walked.and_then(|is_whole| {
            self.moments = gpu.get(self.network.parameters())?;
            Ok(is_whole)
        });
        self.watch.tuning += tuned - begin;
        self.watch.training += tuned.elapsed();
        self.gpu = Some(gpu);
        is_whole
    }

    /// This rank's part of a step.
    fn work(&self, index: usize, rows: &[usize]) -> Work {
        let share = self.ranks.share(rows.len());
        let own = rows[share.clone()].to_vec();
        let target = |row: &usize| {
            let pe_present = self.cache.rows()[*row].pe_present;
            let weight = self.plan.weights[usize::from(pe_present)];
            [f32::from(u8::from(pe_present)), weight]
        };
        let options = self.options;
        let changes = changes(
            options.augmentation,
            options.seed,
            self.position.epoch,
            index,
            share.start,
            own.len(),
        );
        Work {
            targets: own.iter().flat_map(target).collect(),
            changes,
            n_total: rows.len(),
            rows: own,
        }
    }

    /// All steps of an epoch that are left; false where it was stopped before its end.
    fn walk(&mut self, gpu: &mut Gpu, work: &[Work], mut walk: Walk<'_>) -> Result<bool> {
        let first = walk.next;
        if gpu.is_streaming() {
            let own: Vec<Vec<usize>> = work.iter().map(|work| work.rows.clone()).collect();
            for_each_batch(
                self.cache,
                &own,
                first,
                self.plan.weights,
                |_, _| (),
                |index, batch| self.one(gpu, index, Some(&batch.images), &mut walk),
            )?;
        } else {
            for index in first..work.len() {
                if !self.one(gpu, index, None, &mut walk)? {
                    break;
                }
            }
        }
        if walk.next > walk.marked {
            let last = gpu.mark(walk.marked, walk.next)?;
            walk.marked = walk.next;
            if let Some(before) = walk.mark.replace(last) {
                self.fetch(gpu, &before, &mut walk)?;
            }
        }
        if let Some(last) = walk.mark.take() {
            self.fetch(gpu, &last, &mut walk)?;
        }
        Ok(walk.next == work.len())
    }

    /// Puts one step on the GPU; false where the run is to stop behind it.
    fn one(
        &mut self,
        gpu: &mut Gpu,
        index: usize,
        pixels: Option<&[u8]>,
        walk: &mut Walk<'_>,
    ) -> Result<bool> {
        if walk.is_over || self.ranks.n() == 1 && walk.stop.load(Ordering::Relaxed) {
            return Ok(false);
        }
        // Position follows the losses; the step is ahead of it.
        let ahead = (index - walk.fetched()) as u64;
        let rate = self.rate_ahead(walk.steps.len(), ahead);
        self.last_rate = rate;
        let rate = match self.plan.optimiser {
            OptimiserKind::Adam => adam_rate(self.position.step + ahead + 1, rate),
            #[expect(
                clippy::cast_possible_truncation,
                reason = "a rate is rounded to the weights' precision"
            )]
            OptimiserKind::Sgd => rate as f32,
        };
        gpu.step(index, rate, pixels)?;
        walk.next = index + 1;
        if walk.next - walk.marked < BLOCK {
            return Ok(true);
        }
        let mark = gpu.mark(walk.marked, walk.next)?;
        walk.marked = walk.next;
        if let Some(before) = walk.mark.replace(mark) {
            self.fetch(gpu, &before, walk)?;
        }
        Ok(!walk.is_over)
    }

    /// Takes the losses of marked steps into position, table and progress.
    fn fetch(&mut self, gpu: &Gpu, mark: &Mark, walk: &mut Walk<'_>) -> Result<()> {
        let mut losses = gpu.losses(mark)?;
        if self.ranks.n() > 1 {
            losses.push(f32::from(u8::from(walk.stop.load(Ordering::Relaxed))));
            self.ranks.sum(&mut losses)?;
            walk.is_over |= losses.pop().is_some_and(|wants_stop| wants_stop > 0.0);
        }
        for (index, loss) in (mark.begin()..).zip(losses) {
            let (n_images, running) = (walk.steps[index].len(), walk.begin.elapsed());
            self.count(index, n_images, loss, &mut walk.record, running)?;
        }
        Ok(())
    }
}

/// An epoch in progress: what was put on the GPU, and what has come back.
struct Walk<'a> {
    stop: &'a AtomicBool,
    steps: &'a [Vec<usize>],
    /// The step after the last that was put there.
    next: usize,
    /// The step after the last whose loss is on its way.
    marked: usize,
    mark: Option<Mark>,
    /// Whether all ranks know that one wants to stop.
    is_over: bool,
    record: Record,
    begin: Instant,
}

impl Walk<'_> {
    /// The first step whose loss has not come yet.
    fn fetched(&self) -> usize {
        self.mark.as_ref().map_or(self.marked, Mark::begin)
    }
}
