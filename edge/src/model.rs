//! The model that a command runs: the file given, or the demonstration model that is part of the program.
//!
//! In: a path or nothing, and the engine's options. Out: a [`ReadyModel`] that has passed its own self-test, with the words that
//! every result must carry. A file without a manifest, or whose preprocessing needs the whole series, is refused: the board
//! has no preprocessing of its own. What is in the file is the engine's business.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use engine::{Arithmetic, Model, Options};
use shared::manifest::{DataKind, Manifest, Precision, Validation};
use shared::spec::Normalisation;
use shared::{RESEARCH_USE, TENSOR_BYTES, selftest};

use crate::exit::{Exit, Failure, failure};

/// The demonstration model.
const DEMONSTRATION: &[u8] = include_bytes!("../model/demo.onnx");
/// Largest model file; the full model has 124 MB in f32.
pub(crate) const MAX_MODEL_BYTES: u64 = 256 << 20;
/// Digits of the digest that name a model in results.
const DIGEST_DIGITS: usize = 12;
/// Images of the self-test that are run at start.
const MAX_SELF_TESTS: usize = 4;

/// A model that may be used.
#[derive(Debug)]
pub(crate) struct ReadyModel {
    /// The engine's.
    pub(crate) model: Model,
    /// What the file says of itself.
    pub(crate) manifest: Manifest,
    /// Architecture, width, precision and digest, as results name the model.
    pub(crate) name: String,
    /// What every result must say.
    pub(crate) notice: String,
    /// Time to load it, without the self-test, in microseconds.
    pub(crate) load_micros: u64,
}

impl ReadyModel {
    /// Loads the file, or the demonstration model, and runs its self-test.
    ///
    /// # Errors
    /// `Configuration` where the file cannot be read or the kernel cannot run; `BadData` where the file is no model that this
    /// program may use; `FailedCheck` where the self-test gives other bits than the file says.
    pub(crate) fn load(path: Option<&Path>, options: &Options) -> Result<Self, Failure> {
        let start = Instant::now();
        let model = match path {
            Some(path) => load(&read(path)?, options),
            None => load(DEMONSTRATION, options),
        };
        let named = |failure: Failure| Failure {
            error: failure.error.context(describe(path)),
            ..failure
        };
        let model = model.map_err(named)?;
        let load_micros = micros(start);
        let manifest = usable(&model)
            .with_context(|| describe(path))
            .map_err(failure(Exit::BadData))?;
        self_test(&model, &manifest)
            .with_context(|| describe(path))
            .map_err(failure(Exit::FailedCheck))?;
        Ok(Self {
            name: name(&model, &manifest),
            notice: notice(&model, &manifest),
            model,
            manifest,
            load_micros,
        })
    }
}

/// Microseconds since `start`.
pub(crate) fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}

fn describe(path: Option<&Path>) -> String {
    match path {
        Some(path) => format!("model file {}", path.display()),
        None => "the demonstration model".to_owned(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(MAX_MODEL_BYTES + 1).read_to_end(&mut bytes));
    read.with_context(|| describe(Some(path)))
        .map_err(failure(Exit::Configuration))?;
    if bytes.len() as u64 > MAX_MODEL_BYTES {
        let error = anyhow!(
            "{}: more than {MAX_MODEL_BYTES} bytes",
            describe(Some(path))
        );
        return Err(failure(Exit::BadData)(error));
    }
    Ok(bytes)
}

fn load(bytes: &[u8], options: &Options) -> Result<Model, Failure> {
    Model::load(bytes, options).map_err(|error| {
        let exit = match error {
            engine::LoadError::Kernel(_) | engine::LoadError::Threads(_) => Exit::Configuration,
            _ => Exit::BadData,
        };
        failure(exit)(error)
    })
}

fn usable(model: &Model) -> anyhow::Result<Manifest> {
    let Some(manifest) = model.manifest() else {
        bail!("the file has no manifest (metadata pe.manifest), so its preprocessing is not known");
    };
    if manifest.preprocess.normalisation != Normalisation::Window {
        bail!(
            "its preprocessing (series-minmax) needs the whole series; only models with normalisation window run here"
        );
    }
    if let Some(fault) = model.contract_fault() {
        bail!("{fault}");
    }
    if manifest.precision == Precision::Int8 {
        if manifest.self_test.is_empty() {
            bail!("an int8 file without self-test (profile tensorrt?) is for other runtimes");
        }
        if model.arithmetic() == Arithmetic::Tract && !model.is_exact() {
            bail!(
                "an int8 file whose layers are not all what integers compute: scales, zero points or operators are others"
            );
        }
    }
    Ok(manifest.clone())
}

fn self_test(model: &Model, manifest: &Manifest) -> anyhow::Result<()> {
    // The bits of an int8 file that runs in f32 are this CPU's own.
    if manifest.precision != Precision::Int8 || model.arithmetic() == Arithmetic::Float {
        return Ok(());
    }
    let mut session = model.session();
    let mut image = vec![0; TENSOR_BYTES];
    for test in manifest.self_test.iter().take(MAX_SELF_TESTS) {
        selftest::image(test.seed, &mut image);
        let mut logit = [0.0];
        session.logits(&image, &mut logit)?;
        let found = logit[0].to_bits();
        if found != test.logit_bits {
            bail!(
                "self-test with seed {}: logit bits {found:08x}, expected {:08x}",
                test.seed,
                test.logit_bits
            );
        }
    }
    Ok(())
}

fn name(model: &Model, manifest: &Manifest) -> String {
    let precision = match (manifest.precision, model.arithmetic()) {
        (Precision::Float32, _) => "float32",
        (Precision::Int8, Arithmetic::Float) => "int8-run-in-float32",
        (Precision::Int8, _) => "int8",
    };
    let digest = model.digest();
    let digest = digest.get(..DIGEST_DIGITS).unwrap_or(digest);
    format!(
        "{}-{}-{precision}-{digest}",
        manifest.architecture, manifest.width
    )
}

fn notice(model: &Model, manifest: &Manifest) -> String {
    let mut notice = RESEARCH_USE.to_owned();
    match manifest.training_data.kind {
        DataKind::Phantom => notice.push_str("; demonstration model, trained on synthetic data"),
        DataKind::None => notice.push_str("; model with random weights, its answers mean nothing"),
        DataKind::Rsna | DataKind::Jpeg | DataKind::Folders => {}
    }
    match manifest.validation {
        Validation::Validated => {}
        Validation::Unvalidated => notice.push_str("; unvalidated model"),
        Validation::Forced => notice.push_str("; model that failed its gate"),
    }
    if model.arithmetic() == Arithmetic::Float {
        notice.push_str("; computed in f32, the last digits differ between CPUs");
    }
    notice
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The demonstration model with every `from` replaced by `to`, of the same length.
    fn patched(from: &[u8], to: &[u8]) -> Vec<u8> {
        assert_eq!(from.len(), to.len());
        let mut bytes = DEMONSTRATION.to_vec();
        let places: Vec<usize> = (0..=bytes.len() - from.len())
            .filter(|&at| bytes[at..].starts_with(from))
            .collect();
        assert!(!places.is_empty(), "{}", String::from_utf8_lossy(from));
        for at in places {
            bytes[at..at + to.len()].copy_from_slice(to);
        }
        bytes
    }

    #[track_caller]
    fn refuses(from: &[u8], to: &[u8], expected: &str) {
        let model = Model::load(&patched(from, to), &Options::default()).unwrap();
        let error = usable(&model).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn the_example_of_the_document_is_the_demonstration_model() {
        let document = include_str!("../../docs/model-file.md");
        let (_, example) = document.split_once("```json\n").unwrap();
        let example = Manifest::from_json(example.split_once("```").unwrap().0).unwrap();
        let model = Model::load(DEMONSTRATION, &Options::default()).unwrap();
        let mut manifest = model.manifest().unwrap().clone();
        manifest
            .metrics
            .retain(|metric| example.metrics.contains(metric));
        manifest.operating_points.truncate(1);
        assert_eq!(manifest, example);
    }

    #[test]
    fn a_file_that_does_not_keep_to_the_contract_is_refused() {
        // Field 8 of the file, 2 bytes: field 2, the version.
        refuses(
            b"\x42\x02\x10\x0d",
            b"\x42\x02\x10\x0e",
            "operator set \"\" 14",
        );
        refuses(b"image", b"imago", "only input is not image");
        refuses(
            b"probability",
            b"probabilitx",
            "output 2 is not probability",
        );
        refuses(b"pe.manifest", b"no.manifest", "no manifest");
    }

    /// The demonstration model with the first bytes of a constant's values replaced.
    fn with_values(name: &str, values: &[u8]) -> Vec<u8> {
        let mut bytes = DEMONSTRATION.to_vec();
        // Behind the name: field 9, bytes, and their length in one or more bytes of seven bits.
        let named = [name.as_bytes(), b"\x4a"].concat();
        let place = bytes.windows(named.len()).position(|at| at == named);
        let mut at = place.unwrap() + named.len();
        while bytes[at] >= 0x80 {
            at += 1;
        }
        bytes[at + 1..][..values.len()].copy_from_slice(values);
        bytes
    }

    #[test]
    fn parameters_that_integers_do_not_compute_with_are_refused() {
        for (name, values) in [
            ("conv1.bias_scale", 1_f32.to_le_bytes().as_slice()),
            ("conv1.weight_zero_point", &[1]),
            ("conv1.weight_quantized", &[0x80]),
            ("relu1_scale", &f32::NAN.to_le_bytes()),
            ("relu1_zero_point", &[7]),
            ("dense1.bias_quantized", &i32::MAX.to_le_bytes()),
        ] {
            let model = Model::load(&with_values(name, values), &Options::default());
            let of_model = |model: Model| match usable(&model) {
                Ok(manifest) => self_test(&model, &manifest).is_err(),
                Err(_) => true,
            };
            let is_refused = model.map_or(true, of_model);
            assert!(is_refused, "{name}");
        }
    }

    /// The demonstration model with another manifest, of the same length once its metrics are left out.
    fn with_manifest(change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
        let model = Model::load(DEMONSTRATION, &Options::default()).unwrap();
        let text = model.manifest().unwrap().to_json();
        let mut manifest = model.manifest().unwrap().clone();
        manifest.metrics.clear();
        change(&mut manifest);
        let other = format!("{:<1$}", manifest.to_json(), text.len());
        patched(text.as_bytes(), other.as_bytes())
    }

    #[test]
    fn a_manifest_that_asks_for_what_the_board_does_not_do_is_refused() {
        let refuses = |expected: &str, change: fn(&mut Manifest)| {
            let model = Model::load(&with_manifest(change), &Options::default()).unwrap();
            let error = usable(&model).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        refuses("without self-test", |manifest| manifest.self_test.clear());
        refuses("series-minmax", |manifest| {
            manifest.preprocess.normalisation = Normalisation::SeriesMinmax;
        });
        let other_bits = with_manifest(|manifest| manifest.self_test[0].logit_bits ^= 1);
        let model = Model::load(&other_bits, &Options::default()).unwrap();
        let manifest = usable(&model).unwrap();
        assert!(
            self_test(&model, &manifest)
                .unwrap_err()
                .to_string()
                .contains("logit bits")
        );
    }
}
