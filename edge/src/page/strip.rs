//! The strip: one bar for each slice of a study, feet to head, as high as its probability. Inline SVG.
//!
//! A slice that was not analysed is a hatched bar of full height: it is seen, and never looks like a low probability. Where nothing is said of the
//! patient, every analysed slice has the same low bar. Colours are presentation
//! attributes, because the content security policy allows no inline styles.

use maud::{Markup, html};
use shared::probability::sigmoid;

use super::words::is_meant;
use crate::result::StudyResult;

/// Height of the large strip in its own units; a slice is one unit wide.
const HEIGHT: f32 = 100.0;
/// Bars of the small strip in the worklist.
const SMALL_BARS: usize = 60;
/// Lowest bar that is still seen.
const LEAST: f32 = 2.0;

/// The large strip with the threshold and a mark at `shown`.
pub(crate) fn large(result: &StudyResult, shown: usize) -> Markup {
    let n_slices = result.slices.len();
    let is_meant = is_meant(result);
    html! {
        svg.strip id="strip" viewBox=(format!("0 0 {} {HEIGHT}", n_slices.max(1))) preserveAspectRatio="none" role="img" aria-label=(description(result)) {
            defs {
                pattern #hatch width="3" height="6" patternUnits="userSpaceOnUse" {
                    rect width="3" height="6" fill="#20262d" {}
                    rect width="3" height="2" fill="#5c6773" {}
                }
            }
            @for (index, slice) in result.slices.iter().enumerate() {
                @match slice.logit {
                    Some(logit) => {
                        @let probability = if is_meant { sigmoid(logit) } else { 0.0 };
                        @let height = (HEIGHT * probability).max(LEAST);
                        rect x=(index) y=(HEIGHT - height) width="0.9" height=(height) fill=(colour(probability)) {}
                    },
                    None => rect x=(index) y="0" width="0.9" height=(HEIGHT) fill="url(#hatch)" {},
                }
            }
            @if let (Some(threshold), true) = (result.threshold, is_meant) {
                @let y = HEIGHT * (1.0 - sigmoid(threshold));
                line x1="0" x2=(n_slices) y1=(y) y2=(y) stroke="#e8eef4" stroke-width="1" stroke-dasharray="4 4" vector-effect="non-scaling-stroke" {}
            }
            rect #mark x=(shown) y="0" width="1" height=(HEIGHT) fill="none" stroke="#ffffff" stroke-width="2" vector-effect="non-scaling-stroke" {}
        }
    }
}

/// The small strip: the highest probability of each of at most [`SMALL_BARS`] parts.
pub(crate) fn small(result: &StudyResult) -> Markup {
    let n_slices = result.slices.len();
    let n_bars = n_slices.min(SMALL_BARS);
    let probability = |logit| {
        if is_meant(result) {
            sigmoid(logit)
        } else {
            0.0
        }
    };
    html! {
        svg.small viewBox=(format!("0 0 {} 20", n_bars.max(1))) preserveAspectRatio="none" aria-hidden="true" focusable="false" {
            @for bar in 0..n_bars {
                @let part = &result.slices[bar * n_slices / n_bars..(bar + 1) * n_slices / n_bars];
                @let highest = part.iter().filter_map(|slice| slice.logit).reduce(f32::max);
                @match highest.map(probability) {
                    Some(probability) => {
                        @let height = (20.0 * probability).max(1.0);
                        rect x=(bar) y=(20.0 - height) width="0.85" height=(height) fill=(colour(probability)) {}
                    },
                    None => rect x=(bar) y="8" width="0.85" height="4" fill="#5c6773" {},
                }
            }
        }
    }
}

fn description(result: &StudyResult) -> String {
    if !is_meant(result) {
        return format!(
            "{} from feet to head, without a statement",
            super::words::n_slices(result.slices.len())
        );
    }
    let highest = result
        .top
        .first()
        .and_then(|&index| Some((index, result.slices.get(index)?.logit?)));
    let highest = highest.map_or_else(String::new, |(index, logit)| {
        format!(
            "; highest {} at slice {}",
            super::words::percent(logit),
            index + 1
        )
    });
    format!(
        "Probability of each of {} from feet to head, {} not analysed{highest}",
        super::words::n_slices(result.slices.len()),
        result.n_not_analysed()
    )
}

/// From slate through amber to red; lightness rises with it, so that it reads without colour too.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a mean of values from 0 to 255"
)]
fn colour(probability: f32) -> String {
    const STOPS: [(f32, [f32; 3]); 4] = [
        (0.0, [63.0, 84.0, 104.0]),
        (0.4, [104.0, 134.0, 160.0]),
        (0.7, [240.0, 178.0, 74.0]),
        (1.0, [255.0, 107.0, 87.0]),
    ];
    // What is no number stands out rather than looks low.
    let share = if probability.is_nan() {
        1.0
    } else {
        probability.clamp(0.0, 1.0)
    };
    let after = STOPS
        .iter()
        .position(|stop| stop.0 >= share)
        .unwrap_or(STOPS.len() - 1)
        .max(1);
    let ((from, low), (to, high)) = (STOPS[after - 1], STOPS[after]);
    let part = (share - from) / (to - from);
    let mix = |channel: usize| (low[channel] + (high[channel] - low[channel]) * part) as u8;
    format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::example;

    #[test]
    fn every_slice_has_its_bar_and_none_without_an_answer_looks_low() {
        let result = example::not_detected();
        let svg = large(&result, 3).into_string();
        assert_eq!(svg.matches("width=\"0.9\"").count(), result.slices.len());
        assert_eq!(svg.matches("url(#hatch)").count(), result.n_not_analysed());
        assert!(svg.contains("2 not analysed") && svg.contains("<rect id=\"mark\" x=\"3\""));
    }

    #[test]
    fn an_empty_study_has_an_empty_strip() {
        let mut result = example::not_detected();
        result.slices.clear();
        result.top = vec![7];
        assert!(!large(&result, 0).into_string().contains("0.9"));
        assert!(!small(&result).into_string().contains("<rect"));
    }

    #[test]
    fn colours_end_where_they_should() {
        assert_eq!(colour(0.0), "#3f5468");
        assert_eq!(colour(1.0), "#ff6b57");
        assert_eq!(colour(f32::NAN), "#ff6b57");
    }
}
