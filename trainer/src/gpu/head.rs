//! The end of every network on the GPU: a hidden layer or features to logits, to the loss, and back.
//!
//! In: `z [image, unit]`, f32, what stands before bias and ReLU. Out: logits, each image's loss, gradients. A transfer learner's features are means of what a
//! ReLU left: bias 0 and another ReLU leave them as they are, and its gradient is 0 only where all of theirs are.

use anyhow::Result;

use super::device::Argument::{Int, Pointer};
use super::device::{Device, Grid, Memory};
use super::network::{Targets, stored};
use crate::train::Precision;

/// Values or gradients of the parameters behind `z`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    pub(crate) bias1: u64,
    pub(crate) weight2: u64,
    pub(crate) bias2: u64,
}

/// Buffers of the end of a step.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) units: usize,
    pub(crate) z: Memory,
    /// That of `z`, stored as activations are.
    pub(crate) gradient: Memory,
    pub(crate) logits: Memory,
    logit_gradient: Memory,
    image_loss: Memory,
}

impl Head {
    pub(crate) fn new(
        device: &Device,
        units: usize,
        n: usize,
        precision: Precision,
    ) -> Result<Self> {
        Ok(Self {
            units,
            z: device.zeros(4 * n * units)?,
            gradient: device.zeros(precision.bytes() * n * units)?,
            logits: device.zeros(4 * n)?,
            logit_gradient: device.zeros(4 * n)?,
            image_loss: device.zeros(4 * n)?,
        })
    }

    /// `z` to logits, and to the loss where there are targets.
    pub(crate) fn forward(
        &self,
        device: &mut Device,
        weights: Ends,
        n: usize,
        targets: Option<Targets>,
    ) -> Result<()> {
        let n_total = targets.map_or(1, |targets| targets.n_total);
        let grid = Grid {
            blocks: [n, 1, 1],
            threads: [32, 1],
            shared_bytes: 0,
        };
        let arguments = [
            Pointer(self.z.pointer()),
            Pointer(weights.bias1),
            Pointer(weights.weight2),
            Pointer(weights.bias2),
            Pointer(targets.map_or(0, |targets| targets.targets)),
            Pointer(self.logits.pointer()),
            Pointer(self.image_loss.pointer()),
            Pointer(self.logit_gradient.pointer()),
            Int(self.units),
            Int(n_total),
        ];
        device.launch("head_forward", grid, &arguments)
    }

    /// Gradients of `z` and of the parameters behind it; the loss.
    pub(crate) fn backward(
        &self,
        device: &mut Device,
        precision: Precision,
        (weights, gradients): (Ends, Ends),
        n: usize,
        targets: Targets,
    ) -> Result<()> {
        let grid = Grid {
            blocks: [self.units.div_ceil(32), 1, 1],
            threads: [32, 8],
            shared_bytes: 0,
        };
        let arguments = [
            Pointer(self.z.pointer()),
            Pointer(weights.bias1),
            Pointer(weights.weight2),
            Pointer(self.image_loss.pointer()),
            Pointer(self.logit_gradient.pointer()),
            Pointer(self.gradient.pointer()),
            Pointer(gradients.bias1),
            Pointer(gradients.weight2),
            Pointer(gradients.bias2),
            Pointer(targets.loss),
            Int(n),
            Int(self.units),
        ];
        device.launch(stored!(precision, "head_backward"), grid, &arguments)
    }
}
