//! One step of a run: loss and gradients of this rank's images, means over all ranks, the optimiser.

use anyhow::{Context, Result};
use candle_core::Tensor;

use super::run::Run;
use super::to_tensors;
use crate::architecture::OptimiserKind;
use crate::batches::Batch;
use crate::operators::loss::BinaryCrossEntropy;
use crate::operators::optimiser::{AdamStep, SgdStep};

/// What one step is made of.
pub(super) struct Step<'a> {
    /// The rows of this rank.
    pub(super) own: &'a [usize],
    /// Images of all ranks.
    pub(super) n_images: usize,
    /// Steps in the epoch.
    pub(super) n_steps: usize,
}

impl Run<'_> {
    /// One optimiser step; returns the loss before it, over all ranks.
    pub(super) fn step(&mut self, batch: Batch, step: &Step<'_>, wants_stop: bool) -> Result<f32> {
        let (loss, gradients) = self.gradients(batch, step.own)?;
        let (loss, gradients) = self.reduced(loss, gradients, step, wants_stop)?;
        let rate = self.rate(step.n_steps);
        self.last_rate = rate;
        let trained = self.network.parameters().iter().zip(&mut self.moments);
        let trained = trained.filter(|(parameter, _)| parameter.is_trained);
        for ((parameter, moments), gradient) in trained.zip(&gradients) {
            let variable = &parameter.variable;
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
        Ok(loss)
    }

    /// Loss and gradients of the trained parameters, means over this rank's images; zeros where it has none.
    fn gradients(&mut self, batch: Batch, rows: &[usize]) -> Result<(f32, Vec<Tensor>)> {
        let trained = self.network.parameters().iter();
        let trained: Vec<_> = trained.filter(|parameter| parameter.is_trained).collect();
        if rows.is_empty() {
            let zeros = trained
                .iter()
                .map(|parameter| parameter.variable.zeros_like());
            return Ok((0.0, zeros.collect::<Result<_, _>>()?));
        }
        let (images, targets) = to_tensors(batch)?;
        let logits = match &mut self.features {
            Some(features) => {
                let features = features.of(&self.network, self.cache, rows)?;
                self.network.head(&features)?
            }
            None => self.network.forward(&images)?,
        };
        let loss = logits.apply_op2(&targets, BinaryCrossEntropy)?;
        let mut store = loss.backward()?;
        let gradients = trained.iter().map(|parameter| {
            let gradient = store.remove(&parameter.variable);
            gradient.with_context(|| format!("no gradient of {}", parameter.name))
        });
        Ok((loss.to_scalar::<f32>()?, gradients.collect::<Result<_>>()?))
    }

    /// Means over the images of all ranks, from this rank's means. Whether a rank wants to stop travels with them.
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of images are far below 2^24"
    )]
    fn reduced(
        &mut self,
        loss: f32,
        gradients: Vec<Tensor>,
        step: &Step<'_>,
        wants_stop: bool,
    ) -> Result<(f32, Vec<Tensor>)> {
        if self.ranks.n() == 1 {
            return Ok((loss, gradients));
        }
        let (own, all) = (step.own.len() as f32, step.n_images as f32);
        let mut values = vec![f32::from(u8::from(wants_stop)), loss * own];
        for gradient in &gradients {
            let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
            values.extend(gradient.iter().map(|value| value * own));
        }
        self.ranks.sum(&mut values)?;
        self.is_stop_agreed = values[0] > 0.0;
        let loss = values[1] / all;
        let mut rest = &values[2..];
        let mut reduced = Vec::with_capacity(gradients.len());
        for gradient in &gradients {
            let (here, after) = rest.split_at(gradient.elem_count());
            let means: Vec<f32> = here.iter().map(|value| value / all).collect();
            reduced.push(Tensor::from_vec(
                means,
                gradient.shape(),
                gradient.device(),
            )?);
            rest = after;
        }
        Ok((loss, reduced))
    }
}
