//! The arithmetic of float files: once as a definition, once per width of vector.
//!
//! In: the u8 image's lines, rows of f32 activations `[column, channel]`, packed weights. Out: pooled rows, sums of neurons. The bits differ
//! between kernels, because sums are taken in different orders; against the definition (`scalar.rs`: direct sums in f64, rounded once) an output is off
//! by at most about 1e-6 of the sum of its products' magnitudes (`tests.rs`). `body.rs` has the one body of all vector kernels.
//!
//! Layers but the first run by Winograd F(4 x 4, 3 x 3) (Lavin and Gray, arXiv 1509.09308, section 4.2): 36 products for a tile of 4 x 4 outputs,
//! which is 2 x 2 pooling windows, in place of 144.

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::fmt;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod body;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packing;
mod scalar;
#[cfg(test)]
mod tests;

use super::Kernel;
use super::winograd::parts;
use packing::{FirstBlock, FirstLayer, WinogradLayer};

/// Side of the activations under one tile.
pub(crate) const SIDE: usize = 6;

/// Side of a tile's outputs before the pool.
pub(crate) const OUTPUTS: usize = 4;

/// Products for one tile.
const FREQUENCIES: usize = SIDE * SIDE;

/// Tiles whose sums stand in registers at once.
const TILES: usize = 6;

/// Floats of weights between those at work and those asked for ahead.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "the other kernels leave it to the hardware")
)]
const PREFETCH: usize = 512;

/// Neurons of a dense layer that are summed side by side.
const NEURONS: usize = 8;

/// Features of a dense layer after which the sums of lanes are added up.
const DENSE_CHUNK: usize = 2048;

/// An implementation of the float arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FloatKernel {
    /// Plain Rust, f64: the definition.
    Scalar,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512F.
    Avx512,
    /// Any aarch64.
    Neon,
}

/// Every kernel, the preferred ones last.
const ALL: [FloatKernel; 4] = [
    FloatKernel::Scalar,
    FloatKernel::Avx2,
    FloatKernel::Avx512,
    FloatKernel::Neon,
];

/// How a kernel wants its weights: blocks of channels, each of so many vectors or fewer.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    lanes: usize,
    direct_vectors: usize,
    gemm_vectors: usize,
}

impl FloatKernel {
    /// Whether this CPU can run the kernel.
    pub(crate) fn is_available(self) -> bool {
        match self {
            FloatKernel::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            FloatKernel::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            FloatKernel::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "aarch64")]
            FloatKernel::Neon => is_aarch64_feature_detected!("neon"),
            #[allow(
                unreachable_patterns,
                reason = "covers the kernels of the other architecture"
            )]
            _ => false,
        }
    }

    /// The kernels that this CPU can run, the fastest last.
    pub(crate) fn available() -> impl Iterator<Item = FloatKernel> {
        ALL.into_iter().filter(|kernel| kernel.is_available())
    }

    /// The float kernel of the same instruction set, `None` for the fastest of this CPU; refused where it cannot run.
    pub(crate) fn like(kernel: Option<Kernel>) -> Option<Self> {
        let like = match kernel {
            None => return Self::available().last(),
            Some(Kernel::Scalar) => FloatKernel::Scalar,
            Some(Kernel::Avx2 | Kernel::AvxVnni) => FloatKernel::Avx2,
            Some(Kernel::Avx512Vnni) => FloatKernel::Avx512,
            Some(Kernel::Neon | Kernel::NeonDot | Kernel::NeonI8mm) => FloatKernel::Neon,
        };
        like.is_available().then_some(like)
    }

    fn geometry(self) -> Option<Geometry> {
        match self {
            #[cfg(target_arch = "x86_64")]
            FloatKernel::Avx2 => Some(avx2::GEOMETRY),
            #[cfg(target_arch = "x86_64")]
            FloatKernel::Avx512 => Some(avx512::GEOMETRY),
            #[cfg(target_arch = "aarch64")]
            FloatKernel::Neon => Some(neon::GEOMETRY),
            _ => None,
        }
    }

    /// Multiplies `repetitions` times in registers and nothing else; returns the multiply-accumulates done, `None` for scalar code.
    pub(super) fn peak(self, repetitions: u32) -> Option<u32> {
        assert!(self.is_available(), "kernel {self} runs on this CPU");
        match self {
            // SAFETY: the CPU has the instructions, asserted above.
            #[cfg(target_arch = "x86_64")]
            FloatKernel::Avx2 => Some(unsafe { avx2::peak(repetitions) }),
            // SAFETY: the CPU has the instructions, asserted above.
            #[cfg(target_arch = "x86_64")]
            FloatKernel::Avx512 => Some(unsafe { avx512::peak(repetitions) }),
            // SAFETY: the CPU has the instructions, asserted above.
            #[cfg(target_arch = "aarch64")]
            FloatKernel::Neon => Some(unsafe { neon::peak(repetitions) }),
            _ => None,
        }
    }
}

impl fmt::Display for FloatKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FloatKernel::Scalar => "scalar",
            FloatKernel::Avx2 => "avx2",
            FloatKernel::Avx512 => "avx512",
            FloatKernel::Neon => "neon",
        })
    }
}

/// The parameters of a 3 x 3 convolution as in the file.
#[derive(Clone, Debug)]
pub(crate) struct Filters {
    /// `[output, input, row, column]`.
    pub(crate) weights: Vec<f32>,
    pub(crate) n_inputs: usize,
    pub(crate) bias: Vec<f32>,
}

impl Filters {
    fn n_outputs(&self) -> usize {
        self.bias.len()
    }
}

/// A convolution, packed for a kernel.
#[derive(Debug)]
pub(crate) struct FloatLayer {
    kernel: FloatKernel,
    weights: Weights,
    n_outputs: usize,
}

#[derive(Debug)]
enum Weights {
    Definition(Filters),
    First(FirstLayer),
    Winograd(WinogradLayer),
}

/// Lines of an image under one pooled row: `[line, channel, column]`, four lines, and one float more, which may be anything.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ImageLines<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) channels: usize,
    pub(crate) columns: usize,
}

impl ImageLines<'_> {
    /// The taps under each position of each window, `[column, position, (channel, row, column)]`, each patch with a spare float at its end.
    ///
    /// Four floats are copied for each three, of which the next three overwrite the fourth.
    fn gather(&self, patches: &mut [f32]) {
        let patch = 9 * self.channels + 1;
        for (window, patches) in patches.chunks_exact_mut(4 * patch).enumerate() {
            for (position, patch) in patches.chunks_exact_mut(patch).enumerate() {
                for triple in 0..3 * self.channels {
                    let (channel, row) = (triple / 3, position / 2 + triple % 3);
                    let line = (row * self.channels + channel) * self.columns;
                    let pixels = &self.values[line + 2 * window + position % 2..][..4];
                    patch[3 * triple..][..4].copy_from_slice(pixels);
                }
            }
        }
    }
}

/// Memory for one thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// Patches under a row of the first layer.
    patches: Vec<f32>,
    /// Transformed activations `[frequency][tile][input]`.
    activations: Vec<f32>,
    /// Sums of products `[frequency][tile][output]`.
    sums: Vec<f32>,
}

impl Scratch {
    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        4 * (self.patches.len() + self.activations.len() + self.sums.len())
    }
}

impl FloatLayer {
    /// Packs a layer; the first one reads the image.
    pub(crate) fn new(kernel: FloatKernel, filters: Filters, is_first: bool) -> Self {
        Self {
            kernel,
            n_outputs: filters.n_outputs(),
            weights: match kernel.geometry() {
                None => Weights::Definition(filters),
                Some(geometry) if is_first => Weights::First(FirstLayer::new(&filters, geometry)),
                Some(geometry) => Weights::Winograd(WinogradLayer::new(&filters, geometry)),
            },
        }
    }

    /// Floats from one pooled pixel to the next.
    pub(crate) fn out_stride(&self) -> usize {
        match &self.weights {
            Weights::Definition(filters) => filters.n_outputs(),
            Weights::First(layer) => layer.out_stride,
            Weights::Winograd(layer) => layer.out_stride,
        }
    }

    /// Output channels.
    pub(crate) fn n_outputs(&self) -> usize {
        self.n_outputs
    }

    /// What the layer runs as.
    pub(crate) fn algorithm(&self) -> &'static str {
        match &self.weights {
            Weights::Winograd(_) => "f32 Winograd convolution + ReLU + max pool",
            _ => "f32 convolution + ReLU + max pool",
        }
    }

    /// Bytes of weights and biases.
    pub(crate) fn parameter_bytes(&self) -> usize {
        match &self.weights {
            Weights::Definition(filters) => 4 * (filters.weights.len() + filters.bias.len()),
            Weights::First(layer) => layer.bytes(),
            Weights::Winograd(layer) => layer.bytes(),
        }
    }

    /// Makes the scratch memory large enough for rows of so many pooled columns.
    pub(crate) fn reserve(&self, n_columns: usize, scratch: &mut Scratch) {
        let grow = |values: &mut Vec<f32>, n: usize| values.resize(values.len().max(n), 0.0);
        match &self.weights {
            Weights::Definition(_) => {}
            Weights::First(layer) => {
                grow(&mut scratch.patches, 4 * n_columns * layer.patch_length());
            }
            Weights::Winograd(layer) => {
                let n = FREQUENCIES * n_columns.div_ceil(2);
                grow(&mut scratch.activations, n * layer.in_stride);
                grow(&mut scratch.sums, n * layer.out_stride);
            }
        }
    }
}

/// One pooled row of the first convolution, all channels: as many columns as `out` has pixels.
///
/// # Panics
///
/// When the layer was not packed as the first, or a slice is too short.
pub(crate) fn first_row(
    layer: &FloatLayer,
    lines: &ImageLines<'_>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    assert!(
        layer.kernel.is_available(),
        "kernel {} runs on this CPU",
        layer.kernel
    );
    let kernel = layer.kernel;
    let layer = match &layer.weights {
        Weights::Definition(filters) => return scalar::first_row(filters, lines, out),
        Weights::First(layer) => layer,
        Weights::Winograd(_) => panic!("the layer was not packed as the first"),
    };
    let n_patches = 4 * (out.len() / layer.out_stride);
    let patches = &mut scratch.patches[..n_patches * layer.patch_length()];
    lines.gather(patches);
    match kernel {
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        FloatKernel::Avx2 => unsafe { avx2::first_row(layer, patches, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        FloatKernel::Avx512 => unsafe { avx512::first_row(layer, patches, out) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        FloatKernel::Neon => unsafe { neon::first_row(layer, patches, out) },
        _ => panic!("kernel {kernel} packs no first layer"),
    }
}

/// Two pooled rows of a later convolution, all channels: as many columns as the first of `out` has pixels; the second may be empty.
///
/// Each of `rows` covers four columns of pixels for each two of `out`, and two more.
///
/// # Panics
///
/// When the layer was packed as the first, or a slice is too short.
pub(crate) fn convolve_rows(
    layer: &FloatLayer,
    rows: &[&[f32]; SIDE],
    scratch: &mut Scratch,
    out: [&mut [f32]; 2],
) {
    assert!(
        layer.kernel.is_available(),
        "kernel {} runs on this CPU",
        layer.kernel
    );
    match (layer.kernel, &layer.weights) {
        (_, Weights::Definition(filters)) => scalar::convolve_rows(filters, rows, out),
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        (FloatKernel::Avx2, Weights::Winograd(layer)) => unsafe {
            avx2::convolve_rows(layer, rows, scratch, out)
        },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        (FloatKernel::Avx512, Weights::Winograd(layer)) => unsafe {
            avx512::convolve_rows(layer, rows, scratch, out)
        },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        (FloatKernel::Neon, Weights::Winograd(layer)) => unsafe {
            neon::convolve_rows(layer, rows, scratch, out)
        },
        _ => panic!("the layer was packed as the first"),
    }
}

/// Sums of consecutive neurons of a dense layer: `sums[n] = sum of features x weights[n, ..]`, `weights` being `[neuron, feature]`.
///
/// # Panics
///
/// When this CPU lacks the kernel's instructions, `features` is empty, or `weights` is not `sums.len() x features.len()` long.
pub(crate) fn dense(kernel: FloatKernel, features: &[f32], weights: &[f32], sums: &mut [f32]) {
    assert!(kernel.is_available(), "kernel {kernel} runs on this CPU");
    assert!(!features.is_empty(), "a dense layer has inputs");
    assert_eq!(
        weights.len(),
        sums.len() * features.len(),
        "weights fit features and neurons"
    );
    match kernel {
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        FloatKernel::Avx2 => unsafe { avx2::dense(features, weights, sums) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "x86_64")]
        FloatKernel::Avx512 => unsafe { avx512::dense(features, weights, sums) },
        // SAFETY: the CPU has the instructions, asserted above.
        #[cfg(target_arch = "aarch64")]
        FloatKernel::Neon => unsafe { neon::dense(features, weights, sums) },
        _ => scalar::dense(features, weights, sums),
    }
}
