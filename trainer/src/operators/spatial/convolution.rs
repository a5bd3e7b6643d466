//! A convolution of any window: one matrix product an image over its unfolded windows.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{Geometry, relu};
use crate::backbone::Window;
use crate::operators::dense::{Strides, matrix_product};
use crate::operators::{values, with_values};

/// Most partial sums of a kernel's gradient; images are spread over them evenly.
const MAX_PARTIAL_SUMS: usize = 8;

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
