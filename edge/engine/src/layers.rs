//! What a chain must look like, quantized or not: the walk along it, and its nodes.

use tract_onnx::pb::{NodeProto, TensorProto, tensor_proto::DataType};

use crate::graph::{Graph, float, integer, integers};

/// Why a graph is not one chain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{node}: {reason}")]
pub(crate) struct NotAChain {
    /// Node or value at which the form ends.
    pub(crate) node: String,
    /// What was expected there.
    pub(crate) reason: &'static str,
}

pub(crate) fn refuse<T>(node: &str, reason: &'static str) -> Result<T, NotAChain> {
    Err(NotAChain {
        node: node.to_owned(),
        reason,
    })
}

/// A position in the graph: the value that the next node reads.
///
/// No value is defined twice, and each step goes from a node's first input to its only output. So the walk meets no value again and ends.
#[derive(Debug)]
pub(crate) struct Walk<'g, 'a> {
    pub(crate) graph: &'g Graph<'a>,
    pub(crate) value: &'a str,
}

impl<'a> Walk<'_, 'a> {
    /// The only reader of the present value.
    pub(crate) fn reader(&self) -> Result<&'a NodeProto, NotAChain> {
        match self.graph.only_reader(self.value) {
            Some(node) if node.input.first().is_some_and(|input| input == self.value) => Ok(node),
            _ => refuse(self.value, "not the first input of exactly one node"),
        }
    }

    /// Passes a node.
    pub(crate) fn step(&mut self, node: &'a NodeProto) -> Result<(), NotAChain> {
        match node.output.as_slice() {
            [output] => {
                self.value = output;
                Ok(())
            }
            _ => refuse(&node.name, "not one output"),
        }
    }

    /// Passes a node of this type if it comes next.
    pub(crate) fn skip(&mut self, op_type: &str) -> Result<bool, NotAChain> {
        match self.reader() {
            Ok(node) if node.op_type == op_type => self.step(node).map(|()| true),
            _ => Ok(false),
        }
    }

    /// The present value must be an output; only a Sigmoid may follow.
    pub(crate) fn finish(&self) -> Result<(), NotAChain> {
        if !self.graph.outputs().any(|output| output == self.value) {
            return refuse(self.value, "the last layer is not an output");
        }
        match self.graph.only_reader(self.value) {
            Some(node) if node.op_type != "Sigmoid" => refuse(&node.name, "follows the logit"),
            _ => Ok(()),
        }
    }
}

fn is_absent_or(node: &NodeProto, name: &str, expected: &[i64]) -> bool {
    integers(node, name).is_none_or(|found| found == expected)
}

/// Whether a Conv has stride 1, no padding, no dilation, one group.
pub(crate) fn is_valid_convolution(node: &NodeProto) -> bool {
    let auto_pad = node
        .attribute
        .iter()
        .find(|attribute| attribute.name == "auto_pad");
    is_absent_or(node, "pads", &[0, 0, 0, 0])
        && is_absent_or(node, "strides", &[1, 1])
        && is_absent_or(node, "dilations", &[1, 1])
        && auto_pad.is_none_or(|pad| pad.s == b"NOTSET" || pad.s == b"VALID")
        && integer(node, "group").unwrap_or(1) == 1
}

/// Whether a node is a 2 x 2 MaxPool with stride 2 that drops a last odd row or column.
pub(crate) fn is_pool_of_two(node: &NodeProto) -> bool {
    let is = |name: &str, expected: &[i64]| integers(node, name) == Some(expected);
    node.op_type == "MaxPool"
        && is("kernel_shape", &[2, 2])
        && is("strides", &[2, 2])
        && is_absent_or(node, "pads", &[0, 0, 0, 0])
        && is_absent_or(node, "dilations", &[1, 1])
        && integer(node, "ceil_mode").unwrap_or(0) == 0
}

/// Whether a Gemm multiplies its input as it is, unscaled.
pub(crate) fn is_plain_gemm(node: &NodeProto) -> bool {
    let is_one =
        |name: &str| float(node, name).is_none_or(|found| found.to_bits() == 1.0_f32.to_bits());
    is_one("alpha") && is_one("beta") && integer(node, "transA").unwrap_or(0) == 0
}

pub(crate) fn is_of(tensor: &TensorProto, element: DataType) -> bool {
    DataType::try_from(tensor.data_type) == Ok(element)
}
