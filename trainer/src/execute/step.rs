//! One step of a graph: an operator on tensors.

use std::sync::Arc;

use super::convolution::Convolution;
use super::pool::Pool;
use super::{ExecuteError, Tensor};

#[derive(Debug)]
pub(super) struct Step {
    pub(super) name: String,
    pub(super) operation: Operation,
    pub(super) inputs: Vec<usize>,
    pub(super) output: usize,
}

#[derive(Debug)]
pub(super) enum Operation {
    Identity,
    Multiply(f32),
    Convolution(Convolution),
    Relu,
    Pool(Pool),
    GlobalAverage,
    Flatten,
    Dense {
        weight: Arc<Tensor>,
        bias: Arc<Tensor>,
    },
    Sigmoid,
    Add,
    Concat,
    Quantize {
        scale: f32,
        zero_point: f32,
        low: f32,
        high: f32,
    },
    Dequantize {
        scale: f32,
        zero_point: f32,
    },
}

impl Operation {
    pub(super) fn is_element_wise(&self) -> bool {
        !matches!(
            self,
            Self::Convolution(_)
                | Self::Pool(_)
                | Self::GlobalAverage
                | Self::Dense { .. }
                | Self::Concat
        )
    }

    pub(super) fn element_wise(
        &self,
        mut tensor: Tensor,
        second: Option<&Tensor>,
        node: &str,
    ) -> Result<Tensor, ExecuteError> {
        let values = tensor.values.iter_mut();
        match *self {
            Self::Multiply(factor) => values.for_each(|value| *value *= factor),
            Self::Relu => values.for_each(|value| *value = value.max(0.0)),
            Self::Sigmoid => values.for_each(|value| *value = 1.0 / (1.0 + (-*value).exp())),
            Self::Quantize {
                scale,
                zero_point,
                low,
                high,
            } => {
                let (low, high) = (low - zero_point, high - zero_point);
                values.for_each(|value| {
                    *value = nearest((*value / scale).clamp(low, high)) + zero_point
                });
            }
            Self::Dequantize { scale, zero_point } => {
                values.for_each(|value| *value = (*value - zero_point) * scale)
            }
            Self::Flatten => tensor.shape = vec![tensor.values.len()],
            Self::Add => {
                let second = second.filter(|second| second.shape == tensor.shape);
                let Some(second) = second else {
                    return Err(ExecuteError::Shape {
                        node: node.to_owned(),
                        found: tensor.shape,
                    });
                };
                values
                    .zip(&second.values)
                    .for_each(|(value, other)| *value += other);
            }
            _ => {}
        }
        Ok(tensor)
    }
}

/// The nearest integer, ties to even, of a value below 2^22. `round_ties_even` calls the C library for each value where nothing newer than SSE2 is
/// compiled for.
pub(crate) fn nearest(value: f32) -> f32 {
    /// Where the distance from one f32 to the next is 1.
    const UNIT: f32 = 12_582_912.0;
    (value + UNIT) - UNIT
}

pub(super) fn dense(input: &Tensor, weight: &Tensor, bias: &Tensor) -> Option<Tensor> {
    let &[n_outputs, n_inputs] = weight.shape.as_slice() else {
        return None;
    };
    if input.values.len() != n_inputs || bias.values.len() != n_outputs {
        return None;
    }
    let rows = weight
        .values
        .chunks_exact(n_inputs.max(1))
        .zip(&bias.values);
    // 16 partial sums: enough for vector registers, and an error that grows with the square root of a 16th of the length.
    let values = rows.map(|(row, bias)| {
        let mut partial = [0.0_f32; 16];
        let (row, input) = (row.as_chunks::<16>(), input.values.as_chunks::<16>());
        for (row, input) in row.0.iter().zip(input.0) {
            for lane in 0..16 {
                partial[lane] += row[lane] * input[lane];
            }
        }
        let rest: f32 = row
            .1
            .iter()
            .zip(input.1)
            .map(|(weight, input)| weight * input)
            .sum();
        partial.iter().sum::<f32>() + rest + bias
    });
    Some(Tensor {
        shape: vec![n_outputs],
        values: values.collect(),
    })
}

pub(super) fn concat(inputs: &[&Tensor]) -> Option<Tensor> {
    let mut output = Tensor::default();
    for input in inputs {
        match output.shape.as_mut_slice() {
            [] => output.shape.clone_from(&input.shape),
            [channels, inner @ ..] if *inner == input.shape[1..] => *channels += input.shape[0],
            _ => return None,
        }
        output.values.extend_from_slice(&input.values);
    }
    Some(output)
}
