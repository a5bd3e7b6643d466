//! Runs a model on raw images, for the scripts in `tests/reference`.
//!
//! `run MODEL IMAGES [KERNEL [THREADS [float]]]`: `IMAGES` holds u8 images one after the other. Prints load time, resident memory and the bits of each
//! logit, then reads lines from standard input: a number `N` runs `N` images and prints their times in microseconds,
//! `explain` prints the time of each layer, `idle` the share of columns that needed no computing.

use std::io::{BufRead as _, Write as _};
use std::time::Instant;

use engine::{Model, Options};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, images, rest @ ..] = arguments.as_slice() else {
        return Err("usage: run MODEL IMAGES [KERNEL [THREADS [float]]]".into());
    };
    let kernel = rest
        .first()
        .filter(|name| *name != "fastest")
        .map(|name| name.parse())
        .transpose()?;
    let threads = rest.get(1).map_or(Ok(1), |threads| threads.parse())?;
    let images = std::fs::read(images)?;

    let started = Instant::now();
    let options = Options {
        kernel,
        threads,
        is_float: rest.get(2).is_some_and(|word| word == "float"),
    };
    let model = Model::load(&std::fs::read(model)?, &options)?;
    let mut session = model.session();
    let mut logit = [0.0];
    let image_bytes = 3 * 256 * 256;
    session.logits(&images[..image_bytes], &mut logit)?;
    let load_micros = started.elapsed().as_micros();

    let mut out = std::io::stdout().lock();
    write!(out, "load_micros {load_micros} {} logits", memory()?)?;
    for image in images.chunks_exact(image_bytes) {
        session.logits(image, &mut logit)?;
        write!(out, " {:08x}", logit[0].to_bits())?;
    }
    writeln!(out)?;
    out.flush()?;

    let mut images = images.chunks_exact(image_bytes).cycle();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line == "explain" {
            write!(out, "{}", model.explain()?)?;
        } else if line == "idle" {
            writeln!(out, "{:.4}", session.idle_share().unwrap_or_default())?;
        } else {
            for image in images.by_ref().take(line.parse()?) {
                let started = Instant::now();
                session.logits(image, &mut logit)?;
                write!(out, "{} ", started.elapsed().as_micros())?;
            }
            writeln!(out)?;
        }
        out.flush()?;
    }
    Ok(())
}

/// Resident memory now and at its highest, where the system tells.
fn memory() -> std::io::Result<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let fields = status
        .lines()
        .filter(|line| line.starts_with("VmRSS:") || line.starts_with("VmHWM:"));
    Ok(fields
        .map(|line| {
            line.replace(':', " ")
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect::<Vec<_>>()
        .join(" "))
}
