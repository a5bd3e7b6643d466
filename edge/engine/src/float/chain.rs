//! Recognises a float graph that is one chain of layers, the form that `trainer export` writes.
//!
//! In: the ONNX graph. Out: a [`FloatChain`], or the reason why the graph is none (it then runs through tract).
//!
//! ```text
//! image u8 -> Cast -> Mul by a constant | DequantizeLinear -> { Conv 3x3 valid -> Relu -> MaxPool 2x2 } ...
//!          -> Flatten -> { Gemm -> Relu } ... -> Gemm -> logit [-> Sigmoid -> probability]
//! ```
//!
//! ReLU may stand after the pool as well: both orders give the same numbers.

use tract_onnx::pb::{NodeProto, TensorProto, tensor_proto::DataType};

use crate::graph::{Graph, dimensions, f32_elements, integer, is_zero};
use crate::layers::{
    NotAChain, Walk, is_of, is_plain_gemm, is_pool_of_two, is_valid_convolution, refuse,
};

/// A float network that is one chain of layers.
#[derive(Debug)]
pub(crate) struct FloatChain {
    /// Shape of one image: channels, rows, columns.
    pub(crate) image: [usize; 3],
    /// What a pixel is multiplied by.
    pub(crate) image_scale: f32,
    /// Convolutions, each followed by ReLU and a 2 x 2 max pool.
    pub(crate) convolutions: Vec<FloatLayer>,
    /// Dense layers; all but the last followed by ReLU.
    pub(crate) dense: Vec<FloatLayer>,
}

/// The parameters of one layer.
#[derive(Debug)]
pub(crate) struct FloatLayer {
    /// Name of the ONNX node.
    pub(crate) name: String,
    /// Name of the weights' initializer: f32, `[output, input, row, column]` or `[output, input]`.
    pub(crate) weights: String,
    /// Whether the weights are `[input, output]` instead (Gemm with `transB = 0`).
    pub(crate) is_transposed: bool,
    /// Inputs: channels of a convolution, elements of a dense layer.
    pub(crate) n_inputs: usize,
    pub(crate) bias: Vec<f32>,
}

/// Reads the graph as one chain.
///
/// # Errors
///
/// [`NotAChain`] with the first node that does not fit.
pub(crate) fn recognise(graph: &Graph<'_>) -> Result<FloatChain, NotAChain> {
    let Some(input) = graph.image_input() else {
        return refuse("input", "not one input");
    };
    let Some(image) = input.image() else {
        return refuse(input.name, "not u8 of fixed channels, rows and columns");
    };
    let mut walk = Walk {
        graph,
        value: input.name,
    };
    let image_scale = walk.scale_image()?;
    let (mut convolutions, mut dense) = (Vec::new(), Vec::new());
    loop {
        let node = walk.reader()?;
        match node.op_type.as_str() {
            "Conv" => convolutions.push(walk.convolution(node)?),
            "Flatten" if integer(node, "axis").unwrap_or(1) == 1 => {
                walk.step(node)?;
                break;
            }
            _ => return refuse(&node.name, "neither Conv nor Flatten"),
        }
    }
    loop {
        let node = walk.reader()?;
        dense.push(walk.dense(node)?);
        if !walk.skip("Relu")? {
            break;
        }
    }
    walk.finish()?;
    Ok(FloatChain {
        image,
        image_scale,
        convolutions,
        dense,
    })
}

impl<'a> Walk<'_, 'a> {
    /// Passes Cast and Mul, or DequantizeLinear with zero point 0.
    fn scale_image(&mut self) -> Result<f32, NotAChain> {
        let mut node = self.reader()?;
        match node.op_type.as_str() {
            "Cast" if integer(node, "to") == Some(i64::from(DataType::Float as i32)) => {
                self.step(node)?;
                node = self.reader()?;
                if node.op_type != "Mul" {
                    return refuse(&node.name, "not Mul");
                }
            }
            "DequantizeLinear" => {
                let zero = node.input.get(2).filter(|name| !name.is_empty());
                if !zero.is_none_or(|name| self.graph.constant(name).is_some_and(is_zero)) {
                    return refuse(&node.name, "zero point is not a constant 0");
                }
            }
            _ => return refuse(&node.name, "neither Cast to f32 nor DequantizeLinear"),
        }
        self.step(node)?;
        let scale = node.input.get(1).and_then(|name| self.graph.constant(name));
        match scale.and_then(f32_elements).as_deref() {
            Some(&[scale]) if scale.is_normal() => Ok(scale),
            _ => refuse(&node.name, "not scaled by one constant"),
        }
    }

    /// Passes Conv, ReLU and MaxPool.
    fn convolution(&mut self, node: &'a NodeProto) -> Result<FloatLayer, NotAChain> {
        if !is_valid_convolution(node) {
            return refuse(&node.name, "padded, strided, dilated or grouped");
        }
        let weights = self.weights(node)?;
        let shape = dimensions(weights).unwrap_or_default();
        let &[outputs, n_inputs, 3, 3] = shape.as_slice() else {
            return refuse(&node.name, "kernel is not 3 x 3");
        };
        let layer = FloatLayer {
            name: node.name.clone(),
            weights: weights.name.clone(),
            is_transposed: false,
            n_inputs,
            bias: self.bias(node, outputs)?,
        };
        self.step(node)?;
        let is_relu = self.skip("Relu")?;
        let pool = self.reader()?;
        if !is_pool_of_two(pool) {
            return refuse(&pool.name, "not MaxPool 2 x 2 with stride 2");
        }
        self.step(pool)?;
        match self.skip("Relu")? || is_relu {
            true => Ok(layer),
            false => refuse(&node.name, "no Relu follows"),
        }
    }

    /// Passes Gemm.
    fn dense(&mut self, node: &'a NodeProto) -> Result<FloatLayer, NotAChain> {
        if node.op_type != "Gemm" || !is_plain_gemm(node) {
            return refuse(&node.name, "not a plain Gemm");
        }
        let weights = self.weights(node)?;
        let shape = dimensions(weights).unwrap_or_default();
        let &[rows, columns] = shape.as_slice() else {
            return refuse(&node.name, "weights are not a matrix");
        };
        let is_transposed = integer(node, "transB").unwrap_or(0) == 0;
        let (outputs, n_inputs) = match is_transposed {
            true => (columns, rows),
            false => (rows, columns),
        };
        let bias = self.bias(node, outputs)?;
        self.step(node)?;
        Ok(FloatLayer {
            name: node.name.clone(),
            weights: weights.name.clone(),
            is_transposed,
            n_inputs,
            bias,
        })
    }

    fn weights(&self, node: &NodeProto) -> Result<&'a TensorProto, NotAChain> {
        let weights = node.input.get(1).and_then(|name| self.graph.constant(name));
        match weights.filter(|weights| is_of(weights, DataType::Float)) {
            // Other layouts than raw bytes go through tract. The network takes the bytes out of the file.
            Some(weights) if self.graph.only_reader(&weights.name).is_none() => {
                refuse(&node.name, "weights are not its own")
            }
            Some(weights) if Some(weights.raw_data.len()) == bytes_of(weights) => Ok(weights),
            _ => refuse(&node.name, "weights are not an f32 constant"),
        }
    }

    fn bias(&self, node: &NodeProto, outputs: usize) -> Result<Vec<f32>, NotAChain> {
        let Some(name) = node.input.get(2).filter(|name| !name.is_empty()) else {
            return Ok(vec![0.0; outputs]);
        };
        match self.graph.constant(name).and_then(f32_elements) {
            Some(bias) if bias.len() == outputs => Ok(bias),
            _ => refuse(&node.name, "bias is not an f32 constant of every output"),
        }
    }
}

/// Bytes of the values of an f32 tensor.
fn bytes_of(tensor: &TensorProto) -> Option<usize> {
    let values = dimensions(tensor)?.iter().product::<usize>();
    values.checked_mul(size_of::<f32>())
}
