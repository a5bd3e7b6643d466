//! Files that are whole or absent, and the state from which a training run continues.
//!
//! In: weights, optimiser state and position of a run. Out: `checkpoint.safetensors` in the run folder, replaced at the
//! end of each epoch and when the run is stopped. What is not in it follows from the seed and the position: the order
//! of the slices is drawn anew from (seed, epoch).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use safetensors::tensor::{Dtype, SafeTensors};

use crate::exit::{Exit, fault};
use crate::network::{Parameter, to_safetensors};
use crate::operators::optimiser::Moments;

/// The file's name in a run folder.
pub const FILE_NAME: &str = "checkpoint.safetensors";
/// Version of the file's contents; a reader refuses any other.
const VERSION: &str = "2";

/// Writes `bytes` to a file beside `path`, flushes it to the disk and renames it: after a crash `path` holds the old
/// bytes or the new ones.
///
/// # Errors
/// When any of these steps fails; the file beside is removed then.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let beside = PathBuf::from(beside);
    let written = (|| {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    })();
    if written.is_err() {
        // The first error is the one to report.
        drop(fs::remove_file(&beside));
        return written;
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Position {
    /// Optimiser steps done.
    pub step: u64,
    /// The epoch to continue with, from 0.
    pub epoch: u32,
    /// Steps of that epoch already done.
    pub step_in_epoch: u64,
    /// Sum of the losses of these steps, times their images; and the images.
    pub loss_sum: f64,
    /// Images of these steps.
    pub n_images: u64,
    /// Best validation loss so far, and its epoch; infinite before the first.
    pub best_loss: f64,
    /// Epoch of the best validation loss.
    pub best_epoch: u32,
}

/// What must be equal for a run to continue: options and digests of the data, by name.
pub type Fingerprint = BTreeMap<String, String>;

/// Writes the checkpoint of a run.
///
/// # Errors
/// When a tensor cannot be read or the file cannot be written.
pub fn save(
    folder: &Path,
    parameters: &[Parameter],
    moments: &[Moments],
    position: &Position,
    fingerprint: &Fingerprint,
) -> anyhow::Result<()> {
    let mut parts = Vec::new();
    for (index, parameter) in parameters.iter().enumerate() {
        let shape = parameter.variable.dims().to_vec();
        parts.push((
            parameter.name.clone(),
            shape.clone(),
            parameter.variable.flatten_all()?.to_vec1::<f32>()?,
        ));
        if let Some(Moments { first, second }) = moments
            .get(index)
            .filter(|moments| !moments.first.is_empty())
        {
            parts.push((
                format!("adam.first.{}", parameter.name),
                shape.clone(),
                first.clone(),
            ));
            parts.push((
                format!("adam.second.{}", parameter.name),
                shape,
                second.clone(),
            ));
        }
    }
    let metadata = BTreeMap::from([
        ("version".to_owned(), VERSION.to_owned()),
        (
            "fingerprint".to_owned(),
            serde_json::to_string(fingerprint)?,
        ),
        ("step".to_owned(), position.step.to_string()),
        ("epoch".to_owned(), position.epoch.to_string()),
        (
            "step_in_epoch".to_owned(),
            position.step_in_epoch.to_string(),
        ),
        (
            "loss_sum".to_owned(),
            position.loss_sum.to_bits().to_string(),
        ),
        ("n_images".to_owned(), position.n_images.to_string()),
        (
            "best_loss".to_owned(),
            position.best_loss.to_bits().to_string(),
        ),
        ("best_epoch".to_owned(), position.best_epoch.to_string()),
    ]);
    let bytes = to_safetensors(&parts, &metadata);
    let path = folder.join(FILE_NAME);
    write_atomically(&path, &bytes).with_context(|| format!("writing {}", path.display()))
}

/// Reads the checkpoint of a run into `parameters` and returns its optimiser state and position; `None` where there is
/// no checkpoint yet.
///
/// # Errors
/// When the file is damaged or belongs to a run with another fingerprint.
pub fn load(
    folder: &Path,
    parameters: &[Parameter],
    fingerprint: &Fingerprint,
) -> anyhow::Result<Option<(Vec<Moments>, Position)>> {
    let path = folder.join(FILE_NAME);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    read(&bytes, parameters, fingerprint)
        .map(Some)
        .with_context(|| format!("reading {}", path.display()))
}

fn read(
    bytes: &[u8],
    parameters: &[Parameter],
    fingerprint: &Fingerprint,
) -> anyhow::Result<(Vec<Moments>, Position)> {
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let field = |key: &str| {
        metadata
            .get(key)
            .with_context(|| format!("metadata has no `{key}`"))
    };
    ensure!(
        field("version")? == VERSION,
        "version {} is not {VERSION}",
        field("version")?
    );
    let started: Fingerprint = serde_json::from_str(field("fingerprint")?)?;
    let differences = differences(&started, fingerprint);
    if !differences.is_empty() {
        return Err(fault(
            Exit::CannotWrite,
            format!(
                "the run was started with {}; continue it so, or choose another folder",
                differences.join(", with ")
            ),
        ));
    }
    let file = SafeTensors::deserialize(bytes)?;
    let values = |name: &str, shape: &[usize]| -> anyhow::Result<Vec<f32>> {
        let view = file.tensor(name)?;
        ensure!(
            view.dtype() == Dtype::F32 && view.shape() == shape,
            "`{name}` has another shape"
        );
        Ok(view
            .data()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect())
    };
    let mut moments = Vec::new();
    for Parameter { name, variable, .. } in parameters {
        let restored = candle_core::Tensor::from_vec(
            values(name, variable.dims())?,
            variable.shape(),
            variable.device(),
        )?;
        variable.set(&restored)?;
        let (first, second) = (format!("adam.first.{name}"), format!("adam.second.{name}"));
        moments.push(if file.names().contains(&first.as_str()) {
            Moments {
                first: values(&first, variable.dims())?,
                second: values(&second, variable.dims())?,
            }
        } else {
            Moments::default()
        });
    }
    let position = Position {
        step: field("step")?.parse()?,
        epoch: field("epoch")?.parse()?,
        step_in_epoch: field("step_in_epoch")?.parse()?,
        loss_sum: f64::from_bits(field("loss_sum")?.parse()?),
        n_images: field("n_images")?.parse()?,
        best_loss: f64::from_bits(field("best_loss")?.parse()?),
        best_epoch: field("best_epoch")?.parse()?,
    };
    Ok((moments, position))
}

/// Each entry in which two fingerprints differ: `seed 5, not 6`.
fn differences(started: &Fingerprint, asked: &Fingerprint) -> Vec<String> {
    let names: BTreeSet<&String> = started.keys().chain(asked.keys()).collect();
    let shown = |of: &Fingerprint, name| of.get(name).map_or("nothing", |v| v).to_owned();
    names
        .into_iter()
        .filter(|name| started.get(*name) != asked.get(*name))
        .map(|name| {
            format!(
                "{name} {}, not {}",
                shown(started, name),
                shown(asked, name)
            )
        })
        .collect()
}
