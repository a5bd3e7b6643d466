//! The kernels by name: which there are, which this CPU runs, how each wants its weights.

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
use std::fmt;
use std::str::FromStr;

use super::{Geometry, scalar};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512vnni, avxvnni};
#[cfg(target_arch = "aarch64")]
use super::{neon, neon_dot, neon_i8mm};

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

    /// The kernel that convolves without a pool in place of this one.
    pub(crate) fn without_pool(self) -> Self {
        match self {
            Kernel::Avx512Vnni if Kernel::AvxVnni.is_available() => Kernel::AvxVnni,
            Kernel::Avx512Vnni => Kernel::Avx2,
            kernel => kernel,
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
