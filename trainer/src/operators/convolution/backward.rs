//! Backward: open positions and their neighbourhoods.

use std::ops::Range;

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::super::vector::{Avx2, Avx512};
use super::super::vector::{Instructions, Portable, Vector};
use super::{BAND, BLOCK, Band, Batch, CLOSED, Geometry, Input, Shared};

/// Pooled columns whose open positions are listed at a time: their input block stays in the first-level cache.
const SEGMENT: usize = 32;

/// Gradients of one application.
#[derive(Debug)]
pub(super) struct Gradients {
    /// In blocks of 16 channels; where asked for.
    pub(super) input: Option<Vec<f32>>,
    pub(super) weight: Vec<f32>,
    pub(super) bias: Vec<f32>,
}

/// An open position: where its neighbourhood begins, from the row's first value, and its gradient.
#[derive(Debug, Clone, Copy, Default)]
struct Open {
    offset: u32,
    gradient: f32,
}

/// Gradients of weights and bias summed over some images, `[out, block, tap, 16]` and `[out]`.
struct PartialSum {
    weight: Vec<f32>,
    bias: Vec<f64>,
}

pub(super) fn backward(
    instructions: Instructions,
    geometry: &Geometry,
    batch: Batch<'_>,
    weight: &[f32],
    argmax: &[u8],
    gradient: &[f32],
    needs_input_gradient: bool,
) -> Gradients {
    let needs_input_gradient = needs_input_gradient && !geometry.is_image;
    let taps = if needs_input_gradient {
        pack_taps(geometry, weight)
    } else {
        Vec::new()
    };
    let n_sums = geometry.partial_sums();
    let share =
        |sum: usize| sum * geometry.n_images / n_sums..(sum + 1) * geometry.n_images / n_sums;
    let mut input = vec![
        0f32;
        if needs_input_gradient {
            geometry.n_images * geometry.input_values()
        } else {
            0
        }
    ];
    let input_to = Shared(input.as_mut_ptr());
    let sums: Vec<PartialSum> = (0..n_sums)
        .into_par_iter()
        .map(|sum| {
            let mut partial = PartialSum {
                weight: vec![0f32; geometry.channels_out * geometry.tap_values()],
                bias: vec![0f64; geometry.channels_out],
            };
            let mut lists = vec![Open::default(); geometry.blocks_out() * BLOCK * SEGMENT];
            for image in share(sum) {
                let pooled =
                    image * geometry.pooled_values()..(image + 1) * geometry.pooled_values();
                let mut work = BackwardImage {
                    geometry,
                    argmax: &argmax[pooled.clone()],
                    gradient: &gradient[pooled],
                    partial: &mut partial,
                    lists: &mut lists,
                    input_gradient: needs_input_gradient.then(|| {
                        (
                            input_to.at(image * geometry.input_values()),
                            taps.as_slice(),
                        )
                    }),
                };
                work.run(instructions, batch.image(geometry, image));
            }
            partial
        })
        .collect();
    let (weight, bias) = sum_up(geometry, &sums);
    Gradients {
        input: needs_input_gradient.then_some(input),
        weight,
        bias,
    }
}

/// Weights as `[out, block, tap, 16]`.
fn pack_taps(geometry: &Geometry, weight: &[f32]) -> Vec<f32> {
    let mut taps = vec![0f32; geometry.channels_out * geometry.tap_values()];
    for (taps, weight) in taps
        .chunks_exact_mut(geometry.tap_values())
        .zip(weight.chunks_exact(geometry.channels_in * 9))
    {
        for (index, &value) in weight.iter().enumerate() {
            taps[geometry.tap_index(index / 9, index % 9 / 3, index % 3)] = value;
        }
    }
    taps
}

/// Adds the partial sums in their order and restores `[out, in, 3, 3]`.
fn sum_up(geometry: &Geometry, sums: &[PartialSum]) -> (Vec<f32>, Vec<f32>) {
    let mut weight = vec![0f32; geometry.channels_out * geometry.channels_in * 9];
    weight
        .par_chunks_mut(geometry.channels_in * 9)
        .enumerate()
        .for_each(|(out, weight)| {
            for sum in sums {
                let partial = &sum.weight[out * geometry.tap_values()..][..geometry.tap_values()];
                for (index, value) in weight.iter_mut().enumerate() {
                    *value += partial[geometry.tap_index(index / 9, index % 9 / 3, index % 3)];
                }
            }
        });
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the sum is rounded to f32 once, at its end"
    )]
    let bias = (0..geometry.channels_out)
        .map(|out| sums.iter().map(|sum| sum.bias[out]).sum::<f64>() as f32)
        .collect();
    (weight, bias)
}

/// One image's part of the backward pass.
struct BackwardImage<'a> {
    geometry: &'a Geometry,
    argmax: &'a [u8],
    gradient: &'a [f32],
    partial: &'a mut PartialSum,
    /// [`SEGMENT`] places for each output channel.
    lists: &'a mut [Open],
    /// Where this image's input gradient is added up, and the weights as taps.
    input_gradient: Option<(*mut f32, &'a [f32])>,
}

impl BackwardImage<'_> {
    fn run(&mut self, instructions: Instructions, input: Input<'_>) {
        let n_rows = self.geometry.pooled_rows();
        match input {
            Input::Map(map) => {
                assert_eq!(map.len(), self.geometry.input_values(), "the whole map");
                self.rows::<9>(instructions, map, 0..n_rows);
            }
            Input::Image(image) => {
                for first in (0..n_rows).step_by(BAND) {
                    let rows = first..(first + BAND).min(n_rows);
                    let band = Band::of_image(self.geometry, image, &rows);
                    assert_eq!(
                        band.scaled.len(),
                        (2 * rows.len() + 2) * self.geometry.row_stride() + BLOCK,
                        "the band and 16 values"
                    );
                    self.rows::<3>(instructions, &band.scaled, rows);
                }
            }
        }
    }

    /// `input` begins at row `2 * rows.start` of the first block.
    fn rows<const TAPS: usize>(
        &mut self,
        instructions: Instructions,
        input: &[f32],
        rows: Range<usize>,
    ) {
        assert_eq!(TAPS, self.geometry.taps(), "the kernel's taps");
        match instructions {
            // SAFETY: detected; `input` is a whole map or a band with 16 values after it.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => unsafe { backward_avx512::<TAPS>(self, input.as_ptr(), rows) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => unsafe { backward_avx2::<TAPS>(self, input.as_ptr(), rows) },
            // SAFETY: as above; needs no instructions.
            Instructions::Portable => unsafe {
                backward_rows::<Portable, TAPS>(self, input.as_ptr(), rows)
            },
        }
    }

    /// Lists the open positions of `columns` of a pooled row for every output channel and adds them to the bias'
    /// gradient; returns how many each channel has.
    fn list_open(&mut self, row: usize, columns: Range<usize>, counts: &mut [usize]) {
        let g = self.geometry;
        let stride = g.column_stride();
        counts.fill(0);
        for block in 0..g.blocks_out() {
            let lists = &mut self.lists[block * BLOCK * SEGMENT..(block + 1) * BLOCK * SEGMENT];
            let counts = &mut counts[block * BLOCK..(block + 1) * BLOCK];
            for column in columns.clone() {
                let at = ((block * g.pooled_rows() + row) * g.pooled_columns() + column) * BLOCK;
                let windows = self.argmax[at..at + BLOCK]
                    .iter()
                    .zip(&self.gradient[at..at + BLOCK]);
                for ((lane, (&index, &gradient)), count) in
                    windows.enumerate().zip(counts.iter_mut())
                {
                    let offset = usize::from(index / 2) * g.row_stride()
                        + (2 * column + usize::from(index % 2)) * stride;
                    #[expect(
                        clippy::cast_possible_truncation,
                        reason = "two rows of at most 2^24 x 16 values"
                    )]
                    let open = Open {
                        offset: offset as u32,
                        gradient,
                    };
                    // Written always and counted when open: no branch. The count stays below the columns seen.
                    lists[lane * SEGMENT + *count] = open;
                    *count += usize::from(index < CLOSED);
                }
            }
        }
        for (out, bias) in self.partial.bias.iter_mut().enumerate() {
            let open = &self.lists[out * SEGMENT..][..counts[out]];
            *bias += open
                .iter()
                .map(|open| f64::from(open.gradient))
                .sum::<f64>();
        }
    }
}

/// # Safety
/// AVX-512F, and as [`backward_rows`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn backward_avx512<const TAPS: usize>(
    work: &mut BackwardImage<'_>,
    input: *const f32,
    rows: Range<usize>,
) {
    // SAFETY: the caller's condition.
    unsafe { backward_rows::<Avx512, TAPS>(work, input, rows) }
}

/// # Safety
/// AVX2 and FMA, and as [`backward_rows`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn backward_avx2<const TAPS: usize>(
    work: &mut BackwardImage<'_>,
    input: *const f32,
    rows: Range<usize>,
) {
    // SAFETY: the caller's condition.
    unsafe { backward_rows::<Avx2, TAPS>(work, input, rows) }
}

/// # Safety
/// The CPU has V's instructions; `input` holds rows `2 * rows.start` to `2 * rows.end + 2` of every block and 16
/// readable values after the last where it is a scaled image; the input gradient, where asked for, holds a whole map.
#[inline(always)]
unsafe fn backward_rows<V: Vector, const TAPS: usize>(
    work: &mut BackwardImage<'_>,
    input: *const f32,
    rows: Range<usize>,
) {
    let g = *work.geometry;
    let mut counts = vec![0usize; g.blocks_out() * BLOCK];
    let taps: [usize; TAPS] = std::array::from_fn(|tap| {
        if g.is_image {
            tap * g.row_stride()
        } else {
            tap / 3 * g.row_stride() + tap % 3 * BLOCK
        }
    });
    for row in rows.clone() {
        for first in (0..g.pooled_columns()).step_by(SEGMENT) {
            work.list_open(
                row,
                first..(first + SEGMENT).min(g.pooled_columns()),
                &mut counts,
            );
            for block in 0..g.blocks_in() {
                for (out, &count) in counts[..g.channels_out].iter().enumerate() {
                    let open = &work.lists[out * SEGMENT..][..count];
                    let at = (out * g.blocks_in() + block) * TAPS * BLOCK;
                    let sums = &mut work.partial.weight[at..at + TAPS * BLOCK];
                    // SAFETY: an open position's neighbourhood lies in the rows that the caller vouches for.
                    unsafe {
                        let from = input.add(
                            block * g.block_stride() + 2 * (row - rows.start) * g.row_stride(),
                        );
                        add_to_weight_gradient::<V, TAPS>(from, &taps, open, sums);
                    }
                }
                let Some((input_gradient, weights)) = work.input_gradient else {
                    continue;
                };
                for (out, &count) in counts[..g.channels_out].iter().enumerate() {
                    let open = &work.lists[out * SEGMENT..][..count];
                    let at = (out * g.blocks_in() + block) * TAPS * BLOCK;
                    // SAFETY: as above, in the whole map of the input gradient.
                    unsafe {
                        let to =
                            input_gradient.add(block * g.block_stride() + 2 * row * g.row_stride());
                        add_to_input_gradient::<V, TAPS>(
                            to,
                            &taps,
                            open,
                            &weights[at..at + TAPS * BLOCK],
                        );
                    }
                }
            }
        }
    }
}

/// `sums[tap, lane] += sum over open positions of gradient * input[offset + taps[tap] + lane]`.
///
/// # Safety
/// The CPU has V's instructions; 16 values can be read at each position; `sums` holds `TAPS * 16` values.
#[inline(always)]
unsafe fn add_to_weight_gradient<V: Vector, const TAPS: usize>(
    input: *const f32,
    taps: &[usize; TAPS],
    open: &[Open],
    sums: &mut [f32],
) {
    for lane in (0..BLOCK).step_by(V::LANES) {
        // SAFETY: the caller's condition.
        unsafe {
            let mut fresh = [V::splat(0.0); TAPS];
            for position in open {
                let gradient = V::splat(position.gradient);
                let from = input.add(position.offset as usize + lane);
                for tap in 0..TAPS {
                    fresh[tap] = V::load(from.add(taps[tap])).mul_add(gradient, fresh[tap]);
                }
            }
            for (tap, fresh) in fresh.iter().enumerate() {
                let sum = sums.as_mut_ptr().add(tap * BLOCK + lane);
                fresh.add(V::load(sum)).store(sum);
            }
        }
    }
}

/// `output[offset + taps[tap] + lane] += gradient * weight[tap, lane]` for every open position.
///
/// # Safety
/// The CPU has V's instructions; 16 values can be written at each position; `weight` holds `TAPS * 16` values.
#[inline(always)]
unsafe fn add_to_input_gradient<V: Vector, const TAPS: usize>(
    output: *mut f32,
    taps: &[usize; TAPS],
    open: &[Open],
    weight: &[f32],
) {
    for lane in (0..BLOCK).step_by(V::LANES) {
        // SAFETY: the caller's condition.
        unsafe {
            let mut w = [V::splat(0.0); TAPS];
            for (tap, w) in w.iter_mut().enumerate() {
                *w = V::load(weight.as_ptr().add(tap * BLOCK + lane));
            }
            for position in open {
                let gradient = V::splat(position.gradient);
                let to = output.add(position.offset as usize + lane);
                for tap in 0..TAPS {
                    let to = to.add(taps[tap]);
                    gradient.mul_add(w[tap], V::load(to)).store(to);
                }
            }
        }
    }
}
