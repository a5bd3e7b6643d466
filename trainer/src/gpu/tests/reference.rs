//! A step in f64, rounded where the GPU writes to memory in bf16.

use crate::batches::Change;
use crate::operators::definition::{Map, convolution_relu_pool, convolution_relu_pool_gradient};
use crate::train::Precision;

/// The network of a step.
pub(super) struct Reference<'a> {
    pub(super) side: usize,
    pub(super) precision: Precision,
    /// In the files' order and shapes.
    pub(super) weights: &'a [Vec<f32>],
    pub(super) n_total: usize,
}

/// What it comes to.
pub(super) struct Step {
    pub(super) loss: f64,
    pub(super) logits: Vec<f64>,
    pub(super) gradients: Vec<Vec<f64>>,
}

/// To 8 bits of mantissa, to nearest, ties to even.
pub(super) fn bf16(value: f64) -> f64 {
    let bits = (value as f32).to_bits();
    f64::from(f32::from_bits(
        (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF_0000,
    ))
}

fn add(to: &mut [f64], values: impl IntoIterator<Item = f64>) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += value;
    }
}

impl Reference<'_> {
    /// As activations and factors are stored.
    fn stored(&self, value: f64) -> f64 {
        match self.precision {
            Precision::Bf16 => bf16(value),
            Precision::F32 => value,
        }
    }

    fn stored_all(&self, values: &[f64]) -> Vec<f64> {
        values.iter().map(|value| self.stored(*value)).collect()
    }

    /// A parameter's master weights.
    fn master(&self, index: usize) -> Vec<f64> {
        self.weights[index].iter().map(|v| f64::from(*v)).collect()
    }

    /// What activations are multiplied with.
    fn factor(&self, index: usize) -> Vec<f64> {
        self.stored_all(&self.master(index))
    }

    fn map(&self, image: &[u8], change: Change) -> Map {
        let side = self.side;
        let mut values = vec![0.0; image.len()];
        for (at, value) in values.iter_mut().enumerate() {
            let (plane, row, column) = (at / side / side, at / side % side, at % side);
            let column = if change.is_flipped {
                side - 1 - column
            } else {
                column
            };
            let moved = |at: usize, by: i32| at.checked_add_signed(by as isize);
            if let (Some(row), Some(column)) =
                (moved(row, change.down), moved(column, change.right))
                && row < side
                && column < side
            {
                *value = f64::from(image[(plane * side + row) * side + column]) / 255.0;
            }
        }
        Map {
            channels: 3,
            rows: side,
            columns: side,
            values,
        }
    }

    /// Loss, logits and gradients for images with their change, label and weight.
    pub(super) fn step<'i>(
        &self,
        images: impl Iterator<Item = (&'i [u8], Change, [f32; 2])>,
    ) -> Step {
        let mut step = Step {
            loss: 0.0,
            logits: Vec::new(),
            gradients: self.weights.iter().map(|w| vec![0.0; w.len()]).collect(),
        };
        for (image, change, [label, weight]) in images {
            self.image(self.map(image, change), label, weight, &mut step);
        }
        // A filter's gradient is summed over the images before it is stored.
        let dense1 = self.weights.len() - 4;
        for index in (2..dense1).step_by(2) {
            step.gradients[index] = self.stored_all(&step.gradients[index]);
        }
        step
    }

    fn image(&self, image: Map, label: f32, weight: f32, step: &mut Step) {
        let dense1 = self.weights.len() - 4;
        let n_blocks = dense1 / 2;
        // The first layer's sums are never stored.
        let sum = |layer: usize| {
            move |value: f64| {
                if layer == 0 {
                    value
                } else {
                    self.stored(value)
                }
            }
        };
        let mut maps = vec![image];
        for layer in 0..n_blocks {
            let (factor, bias) = (self.factor(2 * layer), self.master(2 * layer + 1));
            let mut map = convolution_relu_pool(&maps[layer], &factor, &bias, sum(layer));
            map.values = self.stored_all(&map.values);
            maps.push(map);
        }
        let flat = &maps[n_blocks].values;
        let (factor1, bias1) = (self.factor(dense1), self.master(dense1 + 1));
        let (weight2, bias2) = (self.master(dense1 + 2), self.master(dense1 + 3));
        let hidden: Vec<f64> = factor1
            .chunks(flat.len())
            .zip(&bias1)
            .map(|(row, bias)| {
                let sum: f64 = row.iter().zip(flat).map(|(a, b)| a * b).sum();
                (sum + bias).max(0.0)
            })
            .collect();
        let logit = hidden.iter().zip(&weight2).map(|(a, b)| a * b).sum::<f64>() + bias2[0];
        let (label, share) = (f64::from(label), f64::from(weight) / self.n_total as f64);
        step.logits.push(logit);
        step.loss += share * (logit.max(0.0) - logit * label + (-logit.abs()).exp().ln_1p());
        let g = share * (1.0 / (1.0 + (-logit).exp()) - label);
        add(&mut step.gradients[dense1 + 3], [g]);
        add(
            &mut step.gradients[dense1 + 2],
            hidden.iter().map(|h| g * h),
        );
        let open = |h: f64, w: f64| if h > 0.0 { g * w } else { 0.0 };
        let before: Vec<f64> = hidden
            .iter()
            .zip(&weight2)
            .map(|(h, w)| open(*h, *w))
            .collect();
        add(&mut step.gradients[dense1 + 1], before.iter().copied());
        let before = self.stored_all(&before);
        let outer = before.iter().flat_map(|d| flat.iter().map(move |f| d * f));
        add(&mut step.gradients[dense1], outer);
        let mut gradient = vec![0.0; flat.len()];
        for (row, d) in factor1.chunks(flat.len()).zip(&before) {
            add(&mut gradient, row.iter().map(|w| w * d));
        }
        for layer in (0..n_blocks).rev() {
            let (factor, bias) = (self.factor(2 * layer), self.master(2 * layer + 1));
            let map = Map {
                values: self.stored_all(&gradient),
                ..maps[layer + 1].clone()
            };
            let back =
                convolution_relu_pool_gradient(&maps[layer], &factor, &bias, &map, sum(layer));
            add(&mut step.gradients[2 * layer], back.weight);
            add(&mut step.gradients[2 * layer + 1], back.bias);
            gradient = back.input;
        }
    }
}
