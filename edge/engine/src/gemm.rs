//! A dense layer of a graph that is not our chain, hidden or last.
//!
//! In: u8 features. Out: u8 features by the arithmetic of [`crate::convolution`], or f32 `f32(sum) x scale` where nothing is quantized
//! behind it: the logit.

use crate::convolution::folded_bias;
use crate::kernels::{self, Kernel, Levels, requantize_to};

/// ONNX `Gemm-13` with `transB` between DequantizeLinear and, for a hidden layer, QuantizeLinear.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Definition {
    pub(crate) n_inputs: usize,
    pub(crate) input_zero: u8,
    /// `None` where the output is f32.
    pub(crate) output: Option<Levels>,
    /// s8 as bytes, `[output, input]`.
    pub(crate) weights: Vec<u8>,
    pub(crate) bias: Vec<i32>,
    /// Accumulator to output, one per output.
    pub(crate) scale: Vec<f32>,
}

/// A dense layer, checked, for one kernel.
#[derive(Debug)]
pub(crate) struct Gemm {
    definition: Definition,
    kernel: Kernel,
    bias: Vec<i32>,
}

impl Gemm {
    /// Checks; `None` where sizes do not fit, a weight is -128, or an accumulator could leave i32.
    pub(crate) fn new(definition: Definition, kernel: Kernel) -> Option<Self> {
        let Definition {
            n_inputs,
            input_zero,
            ref weights,
            ref bias,
            ref scale,
            ..
        } = definition;
        let fits = n_inputs > 0
            && weights.len() == n_inputs.checked_mul(bias.len())?
            && scale.len() == bias.len();
        let bias = fits.then(|| folded_bias(weights, bias, input_zero))??;
        Some(Self {
            definition,
            kernel,
            bias,
        })
    }

    pub(crate) fn n_inputs(&self) -> usize {
        self.definition.n_inputs
    }

    pub(crate) fn n_outputs(&self) -> usize {
        self.bias.len()
    }

    /// Whether the output is f32.
    pub(crate) fn is_last(&self) -> bool {
        self.definition.output.is_none()
    }

    /// Bytes of weights, biases and scales.
    pub(crate) fn parameter_bytes(&self) -> usize {
        self.definition.weights.len() + 8 * self.bias.len()
    }

    /// The hidden layer's outputs.
    ///
    /// # Panics
    ///
    /// Where the lengths do not fit or the layer is the last one.
    pub(crate) fn run_hidden(&self, features: &[u8], out: &mut [u8]) {
        let levels = self.definition.output.expect("a hidden layer");
        for ((out, sum), &scale) in out.iter_mut().zip(self.sums(features)).zip(self.scale()) {
            *out = requantize_to(levels, sum, scale);
        }
    }

    /// The last layer's outputs.
    ///
    /// # Panics
    ///
    /// Where the lengths do not fit.
    #[expect(
        clippy::cast_precision_loss,
        reason = "the conversion to f32 is the definition of the logit"
    )]
    pub(crate) fn run_last(&self, features: &[u8], out: &mut [f32]) {
        for ((out, sum), &scale) in out.iter_mut().zip(self.sums(features)).zip(self.scale()) {
            *out = sum as f32 * scale;
        }
    }

    fn scale(&self) -> &[f32] {
        &self.definition.scale
    }

    fn sums(&self, features: &[u8]) -> impl Iterator<Item = i32> {
        let mut sums = vec![0; self.bias.len()];
        kernels::dense(self.kernel, features, &self.definition.weights, &mut sums);
        sums.into_iter()
            .zip(&self.bias)
            .map(|(sum, bias)| sum + bias)
    }
}
