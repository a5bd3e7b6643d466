//! Pooling over windows, and over whole planes.

use super::{Tensor, Window, image_shape};

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) window: Window,
    pub(super) is_average: bool,
    pub(super) counts_padding: bool,
}

impl Pool {
    pub(super) fn run(&self, input: &Tensor) -> Option<Tensor> {
        let (channels, side) = image_shape(input)?;
        let [rows, columns] = self.window.output(side)?;
        let mut values = Vec::with_capacity(channels * rows * columns);
        if self.halves() {
            let planes = input.values.chunks_exact((side[0] * side[1]).max(1));
            planes.for_each(|plane| halve(plane, side[1], &mut values));
            return Some(Tensor {
                shape: vec![channels, rows, columns],
                values,
            });
        }
        for plane in input.values.chunks_exact((side[0] * side[1]).max(1)) {
            for row in 0..rows {
                let rows_in = self.reach(0, row, side[0]);
                values.extend((0..columns).map(|column| {
                    self.reduce(
                        plane,
                        side[1],
                        rows_in.clone(),
                        self.reach(1, column, side[1]),
                    )
                }));
            }
        }
        Some(Tensor {
            shape: vec![channels, rows, columns],
            values,
        })
    }

    /// Whether this is a maximum over 2x2 windows that touch.
    fn halves(&self) -> bool {
        let Window {
            kernel,
            strides,
            pads,
        } = self.window;
        !self.is_average && (kernel, strides, pads) == ([2, 2], [2, 2], [0; 4])
    }

    /// Input positions under output position `index` along `axis`.
    fn reach(&self, axis: usize, index: usize, side: usize) -> std::ops::Range<usize> {
        let first = index * self.window.strides[axis];
        let pad = self.window.pads[axis];
        first.saturating_sub(pad)
            ..(first + self.window.kernel[axis])
                .saturating_sub(pad)
                .min(side)
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "a pooling window has a few thousand positions"
    )]
    fn reduce(
        &self,
        plane: &[f32],
        width: usize,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
    ) -> f32 {
        let n_inside = rows.len() * columns.len();
        let under =
            rows.flat_map(|row| &plane[row * width + columns.start..row * width + columns.end]);
        if !self.is_average {
            return under.copied().fold(f32::NEG_INFINITY, f32::max);
        }
        let n = if self.counts_padding {
            self.window.kernel[0] * self.window.kernel[1]
        } else {
            n_inside
        };
        under.sum::<f32>() / n as f32
    }
}

/// Appends the largest value of each 2x2 window of a plane; an odd last row or column is dropped.
fn halve(plane: &[f32], n_columns: usize, values: &mut Vec<f32>) {
    for rows in plane.chunks_exact(2 * n_columns) {
        let (top, bottom) = rows.split_at(n_columns);
        let pairs = top.as_chunks::<2>().0.iter().zip(bottom.as_chunks::<2>().0);
        values.extend(pairs.map(|([a, b], [c, d])| a.max(*b).max(c.max(*d))));
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "an image plane has at most 65,536 pixels"
)]
pub(super) fn global_average(input: &Tensor) -> Option<Tensor> {
    let (channels, side) = image_shape(input)?;
    let n = side[0] * side[1];
    let values = input
        .values
        .chunks_exact(n.max(1))
        .map(|plane| plane.iter().sum::<f32>() / n as f32);
    Some(Tensor {
        shape: vec![channels, 1, 1],
        values: values.collect(),
    })
}
