//! The ONNX graph as the recogniser walks it: who produces a value, who reads it, what is constant.
//!
//! In: the protobuf that tract-onnx parsed. Out: lookups by value name. Nothing is interpreted here.
//!
//! Recognition works on this level and not on tract's typed graph, because the typed graph has lost what exactness
//! needs: it keeps the reciprocal of QuantizeLinear's scale, and it folds DequantizeLinear of tensors with
//! fewer than 16 elements into f32.

use std::collections::HashMap;

use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::tensor_shape_proto::{self, dimension};
use tract_onnx::pb::{GraphProto, NodeProto, TensorProto, type_proto};

/// The graph input that takes the images.
#[derive(Debug)]
pub(crate) struct ImageInput<'a> {
    pub(crate) name: &'a str,
    pub(crate) element: DataType,
    /// Fixed dimensions; `None` where free or out of range.
    pub(crate) dimensions: Vec<Option<usize>>,
}

impl ImageInput<'_> {
    /// Channels, rows and columns of one image, where the input is u8 and they are fixed.
    pub(crate) fn image(&self) -> Option<[usize; 3]> {
        match (self.element, self.dimensions.as_slice()) {
            (DataType::Uint8, &[_, Some(channels), Some(rows), Some(columns)]) => {
                Some([channels, rows, columns])
            }
            _ => None,
        }
    }
}

/// A graph, indexed by value name.
#[derive(Debug)]
pub(crate) struct Graph<'a> {
    proto: &'a GraphProto,
    producers: HashMap<&'a str, &'a NodeProto>,
    readers: HashMap<&'a str, Vec<&'a NodeProto>>,
    constants: HashMap<&'a str, &'a TensorProto>,
}

impl<'a> Graph<'a> {
    /// Indexes a graph; nothing is copied.
    pub(crate) fn new(proto: &'a GraphProto) -> Self {
        let mut producers = HashMap::new();
        let mut readers: HashMap<&str, Vec<&NodeProto>> = HashMap::new();
        for node in &proto.node {
            for output in &node.output {
                producers.insert(output.as_str(), node);
            }
            for input in &node.input {
                readers.entry(input).or_default().push(node);
            }
        }
        let constants = proto
            .initializer
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor))
            .collect();
        Self {
            proto,
            producers,
            readers,
            constants,
        }
    }

    /// The one graph input that is no constant.
    pub(crate) fn image_input(&self) -> Option<ImageInput<'a>> {
        let is_constant = |name: &str| self.constants.contains_key(name);
        let mut inputs = self
            .proto
            .input
            .iter()
            .filter(|input| !is_constant(&input.name));
        let (Some(input), None) = (inputs.next(), inputs.next()) else {
            return None;
        };
        let Some(type_proto::Value::TensorType(tensor)) = &input.r#type.as_ref()?.value else {
            return None;
        };
        let fixed = |dimension: &tensor_shape_proto::Dimension| match dimension.value {
            Some(dimension::Value::DimValue(n)) => usize::try_from(n).ok().filter(|&n| n > 0),
            _ => None,
        };
        Some(ImageInput {
            name: &input.name,
            element: DataType::try_from(tensor.elem_type).ok()?,
            dimensions: tensor
                .shape
                .iter()
                .flat_map(|shape| &shape.dim)
                .map(fixed)
                .collect(),
        })
    }

    /// Names of the graph's outputs.
    pub(crate) fn outputs(&self) -> impl Iterator<Item = &'a str> {
        self.proto.output.iter().map(|output| output.name.as_str())
    }

    /// The node that computes a value; `None` for inputs and constants.
    pub(crate) fn producer(&self, value: &str) -> Option<&'a NodeProto> {
        self.producers.get(value).copied()
    }

    /// The node that reads a value, where exactly one does.
    pub(crate) fn only_reader(&self, value: &str) -> Option<&'a NodeProto> {
        match self.readers.get(value).map(Vec::as_slice) {
            Some([reader]) => Some(reader),
            _ => None,
        }
    }

    /// The constant of this name.
    pub(crate) fn constant(&self, value: &str) -> Option<&'a TensorProto> {
        self.constants.get(value).copied()
    }
}

/// The integer attribute of this name.
pub(crate) fn integer(node: &NodeProto, name: &str) -> Option<i64> {
    node.attribute
        .iter()
        .find(|attribute| attribute.name == name)
        .map(|attribute| attribute.i)
}

/// The list of integers of this name.
pub(crate) fn integers<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    node.attribute
        .iter()
        .find(|attribute| attribute.name == name)
        .map(|attribute| attribute.ints.as_slice())
}

/// The float attribute of this name.
pub(crate) fn float(node: &NodeProto, name: &str) -> Option<f32> {
    node.attribute
        .iter()
        .find(|attribute| attribute.name == name)
        .map(|attribute| attribute.f)
}

/// Dimensions of a constant; `None` where one is negative or their product is beyond `usize`.
pub(crate) fn dimensions(tensor: &TensorProto) -> Option<Vec<usize>> {
    let dimensions: Vec<usize> = tensor
        .dims
        .iter()
        .map(|&n| usize::try_from(n).ok())
        .collect::<Option<_>>()?;
    dimensions
        .iter()
        .try_fold(1usize, |product, &n| product.checked_mul(n))?;
    Some(dimensions)
}

/// Elements of an f32 constant.
pub(crate) fn f32_elements(tensor: &TensorProto) -> Option<Vec<f32>> {
    if DataType::try_from(tensor.data_type) != Ok(DataType::Float) {
        return None;
    }
    let values = if tensor.raw_data.is_empty() {
        tensor.float_data.clone()
    } else {
        tensor
            .raw_data
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect()
    };
    let n: usize = dimensions(tensor)?.iter().product();
    (values.len() == n).then_some(values)
}

/// Elements of an i32 constant.
pub(crate) fn i32_elements(tensor: &TensorProto) -> Option<Vec<i32>> {
    if DataType::try_from(tensor.data_type) != Ok(DataType::Int32) {
        return None;
    }
    let values = if tensor.raw_data.is_empty() {
        tensor.int32_data.clone()
    } else {
        tensor
            .raw_data
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| i32::from_le_bytes(bytes))
            .collect()
    };
    let n: usize = dimensions(tensor)?.iter().product();
    (values.len() == n).then_some(values)
}

/// Whether every element of an integer constant is 0.
pub(crate) fn is_zero(tensor: &TensorProto) -> bool {
    tensor.raw_data.iter().all(|&byte| byte == 0)
        && tensor.int32_data.iter().all(|&value| value == 0)
}
