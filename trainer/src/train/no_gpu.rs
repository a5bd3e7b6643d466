//! What a build without the feature `cuda` has in the GPU's place: nothing that could be made.

use std::sync::atomic::AtomicBool;

use anyhow::Result;

use super::run::Run;
use super::{GpuFigures, Precision};
use crate::exit::{Exit, fault};

/// No GPU.
#[derive(Debug)]
pub(super) enum Gpu {}

impl Gpu {
    pub(super) fn figures(&self) -> Result<GpuFigures> {
        match *self {}
    }
}

impl Run<'_> {
    pub(super) fn open_gpu(&mut self, _ordinal: usize, _precision: Precision) -> Result<()> {
        Err(fault(Exit::PeerDown, "this build computes on `cpu` only"))
    }

    pub(super) fn epoch_on_gpu(&mut self, _stop: &AtomicBool) -> Result<bool> {
        match self.gpu {
            Some(ref gpu) => match *gpu {},
            None => Ok(true),
        }
    }

    pub(super) fn logits_on_gpu(&mut self, _rows: &[usize]) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    pub(super) fn set_gpu(&mut self) -> Result<()> {
        Ok(())
    }
}
