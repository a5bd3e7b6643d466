//! The words of the page: what is said of a study, once, for the worklist, the study view and the JSON.
//!
//! A study is suspected, or not detected on N of M slices; it is never called negative. Where the model was trained on the phantom and the patient is real, nothing is
//! said of the patient.

use std::cmp::Reverse;

use super::worklist::Place;
use crate::result::{Outcome, State, StudyResult};

/// Words for a study's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Words {
    /// How it is set off; the class of the badge.
    pub(crate) tone: Tone,
    /// One or two words.
    pub(crate) label: &'static str,
    /// The whole statement.
    pub(crate) sentence: String,
}

/// How an answer is set off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Tone {
    /// Suspected.
    Alarm,
    /// Needs a person: not analysed.
    Attention,
    /// Still coming.
    Busy,
    /// Not detected.
    Calm,
    /// A demonstration model's answer on a real patient.
    Demonstration,
}

impl Tone {
    /// Class in the style sheet, and the word in the JSON.
    pub(crate) fn class(self) -> &'static str {
        match self {
            Self::Alarm => "alarm",
            Self::Attention => "attention",
            Self::Busy => "busy",
            Self::Calm => "calm",
            Self::Demonstration => "demonstration",
        }
    }
}

/// Whether the answer says something about this patient.
pub(crate) fn is_meant(result: &StudyResult) -> bool {
    !result.model.is_demonstration || result.is_phantom
}

/// The words for a study.
pub(crate) fn words(result: &StudyResult) -> Words {
    let (analysed, slices) = (result.n_analysed(), result.slices.len());
    let is_decided = matches!(result.outcome, Outcome::Positive | Outcome::NotDetected);
    if is_decided && !is_meant(result) {
        return Words {
            tone: Tone::Demonstration,
            label: "No statement",
            sentence: format!(
                "Demonstration model, real patient: {analysed} of {slices} slices ran, the answer means nothing"
            ),
        };
    }
    match &result.outcome {
        Outcome::Positive if result.state == State::Complete => Words {
            tone: Tone::Alarm,
            label: "Suspected",
            sentence: format!("Pulmonary embolism suspected, {}", n_of(analysed, slices)),
        },
        Outcome::Positive => Words {
            tone: Tone::Alarm,
            label: "Suspected",
            sentence: format!(
                "Pulmonary embolism suspected, provisional: {} so far",
                n_slices(analysed)
            ),
        },
        Outcome::NotDetected => Words {
            tone: Tone::Calm,
            label: "Not detected",
            sentence: format!("Not detected on {analysed} of {slices} slices"),
        },
        Outcome::Pending => Words {
            tone: Tone::Busy,
            label: "Receiving",
            sentence: format!("{} analysed so far", n_slices(analysed)),
        },
        Outcome::NotAnalysed { message, .. } => Words {
            tone: Tone::Attention,
            label: "Not analysed",
            sentence: message.clone(),
        },
    }
}

/// `1 slice`, `2 slices`.
pub(crate) fn n_slices(n: usize) -> String {
    if n == 1 {
        "1 slice".into()
    } else {
        format!("{n} slices")
    }
}

fn n_of(analysed: usize, slices: usize) -> String {
    if analysed == slices {
        format!("all {slices} slices analysed")
    } else {
        format!("{analysed} of {slices} slices analysed")
    }
}

/// A logit as a percentage; never rounded to certainty.
pub(crate) fn percent(logit: f32) -> String {
    let percent = 100.0 * shared::probability::sigmoid(logit);
    if percent.is_nan() {
        "unknown".into()
    } else if percent < 1.0 {
        "< 1 %".into()
    } else if percent > 99.0 {
        "> 99 %".into()
    } else {
        format!("{percent:.0} %")
    }
}

/// A study's place in the worklist, the lowest first: positive ones where that means something, then the latest.
pub(crate) fn place(result: &StudyResult) -> Place {
    let is_first = result.is_positive() && is_meant(result);
    (!is_first, Reverse(result.last_received_ms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::example;

    #[test]
    fn nothing_is_ever_called_negative() {
        for result in example::studies() {
            let words = words(&result);
            let said = format!("{} {}", words.label, words.sentence).to_lowercase();
            assert!(!said.contains("negative"), "{said}");
        }
    }

    #[test]
    fn counts_are_part_of_the_statement() {
        let result = example::not_detected();
        assert_eq!(words(&result).sentence, "Not detected on 238 of 240 slices");
    }

    #[test]
    fn positive_studies_come_first_then_the_latest() {
        let mut all = example::studies();
        all.sort_by_key(place);
        let first_other = all.iter().position(|result| !result.is_positive()).unwrap();
        assert!(
            first_other > 0
                && all[first_other..]
                    .iter()
                    .all(|result| !result.is_positive())
        );
        let latest_first =
            |part: &[StudyResult]| part.is_sorted_by_key(|result| -result.last_received_ms);
        assert!(latest_first(&all[..first_other]) && latest_first(&all[first_other..]));
    }

    #[test]
    fn a_demonstration_model_neither_reorders_nor_speaks_of_real_patients() {
        let mut all = example::studies();
        for result in &mut all {
            result.model.is_demonstration = true;
            result.is_phantom = false;
            assert_ne!(words(result).tone, Tone::Alarm);
        }
        all.sort_by_key(place);
        assert!(all.is_sorted_by_key(|result| -result.last_received_ms));
        all[0].is_phantom = true;
        all[0].outcome = Outcome::Positive;
        assert_eq!(words(&all[0]).tone, Tone::Alarm);
    }

    #[test]
    fn a_probability_is_never_rounded_to_certainty() {
        let shown: Vec<String> = [-9.0, 0.0, 4.0, 9.0].map(percent).into();
        assert_eq!(shown, ["< 1 %", "50 %", "98 %", "> 99 %"]);
    }
}
