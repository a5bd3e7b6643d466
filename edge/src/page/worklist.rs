//! The worklist: a row for each study, positive ones first.

use std::cmp::Reverse;

use maud::{Markup, html};

use super::layout::moment;
use super::person::Person;
use super::words::Tone;
use super::{strip, words};
use crate::result::{State, StudyResult};

/// Where a study stands in the worklist, the lowest first.
pub(crate) type Place = (bool, Reverse<i64>);

/// A row: what the worklist needs of a study.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    /// Where it stands.
    pub(crate) place: Place,
    tone: Tone,
    html: Markup,
}

impl Listed {
    /// The row of a study.
    pub(crate) fn new(result: &StudyResult, is_anonymous: bool) -> Self {
        let words = words::words(result);
        Self {
            place: words::place(result),
            tone: words.tone,
            html: row(result, &words, is_anonymous),
        }
    }
}

/// The worklist of `rows`, already in order; `n_more` older ones are not listed.
pub(crate) fn page(rows: &[Listed], n_more: usize) -> Markup {
    let n_positive = rows.iter().filter(|row| row.tone == Tone::Alarm).count();
    html! {
        div.title {
            h1 { "Worklist" }
            p.counts {
                span.count-alarm[n_positive > 0] #n-positive data-count=(n_positive) { strong { (n_positive) } " suspected" }
                span { strong { (rows.len() + n_more) } @if rows.len() + n_more == 1 { " study" } @else { " studies" } }
            }
        }
        @if rows.is_empty() {
            (nothing_yet())
        } @else {
            table.worklist {
                caption.unseen { "Studies, those with a suspected embolism first, then the latest" }
                thead { tr {
                    th scope="col" { "Result" }
                    th scope="col" { "Patient" }
                    th scope="col" { "Study" }
                    th scope="col" { "Slices" }
                    th scope="col" { "Received" }
                } }
                tbody {
                    @for row in rows { (row.html) }
                }
            }
        }
        @if n_more > 0 { p.quiet { (n_more) " older studies are not listed." } }
    }
}

fn row(result: &StudyResult, words: &words::Words, is_anonymous: bool) -> Markup {
    let person = Person::new(&result.patient);
    let address = format!("/studies/{}", result.study_uid);
    let identifier = format!("study-{}", result.study_uid);
    html! {
        tr.(words.tone.class()) {
            td {
                a.row-link id=(identifier) href=(address) {
                    span.badge.(words.tone.class()) { (words.label) }
                    span.unseen { ": " (who(&person, result, is_anonymous)) }
                }
                p.why { (detail(result, words)) }
            }
            td {
                span.who { (who(&person, result, is_anonymous)) }
                @if !is_anonymous { p.quiet { (person.patient_id) @if !person.birth_date.is_empty() { " · " (person.birth_date) } } }
            }
            td {
                (person.description)
                p.quiet { @if !is_anonymous { (person.accession) } }
            }
            td.slices { (strip::small(result)) p.quiet { (counts(result)) } }
            td.when { (moment(result.last_received_ms)) @if result.state != State::Complete { p.quiet { "arriving" } } }
        }
    }
}

fn detail(result: &StudyResult, words: &words::Words) -> String {
    match (words.tone, result.top.first(), result.score) {
        (Tone::Alarm, Some(&index), Some(score)) => {
            let provisional = if result.state == State::Complete {
                ""
            } else {
                ", provisional"
            };
            format!(
                "{} · slice {}{provisional}",
                words::percent(score),
                index + 1
            )
        }
        (Tone::Calm, ..) => format!(
            "on {} of {} slices",
            result.n_analysed(),
            result.slices.len()
        ),
        (Tone::Demonstration, ..) => "demonstration model".into(),
        (Tone::Busy, ..) => String::new(),
        _ => words.sentence.clone(),
    }
}

fn counts(result: &StudyResult) -> String {
    match result.n_not_analysed() {
        0 => words::n_slices(result.slices.len()),
        n => format!("{}, {n} not analysed", words::n_slices(result.slices.len())),
    }
}

/// The patient's name, or what stands for it.
pub(crate) fn who(person: &Person, result: &StudyResult, is_anonymous: bool) -> String {
    if is_anonymous || person.name.is_empty() {
        let uid = result.study_uid.as_str();
        let end = uid.get(uid.len().saturating_sub(6)..).unwrap_or(uid);
        format!("Study …{end}")
    } else {
        person.name.clone()
    }
}

fn nothing_yet() -> Markup {
    html! {
        section.empty {
            h2 { "No studies yet" }
            p { "Send a chest CT to this node, or run " code { "edge demo" } " on this machine to see a synthetic one." }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::example;

    fn shown(results: &[StudyResult], n_more: usize, is_anonymous: bool) -> String {
        let row = |result| Listed::new(result, is_anonymous);
        page(&results.iter().map(row).collect::<Vec<_>>(), n_more).into_string()
    }

    #[test]
    fn names_are_escaped() {
        let html = shown(&example::studies(), 0, false);
        assert!(!html.contains("<script>") && html.contains("&lt;script&gt;"));
        assert!(html.contains("García Márquez, Lucía"));
    }

    #[test]
    fn hidden_patients_leave_nothing_of_themselves() {
        let results = example::studies();
        let html = shown(&results, 0, true);
        for result in &results {
            let person = Person::new(&result.patient);
            for secret in [
                person.name,
                person.patient_id,
                person.birth_date,
                person.accession,
            ] {
                let secret = secret.replace('<', "&lt;").replace('>', "&gt;");
                assert!(!html.contains(&secret), "{secret}");
            }
        }
    }

    #[test]
    fn every_study_has_a_row_and_an_address() {
        let results = example::studies();
        let html = shown(&results, 3, false);
        for result in &results {
            assert!(html.contains(&format!("href=\"/studies/{}\"", result.study_uid)));
        }
        assert!(html.contains("3 older studies"));
        assert!(shown(&[], 0, false).contains("No studies yet"));
    }
}
