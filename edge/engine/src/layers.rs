//! What the nodes of a chain must look like, quantized or not.

use tract_onnx::pb::{NodeProto, TensorProto, tensor_proto::DataType};

use crate::graph::{float, integer, integers};

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
