//! The first dense layer by cuBLAS: output before bias, gradient of its input, gradient of its weights.
//!
//! cuBLAS sees matrices column after column; a row-major `[a, b]` is its `b x a`. Products are summed in f32, also where a product is bf16 and its sum is made in
//! several parts.
#![expect(
    unsafe_code,
    reason = "calls of cuBLAS on memory whose lengths the layout gives"
)]

use std::ffi::c_void;
use std::sync::Arc;

use anyhow::{Context, Result};
use cudarc::cublas::sys::{
    self, cublasComputeType_t, cublasGemmAlgo_t, cublasHandle_t, cublasOperation_t, cudaDataType,
};
use cudarc::cublas::{CudaBlas, result};
use cudarc::driver::CudaStream;

use super::device::{Device, int};
use crate::train::Precision;

/// cuBLAS on a device's stream.
#[derive(Debug)]
pub(crate) struct Dense {
    blas: CudaBlas,
    storage: cudaDataType,
    _stream: Arc<CudaStream>,
}

/// A factor: its memory, whether it is transposed, its rows in memory.
type Factor = (u64, bool, usize);

impl Dense {
    pub(crate) fn new(device: &Device, precision: Precision) -> Result<Self> {
        let blas = CudaBlas::new(device.stream.clone()).context("starting cuBLAS")?;
        // SAFETY: the handle is open.
        unsafe {
            sys::cublasSetMathMode(
                *blas.handle(),
                sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION,
            )
        }
        .result()
        .context("starting cuBLAS")?;
        Ok(Self {
            blas,
            storage: match precision {
                Precision::Bf16 => cudaDataType::CUDA_R_16BF,
                Precision::F32 => cudaDataType::CUDA_R_32F,
            },
            _stream: device.stream.clone(),
        })
    }

    /// `output[image, unit] = input[image, ..] . weight[unit, ..]`, f32.
    pub(crate) fn forward(
        &self,
        (n, units, flat): (usize, usize, usize),
        input: u64,
        weight: u64,
        output: u64,
    ) -> Result<()> {
        let product = (output, cudaDataType::CUDA_R_32F, units);
        self.multiply(
            (units, n, flat),
            (weight, true, flat),
            (input, false, flat),
            product,
        )
    }

    /// `gradient[image, ..] = sum over units of output_gradient[image, unit] weight[unit, ..]`, stored as activations are.
    pub(crate) fn input_gradient(
        &self,
        (n, units, flat): (usize, usize, usize),
        output_gradient: u64,
        weight: u64,
        gradient: u64,
    ) -> Result<()> {
        let product = (gradient, self.storage, flat);
        self.multiply(
            (flat, n, units),
            (weight, false, flat),
            (output_gradient, false, units),
            product,
        )
    }

    /// `gradient[unit, ..] = sum over images of output_gradient[image, unit] input[image, ..]`, f32.
    pub(crate) fn weight_gradient(
        &self,
        (n, units, flat): (usize, usize, usize),
        output_gradient: u64,
        input: u64,
        gradient: u64,
    ) -> Result<()> {
        let product = (gradient, cudaDataType::CUDA_R_32F, flat);
        self.multiply(
            (flat, units, n),
            (input, false, flat),
            (output_gradient, true, units),
            product,
        )
    }

    /// `product[m, n] = left[m, k] right[k, n]`, columns one after the other.
    fn multiply(
        &self,
        (m, n, k): (usize, usize, usize),
        left: Factor,
        right: Factor,
        product: (u64, cudaDataType, usize),
    ) -> Result<()> {
        let operation = |is_transposed: bool| {
            if is_transposed {
                cublasOperation_t::CUBLAS_OP_T
            } else {
                cublasOperation_t::CUBLAS_OP_N
            }
        };
        let (one, zero) = (1f32, 0f32);
        let handle: cublasHandle_t = *self.blas.handle();
        // SAFETY: the memory of each matrix is as long as its sizes say, for which the caller answers; alpha and beta are f32, as the
        // compute type wants them, and on the host.
        unsafe {
            result::gemm_ex(
                handle,
                operation(left.1),
                operation(right.1),
                int(m),
                int(n),
                int(k),
                (&raw const one).cast(),
                left.0 as *const c_void,
                self.storage,
                int(left.2),
                right.0 as *const c_void,
                self.storage,
                int(right.2),
                (&raw const zero).cast(),
                product.0 as *mut c_void,
                product.1,
                int(product.2),
                cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .context("multiplying in cuBLAS")
    }
}
