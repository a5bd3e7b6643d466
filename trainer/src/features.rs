//! Features of a frozen backbone, computed once for each slice.
//!
//! In: rows of a cache. Out: `[row, feature]`. A frozen backbone gives the same features in every epoch, and the same bits in every batch, so
//! they are kept in memory, up to a bound.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use candle_core::{Device, Tensor};
use shared::{CHANNELS, SIDE, TENSOR_BYTES};

use crate::cache::Cache;
use crate::network::Network;

/// Rows that are kept: 512 MiB of 2048 features each. What is beyond is computed anew.
const MAX_ROWS: usize = 1 << 16;
/// Images that go through the backbone together.
const BATCH: usize = 16;

/// Features by row.
#[derive(Debug, Default)]
pub struct Features {
    of_row: HashMap<usize, Vec<f32>>,
}

impl Features {
    /// The features of `rows`, in their order.
    ///
    /// # Errors
    /// When the network has no backbone or fails.
    pub fn of(&mut self, network: &Network, cache: &Cache, rows: &[usize]) -> Result<Tensor> {
        let mut missing: Vec<usize> = rows.to_vec();
        missing.retain(|row| !self.of_row.contains_key(row));
        let mut fresh: HashMap<usize, Vec<f32>> = HashMap::new();
        for rows in missing.chunks(BATCH) {
            let mut images = Vec::with_capacity(rows.len() * TENSOR_BYTES);
            for &row in rows {
                images.extend_from_slice(cache.tensor(row));
            }
            let shape = (rows.len(), CHANNELS, SIDE, SIDE);
            let images = Tensor::from_vec(images, shape, &Device::Cpu)?;
            let features = network.features(&images)?.to_vec2::<f32>()?;
            for (&row, features) in rows.iter().zip(features) {
                if self.of_row.len() < MAX_ROWS {
                    self.of_row.insert(row, features);
                } else {
                    fresh.insert(row, features);
                }
            }
        }
        let mut values = Vec::new();
        for row in rows {
            let found = self.of_row.get(row).or_else(|| fresh.get(row));
            values.extend_from_slice(found.context("features of every row were computed")?);
        }
        let n_features = values.len() / rows.len().max(1);
        Ok(Tensor::from_vec(
            values,
            (rows.len(), n_features),
            &Device::Cpu,
        )?)
    }
}
