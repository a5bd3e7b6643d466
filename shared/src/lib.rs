//! From a stored DICOM pixel to the network's u8 tensor, and from a logit to a probability and a study's score.
//!
//! Both sides, the trainer and the board, run exactly this code, so that a slice gives the same bytes on both.
//! Nothing here opens a file or a socket, reads a clock or draws a random number.
//!
//! The stages in the order the data meets them: `dicom` (feature `std`) reads a data set and gates it,
//! [`stored`] turns bytes into stored values, [`hounsfield`] into HU, [`window`] into u8, [`mask`] takes what is not
//! the body away, [`resample`] brings it to 256x256; [`preprocess`] is all of them fused. [`spec`] holds their
//! parameters, [`quantize`] the integer arithmetic of the network, [`probability`] and [`study`] what comes after it,
//! [`manifest`] what a model file says of itself, [`selftest`] the images that prove that an engine computes what it should.
//! `phantom` (feature `phantom`) makes synthetic studies.
#![cfg_attr(not(feature = "std"), no_std)]

extern crate alloc;

#[cfg(feature = "std")]
pub mod dicom;
pub mod hounsfield;
pub mod manifest;
pub mod mask;
#[cfg(feature = "phantom")]
pub mod phantom;
pub mod preprocess;
pub mod probability;
pub mod quantize;
pub mod resample;
pub mod selftest;
pub mod spec;
pub mod stored;
pub mod study;
pub mod uid;
pub mod window;

/// Rows and columns of the network's input image.
pub const SIDE: usize = 256;

/// Channels of the network's input image: lung, PE, mediastinal window.
pub const CHANNELS: usize = 3;

/// Bytes of one input image, u8 `[channel, row, column]`.
pub const TENSOR_BYTES: usize = CHANNELS * SIDE * SIDE;

/// Stands on every result, page and report.
pub const RESEARCH_USE: &str = "research use only, not a medical device";
