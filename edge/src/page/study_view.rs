//! The study view: the statement, the strip, the slice, and what was not analysed or not judged, with reasons.

use maud::{Markup, html};
use serde::Deserialize;

use super::layout::moment;
use super::person::Person;
use super::picture::Window;
use super::{strip, words, worklist};
use crate::result::{Outcome, SliceResult, StudyResult};

/// Most reasons that are listed.
const MAX_REASONS: usize = 20;

/// What of the study is shown; the query of the address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct View {
    /// Index of the slice, from 0; the highest where absent.
    pub(crate) slice: Option<usize>,
    /// The window.
    pub(crate) window: Window,
    /// 1 for the heat map.
    pub(crate) heatmap: u8,
}

/// The page of one study.
pub(crate) fn page(result: &StudyResult, view: View, is_anonymous: bool) -> Markup {
    let person = Person::new(&result.patient);
    let words = words::words(result);
    let last = result.slices.len().saturating_sub(1);
    let shown = view
        .slice
        .or_else(|| result.top.first().copied())
        .unwrap_or(last / 2)
        .min(last);
    html! {
        nav.back aria-label="Breadcrumb" { a href="/" { "← Worklist" } }
        section.statement.(words.tone.class()) aria-labelledby="answer" {
            div {
                h1 #answer { span.badge.(words.tone.class()) { (words.label) } " " span.who { (worklist::who(&person, result, is_anonymous)) } }
                p.sentence { (words.sentence) }
                p.quiet { (facts(&person, is_anonymous)) }
                @for remark in &result.remarks { p.remark { (remark) } }
            }
            @if let (Some(score), true) = (result.score, words::is_meant(result)) {
                dl.score {
                    dt { "Study score" } dd { (words::percent(score)) }
                    @if let Some(threshold) = result.threshold { dt { "Threshold" } dd.quiet { (words::percent(threshold)) } }
                }
            }
        }
        @if !result.slices.is_empty() {
            section.viewer aria-label="Slices" {
                (picture(result, view, shown))
                (beside(result, view, shown))
            }
        }
        (not_analysed(result))
        (not_judged(result))
        (provenance(result))
    }
}

fn facts(person: &Person, is_anonymous: bool) -> String {
    let mut facts = vec![person.description.as_str(), person.study_date.as_str()];
    if !is_anonymous {
        facts.extend([
            person.patient_id.as_str(),
            person.birth_date.as_str(),
            person.accession.as_str(),
        ]);
    }
    facts.retain(|fact| !fact.is_empty());
    facts.join(" · ")
}

/// Address of the view.
fn address(result: &StudyResult, slice: usize, window: Window, heatmap: u8) -> String {
    format!(
        "/studies/{}?slice={slice}&window={}&heatmap={heatmap}",
        result.study_uid,
        window.name()
    )
}

fn picture(result: &StudyResult, view: View, shown: usize) -> Markup {
    let slice = &result.slices[shown];
    let address = format!(
        "/studies/{}/slices/{shown}.png?window={}&heatmap={}",
        result.study_uid,
        view.window.name(),
        view.heatmap
    );
    html! {
        figure #slice data-study=(result.study_uid) data-slice=(shown) data-window=(view.window.name()) data-heatmap=(view.heatmap) data-last=(result.slices.len() - 1) {
            p #no-picture.no-picture hidden role="status" {}
            img #picture src=(address) width="512" height="512" alt=(format!("Slice {} of {}, {} window", shown + 1, result.slices.len(), view.window.label()));
            figcaption {
                span { "Slice " strong #slice-number { (shown + 1) } " of " (result.slices.len()) }
                span #slice-place { @if let Some(z) = slice.z_mm { (format!("z {z:.1} mm")) } }
                strong #slice-answer { (answer(result, slice)) }
            }
        }
    }
}

fn beside(result: &StudyResult, view: View, shown: usize) -> Markup {
    let data = result.slices.iter().map(|slice| slice_data(result, slice));
    let data: Vec<String> = data.collect();
    html! {
        div.beside {
            div.strip-box {
                (strip::large(result, shown))
                p.axis aria-hidden="true" { span { "feet" } span { "head" } }
            }
            form.choose method="get" {
                label for="slider" { "Slice" }
                input #slider type="range" name="slice" min="0" max=(result.slices.len() - 1) value=(shown) data-answers=(data.join("|"));
                input type="hidden" name="window" value=(view.window.name());
                input type="hidden" name="heatmap" value=(view.heatmap);
                button.scriptless type="submit" { "Show" }
            }
            div.choices {
                div.segment role="group" aria-label="Window" {
                    @for window in Window::ALL {
                        a.window id=(format!("window-{}", window.name())) href=(address(result, shown, window, view.heatmap)) data-window=(window.name()) aria-current=[(window == view.window).then_some("true")] { (window.label()) }
                    }
                }
                div.segment role="group" aria-label="Heat map" {
                    a #heatmap href=(address(result, shown, view.window, 1 - view.heatmap.min(1))) aria-current=[(view.heatmap == 1).then_some("true")] { "Heat map" }
                }
            }
            p.quiet #heat-note hidden[view.heatmap != 1] { "Warm where this slice's answer comes from; it says where, not how much." }
            // Where nothing is said of the patient, no slice is held out either.
            @if !result.top.is_empty() && words::is_meant(result) && !matches!(result.outcome, Outcome::NotAnalysed { .. }) {
                h2 { "Highest" }
                ol.top {
                    @for &index in &result.top {
                        @if let Some(logit) = result.slices.get(index).and_then(|slice| slice.logit) {
                            li { a.go id=(format!("highest-{index}")) href=(address(result, index, view.window, view.heatmap)) data-slice=(index) { "Slice " (index + 1) span { (words::percent(logit)) } } }
                        }
                    }
                }
            }
            p.keys.scripted { kbd { "←" } kbd { "→" } " slice   " kbd { "1" } kbd { "2" } kbd { "3" } " window   " kbd { "H" } " heat map" }
        }
    }
}

/// A slice's answer in words.
fn answer(result: &StudyResult, slice: &SliceResult) -> String {
    match slice.logit {
        None => "not analysed".into(),
        Some(_) if !words::is_meant(result) => "no statement".into(),
        Some(logit) => words::percent(logit),
    }
}

/// What the script writes under the picture: `z,answer`.
fn slice_data(result: &StudyResult, slice: &SliceResult) -> String {
    let answer = answer(result, slice);
    let place = slice
        .z_mm
        .map_or_else(String::new, |z| format!("z {z:.1} mm"));
    format!("{place},{answer}")
}

fn not_analysed(result: &StudyResult) -> Markup {
    let mut reasons: Vec<(&str, usize, usize)> = Vec::new();
    for (index, slice) in result.slices.iter().enumerate() {
        let Some(reason) = slice.reason.as_deref().filter(|_| slice.logit.is_none()) else {
            continue;
        };
        match reasons.iter_mut().find(|found| found.0 == reason) {
            Some(found) => found.1 += 1,
            None => reasons.push((reason, 1, index)),
        }
    }
    html! {
        @if result.n_not_analysed() > 0 {
            section {
                h2 { "Not analysed" }
                @if let Outcome::NotAnalysed { message, .. } = &result.outcome { p { (message) } }
                table.reasons {
                    thead { tr { th scope="col" { "Slices" } th scope="col" { "First" } th scope="col" { "Reason" } } }
                    tbody {
                        @for (reason, n, first) in reasons.iter().take(MAX_REASONS) {
                            tr { td { (n) } td { (first + 1) } td { (reason) } }
                        }
                    }
                }
                @if reasons.len() > MAX_REASONS { p.quiet { (reasons.len() - MAX_REASONS) " further reasons." } }
            }
        }
    }
}

fn not_judged(result: &StudyResult) -> Markup {
    html! {
        @if !result.not_judged.is_empty() || result.n_other_objects > 0 {
            section {
                h2 { "Not judged" }
                @if !result.not_judged.is_empty() {
                    table.reasons {
                        thead { tr { th scope="col" { "Slices" } th scope="col" { "Analysed" } th scope="col" { "Reason" } th scope="col" { "Series" } } }
                        tbody {
                            @for other in &result.not_judged {
                                tr {
                                    td { (other.n_slices) } td { (other.n_analysed) } td { (other.reason) }
                                    td.uid { @if let Some(uid) = &other.series_uid { (uid) } @else { "unknown" } }
                                }
                            }
                        }
                    }
                }
                @if result.n_other_objects > 0 { p.quiet { (others(result.n_other_objects)) " stored, not analysed." } }
            }
        }
    }
}

fn others(n: u64) -> String {
    if n == 1 {
        "1 other object (report, capture)".into()
    } else {
        format!("{n} other objects (reports, captures)")
    }
}

fn provenance(result: &StudyResult) -> Markup {
    html! {
        section {
            h2 { "About this result" }
            dl.facts {
                dt { "Judged series" }
                dd { @if let Some(uid) = &result.series_uid { (result.series_choice) br; span.uid { (uid) } } @else { "none" } }
                dt { "Study" } dd.uid { (result.study_uid) }
                dt { "Model" } dd { (result.model.name) @if result.model.is_demonstration { " (demonstration)" } }
                dt { "Received" } dd { (moment(result.first_received_ms)) " to " (moment(result.last_received_ms)) }
                dt { "Decided" } dd { (moment(result.decided_ms)) ", revision " (result.revision) }
                @if result.is_lossy { dt { "Compression" } dd { "lossy" } }
                @if result.is_phantom { dt { "Origin" } dd { "synthetic phantom" } }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::example;

    #[test]
    fn reasons_are_grouped_and_counted() {
        let html = page(&example::not_detected(), View::default(), false).into_string();
        assert!(html.contains("Not detected on 238 of 240 slices"));
        assert!(html.contains("<td>2</td><td>18</td><td>pixel-data: a JPEG scan ends early</td>"));
        assert!(html.contains("LOCALIZER"));
    }

    #[test]
    fn every_view_of_every_study_is_a_page() {
        for mut result in example::studies() {
            for slice in [None, Some(0), Some(usize::MAX)] {
                let view = View {
                    slice,
                    ..View::default()
                };
                assert!(
                    page(&result, view, false)
                        .into_string()
                        .contains("id=\"answer\"")
                );
            }
            result.slices.clear();
            assert!(
                !page(&result, View::default(), true)
                    .into_string()
                    .contains("id=\"picture\"")
            );
        }
    }

    #[test]
    fn no_number_stands_on_the_page_of_a_patient_of_whom_nothing_is_said() {
        let positive = example::studies()
            .into_iter()
            .find(StudyResult::is_positive);
        let mut result = positive.unwrap();
        result.is_phantom = false;
        result.model.is_demonstration = true;
        let html = page(&result, View::default(), false).into_string();
        assert!(
            html.contains("no statement") && !html.contains(" %"),
            "{html}"
        );
        assert!(!html.contains("stroke-dasharray"), "a threshold");
    }

    #[test]
    fn a_hidden_patient_stays_hidden() {
        let html = page(&example::not_detected(), View::default(), true).into_string();
        for secret in ["Novak", "2031028", "1961", "A048004"] {
            assert!(!html.contains(secret), "{secret}");
        }
    }
}
