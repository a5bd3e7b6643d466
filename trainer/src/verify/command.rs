//! `trainer verify`: arguments, files and what is printed.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;

use crate::cache::{Cache, write_atomically};
use crate::exit::Exit;

use super::deploy::deployable;
use super::plot::noise_plot;
use super::{Margins, Pair, SNR_TARGET_DB, VerifyReport, verify};

/// Arguments of `trainer verify`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer verify --float model.onnx --int8 model-int8.onnx --data cache\n  \
    trainer verify --float model.onnx --int8 model-int8.onnx --data cache --out deploy.onnx --plot snr.svg --json\n\n\
    Exit 1 where sensitivity or specificity at the operating point falls by more than its margin. Research use only, not a medical device."
)]
pub struct VerifyArgs {
    /// The f32 file.
    #[arg(long, value_name = "FILE")]
    pub float: PathBuf,
    /// The int8 file made from it.
    #[arg(long, value_name = "FILE")]
    pub int8: PathBuf,
    /// Cache whose validation part is used.
    #[arg(long, value_name = "CACHE")]
    pub data: PathBuf,
    /// Sensitivity at the operating point that may be lost, in percentage points.
    #[arg(long, value_name = "POINTS", default_value_t = Margins::default().sensitivity_points, value_parser = points)]
    pub margin: f64,
    /// Specificity at the operating point that may be lost, in percentage points.
    #[arg(long, value_name = "POINTS", default_value_t = Margins::default().specificity_points, value_parser = points)]
    pub specificity_margin: f64,
    /// Slices on which the noise of every tensor is measured.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub noise_slices: usize,
    /// The deployable file: the int8 file with what was found in its manifest. Not written where the gate fails.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Write the deployable file although the gate fails, and say so in its manifest.
    #[arg(long, requires = "out")]
    pub force: bool,
    /// SVG plot of the signal-to-noise ratios.
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// Runs `trainer verify`.
///
/// # Errors
///
/// Where a file cannot be read, written, or is not what it should be.
pub fn run(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let read =
        |path: &Path| std::fs::read(path).with_context(|| format!("reading {}", path.display()));
    let (float, int8) = (read(&args.float)?, read(&args.int8)?);
    let margins = Margins {
        sensitivity_points: args.margin,
        specificity_points: args.specificity_margin,
    };
    let cache = Cache::open(&args.data)?;
    let report = verify(&float, &int8, &cache, margins, args.noise_slices)?;
    if let Some(path) = &args.plot {
        write_atomically(path, noise_plot(&report.tensors).as_bytes())?;
    }
    let deployable = deployable(&int8, &report, args.force)?;
    if let (Some(path), Some(bytes)) = (&args.out, &deployable) {
        write_atomically(path, bytes)?;
    }
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string(&report)?)?;
    } else {
        write!(stdout, "{}", text(&report))?;
        if let Some(path) = &args.out {
            let said = if deployable.is_some() {
                "written"
            } else {
                "NOT written: the gate failed (--force writes it all the same)"
            };
            writeln!(stdout, "{}: {said}", path.display())?;
        }
        writeln!(stdout, "{}", shared::RESEARCH_USE)?;
    }
    Ok(if report.faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        Exit::FailedCheck.into()
    })
}

/// The report as lines of text.
#[must_use]
pub fn text(report: &VerifyReport) -> String {
    let mut text = String::new();
    let mut line = |content: String| {
        text.push_str(&content);
        text.push('\n');
    };
    let pair = |pair: Pair| {
        let interval = if pair.low.is_nan() {
            "[unknown]".to_owned()
        } else {
            format!("[{:+.4}, {:+.4}]", pair.low, pair.high)
        };
        format!(
            "{:.4} -> {:.4}, change {:+.4} {interval}",
            pair.float, pair.int8, pair.change
        )
    };
    line(format!(
        "validation part: {} slices of {} studies, f32 -> int8",
        report.n_slices, report.n_studies
    ));
    line(format!("AUROC        {}", pair(report.auroc)));
    match &report.operating_point {
        Some(point) => {
            line(format!(
                "operating point {} (logit >= {})",
                point.name, point.logit_threshold
            ));
            line(format!("sensitivity  {}", pair(point.sensitivity)));
            line(format!("specificity  {}", pair(point.specificity)));
        }
        None => line("no operating point: the file is unvalidated".to_owned()),
    }
    line(format!("agreement    {:.4}", report.agreement));
    line(format!(
        "logit change {:.5} at most, {:.5} RMS",
        report.max_logit_change, report.logit_rmse
    ));
    line(format!(
        "temperature  {:.3} -> {:.3}",
        report.float_temperature, report.int8_temperature
    ));
    line(format!(
        "bytes        {} -> {}",
        report.float_bytes, report.int8_bytes
    ));
    for tensor in &report.tensors {
        let mark = if tensor.snr_db < SNR_TARGET_DB {
            "  below target"
        } else {
            ""
        };
        line(format!(
            "SNR {:<24} {:>6.1} dB{mark}",
            tensor.tensor, tensor.snr_db
        ));
    }
    if !report.is_pair_known {
        line("the int8 file does not say which f32 file it was made of: not checked".to_owned());
    }
    for warning in &report.warnings {
        line(format!("warning: {warning}"));
    }
    line(gate(report));
    text
}

/// What the gate says, with its reasons.
fn gate(report: &VerifyReport) -> String {
    match &report.operating_point {
        None => "gate: none, without an operating point".to_owned(),
        Some(_) if report.faults.is_empty() => "gate: passed".to_owned(),
        Some(_) => format!("gate: FAILED, {}", report.faults.join("; ")),
    }
}

/// Percentage points that may be lost: 0 to 100.
fn points(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(points) if (0.0..=100.0).contains(&points) => Ok(points),
        _ => Err("a number of points from 0 to 100 is wanted".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margin_is_a_number_of_points() {
        assert_eq!(points("0.5"), Ok(0.5));
        for text in ["nan", "-5", "101", "x"] {
            assert!(points(text).is_err(), "{text}");
        }
    }
}
