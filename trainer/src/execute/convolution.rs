//! Convolution: the input unfolded in blocks of rows, and one matrix product a block.

use std::sync::Arc;

use super::{Tensor, Window, image_shape};

/// Floats that one block of unfolded convolution input may hold.
const UNFOLD_FLOATS: usize = 1 << 19;

#[derive(Debug)]
pub(super) struct Convolution {
    pub(super) weight: Arc<Tensor>,
    pub(super) bias: Option<Arc<Tensor>>,
    pub(super) window: Window,
}

impl Convolution {
    pub(super) fn run(&self, input: &Tensor) -> Option<Tensor> {
        let &[n_outputs, n_inputs, ..] = self.weight.shape.as_slice() else {
            return None;
        };
        let (channels, side) = image_shape(input)?;
        let [rows, columns] = self.window.output(side)?;
        if channels != n_inputs || columns == 0 {
            return None;
        }
        let depth = n_inputs * self.window.kernel[0] * self.window.kernel[1];
        let mut output = vec![0.0; n_outputs * rows * columns];
        let rows_a_block = (UNFOLD_FLOATS / (depth * columns)).clamp(1, rows.max(1));
        let mut unfolded = vec![0.0; depth * rows_a_block * columns];
        for first_row in (0..rows).step_by(rows_a_block) {
            let n_rows = rows_a_block.min(rows - first_row);
            let n_pixels = n_rows * columns;
            self.unfold(
                input,
                side,
                first_row,
                [n_rows, columns],
                &mut unfolded[..depth * n_pixels],
            );
            let mut target = Target {
                values: &mut output,
                first: first_row * columns,
                row_stride: rows * columns,
            };
            multiply(
                [n_outputs, n_pixels, depth],
                &self.weight.values,
                &unfolded[..depth * n_pixels],
                &mut target,
            );
        }
        if let Some(bias) = &self.bias {
            for (plane, bias) in output
                .chunks_exact_mut((rows * columns).max(1))
                .zip(&bias.values)
            {
                plane.iter_mut().for_each(|value| *value += bias);
            }
        }
        Some(Tensor {
            shape: vec![n_outputs, rows, columns],
            values: output,
        })
    }

    /// `unfolded [channel x kernel row x kernel column, output row x output column]` of a block of output rows.
    fn unfold(
        &self,
        input: &Tensor,
        side: [usize; 2],
        first_row: usize,
        block: [usize; 2],
        unfolded: &mut [f32],
    ) {
        let [kernel_rows, kernel_columns] = self.window.kernel;
        let taps = kernel_rows * kernel_columns;
        for (index, line) in unfolded.chunks_exact_mut(block[0] * block[1]).enumerate() {
            let (channel, tap) = (index / taps, index % taps);
            let plane = &input.values[channel * side[0] * side[1]..][..side[0] * side[1]];
            for (row, out) in line.chunks_exact_mut(block[1]).enumerate() {
                let source_row = (first_row + row) * self.window.strides[0] + tap / kernel_columns;
                let Some(source) = source_row
                    .checked_sub(self.window.pads[0])
                    .filter(|&source| source < side[0])
                else {
                    out.fill(0.0);
                    continue;
                };
                let source = &plane[source * side[1]..][..side[1]];
                let (offset, stride, pad) = (
                    tap % kernel_columns,
                    self.window.strides[1],
                    self.window.pads[1],
                );
                if stride == 1 && offset >= pad && offset - pad + out.len() <= source.len() {
                    out.copy_from_slice(&source[offset - pad..][..out.len()]);
                    continue;
                }
                for (column, value) in out.iter_mut().enumerate() {
                    let from = (column * stride + offset).checked_sub(pad);
                    *value = from
                        .and_then(|from| source.get(from))
                        .copied()
                        .unwrap_or(0.0);
                }
            }
        }
    }
}

/// Where a product goes: rows of `values`, `row_stride` apart, from element `first` on.
struct Target<'a> {
    values: &'a mut [f32],
    first: usize,
    row_stride: usize,
}

/// `target = left [m, k] x right [k, n]`, single-threaded; callers run images in parallel.
///
/// # Panics
///
/// Where a slice is shorter than the shape says.
#[allow(
    unsafe_code,
    reason = "the one call of the matrix kernel, which takes pointers"
)]
fn multiply([m, n, k]: [usize; 3], left: &[f32], right: &[f32], target: &mut Target<'_>) {
    assert!(
        left.len() >= m * k && right.len() >= k * n,
        "operands fill their shapes"
    );
    if m == 0 || n == 0 {
        return;
    }
    let values = &mut target.values[target.first..];
    assert!(
        n <= target.row_stride && values.len() >= (m - 1) * target.row_stride + n,
        "the target holds m rows"
    );
    let stride =
        |extent: usize| isize::try_from(extent).expect("a slice is shorter than isize::MAX");
    // SAFETY: the asserts above hold every index of the three matrices inside its slice, and `values` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            values.as_mut_ptr(),
            1,
            stride(target.row_stride),
            false,
            left.as_ptr(),
            1,
            stride(k),
            right.as_ptr(),
            1,
            stride(n),
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
