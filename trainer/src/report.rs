//! `report.html`: an evaluation on one self-contained page, for a browser without a network.

use std::path::Path;

use anyhow::{Context, Result};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use shared::{RESEARCH_USE, SIDE};

use crate::bootstrap::ECE_NOTE;
use crate::cache::Cache;
use crate::evaluate::{Evaluation, Figures, Miss, RsnaLoss, show};
use crate::metrics::NAMES;
use crate::plots;

const STYLE: &str = "
:root{--ink:#1f2937;--soft:#64748b;--line:#e2e8f0;--page:#f6f8fb;--card:#fff;--a:#0b6bcb;--b:#c2410c;--c:#15803d;--warn:#b91c1c}
@media(prefers-color-scheme:dark){:root{--ink:#e5e9f0;--soft:#9aa7b8;--line:#2c3644;--page:#10151c;--card:#18202a;--a:#5aa9f8;--b:#fb923c;--c:#4ade80;--warn:#f87171}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0}h2{font-size:18px;margin:34px 0 12px}
p{margin:6px 0;max-width:80ch}.soft{color:var(--soft)}
.notice{display:inline-block;margin-top:10px;padding:3px 12px;border-radius:99px;background:color-mix(in srgb,var(--b) 14%,transparent);color:var(--b);font-weight:600;font-size:13px}
.leak{margin:14px 0;padding:12px 16px;border-left:4px solid var(--warn);background:color-mix(in srgb,var(--warn) 10%,transparent);font-weight:600}
.warning{margin:14px 0;padding:12px 16px;border-left:4px solid var(--b);background:color-mix(in srgb,var(--b) 8%,transparent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:26px;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:13px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:14px}
.card h3{margin:0 0 6px;font-size:15px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left}
tr:last-child td{border-bottom:0}
.matrix td{text-align:center;font-size:20px;padding:12px}.matrix td small{display:block;font-size:12px;color:var(--soft)}
.good{background:color-mix(in srgb,var(--c) 12%,transparent)}.bad{background:color-mix(in srgb,var(--warn) 10%,transparent)}
.misses{display:grid;grid-template-columns:repeat(4,1fr);gap:12px}
.misses img{width:100%;border-radius:8px;background:#000;display:block}
figure{margin:0}figcaption{font-size:12px;color:var(--soft);margin-top:4px;overflow-wrap:anywhere}
.scroll{overflow-x:auto}code{font-size:12px;overflow-wrap:anywhere}
@media(max-width:700px){.misses{grid-template-columns:repeat(2,1fr)}}";

/// How many times the share of emboli the mean probability may be before the page says why.
const SHIFTED: f64 = 1.5;

/// The page. `run` is the folder whose training curves are shown where it has some.
///
/// # Errors
/// A picture cannot be encoded.
pub fn page(evaluation: &Evaluation, cache: &Cache, run: &Path) -> Result<String> {
    let misses: Vec<(&Miss, String)> = evaluation
        .misses
        .iter()
        .map(|miss| Ok((miss, picture(cache, miss.row)?)))
        .collect::<Result<_>>()?;
    let training = plots::training(run);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width,initial-scale=1";
                title { "Evaluation of " (evaluation.model) }
                style { (PreEscaped(STYLE)) }
            }
            body { main {
                (head(evaluation))
                (tiles(evaluation))
                h2 { "Curves" }
                div class="plots" {
                    (card("ROC", "Dots: the frozen operating points.", &plots::roc(evaluation)))
                    (card("Precision and recall of slices", "Dashed: the prevalence.", &plots::precision_recall(evaluation)))
                    (card("Reliability", &reliability_note(evaluation), &plots::reliability(evaluation)))
                    (card("Study scores", "Dashed: the study threshold, chosen on the validation part.", &plots::study_scores(evaluation)))
                    @if let Some(training) = &training {
                        (card("Training", "Loss by step and, after each epoch, on the validation part.", training))
                    }
                    div class="card" {
                        h3 { "Confusion, slices" }
                        (matrix(&evaluation.slice))
                    }
                }
                h2 { "Figures" }
                p class="soft" { "Value and 95 % interval (bootstrap over studies, 1000 draws, seed " (evaluation.seed) "). Positive means embolus present. " (ECE_NOTE.replace('`', "")) }
                (figures(evaluation))
                h2 { "Operating points" }
                p class="soft" { "Chosen on the validation part for a target sensitivity, then frozen. The first decides." }
                (operating_points(evaluation))
                h2 { "Controls" }
                p class="soft" { "What one gets without looking at the vessels: an honest model is far above the last two, and shuffled labels give 0.5." }
                (controls(evaluation))
                @if let Some(rsna) = &evaluation.rsna_loss {
                    h2 { "The RSNA challenge's loss" }
                    (rsna_loss(rsna))
                }
                h2 { "Subgroups" }
                p class="soft" { "A label of embolus: its positive slices among all negative ones. Any other: the slices of those exams." }
                (subgroups(evaluation))
                h2 { "Worst misses" }
                p class="soft" { "PE window (level 100 HU, width 700 HU); one slice a study." }
                @for (wanted, title) in [(true, "Embolus present, lowest probability"), (false, "No embolus, highest probability")] {
                    h3 { (title) }
                    div class="misses" {
                        @for (miss, image) in misses.iter().filter(|(miss, _)| miss.pe_present == wanted) {
                            figure {
                                img alt=(title) src={ "data:image/png;base64," (image) };
                                figcaption { "probability " (format!("{:.3}", miss.probability)) br; (miss.sop_uid) }
                            }
                        }
                    }
                }
                h2 { "Where the figures come from" }
                (provenance(evaluation))
            } }
        }
    };
    Ok(page.into_string())
}

fn head(evaluation: &Evaluation) -> Markup {
    html! {
        h1 { "Evaluation of " (evaluation.model) }
        p class="soft" { (evaluation.data_source) " · part " (evaluation.part.name()) " · " (evaluation.slice.n_studies) " studies, " (evaluation.slice.n) " slices" }
        span class="notice" { (RESEARCH_USE) }
        @if let Some(leak) = evaluation.leak { div class="leak" { (leak) } }
        @for warning in &evaluation.warnings { div class="warning" { (warning) } }
    }
}

fn tiles(evaluation: &Evaluation) -> Markup {
    let tile = |name: &str, figures: &Figures, key: &str| {
        html! {
            div class="tile" {
                @if let Some(figure) = figures.values.get(key) {
                    b { (format!("{:.3}", figure.value)) }
                    span {
                        (name) br;
                        @if figure.low.is_nan() { "interval unknown" } @else { (format!("{:.3} to {:.3}", figure.low, figure.high)) }
                    }
                }
            }
        }
    };
    html! {
        div class="tiles" {
            (tile("AUROC, slices", &evaluation.slice, "auroc"))
            (tile("AUROC, studies", &evaluation.study, "auroc"))
            (tile("Sensitivity, slices", &evaluation.slice, "sensitivity"))
            (tile("Specificity, slices", &evaluation.slice, "specificity"))
            (tile("Sensitivity, studies", &evaluation.study, "sensitivity"))
            (tile("Specificity, studies", &evaluation.study, "specificity"))
        }
    }
}

fn card(title: &str, note: &str, svg: &str) -> Markup {
    html! {
        div class="card" {
            h3 { (title) }
            (PreEscaped(svg))
            p class="soft" { (note) }
        }
    }
}

/// What the reliability diagram shows, and why the curve lies where it does when training saw another share of emboli than there is.
fn reliability_note(evaluation: &Evaluation) -> String {
    let bins = &evaluation.curves.reliability;
    let sum = |of: &dyn Fn(&(f64, f64, f64)) -> f64| bins.iter().map(of).sum::<f64>();
    let n = sum(&|bin| bin.2);
    let (predicted, found) = (sum(&|bin| bin.0 * bin.2) / n, sum(&|bin| bin.1 * bin.2) / n);
    let mut note = format!(
        "After temperature scaling; a dot's area is its share of the slices. On average {predicted:.2} is predicted and {found:.2} have an embolus."
    );
    if predicted > SHIFTED * found {
        note.push_str(" Training on as many slices with as without embolus makes all too high, which a temperature cannot take back.");
    }
    note
}

fn matrix(figures: &Figures) -> Markup {
    let counts = figures.confusion;
    html! {
        table class="matrix" {
            tr { th {} th { "called positive" } th { "called negative" } }
            tr { th { "embolus" } td class="good" { (counts.true_positive) small { "true positive" } } td class="bad" { (counts.false_negative) small { "missed" } } }
            tr { th { "none" } td class="bad" { (counts.false_positive) small { "false alarm" } } td class="good" { (counts.true_negative) small { "true negative" } } }
        }
        p class="soft" { "At logit " (format!("{:.3}", figures.threshold)) "." }
    }
}

fn figures(evaluation: &Evaluation) -> Markup {
    let columns = [
        ("slices, natural prevalence", &evaluation.slice),
        ("slices, balanced", &evaluation.slice_balanced),
        ("slices, balanced, at 0.5", &evaluation.slice_balanced_half),
        ("studies", &evaluation.study),
    ];
    html! {
        div class="card scroll" { table {
            tr { th {} @for (name, _) in columns { th { (name) } } }
            @for name in NAMES {
                tr { td { (name) } @for (_, figures) in columns { td { (figures.values.get(name).map_or_else(String::new, show)) } } }
            }
            tr { td { "positive" } @for (_, figures) in columns { td { (figures.n_positive) " of " (figures.n) } } }
            tr { td { "threshold" } @for (_, figures) in columns { td { (format!("{:.3}", figures.threshold)) } } }
        } }
        p class="soft" {
            (evaluation.false_positives_sentence()) " Study rule: mean of the " (evaluation.study_rule.top_slices) " highest logits after smoothing over "
            (evaluation.study_rule.smoothing_slices) " slices. Temperature " (format!("{:.3}", evaluation.temperature)) "."
        }
    }
}

fn operating_points(evaluation: &Evaluation) -> Markup {
    html! {
        div class="card scroll" { table {
            tr { th { "name" } th { "logit" } th { "sensitivity (validation)" } th { "specificity (validation)" } }
            @for point in &evaluation.operating_points {
                tr { td { (point.name) } td { (format!("{:.3}", point.logit_threshold)) } td { (format!("{:.3}", point.sensitivity)) } td { (format!("{:.3}", point.specificity)) } }
            }
        } }
    }
}

fn controls(evaluation: &Evaluation) -> Markup {
    html! {
        div class="card scroll" { table {
            tr { th { "control" } th { "AUROC, slices" } }
            tr { td { "the model" } td { (evaluation.slice.values.get("auroc").map_or_else(String::new, show)) } }
            @for control in &evaluation.controls { tr { td { (control.name) } td { (show(&control.auroc)) } } }
        } }
    }
}

fn rsna_loss(rsna: &RsnaLoss) -> Markup {
    html! {
        p class="soft" {
            "Predicted: images from logits and " code { "negative_exam_for_pe" } " from the study score, both calibrated on the validation part. The other exam labels
            the model cannot know; they are predicted by their share of the training part's exams. Constants: images and all labels so."
        }
        div class="card scroll" { table {
            tr { th { "prediction" } th { "weighted log loss, " (rsna.n_exams) " exams" } }
            tr { td { "the model" } td { (show(&rsna.loss)) } }
            tr { td { "constants" } td { (show(&rsna.constant_loss)) } }
            @for (label, share) in &rsna.predicted_by_prevalence {
                tr { td { (label) " is predicted as" } td { (format!("{share:.3}")) } }
            }
        }
        p class="soft" { "The model's predictions of " (rsna.n_inconsistent) " exams break the challenge's rules of label consistency, which would refuse them." }
        }
    }
}

fn subgroups(evaluation: &Evaluation) -> Markup {
    let names = ["auroc", "sensitivity", "specificity"];
    html! {
        div class="card scroll" { table {
            tr { th { "subgroup" } @for name in names { th { (name) } } th { "positive" } th { "studies" } }
            @for group in &evaluation.subgroups {
                tr {
                    td { (group.name) }
                    @for name in names { td { (group.slice.values.get(name).map_or_else(String::new, show)) } }
                    td { (group.slice.n_positive) " of " (group.slice.n) }
                    td { (group.slice.n_studies) }
                }
            }
        } }
    }
}

fn provenance(evaluation: &Evaluation) -> Markup {
    html! {
        div class="card scroll" { table {
            tr { td { "model digest" } td { code { (evaluation.model_digest) } } }
            tr { td { "data" } td { (evaluation.data_source) ", part " (evaluation.part.name()) } }
            tr { td { "data digest" } td { code { (evaluation.data_digest) } } }
            tr { td { "split" } td { (evaluation.data_split) } }
            tr { td { "seed of bootstrap and samples" } td { (evaluation.seed) } }
            tr { td { "trainer" } td { (evaluation.trainer) } }
        } }
    }
}

/// The PE window of a slice as PNG in Base64.
fn picture(cache: &Cache, row: usize) -> Result<String> {
    let plane = SIDE * SIDE;
    let grey = cache
        .tensor(row)
        .get(plane..2 * plane)
        .context("a tensor has three channels")?
        .to_vec();
    let side = u32::try_from(SIDE)?;
    let image = image::GrayImage::from_raw(side, side, grey).context("a channel is square")?;
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png)?;
    Ok(base64(&bytes.into_inner()))
}

/// Base64 with padding (RFC 4648 section 4).
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let word = (byte(0) << 16) | (byte(1) << 8) | byte(2);
        for place in 0..4 {
            let letter = LETTERS[((word >> (18 - 6 * place)) & 63) as usize];
            text.push(if place <= chunk.len() {
                char::from(letter)
            } else {
                '='
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_agrees_with_the_vectors_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }
}
