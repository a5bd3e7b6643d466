//! A chain of float layers, packed for one kernel.
//!
//! In: a recognised chain and the model's initializers, whose bytes are taken. Out: an immutable [`FloatNetwork`] that sessions share. The
//! image's scale is multiplied into the first layer's weights, so that the u8 pixels are read as they are.

use tract_onnx::pb::ModelProto;

use crate::chain::{Chain, Layer};
use crate::float::chain::{FloatChain, FloatLayer};
use crate::kernels::float::{self, Filters, FloatKernel, OUTPUTS};
use crate::model::{LoadError, MAX_MAP_BYTES, check_size};
use crate::network::{KERNEL_SIDE, take, transposed};

/// The whole network, packed for one kernel.
#[derive(Debug)]
pub(crate) struct FloatNetwork {
    pub(crate) kernel: FloatKernel,
    /// Channels, rows, columns.
    pub(crate) image: [usize; 3],
    pub(crate) convolutions: Vec<Convolution>,
    pub(crate) dense: Vec<Dense>,
}

/// A 3 x 3 convolution with bias, ReLU and 2 x 2 max pool.
#[derive(Debug)]
pub(crate) struct Convolution {
    pub(crate) name: String,
    pub(crate) layer: float::FloatLayer,
    /// Rows and columns after pooling, as far as the next layer reads them.
    pub(crate) pooled: [usize; 2],
    /// Rows and columns that the next layer's tiles reach; those beyond `pooled` are zero.
    pub(crate) reached: [usize; 2],
    n_inputs: usize,
}

/// A dense layer.
#[derive(Debug)]
pub(crate) struct Dense {
    pub(crate) name: String,
    /// `[neuron, input]`.
    pub(crate) weights: Vec<f32>,
    pub(crate) n_inputs: usize,
    pub(crate) bias: Vec<f32>,
}

/// A layer with its weights, `[output, input, ...]`.
struct Parameters {
    name: String,
    weights: Vec<f32>,
    n_inputs: usize,
    bias: Vec<f32>,
}

impl Convolution {
    /// Floats of one pooled row, zeros beyond included.
    pub(crate) fn row_length(&self) -> usize {
        self.reached[1] * self.layer.out_stride()
    }

    /// Floats of one pooled row that are computed.
    pub(crate) fn row_used(&self) -> usize {
        self.pooled[1] * self.layer.out_stride()
    }

    /// Multiply-accumulates that the layer's definition needs.
    pub(crate) fn macs(&self) -> u64 {
        let positions = 4 * self.pooled[0] * self.pooled[1];
        let taps = self.n_inputs * KERNEL_SIDE * KERNEL_SIDE;
        (positions * self.layer.n_outputs() * taps) as u64
    }
}

impl FloatNetwork {
    /// Packs a float chain. Takes the weights out of `proto`.
    pub(crate) fn new(
        chain: FloatChain,
        proto: &mut ModelProto,
        kernel: FloatKernel,
    ) -> Result<Self, LoadError> {
        let mut parameters = |layer: FloatLayer| {
            let bytes = take(proto, &layer.weights);
            let weights = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
            let weights: Vec<f32> = weights.collect();
            Parameters {
                weights: match layer.is_transposed {
                    true => transposed(&weights, layer.bias.len()),
                    false => weights,
                },
                name: layer.name,
                n_inputs: layer.n_inputs,
                bias: layer.bias,
            }
        };
        let convolutions = chain.convolutions.into_iter().map(&mut parameters);
        let convolutions = convolutions.collect();
        let dense = chain.dense.into_iter().map(&mut parameters).collect();
        Self::pack(chain.image, chain.image_scale, convolutions, dense, kernel)
    }

    /// Packs a quantized chain, its weights and biases in real numbers; activations are not quantized.
    pub(crate) fn of_quantized(
        chain: Chain,
        proto: &mut ModelProto,
        kernel: FloatKernel,
    ) -> Result<Self, LoadError> {
        let image_scale = chain
            .convolutions
            .first()
            .map_or(1.0, |layer| layer.input_scale);
        let mut parameters = |layer: Layer| dequantized(layer, proto);
        let convolutions = chain.convolutions.into_iter().map(&mut parameters);
        let convolutions = convolutions.collect::<Result<_, _>>()?;
        let dense = chain.dense.into_iter().map(&mut parameters);
        let dense = dense.collect::<Result<_, _>>()?;
        Self::pack(chain.image, image_scale, convolutions, dense, kernel)
    }

    fn pack(
        image: [usize; 3],
        image_scale: f32,
        convolutions: Vec<Parameters>,
        dense: Vec<Parameters>,
        kernel: FloatKernel,
    ) -> Result<Self, LoadError> {
        let mut shape = image;
        let mut packed = Vec::new();
        for (index, mut parameters) in convolutions.into_iter().enumerate() {
            if index == 0 {
                parameters
                    .weights
                    .iter_mut()
                    .for_each(|weight| *weight *= image_scale);
                check_finite(&parameters)?;
            }
            let convolution = convolution(parameters, kernel, shape, index == 0)?;
            let [rows, columns] = convolution.pooled;
            shape = [convolution.layer.n_outputs(), rows, columns];
            packed.push(convolution);
        }
        trim(&mut packed);
        check_maps(&packed)?;
        let mut n_inputs = shape.iter().product();
        let mut layers = Vec::new();
        for Parameters {
            name,
            weights,
            n_inputs: expected,
            bias,
        } in dense
        {
            if expected != n_inputs || n_inputs == 0 || weights.len() != n_inputs * bias.len() {
                return Err(LoadError::Shape { layer: name });
            }
            layers.push(Dense {
                name,
                weights,
                n_inputs,
                bias,
            });
            n_inputs = layers.last().map_or(0, |layer| layer.bias.len());
        }
        match (packed.is_empty(), n_inputs) {
            (false, 1) => Ok(Self {
                kernel,
                image,
                convolutions: packed,
                dense: layers,
            }),
            _ => Err(LoadError::Shape {
                layer: "the whole chain".into(),
            }),
        }
    }

    /// Bytes of one image.
    pub(crate) fn image_bytes(&self) -> usize {
        self.image.iter().product()
    }
}

fn convolution(
    parameters: Parameters,
    kernel: FloatKernel,
    [channels, rows, columns]: [usize; 3],
    is_first: bool,
) -> Result<Convolution, LoadError> {
    let Parameters {
        name,
        weights,
        n_inputs,
        bias,
    } = parameters;
    let pooled = [rows, columns].map(|n| n.saturating_sub(KERNEL_SIDE - 1) / 2);
    let expected = bias.len() * n_inputs * KERNEL_SIDE * KERNEL_SIDE;
    if n_inputs != channels || weights.len() != expected || pooled.contains(&0) {
        return Err(LoadError::Shape { layer: name });
    }
    let filters = Filters {
        weights,
        n_inputs,
        bias,
    };
    Ok(Convolution {
        name,
        layer: float::FloatLayer::new(kernel, filters, is_first),
        pooled,
        reached: pooled,
        n_inputs,
    })
}

/// The maps must fit into memory.
fn check_maps(convolutions: &[Convolution]) -> Result<(), LoadError> {
    let mut total = Some(0_u64);
    for convolution in convolutions {
        let stride = convolution.layer.out_stride();
        let bytes = [
            convolution.reached[0],
            convolution.reached[1],
            stride,
            size_of::<f32>(),
        ];
        let bytes = bytes
            .iter()
            .try_fold(1, |n: u64, &size| n.checked_mul(size as u64));
        total = total.zip(bytes).and_then(|(total, n)| total.checked_add(n));
        check_size(&convolution.name, total, MAX_MAP_BYTES)?;
    }
    Ok(())
}

/// Leaves out pooled rows and columns that the next convolution does not read, and adds those that its tiles reach.
fn trim(convolutions: &mut [Convolution]) {
    for index in (1..convolutions.len()).rev() {
        let next = convolutions[index].pooled;
        let previous = &mut convolutions[index - 1];
        for (axis, &n) in next.iter().enumerate() {
            previous.pooled[axis] = previous.pooled[axis].min(2 * n + KERNEL_SIDE - 1);
            previous.reached[axis] = OUTPUTS * n.div_ceil(2) + KERNEL_SIDE - 1;
        }
    }
}

/// A quantized layer in real numbers.
#[expect(
    clippy::cast_precision_loss,
    reason = "a bias beyond 2^24 is rounded as any f32 is"
)]
fn dequantized(layer: Layer, proto: &mut ModelProto) -> Result<Parameters, LoadError> {
    let bytes = take(proto, &layer.weights);
    let n_outputs = layer.bias.len();
    let bytes = match layer.is_transposed {
        true => transposed(&bytes, n_outputs),
        false => bytes,
    };
    let of_output = (bytes.len() / n_outputs.max(1)).max(1);
    let rows = bytes.chunks(of_output).zip(&layer.weight_scales);
    let weights =
        rows.flat_map(|(row, &scale)| row.iter().map(move |w| f32::from(w.cast_signed()) * scale));
    let bias = layer.bias.iter().zip(&layer.weight_scales);
    let parameters = Parameters {
        weights: weights.collect(),
        bias: bias
            .map(|(&bias, &scale)| bias as f32 * (layer.input_scale * scale))
            .collect(),
        name: layer.name,
        n_inputs: layer.n_inputs,
    };
    check_finite(&parameters)?;
    Ok(parameters)
}

/// What was finite in the file may not be once it is scaled.
fn check_finite(parameters: &Parameters) -> Result<(), LoadError> {
    let mut values = parameters.weights.iter().chain(&parameters.bias);
    match values.all(|value| value.is_finite()) {
        true => Ok(()),
        false => Err(LoadError::NotFinite {
            tensor: format!("layer {}, weights and biases in f32", parameters.name),
        }),
    }
}
