//! Convolution: by tiles where [`super::winograd`] takes it, else the input unfolded in blocks of rows, and one matrix product a block.

use std::sync::Arc;

use super::winograd::Winograd;
use super::{Tensor, Window, image_shape};

/// Floats that one block of unfolded convolution input may hold.
const UNFOLD_FLOATS: usize = 1 << 19;

#[derive(Debug)]
pub(super) struct Convolution {
    weight: Arc<Tensor>,
    bias: Option<Arc<Tensor>>,
    window: Window,
    winograd: Option<Winograd>,
}

impl Convolution {
    pub(super) fn new(weight: Arc<Tensor>, bias: Option<Arc<Tensor>>, window: Window) -> Self {
        Self {
            winograd: Winograd::new(&weight, &window),
            weight,
            bias,
            window,
        }
    }

    pub(super) fn run(&self, input: &Tensor) -> Option<Tensor> {
        let &[n_outputs, n_inputs, ..] = self.weight.shape.as_slice() else {
            return None;
        };
        let (channels, side) = image_shape(input)?;
        let [rows, columns] = self.window.output(side)?;
        if channels != n_inputs || rows * columns == 0 {
            return None;
        }
        // The products are added to the bias.
        let mut output = Vec::with_capacity(n_outputs * rows * columns);
        for channel in 0..n_outputs {
            let bias = self.bias.as_ref().map_or(0.0, |bias| bias.values[channel]);
            output.resize(output.len() + rows * columns, bias);
        }
        let by_tiles = self.winograd.as_ref().is_some_and(|winograd| {
            winograd.add(
                &input.values,
                side,
                &self.window,
                &mut output,
                [rows, columns],
            )
        });
        if !by_tiles {
            self.add_directly(input, side, &mut output, [rows, columns]);
        }
        Some(Tensor {
            shape: vec![n_outputs, rows, columns],
            values: output,
        })
    }

    /// Adds the sums to `output`, a block of rows at a time.
    fn add_directly(
        &self,
        input: &Tensor,
        side: [usize; 2],
        output: &mut [f32],
        [rows, columns]: [usize; 2],
    ) {
        let n_outputs = output.len() / (rows * columns);
        let depth = self.weight.values.len() / n_outputs.max(1);
        let rows_a_block = (UNFOLD_FLOATS / (depth * columns)).clamp(1, rows);
        let mut unfolded = vec![0.0; depth * rows_a_block * columns];
        for first_row in (0..rows).step_by(rows_a_block) {
            let n_rows = rows_a_block.min(rows - first_row);
            let n_pixels = n_rows * columns;
            let unfolded = &mut unfolded[..depth * n_pixels];
            self.unfold(input, side, first_row, [n_rows, columns], unfolded);
            let mut target = Target {
                values: &mut *output,
                first: first_row * columns,
                row_stride: rows * columns,
            };
            let shape = [n_outputs, n_pixels, depth];
            add_product(shape, &self.weight.values, unfolded, &mut target);
        }
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
pub(super) struct Target<'a> {
    pub(super) values: &'a mut [f32],
    pub(super) first: usize,
    pub(super) row_stride: usize,
}

/// `target += left [m, k] x right [k, n]`, single-threaded; callers run images in parallel.
///
/// # Panics
///
/// Where a slice is shorter than the shape says.
#[allow(
    unsafe_code,
    reason = "the one call of the matrix kernel, which takes pointers"
)]
pub(super) fn add_product(
    [m, n, k]: [usize; 3],
    left: &[f32],
    right: &[f32],
    target: &mut Target<'_>,
) {
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
            true,
            left.as_ptr(),
            1,
            stride(k),
            right.as_ptr(),
            1,
            stride(n),
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
