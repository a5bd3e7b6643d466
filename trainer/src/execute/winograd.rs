//! 3x3 convolution of stride 1 by Winograd's F(4 x 4, 3 x 3): 36 products for a tile of 16 outputs, in place of 144.
//!
//! `output = A' [(G weight G') * (B' input B)] A` for each tile of 4 x 4 outputs under 6 x 6 inputs, the products summed over the inputs
//! (Lavin and Gray, arXiv 1509.09308, section 4.2). A block of tiles is transformed, then multiplied by 36 matrix products, then transformed back.
//! Rounding: about 1e-6 of the sum of the products' magnitudes, ten times that of a direct sum.

use std::array::from_fn;

use super::convolution::{Target, add_product};
use super::{Tensor, Window};

/// Side of the outputs of a tile.
const OUTPUTS: usize = 4;
/// Side of the inputs under a tile.
const INPUTS: usize = 6;
/// Products of a tile.
const FREQUENCIES: usize = INPUTS * INPUTS;
/// Tiles of one row that are transformed side by side.
const LANES: usize = 8;
/// Tiles of a block, in whole rows of tiles.
const TILES: usize = 128;
/// Columns below which whole rows of [`LANES`] tiles waste what the tiles gain.
const MIN_COLUMNS: usize = 24;
/// Channels on both sides below which the matrix products are too small to pay for the transforms.
const MIN_CHANNELS: usize = 16;

/// The same element of [`LANES`] tiles.
type Lanes = [f32; LANES];

/// Transformed weights.
#[derive(Debug)]
pub(super) struct Winograd {
    /// `[frequency][output][input]`.
    weights: Vec<f32>,
    n_outputs: usize,
    n_inputs: usize,
}

impl Winograd {
    /// The weights `[output, input, 3, 3]` transformed; `None` where this is not the faster way.
    pub(super) fn new(weight: &Tensor, window: &Window) -> Option<Self> {
        let &[n_outputs, n_inputs, 3, 3] = weight.shape.as_slice() else {
            return None;
        };
        if window.strides != [1, 1] || n_outputs.min(n_inputs) < MIN_CHANNELS {
            return None;
        }
        let mut weights = vec![0.0; FREQUENCIES * n_outputs * n_inputs];
        for (index, taps) in weight.values.as_chunks::<9>().0.iter().enumerate() {
            for (frequency, value) in transformed_weight(taps).into_iter().enumerate() {
                weights[frequency * n_outputs * n_inputs + index] = value;
            }
        }
        Some(Self {
            weights,
            n_outputs,
            n_inputs,
        })
    }

    /// Adds the convolution of `input`, planes of `side` rows and columns, to `output`, planes of `out_side`; returns whether it did, which it
    /// does where the tiles fill the columns.
    pub(super) fn add(
        &self,
        input: &[f32],
        side: [usize; 2],
        window: &Window,
        output: &mut [f32],
        out_side: [usize; 2],
    ) -> bool {
        if out_side[1] < MIN_COLUMNS {
            return false;
        }
        let n_columns = out_side[1].div_ceil(OUTPUTS).next_multiple_of(LANES);
        let n_rows = out_side[0].div_ceil(OUTPUTS);
        let rows_a_block = (TILES / n_columns).clamp(1, n_rows.max(1));
        let n_tiles = rows_a_block * n_columns;
        let mut lines = Lines::new(side, window.pads, n_columns * OUTPUTS + INPUTS - OUTPUTS);
        let mut inputs = vec![0.0; FREQUENCIES * self.n_inputs * n_tiles];
        let mut sums = vec![0.0; FREQUENCIES * self.n_outputs * n_tiles];
        for first in (0..n_rows).step_by(rows_a_block) {
            let rows = first..n_rows.min(first + rows_a_block);
            for (channel, plane) in input.chunks_exact(side[0] * side[1]).enumerate() {
                for row in rows.clone() {
                    lines.read(plane, row * OUTPUTS);
                    let at = channel * n_tiles + (row - first) * n_columns;
                    lines.transform(&mut inputs[at..], self.n_inputs * n_tiles, n_columns);
                }
            }
            self.products(n_tiles, &inputs, &mut sums);
            for (channel, plane) in output
                .chunks_exact_mut(out_side[0] * out_side[1])
                .enumerate()
            {
                let rows_of = plane.chunks_mut(OUTPUTS * out_side[1]).skip(first);
                for (row, lines) in rows_of.take(rows.len()).enumerate() {
                    let sums = &sums[channel * n_tiles + row * n_columns..];
                    add_tiles(sums, self.n_outputs * n_tiles, lines, out_side[1]);
                }
            }
        }
        true
    }

    /// For every frequency `[output][tile]`: the sum over inputs of weights x activations.
    fn products(&self, n_tiles: usize, inputs: &[f32], sums: &mut [f32]) {
        sums.fill(0.0);
        let weights = self.weights.chunks_exact(self.n_outputs * self.n_inputs);
        let inputs = inputs.chunks_exact(self.n_inputs * n_tiles);
        let sums = sums.chunks_exact_mut(self.n_outputs * n_tiles);
        for ((weights, inputs), sums) in weights.zip(inputs).zip(sums) {
            let mut target = Target {
                values: sums,
                first: 0,
                row_stride: n_tiles,
            };
            let shape = [self.n_outputs, n_tiles, self.n_inputs];
            add_product(shape, weights, inputs, &mut target);
        }
    }
}

/// The lines under one row of tiles, padding included.
struct Lines {
    side: [usize; 2],
    pads: [usize; 4],
    length: usize,
    values: Vec<f32>,
}

impl Lines {
    fn new(side: [usize; 2], pads: [usize; 4], length: usize) -> Self {
        Self {
            side,
            pads,
            length,
            values: vec![0.0; INPUTS * length],
        }
    }

    /// The lines from `first` on, counted with the padding.
    fn read(&mut self, plane: &[f32], first: usize) {
        let [_, left, ..] = self.pads;
        for (index, line) in self.values.chunks_exact_mut(self.length).enumerate() {
            line.fill(0.0);
            let row = (first + index).checked_sub(self.pads[0]);
            if let Some(row) = row.filter(|&row| row < self.side[0]) {
                let to = line[left..].iter_mut();
                to.zip(&plane[row * self.side[1]..][..self.side[1]])
                    .for_each(|(to, &from)| *to = from);
            }
        }
    }

    /// `B' d B` of each tile: frequency f of tile t goes to `to[f * stride + t]`.
    fn transform(&self, to: &mut [f32], stride: usize, n_columns: usize) {
        for first in (0..n_columns).step_by(LANES) {
            let line_of = |line: usize| {
                let line = &self.values[line * self.length + first * OUTPUTS..];
                let line = &line[..LANES * OUTPUTS + INPUTS - OUTPUTS];
                input_line(from_fn(|offset| {
                    from_fn(|lane| line[lane * OUTPUTS + offset])
                }))
            };
            let lines: [[Lanes; INPUTS]; INPUTS] = from_fn(line_of);
            let columns: [_; INPUTS] =
                from_fn(|horizontal| input_line(lines.map(|line| line[horizontal])));
            for (horizontal, column) in columns.iter().enumerate() {
                for (vertical, lanes) in column.iter().enumerate() {
                    let at = (vertical * INPUTS + horizontal) * stride + first;
                    to[at..at + LANES].copy_from_slice(lanes);
                }
            }
        }
    }
}

/// Adds `A' m A` of a row of tiles to up to four lines of the output; frequency f of tile t is `sums[f * stride + t]`.
fn add_tiles(sums: &[f32], stride: usize, lines: &mut [f32], n_columns: usize) {
    for (group, first) in (0..n_columns).step_by(LANES * OUTPUTS).enumerate() {
        let lanes_of = |frequency: usize| -> Lanes {
            let at = frequency * stride + group * LANES;
            from_fn(|lane| sums[at + lane])
        };
        let columns: [[Lanes; OUTPUTS]; INPUTS] = from_fn(|horizontal| {
            output_line(from_fn(|vertical| lanes_of(vertical * INPUTS + horizontal)))
        });
        for (row, line) in lines.chunks_exact_mut(n_columns).enumerate() {
            let pixels = output_line(from_fn(|horizontal| columns[horizontal][row]));
            let line = line[first..].chunks_mut(OUTPUTS).take(LANES);
            for (lane, tile) in line.enumerate() {
                for (to, of_offset) in tile.iter_mut().zip(&pixels) {
                    *to += of_offset[lane];
                }
            }
        }
    }
}

/// A line of `B'`.
fn input_line([a, b, c, d, e, f]: [Lanes; INPUTS]) -> [Lanes; INPUTS] {
    [
        from_fn(|i| 4.0 * a[i] - 5.0 * c[i] + e[i]),
        from_fn(|i| (e[i] - 4.0 * c[i]) + (d[i] - 4.0 * b[i])),
        from_fn(|i| (e[i] - 4.0 * c[i]) - (d[i] - 4.0 * b[i])),
        from_fn(|i| (e[i] - c[i]) + 2.0 * (d[i] - b[i])),
        from_fn(|i| (e[i] - c[i]) - 2.0 * (d[i] - b[i])),
        from_fn(|i| 4.0 * b[i] - 5.0 * d[i] + f[i]),
    ]
}

/// A line of `A'`.
fn output_line([a, b, c, d, e, f]: [Lanes; INPUTS]) -> [Lanes; OUTPUTS] {
    [
        from_fn(|i| a[i] + (b[i] + c[i]) + (d[i] + e[i])),
        from_fn(|i| (b[i] - c[i]) + 2.0 * (d[i] - e[i])),
        from_fn(|i| (b[i] + c[i]) + 4.0 * (d[i] + e[i])),
        from_fn(|i| (b[i] - c[i]) + 8.0 * (d[i] - e[i]) + f[i]),
    ]
}

/// `G g G'` of nine taps, in f64, rounded once.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the one rounding of a transformed weight"
)]
fn transformed_weight(taps: &[f32; 9]) -> [f32; FREQUENCIES] {
    let line = |[a, b, c]: [f64; 3]| {
        [
            a / 4.0,
            -(a + b + c) / 6.0,
            -(a - b + c) / 6.0,
            a / 24.0 + b / 12.0 + c / 6.0,
            a / 24.0 - b / 12.0 + c / 6.0,
            c,
        ]
    };
    let rows: [[f64; INPUTS]; 3] =
        from_fn(|row| line(from_fn(|column| f64::from(taps[3 * row + column]))));
    let columns: [[f64; INPUTS]; INPUTS] = from_fn(|column| line(from_fn(|row| rows[row][column])));
    from_fn(|frequency| columns[frequency % INPUTS][frequency / INPUTS] as f32)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::convolution::Convolution;
    use super::*;

    fn values(n: usize, seed: f32) -> Vec<f32> {
        (0..n).map(|index| (index as f32 * seed).sin()).collect()
    }

    /// Direct sums in f64.
    fn definition(input: &Tensor, weight: &Tensor, window: &Window) -> Vec<f64> {
        let [n_inputs, rows, columns] = input.shape[..] else {
            panic!("an image")
        };
        let [out_rows, out_columns] = window.output([rows, columns]).unwrap();
        let at = |channel: usize, row: usize, column: usize| {
            let place = row
                .checked_sub(window.pads[0])
                .zip(column.checked_sub(window.pads[1]));
            let inside = place.filter(|&(row, column)| row < rows && column < columns);
            inside.map_or(0.0, |(row, column)| {
                f64::from(input.values[(channel * rows + row) * columns + column])
            })
        };
        let mut sums = Vec::new();
        for taps in weight.values.chunks_exact(9 * n_inputs) {
            for place in 0..out_rows * out_columns {
                let (row, column) = (place / out_columns, place % out_columns);
                let products = taps.iter().enumerate().map(|(index, &tap)| {
                    let (channel, tap_index) = (index / 9, index % 9);
                    f64::from(tap) * at(channel, row + tap_index / 3, column + tap_index % 3)
                });
                sums.push(products.sum());
            }
        }
        sums
    }

    #[track_caller]
    fn check([rows, columns]: [usize; 2], pads: [usize; 4]) {
        let (n_inputs, n_outputs) = (17, 19);
        let input = Tensor {
            shape: vec![n_inputs, rows, columns],
            values: values(n_inputs * rows * columns, 0.7391),
        };
        let weight = Tensor {
            shape: vec![n_outputs, n_inputs, 3, 3],
            values: values(n_outputs * n_inputs * 9, 0.3717),
        };
        let window = Window {
            kernel: [3, 3],
            strides: [1, 1],
            pads,
        };
        let winograd = Winograd::new(&weight, &window).unwrap();
        let [out_rows, out_columns] = window.output([rows, columns]).unwrap();
        let mut sums = vec![0.0; n_outputs * out_rows * out_columns];
        assert!(winograd.add(
            &input.values,
            [rows, columns],
            &window,
            &mut sums,
            [out_rows, out_columns]
        ));
        let expected = definition(&input, &weight, &window);
        let bias = Tensor {
            shape: vec![n_outputs],
            values: vec![1.0; n_outputs],
        };
        let convolution = Convolution::new(Arc::new(weight), Some(Arc::new(bias)), window);
        let whole = convolution.run(&input).unwrap();
        assert_eq!(whole.shape, [n_outputs, out_rows, out_columns]);
        for ((&sum, &whole), &expected) in sums.iter().zip(&whole.values).zip(&expected) {
            // About 1e-6 of the 153 products' magnitudes.
            assert!((f64::from(sum) - expected).abs() < 1e-4, "{sum} {expected}");
            assert!(
                (f64::from(whole) - 1.0 - expected).abs() < 1e-4,
                "{whole} {expected}"
            );
        }
    }

    #[test]
    fn tiles_give_the_direct_sums() {
        for side in [[26, 26], [27, 33], [5, 60], [3, 61]] {
            check(side, [0; 4]);
            check(side, [1; 4]);
        }
        check([30, 30], [0, 2, 1, 0]);
    }
}
