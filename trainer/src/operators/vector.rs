//! The few vector instructions that the convolution needs, for AVX-512, AVX2 and any CPU.
//!
//! The portable implementation is the definition; the others fuse the multiplication and the addition (one rounding
//! instead of two), so results may differ in the last bits between kinds of CPU, never between runs on one.
#![expect(
    unsafe_code,
    reason = "vector intrinsics on raw pointers; the convolution states the bounds"
)]

/// Which vectors this CPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instructions {
    /// 16 lanes, fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 8 lanes, fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 8 lanes in plain Rust.
    Portable,
}

impl Instructions {
    /// The widest that this CPU runs.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// A vector of f32. Every method may only run on a CPU that has the implementation's instructions.
pub(crate) trait Vector: Copy {
    /// How many f32 it holds; divides 16.
    const LANES: usize;
    /// Vectors of output channels in one register tile of the forward pass.
    const TILE: usize;

    /// All lanes `value`.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn splat(value: f32) -> Self;
    /// # Safety
    /// The CPU has the instructions and `LANES` values can be read at `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// The CPU has the instructions and `LANES` values can be written at `to`.
    unsafe fn store(self, to: *mut f32);
    /// `self * factor + sum`.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self;
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn add(self, other: Self) -> Self;
    /// Lane by lane: writes max(0, largest of `window`) to `pooled` and the index of its first maximum, or 4 where
    /// that maximum is not above 0, to `argmax`.
    ///
    /// # Safety
    /// The CPU has the instructions; `LANES` values can be written at both places.
    unsafe fn pool(window: [Self; 4], pooled: *mut f32, argmax: *mut u8);
}

/// 8 lanes in plain Rust.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Vector for Portable {
    const LANES: usize = 8;
    const TILE: usize = 1;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 8])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for LANES readable values.
        Self(unsafe { from.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for LANES writable values.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            self.0[lane] * factor.0[lane] + sum.0[lane]
        }))
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
    }
    #[inline(always)]
    unsafe fn pool(window: [Self; 4], pooled: *mut f32, argmax: *mut u8) {
        let (mut values, mut indices) = ([0f32; 8], [4u8; 8]);
        for lane in 0..8 {
            let mut largest = window[0].0[lane];
            let mut first = 0u8;
            for (index, candidate) in (1u8..).zip(&window[1..]) {
                if candidate.0[lane] > largest {
                    largest = candidate.0[lane];
                    first = index;
                }
            }
            if largest > 0.0 {
                values[lane] = largest;
                indices[lane] = first;
            }
        }
        // SAFETY: the caller vouches for LANES writable values at `pooled`.
        unsafe { pooled.cast::<[f32; 8]>().write_unaligned(values) }
        // SAFETY: the caller vouches for LANES writable values at `argmax`.
        unsafe { argmax.cast::<[u8; 8]>().write_unaligned(indices) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::{
        __m256, __m512, _CMP_GT_OQ, _mm_storeu_si128, _mm256_add_ps, _mm256_and_ps,
        _mm256_blendv_ps, _mm256_cmp_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps,
        _mm256_setzero_ps, _mm256_storeu_ps, _mm512_add_ps, _mm512_cmp_ps_mask,
        _mm512_cvtepi32_epi8, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_mov_epi32,
        _mm512_mask_mov_ps, _mm512_maskz_mov_ps, _mm512_set1_epi32, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_setzero_si512, _mm512_storeu_ps,
    };

    /// 16 lanes.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    impl Vector for Avx512 {
        const LANES: usize = 16;
        const TILE: usize = 2;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller vouches for AVX-512F.
            Self(unsafe { _mm512_set1_ps(value) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller vouches for AVX-512F and 16 readable values.
            Self(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller vouches for AVX-512F and 16 writable values.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
            // SAFETY: the caller vouches for AVX-512F.
            Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, sum.0) })
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the caller vouches for AVX-512F.
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        #[expect(
            clippy::multiple_unsafe_ops_per_block,
            reason = "register arithmetic, all of it under the same condition"
        )]
        unsafe fn pool(window: [Self; 4], pooled: *mut f32, argmax: *mut u8) {
            // SAFETY: the caller vouches for AVX-512F; register arithmetic only.
            let (values, indices) = unsafe {
                let mut largest = window[0].0;
                let mut first = _mm512_setzero_si512();
                for (index, candidate) in (1..).zip(&window[1..]) {
                    let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(candidate.0, largest);
                    largest = _mm512_mask_mov_ps(largest, above, candidate.0);
                    first = _mm512_mask_mov_epi32(first, above, _mm512_set1_epi32(index));
                }
                let open = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(largest, _mm512_setzero_ps());
                (
                    _mm512_maskz_mov_ps(open, largest),
                    _mm512_cvtepi32_epi8(_mm512_mask_mov_epi32(_mm512_set1_epi32(4), open, first)),
                )
            };
            // SAFETY: the caller vouches for 16 writable values at `pooled`.
            unsafe { _mm512_storeu_ps(pooled, values) }
            // SAFETY: the caller vouches for 16 writable values at `argmax`.
            unsafe { _mm_storeu_si128(argmax.cast(), indices) }
        }
    }

    /// 8 lanes.
    #[derive(Debug, Clone, Copy)]
    pub(crate) struct Avx2(__m256);

    impl Vector for Avx2 {
        const LANES: usize = 8;
        const TILE: usize = 1;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            // SAFETY: the caller vouches for AVX2.
            Self(unsafe { _mm256_set1_ps(value) })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: the caller vouches for AVX2 and 8 readable values.
            Self(unsafe { _mm256_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the caller vouches for AVX2 and 8 writable values.
            unsafe { _mm256_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
            // SAFETY: the caller vouches for FMA.
            Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, sum.0) })
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the caller vouches for AVX2.
            Self(unsafe { _mm256_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        #[expect(
            clippy::multiple_unsafe_ops_per_block,
            reason = "register arithmetic, all of it under the same condition"
        )]
        unsafe fn pool(window: [Self; 4], pooled: *mut f32, argmax: *mut u8) {
            let mut indices = [0f32; 8];
            // SAFETY: the caller vouches for AVX2; `indices` holds 8 values.
            let values = unsafe {
                let mut largest = window[0].0;
                let mut first = _mm256_setzero_ps();
                for (index, candidate) in [1.0, 2.0, 3.0].into_iter().zip(&window[1..]) {
                    let above = _mm256_cmp_ps::<_CMP_GT_OQ>(candidate.0, largest);
                    largest = _mm256_blendv_ps(largest, candidate.0, above);
                    first = _mm256_blendv_ps(first, _mm256_set1_ps(index), above);
                }
                let open = _mm256_cmp_ps::<_CMP_GT_OQ>(largest, _mm256_setzero_ps());
                _mm256_storeu_ps(
                    indices.as_mut_ptr(),
                    _mm256_blendv_ps(_mm256_set1_ps(4.0), first, open),
                );
                _mm256_and_ps(largest, open)
            };
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "whole numbers from 0 to 4"
            )]
            let indices = indices.map(|index| index as u8);
            // SAFETY: the caller vouches for 8 writable values at `pooled`.
            unsafe { _mm256_storeu_ps(pooled, values) }
            // SAFETY: the caller vouches for 8 writable values at `argmax`.
            unsafe { argmax.cast::<[u8; 8]>().write_unaligned(indices) }
        }
    }
}
