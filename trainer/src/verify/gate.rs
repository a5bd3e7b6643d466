//! The gate: may the int8 file be deployed in place of the f32 file?

use serde::Serialize;

use super::AtOperatingPoint;

/// What quantization may cost at the operating point, in percentage points.
///
/// Both are bounded: a shift of all logits costs no sensitivity, and calls everything positive. The figures that are held against them are those of the
/// validation part, not an end of their interval: the part is the same for both files, so that the change is known of its slices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Margins {
    /// Of sensitivity.
    pub sensitivity_points: f64,
    /// Of specificity.
    pub specificity_points: f64,
}

impl Default for Margins {
    fn default() -> Self {
        Self {
            sensitivity_points: 0.5,
            specificity_points: 2.0,
        }
    }
}

/// Why the file may not be deployed, a sentence each; empty where it may, and where the model has no operating point to be held against.
pub(super) fn faults(point: Option<&AtOperatingPoint>, margins: Margins) -> Vec<String> {
    let Some(point) = point else {
        return Vec::new();
    };
    let of = |name, class, change: f64, margin: f64| {
        let points = change * 100.0;
        if points.is_nan() {
            // It cannot have fallen, but neither was it shown to stand.
            Some(format!("no {class} slice shows the {name}"))
        } else if points < -margin {
            let lost = -points;
            Some(format!(
                "{name} fell by {lost:.2} points, allowed are {margin}"
            ))
        } else {
            None
        }
    };
    let (sensitivity, specificity) = (point.sensitivity.change, point.specificity.change);
    [
        of(
            "sensitivity",
            "positive",
            sensitivity,
            margins.sensitivity_points,
        ),
        of(
            "specificity",
            "negative",
            specificity,
            margins.specificity_points,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::Pair;
    use super::*;

    fn found(sensitivity: f64, specificity: f64) -> Vec<String> {
        let pair = |change| Pair {
            float: 0.9,
            int8: 0.9 + change,
            change,
            low: change,
            high: change,
        };
        let point = AtOperatingPoint {
            name: "sensitivity-0.90".to_owned(),
            logit_threshold: 0.0,
            sensitivity: pair(sensitivity),
            specificity: pair(specificity),
        };
        faults(Some(&point), Margins::default())
    }

    #[test]
    fn either_figure_alone_closes_the_gate() {
        assert!(found(-0.005, -0.02).is_empty());
        assert_eq!(
            found(-0.006, 0.1),
            ["sensitivity fell by 0.60 points, allowed are 0.5"]
        );
        assert_eq!(
            found(0.1, -0.03),
            ["specificity fell by 3.00 points, allowed are 2"]
        );
        assert_eq!(found(-0.1, -0.1).len(), 2);
    }

    #[test]
    fn a_figure_that_no_slice_shows_closes_the_gate() {
        assert_eq!(
            found(f64::NAN, 0.0),
            ["no positive slice shows the sensitivity"]
        );
        assert_eq!(
            found(0.0, f64::NAN),
            ["no negative slice shows the specificity"]
        );
    }

    #[test]
    fn without_an_operating_point_there_is_nothing_to_hold_the_file_against() {
        assert!(faults(None, Margins::default()).is_empty());
    }
}
