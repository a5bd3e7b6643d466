//! Trains, evaluates, quantizes and exports the classifier.
//!
//! The stages in the order the data meets them:
//!
//! - Data: [`phantom`] writes synthetic studies, [`source`] lists what there is, [`prepare`] decodes it into a [`cache`], whose rows are the
//!   [`index`], each in a part of the [`split`]; [`stats`] counts it.
//! - Training: [`batches`] feeds [`train`], which runs a [`network`] of an [`architecture`] on our [`operators`], or a [`transfer`] learner on
//!   its [`backbone`] (whose [`features`] are kept where it is frozen), from the weights of [`initialise`], with [`ranks`] of processes, on a `gpu`
//!   (feature `cuda`) or [`quantization_aware`]. [`checkpoint`] and [`provenance`] are what it leaves.
//! - Judging: [`predict`] gives logits, [`evaluate`] their figures: [`metrics`], [`bootstrap`], [`temperature`], [`rsna`], [`controls`]; [`report`],
//!   [`plots`] and [`model_card`] show them. [`compare`] trains and judges the publication's table.
//! - The model file: [`export`] writes [`onnx`], [`quantize`] makes it int8, with ranges by [`calibrate`] on [`execute`]; [`verify`] is the gate.
//!
//! [`demo`] runs all of it, [`classify`] at its end. [`cli`], [`exit`], [`progress`] and [`interrupt`] are the outside; [`claim`], [`random`]
//! and [`allocator`] serve all.

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
