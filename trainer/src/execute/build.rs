//! An ONNX graph to steps: names to slots, constants (dequantized once, here) to values, attributes to windows.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::export::IMAGE;
use crate::onnx::{DataType, GraphProto, NodeProto, OnnxError, TensorProto};

use super::convolution::Convolution;
use super::pool::Pool;
use super::step::{Operation, Step};
use super::{ExecuteError, Tensor, Window};

/// The steps of a graph in order.
pub(super) struct Steps {
    pub(super) steps: Vec<Step>,
    /// Tensor names by slot; slot 0 is the image.
    pub(super) names: Vec<String>,
}

impl Steps {
    /// Of `graph`, with some constants replaced by `weights`, by name.
    pub(super) fn of(
        graph: &GraphProto,
        weights: BTreeMap<String, Tensor>,
    ) -> Result<Self, ExecuteError> {
        let shared = |(name, tensor)| (name, Arc::new(tensor));
        let mut builder = Builder {
            protos: graph.initializers(),
            constants: weights.into_iter().map(shared).collect(),
            slots: BTreeMap::new(),
            names: Vec::new(),
            steps: Vec::new(),
        };
        builder.slot(IMAGE);
        for node in &graph.node {
            builder.add(node)?;
        }
        Ok(Self {
            steps: builder.steps,
            names: builder.names,
        })
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
        let [Some(input), Some(output)] = [node.input.first(), node.output.first()] else {
            return Err(unsupported(node, "without input or output"));
        };
        if node.op_type == "DequantizeLinear" && self.protos.contains_key(input.as_str()) {
            let constant = self.dequantized(node)?;
            self.constants.insert(output.clone(), Arc::new(constant));
            return Ok(());
        }
        let operation = self.operation(node)?;
        let n_inputs = match operation {
            Operation::Add => 2,
            Operation::Concat => node.input.len(),
            _ => 1,
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

    fn operation(&mut self, node: &NodeProto) -> Result<Operation, ExecuteError> {
        Ok(match node.op_type.as_str() {
            "Cast" | "Identity" | "Dropout" => Operation::Identity,
            "Mul" => Operation::Multiply(self.scalar(node, 1)?),
            "Relu" => Operation::Relu,
            "Sigmoid" => Operation::Sigmoid,
            "Flatten" => Operation::Flatten,
            "GlobalAveragePool" => Operation::GlobalAverage,
            "Add" => Operation::Add,
            "Concat" if node.int("axis", 0) == 1 => Operation::Concat,
            "Conv" if is_plain(node) => Operation::Convolution(self.convolution(node)?),
            "MaxPool" | "AveragePool" if node.int("ceil_mode", 0) == 0 => {
                Operation::Pool(pool(node)?)
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
            _ => return Err(unsupported(node, "is not implemented in this form")),
        })
    }

    fn convolution(&mut self, node: &NodeProto) -> Result<Convolution, ExecuteError> {
        let weight = self.constant(node, 1)?;
        let &[n_outputs, _, rows, columns] = weight.shape.as_slice() else {
            return Err(unsupported(node, "has no 2-D kernel"));
        };
        let window = window(node, [rows, columns])?;
        let bias = if node.input.len() > 2 {
            Some(self.constant(node, 2)?)
        } else {
            None
        };
        let is_other = |bias: &Arc<Tensor>| bias.values.len() != n_outputs;
        if bias.as_ref().is_some_and(is_other) {
            return Err(unsupported(node, "has a bias of another length"));
        }
        Ok(Convolution::new(weight, bias, window))
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
        if constant.values.is_empty() {
            return Err(ExecuteError::Shape {
                node: node.name.clone(),
                found: constant.shape.clone(),
            });
        }
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

fn unsupported(node: &NodeProto, reason: &'static str) -> ExecuteError {
    ExecuteError::Unsupported {
        node: node.name.clone(),
        op_type: node.op_type.clone(),
        reason,
    }
}

/// Neither grouped nor dilated.
fn is_plain(node: &NodeProto) -> bool {
    let mut dilations = node.ints("dilations").iter();
    node.int("group", 1) == 1 && dilations.all(|&dilation| dilation == 1)
}

fn pool(node: &NodeProto) -> Result<Pool, ExecuteError> {
    let extents = node.ints("kernel_shape").iter();
    let kernel: Vec<usize> = extents.filter_map(|&n| usize::try_from(n).ok()).collect();
    let &[rows, columns] = kernel.as_slice() else {
        return Err(unsupported(node, "has no 2-D kernel"));
    };
    Ok(Pool {
        window: window(node, [rows, columns])?,
        is_average: node.op_type == "AveragePool",
        counts_padding: node.int("count_include_pad", 0) == 1,
    })
}

/// Kernel, strides and pads of a node.
fn window(node: &NodeProto, kernel: [usize; 2]) -> Result<Window, ExecuteError> {
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
    let sound = || {
        let strides: [usize; 2] = extents("strides", 1, 2)?.try_into().ok()?;
        let pads: [usize; 4] = extents("pads", 0, 4)?.try_into().ok()?;
        let is_extent = |extent: &usize| (1..=shared::SIDE).contains(extent);
        let mut padded = pads.iter().zip(kernel.iter().chain(&kernel));
        (strides.iter().chain(&kernel).all(is_extent) && padded.all(|(pad, extent)| pad < extent))
            .then_some(Window {
                kernel,
                strides,
                pads,
            })
    };
    sound().ok_or_else(|| unsupported(node, "has an unusual kernel, strides or pads"))
}
