//! Networks in f32: the float files of `trainer export`, and quantized chains where the caller asks for it.
//!
//! The stages in the order the data meets them: `chain` recognises the file, `network` packs the weights, `session` runs images. The
//! bits of a logit differ between CPUs; [`crate::Model::arithmetic`] says so.

mod chain;
mod network;
mod session;

pub(crate) use chain::recognise;
pub(crate) use network::FloatNetwork;
pub(crate) use session::FloatRunner;
