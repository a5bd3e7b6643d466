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

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::fmt;
use std::str::FromStr;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
mod cpu_time;
pub(crate) mod float;
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
pub(crate) use packing::{PackedBlock, Unpacked, pack};
pub(crate) use peak::{float_peak_macs_per_second, peak_macs_per_second};
pub(crate) use winograd::{WinogradLayer, WinogradScratch, is_exact};

/// An implementation of the arithmetic for one instruction set. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Plain Rust: the definition.
    Scalar,
    /// x86-64 with AVX2: widening to 16 bit, `vpmaddwd`.
    Avx2,
    /// x86-64 with AVX-VNNI: `vpdpbusd` on 256 bit.
    AvxVnni,
    /// x86-64 with AVX-512 VNNI: `vpdpbusd` on 512 bit.
    Avx512Vnni,
    /// Any aarch64: `smull`, `smlal`, `sadalp`.
    Neon,
    /// aarch64 with dot product: `sdot`.
    NeonDot,
    /// aarch64 with 8-bit matrix multiplication: `usmmla`.
    NeonI8mm,
}

impl Kernel {
    /// Every kernel, the preferred ones last.
    pub const ALL: [Kernel; 7] = [
        Kernel::Scalar,
        Kernel::Avx2,
        Kernel::AvxVnni,
        Kernel::Avx512Vnni,
        Kernel::Neon,
        Kernel::NeonDot,
        Kernel::NeonI8mm,
    ];

    /// Whether this CPU can run the kernel.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Kernel::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Kernel::AvxVnni => {
                is_x86_feature_detected!("avxvnni") && is_x86_feature_detected!("avx2")
            }
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon => is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonDot => {
                is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")
            }
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonI8mm => {
                is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("i8mm")
            }
            #[allow(
                unreachable_patterns,
                reason = "covers the kernels of the other architecture"
            )]
            _ => false,
        }
    }

    /// The kernels that this CPU can run, the fastest last.
    pub fn available() -> impl Iterator<Item = Kernel> {
        Kernel::ALL
            .into_iter()
            .filter(|kernel| kernel.is_available())
    }

    /// The fastest kernel that this CPU can run.
    #[must_use]
    pub fn fastest() -> Kernel {
        Kernel::available().last().unwrap_or(Kernel::Scalar)
    }

    /// The name on the command line, lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Scalar => "scalar",
            Kernel::Avx2 => "avx2",
            Kernel::AvxVnni => "avxvnni",
            Kernel::Avx512Vnni => "avx512vnni",
            Kernel::Neon => "neon",
            Kernel::NeonDot => "neon-dot",
            Kernel::NeonI8mm => "neon-i8mm",
        }
    }

    /// Channels of a block of a 3 x 3 layer of so many input channels that this kernel runs fastest by Winograd; `None` where it
    /// does not. With `vpdpbusd`, which multiplies twice as many 8-bit as 16-bit pairs, a gain of 9/8 would be left, and reading
    /// 3.5 times the weights from the third level of the cache costs as much.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "Winograd in integers pays with AVX2 alone")
    )]
    pub(crate) fn winograd_channels(self, n_inputs: usize) -> Option<usize> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 if n_inputs >= 8 => Some(avx2::WINOGRAD_CHANNELS),
            _ => None,
        }
    }

    /// How this kernel wants its weights.
    pub(crate) fn geometry(self) -> Geometry {
        match self {
            Kernel::Scalar => scalar::GEOMETRY,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::GEOMETRY,
            #[cfg(target_arch = "x86_64")]
            Kernel::AvxVnni => avxvnni::GEOMETRY,
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512Vnni => avx512vnni::GEOMETRY,
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon => neon::GEOMETRY,
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonDot => neon_dot::GEOMETRY,
            #[cfg(target_arch = "aarch64")]
            Kernel::NeonI8mm => neon_i8mm::GEOMETRY,
            #[allow(
                unreachable_patterns,
                reason = "covers the kernels of the other architecture"
            )]
            _ => scalar::GEOMETRY,
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A word that names no kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "kernel {found:?} is unknown (known: scalar, avx2, avxvnni, avx512vnni, neon, neon-dot, neon-i8mm)"
)]
pub struct UnknownKernel {
    found: String,
}

impl FromStr for Kernel {
    type Err = UnknownKernel;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Kernel::ALL
            .into_iter()
            .find(|kernel| kernel.name() == name)
            .ok_or_else(|| UnknownKernel {
                found: name.to_owned(),
            })
    }
}

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
