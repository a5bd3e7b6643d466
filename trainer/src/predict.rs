//! Logits of a cache's slices, from a model file: `.onnx` through the engine that the board runs, `.safetensors` through candle.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use shared::manifest::Manifest;
use shared::{CHANNELS, SIDE, TENSOR_BYTES};

use crate::cache::{Cache, file_digest};
use crate::network::Network;
use crate::progress::Progress;
use crate::provenance;

/// Slices that go through the network together.
const BATCH: usize = 16;

/// A loaded model.
#[derive(Debug)]
pub struct Predictor {
    network: Loaded,
    manifest: Option<Manifest>,
    provenance: BTreeMap<String, String>,
    digest: String,
    name: String,
}

#[derive(Debug)]
enum Loaded {
    Engine(Box<engine::Session>),
    Candle(Network, Device),
}

impl Predictor {
    /// Loads a model by its file name's ending.
    ///
    /// # Errors
    /// A file that cannot be read, or that neither loader takes.
    pub fn open(path: &Path) -> Result<Self> {
        let context = || format!("loading {}", path.display());
        let digest = file_digest(path)?;
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let (network, manifest, provenance) =
            match path.extension().and_then(|ending| ending.to_str()) {
                Some("onnx") => {
                    let bytes = std::fs::read(path).with_context(context)?;
                    let options = engine::Options {
                        threads: std::thread::available_parallelism().map_or(1, usize::from),
                        ..engine::Options::default()
                    };
                    let model = engine::Model::load(&bytes, &options).with_context(context)?;
                    let manifest = model.manifest().cloned();
                    let tools = manifest.as_ref().map(|manifest| manifest.tools.clone());
                    let network = Loaded::Engine(Box::new(model.session()));
                    (network, manifest, tools.unwrap_or_default())
                }
                Some("safetensors") => {
                    let device = Device::Cpu;
                    let network = Network::load(path, &device).with_context(context)?;
                    let provenance = network.provenance.clone();
                    (Loaded::Candle(network, device), None, provenance)
                }
                _ => bail!("{}: expected .onnx or .safetensors", path.display()),
            };
        Ok(Self {
            network,
            manifest,
            provenance,
            digest,
            name,
        })
    }

    /// How the weights came about; see [`crate::provenance`].
    #[must_use]
    pub const fn provenance(&self) -> &BTreeMap<String, String> {
        &self.provenance
    }

    /// The manifest in the file; weights files have none.
    #[must_use]
    pub const fn manifest(&self) -> Option<&Manifest> {
        self.manifest.as_ref()
    }

    /// BLAKE3 of the file, hexadecimal.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Name of the file.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Logits of slices in the order of `rows`.
    ///
    /// # Errors
    /// Preprocessing of model and cache differ, or the network fails.
    pub fn logits(&mut self, cache: &Cache, rows: &[usize]) -> Result<Vec<f32>> {
        provenance::check_preprocess(&self.provenance, cache)?;
        if let Some(manifest) = &self.manifest {
            cache.check_preprocess(&manifest.preprocess)?;
        }
        let progress = Progress::new("classify", rows.len() as u64);
        let mut logits = Vec::with_capacity(rows.len());
        let mut images = Vec::with_capacity(BATCH * TENSOR_BYTES);
        for batch in rows.chunks(BATCH) {
            images.clear();
            for &row in batch {
                images.extend_from_slice(cache.tensor(row));
            }
            logits.extend(self.batch(&images, batch.len())?);
            progress.add(batch.len() as u64);
        }
        Ok(logits)
    }

    /// Logits of `n` images u8 `[n, 3, 256, 256]`.
    ///
    /// # Errors
    /// The network fails.
    pub fn batch(&mut self, images: &[u8], n: usize) -> Result<Vec<f32>> {
        match &mut self.network {
            Loaded::Engine(session) => {
                let mut logits = vec![0.0; n];
                session.logits(images, &mut logits)?;
                Ok(logits)
            }
            Loaded::Candle(network, device) => {
                let images = Tensor::from_slice(images, (n, CHANNELS, SIDE, SIDE), device)?;
                Ok(network.forward(&images)?.flatten_all()?.to_vec1()?)
            }
        }
    }
}
