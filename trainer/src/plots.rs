//! Plots as SVG text: ROC, precision over recall, reliability, study scores, training curves. Pure: numbers in, text out.
//!
//! Colours come from CSS variables with fallbacks, so that a plot is legible alone and follows the page's dark mode inside a report.

use std::fmt::Write as _;
use std::path::Path;

use shared::RESEARCH_USE;

use crate::evaluate::Evaluation;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 44.0;
/// Points of a curve that are drawn at most.
const MAX_POINTS: usize = 400;

/// Colours of the first, second and third series.
pub const COLOURS: [&str; 3] = ["var(--a,#0b6bcb)", "var(--b,#c2410c)", "var(--c,#15803d)"];
const INK: &str = "var(--ink,#334155)";
const FAINT: &str = "var(--line,#dbe2ea)";

/// The plane of a plot.
struct Plane {
    text: String,
    x: (f64, f64),
    y: (f64, f64),
}

impl Plane {
    fn new(title: &str, x_label: &str, y_label: &str, x: (f64, f64), y: (f64, f64)) -> Self {
        let mut plane = Self {
            text: format!(
                "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\" font-family=\"system-ui,sans-serif\" font-size=\"12\">"
            ),
            x,
            y,
        };
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for (value, tick) in ticks(x) {
            let (px, _) = plane.place((value, y.0));
            plane.push(&format!(
                "<path d=\"M{px:.1} {TOP}V{bottom}\" stroke=\"{FAINT}\" fill=\"none\"/>\
                 <text x=\"{px:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"{INK}\">{tick}</text>",
                bottom + 16.0
            ));
        }
        for (value, tick) in ticks(y) {
            let (_, py) = plane.place((x.0, value));
            plane.push(&format!(
                "<path d=\"M{LEFT} {py:.1}H{right}\" stroke=\"{FAINT}\" fill=\"none\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"{INK}\">{tick}</text>",
                LEFT - 6.0,
                py + 4.0
            ));
        }
        let middle_x = (LEFT + WIDTH - RIGHT) / 2.0;
        let middle_y = (TOP + HEIGHT - BOTTOM) / 2.0;
        plane.push(&format!("<text x=\"{middle_x}\" y=\"{}\" text-anchor=\"middle\" fill=\"{INK}\">{x_label}</text>", HEIGHT - 8.0));
        plane.push(&format!("<text x=\"{:.0}\" y=\"10\" text-anchor=\"end\" font-size=\"9\" fill=\"{INK}\">{RESEARCH_USE}</text>", WIDTH - RIGHT));
        plane.push(&format!("<text transform=\"translate(13 {middle_y}) rotate(-90)\" text-anchor=\"middle\" fill=\"{INK}\">{y_label}</text>"));
        plane
    }

    fn push(&mut self, element: &str) {
        self.text.push_str(element);
    }

    /// From values to pixels.
    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        (
            LEFT + width * (x - self.x.0) / (self.x.1 - self.x.0),
            TOP + height * (self.y.1 - y) / (self.y.1 - self.y.0),
        )
    }

    fn line(&mut self, points: &[(f64, f64)], colour: &str, style: &str) {
        let step = points.len().div_ceil(MAX_POINTS).max(1);
        let last = points.len().saturating_sub(1);
        let mut path = String::new();
        for (index, point) in points.iter().enumerate() {
            if index % step == 0 || index == last {
                let (x, y) = self.place(*point);
                let letter = if index == 0 { 'M' } else { 'L' };
                // Writing to a String does not fail.
                _ = write!(path, "{letter}{x:.1} {y:.1}");
            }
        }
        self.push(&format!(
            "<path d=\"{path}\" stroke=\"{colour}\" fill=\"none\" stroke-width=\"2\" stroke-linejoin=\"round\" {style}/>"
        ));
    }

    fn dot(&mut self, point: (f64, f64), radius: f64, colour: &str, opacity: f64) {
        let (x, y) = self.place(point);
        self.push(&format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius:.1}\" fill=\"{colour}\" fill-opacity=\"{opacity}\"/>"
        ));
    }

    /// Names of the series, at the lower right.
    fn legend(&mut self, names: &[&str]) {
        for (index, (name, colour)) in names.iter().zip(COLOURS).enumerate() {
            let y = HEIGHT - BOTTOM - 12.0 - 18.0 * (names.len() - 1 - index) as f64;
            let x = WIDTH - RIGHT - 190.0;
            self.push(&format!("<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"4\" rx=\"2\" fill=\"{colour}\"/><text x=\"{}\" y=\"{y}\" fill=\"{INK}\">{name}</text>", y - 6.0, x + 20.0));
        }
    }

    fn finish(mut self) -> String {
        self.push("</svg>");
        self.text
    }
}

/// About five round numbers between `low` and `high`, and their texts.
fn ticks((low, high): (f64, f64)) -> Vec<(f64, String)> {
    let about = if high > low { (high - low) / 4.0 } else { 1.0 };
    let power = 10.0_f64.powf(about.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * power);
    let far = |step: &f64| (step / about).ln().abs();
    let step = steps
        .into_iter()
        .min_by(|a, b| far(a).total_cmp(&far(b)))
        .unwrap_or(about);
    // As many digits as tell one tick from the next.
    let is_exact = |digits: &usize| {
        let scaled = step * 10.0_f64.powf(*digits as f64);
        (scaled - scaled.round()).abs() < 1e-6
    };
    let digits = (0..9).find(is_exact).unwrap_or(9);
    let first = (low / step - 1e-9).ceil();
    (0..12_u8)
        .map(|k| (first + f64::from(k)) * step)
        .take_while(|value| *value <= high + step * 1e-9)
        .map(|value| (value, format!("{:.digits$}", value + 0.0)))
        .collect()
}

/// All plots of an evaluation: file name and SVG, which says of itself what the report's page says above them.
#[must_use]
pub fn all(evaluation: &Evaluation) -> [(&'static str, String); 4] {
    [
        ("roc.svg", roc(evaluation)),
        ("precision-recall.svg", precision_recall(evaluation)),
        ("reliability.svg", reliability(evaluation)),
        ("study-scores.svg", study_scores(evaluation)),
    ]
    .map(|(name, svg)| (name, marked(svg, evaluation.leak)))
}

/// With the leak written across it.
fn marked(svg: String, leak: Option<&str>) -> String {
    let Some(leak) = leak else { return svg };
    let leak = escaped(leak.split(':').next().unwrap_or(leak));
    let mark = format!(
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" font-weight=\"700\" fill=\"var(--warn,#b91c1c)\">{leak}: LEAKS</text></svg>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        TOP + 20.0
    );
    svg.replace("</svg>", &mark)
}

const UNIT: (f64, f64) = (0.0, 1.0);

/// ROC of slices and studies, with the operating point.
#[must_use]
pub fn roc(evaluation: &Evaluation) -> String {
    let mut plane = Plane::new("ROC", "1 - specificity", "sensitivity", UNIT, UNIT);
    plane.line(
        &[(0.0, 0.0), (1.0, 1.0)],
        INK,
        "stroke-dasharray=\"3 4\" stroke-width=\"1\"",
    );
    plane.line(&evaluation.curves.study_roc, COLOURS[1], "");
    plane.line(&evaluation.curves.slice_roc, COLOURS[0], "");
    let at = |figures: &crate::evaluate::Figures| {
        let value = |name| {
            figures
                .values
                .get(name)
                .map_or(f64::NAN, |figure| figure.value)
        };
        (1.0 - value("specificity"), value("sensitivity"))
    };
    plane.dot(at(&evaluation.slice), 5.0, COLOURS[0], 1.0);
    plane.dot(at(&evaluation.study), 5.0, COLOURS[1], 1.0);
    let auroc = |figures: &crate::evaluate::Figures| {
        figures.values.get("auroc").map_or(f64::NAN, |f| f.value)
    };
    plane.legend(&[
        &format!("slices, AUROC {:.3}", auroc(&evaluation.slice)),
        &format!("studies, AUROC {:.3}", auroc(&evaluation.study)),
    ]);
    plane.finish()
}

/// Precision over sensitivity of the slices; the dashed line is the prevalence.
#[must_use]
pub fn precision_recall(evaluation: &Evaluation) -> String {
    let mut plane = Plane::new(
        "Precision and recall",
        "recall (sensitivity)",
        "precision",
        UNIT,
        UNIT,
    );
    let prevalence = evaluation.slice.n_positive as f64 / evaluation.slice.n.max(1) as f64;
    plane.line(
        &[(0.0, prevalence), (1.0, prevalence)],
        INK,
        "stroke-dasharray=\"3 4\" stroke-width=\"1\"",
    );
    plane.line(&evaluation.curves.slice_precision_recall, COLOURS[0], "");
    plane.finish()
}

/// Share of positives over predicted probability; a dot's area is its share of the slices.
#[must_use]
pub fn reliability(evaluation: &Evaluation) -> String {
    let mut plane = Plane::new(
        "Reliability",
        "predicted probability",
        "share with embolus",
        UNIT,
        UNIT,
    );
    plane.line(
        &[(0.0, 0.0), (1.0, 1.0)],
        INK,
        "stroke-dasharray=\"3 4\" stroke-width=\"1\"",
    );
    let points: Vec<(f64, f64)> = evaluation
        .curves
        .reliability
        .iter()
        .rev()
        .map(|&(x, y, _)| (x, y))
        .collect();
    plane.line(&points, COLOURS[0], "");
    let total: f64 = evaluation.curves.reliability.iter().map(|bin| bin.2).sum();
    for &(x, y, n) in &evaluation.curves.reliability {
        plane.dot((x, y), 4.0 + 14.0 * (n / total).sqrt(), COLOURS[0], 0.5);
    }
    plane.finish()
}

/// Scores of studies, with embolus above and without below, and the threshold.
#[must_use]
pub fn study_scores(evaluation: &Evaluation) -> String {
    let scores = &evaluation.curves.study_scores;
    let values = || scores.iter().map(|(score, _)| f64::from(*score));
    let threshold = f64::from(evaluation.study_rule.logit_threshold);
    let low = values().fold(threshold, f64::min) - 0.5;
    let high = values().fold(threshold, f64::max) + 0.5;
    let mut plane = Plane::new(
        "Study scores",
        "study score (logit)",
        "share of studies below",
        (low, high),
        UNIT,
    );
    plane.line(
        &[(threshold, 0.0), (threshold, 1.0)],
        INK,
        "stroke-dasharray=\"3 4\" stroke-width=\"1\"",
    );
    for (has_embolus, colour) in [(true, COLOURS[0]), (false, COLOURS[1])] {
        let mut kind: Vec<f64> = scores
            .iter()
            .filter(|(_, present)| *present == has_embolus)
            .map(|(score, _)| f64::from(*score))
            .collect();
        kind.sort_by(f64::total_cmp);
        let n = kind.len() as f64;
        let mut steps = vec![(low, 0.0)];
        for (index, score) in kind.into_iter().enumerate() {
            steps.push((score, index as f64 / n));
            steps.push((score, (index + 1) as f64 / n));
        }
        steps.push((high, 1.0));
        plane.line(&steps, colour, "");
    }
    plane.legend(&["with embolus", "without embolus"]);
    plane.finish()
}

/// Loss by step and by epoch from a run folder's `history.csv` and `epochs.csv`; `None` where there is none.
#[must_use]
pub fn training(run: &Path) -> Option<String> {
    let steps = columns(&run.join("history.csv"), &["step", "loss"])?;
    let n_steps = steps.last()?[0].max(1.0);
    let highest = steps.iter().map(|row| row[1]).fold(0.0, f64::max).min(1.5);
    let mut plane = Plane::new(
        "Training",
        "step",
        "loss",
        (0.0, n_steps),
        (0.0, highest.max(0.1)),
    );
    // A running mean over a twentieth of the steps: single batches are too noisy to read.
    let reach = (steps.len() / 40).max(1);
    let smooth: Vec<(f64, f64)> = (0..steps.len())
        .map(|index| {
            let window = &steps[index.saturating_sub(reach)..(index + reach + 1).min(steps.len())];
            let mean = window.iter().map(|row| row[1]).sum::<f64>() / window.len() as f64;
            (steps[index][0], mean.min(highest))
        })
        .collect();
    plane.line(&smooth, COLOURS[0], "");
    let mut names = vec!["training loss (running mean)"];
    if let Some(epochs) = columns(&run.join("epochs.csv"), &["epoch", "val_loss"]) {
        let n_epochs = epochs.len() as f64;
        let points: Vec<(f64, f64)> = epochs
            .iter()
            .enumerate()
            .filter(|(_, row)| row[1].is_finite())
            .map(|(index, row)| ((index + 1) as f64 / n_epochs * n_steps, row[1].min(highest)))
            .collect();
        plane.line(&points, COLOURS[1], "");
        for point in points {
            plane.dot(point, 3.0, COLOURS[1], 1.0);
        }
        names.push("validation loss");
    }
    plane.legend(&names);
    Some(plane.finish())
}

/// The named columns of a CSV file as numbers; `None` where the file or a column is missing.
fn columns(path: &Path, names: &[&str; 2]) -> Option<Vec<[f64; 2]>> {
    let mut reader = csv::Reader::from_path(path).ok()?;
    let header = reader.headers().ok()?.clone();
    let [a, b] = names.map(|name| header.iter().position(|found| found == name));
    let (a, b) = (a?, b?);
    let rows: Vec<[f64; 2]> = reader
        .records()
        .map_while(Result::ok)
        .map(|record| {
            [a, b].map(|index| {
                record
                    .get(index)
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(f64::NAN)
            })
        })
        .collect();
    (!rows.is_empty()).then_some(rows)
}

/// A horizontal bar chart of shares, for `trainer stats`: name, count, total; `lines` of text stand below.
#[must_use]
pub fn bars(title: &str, bars: &[(String, u64, u64)], lines: &[String]) -> String {
    let title = escaped(title);
    let below = 34.0 + 24.0 * bars.len() as f64;
    let height = below + 18.0 * lines.len() as f64;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 640 {height}\" role=\"img\" aria-label=\"{title}\" font-family=\"system-ui,sans-serif\" font-size=\"12\"><text x=\"8\" y=\"18\" font-weight=\"600\" fill=\"{INK}\">{title}</text>"
    );
    for (index, (name, n, total)) in bars.iter().enumerate() {
        let y = 30.0 + 24.0 * index as f64;
        let width = 280.0 * *n as f64 / (*total).max(1) as f64;
        let share = width / 2.8;
        // Writing to a String does not fail.
        _ = write!(
            text,
            "<text x=\"190\" y=\"{:.0}\" text-anchor=\"end\" fill=\"{INK}\">{}</text><rect x=\"200\" y=\"{y:.0}\" width=\"{:.1}\" height=\"16\" rx=\"2\" fill=\"{FAINT}\"/><rect x=\"200\" y=\"{y:.0}\" width=\"{:.1}\" height=\"16\" rx=\"2\" fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.0}\" fill=\"{INK}\">{n} of {total} ({share:.1} %)</text>",
            y + 12.0,
            escaped(name),
            280.0,
            width,
            COLOURS[0],
            488.0,
            y + 12.0,
        );
    }
    for (index, line) in lines.iter().enumerate() {
        let y = below + 12.0 + 18.0 * index as f64;
        _ = write!(
            text,
            "<text x=\"8\" y=\"{y:.0}\" fill=\"{INK}\">{}</text>",
            escaped(line)
        );
    }
    text + "</svg>"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers() {
        let texts = |low, high| -> Vec<String> {
            ticks((low, high))
                .into_iter()
                .map(|(_, text)| text)
                .collect()
        };
        assert_eq!(texts(0.0, 1.0), ["0.00", "0.25", "0.50", "0.75", "1.00"]);
        assert_eq!(texts(0.0, 3435.0), ["0", "1000", "2000", "3000"]);
        assert_eq!(texts(-1.9, 6.4), ["0", "2", "4", "6"]);
        assert_eq!(
            texts(-0.0004, 0.0004),
            ["-0.0004", "-0.0002", "0.0000", "0.0002", "0.0004"]
        );
        assert_eq!(texts(2.0, 2.0), ["2"]);
    }

    #[test]
    fn a_leak_is_written_across_the_plot() {
        let svg = Plane::new("ROC", "x", "y", UNIT, UNIT).finish();
        assert_eq!(marked(svg.clone(), None), svg);
        let marked = marked(svg, Some(crate::split::LEAK_WARNING));
        assert!(
            marked.ends_with(">SPLIT BY IMAGE: LEAKS</text></svg>"),
            "{marked}"
        );
    }

    #[test]
    fn every_plane_carries_the_notice() {
        let svg = Plane::new("ROC", "x", "y", UNIT, UNIT).finish();
        assert!(svg.contains(&format!(">{RESEARCH_USE}</text>")), "{svg}");
    }
}
