//! What a model file says of itself: the JSON under `pe.manifest` in the ONNX file's `metadata_props`.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::spec::{PreprocessSpec, SpecError};
use crate::study::StudyRule;

/// Key of the manifest in the ONNX file's `metadata_props`.
pub const METADATA_KEY: &str = "pe.manifest";

/// The format version that this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// What a model file says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// How a slice becomes the network's input.
    pub preprocess: PreprocessSpec,
    /// Name of the architecture, as `trainer train --model` takes it.
    pub architecture: String,
    /// Factor on the units of every convolution and hidden dense layer.
    pub width: f64,
    /// Arithmetic of the graph.
    pub precision: Precision,
    /// What the network was trained on.
    pub training_data: TrainingData,
    /// The graph's outputs and what they mean.
    pub outputs: Vec<Output>,
    /// How well it does, each number with its interval and where it was measured.
    pub metrics: Vec<Metric>,
    /// Thresholds chosen on validation data and frozen; the first is the one that decides.
    pub operating_points: Vec<OperatingPoint>,
    /// Whether the file passed its gate.
    pub validation: Validation,
    /// Temperature by which a logit is divided before the probability that is shown; `None`: 1.
    pub temperature: Option<f64>,
    /// How slices make a study's score.
    pub study_rule: Option<StudyRule>,
    /// Seeds of [`crate::selftest::image`] and the bits of the logit that the int8 graph gives; empty in f32 files.
    pub self_test: Vec<SelfTest>,
    /// Name and version of the tools that made the file.
    pub tools: BTreeMap<String, String>,
}

/// Arithmetic of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 weights and activations.
    Float32,
    /// s8 weights and u8 activations in QDQ form.
    Int8,
}

/// What the network was trained on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingData {
    /// Kind of data.
    pub kind: DataKind,
    /// BLAKE3 of the cache's tensors and index, hexadecimal; empty for [`DataKind::None`].
    pub digest: String,
    /// Studies that it was trained on.
    pub n_studies: u64,
    /// Slices that it was trained on.
    pub n_slices: u64,
}

/// Kind of training data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataKind {
    /// Synthetic studies: for demonstration alone.
    Phantom,
    /// The RSNA data set as DICOM.
    Rsna,
    /// The 256x256 JPEG copy of the RSNA data set.
    Jpeg,
    /// Two folders of images.
    Folders,
    /// Not trained: random weights.
    None,
}

/// One output of the graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// Name in the graph.
    pub name: String,
    /// What a high value means.
    pub meaning: String,
}

/// One measured number with its 95 % interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// For example `auroc`.
    pub name: String,
    /// What is counted.
    pub level: Level,
    /// Part of the data: `train`, `val` or `test`.
    pub part: String,
    /// The estimate.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// What a metric counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Single slices.
    Slice,
    /// Whole studies.
    Study,
}

/// A threshold chosen on validation data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatingPoint {
    /// For example `sensitivity-0.95`.
    pub name: String,
    /// A slice is positive when its logit is at least this.
    pub logit_threshold: f32,
    /// On the validation part, 0 to 1.
    pub sensitivity: f64,
    /// On the validation part, 0 to 1.
    pub specificity: f64,
}

/// Whether the file passed its gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Validation {
    /// The gate was passed on the validation part.
    Validated,
    /// No operating point exists: there was nothing to hold the file against.
    Unvalidated,
    /// Written although the gate failed, because somebody forced it.
    Forced,
}

/// One image of the self-test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfTest {
    /// Seed of [`crate::selftest::image`].
    pub seed: u64,
    /// IEEE 754 bits of the expected logit.
    pub logit_bits: u32,
}

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not the JSON that this version writes.
    #[error("pe.manifest is not the expected JSON")]
    Json(#[source] serde_json::Error),
    /// Another format version.
    #[error("pe.manifest has format version {found}; this build reads version {FORMAT_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Preprocessing that this build cannot do.
    #[error("pe.manifest asks for preprocessing that this build does not do")]
    Preprocess(#[source] SpecError),
    /// A number outside its range.
    #[error("pe.manifest: {field} is {found}; allowed is {allowed}")]
    Range {
        /// The field.
        field: &'static str,
        /// What it holds.
        found: f64,
        /// What it may hold.
        allowed: &'static str,
    },
}

impl Manifest {
    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// A format version other than [`FORMAT_VERSION`] (told before anything else is read), unknown or missing fields,
    /// preprocessing that this build cannot do, numbers out of range.
    pub fn from_json(text: &str) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let Version { format_version } = serde_json::from_str(text).map_err(ManifestError::Json)?;
        if format_version != FORMAT_VERSION {
            return Err(ManifestError::Version {
                found: format_version,
            });
        }
        let manifest: Self = serde_json::from_str(text).map_err(ManifestError::Json)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The manifest as JSON, fields in the order of this struct.
    ///
    /// # Panics
    /// Never: every field can be written as JSON.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("maps have string keys and numbers are finite or null")
    }

    /// The threshold that decides on a slice, or `None` for a model without an operating point.
    #[must_use]
    pub fn logit_threshold(&self) -> Option<f32> {
        self.operating_points
            .first()
            .map(|point| point.logit_threshold)
    }

    /// Checks every number against its range; [`Manifest::from_json`] has done so already.
    ///
    /// # Errors
    /// The first field that is out of its range.
    pub fn check(&self) -> Result<(), ManifestError> {
        self.preprocess.check().map_err(ManifestError::Preprocess)?;
        let width = self.width;
        allow(
            width > 0.0 && width <= 16.0,
            "width",
            width,
            "greater than 0, at most 16",
        )?;
        if let Some(found) = self.temperature {
            allow(
                found.is_finite() && found > 0.0,
                "temperature",
                found,
                "finite, greater than 0",
            )?;
        }
        #[expect(clippy::cast_precision_loss, reason = "a count in a message")]
        let (n_outputs, n_self_tests) = (self.outputs.len() as f64, self.self_test.len() as f64);
        allow(
            !self.outputs.is_empty(),
            "number of outputs",
            n_outputs,
            "1 or more",
        )?;
        if self.precision == Precision::Float32 {
            allow(
                self.self_test.is_empty(),
                "number of self_test",
                n_self_tests,
                "0 in a float32 file",
            )?;
        }
        if self.validation == Validation::Validated {
            allow(
                !self.operating_points.is_empty(),
                "number of operating_points",
                0.0,
                "1 or more when validated",
            )?;
        }
        self.metrics.iter().try_for_each(Metric::check)?;
        self.operating_points
            .iter()
            .try_for_each(OperatingPoint::check)?;
        self.study_rule.iter().try_for_each(check_rule)
    }
}

impl Metric {
    fn check(&self) -> Result<(), ManifestError> {
        for (field, found) in [
            ("metrics.value", self.value),
            ("metrics.low", self.low),
            ("metrics.high", self.high),
        ] {
            allow(found.is_finite(), field, found, "finite")?;
        }
        allow(
            self.low <= self.high,
            "metrics.low",
            self.low,
            "at most metrics.high",
        )
    }
}

impl OperatingPoint {
    fn check(&self) -> Result<(), ManifestError> {
        let threshold = f64::from(self.logit_threshold);
        allow(
            threshold.is_finite(),
            "operating_points.logit_threshold",
            threshold,
            "finite",
        )?;
        let is_share = |share: f64| (0.0..=1.0).contains(&share);
        let (sensitivity, specificity) = (self.sensitivity, self.specificity);
        allow(
            is_share(sensitivity),
            "operating_points.sensitivity",
            sensitivity,
            "0 to 1",
        )?;
        allow(
            is_share(specificity),
            "operating_points.specificity",
            specificity,
            "0 to 1",
        )
    }
}

fn check_rule(rule: &StudyRule) -> Result<(), ManifestError> {
    let (smoothing, top) = (rule.smoothing_slices, rule.top_slices);
    let is_odd = smoothing % 2 == 1;
    allow(
        is_odd && smoothing <= 99,
        "study_rule.smoothing_slices",
        smoothing.into(),
        "odd, 1 to 99",
    )?;
    allow(
        (1..=999).contains(&top),
        "study_rule.top_slices",
        top.into(),
        "1 to 999",
    )?;
    let threshold = f64::from(rule.logit_threshold);
    allow(
        threshold.is_finite(),
        "study_rule.logit_threshold",
        threshold,
        "finite",
    )
}

fn allow(
    is_allowed: bool,
    field: &'static str,
    found: f64,
    allowed: &'static str,
) -> Result<(), ManifestError> {
    if is_allowed {
        Ok(())
    } else {
        Err(ManifestError::Range {
            field,
            found,
            allowed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            format_version: FORMAT_VERSION,
            preprocess: PreprocessSpec::default(),
            architecture: "final".into(),
            width: 0.125,
            precision: Precision::Int8,
            training_data: TrainingData {
                kind: DataKind::Phantom,
                digest: "00".into(),
                n_studies: 2,
                n_slices: 20,
            },
            outputs: alloc::vec![Output {
                name: "logit".into(),
                meaning: "pulmonary embolism present".into()
            }],
            metrics: alloc::vec![],
            operating_points: alloc::vec![],
            validation: Validation::Unvalidated,
            temperature: None,
            study_rule: Some(StudyRule {
                smoothing_slices: 3,
                top_slices: 5,
                logit_threshold: 0.5,
            }),
            self_test: alloc::vec![SelfTest {
                seed: 1,
                logit_bits: 2
            }],
            tools: BTreeMap::new(),
        }
    }

    #[test]
    fn manifest_survives_json() {
        assert_eq!(
            Manifest::from_json(&manifest().to_json()).unwrap(),
            manifest()
        );
    }

    #[test]
    fn another_format_version_is_named_before_its_fields_are_read() {
        assert!(matches!(
            Manifest::from_json(r#"{"format_version": 2, "novelty": true}"#),
            Err(ManifestError::Version { found: 2 })
        ));
    }

    #[test]
    fn unknown_fields_and_bad_ranges_are_refused() {
        let text = manifest().to_json().replacen('{', "{\"novelty\":1,", 1);
        assert!(matches!(
            Manifest::from_json(&text),
            Err(ManifestError::Json(_))
        ));
    }

    #[track_caller]
    fn refuses(field: &str, change: impl FnOnce(&mut Manifest)) {
        let mut changed = manifest();
        change(&mut changed);
        match Manifest::from_json(&changed.to_json()) {
            Err(ManifestError::Range { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: {other:?}"),
        }
    }

    fn point() -> OperatingPoint {
        OperatingPoint {
            name: "youden".into(),
            logit_threshold: 0.1,
            sensitivity: 0.9,
            specificity: 0.8,
        }
    }

    #[test]
    fn numbers_outside_their_ranges_are_refused() {
        refuses("study_rule.smoothing_slices", |m| {
            m.study_rule.as_mut().unwrap().smoothing_slices = 2
        });
        refuses("study_rule.top_slices", |m| {
            m.study_rule.as_mut().unwrap().top_slices = 0
        });
        refuses("width", |m| m.width = -1.0);
        refuses("temperature", |m| m.temperature = Some(0.0));
        refuses("operating_points.sensitivity", |m| {
            m.operating_points = alloc::vec![OperatingPoint {
                sensitivity: 1.1,
                ..point()
            }];
        });
        refuses("metrics.low", |m| {
            let (name, part) = ("auroc".into(), "test".into());
            m.metrics = alloc::vec![Metric {
                name,
                level: Level::Slice,
                part,
                value: 0.9,
                low: 0.95,
                high: 0.94
            }];
        });
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        refuses("number of operating_points", |m| {
            m.validation = Validation::Validated
        });
        refuses("number of self_test", |m| m.precision = Precision::Float32);
        refuses("number of outputs", |m| m.outputs.clear());
    }

    /// A threshold or a window that is read back one bit off gives other results than those that were measured.
    #[test]
    fn numbers_keep_their_bits() {
        let mut manifest = manifest();
        manifest.preprocess.windows[0].level_hu = -600.1 - f64::EPSILON * 512.0;
        manifest.width = 0.1 + 0.2;
        manifest.operating_points = (1..1000_u16)
            .map(|n| OperatingPoint {
                logit_threshold: f32::from(n).sqrt().sin(),
                ..point()
            })
            .collect();
        assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
    }
}
