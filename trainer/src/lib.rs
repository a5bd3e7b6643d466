//! Trains, evaluates, quantizes and exports the classifier. The stages in the order the data meets them:
//! index, split, cache, architecture, backbone, initialise, network, transfer, operators, features, ranks, train, gpu (with the feature `cuda`), quantization_aware, checkpoint, provenance,
//! metrics, bootstrap, export, quantize, verify, report.

pub mod allocator;
pub mod architecture;
pub mod backbone;
pub mod batches;
pub mod bootstrap;
pub mod cache;
pub mod calibrate;
pub mod checkpoint;
pub mod claim;
pub mod classify;
pub mod cli;
pub mod compare;
pub mod controls;
pub mod demo;
pub mod evaluate;
pub mod execute;
pub mod exit;
pub mod export;
pub mod features;
#[cfg(feature = "cuda")]
mod gpu;
pub mod index;
pub mod initialise;
pub mod interrupt;
pub mod metrics;
pub mod model_card;
pub mod network;
pub mod onnx;
pub mod operators;
pub mod phantom;
pub mod plots;
pub mod predict;
pub mod prepare;
pub mod progress;
pub mod provenance;
pub mod quantization_aware;
pub mod quantize;
pub mod random;
pub mod ranks;
pub mod report;
pub mod rsna;
pub mod source;
pub mod split;
pub mod stats;
pub mod temperature;
pub mod train;
pub mod transfer;
pub mod verify;
