//! The parameters of preprocessing: data, stored in the model file, never an option of the board.

use serde::{Deserialize, Serialize};

use crate::SIDE;
use crate::window::{LUNG, MEDIASTINAL, PULMONARY_EMBOLISM, Window};

/// The version of [`PreprocessSpec`] that this code reads and writes.
pub const SPEC_VERSION: u32 = 1;

/// How a windowed HU becomes a u8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Normalisation {
    /// By the window's own bounds; each slice on its own.
    Window,
    /// By the minimum and maximum of the whole series after clipping, as the JPEG copy that the publication trained on.
    /// For training on such data only: the board refuses models that need it, because the series ends after its slices arrive.
    SeriesMinmax,
}

/// Everything that preprocessing depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreprocessSpec {
    /// [`SPEC_VERSION`].
    pub version: u32,
    /// How a windowed HU becomes a u8.
    pub normalisation: Normalisation,
    /// The window of each channel, in channel order.
    pub windows: [Window; 3],
    /// Side of the square output in pixels; [`SIDE`].
    pub side: u32,
    /// Whether everything outside the largest connected body region is set to air first ([`crate::mask`]).
    pub body_mask: bool,
}

/// Why a spec cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// Written by a newer or older version.
    #[error(
        "PreprocessSpec version {found} is not supported; this build reads version {SPEC_VERSION}"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// Another input size than the network's.
    #[error("PreprocessSpec side is {found}; this build makes {SIDE} x {SIDE} tensors")]
    Side {
        /// The side found.
        found: u32,
    },
    /// A window that is none.
    #[error(
        "window of channel {channel}: level {level_hu} HU, width {width_hu} HU; both must be finite, the width greater than 0"
    )]
    Window {
        /// Channel, counted from 0.
        channel: usize,
        /// Level found.
        level_hu: f64,
        /// Width found.
        width_hu: f64,
    },
}

impl Default for PreprocessSpec {
    fn default() -> Self {
        Self {
            version: SPEC_VERSION,
            normalisation: Normalisation::Window,
            windows: [LUNG, PULMONARY_EMBOLISM, MEDIASTINAL],
            side: 256,
            body_mask: false,
        }
    }
}

impl PreprocessSpec {
    /// Checks version, side and windows.
    ///
    /// # Errors
    /// The first field out of its range.
    pub fn check(&self) -> Result<(), SpecError> {
        if self.version != SPEC_VERSION {
            return Err(SpecError::Version {
                found: self.version,
            });
        }
        if usize::try_from(self.side) != Ok(SIDE) {
            return Err(SpecError::Side { found: self.side });
        }
        match self
            .windows
            .iter()
            .enumerate()
            .find(|(_, window)| !window.is_usable())
        {
            Some((channel, w)) => Err(SpecError::Window {
                channel,
                level_hu: w.level_hu,
                width_hu: w.width_hu,
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spec_survives_json() {
        let spec = PreprocessSpec::default();
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<PreprocessSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn unknown_fields_versions_and_sizes_are_refused() {
        let text = serde_json::to_string(&PreprocessSpec::default()).unwrap();
        assert!(
            serde_json::from_str::<PreprocessSpec>(&text.replacen('{', "{\"gamma\":1,", 1))
                .is_err()
        );
        let newer = PreprocessSpec {
            version: 2,
            ..Default::default()
        };
        assert_eq!(newer.check(), Err(SpecError::Version { found: 2 }));
        let larger = PreprocessSpec {
            side: 512,
            ..Default::default()
        };
        assert_eq!(larger.check(), Err(SpecError::Side { found: 512 }));
    }
}
