//! What runs where: one measured run, layer by layer.
//!
//! In: a model. Out: for each layer its time, multiply-accumulates, bytes and share of what the core's multipliers can do, measured
//! in the same moment. One thread, so that times are those of the layers; CPU times, and the least of several runs, so that a machine that
//! does other work too gives the same figures.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::float::{FloatNetwork, FloatRunner};
use crate::kernels::{float_peak_macs_per_second, peak_macs_per_second};
use crate::model::{Model, Program, RunError};
use crate::network::{Network, Weights};
use crate::session::Runner;
use crate::tract::{NodeTime, TractModel};

/// Runs of which each layer's least time is taken.
const RUNS: usize = 9;

/// How a model runs on this machine.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Kernel, or `tract`.
    pub runs_on: String,
    /// Why the graph did not become our chain, where tract runs it.
    pub reason: Option<String>,
    /// Multiply-accumulates a second of one core with the kernel's instruction and nothing else; `None` where not measured.
    pub peak_macs_per_second: Option<f64>,
    /// Bytes of activations of a session of one thread; `None` where tract takes and gives back memory as it goes.
    pub activation_bytes: Option<usize>,
    /// The layers in order.
    pub layers: Vec<LayerReport>,
}

/// One layer of an [`Explanation`].
#[derive(Clone, Debug)]
pub struct LayerReport {
    /// Name of the ONNX node.
    pub name: String,
    /// What the layer became.
    pub operator: String,
    /// Least CPU time of one image, in microseconds.
    pub micros: f64,
    /// Multiply-accumulates of one image, by definition.
    pub macs: u64,
    /// Bytes of packed parameters that one image reads at least once.
    pub weight_bytes: usize,
    /// `macs` a second as a share of the peak; above 1 where the algorithm needs fewer multiplications than the definition.
    pub share_of_peak: Option<f64>,
}

impl Model {
    /// Runs the model a few times on a seeded noise image, on one thread, and reports each layer.
    ///
    /// Of a model that tract runs, the nodes are reported; work and bytes are those of our operator alone.
    ///
    /// # Errors
    ///
    /// [`RunError::Tract`] where tract fails. [`RunError::Thread`] cannot happen on one thread, but is passed on.
    pub fn explain(&self) -> Result<Explanation, RunError> {
        match self.program() {
            Program::Network(network) => explain(network),
            Program::Float(network) => explain_float(network),
            Program::Tract(model) => explain_tract(model),
        }
    }
}

/// A layer without its time.
struct Facts<'a> {
    name: &'a str,
    operator: &'static str,
    macs: u64,
    weight_bytes: usize,
}

fn explain(network: &Arc<Network>) -> Result<Explanation, RunError> {
    let mut runner = Runner::new(Arc::clone(network), 1).map_err(RunError::Thread)?;
    let image = noise(network.image_bytes());
    runner.logit(&image);
    let convolutions = network.convolutions.iter().map(|layer| Facts {
        name: &layer.name,
        operator: match layer.weights {
            Weights::Direct(_) => "convolution + ReLU + max pool",
            Weights::Winograd(_) => "Winograd convolution + ReLU + max pool",
        },
        macs: layer.macs(),
        weight_bytes: layer.parameter_bytes(),
    });
    let dense = network.dense.iter().map(|layer| Facts {
        name: &layer.name,
        operator: "dense",
        macs: (layer.n_inputs * layer.n_outputs()) as u64,
        weight_bytes: layer.weights.len() + 8 * layer.bias.len(),
    });
    let peak = peak_macs_per_second(network.kernel);
    Ok(Explanation {
        runs_on: network.kernel.to_string(),
        reason: None,
        peak_macs_per_second: peak,
        activation_bytes: Some(runner.activation_bytes()),
        layers: timed(convolutions.chain(dense), peak, || {
            runner.layer_times(&image)
        }),
    })
}

fn explain_float(network: &Arc<FloatNetwork>) -> Result<Explanation, RunError> {
    let mut runner = FloatRunner::new(Arc::clone(network), 1).map_err(RunError::Thread)?;
    let image = noise(network.image_bytes());
    runner.logit(&image);
    let convolutions = network.convolutions.iter().map(|layer| Facts {
        name: &layer.name,
        operator: layer.layer.algorithm(),
        macs: layer.macs(),
        weight_bytes: layer.layer.parameter_bytes(),
    });
    let dense = network.dense.iter().map(|layer| Facts {
        name: &layer.name,
        operator: "f32 dense",
        macs: layer.weights.len() as u64,
        weight_bytes: 4 * (layer.weights.len() + layer.bias.len()),
    });
    let peak = float_peak_macs_per_second(network.kernel);
    Ok(Explanation {
        runs_on: format!("f32 {}, whose bits differ between CPUs", network.kernel),
        reason: None,
        peak_macs_per_second: peak,
        activation_bytes: Some(runner.activation_bytes()),
        layers: timed(convolutions.chain(dense), peak, || {
            runner.layer_times(&image)
        }),
    })
}

/// Reports of layers with the least of their times.
fn timed<'a>(
    layers: impl Iterator<Item = Facts<'a>>,
    peak: Option<f64>,
    mut run: impl FnMut() -> Vec<Duration>,
) -> Vec<LayerReport> {
    let runs: Vec<Vec<Duration>> = (0..RUNS).map(|_| run()).collect();
    let report = |(index, facts): (usize, Facts<'_>)| {
        let least = runs.iter().map(|run| run[index]).min();
        let seconds = least.unwrap_or_default().as_secs_f64();
        LayerReport {
            name: facts.name.to_owned(),
            operator: facts.operator.to_owned(),
            micros: seconds * 1e6,
            macs: facts.macs,
            weight_bytes: facts.weight_bytes,
            share_of_peak: peak.map(|peak| rate(facts.macs, seconds) / peak),
        }
    };
    layers.enumerate().map(report).collect()
}

fn explain_tract(model: &TractModel) -> Result<Explanation, RunError> {
    let kernel = model.kernel().without_pool();
    let image = noise(model.image_bytes());
    let mut nodes = model.layer_times(&image)?;
    for _ in 1..RUNS {
        for (node, again) in nodes.iter_mut().zip(model.layer_times(&image)?) {
            node.time = node.time.min(again.time);
        }
    }
    let peak = peak_macs_per_second(kernel);
    let layer = |node: NodeTime| {
        let seconds = node.time.as_secs_f64();
        LayerReport {
            name: node.name,
            operator: node.operator,
            micros: seconds * 1e6,
            macs: node.macs,
            weight_bytes: node.parameter_bytes,
            share_of_peak: peak
                .filter(|_| node.macs > 0)
                .map(|peak| rate(node.macs, seconds) / peak),
        }
    };
    Ok(Explanation {
        runs_on: match model.n_replaced() {
            0 => "tract".into(),
            n => format!("tract, {n} convolutions on {kernel}"),
        },
        reason: Some(model.reason().to_owned()),
        peak_macs_per_second: peak,
        activation_bytes: None,
        layers: nodes.into_iter().map(layer).collect(),
    })
}

impl Explanation {
    /// All layers together, on one thread.
    #[must_use]
    pub fn total(&self) -> LayerReport {
        let micros = self.layers.iter().map(|layer| layer.micros).sum();
        let macs = self.layers.iter().map(|layer| layer.macs).sum();
        let peak = self.peak_macs_per_second.filter(|_| macs > 0);
        LayerReport {
            name: "all".to_owned(),
            operator: String::new(),
            micros,
            macs,
            weight_bytes: self.layers.iter().map(|layer| layer.weight_bytes).sum(),
            share_of_peak: peak.map(|peak| rate(macs, micros * 1e-6) / peak),
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a rate for people, three digits are shown"
)]
fn rate(macs: u64, seconds: f64) -> f64 {
    macs as f64 / seconds
}

#[expect(clippy::cast_precision_loss, reason = "a number for people")]
fn mega(macs: u64) -> f64 {
    macs as f64 / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "a number for people")]
fn kibi(bytes: usize) -> f64 {
    bytes as f64 / 1024.0
}

/// Bytes without pattern, so that no kernel could skip work.
fn noise(n: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(n).collect()
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "runs on {}", self.runs_on)?;
        if let Some(reason) = &self.reason {
            writeln!(f, "not on our kernels from end to end because {reason}")?;
        }
        match self.peak_macs_per_second {
            Some(peak) => writeln!(f, "peak of one core {:.1} GMAC/s", peak / 1e9)?,
            None => writeln!(f, "peak of one core not measured for this kernel")?,
        }
        if let Some(bytes) = self.activation_bytes {
            writeln!(f, "activations {} KiB a session", bytes / 1024)?;
        }
        let widest = |text: fn(&LayerReport) -> &str| {
            let lengths = self.layers.iter().map(|layer| text(layer).chars().count());
            lengths.max().unwrap_or_default()
        };
        let (names, operators) = (widest(|layer| &layer.name), widest(|layer| &layer.operator));
        let line = |f: &mut fmt::Formatter<'_>, layer: &LayerReport| {
            let share = layer.share_of_peak.map(|share| 100.0 * share);
            let share = share.map_or_else(String::new, |share| format!("{share:6.1} % of peak"));
            let LayerReport {
                name,
                operator,
                micros,
                ..
            } = layer;
            writeln!(
                f,
                "{name:names$}  {operator:operators$} {:9.3} ms {:10.3} MMAC {:9.1} KiB weights {share}",
                micros / 1e3,
                mega(layer.macs),
                kibi(layer.weight_bytes),
            )
        };
        for layer in &self.layers {
            line(f, layer)?;
        }
        line(f, &self.total())?;
        if self
            .layers
            .iter()
            .any(|layer| layer.share_of_peak > Some(1.0))
        {
            writeln!(
                f,
                "above 100 %: Winograd multiplies less than the layer's definition, by which MMAC are counted"
            )?;
        }
        Ok(())
    }
}
