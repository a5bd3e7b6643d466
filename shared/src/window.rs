//! From HU to u8 by a window: LINEAR_EXACT of PS3.3 C.11.2.1.3.2, truncated.

use serde::{Deserialize, Serialize};

/// A window by its level (centre) and width in HU.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Window Center (0028,1050), HU.
    pub level_hu: f64,
    /// Window Width (0028,1051), HU; greater than 0.
    pub width_hu: f64,
}

/// Lung window: level -600 HU, width 1500 HU.
pub const LUNG: Window = Window {
    level_hu: -600.0,
    width_hu: 1500.0,
};

/// Pulmonary embolism window: level 100 HU, width 700 HU.
pub const PULMONARY_EMBOLISM: Window = Window {
    level_hu: 100.0,
    width_hu: 700.0,
};

/// Mediastinal window: level 40 HU, width 400 HU.
pub const MEDIASTINAL: Window = Window {
    level_hu: 40.0,
    width_hu: 400.0,
};

impl Window {
    /// Lower and upper bound in HU: `level -/+ width / 2`.
    #[must_use]
    pub fn bounds_hu(&self) -> (f64, f64) {
        let half = self.width_hu / 2.0;
        (self.level_hu - half, self.level_hu + half)
    }

    /// Windowed value of `hu`: `trunc(((clamp(hu, lo, hi) - lo) x 255) / (hi - lo))`, in f64, 0..=255.
    ///
    /// Without meaning, but no panic, where [`Window::is_usable`] says no. This is LINEAR_EXACT (PS3.3 C.11.2.1.3.2) with truncation, not LINEAR (which uses width - 1 and level - 0.5).
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the value lies in 0..=255 after clamping; the cast is the truncation"
    )]
    pub fn apply(&self, hu: f64) -> u8 {
        let (low, high) = self.bounds_hu();
        // Not `f64::clamp`, which panics where `low` is above `high`.
        let clipped = match hu {
            hu if hu < low => low,
            hu if hu > high => high,
            hu => hu,
        };
        (((clipped - low) * 255.0) / (high - low)) as u8
    }

    /// Whether the numbers make a window: finite, width greater than 0, bounds that differ.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        let (low, high) = self.bounds_hu();
        low.is_finite() && high.is_finite() && self.width_hu > 0.0 && low < high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn window_clamps_at_both_edges() {
        assert_eq!(LUNG.apply(-1350.0), 0);
        assert_eq!(LUNG.apply(-5000.0), 0);
        assert_eq!(LUNG.apply(150.0), 255);
        assert_eq!(LUNG.apply(5000.0), 255);
    }

    #[test]
    fn no_window_panics() {
        for width_hu in [-1.0, 0.0, f64::NAN, f64::INFINITY] {
            let window = Window {
                level_hu: 0.0,
                width_hu,
            };
            assert!(!window.is_usable());
            core::hint::black_box(window.apply(5.0));
        }
        assert_eq!(LUNG.apply(f64::NAN), 0);
    }

    #[test]
    fn window_truncates_between_the_edges() {
        assert_eq!(MEDIASTINAL.apply(40.0), 127);
        assert_eq!(PULMONARY_EMBOLISM.apply(449.9), 254);
    }
}
