//! Trains, evaluates, quantizes and exports the classifier. The stages in the order the data meets them:
//! index, split, cache, architecture, network, train, metrics, bootstrap, export, quantize, verify, report.

pub mod architecture;
pub mod bootstrap;
pub mod cache;
pub mod calibrate;
pub mod cli;
pub mod execute;
pub mod exit;
pub mod export;
pub mod index;
pub mod metrics;
pub mod onnx;
pub mod prepare;
pub mod progress;
pub mod quantize;
pub mod source;
pub mod split;
