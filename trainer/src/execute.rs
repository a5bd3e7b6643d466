//! Runs an ONNX graph in f32, one image at a time, and shows every tensor on the way.
//!
//! In: an f32 file of [`crate::export`], or an int8 file of [`crate::quantize`] (whose integers are then computed in
//! f32: right to rounding, not bit for bit), and one u8 image `[3, 256, 256]`. Out: the value of any tensor, and a hook that may change
//! it before its consumers read it, which is how [`crate::calibrate`] watches ranges and tries quantizations. A run can be
//! stopped behind a tensor, copied and resumed. Operators follow ONNX opset 13; batch size is 1 and is left out of
//! shapes. Speed and the exact integer answer are the engine's.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::export::{IMAGE, LOGIT};
use crate::onnx::{DataType, ModelProto, NodeProto, OnnxError, TensorProto};

/// Floats that one block of unfolded convolution input may hold.
const UNFOLD_FLOATS: usize = 1 << 19;

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

#[derive(Debug)]
struct Step {
    name: String,
    operation: Operation,
    inputs: Vec<usize>,
    output: usize,
}

#[derive(Debug)]
enum Operation {
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

#[derive(Debug)]
struct Convolution {
    weight: Arc<Tensor>,
    bias: Option<Arc<Tensor>>,
    window: Window,
}

#[derive(Debug)]
struct Pool {
    window: Window,
    is_average: bool,
    counts_padding: bool,
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
        Self::with_weights(model, &BTreeMap::new())
    }

    /// The same with some constants replaced by `weights`, by name.
    ///
    /// # Errors
    ///
    /// As [`FloatGraph::new`].
    pub fn with_weights(
        model: &ModelProto,
        weights: &BTreeMap<String, Tensor>,
    ) -> Result<Self, ExecuteError> {
        let graph = model.graph()?;
        let mut builder = Builder {
            protos: graph.initializers(),
            constants: BTreeMap::new(),
            slots: BTreeMap::new(),
            names: Vec::new(),
            steps: Vec::new(),
        };
        for (name, tensor) in weights {
            builder
                .constants
                .insert(name.clone(), Arc::new(tensor.clone()));
        }
        builder.slot(IMAGE);
        for node in &graph.node {
            builder.add(node)?;
        }
        let mut last_use: Vec<usize> = vec![usize::MAX; builder.names.len()];
        for (index, step) in builder.steps.iter().enumerate() {
            for &slot in &step.inputs {
                last_use[slot] = index;
            }
        }
        let mut released = vec![Vec::new(); builder.steps.len()];
        for (slot, &index) in last_use.iter().enumerate() {
            if index != usize::MAX && builder.names[slot] != LOGIT {
                released[index].push(slot);
            }
        }
        Ok(Self {
            steps: builder.steps,
            names: builder.names,
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

impl Operation {
    fn is_element_wise(&self) -> bool {
        !matches!(
            self,
            Self::Convolution(_)
                | Self::Pool(_)
                | Self::GlobalAverage
                | Self::Dense { .. }
                | Self::Concat
        )
    }

    fn element_wise(
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
                values.for_each(|value| {
                    *value = ((*value / scale).round_ties_even() + zero_point).clamp(low, high)
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

impl Convolution {
    fn run(&self, input: &Tensor) -> Option<Tensor> {
        let &[n_outputs, n_inputs, ..] = self.weight.shape.as_slice() else {
            return None;
        };
        let (channels, side) = image_shape(input)?;
        let [rows, columns] = self.window.output(side)?;
        if channels != n_inputs || columns == 0 {
            return None;
        }
        let depth = n_inputs * self.window.kernel[0] * self.window.kernel[1];
        let mut output = vec![0.0; n_outputs * rows * columns];
        let rows_a_block = (UNFOLD_FLOATS / (depth * columns)).clamp(1, rows.max(1));
        let mut unfolded = vec![0.0; depth * rows_a_block * columns];
        for first_row in (0..rows).step_by(rows_a_block) {
            let n_rows = rows_a_block.min(rows - first_row);
            let n_pixels = n_rows * columns;
            self.unfold(
                input,
                side,
                first_row,
                [n_rows, columns],
                &mut unfolded[..depth * n_pixels],
            );
            let mut target = Target {
                values: &mut output,
                first: first_row * columns,
                row_stride: rows * columns,
            };
            multiply(
                [n_outputs, n_pixels, depth],
                &self.weight.values,
                &unfolded[..depth * n_pixels],
                &mut target,
            );
        }
        if let Some(bias) = &self.bias {
            for (plane, bias) in output
                .chunks_exact_mut((rows * columns).max(1))
                .zip(&bias.values)
            {
                plane.iter_mut().for_each(|value| *value += bias);
            }
        }
        Some(Tensor {
            shape: vec![n_outputs, rows, columns],
            values: output,
        })
    }

    /// `unfolded [channel x kernel row x kernel column, output row x output column]` of a block of output rows.
    fn unfold(
        &self,
        input: &Tensor,
        side: [usize; 2],
        first_row: usize,
        block: [usize; 2],
        unfolded: &mut [f32],
    ) {
        let [kernel_rows, kernel_columns] = self.window.kernel;
        let taps = kernel_rows * kernel_columns;
        for (index, line) in unfolded.chunks_exact_mut(block[0] * block[1]).enumerate() {
            let (channel, tap) = (index / taps, index % taps);
            let plane = &input.values[channel * side[0] * side[1]..][..side[0] * side[1]];
            for (row, out) in line.chunks_exact_mut(block[1]).enumerate() {
                let source_row = (first_row + row) * self.window.strides[0] + tap / kernel_columns;
                let Some(source) = source_row
                    .checked_sub(self.window.pads[0])
                    .filter(|&source| source < side[0])
                else {
                    out.fill(0.0);
                    continue;
                };
                let source = &plane[source * side[1]..][..side[1]];
                let (offset, stride, pad) = (
                    tap % kernel_columns,
                    self.window.strides[1],
                    self.window.pads[1],
                );
                if stride == 1 && offset >= pad && offset - pad + out.len() <= source.len() {
                    out.copy_from_slice(&source[offset - pad..][..out.len()]);
                    continue;
                }
                for (column, value) in out.iter_mut().enumerate() {
                    let from = (column * stride + offset).checked_sub(pad);
                    *value = from
                        .and_then(|from| source.get(from))
                        .copied()
                        .unwrap_or(0.0);
                }
            }
        }
    }
}

impl Pool {
    fn run(&self, input: &Tensor) -> Option<Tensor> {
        let (channels, side) = image_shape(input)?;
        let [rows, columns] = self.window.output(side)?;
        let mut values = Vec::with_capacity(channels * rows * columns);
        for plane in input.values.chunks_exact((side[0] * side[1]).max(1)) {
            for row in 0..rows {
                let rows_in = self.reach(0, row, side[0]);
                values.extend((0..columns).map(|column| {
                    self.reduce(
                        plane,
                        side[1],
                        rows_in.clone(),
                        self.reach(1, column, side[1]),
                    )
                }));
            }
        }
        Some(Tensor {
            shape: vec![channels, rows, columns],
            values,
        })
    }

    /// Input positions under output position `index` along `axis`.
    fn reach(&self, axis: usize, index: usize, side: usize) -> std::ops::Range<usize> {
        let first = index * self.window.strides[axis];
        let pad = self.window.pads[axis];
        first.saturating_sub(pad)
            ..(first + self.window.kernel[axis])
                .saturating_sub(pad)
                .min(side)
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "a pooling window has a few thousand positions"
    )]
    fn reduce(
        &self,
        plane: &[f32],
        width: usize,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
    ) -> f32 {
        let n_inside = rows.len() * columns.len();
        let under =
            rows.flat_map(|row| &plane[row * width + columns.start..row * width + columns.end]);
        if !self.is_average {
            return under.copied().fold(f32::NEG_INFINITY, f32::max);
        }
        let n = if self.counts_padding {
            self.window.kernel[0] * self.window.kernel[1]
        } else {
            n_inside
        };
        under.sum::<f32>() / n as f32
    }
}

fn image_shape(input: &Tensor) -> Option<(usize, [usize; 2])> {
    match input.shape[..] {
        [channels, rows, columns] => Some((channels, [rows, columns])),
        _ => None,
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "an image plane has at most 65,536 pixels"
)]
fn global_average(input: &Tensor) -> Option<Tensor> {
    let (channels, side) = image_shape(input)?;
    let n = side[0] * side[1];
    let values = input
        .values
        .chunks_exact(n.max(1))
        .map(|plane| plane.iter().sum::<f32>() / n as f32);
    Some(Tensor {
        shape: vec![channels, 1, 1],
        values: values.collect(),
    })
}

fn dense(input: &Tensor, weight: &Tensor, bias: &Tensor) -> Option<Tensor> {
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

fn concat(inputs: &[&Tensor]) -> Option<Tensor> {
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

/// Where a product goes: rows of `values`, `row_stride` apart, from element `first` on.
struct Target<'a> {
    values: &'a mut [f32],
    first: usize,
    row_stride: usize,
}

/// `target = left [m, k] x right [k, n]`, single-threaded; callers run images in parallel.
///
/// # Panics
///
/// Where a slice is shorter than the shape says.
#[allow(
    unsafe_code,
    reason = "the one call of the matrix kernel, which takes pointers"
)]
fn multiply([m, n, k]: [usize; 3], left: &[f32], right: &[f32], target: &mut Target<'_>) {
    assert!(
        left.len() >= m * k && right.len() >= k * n,
        "operands fill their shapes"
    );
    if m == 0 || n == 0 {
        return;
    }
    let values = &mut target.values[target.first..];
    assert!(
        n <= target.row_stride && values.len() >= (m - 1) * target.row_stride + n,
        "the target holds m rows"
    );
    let stride =
        |extent: usize| isize::try_from(extent).expect("a slice is shorter than isize::MAX");
    // SAFETY: the asserts above hold every index of the three matrices inside its slice, and `values` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            values.as_mut_ptr(),
            1,
            stride(target.row_stride),
            false,
            left.as_ptr(),
            1,
            stride(k),
            right.as_ptr(),
            1,
            stride(n),
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

struct Builder<'a> {
    protos: BTreeMap<&'a str, &'a TensorProto>,
    constants: BTreeMap<String, Arc<Tensor>>,
    slots: BTreeMap<String, usize>,
    names: Vec<String>,
    steps: Vec<Step>,
}

impl Builder<'_> {
    fn slot(&mut self, name: &str) -> usize {
        if let Some(&slot) = self.slots.get(name) {
            return slot;
        }
        self.names.push(name.to_owned());
        self.slots.insert(name.to_owned(), self.names.len() - 1);
        self.names.len() - 1
    }

    fn add(&mut self, node: &NodeProto) -> Result<(), ExecuteError> {
        let unsupported = |reason| ExecuteError::Unsupported {
            node: node.name.clone(),
            op_type: node.op_type.clone(),
            reason,
        };
        let output = node
            .output
            .first()
            .ok_or_else(|| unsupported("without output"))?;
        let input = node
            .input
            .first()
            .ok_or_else(|| unsupported("without input"))?;
        if node.op_type == "DequantizeLinear" && self.protos.contains_key(input.as_str()) {
            let constant = self.dequantized(node)?;
            self.constants.insert(output.clone(), Arc::new(constant));
            return Ok(());
        }
        let mut n_inputs = 1;
        let operation = match node.op_type.as_str() {
            "Cast" | "Identity" | "Dropout" => Operation::Identity,
            "Mul" => Operation::Multiply(self.scalar(node, 1)?),
            "Relu" => Operation::Relu,
            "Sigmoid" => Operation::Sigmoid,
            "Flatten" => Operation::Flatten,
            "GlobalAveragePool" => Operation::GlobalAverage,
            "Add" => {
                n_inputs = 2;
                Operation::Add
            }
            "Concat" if node.int("axis", 0) == 1 => {
                n_inputs = node.input.len();
                Operation::Concat
            }
            "Conv"
                if node.int("group", 1) == 1
                    && node.ints("dilations").iter().all(|&dilation| dilation == 1) =>
            {
                let weight = self.constant(node, 1)?;
                let kernel = weight
                    .shape
                    .get(2..4)
                    .ok_or_else(|| unsupported("has no 2-D kernel"))?;
                let window = window(node, [kernel[0], kernel[1]])
                    .ok_or_else(|| unsupported("has unusual pads or strides"))?;
                let bias = if node.input.len() > 2 {
                    Some(self.constant(node, 2)?)
                } else {
                    None
                };
                Operation::Convolution(Convolution {
                    weight,
                    bias,
                    window,
                })
            }
            "MaxPool" | "AveragePool" if node.int("ceil_mode", 0) == 0 => {
                let kernel: Vec<usize> = node
                    .ints("kernel_shape")
                    .iter()
                    .filter_map(|&extent| usize::try_from(extent).ok())
                    .collect();
                let &[rows, columns] = kernel.as_slice() else {
                    return Err(unsupported("has no 2-D kernel"));
                };
                let window = window(node, [rows, columns])
                    .ok_or_else(|| unsupported("has unusual pads or strides"))?;
                let is_average = node.op_type == "AveragePool";
                Operation::Pool(Pool {
                    window,
                    is_average,
                    counts_padding: node.int("count_include_pad", 0) == 1,
                })
            }
            "Gemm" if node.int("transB", 0) == 1 && node.int("transA", 0) == 0 => {
                Operation::Dense {
                    weight: self.constant(node, 1)?,
                    bias: self.constant(node, 2)?,
                }
            }
            "QuantizeLinear" => {
                let (zero_point, [low, high]) = self.zero_point(node)?;
                Operation::Quantize {
                    scale: self.scalar(node, 1)?,
                    zero_point,
                    low,
                    high,
                }
            }
            "DequantizeLinear" => Operation::Dequantize {
                scale: self.scalar(node, 1)?,
                zero_point: self.zero_point(node)?.0,
            },
            _ => return Err(unsupported("is not implemented in this form")),
        };
        let mut inputs = Vec::with_capacity(n_inputs);
        for name in node.input.iter().take(n_inputs) {
            let known = self.slots.get(name).copied();
            inputs.push(known.ok_or_else(|| OnnxError::Undefined { name: name.clone() })?);
        }
        let output = self.slot(output);
        self.steps.push(Step {
            name: node.name.clone(),
            operation,
            inputs,
            output,
        });
        Ok(())
    }

    fn constant(&mut self, node: &NodeProto, index: usize) -> Result<Arc<Tensor>, ExecuteError> {
        let name = node.input.get(index).map_or("", String::as_str);
        if let Some(constant) = self.constants.get(name) {
            return Ok(Arc::clone(constant));
        }
        let proto = self.protos.get(name).ok_or_else(|| OnnxError::Undefined {
            name: name.to_owned(),
        })?;
        let constant = Arc::new(Tensor {
            shape: proto.shape()?,
            values: proto.to_f32()?,
        });
        self.constants
            .insert(name.to_owned(), Arc::clone(&constant));
        Ok(constant)
    }

    fn scalar(&mut self, node: &NodeProto, index: usize) -> Result<f32, ExecuteError> {
        let constant = self.constant(node, index)?;
        match constant.values[..] {
            [value] => Ok(value),
            _ => Err(ExecuteError::Shape {
                node: node.name.clone(),
                found: constant.shape.clone(),
            }),
        }
    }

    /// Zero point of an activation, and the range of its integers.
    fn zero_point(&self, node: &NodeProto) -> Result<(f32, [f32; 2]), ExecuteError> {
        let name = node.input.get(2).map_or("", String::as_str);
        let proto = self.protos.get(name).ok_or_else(|| OnnxError::Undefined {
            name: name.to_owned(),
        })?;
        if proto.data_type == DataType::Int8 as i32 {
            Ok((
                f32::from(proto.to_i8()?.first().copied().unwrap_or(0)),
                [-128.0, 127.0],
            ))
        } else {
            Ok((
                f32::from(proto.to_u8()?.first().copied().unwrap_or(0)),
                [0.0, 255.0],
            ))
        }
    }

    /// A constant behind `DequantizeLinear`: one scale, or one for each index of axis 0; zero point 0.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a bias beyond 2^24 loses bits that f32 sums lose anyway"
    )]
    fn dequantized(&mut self, node: &NodeProto) -> Result<Tensor, ExecuteError> {
        let scale = self.constant(node, 1)?;
        let Some(proto) = self.protos.get(node.input[0].as_str()) else {
            return Err(OnnxError::Undefined {
                name: node.input[0].clone(),
            }
            .into());
        };
        let shape = proto.shape()?;
        let integers: Vec<f32> = if proto.data_type == DataType::Int8 as i32 {
            proto.to_i8()?.into_iter().map(f32::from).collect()
        } else {
            proto
                .to_i32()?
                .into_iter()
                .map(|value| value as f32)
                .collect()
        };
        let n_scales = scale.values.len();
        if n_scales == 0
            || !integers.len().is_multiple_of(n_scales)
            || (n_scales != 1 && shape.first() != Some(&n_scales))
        {
            return Err(ExecuteError::Shape {
                node: node.name.clone(),
                found: shape,
            });
        }
        let a_scale = (integers.len() / n_scales).max(1);
        let rows = integers.chunks_exact(a_scale).zip(&scale.values);
        let values = rows
            .flat_map(|(row, scale)| row.iter().map(move |value| value * scale))
            .collect();
        Ok(Tensor { shape, values })
    }
}

/// Kernel, strides and pads of a node; `None` where they are no 2-D extents.
fn window(node: &NodeProto, kernel: [usize; 2]) -> Option<Window> {
    let extents = |name: &str, default: i64, n: usize| -> Option<Vec<usize>> {
        let given = node.ints(name);
        let all = if given.is_empty() {
            vec![default; n]
        } else {
            given.to_vec()
        };
        let all: Option<Vec<usize>> = all
            .iter()
            .map(|&extent| usize::try_from(extent).ok())
            .collect();
        all.filter(|all| all.len() == n)
    };
    let strides: [usize; 2] = extents("strides", 1, 2)?.try_into().ok()?;
    let pads: [usize; 4] = extents("pads", 0, 4)?.try_into().ok()?;
    let is_sound =
        strides.iter().all(|&stride| stride > 0) && kernel.iter().all(|&extent| extent > 0);
    (is_sound
        && pads
            .iter()
            .zip(kernel.iter().chain(&kernel))
            .all(|(pad, extent)| pad < extent))
    .then_some(Window {
        kernel,
        strides,
        pads,
    })
}
