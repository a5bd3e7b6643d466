//! `edge bench`: how fast the model runs on this machine, and in how much memory.
//!
//! In: the model and seeded images ([`shared::selftest`]), so that no file is needed. Out: one result. Before anything is timed,
//! the model has passed its self-test; the timed logits must equal those of the first pass, bit for bit. Figures: `micros_*` per
//! slice in the network alone; `load_micros` from bytes to ready; `resident_bytes` and `peak_bytes` are the kernel's VmRSS and
//! VmHWM of this process (proc(5)) after the last slice. `macs` and the peak come from the engine; a share is of all threads' cores together.

use std::io::Write;
use std::time::Instant;

use anyhow::{Context, bail};
use engine::LayerReport;
use serde::Serialize;
use shared::{TENSOR_BYTES, selftest};

use crate::cli::BenchArgs;
use crate::exit::{Exit, Failure, failure};
use crate::model::{ReadyModel, micros};
use crate::report::{Form, json_line, milliseconds};

/// Different images that are run in turn.
const N_IMAGES: usize = 4;

#[derive(Debug, Serialize)]
struct BenchJson<'a> {
    model: &'a str,
    kernel: String,
    threads: usize,
    slices: u32,
    micros_median: u64,
    micros_min: u64,
    load_micros: u64,
    resident_bytes: Option<u64>,
    peak_bytes: Option<u64>,
    macs: Option<u64>,
    share_of_peak: Option<f64>,
    notice: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    layers: Option<Vec<LayerJson<'a>>>,
}

#[derive(Debug, Serialize)]
struct LayerJson<'a> {
    name: &'a str,
    operator: &'a str,
    micros: f64,
    macs: u64,
    weight_bytes: usize,
    share_of_peak: Option<f64>,
}

/// Runs the command.
///
/// # Errors
/// Where the model cannot be used, answers differ from run to run, or the result cannot be written.
pub(crate) fn run(arguments: &BenchArgs, out: &mut dyn Write) -> Result<Exit, Failure> {
    let options = arguments.model.options();
    let ready = ReadyModel::load(arguments.model.model.as_deref(), &options)?;
    let times = time(&ready, arguments.slices).map_err(failure(Exit::FailedCheck))?;
    let resident_bytes = status_bytes("VmRSS:");
    let peak_bytes = status_bytes("VmHWM:");
    let explanation = ready.model.explain().map_err(failure(Exit::FailedCheck))?;
    let macs = explanation.total().macs;
    let peak = explanation.peak_macs_per_second;
    let share_of_peak = peak.map(|peak| share(macs, times[times.len() / 2], options.threads, peak));
    let result = BenchJson {
        model: &ready.name,
        kernel: ready.model.runs_on(),
        threads: options.threads,
        slices: arguments.slices,
        micros_median: times[times.len() / 2],
        micros_min: times[0],
        load_micros: ready.load_micros,
        resident_bytes,
        peak_bytes,
        macs: (macs > 0).then_some(macs),
        share_of_peak,
        notice: &ready.notice,
        layers: arguments
            .explain
            .then(|| explanation.layers.iter().map(layer).collect()),
    };
    let written = match arguments.output.form() {
        Form::JsonLines => json_line(out, &result),
        Form::Table => table(out, &result).and_then(|()| match arguments.explain {
            true => write!(out, "\n{explanation}"),
            false => Ok(()),
        }),
    };
    written
        .and_then(|()| out.flush())
        .map_err(failure(Exit::CannotWrite))?;
    Ok(Exit::Ok)
}

/// Microseconds of each slice, in ascending order; at least one.
fn time(ready: &ReadyModel, n_slices: u32) -> anyhow::Result<Vec<u64>> {
    let mut session = ready.model.session();
    let mut images = vec![0; N_IMAGES * TENSOR_BYTES];
    for (seed, image) in (1..).zip(images.chunks_exact_mut(TENSOR_BYTES)) {
        selftest::image(seed, image);
    }
    let mut expected = [0.0; N_IMAGES];
    session.logits(&images, &mut expected)?;
    let mut times = Vec::new();
    let pairs = images.chunks_exact(TENSOR_BYTES).zip(expected).cycle();
    for (_, (image, expected)) in (0..n_slices).zip(pairs) {
        let start = Instant::now();
        let mut logit = [0.0];
        session.logits(image, &mut logit)?;
        times.push(micros(start));
        if logit[0].to_bits() != expected.to_bits() {
            bail!("the same image gave {} and {expected}", logit[0]);
        }
    }
    times.sort_unstable();
    times.first().context("no slice was timed")?;
    Ok(times)
}

fn layer(report: &LayerReport) -> LayerJson<'_> {
    LayerJson {
        name: &report.name,
        operator: &report.operator,
        micros: report.micros,
        macs: report.macs,
        weight_bytes: report.weight_bytes,
        share_of_peak: report.share_of_peak,
    }
}

/// Share of what `threads` cores could multiply in this time.
#[expect(
    clippy::cast_precision_loss,
    reason = "a share for people, three digits are shown"
)]
fn share(macs: u64, micros: u64, threads: usize, peak_macs_per_second: f64) -> f64 {
    let seconds = micros.max(1) as f64 * 1e-6;
    macs as f64 / (seconds * peak_macs_per_second * threads as f64)
}

/// A size from this process's /proc/self/status, in bytes; `None` where the system has no such file.
pub(crate) fn status_bytes(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

fn table(out: &mut dyn Write, result: &BenchJson<'_>) -> std::io::Result<()> {
    let mebibytes =
        |bytes: Option<u64>| bytes.map_or_else(|| "unknown".into(), |b| format!("{} MiB", b >> 20));
    writeln!(out, "model     {}", result.model)?;
    writeln!(out, "          {}", result.notice)?;
    writeln!(
        out,
        "kernel    {}, {} threads",
        result.kernel, result.threads
    )?;
    writeln!(
        out,
        "slice     {:.3} ms median, {:.3} ms least, of {}",
        milliseconds(result.micros_median),
        milliseconds(result.micros_min),
        result.slices
    )?;
    writeln!(out, "load      {:.1} ms", milliseconds(result.load_micros))?;
    writeln!(
        out,
        "memory    {} resident, {} peak",
        mebibytes(result.resident_bytes),
        mebibytes(result.peak_bytes)
    )?;
    let share = result.share_of_peak.map(|share| 100.0 * share);
    match result.macs.zip(share) {
        Some((macs, share)) => writeln!(
            out,
            "work      {} MMAC a slice by definition, {share:.1} % of what {} cores multiply at most",
            macs / 1_000_000,
            result.threads
        ),
        None => Ok(()),
    }
}
