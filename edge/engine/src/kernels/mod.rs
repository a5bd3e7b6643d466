//! The arithmetic of the network, once per instruction set.
//!
//! In: rows of u8 activations `[column, channel]`, packed s8 weights. Out: rows of u8 activations. There are two
//! operations, a convolution fused with bias, ReLU, 2 x 2 max pool and requantization ([`conv_row`]), and a dot product
//! ([`dense`]). `scalar.rs` defines both; each other file computes the same bits with one instruction set. What is
//! convolved in which order, and with which memory, is the business of `network.rs`.
//!
//! Unsafe code of the crate lives in this folder alone: loads and stores whose bounds are asserted at the entry of each
//! kernel, and the call into a kernel whose instruction set has been detected.

#![allow(
    unsafe_code,
    reason = "calls into kernels whose instructions have been detected"
)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
mod cpu_time;
pub(crate) mod float;
mod kernel;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dot;
#[cfg(target_arch = "aarch64")]
mod neon_i8mm;
mod packing;
mod peak;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tile256;
mod winograd;

pub(crate) use cpu_time::cpu_time;
pub use kernel::{Kernel, UnknownKernel};
pub(crate) use packing::{PackedBlock, Unpacked, pack};
pub(crate) use peak::{float_peak_macs_per_second, peak_macs_per_second};
pub(crate) use scalar::{Levels, requantize_to};
pub(crate) use winograd::{WinogradLayer, WinogradScratch, is_exact};

/// How a kernel wants its weights packed: `[block][kernel row][group][vector][lane][weight of the group]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Output channels of one vector register.
    pub(crate) lanes: usize,
    /// Vectors of a full block of output channels; the last block of a layer may have fewer.
    pub(crate) max_vectors: usize,
    /// Consecutive activations that one lane multiplies at once.
    pub(crate) group: usize,
    /// Activations that the kernel reads at once; a kernel row is padded to a multiple, which is one of `group` too.
    pub(crate) step: usize,
    /// How a weight lies in memory.
    pub(crate) weight: WeightFormat,
    /// Whether the kernel computes with `activation - 128`, so that the bias must hold 128 x the sum of weights.
    pub(crate) is_offset: bool,
}

/// How a packed weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WeightFormat {
    /// One byte, in the order of the activations.
    Bytes,
    /// Two bytes, and a vector holds the weights of even activations first, then those of odd ones.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "Winograd in integers pays with AVX2 alone")
    )]
    EvenOddWords,
}

/// Positions of a 2 x 2 pooling window, row by row.
pub(crate) const POSITIONS: usize = 4;

/// The inputs of one pooled output row of one block of output channels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConvRow<'a> {
    /// The convolution's input rows, one more than the kernel has: `[column, channel]`, at least
    /// `(2 n_columns - 1) x column_bytes + kernel_row_bytes` long.
    pub(crate) rows: &'a [&'a [u8]],
    /// Bytes from one input pixel to the next in its row.
    pub(crate) column_bytes: usize,
    /// Bytes of a row that one position of the kernel covers; a multiple of the geometry's step.
    pub(crate) kernel_row_bytes: usize,
    /// Packed weights of the block.
    pub(crate) weights: &'a [u8],
    /// Bias of each channel of the block.
    pub(crate) bias: &'a [i32],
    /// Requantization scale of each channel of the block, finite and positive.
    pub(crate) scale: &'a [f32],
    /// Pooled columns to compute.
    pub(crate) n_columns: usize,
    /// Bytes from one pooled pixel to the next.
    pub(crate) out_stride: usize,
}

impl<'a> ConvRow<'a> {
    /// Rows of the kernel.
    fn kernel_rows(&self) -> usize {
        self.rows.len() - 1
    }

    /// Packed weights of one kernel row.
    fn kernel_row_weights(&self, kernel_row: usize) -> &'a [u8] {
        let n = self.weights.len() / self.kernel_rows();
        &self.weights[kernel_row * n..][..n]
    }

    /// What one kernel row covers at each position of a pooling window, in steps of `STEP` bytes.
    #[inline]
    fn window<const STEP: usize>(&self, kernel_row: usize, column: usize) -> Window<'a, STEP> {
        let n_steps = self.kernel_row_bytes / STEP;
        let mut steps: [&[[u8; STEP]]; POSITIONS] = [&[]; POSITIONS];
        // A loop, because the compiler does not inline a closure here, and the sums would leave the registers for its call.
        for (position, steps) in steps.iter_mut().enumerate() {
            let start = (2 * column + position % 2) * self.column_bytes;
            let line = &self.rows[kernel_row + position / 2][start..];
            *steps = &line.as_chunks().0[..n_steps];
        }
        Window { steps, n_steps }
    }

    /// The bias, vector by vector.
    #[inline]
    fn bias<const LANES: usize, const VECTORS: usize>(&self) -> &'a [[i32; LANES]; VECTORS] {
        self.bias
            .as_chunks()
            .0
            .first_chunk()
            .expect("a block fills its vectors")
    }

    /// The scales, vector by vector.
    #[inline]
    fn scale<const LANES: usize, const VECTORS: usize>(&self) -> &'a [[f32; LANES]; VECTORS] {
        self.scale
            .as_chunks()
            .0
            .first_chunk()
            .expect("a block fills its vectors")
    }

    /// Where the block's channels of a pooled column go, vector by vector.
    #[inline]
    fn pixel<'o, const LANES: usize, const VECTORS: usize>(
        &self,
        column: usize,
        out: &'o mut [u8],
    ) -> &'o mut [[u8; LANES]; VECTORS] {
        let pixel = &mut out[column * self.out_stride..];
        pixel
            .as_chunks_mut()
            .0
            .first_chunk_mut()
            .expect("the output row holds every pixel")
    }
}

/// The activations under one kernel row, for each position of a pooling window.
///
/// Lengths are checked when it is made, so that the innermost loops, bounded by `n_steps`, run without checks.
struct Window<'a, const STEP: usize> {
    /// Each `n_steps` long.
    steps: [&'a [[u8; STEP]]; POSITIONS],
    n_steps: usize,
}

impl<'a, const STEP: usize> Window<'a, STEP> {
    /// One step at one position.
    #[inline]
    fn at(&self, position: usize, step: usize) -> &'a [u8; STEP] {
        assert!(step < self.n_steps, "a step of the kernel row");
        // SAFETY: every slice is `n_steps` long since it was made, and `step` is below.
        unsafe { self.steps[position].get_unchecked(step) }
    }
}

/// Convolves, adds the bias, pools 2 x 2, requantizes: one row of one block of channels.
///
/// `out[column x out_stride + channel]` is written for each pooled column and each channel of the block.
///
/// # Panics
///
/// When this CPU lacks the kernel's instructions, or a slice is shorter than [`ConvRow`] says.
pub(crate) fn conv_row(kernel: Kernel, row: &ConvRow<'_>, out: &mut [u8]) {
    assert!(kernel.is_available(), "kernel {kernel} runs on this CPU");
    match kernel {
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => unsafe { avx2::conv_row(row, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::AvxVnni => unsafe { avxvnni::conv_row(row, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512Vnni => unsafe { avx512vnni::conv_row(row, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::Neon => unsafe { neon::conv_row(row, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::NeonDot => unsafe { neon_dot::conv_row(row, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::NeonI8mm => unsafe { neon_i8mm::conv_row(row, out) },
        _ => scalar::conv_row(row, out),
    }
}

/// Convolves, adds the bias, requantizes, without a pool: the two rows of positions under one pooled row of one block of channels.
///
/// `out[r][column x out_stride + channel]` is written for both rows, each of the block's channels, and twice as many columns as pooled ones.
///
/// # Panics
///
/// When this CPU lacks the kernel's instructions, the kernel is not [`Kernel::without_pool`], or a slice is shorter than [`ConvRow`] says.
pub(crate) fn conv_rows(kernel: Kernel, row: &ConvRow<'_>, levels: Levels, out: [&mut [u8]; 2]) {
    assert!(kernel.is_available(), "kernel {kernel} runs on this CPU");
    match kernel {
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => unsafe { avx2::conv_rows(row, levels, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::AvxVnni => unsafe { avxvnni::conv_rows(row, levels, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::Neon => unsafe { neon::conv_rows(row, levels, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::NeonDot => unsafe { neon_dot::conv_rows(row, levels, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::NeonI8mm => unsafe { neon_i8mm::conv_rows(row, levels, out) },
        Kernel::Scalar => scalar::conv_rows(row, levels, out),
        _ => panic!("kernel {kernel} convolves with a pool only"),
    }
}

/// The inputs of one pooled output row of a layer packed for Winograd.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "Winograd in integers pays with AVX2 alone")
)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct WinogradRow<'a> {
    /// The layer.
    pub(crate) layer: &'a WinogradLayer,
    /// Four input rows, `[column, channel]`.
    pub(crate) rows: [&'a [u8]; 4],
    /// Bytes from one input pixel to the next in its row.
    pub(crate) column_bytes: usize,
    /// Pooled columns to compute.
    pub(crate) n_columns: usize,
    /// Bytes from one pooled pixel to the next.
    pub(crate) out_stride: usize,
}

/// As [`conv_row`], for all channels of a layer for which [`Kernel::winograd_channels`] gave the blocks.
///
/// # Panics
///
/// When this CPU lacks the kernel's instructions, the kernel has no such algorithm, or a slice is too short.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(unused_variables, reason = "Winograd in integers pays with AVX2 alone")
)]
pub(crate) fn winograd_row(
    kernel: Kernel,
    row: &WinogradRow<'_>,
    scratch: &mut WinogradScratch,
    out: &mut [u8],
) {
    assert!(kernel.is_available(), "kernel {kernel} runs on this CPU");
    match kernel {
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => unsafe { avx2::winograd_row(row, scratch, out) },
        _ => panic!("kernel {kernel} has no 16-bit multiplication that pays"),
    }
}

/// Accumulators of consecutive neurons of a dense layer: `sums[n] = sum of activations x weights[n, ..]`.
///
/// `weights` is `[neuron, activation]` s8, as in the model file.
///
/// # Panics
///
/// When this CPU lacks the kernel's instructions, `activations` is empty, or `weights` is not `sums.len() x
/// activations.len()` long.
pub(crate) fn dense(kernel: Kernel, activations: &[u8], weights: &[u8], sums: &mut [i32]) {
    assert!(kernel.is_available(), "kernel {kernel} runs on this CPU");
    assert!(!activations.is_empty(), "a dense layer has inputs");
    assert_eq!(
        weights.len(),
        sums.len() * activations.len(),
        "weights fit activations and neurons"
    );
    match kernel {
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx2 => unsafe { avx2::dense(activations, weights, sums) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::AvxVnni => unsafe { avxvnni::dense(activations, weights, sums) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512Vnni => unsafe { avx512vnni::dense(activations, weights, sums) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::Neon => unsafe { neon::dense(activations, weights, sums) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::NeonDot => unsafe { neon_dot::dense(activations, weights, sums) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        Kernel::NeonI8mm => unsafe { neon_i8mm::dense(activations, weights, sums) },
        _ => scalar::dense(activations, weights, sums),
    }
}
