//! Convolutions, pools and sums of any window, forward and backward: what the transfer learners are made of.
//!
//! In: feature maps `[image, channel, row, column]` f32; kernels `[out, in, rows, columns]`; bias `[out]`. Definitions are ONNX's
//! Conv, MaxPool, AveragePool (padding counted) and Add. The gradient of a ReLU is 0 at 0; that of a maximum goes whole to the first largest
//! value in row-major order; both as `PyTorch` on the CPU. Images are computed in parallel, each by one matrix product over its
//! unfolded windows, so that an image's values do not depend on the rest of its batch.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail,
};
use rayon::prelude::*;

use super::dense::{Strides, matrix_product};
use super::{values, with_values};
use crate::backbone::Window;

/// Most partial sums of a kernel's gradient; images are spread over them evenly.
const MAX_PARTIAL_SUMS: usize = 8;

/// Sizes of a feature map, and of what a window makes of it.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    n_images: usize,
    channels: usize,
    sides: [usize; 2],
    output: [usize; 2],
    window: Window,
}

impl Geometry {
    fn new(shape: &Shape, window: Window) -> Result<Self> {
        let (n_images, channels, rows, columns) = shape.dims4()?;
        let Some(output) = window.output([rows, columns]) else {
            bail!("{window:?} does not fit {shape:?}")
        };
        Ok(Self {
            n_images,
            channels,
            sides: [rows, columns],
            output,
            window,
        })
    }
    fn area(&self) -> usize {
        self.sides[0] * self.sides[1]
    }
    fn area_out(&self) -> usize {
        self.output[0] * self.output[1]
    }
    /// Values of one image.
    fn image(&self) -> usize {
        self.channels * self.area()
    }
    fn taps(&self) -> usize {
        self.window.kernel[0] * self.window.kernel[1]
    }
    /// Whether the unfolded windows are the image itself.
    fn is_pointwise(&self) -> bool {
        self.window.kernel == [1, 1] && self.window.stride == 1 && self.window.padding == [0, 0]
    }
    /// Output positions along an axis whose input position under `tap` lies inside, and the first one's input position.
    fn reach(&self, axis: usize, tap: usize) -> (std::ops::Range<usize>, usize) {
        let (stride, padding) = (self.window.stride, self.window.padding[axis]);
        let first = padding.saturating_sub(tap).div_ceil(stride);
        let end = (self.sides[axis] + padding)
            .checked_sub(tap + 1)
            .map_or(0, |last| last / stride + 1)
            .min(self.output[axis]);
        (
            first..end.max(first),
            (first * stride + tap).saturating_sub(padding),
        )
    }
    /// Calls `f(place in the unfolded windows, place in the image, how many)` for each run of one tap in one output row; neighbours in
    /// the image are the stride apart.
    fn runs(&self, mut f: impl FnMut(usize, usize, usize)) {
        let [kernel_rows, kernel_columns] = self.window.kernel;
        for channel in 0..self.channels {
            for i in 0..kernel_rows {
                let (rows, first_row) = self.reach(0, i);
                for j in 0..kernel_columns {
                    let (columns, first_column) = self.reach(1, j);
                    let line = (channel * self.taps() + i * kernel_columns + j) * self.area_out();
                    for (index, row) in rows.clone().enumerate() {
                        let source = first_row + index * self.window.stride;
                        f(
                            line + row * self.output[1] + columns.start,
                            channel * self.area() + source * self.sides[1] + first_column,
                            columns.len(),
                        );
                    }
                }
            }
        }
    }
    /// `[channel x tap, output position]` of one image.
    fn unfold(&self, image: &[f32]) -> Vec<f32> {
        let mut unfolded = vec![0f32; self.channels * self.taps() * self.area_out()];
        let stride = self.window.stride;
        self.runs(|to, from, n| {
            let to = &mut unfolded[to..to + n];
            if stride == 1 {
                to.copy_from_slice(&image[from..from + n]);
            } else {
                for (value, source) in to.iter_mut().zip(image[from..].iter().step_by(stride)) {
                    *value = *source;
                }
            }
        });
        unfolded
    }
    /// Adds the unfolded windows back to the places they came from.
    fn fold(&self, unfolded: &[f32], image: &mut [f32]) {
        let stride = self.window.stride;
        self.runs(|from, to, n| {
            let targets = image[to..].iter_mut().step_by(stride);
            for (target, value) in targets.zip(&unfolded[from..from + n]) {
                *target += value;
            }
        });
    }
}

/// Convolution + bias, with ReLU where asked for.
#[derive(Debug, Clone, Copy)]
pub struct Convolution {
    /// The window.
    pub window: Window,
    /// Whether negative outputs become 0.
    pub has_relu: bool,
    /// Whether the input gets a gradient.
    pub needs_input_gradient: bool,
}

const fn rows_of(columns: usize) -> Strides {
    Strides {
        row: columns,
        column: 1,
    }
}

const fn transposed(columns: usize) -> Strides {
    Strides {
        row: 1,
        column: columns,
    }
}

impl Convolution {
    fn geometry(&self, input: &Shape, weight: &Shape, bias: &Shape) -> Result<(Geometry, usize)> {
        let geometry = Geometry::new(input, self.window)?;
        let (n_out, n_in, rows, columns) = weight.dims4()?;
        if n_in != geometry.channels
            || [rows, columns] != self.window.kernel
            || bias.dims() != [n_out]
        {
            bail!("kernel {weight:?} and bias {bias:?} do not fit input {input:?} and {self:?}")
        }
        Ok((geometry, n_out))
    }

    /// Gradients of input, weight and bias.
    fn gradients(
        &self,
        (geometry, n_out): (&Geometry, usize),
        input: &[f32],
        weight: &[f32],
        output: &[f32],
        gradient: &[f32],
    ) -> (Option<Vec<f32>>, Vec<f32>, Vec<f32>) {
        let (area, depth) = (geometry.area_out(), geometry.channels * geometry.taps());
        let n_values = n_out * area;
        let a_part = geometry.n_images.div_ceil(MAX_PARTIAL_SUMS).max(1);
        let mut of_input = if self.needs_input_gradient {
            vec![0f32; input.len()]
        } else {
            Vec::new()
        };
        let one_part = |(part, of_input): (usize, &mut [f32])| {
            let (mut of_weight, mut of_bias) = (vec![0f32; weight.len()], vec![0f32; n_out]);
            for (index, image) in (part * a_part..geometry.n_images).take(a_part).enumerate() {
                let opened = self.opened(
                    &gradient[image * n_values..][..n_values],
                    &output[image * n_values..][..n_values],
                );
                for (sum, plane) in of_bias.iter_mut().zip(opened.chunks_exact(area)) {
                    *sum += plane.iter().sum::<f32>();
                }
                let image = &input[image * geometry.image()..][..geometry.image()];
                let unfolded = (!geometry.is_pointwise()).then(|| geometry.unfold(image));
                matrix_product(
                    (n_out, depth, area),
                    &mut of_weight,
                    rows_of(depth),
                    (&opened, rows_of(area)),
                    (unfolded.as_deref().unwrap_or(image), transposed(area)),
                    true,
                );
                if self.needs_input_gradient {
                    let mut columns = unfolded.unwrap_or_else(|| vec![0f32; depth * area]);
                    matrix_product(
                        (depth, area, n_out),
                        &mut columns,
                        rows_of(area),
                        (weight, transposed(depth)),
                        (&opened, rows_of(area)),
                        false,
                    );
                    let target = &mut of_input[index * geometry.image()..][..geometry.image()];
                    if geometry.is_pointwise() {
                        target.copy_from_slice(&columns);
                    } else {
                        geometry.fold(&columns, target);
                    }
                }
            }
            (of_weight, of_bias)
        };
        let n_parts = geometry.n_images.div_ceil(a_part);
        let parts: Vec<(Vec<f32>, Vec<f32>)> = if self.needs_input_gradient {
            let pieces = of_input
                .par_chunks_mut(a_part * geometry.image())
                .enumerate();
            pieces.map(one_part).collect()
        } else {
            let pieces = (0..n_parts).into_par_iter();
            pieces.map(|part| one_part((part, &mut []))).collect()
        };
        let (mut of_weight, mut of_bias) = (vec![0f32; weight.len()], vec![0f32; n_out]);
        for (weight, bias) in &parts {
            of_weight
                .iter_mut()
                .zip(weight)
                .for_each(|(sum, value)| *sum += value);
            of_bias
                .iter_mut()
                .zip(bias)
                .for_each(|(sum, value)| *sum += value);
        }
        (
            self.needs_input_gradient.then_some(of_input),
            of_weight,
            of_bias,
        )
    }

    /// The gradient before the ReLU.
    fn opened(&self, gradient: &[f32], output: &[f32]) -> Vec<f32> {
        if !self.has_relu {
            return gradient.to_vec();
        }
        let pairs = gradient.iter().zip(output);
        pairs
            .map(|(&gradient, &output)| if output > 0.0 { gradient } else { 0.0 })
            .collect()
    }
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        "convolution"
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
        let (geometry, n_out) = self.geometry(
            input_layout.shape(),
            weight_layout.shape(),
            bias_layout.shape(),
        )?;
        let input = values::<f32>(input, input_layout)?;
        let weight = values::<f32>(weight, weight_layout)?;
        let bias = values::<f32>(bias, bias_layout)?;
        let (area, depth) = (geometry.area_out(), geometry.channels * geometry.taps());
        let mut output = vec![0f32; geometry.n_images * n_out * area];
        output
            .par_chunks_mut(n_out * area)
            .zip(input.par_chunks(geometry.image()))
            .for_each(|(output, image)| {
                for (plane, bias) in output.chunks_exact_mut(area).zip(bias) {
                    plane.fill(*bias);
                }
                let unfolded = (!geometry.is_pointwise()).then(|| geometry.unfold(image));
                matrix_product(
                    (n_out, area, depth),
                    output,
                    rows_of(area),
                    (weight, rows_of(depth)),
                    (unfolded.as_deref().unwrap_or(image), rows_of(area)),
                    true,
                );
                if self.has_relu {
                    relu(output);
                }
            });
        let [rows, columns] = geometry.output;
        Ok((
            CpuStorage::F32(output),
            Shape::from((geometry.n_images, n_out, rows, columns)),
        ))
    }

    fn bwd(
        &self,
        input: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        output: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (geometry, n_out) = self.geometry(input.shape(), weight.shape(), bias.shape())?;
        let (of_input, of_weight, of_bias) = with_values::<f32, _>(input, |input| {
            with_values::<f32, _>(weight, |weight| {
                with_values::<f32, _>(output, |output| {
                    with_values::<f32, _>(&gradient.contiguous()?, |gradient| {
                        self.gradients((&geometry, n_out), input, weight, output, gradient)
                    })
                })
            })
        })????;
        let of_input = of_input
            .map(|values| Tensor::from_vec(values, input.shape(), input.device()))
            .transpose()?;
        Ok((
            of_input,
            Some(Tensor::from_vec(
                of_weight,
                weight.shape(),
                weight.device(),
            )?),
            Some(Tensor::from_vec(of_bias, bias.shape(), bias.device())?),
        ))
    }
}

fn relu(values: &mut [f32]) {
    for value in values {
        if *value <= 0.0 {
            *value = 0.0;
        }
    }
}

/// What a pool takes of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooled {
    /// The largest value; padding never is.
    Largest,
    /// The sum over the number of places, padding included.
    Mean,
}

/// A pool.
#[derive(Debug, Clone, Copy)]
pub struct Pool {
    /// What it takes.
    pub pooled: Pooled,
    /// The window.
    pub window: Window,
}

impl Pool {
    /// Rows and columns of the image under an output position.
    fn under(&self, geometry: &Geometry, axis: usize, index: usize) -> std::ops::Range<usize> {
        let (first, padding) = (index * self.window.stride, self.window.padding[axis]);
        first.saturating_sub(padding)
            ..(first + self.window.kernel[axis])
                .saturating_sub(padding)
                .min(geometry.sides[axis])
    }

    /// Calls `f(output position, image rows, image columns)` for each position of a plane.
    fn windows(
        &self,
        geometry: &Geometry,
        mut f: impl FnMut(usize, std::ops::Range<usize>, std::ops::Range<usize>),
    ) {
        for row in 0..geometry.output[0] {
            let rows = self.under(geometry, 0, row);
            for column in 0..geometry.output[1] {
                let columns = self.under(geometry, 1, column);
                f(row * geometry.output[1] + column, rows.clone(), columns);
            }
        }
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "a window has a few thousand places"
    )]
    fn share(geometry: &Geometry) -> f32 {
        1.0 / geometry.taps() as f32
    }
}

/// Place of the first largest value.
fn first_largest(
    plane: &[f32],
    width: usize,
    rows: std::ops::Range<usize>,
    columns: &std::ops::Range<usize>,
) -> usize {
    let mut best = rows.start * width + columns.start;
    for row in rows {
        for place in row * width + columns.start..row * width + columns.end {
            if plane[place] > plane[best] {
                best = place;
            }
        }
    }
    best
}

impl CustomOp1 for Pool {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let geometry = Geometry::new(layout.shape(), self.window)?;
        let input = values::<f32>(storage, layout)?;
        let width = geometry.sides[1];
        let mut output = vec![0f32; geometry.n_images * geometry.channels * geometry.area_out()];
        output
            .par_chunks_mut(geometry.area_out())
            .zip(input.par_chunks(geometry.area()))
            .for_each(|(output, plane)| {
                self.windows(&geometry, |to, rows, columns| {
                    output[to] = match self.pooled {
                        Pooled::Largest => plane[first_largest(plane, width, rows, &columns)],
                        Pooled::Mean => {
                            let rows = rows.map(|row| &plane[row * width..][columns.clone()]);
                            rows.flatten().sum::<f32>() * Self::share(&geometry)
                        }
                    };
                });
            });
        let shape = (
            geometry.n_images,
            geometry.channels,
            geometry.output[0],
            geometry.output[1],
        );
        Ok((CpuStorage::F32(output), Shape::from(shape)))
    }

    fn bwd(&self, input: &Tensor, _output: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let geometry = Geometry::new(input.shape(), self.window)?;
        let width = geometry.sides[1];
        let mut found = vec![0f32; input.elem_count()];
        let gradient = gradient.contiguous()?;
        with_values::<f32, _>(input, |input| {
            with_values::<f32, _>(&gradient, |gradient| {
                found
                    .par_chunks_mut(geometry.area())
                    .zip(input.par_chunks(geometry.area()))
                    .zip(gradient.par_chunks(geometry.area_out()))
                    .for_each(|((found, plane), gradient)| {
                        self.windows(&geometry, |from, rows, columns| match self.pooled {
                            Pooled::Largest => {
                                found[first_largest(plane, width, rows, &columns)] +=
                                    gradient[from];
                            }
                            Pooled::Mean => {
                                let part = gradient[from] * Self::share(&geometry);
                                for row in rows {
                                    found[row * width..][columns.clone()]
                                        .iter_mut()
                                        .for_each(|value| *value += part);
                                }
                            }
                        });
                    });
            })
        })??;
        Ok(Some(Tensor::from_vec(
            found,
            input.shape(),
            input.device(),
        )?))
    }
}

/// Sum of two feature maps, negative values become 0.
#[derive(Debug, Clone, Copy)]
pub struct AddRelu;

impl CustomOp2 for AddRelu {
    fn name(&self) -> &'static str {
        "add-relu"
    }

    fn cpu_fwd(
        &self,
        left: &CpuStorage,
        left_layout: &Layout,
        right: &CpuStorage,
        right_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if left_layout.shape() != right_layout.shape() {
            bail!(
                "{:?} and {:?} do not add",
                left_layout.shape(),
                right_layout.shape()
            )
        }
        let (left, right) = (
            values::<f32>(left, left_layout)?,
            values::<f32>(right, right_layout)?,
        );
        let mut sums: Vec<f32> = left.iter().zip(right).map(|(a, b)| a + b).collect();
        relu(&mut sums);
        Ok((CpuStorage::F32(sums), left_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _left: &Tensor,
        _right: &Tensor,
        sums: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let opened: Vec<f32> = with_values::<f32, _>(sums, |sums| {
            with_values::<f32, _>(&gradient.contiguous()?, |gradient| {
                let pairs = gradient.iter().zip(sums);
                pairs
                    .map(|(&gradient, &sum)| if sum > 0.0 { gradient } else { 0.0 })
                    .collect()
            })
        })??;
        let opened = Tensor::from_vec(opened, sums.shape(), sums.device())?;
        Ok((Some(opened.clone()), Some(opened)))
    }
}
