//! Rounding that gradients do not see: what the int8 graph does to weights and activations, for training.
//!
//! In: f32 values. Out: the values that the integers of the int8 graph stand for. Backward the gradient passes as if nothing had been rounded (Bengio,
//! Léonard, Courville 2013, "straight-through"), but for activations above the largest integer, which get none.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{values, with_values};

/// Largest integer of an activation.
const LARGEST: f32 = 255.0;
/// Values that one task rounds.
const CHUNK: usize = 1 << 14;

/// Replaces a variable by values of the same shape; the gradient passes unchanged.
#[derive(Debug)]
pub struct Replaced {
    /// The values, row-major.
    pub values: Vec<f32>,
}

impl CustomOp1 for Replaced {
    fn name(&self) -> &'static str {
        "replaced"
    }

    fn cpu_fwd(&self, _storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if layout.shape().elem_count() != self.values.len() {
            bail!("{} values for {:?}", self.values.len(), layout.shape())
        }
        let replaced = CpuStorage::F32(self.values.clone());
        Ok((replaced, layout.shape().clone()))
    }

    fn bwd(&self, _variable: &Tensor, _out: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(gradient.clone()))
    }
}

/// An activation of at least 0 as u8 with zero point 0: `min(round_half_even(x / scale), 255) * scale`.
#[derive(Debug, Clone, Copy)]
pub struct RoundedActivation {
    /// What one integer step stands for.
    pub scale: f32,
}

impl CustomOp1 for RoundedActivation {
    fn name(&self) -> &'static str {
        "rounded-activation"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut rounded = values::<f32>(storage, layout)?.to_vec();
        rounded.par_chunks_mut(CHUNK).for_each(|values| {
            for value in values {
                let integer = (*value / self.scale).round_ties_even();
                *value = integer.clamp(0.0, LARGEST) * self.scale;
            }
        });
        Ok((CpuStorage::F32(rounded), layout.shape().clone()))
    }

    fn bwd(&self, input: &Tensor, _out: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let largest = LARGEST * self.scale;
        let passed: Vec<f32> = with_values::<f32, _>(input, |input| {
            with_values::<f32, _>(&gradient.contiguous()?, |gradient| {
                let pairs = gradient.par_iter().zip(input);
                let pass = |(&gradient, &value): (&f32, &f32)| {
                    if value <= largest { gradient } else { 0.0 }
                };
                pairs.map(pass).collect()
            })
        })??;
        Ok(Some(Tensor::from_vec(
            passed,
            input.shape(),
            input.device(),
        )?))
    }
}
