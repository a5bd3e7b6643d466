//! Pools of any window.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::Geometry;
use crate::backbone::Window;
use crate::operators::{values, with_values};

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
