//! 3x3 valid convolution + bias + ReLU + 2x2 max pool as one operator, forward and backward.
//!
//! In: an image batch `[image, 3, row, column]` u8, scaled by 1/255 here, or a feature map in blocks of 16 channels,
//! `[image, channel / 16, row, column, channel % 16]` f32, whose missing channels are 0; weights `[out, in, 3, 3]` f32;
//! bias `[out]` f32. Out: the pooled feature map in blocks of 16 channels.
//!
//! Definition, for output channel o and window position (y, x) of the pooled map:
//! `pooled = max over the window of max(0, bias[o] + sum of weight[o, c, i, j] * input[c, 2y + .. + i, 2x + .. + j])`;
//! an odd last row or column of the convolution is dropped. The whole gradient goes to the first maximum in row-major
//! order, as in `TensorFlow` and `PyTorch` on the CPU, and none where that maximum is not above 0.
//!
//! **Forward** computes tiles of 2 rows x 6 columns x 32 channels in registers, pools them there and writes pooled
//! values and one byte a window (index of the maximum 0 to 3, or 4: closed), so the convolution's output never
//! exists in memory. **Backward** uses that at most one position of each window has a gradient: it lists the open
//! positions of one output channel and adds their 3x3 neighbourhoods, a quarter of the arithmetic of a dense
//! convolution or less. Work is split over images (and bands of rows, forward), not inside the arithmetic.
#![expect(
    unsafe_code,
    reason = "register tiles over raw pointers: 4 to 10 times the speed of the safe matrix product on this shape"
)]
#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "vector arithmetic through one trait, all of it under the condition of the enclosing function"
)]

mod backward;
mod forward;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

use self::backward::backward;
use self::forward::forward;
use super::vector::Instructions;
use super::{values, with_values};

/// Channels in one block of a feature map.
pub const BLOCK: usize = 16;
/// Channels of the image.
const IMAGE_CHANNELS: usize = 3;
/// Pooled rows that one forward task computes, and that are held of the scaled image at a time.
const BAND: usize = 8;
/// Most partial sums of the weights' gradient; images are spread over them evenly.
const MAX_PARTIAL_SUMS: usize = 16;
/// `argmax` of a window whose maximum is not above 0.
const CLOSED: u8 = 4;
/// The image's scale: what `DequantizeLinear` with scale 1/255 in f32 computes.
pub const IMAGE_SCALE: f32 = 1.0 / 255.0;

/// The operator. It holds what the backward pass needs, so make a new one for each forward pass.
#[derive(Debug)]
pub struct ConvolutionReluPool {
    needs_input_gradient: bool,
    argmax: Mutex<Vec<u8>>,
}

impl ConvolutionReluPool {
    /// For one forward pass. An image never gets a gradient; a feature map does where `needs_input_gradient`.
    #[must_use]
    pub fn new(needs_input_gradient: bool) -> Self {
        Self {
            needs_input_gradient,
            argmax: Mutex::new(Vec::new()),
        }
    }
}

/// Sizes of one application.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    n_images: usize,
    channels_in: usize,
    channels_out: usize,
    rows: usize,
    columns: usize,
    is_image: bool,
}

impl Geometry {
    fn new(input: &Shape, dtype: DType, weight: &Shape, bias: &Shape) -> Result<Self> {
        let (channels_out, channels_in, 3, 3) = weight.dims4()? else {
            bail!("weights {weight:?} are not [out, in, 3, 3]")
        };
        if bias.dims() != [channels_out] {
            bail!("bias {bias:?} does not fit weights {weight:?}")
        }
        let (n_images, rows, columns, is_image) = match (input.dims(), dtype) {
            (&[n, c, rows, columns], DType::U8) if c == channels_in && c == IMAGE_CHANNELS => {
                (n, rows, columns, true)
            }
            (&[n, blocks, rows, columns, BLOCK], DType::F32)
                if blocks == channels_in.div_ceil(BLOCK) =>
            {
                (n, rows, columns, false)
            }
            _ => bail!("input {input:?} {dtype:?} does not fit weights {weight:?}"),
        };
        if rows < 4 || columns < 4 || rows * columns > 1 << 24 {
            bail!("input of {rows} x {columns} is not between 4 x 4 and 2^24 values")
        }
        Ok(Self {
            n_images,
            channels_in,
            channels_out,
            rows,
            columns,
            is_image,
        })
    }
    fn pooled_rows(&self) -> usize {
        (self.rows - 2) / 2
    }
    fn pooled_columns(&self) -> usize {
        (self.columns - 2) / 2
    }
    fn blocks_in(&self) -> usize {
        if self.is_image {
            1
        } else {
            self.channels_in.div_ceil(BLOCK)
        }
    }
    fn blocks_out(&self) -> usize {
        self.channels_out.div_ceil(BLOCK)
    }
    /// Values from one column to the next.
    fn column_stride(&self) -> usize {
        if self.is_image { IMAGE_CHANNELS } else { BLOCK }
    }
    fn row_stride(&self) -> usize {
        self.columns * self.column_stride()
    }
    /// Values from one block of channels to the next, of a whole feature map.
    fn block_stride(&self) -> usize {
        self.rows * self.row_stride()
    }
    /// Values of one image's whole input feature map.
    fn input_values(&self) -> usize {
        if self.is_image {
            IMAGE_CHANNELS * self.rows * self.columns
        } else {
            self.blocks_in() * self.block_stride()
        }
    }
    /// Values of one image's pooled feature map.
    fn pooled_values(&self) -> usize {
        self.blocks_out() * BLOCK * self.pooled_rows() * self.pooled_columns()
    }
    /// Vectors of 16 values that cover one 3x3 neighbourhood of a block: a whole row of three RGB pixels (9 values and
    /// 7 of the next ones, which meet zero weights), or one pixel of 16 channels.
    fn taps(&self) -> usize {
        if self.is_image { 3 } else { 9 }
    }
    /// Values of one output channel in the tap layout `[block, tap, 16]`.
    fn tap_values(&self) -> usize {
        self.blocks_in() * self.taps() * BLOCK
    }
    /// Where weight `(channel, i, j)` of an output channel stands in the tap layout.
    fn tap_index(&self, channel: usize, i: usize, j: usize) -> usize {
        if self.is_image {
            i * BLOCK + j * IMAGE_CHANNELS + channel
        } else {
            ((channel / BLOCK) * 9 + i * 3 + j) * BLOCK + channel % BLOCK
        }
    }
    fn partial_sums(&self) -> usize {
        self.n_images.min(MAX_PARTIAL_SUMS)
    }
}

/// Input rows of one image, as the kernels read them: at least 16 readable values after the last.
struct Band {
    scaled: Vec<f32>,
}

impl Band {
    /// The scaled rows `2 * first ..` of an image that `pooled` needs, as `[row, column, channel]`.
    fn of_image(geometry: &Geometry, image: &[u8], pooled: &Range<usize>) -> Self {
        let plane = geometry.rows * geometry.columns;
        let (begin, end) = (
            2 * pooled.start * geometry.columns,
            (2 * pooled.end + 2) * geometry.columns,
        );
        let mut scaled = vec![0f32; (end - begin) * IMAGE_CHANNELS + BLOCK];
        let (red, green, blue) = (
            &image[begin..end],
            &image[plane + begin..plane + end],
            &image[2 * plane + begin..2 * plane + end],
        );
        for (pixel, ((r, g), b)) in scaled
            .chunks_exact_mut(IMAGE_CHANNELS)
            .zip(red.iter().zip(green).zip(blue))
        {
            pixel[0] = f32::from(*r) * IMAGE_SCALE;
            pixel[1] = f32::from(*g) * IMAGE_SCALE;
            pixel[2] = f32::from(*b) * IMAGE_SCALE;
        }
        Self { scaled }
    }
}

/// One image's input.
#[derive(Clone, Copy)]
enum Input<'a> {
    Image(&'a [u8]),
    Map(&'a [f32]),
}

#[derive(Clone, Copy)]
enum Batch<'a> {
    Images(&'a [u8]),
    Maps(&'a [f32]),
}

impl<'a> Batch<'a> {
    fn of(geometry: &Geometry, storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        Ok(if geometry.is_image {
            Self::Images(values(storage, layout)?)
        } else {
            Self::Maps(values(storage, layout)?)
        })
    }
    fn image(&self, geometry: &Geometry, index: usize) -> Input<'a> {
        let range = index * geometry.input_values()..(index + 1) * geometry.input_values();
        match self {
            Self::Images(all) => Input::Image(&all[range]),
            Self::Maps(all) => Input::Map(&all[range]),
        }
    }
}

/// A pointer that several tasks write through, each to places of its own.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: every user states why its places are disjoint.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    fn at(self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

impl CustomOp3 for ConvolutionReluPool {
    fn name(&self) -> &'static str {
        "convolution-relu-pool"
    }

    fn cpu_fwd(
        &self,
        input: &CpuStorage,
        input_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let geometry = Geometry::new(
            input_layout.shape(),
            input.dtype(),
            weight_layout.shape(),
            bias_layout.shape(),
        )?;
        let batch = Batch::of(&geometry, input, input_layout)?;
        let (pooled, argmax) = forward(
            Instructions::detect(),
            &geometry,
            batch,
            values(weight, weight_layout)?,
            values(bias, bias_layout)?,
        );
        *self.argmax.lock().unwrap_or_else(PoisonError::into_inner) = argmax;
        let shape = [
            geometry.n_images,
            geometry.blocks_out(),
            geometry.pooled_rows(),
            geometry.pooled_columns(),
            BLOCK,
        ];
        Ok((CpuStorage::F32(pooled), Shape::from(shape.to_vec())))
    }

    fn bwd(
        &self,
        input: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _pooled: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let geometry = Geometry::new(input.shape(), input.dtype(), weight.shape(), bias.shape())?;
        let gradient = gradient.contiguous()?;
        let argmax = self.argmax.lock().unwrap_or_else(PoisonError::into_inner);
        let (storage, layout) = input.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else {
            bail!("the operator runs on the CPU only")
        };
        let batch = Batch::of(&geometry, storage, layout)?;
        let gradients = with_values(weight, |weight| {
            with_values(&gradient, |gradient| {
                if gradient.len() != argmax.len() {
                    bail!("the operator was used for two forward passes")
                }
                Ok(backward(
                    Instructions::detect(),
                    &geometry,
                    batch,
                    weight,
                    &argmax,
                    gradient,
                    self.needs_input_gradient,
                ))
            })
        })???;
        let on = input.device();
        Ok((
            gradients
                .input
                .map(|values| Tensor::from_vec(values, input.shape(), on))
                .transpose()?,
            Some(Tensor::from_vec(gradients.weight, weight.shape(), on)?),
            Some(Tensor::from_vec(gradients.bias, bias.shape(), on)?),
        ))
    }
}

#[cfg(test)]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "the tests' small numbers"
)]
mod tests;
