//! Runs an ONNX graph in f32, one image at a time, and shows every tensor on the way.
//!
//! In: an f32 file of [`crate::export`], or an int8 file of [`crate::quantize`] (whose integers are then computed in
//! f32: right to rounding, not bit for bit), and one u8 image `[3, 256, 256]`. Out: the value of any tensor, and a hook that may change
//! it before its consumers read it, which is how [`crate::calibrate`] watches ranges and tries quantizations. A run can be
//! stopped behind a tensor, copied and resumed. Operators follow ONNX opset 13; batch size is 1 and is left out of
//! shapes. Speed and the exact integer answer are the engine's.

mod build;
mod convolution;
mod pool;
mod step;
mod winograd;

use std::collections::BTreeMap;

use crate::export::LOGIT;
use crate::onnx::{ModelProto, OnnxError};

use build::Steps;
use pool::global_average;
pub(crate) use step::nearest;
use step::{Operation, Step, concat, dense};

/// A value in the graph, without its batch dimension.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Tensor {
    /// Shape, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<f32>,
}

/// Why a graph cannot be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecuteError {
    /// The file's messages are malformed.
    #[error(transparent)]
    Onnx(#[from] OnnxError),
    /// An operator, or a form of it, that is not implemented here.
    #[error("node {node}: {op_type} {reason}")]
    Unsupported {
        /// Name of the node.
        node: String,
        /// Its operator.
        op_type: String,
        /// What about it is not implemented.
        reason: &'static str,
    },
    /// A node's input has a shape that the operator does not take.
    #[error("node {node}: input of shape {found:?} does not fit")]
    Shape {
        /// Name of the node.
        node: String,
        /// The shape found.
        found: Vec<usize>,
    },
}

/// A graph ready to run. Cheap to share between threads.
#[derive(Debug)]
pub struct FloatGraph {
    steps: Vec<Step>,
    /// Tensor names by slot; slot 0 is the image.
    names: Vec<String>,
    /// For each step the slots that nobody reads after it.
    released: Vec<Vec<usize>>,
}

/// A run: the live tensors, and where it stands.
#[derive(Clone, Debug)]
pub struct Run {
    values: Vec<Option<Tensor>>,
    next: usize,
}

/// Kernel, strides and leading pads `[top, left, bottom, right]`.
#[derive(Clone, Copy, Debug)]
struct Window {
    kernel: [usize; 2],
    strides: [usize; 2],
    pads: [usize; 4],
}

impl Window {
    fn output(&self, side: [usize; 2]) -> Option<[usize; 2]> {
        let along = |axis: usize| {
            let padded = side[axis] + self.pads[axis] + self.pads[axis + 2];
            Some(padded.checked_sub(self.kernel[axis])? / self.strides[axis] + 1)
        };
        Some([along(0)?, along(1)?])
    }
}

impl FloatGraph {
    /// Prepares `model`; constants behind `DequantizeLinear` are dequantized once, here.
    ///
    /// # Errors
    ///
    /// [`ExecuteError`] where the graph is malformed or holds something that is not implemented.
    pub fn new(model: &ModelProto) -> Result<Self, ExecuteError> {
        Self::with_weights(model, BTreeMap::new())
    }

    /// The same with some constants replaced by `weights`, by name.
    ///
    /// # Errors
    ///
    /// As [`FloatGraph::new`].
    pub fn with_weights(
        model: &ModelProto,
        weights: BTreeMap<String, Tensor>,
    ) -> Result<Self, ExecuteError> {
        let graph = model.graph()?;
        let Steps { steps, names } = Steps::of(graph, weights)?;
        let mut last_use: Vec<usize> = vec![usize::MAX; names.len()];
        for (index, step) in steps.iter().enumerate() {
            for &slot in &step.inputs {
                last_use[slot] = index;
            }
        }
        let mut released = vec![Vec::new(); steps.len()];
        for (slot, &index) in last_use.iter().enumerate() {
            if index != usize::MAX && names[slot] != LOGIT {
                released[index].push(slot);
            }
        }
        Ok(Self {
            steps,
            names,
            released,
        })
    }

    /// Names of the tensors in the order in which they are computed, the image left out.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.steps
            .iter()
            .map(|step| self.names[step.output].as_str())
    }

    /// Starts a run on one u8 image `[3, 256, 256]`.
    #[must_use]
    pub fn begin(&self, image: &[u8]) -> Run {
        let mut values = vec![None; self.names.len()];
        let shape = vec![shared::CHANNELS, shared::SIDE, shared::SIDE];
        values[0] = Some(Tensor {
            shape,
            values: image.iter().map(|&pixel| f32::from(pixel)).collect(),
        });
        Run { values, next: 0 }
    }

    /// Runs on until the tensor `until` was computed, or to the end; `hook` sees every tensor with its name and may change it.
    ///
    /// # Errors
    ///
    /// [`ExecuteError::Shape`] where a tensor does not fit its consumer.
    pub fn advance(
        &self,
        run: &mut Run,
        until: Option<&str>,
        hook: &mut dyn FnMut(&str, &mut Tensor),
    ) -> Result<(), ExecuteError> {
        while let Some(step) = self.steps.get(run.next) {
            let mut tensor = self.compute(step, run)?;
            let name = self.names[step.output].as_str();
            hook(name, &mut tensor);
            run.values[step.output] = Some(tensor);
            for &slot in &self.released[run.next] {
                run.values[slot] = None;
            }
            run.next += 1;
            if until == Some(name) {
                break;
            }
        }
        Ok(())
    }

    /// Runs on until the tensor `before` is the next to be computed, or to the end.
    ///
    /// # Errors
    ///
    /// As [`FloatGraph::advance`].
    pub fn advance_to(
        &self,
        run: &mut Run,
        before: &str,
        hook: &mut dyn FnMut(&str, &mut Tensor),
    ) -> Result<(), ExecuteError> {
        while let Some(step) = self.steps.get(run.next) {
            if self.names[step.output] == before {
                break;
            }
            self.advance(run, Some(&self.names[step.output]), hook)?;
        }
        Ok(())
    }

    /// The logit of one u8 image `[3, 256, 256]`.
    ///
    /// # Errors
    ///
    /// As [`FloatGraph::advance`]; NaN where the graph has no tensor `logit`.
    pub fn logit(
        &self,
        image: &[u8],
        hook: &mut dyn FnMut(&str, &mut Tensor),
    ) -> Result<f32, ExecuteError> {
        let mut run = self.begin(image);
        self.advance(&mut run, None, hook)?;
        Ok(self
            .value(&run, LOGIT)
            .and_then(|tensor| tensor.values.first().copied())
            .unwrap_or(f32::NAN))
    }

    /// A tensor of a run; `None` where it is not computed yet or nobody reads it any more.
    #[must_use]
    pub fn value<'a>(&self, run: &'a Run, name: &str) -> Option<&'a Tensor> {
        let slot = self.names.iter().position(|candidate| candidate == name)?;
        run.values[slot].as_ref()
    }

    /// The same, to be changed before the run goes on.
    pub fn value_mut<'a>(&self, run: &'a mut Run, name: &str) -> Option<&'a mut Tensor> {
        let slot = self.names.iter().position(|candidate| candidate == name)?;
        run.values[slot].as_mut()
    }

    fn compute(&self, step: &Step, run: &mut Run) -> Result<Tensor, ExecuteError> {
        let is_last = |slot: &usize| self.released[run.next].contains(slot);
        let first = step.inputs.first().copied().unwrap_or(0);
        let undefined = || OnnxError::Undefined {
            name: self.names[first].clone(),
        };
        // Element-wise steps work in place where nobody else reads their input.
        let owned = match &step.operation {
            operation if operation.is_element_wise() && is_last(&first) => run.values[first].take(),
            operation if operation.is_element_wise() => run.values[first].clone(),
            _ => None,
        };
        if let Some(tensor) = owned {
            return step.operation.element_wise(
                tensor,
                step.inputs
                    .get(1)
                    .and_then(|&slot| run.values[slot].as_ref()),
                &step.name,
            );
        }
        let input = run.values[first].as_ref().ok_or_else(undefined)?;
        let bad_shape = || ExecuteError::Shape {
            node: step.name.clone(),
            found: input.shape.clone(),
        };
        match &step.operation {
            Operation::Convolution(convolution) => convolution.run(input).ok_or_else(bad_shape),
            Operation::Pool(pool) => pool.run(input).ok_or_else(bad_shape),
            Operation::GlobalAverage => global_average(input).ok_or_else(bad_shape),
            Operation::Dense { weight, bias } => dense(input, weight, bias).ok_or_else(bad_shape),
            Operation::Concat => {
                let inputs: Option<Vec<&Tensor>> = step
                    .inputs
                    .iter()
                    .map(|&slot| run.values[slot].as_ref())
                    .collect();
                concat(&inputs.ok_or_else(undefined)?).ok_or_else(bad_shape)
            }
            _ => Err(undefined().into()),
        }
    }
}

fn image_shape(input: &Tensor) -> Option<(usize, [usize; 2])> {
    match input.shape[..] {
        [channels, rows, columns] => Some((channels, [rows, columns])),
        _ => None,
    }
}
