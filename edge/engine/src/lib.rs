//! Runs the quantized network: an ONNX file in, logits out, the same bits on every CPU and for every number of threads.
//!
//! The stages in the order the data meets them: [`model`] loads a file, `graph` indexes it, `chain` recognises the quantized
//! layers, `network` checks and packs them for one of the [`kernels`], `session` runs them on images. What is no such chain
//! runs through `tract`, with each quantized layer that `partial` finds replaced by our `operator`: a `convolution` of any shape, a `sum`, a
//! `mean`, a `gemm`, passed to tract as `attributes`; `transpose` brings the channels together. Float files of the same form run through
//! `float`. `explain` measures each layer.
//!
//! No file and no socket is opened here; the caller brings the bytes.

mod attributes;
mod chain;
mod contract;
mod contributions;
mod convolution;
mod crew;
mod explain;
mod float;
mod gemm;
mod graph;
mod idle;
pub mod kernels;
mod layers;
mod maps;
mod mean;
pub mod model;
mod network;
mod operator;
mod partial;
mod patches;
mod rows;
mod session;
mod sum;
mod tract;
mod transpose;

pub use contributions::Contributions;
pub use explain::{Explanation, LayerReport};
pub use kernels::Kernel;
pub use model::{Arithmetic, LoadError, Model, Options, RunError, Session};
