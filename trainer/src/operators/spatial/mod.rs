//! Convolutions, pools and sums of any window, forward and backward: what the transfer learners are made of.
//!
//! In: feature maps `[image, channel, row, column]` f32; kernels `[out, in, rows, columns]`; bias `[out]`. Definitions are ONNX's
//! Conv, MaxPool, AveragePool (padding counted) and Add. The gradient of a ReLU is 0 at 0; that of a maximum goes whole to the first largest
//! value in row-major order; both as `PyTorch` on the CPU. Images are computed in parallel, each by one matrix product over its
//! unfolded windows, so that an image's values do not depend on the rest of its batch.

mod add;
mod convolution;
mod pool;

use candle_core::{Result, Shape, bail};

pub use self::add::AddRelu;
pub use self::convolution::Convolution;
pub use self::pool::{Pool, Pooled};
use crate::backbone::Window;

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

fn relu(values: &mut [f32]) {
    for value in values {
        if *value <= 0.0 {
            *value = 0.0;
        }
    }
}
