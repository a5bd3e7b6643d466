//! Runs a model on raw images, for the scripts in `tests/reference`.
//!
//! `run MODEL IMAGES [KERNEL [THREADS [float]]]`: `IMAGES` holds u8 images one after the other. Prints load time, resident memory and the bits of each
//! logit, then reads lines from standard input: a number `N` runs `N` images and prints their times in microseconds,
//! `explain` prints the time of each layer, `idle` the share of columns that needed no computing. With `tract` for the kernel tract runs the file as it
//! comes, for comparison, and knows numbers alone.

use std::io::{BufRead as _, Write as _};
use std::time::Instant;

use engine::{Model, Options, Session};
use tract_onnx::prelude::{
    Datum, Framework, InferenceFact, InferenceModelExt, IntoRunnable, Tensor, TypedRunnableModel,
    tvec,
};

type Error = Box<dyn std::error::Error>;

/// Shape of one image.
const IMAGE: [usize; 4] = [1, 3, 256, 256];

/// Who runs the images.
enum Runs {
    Engine(Model, Box<Session>),
    Tract(std::sync::Arc<TypedRunnableModel>),
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, images, rest @ ..] = arguments.as_slice() else {
        return Err("usage: run MODEL IMAGES [KERNEL [THREADS [float]]]".into());
    };
    let images = std::fs::read(images)?;
    let images = images.chunks_exact(IMAGE.iter().product());

    let started = Instant::now();
    let mut runs = Runs::new(&std::fs::read(model)?, rest)?;
    runs.logit(images.clone().next().ok_or("no image")?)?;
    let load_micros = started.elapsed().as_micros();

    let mut out = std::io::stdout().lock();
    write!(out, "load_micros {load_micros} {} logits", memory()?)?;
    for image in images.clone() {
        write!(out, " {:08x}", runs.logit(image)?.to_bits())?;
    }
    writeln!(out)?;
    out.flush()?;

    let mut images = images.cycle();
    for line in std::io::stdin().lock().lines() {
        match (line?.as_str(), &mut runs) {
            ("explain", Runs::Engine(model, _)) => write!(out, "{}", model.explain()?)?,
            ("idle", Runs::Engine(_, session)) => {
                writeln!(out, "{:.4}", session.idle_share().unwrap_or_default())?;
            }
            (n, runs) => {
                for image in images.by_ref().take(n.parse()?) {
                    let started = Instant::now();
                    runs.logit(image)?;
                    write!(out, "{} ", started.elapsed().as_micros())?;
                }
                writeln!(out)?;
            }
        }
        out.flush()?;
    }
    Ok(())
}

impl Runs {
    /// Loads a file; `rest` is the command line after the images.
    fn new(onnx: &[u8], rest: &[String]) -> Result<Self, Error> {
        let kernel = rest.first().map(String::as_str);
        if kernel == Some("tract") {
            let model = tract_onnx::onnx().model_for_read(&mut &*onnx)?;
            let fact = InferenceFact::dt_shape(u8::datum_type(), IMAGE);
            let model = model.with_input_fact(0, fact)?.into_optimized()?;
            return Ok(Self::Tract(model.into_runnable()?));
        }
        let options = Options {
            kernel: kernel
                .filter(|name| *name != "fastest")
                .map(str::parse)
                .transpose()?,
            threads: rest.get(1).map_or(Ok(1), |threads| threads.parse())?,
            is_float: rest.get(2).is_some_and(|word| word == "float"),
        };
        let model = Model::load(onnx, &options)?;
        let session = Box::new(model.session());
        Ok(Self::Engine(model, session))
    }

    fn logit(&mut self, image: &[u8]) -> Result<f32, Error> {
        let mut logit = [0.0];
        match self {
            Self::Engine(_, session) => session.logits(image, &mut logit)?,
            Self::Tract(plan) => {
                let outputs = plan.run(tvec!(Tensor::from_shape(&IMAGE, image)?.into()))?;
                let output = outputs.first().ok_or("no output")?;
                logit.copy_from_slice(output.try_as_plain_ram()?.as_slice()?);
            }
        }
        Ok(logit[0])
    }
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
