//! The part of ONNX that this project reads and writes: protobuf messages of `onnx.proto3` (field numbers and
//! meaning from there, IR version 7), constructors for the tensors and nodes we emit, and checked readers.
//!
//! In: bytes of a model file, or a [`ModelProto`]. Out: the other one. The structs hold every field that our own files
//! use; protobuf lets a reader drop the others, and the checked readers refuse what would change the meaning
//! (weights outside the file, typed instead of raw data). Which graph stands in the messages is the business of
//! [`crate::export`] and [`crate::quantize`]; running it is [`crate::execute`]'s and the engine's.

use std::collections::BTreeMap;

use prost::Message;

/// IR version of the files we write (ONNX 1.7, the first to carry opset 13 is 7).
pub const IR_VERSION: i64 = 7;
/// Operator set of the files we write (per-axis `DequantizeLinear` begins here).
pub const OPSET_VERSION: i64 = 13;
/// Largest file that protobuf, and with it every ONNX runtime, reads in one message.
pub const MAX_FILE_BYTES: usize = i32::MAX as usize;
/// Name of the batch dimension.
pub const BATCH: &str = "N";

/// `TensorProto.DataType`, the values that our files use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum DataType {
    /// IEEE 754 binary32.
    Float = 1,
    /// Unsigned 8 bit.
    Uint8 = 2,
    /// Signed 8 bit, two's complement.
    Int8 = 3,
    /// Signed 32 bit, two's complement.
    Int32 = 6,
    /// Signed 64 bit, two's complement.
    Int64 = 7,
}

/// `ModelProto`: the whole file.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    /// Version of the IR, [`IR_VERSION`] in our files.
    #[prost(int64, tag = "1")]
    pub ir_version: i64,
    /// Program that wrote the file.
    #[prost(string, tag = "2")]
    pub producer_name: String,
    /// Its version.
    #[prost(string, tag = "3")]
    pub producer_version: String,
    /// Prose for whoever opens the file in a viewer.
    #[prost(string, tag = "6")]
    pub doc_string: String,
    /// The graph.
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    /// Operator sets used.
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetIdProto>,
    /// Key-value pairs; `pe.manifest` stands here.
    #[prost(message, repeated, tag = "14")]
    pub metadata_props: Vec<StringStringEntryProto>,
}

/// `OperatorSetIdProto`.
#[derive(Clone, PartialEq, Message)]
pub struct OperatorSetIdProto {
    /// Empty for the standard operators.
    #[prost(string, tag = "1")]
    pub domain: String,
    /// Version of the set.
    #[prost(int64, tag = "2")]
    pub version: i64,
}

/// `StringStringEntryProto`.
#[derive(Clone, PartialEq, Message)]
pub struct StringStringEntryProto {
    /// Key.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// `GraphProto`: nodes in topological order.
#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    /// Nodes, each after the producers of its inputs.
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<NodeProto>,
    /// Name of the graph.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Constants.
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<TensorProto>,
    /// Prose.
    #[prost(string, tag = "10")]
    pub doc_string: String,
    /// Inputs.
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfoProto>,
    /// Outputs.
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfoProto>,
    /// Shapes of the tensors between.
    #[prost(message, repeated, tag = "13")]
    pub value_info: Vec<ValueInfoProto>,
}

/// `NodeProto`: one operator.
#[derive(Clone, PartialEq, Message)]
pub struct NodeProto {
    /// Names of the inputs; an empty name is an optional input left out.
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    /// Names of the outputs.
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    /// Name of the node.
    #[prost(string, tag = "3")]
    pub name: String,
    /// Operator.
    #[prost(string, tag = "4")]
    pub op_type: String,
    /// Attributes.
    #[prost(message, repeated, tag = "5")]
    pub attribute: Vec<AttributeProto>,
    /// Operator domain, empty for the standard operators.
    #[prost(string, tag = "7")]
    pub domain: String,
}

/// `AttributeProto`, the kinds that our operators use.
#[derive(Clone, PartialEq, Message)]
pub struct AttributeProto {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Value of kind FLOAT.
    #[prost(float, tag = "2")]
    pub f: f32,
    /// Value of kind INT.
    #[prost(int64, tag = "3")]
    pub i: i64,
    /// Value of kind STRING.
    #[prost(bytes = "vec", tag = "4")]
    pub s: Vec<u8>,
    /// Value of kind INTS.
    #[prost(int64, repeated, tag = "8")]
    pub ints: Vec<i64>,
    /// Kind: 1 FLOAT, 2 INT, 3 STRING, 7 INTS.
    #[prost(int32, tag = "20")]
    pub r#type: i32,
}

/// `TensorProto`: a constant.
#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    /// Shape, outermost first.
    #[prost(int64, repeated, tag = "1")]
    pub dims: Vec<i64>,
    /// [`DataType`].
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    /// Values as floats; refused by our readers unless `raw_data` is used instead.
    #[prost(float, repeated, tag = "4")]
    pub float_data: Vec<f32>,
    /// Name.
    #[prost(string, tag = "8")]
    pub name: String,
    /// Values, little-endian, row-major.
    #[prost(bytes = "vec", tag = "9")]
    pub raw_data: Vec<u8>,
    /// Prose.
    #[prost(string, tag = "12")]
    pub doc_string: String,
    /// 1 where the values lie in another file; refused by our readers.
    #[prost(int32, tag = "14")]
    pub data_location: i32,
}

/// `ValueInfoProto`: name, element type and shape of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct ValueInfoProto {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Type.
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
    /// Prose.
    #[prost(string, tag = "3")]
    pub doc_string: String,
}

/// `TypeProto`, tensors only.
#[derive(Clone, PartialEq, Message)]
pub struct TypeProto {
    /// The tensor type.
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorTypeProto>,
}

/// `TypeProto.Tensor`.
#[derive(Clone, PartialEq, Message)]
pub struct TensorTypeProto {
    /// [`DataType`].
    #[prost(int32, tag = "1")]
    pub elem_type: i32,
    /// Shape.
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShapeProto>,
}

/// `TensorShapeProto`.
#[derive(Clone, PartialEq, Message)]
pub struct TensorShapeProto {
    /// Dimensions, outermost first.
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<DimensionProto>,
}

/// `TensorShapeProto.Dimension`.
#[derive(Clone, PartialEq, Message)]
pub struct DimensionProto {
    /// The extent.
    #[prost(oneof = "Dimension", tags = "1, 2")]
    pub value: Option<Dimension>,
}

/// An extent: a number, or a name that stands for any number.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Dimension {
    /// Known extent.
    #[prost(int64, tag = "1")]
    Value(i64),
    /// Symbolic extent.
    #[prost(string, tag = "2")]
    Param(String),
}

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
    /// A name is used but not defined.
    #[error("tensor {name} is used but never produced")]
    Undefined {
        /// The name.
        name: String,
    },
}

/// Reads a model file.
///
/// # Errors
///
/// [`OnnxError::Decode`] where the bytes are no such message, [`OnnxError::NoGraph`] where it is empty.
pub fn read(bytes: &[u8]) -> Result<ModelProto, OnnxError> {
    let model = ModelProto::decode(bytes).map_err(OnnxError::Decode)?;
    match model.graph {
        Some(_) => Ok(model),
        None => Err(OnnxError::NoGraph),
    }
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

    /// Structure of the graph as text, one line a constant, input, output, shape and node, without weights: what a golden test
    /// digests. Equal texts mean equal operators, attributes, names, element types and shapes.
    #[must_use]
    pub fn structure(&self) -> String {
        let mut lines = Vec::new();
        for (kind, values) in [
            ("input", &self.input),
            ("output", &self.output),
            ("value", &self.value_info),
        ] {
            lines.extend(
                values
                    .iter()
                    .map(|value| format!("{kind} {} {}", value.name, value.describe())),
            );
        }
        for tensor in &self.initializer {
            lines.push(format!(
                "constant {} {} {:?}",
                tensor.name, tensor.data_type, tensor.dims
            ));
        }
        for node in &self.node {
            let attributes: Vec<String> = node
                .attribute
                .iter()
                .map(AttributeProto::describe)
                .collect();
            lines.push(format!(
                "node {} {} {:?} -> {:?} {}",
                node.op_type,
                node.name,
                node.input,
                node.output,
                attributes.join(" ")
            ));
        }
        lines.join("\n")
    }
}

impl NodeProto {
    /// A node of the standard operator set.
    #[must_use]
    pub fn new(op_type: &str, name: &str, input: &[&str], output: &str) -> Self {
        Self {
            input: input.iter().map(|&name| name.to_owned()).collect(),
            output: vec![output.to_owned()],
            name: name.to_owned(),
            op_type: op_type.to_owned(),
            ..Self::default()
        }
    }

    /// The same with an attribute of kind INT.
    #[must_use]
    pub fn with_int(mut self, name: &str, value: i64) -> Self {
        self.attribute.push(AttributeProto {
            name: name.to_owned(),
            i: value,
            r#type: 2,
            ..AttributeProto::default()
        });
        self
    }

    /// The same with an attribute of kind INTS.
    #[must_use]
    pub fn with_ints(mut self, name: &str, values: &[i64]) -> Self {
        self.attribute.push(AttributeProto {
            name: name.to_owned(),
            ints: values.to_vec(),
            r#type: 7,
            ..AttributeProto::default()
        });
        self
    }

    /// Attribute of kind INT, or `default` where it is left out.
    #[must_use]
    pub fn int(&self, name: &str, default: i64) -> i64 {
        self.find(name).map_or(default, |attribute| attribute.i)
    }

    /// Attribute of kind FLOAT, or `default` where it is left out.
    #[must_use]
    pub fn float(&self, name: &str, default: f32) -> f32 {
        self.find(name).map_or(default, |attribute| attribute.f)
    }

    /// Attribute of kind INTS; empty where it is left out.
    #[must_use]
    pub fn ints(&self, name: &str) -> &[i64] {
        self.find(name)
            .map_or(&[], |attribute| attribute.ints.as_slice())
    }

    fn find(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute
            .iter()
            .find(|attribute| attribute.name == name)
    }
}

impl AttributeProto {
    fn describe(&self) -> String {
        match self.r#type {
            1 => format!("{}={}", self.name, self.f),
            2 => format!("{}={}", self.name, self.i),
            3 => format!("{}={:?}", self.name, String::from_utf8_lossy(&self.s)),
            _ => format!("{}={:?}", self.name, self.ints),
        }
    }
}

impl ValueInfoProto {
    /// A tensor `[N, dims...]` with symbolic batch.
    #[must_use]
    pub fn batched(name: &str, element: DataType, dims: &[usize]) -> Self {
        let known = dims
            .iter()
            .map(|&extent| Dimension::Value(extent_i64(extent)));
        let all = std::iter::once(Dimension::Param(BATCH.to_owned())).chain(known);
        let dim = all
            .map(|value| DimensionProto { value: Some(value) })
            .collect();
        Self {
            name: name.to_owned(),
            r#type: Some(TypeProto {
                tensor_type: Some(TensorTypeProto {
                    elem_type: element as i32,
                    shape: Some(TensorShapeProto { dim }),
                }),
            }),
            doc_string: String::new(),
        }
    }

    /// The known extents behind the batch dimension; `None` where the shape is missing or has another unknown extent.
    #[must_use]
    pub fn dims(&self) -> Option<Vec<usize>> {
        let shape = self.r#type.as_ref()?.tensor_type.as_ref()?.shape.as_ref()?;
        let known = shape.dim.iter().skip(1).map(|dim| match dim.value {
            Some(Dimension::Value(extent)) => usize::try_from(extent).ok(),
            _ => None,
        });
        known.collect()
    }

    fn describe(&self) -> String {
        let Some(tensor) = self
            .r#type
            .as_ref()
            .and_then(|kind| kind.tensor_type.as_ref())
        else {
            return "untyped".to_owned();
        };
        let dims = tensor.shape.iter().flat_map(|shape| &shape.dim);
        let dims: Vec<String> = dims
            .map(|dim| match &dim.value {
                Some(Dimension::Value(extent)) => extent.to_string(),
                Some(Dimension::Param(name)) => name.clone(),
                None => "?".to_owned(),
            })
            .collect();
        format!("{} [{}]", tensor.elem_type, dims.join(","))
    }
}

impl TensorProto {
    /// A float constant; an empty shape is a scalar.
    #[must_use]
    pub fn float(name: &str, dims: &[usize], values: &[f32]) -> Self {
        let raw = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Self::raw(name, DataType::Float, dims, raw)
    }

    /// An i8 constant.
    #[must_use]
    pub fn int8(name: &str, dims: &[usize], values: &[i8]) -> Self {
        let raw = values.iter().map(|&value| value.cast_unsigned()).collect();
        Self::raw(name, DataType::Int8, dims, raw)
    }

    /// A u8 constant.
    #[must_use]
    pub fn uint8(name: &str, dims: &[usize], values: &[u8]) -> Self {
        Self::raw(name, DataType::Uint8, dims, values.to_vec())
    }

    /// An i32 constant.
    #[must_use]
    pub fn int32(name: &str, dims: &[usize], values: &[i32]) -> Self {
        let raw = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        Self::raw(name, DataType::Int32, dims, raw)
    }

    /// A constant from its little-endian bytes.
    #[must_use]
    pub fn raw(name: &str, element: DataType, dims: &[usize], raw_data: Vec<u8>) -> Self {
        Self {
            dims: dims.iter().map(|&extent| extent_i64(extent)).collect(),
            data_type: element as i32,
            name: name.to_owned(),
            raw_data,
            ..Self::default()
        }
    }

    /// Shape, outermost first.
    ///
    /// # Errors
    ///
    /// [`OnnxError::RawData`] for a negative extent or a product beyond the address space.
    pub fn shape(&self) -> Result<Vec<usize>, OnnxError> {
        let shape: Option<Vec<usize>> = self
            .dims
            .iter()
            .map(|&extent| usize::try_from(extent).ok())
            .collect();
        let shape = shape.filter(|shape| {
            shape
                .iter()
                .try_fold(1_usize, |product, &extent| product.checked_mul(extent))
                .is_some()
        });
        shape.ok_or_else(|| self.bad_raw_data(0))
    }

    /// Values of a float constant.
    ///
    /// # Errors
    ///
    /// [`OnnxError::ElementType`] or [`OnnxError::RawData`].
    pub fn to_f32(&self) -> Result<Vec<f32>, OnnxError> {
        let raw = self.checked(DataType::Float, 4)?;
        Ok(raw
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect())
    }

    /// Values of an i8 constant.
    ///
    /// # Errors
    ///
    /// [`OnnxError::ElementType`] or [`OnnxError::RawData`].
    pub fn to_i8(&self) -> Result<Vec<i8>, OnnxError> {
        let raw = self.checked(DataType::Int8, 1)?;
        Ok(raw.iter().map(|&byte| byte.cast_signed()).collect())
    }

    /// Values of a u8 constant.
    ///
    /// # Errors
    ///
    /// [`OnnxError::ElementType`] or [`OnnxError::RawData`].
    pub fn to_u8(&self) -> Result<Vec<u8>, OnnxError> {
        Ok(self.checked(DataType::Uint8, 1)?.to_vec())
    }

    /// Values of an i32 constant.
    ///
    /// # Errors
    ///
    /// [`OnnxError::ElementType`] or [`OnnxError::RawData`].
    pub fn to_i32(&self) -> Result<Vec<i32>, OnnxError> {
        let raw = self.checked(DataType::Int32, 4)?;
        Ok(raw
            .as_chunks()
            .0
            .iter()
            .map(|&bytes| i32::from_le_bytes(bytes))
            .collect())
    }

    fn checked(&self, expected: DataType, element_bytes: usize) -> Result<&[u8], OnnxError> {
        if self.data_type != expected as i32 {
            return Err(OnnxError::ElementType {
                name: self.name.clone(),
                found: self.data_type,
                expected,
            });
        }
        let n_values: usize = self.shape()?.iter().product();
        let bytes = n_values.saturating_mul(element_bytes);
        if self.raw_data.len() != bytes || self.data_location != 0 {
            return Err(self.bad_raw_data(bytes));
        }
        Ok(&self.raw_data)
    }

    fn bad_raw_data(&self, expected: usize) -> OnnxError {
        OnnxError::RawData {
            name: self.name.clone(),
            dims: self.dims.clone(),
            found: self.raw_data.len(),
            expected,
        }
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
