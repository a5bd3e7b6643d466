//! Writes quantized ONNX files of the form of `trainer quantize`, and computes their logits the slow way.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "test code")]

use prost::Message as _;
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, tensor_proto::DataType, tensor_shape_proto,
    type_proto,
};

/// A small seeded generator (xorshift64*): the same numbers on every machine.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16) % n
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n)
            .map(|_| u8::try_from(self.below(256)).unwrap())
            .collect()
    }

    fn weights(&mut self, n: usize) -> Vec<i8> {
        (0..n)
            .map(|_| i8::try_from(i64::try_from(self.below(255)).unwrap() - 127).unwrap())
            .collect()
    }
}

/// A layer with its parameters in plain form.
pub(crate) struct Layer {
    pub weights: Vec<i8>,
    pub n_inputs: usize,
    pub bias: Vec<i32>,
    pub weight_scales: Vec<f32>,
    pub input_scale: f32,
    pub output_scale: Option<f32>,
}

/// A chain of convolutions and dense layers over a u8 image.
pub(crate) struct Network {
    pub image: [usize; 3],
    pub convolutions: Vec<Layer>,
    pub dense: Vec<Layer>,
}

impl Network {
    /// A network of random weights whose activations use the whole range of u8.
    pub(crate) fn random(
        seed: u64,
        image: [usize; 3],
        convolutions: &[usize],
        dense: &[usize],
    ) -> Self {
        let mut random = Random::new(seed);
        let mut scale = 1.0_f32 / 255.0;
        let mut n_inputs = image[0];
        let (mut rows, mut columns) = (image[1], image[2]);
        let mut made = Self {
            image,
            convolutions: Vec::new(),
            dense: Vec::new(),
        };
        for &n_outputs in convolutions {
            made.convolutions.push(layer(
                &mut random,
                &mut scale,
                n_inputs,
                9,
                n_outputs,
                false,
            ));
            n_inputs = n_outputs;
            (rows, columns) = ((rows - 2) / 2, (columns - 2) / 2);
        }
        n_inputs *= rows * columns;
        for (index, &n_outputs) in dense.iter().enumerate() {
            let is_last = index + 1 == dense.len();
            made.dense.push(layer(
                &mut random,
                &mut scale,
                n_inputs,
                1,
                n_outputs,
                is_last,
            ));
            n_inputs = n_outputs;
        }
        made
    }

    /// The logit by definition: no packing, no fusing, `i64` sums.
    pub(crate) fn logit(&self, image: &[u8]) -> f32 {
        let [_, mut rows, mut columns] = self.image;
        let mut map = image.to_vec();
        for layer in &self.convolutions {
            (map, rows, columns) = layer.convolve(&map, rows, columns);
        }
        let mut logit = f32::NAN;
        for layer in &self.dense {
            let sums = layer
                .bias
                .iter()
                .zip(layer.weights.chunks_exact(layer.n_inputs))
                .map(|(&bias, weights)| {
                    let products = weights
                        .iter()
                        .zip(&map)
                        .map(|(&w, &a)| i64::from(w) * i64::from(a));
                    i64::from(bias) + products.sum::<i64>()
                });
            let sums: Vec<i64> = sums.collect();
            match layer.output_scale {
                Some(_) => {
                    map = sums
                        .iter()
                        .enumerate()
                        .map(|(n, &sum)| layer.quantized(n, sum))
                        .collect()
                }
                None => logit = sums[0] as f32 * (layer.input_scale * layer.weight_scales[0]),
            }
        }
        logit
    }

    /// The ONNX file.
    pub(crate) fn file(&self) -> Vec<u8> {
        let mut file = File {
            graph: GraphProto::default(),
            n: 0,
        };
        file.constant("zero", DataType::Uint8, &[], vec![0]);
        let mut value = "image".to_owned();
        value = file.dequantize(&value, 1.0 / 255.0);
        for layer in &self.convolutions {
            value = file.layer("Conv", &value, layer, &[3, 3]);
            value = file.requantize(&value, layer.output_scale.unwrap());
            let attributes = vec![
                integers("kernel_shape", &[2, 2]),
                integers("strides", &[2, 2]),
            ];
            value = file.node("MaxPool", &[&value], attributes);
            value = file.requantize(&value, layer.output_scale.unwrap());
        }
        value = file.node("Flatten", &[&value], vec![]);
        value = file.requantize(
            &value,
            self.convolutions.last().unwrap().output_scale.unwrap(),
        );
        for layer in &self.dense {
            value = file.layer("Gemm", &value, layer, &[]);
            if let Some(scale) = layer.output_scale {
                value = file.requantize(&value, scale);
            }
        }
        file.finish(&self.image)
    }

    /// The same network as a float file, in the form of `trainer export`: weights and biases in real numbers.
    pub(crate) fn float_file(&self) -> Vec<u8> {
        let mut file = File {
            graph: GraphProto::default(),
            n: 0,
        };
        let cast = file.node("Cast", &["image"], vec![integer("to", 1)]);
        let scale = file.floats(&[1.0 / 255.0], &[]);
        let mut value = file.node("Mul", &[&cast, &scale], vec![]);
        for layer in &self.convolutions {
            value = file.float_layer("Conv", &value, layer, &[3, 3]);
            value = file.node("Relu", &[&value], vec![]);
            let attributes = vec![
                integers("kernel_shape", &[2, 2]),
                integers("strides", &[2, 2]),
            ];
            value = file.node("MaxPool", &[&value], attributes);
        }
        value = file.node("Flatten", &[&value], vec![]);
        for (index, layer) in self.dense.iter().enumerate() {
            value = file.float_layer("Gemm", &value, layer, &[]);
            if index + 1 < self.dense.len() {
                value = file.node("Relu", &[&value], vec![]);
            }
        }
        file.finish(&self.image)
    }

    /// The logit of [`Self::float_file`] by definition, in f64.
    pub(crate) fn float_logit(&self, image: &[u8]) -> f64 {
        let [_, mut rows, mut columns] = self.image;
        let mut map: Vec<f64> = image.iter().map(|&x| f64::from(x) / 255.0).collect();
        for layer in &self.convolutions {
            (map, rows, columns) = layer.convolve_float(&map, rows, columns);
        }
        for (index, layer) in self.dense.iter().enumerate() {
            let neurons = layer.real_weights();
            let neurons = neurons.chunks_exact(layer.n_inputs).zip(layer.real_bias());
            let sums = neurons.map(|(weights, bias)| {
                let products = weights.iter().zip(&map).map(|(&w, &x)| f64::from(w) * x);
                f64::from(bias) + products.sum::<f64>()
            });
            let is_last = index + 1 == self.dense.len();
            let floor = if is_last { f64::NEG_INFINITY } else { 0.0 };
            map = sums.map(|sum| sum.max(floor)).collect();
        }
        map[0]
    }
}

fn layer(
    random: &mut Random,
    scale: &mut f32,
    inputs: usize,
    taps: usize,
    n_outputs: usize,
    is_last: bool,
) -> Layer {
    let n_inputs = inputs * taps;
    // A sum of n products of uniform weights and activations has a deviation of about sqrt(n) x 73 x 148.
    let spread = (n_inputs as f32).sqrt() * 73.0 * 148.0;
    let weight_scale = 1.0 / spread / *scale;
    let weight_scales: Vec<f32> = (0..n_outputs)
        .map(|n| weight_scale * (1.0 + n as f32 / 64.0))
        .collect();
    let output_scale = (!is_last).then_some(3.0 / 255.0);
    let bound = (spread / 2.0) as u64;
    let bias =
        |random: &mut Random| i32::try_from(random.below(2 * bound) as i64 - bound as i64).unwrap();
    let layer = Layer {
        weights: random.weights(n_inputs * n_outputs),
        n_inputs,
        bias: (0..n_outputs).map(|_| bias(random)).collect(),
        weight_scales,
        input_scale: *scale,
        output_scale,
    };
    *scale = output_scale.unwrap_or(1.0);
    layer
}

impl Layer {
    fn real_weights(&self) -> Vec<f32> {
        let filters = self.weights.chunks_exact(self.n_inputs);
        let filters = filters.zip(&self.weight_scales);
        filters
            .flat_map(|(filter, &scale)| filter.iter().map(move |&w| f32::from(w) * scale))
            .collect()
    }

    fn real_bias(&self) -> Vec<f32> {
        let bias = self.bias.iter().zip(&self.weight_scales);
        bias.map(|(&bias, &scale)| bias as f32 * (self.input_scale * scale))
            .collect()
    }

    fn convolve_float(&self, map: &[f64], rows: usize, columns: usize) -> (Vec<f64>, usize, usize) {
        let (pooled_rows, pooled_columns) = ((rows - 2) / 2, (columns - 2) / 2);
        let mut out = Vec::new();
        let filters = self.real_weights();
        for (filter, bias) in filters.chunks_exact(self.n_inputs).zip(self.real_bias()) {
            for position in 0..pooled_rows * pooled_columns {
                let (top, left) = (
                    2 * (position / pooled_columns),
                    2 * (position % pooled_columns),
                );
                let at = |shift: usize| {
                    let products = filter.iter().enumerate().map(|(tap, &weight)| {
                        let row = top + shift / 2 + tap / 3 % 3;
                        let column = left + shift % 2 + tap % 3;
                        f64::from(weight) * map[(tap / 9 * rows + row) * columns + column]
                    });
                    products.sum::<f64>() + f64::from(bias)
                };
                out.push((0..4).map(at).fold(0.0, f64::max));
            }
        }
        (out, pooled_rows, pooled_columns)
    }

    fn quantized(&self, channel: usize, sum: i64) -> u8 {
        let scale = (self.input_scale * self.weight_scales[channel]) / self.output_scale.unwrap();
        (sum as f32 * scale).round_ties_even().clamp(0.0, 255.0) as u8
    }

    fn convolve(&self, map: &[u8], rows: usize, columns: usize) -> (Vec<u8>, usize, usize) {
        let (pooled_rows, pooled_columns) = ((rows - 2) / 2, (columns - 2) / 2);
        let mut out = Vec::new();
        for (channel, filter) in self.weights.chunks_exact(self.n_inputs).enumerate() {
            let at = |row: usize, column: usize| {
                let taps = filter.iter().enumerate().map(|(tap, &weight)| {
                    let (input, row, column) = (tap / 9, row + tap / 3 % 3, column + tap % 3);
                    i64::from(weight) * i64::from(map[(input * rows + row) * columns + column])
                });
                self.quantized(channel, taps.sum::<i64>() + i64::from(self.bias[channel]))
            };
            for row in (0..2 * pooled_rows).step_by(2) {
                for column in (0..2 * pooled_columns).step_by(2) {
                    let window = [
                        at(row, column),
                        at(row, column + 1),
                        at(row + 1, column),
                        at(row + 1, column + 1),
                    ];
                    out.push(window.into_iter().max().unwrap());
                }
            }
        }
        (out, pooled_rows, pooled_columns)
    }
}

struct File {
    graph: GraphProto,
    n: usize,
}

impl File {
    fn name(&mut self, kind: &str) -> String {
        self.n += 1;
        format!("{kind}_{}", self.n)
    }

    fn constant(&mut self, name: &str, element: DataType, dims: &[usize], raw_data: Vec<u8>) {
        self.graph.initializer.push(TensorProto {
            name: name.to_owned(),
            data_type: element as i32,
            dims: dims.iter().map(|&n| i64::try_from(n).unwrap()).collect(),
            raw_data,
            ..TensorProto::default()
        });
    }

    fn node(&mut self, op_type: &str, inputs: &[&str], attribute: Vec<AttributeProto>) -> String {
        let name = self.name(op_type);
        self.graph.node.push(NodeProto {
            name: name.clone(),
            op_type: op_type.to_owned(),
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: vec![name.clone()],
            attribute,
            ..NodeProto::default()
        });
        name
    }

    fn floats(&mut self, values: &[f32], dims: &[usize]) -> String {
        let name = self.name("scale");
        self.constant(
            &name,
            DataType::Float,
            dims,
            values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        );
        name
    }

    fn dequantize(&mut self, value: &str, scale: f32) -> String {
        let scale = self.floats(&[scale], &[]);
        self.node("DequantizeLinear", &[value, &scale, "zero"], vec![])
    }

    fn requantize(&mut self, value: &str, scale: f32) -> String {
        let name = self.floats(&[scale], &[]);
        let quantized = self.node("QuantizeLinear", &[value, &name, "zero"], vec![]);
        self.dequantize(&quantized, scale)
    }

    /// Names the last value `logit`, adds the probability, and writes the file.
    fn finish(mut self, image: &[usize]) -> Vec<u8> {
        let last = self.graph.node.last_mut().unwrap();
        last.output = vec!["logit".into()];
        let probability = self.node("Sigmoid", &["logit"], vec![]);
        self.graph.input = vec![tensor("image", DataType::Uint8, image)];
        self.graph.output = vec![
            tensor("logit", DataType::Float, &[1]),
            tensor(&probability, DataType::Float, &[1]),
        ];
        let opset = OperatorSetIdProto {
            version: 13,
            ..OperatorSetIdProto::default()
        };
        let graph = Some(self.graph);
        ModelProto {
            ir_version: 7,
            opset_import: vec![opset],
            graph,
            ..ModelProto::default()
        }
        .encode_to_vec()
    }

    fn float_layer(
        &mut self,
        op_type: &str,
        value: &str,
        layer: &Layer,
        kernel: &[usize],
    ) -> String {
        let n = layer.bias.len();
        let taps: usize = kernel.iter().product();
        let dims = [&[n, layer.n_inputs / taps], kernel].concat();
        let weights = self.floats(&layer.real_weights(), &dims);
        let bias = self.floats(&layer.real_bias(), &[n]);
        let attributes = if kernel.is_empty() {
            vec![integer("transB", 1)]
        } else {
            vec![]
        };
        self.node(op_type, &[value, &weights, &bias], attributes)
    }

    fn layer(&mut self, op_type: &str, value: &str, layer: &Layer, kernel: &[usize]) -> String {
        let n = layer.bias.len();
        let taps: usize = kernel.iter().product();
        let dims = [&[n, layer.n_inputs / taps], kernel].concat();
        let weights = self.name("weights");
        self.constant(
            &weights,
            DataType::Int8,
            &dims,
            layer.weights.iter().map(|w| w.cast_unsigned()).collect(),
        );
        let zero = self.name("zero");
        self.constant(&zero, DataType::Int8, &[n], vec![0; n]);
        let scales = self.floats(&layer.weight_scales, &[n]);
        let axis = || vec![integer("axis", 0)];
        let weights = self.node("DequantizeLinear", &[&weights, &scales, &zero], axis());
        let bias = self.name("bias");
        self.constant(
            &bias,
            DataType::Int32,
            &[n],
            layer.bias.iter().flat_map(|b| b.to_le_bytes()).collect(),
        );
        let scales: Vec<f32> = layer
            .weight_scales
            .iter()
            .map(|scale| layer.input_scale * scale)
            .collect();
        let scales = self.floats(&scales, &[n]);
        let zero = self.name("zero");
        self.constant(&zero, DataType::Int32, &[n], vec![0; 4 * n]);
        let bias = self.node("DequantizeLinear", &[&bias, &scales, &zero], axis());
        let attributes = if kernel.is_empty() {
            vec![integer("transB", 1)]
        } else {
            vec![]
        };
        self.node(op_type, &[value, &weights, &bias], attributes)
    }
}

fn integer(name: &str, i: i64) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: 2,
        i,
        ..AttributeProto::default()
    }
}

pub(crate) fn integers(name: &str, ints: &[i64]) -> AttributeProto {
    AttributeProto {
        name: name.to_owned(),
        r#type: 7,
        ints: ints.to_vec(),
        ..AttributeProto::default()
    }
}

fn tensor(name: &str, element: DataType, shape: &[usize]) -> ValueInfoProto {
    let dim = |value| tensor_shape_proto::Dimension {
        value: Some(value),
        ..tensor_shape_proto::Dimension::default()
    };
    let batch = dim(tensor_shape_proto::dimension::Value::DimParam("N".into()));
    let fixed = shape.iter().map(|&n| {
        dim(tensor_shape_proto::dimension::Value::DimValue(
            i64::try_from(n).unwrap(),
        ))
    });
    let shape = TensorShapeProto {
        dim: std::iter::once(batch).chain(fixed).collect(),
    };
    let tensor = type_proto::Tensor {
        elem_type: element as i32,
        shape: Some(shape),
    };
    let r#type = TypeProto {
        value: Some(type_proto::Value::TensorType(tensor)),
        ..TypeProto::default()
    };
    ValueInfoProto {
        name: name.to_owned(),
        r#type: Some(r#type),
        ..ValueInfoProto::default()
    }
}
