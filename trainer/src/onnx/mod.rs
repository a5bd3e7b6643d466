//! The part of ONNX that this project reads and writes: protobuf messages of `onnx.proto3` (field numbers and
//! meaning from there, IR version 7), constructors for the tensors and nodes we emit, and checked readers.
//!
//! In: bytes of a model file, or a [`ModelProto`]. Out: the other one. The structs hold every field that our own files
//! use; protobuf lets a reader drop the others, and the checked readers refuse what would change the meaning
//! (weights outside the file, typed instead of raw data). Which graph stands in the messages is the business of
//! [`crate::export`] and [`crate::quantize`]; running it is [`crate::execute`]'s and the engine's.

use std::collections::{BTreeMap, BTreeSet};

mod messages;
mod node;
mod structure;
mod tensor;

use prost::Message;

pub use messages::{
    AttributeProto, DataType, Dimension, DimensionProto, GraphProto, ModelProto, NodeProto,
    OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto,
    TypeProto, ValueInfoProto,
};

/// IR version of the files we write: that of ONNX 1.8, which brought opset 13.
pub const IR_VERSION: i64 = 7;
/// Operator set of the files we write (per-axis `DequantizeLinear` begins here).
pub const OPSET_VERSION: i64 = 13;
/// Largest file that protobuf, and with it every ONNX runtime, reads in one message.
pub const MAX_FILE_BYTES: usize = i32::MAX as usize;
/// Name of the batch dimension.
pub const BATCH: &str = "N";

/// Why a file or a part of it cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OnnxError {
    /// The bytes are no protobuf message of this kind.
    #[error("not an ONNX file")]
    Decode(#[source] prost::DecodeError),
    /// The message holds no graph.
    #[error("the ONNX file holds no graph")]
    NoGraph,
    /// The file would be larger than protobuf allows.
    #[error("the ONNX file would have {bytes} bytes, protobuf allows {MAX_FILE_BYTES}")]
    TooLarge {
        /// Size that the file would have.
        bytes: usize,
    },
    /// A constant has another element type than its use asks for.
    #[error("constant {name} has element type {found}, expected {expected:?}")]
    ElementType {
        /// Name of the constant.
        name: String,
        /// `TensorProto.data_type` found.
        found: i32,
        /// What was expected.
        expected: DataType,
    },
    /// A constant's bytes do not fill its shape, or are not stored as raw data in this file.
    #[error("constant {name} of shape {dims:?} has {found} bytes of raw data, expected {expected}")]
    RawData {
        /// Name of the constant.
        name: String,
        /// Its shape.
        dims: Vec<i64>,
        /// Bytes found.
        found: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// A name is used but not defined before.
    #[error("tensor {name} is used but not produced before")]
    Undefined {
        /// The name.
        name: String,
    },
    /// A name is given to two tensors.
    #[error("tensor {name} is produced twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// A node reads or gives nothing.
    #[error("node {name} has no input or no output")]
    Unconnected {
        /// Its name.
        name: String,
    },
}

/// Reads a model file.
///
/// # Errors
///
/// [`OnnxError::Decode`] where the bytes are no such message, [`OnnxError::NoGraph`] where it is empty; a node that reads what no node before
/// it gave, or gives what is there already.
pub fn read(bytes: &[u8]) -> Result<ModelProto, OnnxError> {
    let model = ModelProto::decode(bytes).map_err(OnnxError::Decode)?;
    model.graph()?.check_names()?;
    Ok(model)
}

/// The bytes of a model file. The same message gives the same bytes.
///
/// # Errors
///
/// [`OnnxError::TooLarge`] beyond [`MAX_FILE_BYTES`].
pub fn write(model: &ModelProto) -> Result<Vec<u8>, OnnxError> {
    let bytes = model.encoded_len();
    if bytes > MAX_FILE_BYTES {
        return Err(OnnxError::TooLarge { bytes });
    }
    Ok(model.encode_to_vec())
}

impl ModelProto {
    /// A model of opset 13 and IR 7 around `graph`.
    #[must_use]
    pub fn new(graph: GraphProto) -> Self {
        Self {
            ir_version: IR_VERSION,
            producer_name: "pe-edge trainer".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            graph: Some(graph),
            opset_import: vec![OperatorSetIdProto {
                domain: String::new(),
                version: OPSET_VERSION,
            }],
            ..Self::default()
        }
    }

    /// The graph.
    ///
    /// # Errors
    ///
    /// [`OnnxError::NoGraph`] where there is none.
    pub fn graph(&self) -> Result<&GraphProto, OnnxError> {
        self.graph.as_ref().ok_or(OnnxError::NoGraph)
    }

    /// The value stored under `key`.
    #[must_use]
    pub fn metadata(&self, key: &str) -> Option<&str> {
        let entry = self.metadata_props.iter().find(|entry| entry.key == key);
        entry.map(|entry| entry.value.as_str())
    }

    /// Stores `value` under `key`, in place of what stood there.
    pub fn set_metadata(&mut self, key: &str, value: String) {
        self.metadata_props.retain(|entry| entry.key != key);
        self.metadata_props.push(StringStringEntryProto {
            key: key.to_owned(),
            value,
        });
    }
}

impl GraphProto {
    /// The constants by name.
    #[must_use]
    pub fn initializers(&self) -> BTreeMap<&str, &TensorProto> {
        let named = self.initializer.iter();
        named.map(|tensor| (tensor.name.as_str(), tensor)).collect()
    }

    /// Holds the nodes to their order: whoever follows the graph from reader to reader comes to an end.
    fn check_names(&self) -> Result<(), OnnxError> {
        let inputs = self.input.iter().map(|input| input.name.as_str());
        let mut known: BTreeSet<&str> = self.initializers().into_keys().chain(inputs).collect();
        for node in &self.node {
            if node.input.is_empty() || node.output.is_empty() {
                let name = node.name.clone();
                return Err(OnnxError::Unconnected { name });
            }
            // An empty name stands for an input that is left out.
            let mut inputs = node.input.iter().filter(|name| !name.is_empty());
            if let Some(name) = inputs.find(|name| !known.contains(name.as_str())) {
                return Err(OnnxError::Undefined { name: name.clone() });
            }
            for name in &node.output {
                if !known.insert(name) {
                    return Err(OnnxError::Twice { name: name.clone() });
                }
            }
        }
        Ok(())
    }
}

/// An extent as protobuf holds it; no array in memory has one beyond `i64::MAX`.
fn extent_i64(extent: usize) -> i64 {
    i64::try_from(extent).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small_model() -> ModelProto {
        let node = NodeProto::new("Gemm", "dense1", &["x", "w", "b"], "y").with_int("transB", 1);
        let mut model = ModelProto::new(GraphProto {
            node: vec![node.with_ints("odd", &[-1, 2])],
            name: "small".to_owned(),
            initializer: vec![
                TensorProto::float("w", &[1, 2], &[1.5, -2.0]),
                TensorProto::int8("w8", &[2], &[-127, 127]),
                TensorProto::int32("b", &[1], &[-7]),
                TensorProto::uint8("z", &[], &[0]),
            ],
            input: vec![ValueInfoProto::batched("x", DataType::Float, &[2])],
            output: vec![ValueInfoProto::batched("y", DataType::Float, &[1])],
            ..GraphProto::default()
        });
        model.set_metadata("pe.manifest", "{}".to_owned());
        model
    }

    #[test]
    fn written_model_reads_back_equal() {
        let model = small_model();
        let bytes = write(&model).unwrap();
        let again = read(&bytes).unwrap();
        assert_eq!(again, model);
        assert_eq!(again.metadata("pe.manifest"), Some("{}"));
        let graph = again.graph().unwrap();
        let constants = graph.initializers();
        assert_eq!(constants["w"].to_f32().unwrap(), [1.5, -2.0]);
        assert_eq!(constants["w8"].to_i8().unwrap(), [-127, 127]);
        assert_eq!(constants["b"].to_i32().unwrap(), [-7]);
        assert_eq!(constants["z"].to_u8().unwrap(), [0]);
        assert_eq!(graph.node[0].int("transB", 0), 1);
        assert_eq!(graph.node[0].ints("odd"), [-1, 2]);
        assert_eq!(graph.input[0].dims(), Some(vec![2]));
    }

    #[test]
    fn bytes_that_are_no_model_are_refused() {
        assert!(matches!(read(b"DICM, not ONNX"), Err(OnnxError::Decode(_))));
        assert!(matches!(read(b""), Err(OnnxError::NoGraph)));
    }

    #[test]
    fn nodes_out_of_order_are_refused() {
        let refused = |change: &dyn Fn(&mut NodeProto)| {
            let mut model = small_model();
            change(&mut model.graph.as_mut().unwrap().node[0]);
            read(&write(&model).unwrap()).unwrap_err().to_string()
        };
        let circle = refused(&|node| node.input[0] = "y".to_owned());
        assert_eq!(circle, "tensor y is used but not produced before");
        let twice = refused(&|node| node.output[0] = "x".to_owned());
        assert_eq!(twice, "tensor x is produced twice");
        let alone = refused(&|node| node.output.clear());
        assert_eq!(alone, "node dense1 has no input or no output");
    }

    #[test]
    fn constants_that_do_not_fill_their_shape_are_refused() {
        let mut tensor = TensorProto::float("w", &[2], &[1.0, 2.0]);
        assert!(matches!(tensor.to_i8(), Err(OnnxError::ElementType { .. })));
        tensor.raw_data.pop();
        assert!(matches!(
            tensor.to_f32(),
            Err(OnnxError::RawData {
                found: 7,
                expected: 8,
                ..
            })
        ));
        tensor.dims = vec![-1];
        assert!(matches!(tensor.to_f32(), Err(OnnxError::RawData { .. })));
        tensor.dims = vec![i64::MAX, i64::MAX];
        assert!(matches!(tensor.to_f32(), Err(OnnxError::RawData { .. })));
    }
}
