//! The network's operators on the CPU, in the order the data meets them.
//!
//! 1. [`convolution`]: 3x3 valid convolution + bias + ReLU + 2x2 max pool as one operator;
//! 2. [`dense`]: rearranging the last feature map into channel, row, column order, and dense layers;
//! 3. [`spatial`]: the transfer learners' convolutions, pools and sums, of any window;
//! 4. [`straight_through`]: rounding to what the int8 graph can say, for its last epochs;
//! 5. [`loss`]: binary cross-entropy on logits;
//! 6. [`optimiser`]: Keras' Adam and SGD, in place.
//!
//! candle's own operators are not used for these because they are slow on the CPU and because some are wrong: the
//! gradient of its max pool, of ReLU at 0, and its cross-entropy from |logit| = 17 on.
//!
//! **Order of summation.** Work is cut into pieces whose number depends on shapes alone, never on the number of
//! threads; the pieces are summed in their order. So results are the same bits for every thread count on one CPU.

pub mod convolution;
#[cfg(test)]
pub(crate) mod definition;
pub mod dense;
pub mod loss;
pub mod optimiser;
pub mod spatial;
pub mod straight_through;
mod vector;

use candle_core::{CpuStorage, Layout, Result, Tensor, bail};

/// The contiguous values of a CPU tensor.
fn values<'a, T: candle_core::WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    let Some((begin, end)) = layout.contiguous_offsets() else {
        bail!("the operator needs a contiguous tensor")
    };
    Ok(&storage.as_slice::<T>()?[begin..end])
}

/// Calls `f` with the contiguous values of a CPU tensor.
fn with_values<T: candle_core::WithDType, R>(
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> R,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        bail!("the operator runs on the CPU only")
    };
    Ok(f(values(storage, layout)?))
}
