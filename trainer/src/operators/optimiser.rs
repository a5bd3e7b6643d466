//! Keras' optimisers, in place.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, Tensor, bail};
use rayon::prelude::*;

use super::values;

/// Values that one task updates.
const CHUNK: usize = 1 << 14;
/// Keras' default for Adam.
pub const ADAM_BETA1: f64 = 0.9;
/// Keras' default for Adam.
pub const ADAM_BETA2: f64 = 0.999;
/// Keras' default for Adam: the epsilon-hat of Kingma and Ba, section 2, added to the uncorrected root.
pub const ADAM_EPSILON: f32 = 1e-7;

/// Running means of Adam for one variable.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Moments {
    /// Mean of the gradient.
    pub first: Vec<f32>,
    /// Mean of the squared gradient.
    pub second: Vec<f32>,
}

/// One step of Adam on one variable:
/// `m += (1 - b1) (g - m)`, `v += (1 - b2) (g^2 - v)`, `w -= rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon)`.
#[derive(Debug)]
pub struct AdamStep<'a> {
    moments: Mutex<&'a mut Moments>,
    rate: f32,
}

/// `rate sqrt(1 - b2^t) / (1 - b1^t)` for step `t` from 1 on.
#[must_use]
pub fn adam_rate(step: u64, learning_rate: f64) -> f32 {
    let t = i32::try_from(step).unwrap_or(i32::MAX);
    let rate = learning_rate * (1.0 - ADAM_BETA2.powi(t)).sqrt() / (1.0 - ADAM_BETA1.powi(t));
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a rate is rounded to the weights' precision"
    )]
    let rate = rate as f32;
    rate
}

impl<'a> AdamStep<'a> {
    /// Step number `step` (from 1) at a learning rate.
    #[must_use]
    pub fn new(moments: &'a mut Moments, step: u64, learning_rate: f64) -> Self {
        Self {
            moments: Mutex::new(moments),
            rate: adam_rate(step, learning_rate),
        }
    }

    /// Updates `variable` by `gradient`.
    ///
    /// # Errors
    /// When either is not a contiguous f32 CPU tensor, or their sizes differ.
    pub fn apply(&self, variable: &Tensor, gradient: &Tensor) -> Result<()> {
        variable.inplace_op2(&gradient.contiguous()?, self)
    }
}

fn pair<'a>(
    variable: &'a mut CpuStorage,
    layout: &Layout,
    gradient: &'a CpuStorage,
    gradient_layout: &Layout,
) -> Result<(&'a mut [f32], &'a [f32])> {
    let (CpuStorage::F32(all), Some((begin, end))) = (variable, layout.contiguous_offsets()) else {
        bail!("variables are contiguous f32")
    };
    let (variable, gradient) = (
        &mut all[begin..end],
        values::<f32>(gradient, gradient_layout)?,
    );
    if variable.len() != gradient.len() {
        bail!(
            "a gradient of {} values for a variable of {}",
            gradient.len(),
            variable.len()
        )
    }
    Ok((variable, gradient))
}

impl InplaceOp2 for AdamStep<'_> {
    fn name(&self) -> &'static str {
        "adam"
    }

    fn cpu_fwd(
        &self,
        variable: &mut CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<()> {
        let (variable, gradient) = pair(variable, layout, gradient, gradient_layout)?;
        let mut guard = self.moments.lock().unwrap_or_else(PoisonError::into_inner);
        let Moments { first, second } = &mut **guard;
        first.resize(variable.len(), 0.0);
        second.resize(variable.len(), 0.0);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the factors are applied in f32"
        )]
        let (forget1, forget2) = ((1.0 - ADAM_BETA1) as f32, (1.0 - ADAM_BETA2) as f32);
        let rate = self.rate;
        variable
            .par_chunks_mut(CHUNK)
            .zip(first.par_chunks_mut(CHUNK))
            .zip(second.par_chunks_mut(CHUNK))
            .zip(gradient.par_chunks(CHUNK))
            .for_each(|(((variable, first), second), gradient)| {
                for (((w, m), v), g) in variable.iter_mut().zip(first).zip(second).zip(gradient) {
                    *m += forget1 * (g - *m);
                    *v += forget2 * (g * g - *v);
                    *w -= rate * *m / (v.sqrt() + ADAM_EPSILON);
                }
            });
        Ok(())
    }
}

/// One step of plain SGD on one variable: `w -= rate g`.
#[derive(Debug, Clone, Copy)]
pub struct SgdStep {
    /// Learning rate.
    pub rate: f32,
}

impl SgdStep {
    /// Updates `variable` by `gradient`.
    ///
    /// # Errors
    /// As [`AdamStep::apply`].
    pub fn apply(&self, variable: &Tensor, gradient: &Tensor) -> Result<()> {
        variable.inplace_op2(&gradient.contiguous()?, self)
    }
}

impl InplaceOp2 for SgdStep {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn cpu_fwd(
        &self,
        variable: &mut CpuStorage,
        layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<()> {
        let (variable, gradient) = pair(variable, layout, gradient, gradient_layout)?;
        variable
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .for_each(|(variable, gradient)| {
                for (w, g) in variable.iter_mut().zip(gradient) {
                    *w -= self.rate * g;
                }
            });
        Ok(())
    }
}
