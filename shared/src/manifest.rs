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

    fn check(&self) -> Result<(), ManifestError> {
        self.preprocess.check().map_err(ManifestError::Preprocess)?;
        let range = |ok: bool, field, found, allowed| {
            if ok {
                Ok(())
            } else {
                Err(ManifestError::Range {
                    field,
                    found,
                    allowed,
                })
            }
        };
        range(
            self.width > 0.0 && self.width <= 16.0,
            "width",
            self.width,
            "greater than 0, at most 16",
        )?;
        if let Some(temperature) = self.temperature {
            range(
                temperature.is_finite() && temperature > 0.0,
                "temperature",
                temperature,
                "finite, greater than 0",
            )?;
        }
        for point in &self.operating_points {
            let threshold = f64::from(point.logit_threshold);
            range(
                threshold.is_finite(),
                "operating_points.logit_threshold",
                threshold,
                "finite",
            )?;
        }
        let Some(rule) = self.study_rule else {
            return Ok(());
        };
        let smoothing = rule.smoothing_slices;
        range(
            smoothing % 2 == 1 && smoothing <= 99,
            "study_rule.smoothing_slices",
            smoothing.into(),
            "odd, 1 to 99",
        )?;
        range(
            (1..=999).contains(&rule.top_slices),
            "study_rule.top_slices",
            rule.top_slices.into(),
            "1 to 999",
        )?;
        let threshold = f64::from(rule.logit_threshold);
        range(
            threshold.is_finite(),
            "study_rule.logit_threshold",
            threshold,
            "finite",
        )
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
        let even = Manifest {
            study_rule: Some(StudyRule {
                smoothing_slices: 2,
                top_slices: 5,
                logit_threshold: 0.5,
            }),
            ..manifest()
        };
        assert!(matches!(
            Manifest::from_json(&even.to_json()),
            Err(ManifestError::Range { .. })
        ));
    }
}
