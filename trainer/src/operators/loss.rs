//! Binary cross-entropy on logits, as Keras trains it.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{values, with_values};

/// Mean over the batch of `weight * (max(x, 0) - x * y + ln(1 + exp(-|x|)))` for logits x `[image, 1]` and targets
/// `[image, 2]`: label y (0 or 1) and weight. Finite for every finite logit. The mean divides by the number of images,
/// not by the sum of the weights (Keras `sum_over_batch_size`). Sums are in f64.
#[derive(Debug, Clone, Copy)]
pub struct BinaryCrossEntropy;

/// The loss of one logit; see [`BinaryCrossEntropy`].
fn one(logit: f64, label: f64) -> f64 {
    logit.max(0.0) - logit * label + (-logit.abs()).exp().ln_1p()
}

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

impl CustomOp2 for BinaryCrossEntropy {
    fn name(&self) -> &'static str {
        "binary-cross-entropy"
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "the mean is rounded to f32 once; batches are small"
    )]
    fn cpu_fwd(
        &self,
        logits: &CpuStorage,
        logits_layout: &Layout,
        targets: &CpuStorage,
        targets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (logits, targets) = (
            values::<f32>(logits, logits_layout)?,
            values::<f32>(targets, targets_layout)?,
        );
        if targets.len() != 2 * logits.len() || logits.is_empty() {
            bail!(
                "{} targets for {} logits; two each are needed",
                targets.len(),
                logits.len()
            )
        }
        let sum: f64 = logits
            .iter()
            .zip(targets.chunks_exact(2))
            .map(|(&logit, target)| {
                f64::from(target[1])
                    * if logit.is_nan() {
                        f64::NAN
                    } else {
                        one(logit.into(), target[0].into())
                    }
            })
            .sum();
        Ok((
            CpuStorage::F32(vec![(sum / logits.len() as f64) as f32]),
            Shape::from(()),
        ))
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "rounded to f32 once; batches are small"
    )]
    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _loss: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let scale = f64::from(gradient.to_scalar::<f32>()?) / logits.elem_count() as f64;
        let gradients: Vec<f32> = with_values::<f32, _>(logits, |logits| {
            with_values::<f32, _>(targets, |targets| {
                logits
                    .iter()
                    .zip(targets.chunks_exact(2))
                    .map(|(&logit, target)| {
                        (scale
                            * f64::from(target[1])
                            * (sigmoid(logit.into()) - f64::from(target[0])))
                            as f32
                    })
                    .collect()
            })
        })??;
        Ok((
            Some(Tensor::from_vec(
                gradients,
                logits.shape(),
                logits.device(),
            )?),
            None,
        ))
    }
}
