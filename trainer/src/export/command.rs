//! `trainer export`: arguments, the run's weights and manifest, the file.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, ensure};
use candle_core::Device;
use serde::Serialize;
use shared::manifest::Manifest;

use crate::architecture::{self, Architecture};
use crate::cache::{file_digest, write_atomically};
use crate::exit::{Exit, fault};
use crate::network::Network;
use crate::{provenance, quantization_aware};

use super::weights::{random_weights, read_weights};
use super::{float_file, new_manifest};

/// Arguments of `trainer export`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer export --run runs/demo --out model.onnx\n  trainer export --random-init --model final --width 0.125 --seed 1 --out random.onnx\n\n\
    Research use only, not a medical device."
)]
pub struct ExportArgs {
    /// Run folder: its model.safetensors, and its manifest.json where there is one.
    #[arg(
        long,
        value_name = "RUN",
        required_unless_present = "random_init",
        conflicts_with = "random_init"
    )]
    pub run: Option<PathBuf>,
    /// Random weights instead of a run.
    #[arg(long, requires = "model")]
    pub random_init: bool,
    /// Architecture of the random weights.
    #[arg(long, value_name = "NAME", conflicts_with = "run")]
    pub model: Option<String>,
    /// Factor on the units of every convolution and hidden dense layer of the random weights.
    #[arg(long, value_name = "F", default_value_t = 1.0, value_parser = architecture::parse_width)]
    pub width: f64,
    /// Seed of the random weights.
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// The ONNX file to write.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// What `trainer export` says of the file.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// The file.
    pub file: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Architecture.
    pub architecture: String,
    /// Width factor.
    pub width: f64,
    /// Number of weights and biases.
    pub n_parameters: u64,
    /// [`shared::RESEARCH_USE`].
    pub notice: &'static str,
}

/// Runs `trainer export`.
///
/// # Errors
///
/// Where the weights cannot be read, do not fit their architecture, or the file cannot be written.
pub fn run(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let (architecture, width, weights, manifest) = match (&args.run, &args.model) {
        (Some(run), _) => {
            let file = run.join("model.safetensors");
            let (architecture, width, weights) = read_weights(&file)?;
            (
                architecture,
                width,
                weights,
                run_manifest(run, &file, architecture, width)?,
            )
        }
        (None, model) => {
            let name = model.as_deref().unwrap_or_default();
            let architecture = architecture::find(name)
                .ok_or_else(|| fault(Exit::Usage, format!("unknown model {name:?}")))?;
            let weights = random_weights(architecture, args.width, args.seed)?;
            (
                architecture,
                args.width,
                weights,
                new_manifest(architecture, args.width),
            )
        }
    };
    let n_parameters = weights
        .values()
        .map(|weight| weight.values.len() as u64)
        .sum();
    let bytes = float_file(architecture, width, &weights, &manifest)?;
    write_atomically(&args.out, &bytes)?;
    let report = ExportReport {
        file: args.out.clone(),
        bytes: bytes.len() as u64,
        architecture: architecture.name.to_owned(),
        width,
        n_parameters,
        notice: shared::RESEARCH_USE,
    };
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string(&report)?)?;
    } else {
        writeln!(
            stdout,
            "{}: {} at width {width}, {n_parameters} parameters, {} bytes",
            args.out.display(),
            architecture.name,
            bytes.len()
        )?;
        writeln!(stdout, "{}", shared::RESEARCH_USE)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The manifest that `trainer evaluate` left in the run folder, where it is of these weights; where there is none, one that says how the weights
/// came about and claims nothing else.
fn run_manifest(
    run: &Path,
    weights: &Path,
    architecture: &Architecture,
    width: f64,
) -> anyhow::Result<Manifest> {
    let path = run.join("manifest.json");
    let known = Network::load(weights, &Device::Cpu)?.provenance;
    let mut manifest = if path.exists() {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        let manifest =
            Manifest::from_json(&text).with_context(|| format!("reading {}", path.display()))?;
        let digest = file_digest(weights)?;
        ensure!(
            manifest.tools.get(provenance::WEIGHTS) == Some(&digest),
            "{} is not of {}: its figures and thresholds are another model's; evaluate these weights (`trainer evaluate --model {}`) or remove it",
            path.display(),
            weights.display(),
            weights.display()
        );
        manifest
    } else {
        let mut manifest = new_manifest(architecture, width);
        provenance::tell(&known, &mut manifest)?;
        manifest
    };
    if let Some(ranges) = known.get(quantization_aware::DIGEST) {
        let key = quantization_aware::DIGEST.to_owned();
        manifest.tools.insert(key, ranges.clone());
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{ExportError, float_model};
    use super::*;

    /// A run folder with random weights.
    fn run_of(folder: &Path, name: &str, seed: u64) -> PathBuf {
        let run = folder.join(name);
        std::fs::create_dir(&run).unwrap();
        let architecture = architecture::find("vanilla").unwrap();
        let mut network = Network::new(architecture, 0.01, seed, &Device::Cpu).unwrap();
        network.provenance = BTreeMap::from([
            ("split".to_owned(), "image".to_owned()),
            ("split_seed".to_owned(), "3".to_owned()),
            (quantization_aware::DIGEST.to_owned(), "00".to_owned()),
        ]);
        network.save(&run.join("model.safetensors")).unwrap();
        run
    }

    fn manifest_of(run: &Path) -> anyhow::Result<Manifest> {
        let architecture = architecture::find("vanilla").unwrap();
        run_manifest(run, &run.join("model.safetensors"), architecture, 0.01)
    }

    #[test]
    fn the_manifest_of_another_run_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (own, other) = (
            run_of(folder.path(), "own", 1),
            run_of(folder.path(), "other", 2),
        );
        let mut manifest = manifest_of(&own).unwrap();
        assert_eq!(manifest.tools["split"], "image");
        assert_eq!(manifest.tools[quantization_aware::DIGEST], "00");
        let digest = file_digest(&own.join("model.safetensors")).unwrap();
        manifest
            .tools
            .insert(provenance::WEIGHTS.to_owned(), digest);
        for run in [&own, &other] {
            std::fs::write(run.join("manifest.json"), manifest.to_json()).unwrap();
        }
        assert_eq!(manifest_of(&own).unwrap(), manifest);
        let error = manifest_of(&other).unwrap_err().to_string();
        assert!(
            error.contains("is not of") && error.contains("trainer evaluate"),
            "{error}"
        );
    }

    #[test]
    fn weights_that_are_not_finite_are_neither_exported_nor_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let run = run_of(folder.path(), "run", 1);
        let path = run.join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let end = bytes.len();
        for bad in [f32::NAN, f32::INFINITY] {
            bytes[end - 4..].copy_from_slice(&bad.to_le_bytes());
            std::fs::write(&path, &bytes).unwrap();
            let (architecture, width, weights) = read_weights(&path).unwrap();
            let error = float_model(architecture, width, &weights).unwrap_err();
            assert!(matches!(error, ExportError::NotFinite { .. }), "{error}");
            let error = Network::load(&path, &Device::Cpu).unwrap_err().to_string();
            assert!(error.contains("not finite"), "{error}");
        }
    }
}
