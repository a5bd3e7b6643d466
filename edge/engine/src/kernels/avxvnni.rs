//! x86-64 with AVX-VNNI: `vpdpbusd` multiplies 32 u8 x s8 pairs and adds them to 8 sums in one instruction.
//!
//! A tile is one 2 x 2 window by 24 output channels: 12 of the 16 registers hold sums, three hold weights, one a broadcast of four
//! activations. Twelve sums under way hide the instruction's latency.

use std::arch::x86_64::{
    __m256i, _mm256_dpbusd_avx_epi32, _mm256_set1_epi32, _mm256_setzero_si256,
};

use std::hint::black_box;

use super::avx2::{load, load_i32, pool_and_store, requantize_and_store, sum_of_lanes};
use super::tile256::tile_256;
use super::{ConvRow, Geometry, Levels, POSITIONS, WeightFormat, scalar};

/// 8 channels a vector, three vectors a block, four activations a step.
pub(super) const GEOMETRY: Geometry = Geometry {
    lanes: 8,
    max_vectors: 3,
    group: 4,
    step: 4,
    weight: WeightFormat::Bytes,
    is_offset: false,
};

tile_256!("avx2,avxvnni", 32, add_products);

/// Four activations of a position times their weights, added to its sums.
#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn add_products<const VECTORS: usize>(
    sums: &mut [__m256i; VECTORS],
    quad: &[u8; 4],
    weights: &[[u8; 32]; VECTORS],
) {
    let activations = _mm256_set1_epi32(i32::from_le_bytes(*quad));
    for (sum, weights) in sums.iter_mut().zip(weights) {
        *sum = _mm256_dpbusd_avx_epi32(*sum, activations, load(weights));
    }
}

/// See [`super::dense`].
#[target_feature(enable = "avx2,avxvnni")]
pub(super) fn dense(activations: &[u8], weights: &[u8], sums: &mut [i32]) {
    for (sum, weights) in sums.iter_mut().zip(weights.chunks_exact(activations.len())) {
        *sum = neuron(activations, weights);
    }
}

#[target_feature(enable = "avx2,avxvnni")]
fn neuron(activations: &[u8], weights: &[u8]) -> i32 {
    let (vectors, rest) = activations.as_chunks::<32>();
    let (weight_vectors, weight_rest) = weights.as_chunks::<32>();
    let mut sums = [_mm256_setzero_si256(); 4];
    for (activations, weights) in vectors.chunks(4).zip(weight_vectors.chunks(4)) {
        for ((sum, activations), weights) in sums.iter_mut().zip(activations).zip(weights) {
            *sum = _mm256_dpbusd_avx_epi32(*sum, load(activations), load(weights));
        }
    }
    sums.into_iter().map(|sum| sum_of_lanes(sum)).sum::<i32>() + scalar::dot(rest, weight_rest)
}

/// Multiplies in 12 registers, as a tile does, without loads; returns the multiply-accumulates done.
#[target_feature(enable = "avx2,avxvnni")]
pub(super) fn peak(repetitions: u32) -> u32 {
    const SUMS: u32 = 12;
    let ones = black_box(_mm256_set1_epi32(0x0101_0101));
    let mut sums = [_mm256_setzero_si256(); SUMS as usize];
    for _ in 0..repetitions {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, ones, ones);
        }
    }
    black_box(sums);
    repetitions * SUMS * 32
}
