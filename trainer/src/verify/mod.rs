//! `trainer verify`: is the int8 file as good as the f32 file it was made from?
//!
//! In: both files and a cache. Out: on the validation part of the split that the file was trained with, the change of AUROC, of sensitivity and specificity at the frozen operating
//! point with paired bootstrap intervals by study, agreement, the largest change of a logit, the signal-to-noise ratio of every
//! quantized tensor, a temperature refitted to the int8 logits, sizes. The int8 logits are those of the engine that the
//! board runs; the f32 logits are [`crate::execute`]'s. The gate: sensitivity and specificity at the operating point may
//! fall by stated margins; beyond them no deployable file is written, unless forced, and then the manifest says so.

mod command;
mod compare;
mod deploy;
mod gate;
mod noise;
mod plot;

use anyhow::{Context as _, ensure};
use rayon::prelude::*;
use serde::Serialize;
use shared::manifest::{METADATA_KEY, Manifest, Precision};

use crate::cache::Cache;
use crate::execute::FloatGraph;
use crate::index::Part;
use crate::onnx::{self, ModelProto};
use crate::quantize::{EQUALISED, FLOAT_FILE};
use crate::temperature::{self, temperature};
use crate::{provenance, split};

pub use command::{VerifyArgs, run, text};
use compare::{Both, Distance};
pub use deploy::deployable;
pub use gate::Margins;
use noise::noise;
pub use plot::noise_plot;

/// A tensor below this signal-to-noise ratio is named in the report.
pub const SNR_TARGET_DB: f64 = 25.0;

/// One figure of both files.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pair {
    /// Of the f32 file.
    pub float: f64,
    /// Of the int8 file.
    pub int8: f64,
    /// int8 minus f32.
    pub change: f64,
    /// 2.5th percentile of the change over resampled studies.
    pub low: f64,
    /// 97.5th percentile of the change over resampled studies.
    pub high: f64,
}

/// Both files at the operating point.
#[derive(Clone, Debug, Serialize)]
pub struct AtOperatingPoint {
    /// Its name.
    pub name: String,
    /// A slice is positive when its logit is at least this.
    pub logit_threshold: f32,
    /// Sensitivity, 0 to 1.
    pub sensitivity: Pair,
    /// Specificity, 0 to 1.
    pub specificity: Pair,
}

/// How far a tensor of the int8 file is from the f32 file's.
#[derive(Clone, Debug, Serialize)]
pub struct TensorNoise {
    /// Name in both files.
    pub tensor: String,
    /// 10 log10(sum of squares of the f32 values / sum of squares of the differences).
    pub snr_db: f64,
}

/// What `trainer verify` found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// Part of the cache that was used.
    pub part: &'static str,
    /// Whether the int8 file says that it was made of this f32 file; false where it says nothing.
    pub is_pair_known: bool,
    /// Slices of it.
    pub n_slices: usize,
    /// Studies of it.
    pub n_studies: usize,
    /// Digest of the cache.
    pub data_digest: String,
    /// Size of the f32 file.
    pub float_bytes: usize,
    /// Size of the int8 file.
    pub int8_bytes: usize,
    /// Area under the ROC curve.
    pub auroc: Pair,
    /// At the first operating point; `None` where the model has none.
    pub operating_point: Option<AtOperatingPoint>,
    /// Share of slices on which both files decide alike, at the operating point or else at logit 0.
    pub agreement: f64,
    /// Largest absolute change of a logit.
    pub max_logit_change: f64,
    /// Root mean squared change of the logit.
    pub logit_rmse: f64,
    /// Noise of every tensor, in graph order.
    pub tensors: Vec<TensorNoise>,
    /// Slices that the noise was measured on.
    pub n_noise_slices: usize,
    /// What makes figures here say less than they seem to.
    pub warnings: Vec<String>,
    /// Temperature of least cross-entropy for the f32 logits; NaN where one class is missing.
    pub float_temperature: f64,
    /// The same for the int8 logits.
    pub int8_temperature: f64,
    /// What may be lost at the operating point.
    pub margins: Margins,
    /// Why the gate does not let the file through; a model without operating point is let through unvalidated.
    pub faults: Vec<String>,
    /// [`shared::RESEARCH_USE`].
    pub notice: &'static str,
}

/// Compares the files on the validation part of `cache`; see the module's page for what is measured.
///
/// # Errors
///
/// Where a file is not what it should be, or the cache has no validation slices.
pub fn verify(
    float: &[u8],
    int8: &[u8],
    cache: &Cache,
    margins: Margins,
    n_noise_slices: usize,
) -> anyhow::Result<VerifyReport> {
    let (float_model, int8_model) = (
        onnx::read(float).context("the f32 file")?,
        onnx::read(int8).context("the int8 file")?,
    );
    let manifest = manifest_of(&int8_model)?;
    ensure!(
        manifest.precision == Precision::Int8,
        "the int8 file says that it is f32"
    );
    let is_pair_known = is_pair_known(float, &manifest)?;
    cache.check_preprocess(&manifest.preprocess)?;
    // By study, where the file says nothing; the seed is of no account then.
    let split = provenance::split(&manifest.tools, None, 0)?;
    let rows = split::rows(cache, split.by, split.seed, Part::Val);
    ensure!(!rows.is_empty(), "the cache has no validation slices");
    let images: Vec<&[u8]> = rows.iter().map(|&row| cache.tensor(row)).collect();
    let is_equalised = manifest.tools.contains_key(EQUALISED);
    let tensors = noise(
        &float_model,
        &int8_model,
        is_equalised,
        &images[..n_noise_slices.min(images.len())],
    )?;
    drop(int8_model);
    let float_logits = float_logits(&float_model, &images)?;
    drop(float_model);
    let int8_logits = int8_logits(int8, &images)?;
    let both = Both::new(cache, &rows, &float_logits, &int8_logits);
    let point = manifest.operating_points.first();
    let threshold = point.map_or(0.0, |point| point.logit_threshold);
    let [auroc, sensitivity, specificity] = both.compare(threshold);
    let operating_point = point.map(|point| AtOperatingPoint {
        name: point.name.clone(),
        logit_threshold: point.logit_threshold,
        sensitivity,
        specificity,
    });
    let distance = Distance::between(&float_logits, &int8_logits, threshold);
    let int8_temperature = temperature(both.int8.samples());
    let leak = split.by.warning().map(str::to_owned);
    let warnings = leak.into_iter();
    Ok(VerifyReport {
        warnings: warnings
            .chain(temperature::warning(int8_temperature))
            .collect(),
        part: "val",
        is_pair_known,
        n_slices: rows.len(),
        n_studies: both.n_studies,
        data_digest: cache.digest(),
        float_bytes: float.len(),
        int8_bytes: int8.len(),
        auroc,
        faults: gate::faults(operating_point.as_ref(), margins),
        operating_point,
        agreement: distance.agreement,
        max_logit_change: distance.largest,
        logit_rmse: distance.rmse,
        tensors,
        n_noise_slices: n_noise_slices.min(rows.len()),
        float_temperature: temperature(both.float.samples()),
        int8_temperature,
        margins,
        notice: shared::RESEARCH_USE,
    })
}

/// Whether the int8 file says that it was made of this f32 file; files from before it was written down say nothing.
///
/// # Errors
///
/// Where it was made of another one.
fn is_pair_known(float: &[u8], int8: &Manifest) -> anyhow::Result<bool> {
    let Some(parent) = int8.tools.get(FLOAT_FILE) else {
        return Ok(false);
    };
    let found = blake3::hash(float).to_hex();
    ensure!(
        *parent == *found,
        "the int8 file was made of the f32 file with BLAKE3 {parent}, this one has {found}: give that one, or quantize this one"
    );
    Ok(true)
}

/// The manifest of a model file.
///
/// # Errors
///
/// Where it has none that can be read.
pub(crate) fn manifest_of(model: &ModelProto) -> anyhow::Result<Manifest> {
    Ok(Manifest::from_json(
        model
            .metadata(METADATA_KEY)
            .context("the file has no pe.manifest")?,
    )?)
}

fn float_logits(model: &ModelProto, images: &[&[u8]]) -> anyhow::Result<Vec<f32>> {
    let graph = FloatGraph::new(model)?;
    Ok(images
        .par_iter()
        .map(|image| graph.logit(image, &mut |_, _| {}))
        .collect::<Result<_, _>>()?)
}

fn int8_logits(int8: &[u8], images: &[&[u8]]) -> anyhow::Result<Vec<f32>> {
    let options = engine::Options {
        kernel: None,
        threads: rayon::current_num_threads(),
        ..engine::Options::default()
    };
    let model = engine::Model::load(int8, &options).context("loading the int8 file")?;
    let mut session = model.session();
    let mut logits = vec![0.0; images.len()];
    for (image, logit) in images.iter().zip(logits.chunks_exact_mut(1)) {
        session.logits(image, logit)?;
    }
    Ok(logits)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::network::Network;
    use crate::split::{Split, SplitBy};
    use crate::{architecture, export, quantize};

    #[test]
    fn another_f32_file_than_the_int8_files_own_is_refused() {
        let demo = include_bytes!("../../../edge/model/demo.onnx");
        let mut int8 = manifest_of(&onnx::read(demo).unwrap()).unwrap();
        int8.tools.remove(FLOAT_FILE);
        assert!(!is_pair_known(b"f32", &int8).unwrap(), "nothing is said");
        let parent = blake3::hash(b"f32").to_hex().to_string();
        int8.tools.insert(FLOAT_FILE.to_owned(), parent.clone());
        assert!(is_pair_known(b"f32", &int8).unwrap());
        let refused = is_pair_known(b"another", &int8).unwrap_err();
        assert!(refused.to_string().contains(&parent));
    }
    #[test]
    fn slices_that_were_trained_on_are_not_measured_and_a_leak_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let source = crate::source::Source::phantom(24, 4, 6, 64, false);
        let spec = shared::spec::PreprocessSpec::default();
        let path = folder.path().join("cache");
        crate::prepare::prepare(&source, &spec, 4, None, &path).unwrap();
        let cache = Cache::open(&path).unwrap();
        let architecture = architecture::find("vanilla").unwrap();
        let network = Network::new(architecture, 0.001, 3, &Device::Cpu).unwrap();
        let by_image = Split {
            by: SplitBy::Image,
            seed: 5,
        };
        let mut manifest = export::new_manifest(architecture, 0.001);
        manifest.tools.extend(provenance::of_split(by_image));
        let weights = export::weights_of(&network).unwrap();
        let float = export::float_file(architecture, 0.001, &weights, &manifest).unwrap();
        let (int8, _) = quantize::quantize(&float, &cache, &quantize::Options::default()).unwrap();
        let report = verify(&float, &int8, &cache, Margins::default(), 1).unwrap();
        let rows = split::rows(&cache, by_image.by, by_image.seed, Part::Val);
        assert_ne!(rows.len(), cache.part(Part::Val).len());
        assert_eq!(report.n_slices, rows.len());
        assert_eq!(report.warnings.first().unwrap(), split::LEAK_WARNING);
        assert!(text(&report).contains(split::LEAK_WARNING));
    }
}
