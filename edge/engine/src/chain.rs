//! Recognises a graph that is one chain of quantized layers, the form that `trainer quantize` writes.
//!
//! In: the ONNX graph. Out: a [`Chain`] in execution order, or the reason why the graph is none (it then runs through
//! tract). The form (`QuantizeLinear-13`, `DequantizeLinear-13`), zero points 0 throughout:
//!
//! ```text
//! image u8 -> DQ -> { Conv 3x3 valid [-> Relu] [-> Q -> DQ] -> MaxPool 2x2 -> Q -> DQ } ...
//!          -> Flatten [-> Q -> DQ] -> { Gemm [-> Relu] -> Q -> DQ } ... -> Gemm -> logit [-> Sigmoid -> probability]
//! ```
//!
//! With a zero point of 0 the saturation of Q is the ReLU, so Relu nodes between a layer and its Q are dropped. Pooling and
//! flattening only move values, hence Q and DQ around them must repeat the scale.

use tract_onnx::pb::{NodeProto, TensorProto, tensor_proto::DataType};

use crate::graph::{Graph, dimensions, f32_elements, i32_elements, integer, is_zero};
use crate::layers::{
    NotAChain, Walk, is_of, is_plain_gemm, is_pool_of_two, is_valid_convolution, refuse,
};

/// A network that is one chain of quantized layers.
#[derive(Debug)]
pub(crate) struct Chain {
    /// Shape of one image: channels, rows, columns.
    pub(crate) image: [usize; 3],
    /// Convolutions, each followed by ReLU and a 2 x 2 max pool.
    pub(crate) convolutions: Vec<Layer>,
    /// Dense layers; all but the last followed by ReLU.
    pub(crate) dense: Vec<Layer>,
}

/// The parameters of one layer.
#[derive(Debug)]
pub(crate) struct Layer {
    /// Name of the ONNX node.
    pub(crate) name: String,
    /// Name of the weights' initializer: s8, `[output, input, row, column]` or `[output, input]`.
    pub(crate) weights: String,
    /// Whether the weights are `[input, output]` instead (Gemm with `transB = 0`).
    pub(crate) is_transposed: bool,
    /// Inputs: channels of a convolution, elements of a dense layer.
    pub(crate) n_inputs: usize,
    /// Scale of the input activations.
    pub(crate) input_scale: f32,
    /// Scale of the weights, one per output channel.
    pub(crate) weight_scales: Vec<f32>,
    /// Bias of each output channel, in units of `input_scale x weight_scale`.
    pub(crate) bias: Vec<i32>,
    /// Scale of the output activations; `None` where the layer's output is the logit.
    pub(crate) output_scale: Option<f32>,
}

/// Reads the graph as one chain.
///
/// # Errors
///
/// [`NotAChain`] with the first node that does not fit.
pub(crate) fn recognise(graph: &Graph<'_>) -> Result<Chain, NotAChain> {
    let Some(input) = graph.image_input() else {
        return refuse("input", "not one input");
    };
    let Some(image) = input.image() else {
        return refuse(input.name, "not u8 of fixed channels, rows and columns");
    };
    let mut quantized = QuantizedWalk {
        walk: Walk {
            graph,
            value: input.name,
        },
        scale: None,
    };
    quantized.dequantize()?;
    let mut chain = Chain {
        image,
        convolutions: Vec::new(),
        dense: Vec::new(),
    };
    loop {
        let node = quantized.walk.reader()?;
        match node.op_type.as_str() {
            "Conv" => chain.convolutions.push(quantized.convolution(node)?),
            "Flatten" => {
                quantized.flatten(node)?;
                break;
            }
            _ => return refuse(&node.name, "neither Conv nor Flatten"),
        }
    }
    loop {
        let node = quantized.walk.reader()?;
        if node.op_type != "Gemm" {
            return refuse(&node.name, "not Gemm");
        }
        chain.dense.push(quantized.dense(node)?);
        if quantized.scale.is_none() {
            break;
        }
    }
    quantized.walk.finish()?;
    Ok(chain)
}

/// A walk that knows the scale of the activations.
struct QuantizedWalk<'g, 'a> {
    walk: Walk<'g, 'a>,
    /// Scale of the quantized activations that the present value holds; `None` before the first DQ and after the last Gemm.
    scale: Option<f32>,
}

impl<'a> QuantizedWalk<'_, 'a> {
    /// Passes DequantizeLinear; its scale becomes the scale of the activations.
    fn dequantize(&mut self) -> Result<f32, NotAChain> {
        let node = self.walk.reader()?;
        if node.op_type != "DequantizeLinear" {
            return refuse(&node.name, "not DequantizeLinear");
        }
        let scale = self.activation_scale(node)?;
        self.walk.step(node)?;
        self.scale = Some(scale);
        Ok(scale)
    }

    /// Passes QuantizeLinear and the DequantizeLinear after it, which must have the same scale.
    fn requantize(&mut self) -> Result<f32, NotAChain> {
        let node = self.walk.reader()?;
        if node.op_type != "QuantizeLinear" {
            return refuse(&node.name, "not QuantizeLinear");
        }
        let scale = self.activation_scale(node)?;
        self.walk.step(node)?;
        if self.dequantize()?.to_bits() != scale.to_bits() {
            return refuse(
                &node.name,
                "quantized and dequantized with different scales",
            );
        }
        Ok(scale)
    }

    /// Passes Q and DQ if they come next; they must keep the scale.
    fn requantize_unchanged(&mut self) -> Result<(), NotAChain> {
        let Some(scale) = self.scale else {
            return refuse(self.walk.value, "not quantized");
        };
        if self.walk.reader()?.op_type == "QuantizeLinear"
            && self.requantize()?.to_bits() != scale.to_bits()
        {
            return refuse(self.walk.value, "scale changes where values only move");
        }
        Ok(())
    }

    /// The scale of a Q or DQ of u8 activations: one positive number, zero point 0 u8.
    fn activation_scale(&self, node: &NodeProto) -> Result<f32, NotAChain> {
        let [_, scale, zero_point @ ..] = node.input.as_slice() else {
            return refuse(&node.name, "no scale");
        };
        let zero_point = zero_point
            .first()
            .and_then(|name| self.walk.graph.constant(name));
        if !zero_point.is_some_and(|zero| is_of(zero, DataType::Uint8) && is_zero(zero)) {
            return refuse(&node.name, "zero point is not a constant u8 0");
        }
        match self
            .walk
            .graph
            .constant(scale)
            .and_then(f32_elements)
            .as_deref()
        {
            Some(&[scale]) if scale.is_normal() && scale > 0.0 => Ok(scale),
            _ => refuse(&node.name, "scale is not one positive constant"),
        }
    }

    /// Passes Conv, ReLU, MaxPool and the Q/DQ between and after them.
    fn convolution(&mut self, node: &'a NodeProto) -> Result<Layer, NotAChain> {
        if !is_valid_convolution(node) {
            return refuse(&node.name, "padded, strided, dilated or grouped");
        }
        let mut layer = self.layer(node, 0)?;
        let shape = self
            .walk
            .graph
            .constant(&layer.weights)
            .and_then(dimensions)
            .unwrap_or_default();
        if !matches!(shape.as_slice(), [_, inputs, 3, 3] if *inputs > 0) {
            return refuse(&node.name, "kernel is not 3 x 3");
        }
        layer.n_inputs = shape[1];
        self.walk.step(node)?;
        self.walk.skip("Relu")?;
        let before_pool = if self.walk.reader()?.op_type == "QuantizeLinear" {
            Some(self.requantize()?)
        } else {
            None
        };
        self.pool()?;
        let scale = match before_pool {
            Some(scale) => self.requantize_unchanged().map(|()| scale)?,
            None => {
                self.walk.skip("Relu")?;
                self.requantize()?
            }
        };
        layer.output_scale = Some(scale);
        Ok(layer)
    }

    /// Passes a 2 x 2 MaxPool with stride 2.
    fn pool(&mut self) -> Result<(), NotAChain> {
        let node = self.walk.reader()?;
        if !is_pool_of_two(node) {
            return refuse(&node.name, "not MaxPool 2 x 2 with stride 2");
        }
        self.walk.step(node)
    }

    fn flatten(&mut self, node: &'a NodeProto) -> Result<(), NotAChain> {
        if integer(node, "axis").unwrap_or(1) != 1 {
            return refuse(&node.name, "axis is not 1");
        }
        self.walk.step(node)?;
        self.requantize_unchanged()
    }

    /// Passes Gemm, and ReLU, Q and DQ unless it is the last.
    fn dense(&mut self, node: &'a NodeProto) -> Result<Layer, NotAChain> {
        if !is_plain_gemm(node) {
            return refuse(&node.name, "scaled or transposed Gemm");
        }
        let is_transposed = integer(node, "transB").unwrap_or(0) == 0;
        let mut layer = self.layer(node, usize::from(is_transposed))?;
        let shape = self
            .walk
            .graph
            .constant(&layer.weights)
            .and_then(dimensions)
            .unwrap_or_default();
        let [outputs, inputs] = shape[..] else {
            return refuse(&node.name, "weights are not a matrix");
        };
        layer.n_inputs = if is_transposed { outputs } else { inputs };
        layer.is_transposed = is_transposed;
        self.walk.step(node)?;
        let reader = self
            .walk
            .graph
            .only_reader(self.walk.value)
            .map(|node| node.op_type.as_str());
        if matches!(reader, Some("Relu" | "QuantizeLinear")) {
            self.walk.skip("Relu")?;
            layer.output_scale = Some(self.requantize()?);
        } else {
            self.scale = None;
        }
        Ok(layer)
    }

    /// Weights and bias of a node; `axis` is the weights' axis of output channels.
    fn layer(&self, node: &NodeProto, axis: usize) -> Result<Layer, NotAChain> {
        let [input, weights, bias @ ..] = node.input.as_slice() else {
            return refuse(&node.name, "no weights");
        };
        let Some(input_scale) = self.scale.filter(|_| input == self.walk.value) else {
            return refuse(&node.name, "input is not dequantized activations");
        };
        let (weights, weight_scales) = self.weights(node, weights, axis)?;
        let bias = match bias.first().filter(|name| !name.is_empty()) {
            Some(bias) => self.bias(node, bias, input_scale, &weight_scales)?,
            None => vec![0; weight_scales.len()],
        };
        Ok(Layer {
            name: node.name.clone(),
            weights,
            is_transposed: false,
            n_inputs: 0,
            input_scale,
            weight_scales,
            bias,
            output_scale: None,
        })
    }

    /// The initializer behind a weight's DequantizeLinear and its scale for each output channel.
    fn weights(
        &self,
        node: &NodeProto,
        value: &str,
        axis: usize,
    ) -> Result<(String, Vec<f32>), NotAChain> {
        let (tensor, mut scales, scale_axis) =
            self.dequantized_constant(node, value, DataType::Int8)?;
        let shape = dimensions(tensor).unwrap_or_default();
        let Some(&n_channels) = shape.get(axis).filter(|&&n| n > 0) else {
            return refuse(&node.name, "weights have no channels");
        };
        if tensor.raw_data.len() != shape.iter().product::<usize>() {
            return refuse(&node.name, "weights are not raw bytes of their shape");
        }
        // The network takes them out of the file.
        if [value, &tensor.name].map(|name| self.walk.graph.only_reader(name).is_some())
            != [true; 2]
        {
            return refuse(&node.name, "weights are not its own");
        }
        match scales.len() {
            1 => scales.resize(n_channels, scales[0]),
            n if n == n_channels && usize::try_from(scale_axis) == Ok(axis) => {}
            _ => {
                return refuse(
                    &node.name,
                    "weight scales are not per tensor or per output channel",
                );
            }
        }
        Ok((tensor.name.clone(), scales))
    }

    /// The i32 bias behind a DequantizeLinear whose scale is the product of the others.
    fn bias(
        &self,
        node: &NodeProto,
        value: &str,
        input: f32,
        weights: &[f32],
    ) -> Result<Vec<i32>, NotAChain> {
        let (tensor, scales, _) = self.dequantized_constant(node, value, DataType::Int32)?;
        let fits = |(channel, &weight): (usize, &f32)| {
            let scale = if scales.len() == 1 {
                scales.first()
            } else {
                scales.get(channel)
            };
            scale.is_some_and(|&scale| (scale - input * weight).abs() <= 1e-5 * input * weight)
        };
        match i32_elements(tensor) {
            Some(bias) if bias.len() == weights.len() && weights.iter().enumerate().all(fits) => {
                Ok(bias)
            }
            _ => refuse(
                &node.name,
                "bias is not i32 in units of input scale x weight scale",
            ),
        }
    }

    /// The constant, the scales and the axis of a DequantizeLinear with zero point 0.
    fn dequantized_constant(
        &self,
        node: &NodeProto,
        value: &str,
        element: DataType,
    ) -> Result<(&'a TensorProto, Vec<f32>, i64), NotAChain> {
        let dequantize = self
            .walk
            .graph
            .producer(value)
            .filter(|producer| producer.op_type == "DequantizeLinear");
        let Some(dequantize) = dequantize else {
            return refuse(&node.name, "parameter is not dequantized");
        };
        let [tensor, scale, zero_point @ ..] = dequantize.input.as_slice() else {
            return refuse(&dequantize.name, "no scale");
        };
        let zero_point = zero_point.first().filter(|name| !name.is_empty());
        if !zero_point.is_none_or(|name| self.walk.graph.constant(name).is_some_and(is_zero)) {
            return refuse(&dequantize.name, "zero point is not a constant 0");
        }
        let Some(tensor) = self
            .walk
            .graph
            .constant(tensor)
            .filter(|tensor| is_of(tensor, element))
        else {
            return refuse(
                &dequantize.name,
                "input is not a constant of the expected type",
            );
        };
        match self.walk.graph.constant(scale).and_then(f32_elements) {
            Some(scales)
                if !scales.is_empty() && scales.iter().all(|s| s.is_normal() && *s > 0.0) =>
            {
                Ok((tensor, scales, integer(dequantize, "axis").unwrap_or(1)))
            }
            _ => refuse(&dequantize.name, "scales are not positive constants"),
        }
    }
}
