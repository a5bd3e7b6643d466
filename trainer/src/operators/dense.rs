//! Dense layers, and the step from a feature map in blocks to their flat input.
//!
//! [`Flatten`]: `[image, channel / 16, row, column, channel % 16]` to `[image, channel * row * column]`, in channel, row,
//! column order. [`Dense`]: `[image, in] x [out, in] + [out]`, with ReLU where asked for (gradient 0 at 0). The inputs of
//! a dense layer are cut into chunks of a fixed length whose partial sums are added in order.
#![expect(
    unsafe_code,
    reason = "matrix products through raw pointers, each with asserted sizes"
)]

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::convolution::BLOCK;
use super::{values, with_values};

/// Inputs of a dense layer that are multiplied at a time.
const CHUNK: usize = 1024;

/// The operator that brings a blocked feature map of that many channels into channel, row, column order.
#[derive(Debug, Clone, Copy)]
pub struct Flatten {
    /// Channels, without those that only fill the last block.
    pub n_channels: usize,
}

impl Flatten {
    fn sizes(&self, shape: &Shape) -> Result<(usize, usize, usize)> {
        match *shape.dims() {
            [n_images, blocks, rows, columns, BLOCK]
                if blocks == self.n_channels.div_ceil(BLOCK) =>
            {
                Ok((n_images, blocks, rows * columns))
            }
            _ => bail!(
                "{shape:?} is not a feature map of {} channels in blocks",
                self.n_channels
            ),
        }
    }
}

impl CustomOp1 for Flatten {
    fn name(&self) -> &'static str {
        "flatten-blocks"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n_images, blocks, area) = self.sizes(layout.shape())?;
        let map = values::<f32>(storage, layout)?;
        let mut flat = vec![0f32; n_images * self.n_channels * area];
        flat.par_chunks_mut(self.n_channels * area)
            .zip(map.par_chunks(blocks * area * BLOCK))
            .for_each(|(flat, map)| {
                for (channel, plane) in flat.chunks_exact_mut(area).enumerate() {
                    let block = &map[channel / BLOCK * area * BLOCK..][..area * BLOCK];
                    for (value, pixel) in plane.iter_mut().zip(block.chunks_exact(BLOCK)) {
                        *value = pixel[channel % BLOCK];
                    }
                }
            });
        Ok((
            CpuStorage::F32(flat),
            Shape::from((n_images, self.n_channels * area)),
        ))
    }

    fn bwd(&self, map: &Tensor, _flat: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (n_images, blocks, area) = self.sizes(map.shape())?;
        let gradient = gradient.contiguous()?;
        let blocked = with_values::<f32, _>(&gradient, |gradient| {
            let mut blocked = vec![0f32; n_images * blocks * area * BLOCK];
            blocked
                .par_chunks_mut(blocks * area * BLOCK)
                .zip(gradient.par_chunks(self.n_channels * area))
                .for_each(|(blocked, gradient)| {
                    for (channel, plane) in gradient.chunks_exact(area).enumerate() {
                        let block = &mut blocked[channel / BLOCK * area * BLOCK..][..area * BLOCK];
                        for (value, pixel) in plane.iter().zip(block.chunks_exact_mut(BLOCK)) {
                            pixel[channel % BLOCK] = *value;
                        }
                    }
                });
            blocked
        })?;
        Ok(Some(Tensor::from_vec(blocked, map.shape(), map.device())?))
    }
}

/// The operator of a dense layer.
#[derive(Debug, Clone, Copy)]
pub struct Dense {
    /// Whether negative outputs become 0.
    pub has_relu: bool,
}

/// A matrix in memory: distance from one row, and from one column, to the next.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    pub(super) row: usize,
    pub(super) column: usize,
}

impl Strides {
    fn fits(self, rows: usize, columns: usize, len: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row + (columns - 1) * self.column < len
    }
    #[expect(
        clippy::cast_possible_wrap,
        reason = "strides of tensors in memory are below isize::MAX"
    )]
    fn signed(self) -> (isize, isize) {
        (self.row as isize, self.column as isize)
    }
}

/// `product[m, n] = left[m, k] x right[k, n]`, on the calling thread.
fn multiply(
    sizes: (usize, usize, usize),
    product: &mut [f32],
    p: Strides,
    left: &[f32],
    l: Strides,
    right: &[f32],
    r: Strides,
) {
    matrix_product(sizes, product, p, (left, l), (right, r), false);
}

/// `product[m, n] = left[m, k] x right[k, n]`, to which the old `product` is added where `adds`; on the calling thread.
#[expect(
    clippy::many_single_char_names,
    reason = "m, n, k are the matrix product's own names"
)]
pub(super) fn matrix_product(
    (m, n, k): (usize, usize, usize),
    product: &mut [f32],
    p: Strides,
    (left, l): (&[f32], Strides),
    (right, r): (&[f32], Strides),
    adds: bool,
) {
    assert!(
        p.fits(m, n, product.len()) && l.fits(m, k, left.len()) && r.fits(k, n, right.len()),
        "matrices in bounds"
    );
    let ((p_row, p_column), (l_row, l_column), (r_row, r_column)) =
        (p.signed(), l.signed(), r.signed());
    // SAFETY: the largest index of each matrix lies in its slice by the assertion.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            product.as_mut_ptr(),
            p_column,
            p_row,
            adds,
            left.as_ptr(),
            l_column,
            l_row,
            right.as_ptr(),
            r_column,
            r_row,
            if adds { 1f32 } else { 0f32 },
            1f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

fn dense_forward(
    input: &[f32],
    weight: &[f32],
    bias: &[f32],
    n_in: usize,
    has_relu: bool,
) -> Vec<f32> {
    let n_out = bias.len();
    let n_images = input.len() / n_in;
    let partial: Vec<Vec<f32>> = (0..n_in.div_ceil(CHUNK))
        .into_par_iter()
        .map(|chunk| {
            let (begin, end) = (chunk * CHUNK, ((chunk + 1) * CHUNK).min(n_in));
            let mut sums = vec![0f32; n_images * n_out];
            multiply(
                (n_images, n_out, end - begin),
                &mut sums,
                Strides {
                    row: n_out,
                    column: 1,
                },
                &input[begin..],
                Strides {
                    row: n_in,
                    column: 1,
                },
                &weight[begin..],
                Strides {
                    row: 1,
                    column: n_in,
                },
            );
            sums
        })
        .collect();
    let mut output: Vec<f32> = bias
        .iter()
        .copied()
        .cycle()
        .take(n_images * n_out)
        .collect();
    for partial in &partial {
        for (output, partial) in output.iter_mut().zip(partial) {
            *output += partial;
        }
    }
    if has_relu {
        for value in &mut output {
            if *value <= 0.0 {
                *value = 0.0;
            }
        }
    }
    output
}

/// Gradients of input, weight and bias; `gradient` is already 0 where ReLU is closed.
fn dense_backward(
    input: &[f32],
    weight: &[f32],
    gradient: &[f32],
    n_in: usize,
    n_out: usize,
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let n_images = input.len() / n_in;
    let columns = |chunk: usize| (chunk * CHUNK, ((chunk + 1) * CHUNK).min(n_in));
    // [chunk][image, column of the chunk]: whole columns are independent of each other.
    let chunks: Vec<Vec<f32>> = (0..n_in.div_ceil(CHUNK))
        .into_par_iter()
        .map(|chunk| {
            let (begin, end) = columns(chunk);
            let mut part = vec![0f32; n_images * (end - begin)];
            multiply(
                (n_images, end - begin, n_out),
                &mut part,
                Strides {
                    row: end - begin,
                    column: 1,
                },
                gradient,
                Strides {
                    row: n_out,
                    column: 1,
                },
                &weight[begin..],
                Strides {
                    row: n_in,
                    column: 1,
                },
            );
            part
        })
        .collect();
    let mut input_gradient = vec![0f32; n_images * n_in];
    for (chunk, part) in chunks.iter().enumerate() {
        let (begin, end) = columns(chunk);
        for (row, part) in input_gradient
            .chunks_exact_mut(n_in)
            .zip(part.chunks_exact(end - begin))
        {
            row[begin..end].copy_from_slice(part);
        }
    }
    let mut weight_gradient = vec![0f32; n_out * n_in];
    weight_gradient
        .par_chunks_mut(n_in * OUT_AT_A_TIME)
        .enumerate()
        .for_each(|(group, part)| {
            multiply(
                (part.len() / n_in, n_in, n_images),
                part,
                Strides {
                    row: n_in,
                    column: 1,
                },
                &gradient[group * OUT_AT_A_TIME..],
                Strides {
                    row: 1,
                    column: n_out,
                },
                input,
                Strides {
                    row: n_in,
                    column: 1,
                },
            );
        });
    let mut bias_gradient = vec![0f32; n_out];
    for row in gradient.chunks_exact(n_out) {
        for (sum, value) in bias_gradient.iter_mut().zip(row) {
            *sum += value;
        }
    }
    (input_gradient, weight_gradient, bias_gradient)
}

/// Output units whose weight gradient one task computes.
const OUT_AT_A_TIME: usize = 8;

fn sizes(input: &Shape, weight: &Shape, bias: &Shape) -> Result<(usize, usize, usize)> {
    let (n_images, n_in) = input.dims2()?;
    let n_out = bias.dims1()?;
    if weight.dims() != [n_out, n_in] || n_in == 0 {
        bail!("weights {weight:?} do not fit input {input:?} and bias {bias:?}")
    }
    Ok((n_images, n_in, n_out))
}

impl CustomOp3 for Dense {
    fn name(&self) -> &'static str {
        "dense"
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
        let (n_images, n_in, n_out) = sizes(
            input_layout.shape(),
            weight_layout.shape(),
            bias_layout.shape(),
        )?;
        let output = dense_forward(
            values(input, input_layout)?,
            values(weight, weight_layout)?,
            values(bias, bias_layout)?,
            n_in,
            self.has_relu,
        );
        Ok((CpuStorage::F32(output), Shape::from((n_images, n_out))))
    }

    fn bwd(
        &self,
        input: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        output: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (_, n_in, n_out) = sizes(input.shape(), weight.shape(), bias.shape())?;
        let mut gradient = gradient.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        if self.has_relu {
            with_values::<f32, _>(output, |output| {
                for (gradient, output) in gradient.iter_mut().zip(output) {
                    if *output <= 0.0 {
                        *gradient = 0.0;
                    }
                }
            })?;
        }
        let input_values = input.contiguous()?;
        let (input_gradient, weight_gradient, bias_gradient) =
            with_values::<f32, _>(&input_values, |input| {
                with_values::<f32, _>(weight, |weight| {
                    dense_backward(input, weight, &gradient, n_in, n_out)
                })
            })??;
        let on = input.device();
        Ok((
            Some(Tensor::from_vec(input_gradient, input.shape(), on)?),
            Some(Tensor::from_vec(weight_gradient, weight.shape(), on)?),
            Some(Tensor::from_vec(bias_gradient, bias.shape(), on)?),
        ))
    }
}
