//! Training on an NVIDIA GPU (feature `cuda`), in the order the data meets it.
//!
//! 1. [`device`]: finding CUDA at run time, memory, launches;
//! 2. [`training`]: the images on the GPU, an epoch's steps, their losses;
//! 3. [`layout`]: where weights and feature maps lie, and how many bytes they are;
//! 4. [`network`]: the order of calls of a step; `kernels.cu`: our kernels, [`convolution`]: cuDNN, [`dense`]: cuBLAS;
//! 5. [`nccl`]: sums over several GPUs.
//!
//! What the operators compute is what the CPU's compute ([`crate::operators`]), and the same f64 definition tests both. Without a GPU the tests run all of this,
//! kernels included, on an emulation of CUDA's libraries (`trainer/tests/emulator`).

pub(crate) mod convolution;
pub(crate) mod dense;
pub(crate) mod device;
pub(crate) mod layout;
pub(crate) mod nccl;
pub(crate) mod network;
#[cfg(test)]
mod tests;
pub(crate) mod training;

pub(crate) use self::training::{Choice, Gpu, Mark, Work, check, count};
