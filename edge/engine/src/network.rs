//! A chain of layers, checked and packed for one kernel.
//!
//! In: a recognised [`Chain`] and the model's initializers, whose bytes are taken, not copied, where the layout allows.
//! Out: an immutable [`Network`] that sessions share. Refused here: weights of -128 and accumulators that could leave i32.
//!
//! Activations are `[row][column, channel]` u8 with the channels padded to a multiple of 16. The image `[channel, row,
//! column]` is turned into patches, see `patches.rs`. So the first convolution is one with a kernel of one row, and needs no code of its own.

use shared::quantize::{MAX_ACTIVATION, check_accumulators, requantize_scale};
use tract_onnx::pb::ModelProto;

use crate::chain::{Chain, Layer};
use crate::kernels::{Kernel, PackedBlock, Unpacked, WinogradLayer, is_exact, pack};
use crate::model::{LoadError, MAX_MAP_BYTES, check_size};
use crate::patches::{arrange_filter, patch_bytes};

/// Channels of an activation row are padded to a multiple of this.
const CHANNEL_STEP: usize = 16;

/// Rows and columns of a convolution's kernel.
pub(crate) const KERNEL_SIDE: usize = 3;

/// The whole network, packed for one kernel.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) kernel: Kernel,
    /// Channels, rows, columns.
    pub(crate) image: [usize; 3],
    pub(crate) convolutions: Vec<Convolution>,
    pub(crate) dense: Vec<Dense>,
}

/// A 3 x 3 convolution with bias, ReLU, 2 x 2 max pool and requantization.
#[derive(Debug)]
pub(crate) struct Convolution {
    pub(crate) name: String,
    pub(crate) weights: Weights,
    /// Bytes of a packed kernel row.
    pub(crate) kernel_row_bytes: usize,
    /// Bytes from one input pixel to the next.
    pub(crate) column_bytes: usize,
    /// Rows and columns after pooling, as far as the next layer reads them.
    pub(crate) pooled: [usize; 2],
    pub(crate) n_inputs: usize,
    pub(crate) n_channels: usize,
}

/// The weights of a convolution, in the order of the algorithm that runs it.
#[derive(Debug)]
pub(crate) enum Weights {
    /// Nine products for each output.
    Direct(Vec<PackedBlock>),
    /// Four products for each output, see `kernels/winograd.rs`.
    Winograd(WinogradLayer),
}

/// A dense layer.
#[derive(Debug)]
pub(crate) struct Dense {
    pub(crate) name: String,
    /// s8 as bytes, `[neuron, input]`.
    pub(crate) weights: Vec<u8>,
    pub(crate) n_inputs: usize,
    pub(crate) bias: Vec<i32>,
    /// Accumulator to output: to u8 for a hidden layer, to the logit for the last.
    pub(crate) scale: Vec<f32>,
}

impl Convolution {
    /// Bytes from one pooled pixel to the next.
    pub(crate) fn channel_stride(&self) -> usize {
        self.n_channels.next_multiple_of(CHANNEL_STEP)
    }

    /// Bytes of one pooled row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.pooled[1] * self.channel_stride()
    }

    /// Multiply-accumulates that the layer's definition needs, without padding.
    pub(crate) fn macs(&self) -> u64 {
        let positions = 4 * self.pooled[0] * self.pooled[1];
        (positions * self.n_channels * self.n_inputs * KERNEL_SIDE * KERNEL_SIDE) as u64
    }

    /// Bytes of packed weights, biases and scales.
    pub(crate) fn parameter_bytes(&self) -> usize {
        let bytes = |block: &PackedBlock| block.weights.len() + 8 * block.bias.len();
        match &self.weights {
            Weights::Direct(blocks) => blocks.iter().map(bytes).sum(),
            Weights::Winograd(layer) => layer.bytes(),
        }
    }
}

impl Dense {
    /// Neurons.
    pub(crate) fn n_outputs(&self) -> usize {
        self.bias.len()
    }
}

impl Network {
    /// Checks a chain and packs it for a kernel. Takes the dense weights out of `proto`.
    pub(crate) fn new(
        chain: Chain,
        proto: &mut ModelProto,
        kernel: Kernel,
    ) -> Result<Self, LoadError> {
        let [channels, rows, columns] = chain.image;
        let mut shape = [channels, rows, columns];
        let mut convolutions = Vec::new();
        for (index, layer) in chain.convolutions.into_iter().enumerate() {
            let convolution = convolution(layer, proto, kernel, shape, index == 0)?;
            shape = [
                convolution.n_channels,
                convolution.pooled[0],
                convolution.pooled[1],
            ];
            convolutions.push(convolution);
        }
        trim(&mut convolutions);
        check_maps(&convolutions)?;
        let mut n_inputs = shape.iter().product();
        let mut dense = Vec::new();
        for layer in chain.dense {
            let layer = dense_layer(layer, proto, n_inputs)?;
            n_inputs = layer.n_outputs();
            dense.push(layer);
        }
        match (convolutions.is_empty(), n_inputs) {
            (false, 1) => Ok(Self {
                kernel,
                image: chain.image,
                convolutions,
                dense,
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

/// Leaves out pooled rows and columns that the next convolution does not read, where its own pool drops a last odd one.
fn trim(convolutions: &mut [Convolution]) {
    for index in (1..convolutions.len()).rev() {
        let read = convolutions[index].pooled.map(|n| 2 * n + KERNEL_SIDE - 1);
        for (pooled, read) in convolutions[index - 1].pooled.iter_mut().zip(read) {
            *pooled = read.min(*pooled);
        }
    }
}

/// The maps must fit into memory: an image's size and a layer's number of channels stand in the file and cost nothing there.
fn check_maps(convolutions: &[Convolution]) -> Result<(), LoadError> {
    let mut total = Some(0_u64);
    for convolution in convolutions {
        let bytes = [
            convolution.pooled[0],
            convolution.pooled[1],
            convolution.channel_stride(),
        ];
        let bytes = bytes
            .iter()
            .try_fold(1, |n: u64, &size| n.checked_mul(size as u64));
        total = total.zip(bytes).and_then(|(total, n)| total.checked_add(n));
        check_size(&convolution.name, total, MAX_MAP_BYTES)?;
    }
    Ok(())
}

/// Takes the bytes of an initializer.
pub(crate) fn take(proto: &mut ModelProto, name: &str) -> Vec<u8> {
    let initializers = proto
        .graph
        .iter_mut()
        .flat_map(|graph| &mut graph.initializer);
    let mut named = initializers.filter(|tensor| tensor.name == name);
    named
        .next()
        .map(|tensor| std::mem::take(&mut tensor.raw_data))
        .unwrap_or_default()
}

/// Checks the domain of a layer's weights, `[output, input]`.
fn check(name: &str, weights: &[u8], bias: &[i32]) -> Result<(), LoadError> {
    if weights.contains(&i8::MIN.cast_unsigned()) {
        return Err(LoadError::Weight {
            layer: name.to_owned(),
        });
    }
    let mut row: Vec<i8> = Vec::new();
    for (channel, (weights, bias)) in weights
        .chunks_exact(weights.len() / bias.len())
        .zip(bias)
        .enumerate()
    {
        // Cheap and nearly always enough: no partial sum is beyond 255 x the sum of magnitudes.
        let magnitude: u64 = weights
            .chunks(1 << 16)
            .map(|weights| {
                u64::from(
                    weights
                        .iter()
                        .map(|w| u32::from(w.cast_signed().unsigned_abs()))
                        .sum::<u32>(),
                )
            })
            .sum();
        if magnitude * u64::from(MAX_ACTIVATION) + u64::from(bias.unsigned_abs())
            <= u64::from(i32::MAX.unsigned_abs())
        {
            continue;
        }
        row.clear();
        row.extend(weights.iter().map(|weight| weight.cast_signed()));
        check_accumulators(&row, std::slice::from_ref(bias)).map_err(|source| {
            LoadError::Overflow {
                layer: name.to_owned(),
                channel,
                reach: source.reach,
            }
        })?;
    }
    Ok(())
}

/// Accumulator to output. Finite: kernels do not agree on what infinity times an accumulator of 0 is.
fn scales(layer: &Layer) -> Result<Vec<f32>, LoadError> {
    let scale = |(channel, &weight): (usize, &f32)| {
        let scale = match layer.output_scale {
            Some(output) => requantize_scale(layer.input_scale, weight, output),
            None => layer.input_scale * weight,
        };
        match scale.is_finite() {
            true => Ok(scale),
            false => Err(LoadError::NotFinite {
                tensor: format!("layer {}, scale of output channel {channel}", layer.name),
            }),
        }
    };
    layer.weight_scales.iter().enumerate().map(scale).collect()
}

fn convolution(
    layer: Layer,
    proto: &mut ModelProto,
    kernel: Kernel,
    [channels, rows, columns]: [usize; 3],
    is_first: bool,
) -> Result<Convolution, LoadError> {
    let shape_error = || LoadError::Shape {
        layer: layer.name.clone(),
    };
    let weights = take(proto, &layer.weights);
    let n_channels = layer.bias.len();
    let filter = layer.n_inputs * KERNEL_SIDE * KERNEL_SIDE;
    let pooled = [rows, columns].map(|n| n.saturating_sub(KERNEL_SIDE - 1) / 2);
    if layer.n_inputs != channels || weights.len() != n_channels * filter || pooled.contains(&0) {
        return Err(shape_error());
    }
    check(&layer.name, &weights, &layer.bias)?;

    let geometry = kernel.geometry();
    let (kernel_rows, column_bytes) = if is_first {
        (1, patch_bytes(channels))
    } else {
        (KERNEL_SIDE, channels.next_multiple_of(CHANNEL_STEP))
    };
    let kernel_row_bytes = if is_first {
        filter.next_multiple_of(geometry.step)
    } else {
        KERNEL_SIDE * column_bytes
    };
    let scale = scales(&layer)?;
    let winograd = kernel
        .winograd_channels(channels)
        .filter(|_| !is_first && is_exact(&weights, n_channels));
    let weights = match winograd {
        Some(block_channels) => {
            let bias = &layer.bias;
            Weights::Winograd(WinogradLayer::new(
                block_channels,
                &weights,
                channels,
                bias,
                &scale,
            ))
        }
        None => Weights::Direct(pack(
            geometry,
            Unpacked {
                weights: &arranged(
                    &weights,
                    n_channels,
                    column_bytes,
                    kernel_row_bytes,
                    is_first,
                ),
                kernel_rows,
                kernel_row_bytes,
                bias: &layer.bias,
                scale: &scale,
            },
        )),
    };
    Ok(Convolution {
        weights,
        name: layer.name,
        kernel_row_bytes,
        column_bytes,
        pooled,
        n_inputs: channels,
        n_channels,
    })
}

/// Filters of a convolution in the order in which it reads its input: patches as in the file, else channels last.
fn arranged(
    weights: &[u8],
    n_channels: usize,
    column_bytes: usize,
    kernel_row_bytes: usize,
    is_first: bool,
) -> Vec<u8> {
    let kernel_rows = if is_first { 1 } else { KERNEL_SIDE };
    let filter = weights.len() / n_channels;
    let mut arranged = vec![0; n_channels * kernel_rows * kernel_row_bytes];
    let filters = arranged.chunks_exact_mut(kernel_rows * kernel_row_bytes);
    for (to, from) in filters.zip(weights.chunks_exact(filter)) {
        if is_first {
            arrange_filter(from, to, filter / (KERNEL_SIDE * KERNEL_SIDE));
        } else {
            channels_last(from, to, column_bytes);
        }
    }
    arranged
}

/// One filter from `[channel, row, column]` to `[row, column, channel]`, `column_bytes` a column.
fn channels_last(from: &[u8], to: &mut [u8], column_bytes: usize) {
    for (channel, taps) in from.chunks_exact(KERNEL_SIDE * KERNEL_SIDE).enumerate() {
        for (tap, &weight) in taps.iter().enumerate() {
            to[tap * column_bytes + channel] = weight;
        }
    }
}

fn dense_layer(layer: Layer, proto: &mut ModelProto, n_inputs: usize) -> Result<Dense, LoadError> {
    let n_outputs = layer.bias.len();
    let mut weights = take(proto, &layer.weights);
    if layer.n_inputs != n_inputs || n_inputs == 0 || weights.len() != n_inputs * n_outputs {
        return Err(LoadError::Shape { layer: layer.name });
    }
    if layer.is_transposed {
        weights = transposed(&weights, n_outputs);
    }
    check(&layer.name, &weights, &layer.bias)?;
    Ok(Dense {
        scale: scales(&layer)?,
        name: layer.name,
        weights,
        n_inputs,
        bias: layer.bias,
    })
}

/// Weights `[input, output]` as `[output, input]`.
pub(crate) fn transposed<T: Copy>(weights: &[T], n_outputs: usize) -> Vec<T> {
    let by_output = |output| weights.iter().skip(output).step_by(n_outputs).copied();
    (0..n_outputs).flat_map(by_output).collect()
}
