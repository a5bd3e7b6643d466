//! Any aarch64: 4 lanes, 32 registers. A tile of products is 6 tiles by 16 channels: 24 sums, 4 weights, activations one at a time.
#![allow(
    unsafe_code,
    reason = "loads and stores of whole vectors, through references to arrays of their size"
)]

use std::arch::aarch64::{
    float32x4_t, vaddq_f32, vaddvq_f32, vdupq_n_f32, vfmaq_f32, vld1q_f32, vmaxq_f32, vmulq_f32,
    vst1q_f32, vsubq_f32,
};
use std::hint::black_box;

use super::body::float_body;
use super::{
    DENSE_CHUNK, FREQUENCIES, FirstBlock, FirstLayer, Geometry, NEURONS, OUTPUTS, SIDE, Scratch,
    TILES, WinogradLayer, parts,
};

/// Lanes of a vector.
const LANES: usize = 4;

type Vector = float32x4_t;

/// How this kernel wants its weights.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: LANES,
    direct_vectors: 4,
    gemm_vectors: 4,
};

float_body!("neon", gemm: [1, 2, 3, 4], direct: [1, 2, 3, 4]);

#[inline]
#[target_feature(enable = "neon")]
fn zero() -> Vector {
    vdupq_n_f32(0.0)
}

#[inline]
#[target_feature(enable = "neon")]
fn splat(value: f32) -> Vector {
    vdupq_n_f32(value)
}

#[inline]
#[target_feature(enable = "neon")]
fn load(values: &[f32; LANES]) -> Vector {
    // SAFETY: the reference covers the 16 bytes that are read.
    unsafe { vld1q_f32(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store(values: &mut [f32; LANES], vector: Vector) {
    // SAFETY: the reference covers the 16 bytes that are written.
    unsafe { vst1q_f32(values.as_mut_ptr(), vector) }
}

#[inline]
#[target_feature(enable = "neon")]
fn add(a: Vector, b: Vector) -> Vector {
    vaddq_f32(a, b)
}

#[inline]
#[target_feature(enable = "neon")]
fn sub(a: Vector, b: Vector) -> Vector {
    vsubq_f32(a, b)
}

#[inline]
#[target_feature(enable = "neon")]
fn product(a: Vector, b: Vector) -> Vector {
    vmulq_f32(a, b)
}

/// `a x b + c`, one rounding.
#[inline]
#[target_feature(enable = "neon")]
fn multiply_add(a: Vector, b: Vector, c: Vector) -> Vector {
    vfmaq_f32(c, a, b)
}

#[inline]
#[target_feature(enable = "neon")]
fn max(a: Vector, b: Vector) -> Vector {
    vmaxq_f32(a, b)
}

#[inline]
#[target_feature(enable = "neon")]
fn sum_of_lanes(vector: Vector) -> f32 {
    vaddvq_f32(vector)
}

/// Left to the hardware: the intrinsic is unstable in Rust 1.95.
#[inline]
fn prefetch(_weights: &[f32]) {}
