//! Training on an NVIDIA GPU (feature `cuda`), in the order the data meets it.
//!
//! 1. [`device`]: finding CUDA at run time, memory, launches;
//! 2. [`training`]: the images on the GPU, an epoch's steps, their losses;
//! 3. [`parameters`]: where weights lie, and the optimiser; where feature maps lie: [`layout`] of a convolutional row, [`graph`] of a transfer
//!    learner;
//! 4. [`network`]: a step; the order of calls before its end: [`chain`] and [`transfer`]; [`head`]: its end;
//! 5. `kernels.cu`: our kernels, [`convolution`]: cuDNN, [`dense`]: cuBLAS;
//! 6. [`nccl`]: sums over several GPUs.
//!
//! What the operators compute is what the CPU's compute ([`crate::operators`]), and the same f64 definition tests both. Without a GPU the tests run all of this,
//! kernels included, on an emulation of CUDA's libraries (`trainer/tests/emulator`).

pub(crate) mod chain;
pub(crate) mod convolution;
pub(crate) mod dense;
pub(crate) mod device;
pub(crate) mod graph;
pub(crate) mod head;
pub(crate) mod layout;
pub(crate) mod nccl;
pub(crate) mod network;
pub(crate) mod parameters;
#[cfg(test)]
mod tests;
pub(crate) mod training;
pub(crate) mod transfer;

pub(crate) use self::training::{Choice, Gpu, Mark, Work, count};
