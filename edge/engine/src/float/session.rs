//! Runs a float network on images.
//!
//! In: u8 images `[n, channel, row, column]`. Out: one logit each. Everything is allocated when the session is made.
//!
//! Order of a run, as in the quantized one: two pooled rows of the second convolution need six rows of the first, which stand in a ring of six,
//! so the first feature map never exists whole. Threads share pairs of rows, then neurons, with a barrier between. Every output is the same sum
//! in the same order for any number of threads.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::network::{Convolution, FloatNetwork};
use crate::crew::{Crew, Meeting, Place, Work};
use crate::kernels::cpu_time;
use crate::kernels::float::{self, ImageLines, OUTPUTS, SIDE, Scratch};
use crate::maps::FeatureMap;

/// Image lines under one pooled row of the first convolution.
const LINES: usize = 4;

/// Buffers and threads that run one network.
#[derive(Debug)]
pub(crate) struct FloatRunner {
    crew: Crew<Shared>,
}

/// What the threads share.
#[derive(Debug)]
struct Shared {
    network: Arc<FloatNetwork>,
    /// One map for each convolution but the first of two or more.
    maps: Vec<FeatureMap<f32>>,
    /// Output of each hidden dense layer, as bits.
    hidden: Vec<Vec<AtomicU32>>,
    n_threads: usize,
}

/// One thread's own buffers.
#[derive(Debug)]
struct Worker {
    place: Place,
    /// Lines of the image under one pooled row, `[line, channel, column]`, and a spare float.
    lines: Vec<f32>,
    /// The latest rows of the first convolution, row `r` at `r % 6`.
    ring: [Vec<f32>; SIDE],
    /// Input of the dense layer at work, contiguous.
    features: Vec<f32>,
    sums: Vec<f32>,
    scratch: Scratch,
    /// CPU time spent in each layer, convolutions first, where it is measured.
    times: Option<Vec<Duration>>,
}

impl FloatRunner {
    /// Allocates everything and starts `n_threads - 1` helpers.
    pub(crate) fn new(network: Arc<FloatNetwork>, n_threads: usize) -> std::io::Result<Self> {
        let is_fused = network.convolutions.len() > 1;
        let maps = network.convolutions.iter().skip(usize::from(is_fused));
        let map = |layer: &Convolution| FeatureMap::new(layer.reached[0], layer.row_length());
        let hidden = network.dense.iter().map(|layer| {
            let neurons = layer.bias.iter();
            neurons.map(|_| AtomicU32::new(0)).collect()
        });
        let shared = Shared {
            maps: maps.map(map).collect(),
            hidden: hidden.collect(),
            n_threads,
            network,
        };
        Crew::new(shared, n_threads).map(|crew| Self { crew })
    }

    /// The logit of one image of `image_bytes` u8.
    pub(crate) fn logit(&mut self, image: &[u8]) -> f32 {
        self.crew.logit(image)
    }

    /// Runs one image and returns the CPU time spent in each layer, convolutions first. Exact on one thread.
    pub(crate) fn layer_times(&mut self, image: &[u8]) -> Vec<Duration> {
        let network = &self.crew.work().network;
        let n_layers = network.convolutions.len() + network.dense.len();
        self.crew.worker_mut().times = Some(vec![Duration::ZERO; n_layers]);
        self.logit(image);
        self.crew.worker_mut().times.take().unwrap_or_default()
    }

    /// Bytes of activations that the session holds, all threads together.
    pub(crate) fn activation_bytes(&self) -> usize {
        let (shared, worker) = (self.crew.work(), self.crew.worker());
        let ring: usize = worker.ring.iter().map(Vec::len).sum();
        let own = 4 * (worker.lines.len() + ring + worker.features.len()) + worker.scratch.bytes();
        shared.maps.iter().map(FeatureMap::bytes).sum::<usize>() + shared.n_threads * own
    }
}

impl Work for Shared {
    type Worker = Worker;

    fn worker(&self, place: Place) -> Worker {
        Worker::new(&self.network, place)
    }

    fn run(&self, worker: &mut Worker, image: &[u8], meeting: &Meeting) -> f32 {
        worker.run(self, image, meeting)
    }

    fn image_bytes(&self) -> usize {
        self.network.image_bytes()
    }
}

impl Worker {
    fn new(network: &FloatNetwork, place: Place) -> Self {
        let [channels, _, columns] = network.image;
        let first = &network.convolutions[0];
        let is_fused = network.convolutions.len() > 1;
        let ring_length = if is_fused { first.row_length() } else { 0 };
        let mut scratch = Scratch::default();
        for convolution in &network.convolutions {
            convolution
                .layer
                .reserve(convolution.pooled[1], &mut scratch);
        }
        let widest = network.dense.iter().map(|layer| layer.n_inputs).max();
        let most = network.dense.iter().map(|layer| layer.bias.len()).max();
        Self {
            place,
            lines: vec![0.0; LINES * channels * columns + 1],
            ring: std::array::from_fn(|_| vec![0.0; ring_length]),
            features: vec![0.0; widest.unwrap_or(0)],
            sums: vec![0.0; most.unwrap_or(0)],
            scratch,
            times: None,
        }
    }

    /// This thread's part of one image; the logit is meaningful on thread 0.
    fn run(&mut self, shared: &Shared, image: &[u8], meeting: &Meeting) -> f32 {
        let network = &*shared.network;
        let is_fused = network.convolutions.len() > 1;
        for (index, map) in shared.maps.iter().enumerate() {
            let layer = index + usize::from(is_fused);
            let n_rows = network.convolutions[layer].pooled[0];
            match (is_fused, index) {
                (false, _) => self.first_map(network, image, map, self.place.share(n_rows)),
                (true, 0) => {
                    let pairs = self.place.share(n_rows.div_ceil(2));
                    self.fused_maps(network, image, map, pairs);
                }
                (true, _) => {
                    let pairs = self.place.share(n_rows.div_ceil(2));
                    self.whole_map(shared, layer, pairs);
                }
            }
            meeting.wait();
        }
        self.dense(shared, meeting)
    }

    /// Rows of the only convolution.
    fn first_map(
        &mut self,
        network: &FloatNetwork,
        image: &[u8],
        map: &FeatureMap<f32>,
        rows: Range<usize>,
    ) {
        let started = self.times.is_some().then(cpu_time);
        for row in rows {
            let out = &mut map.row_mut(row);
            first_row(network, image, row, &mut self.lines, &mut self.scratch, out);
        }
        self.clock(0, started);
    }

    /// Pairs of rows of the second convolution, with the rows of the first made just before they are needed.
    fn fused_maps(
        &mut self,
        network: &FloatNetwork,
        image: &[u8],
        map: &FeatureMap<f32>,
        pairs: Range<usize>,
    ) {
        let mut next = OUTPUTS * pairs.start;
        for pair in pairs {
            let started = self.times.is_some().then(cpu_time);
            for row in next..OUTPUTS * pair + SIDE {
                first_row(
                    network,
                    image,
                    row,
                    &mut self.lines,
                    &mut self.scratch,
                    &mut self.ring[row % SIDE],
                );
            }
            next = OUTPUTS * pair + SIDE;
            self.clock(0, started);

            let started = self.times.is_some().then(cpu_time);
            let rows: [&[f32]; SIDE] =
                std::array::from_fn(|i| self.ring[(OUTPUTS * pair + i) % SIDE].as_slice());
            convolve_pair(
                &network.convolutions[1],
                &rows,
                map,
                pair,
                &mut self.scratch,
            );
            self.clock(1, started);
        }
    }

    /// Pairs of rows of a convolution whose input map is whole.
    fn whole_map(&mut self, shared: &Shared, layer: usize, pairs: Range<usize>) {
        let started = self.times.is_some().then(cpu_time);
        let (input, out) = (&shared.maps[layer - 2], &shared.maps[layer - 1]);
        for pair in pairs {
            let rows: [_; SIDE] = std::array::from_fn(|i| input.row(OUTPUTS * pair + i));
            let rows: [&[f32]; SIDE] = std::array::from_fn(|i| rows[i].as_slice());
            convolve_pair(
                &shared.network.convolutions[layer],
                &rows,
                out,
                pair,
                &mut self.scratch,
            );
        }
        self.clock(layer, started);
    }

    /// The dense layers; every thread gathers its own copy of a layer's input.
    fn dense(&mut self, shared: &Shared, meeting: &Meeting) -> f32 {
        let network = &*shared.network;
        let mut logit = f32::NAN;
        for (index, layer) in network.dense.iter().enumerate() {
            let started = self.times.is_some().then(cpu_time);
            let is_last = index + 1 == network.dense.len();
            let neurons = match (is_last, self.place.index) {
                (false, _) => self.place.share(layer.bias.len()),
                (true, 0) => 0..1,
                (true, _) => return logit,
            };
            let features = &mut self.features[..layer.n_inputs];
            match index.checked_sub(1) {
                Some(previous) => {
                    for (to, from) in features.iter_mut().zip(&shared.hidden[previous]) {
                        *to = f32::from_bits(from.load(Ordering::Relaxed));
                    }
                }
                None => flatten(shared, features),
            }
            let sums = &mut self.sums[..neurons.len()];
            let weights =
                &layer.weights[neurons.start * layer.n_inputs..neurons.end * layer.n_inputs];
            float::dense(network.kernel, features, weights, sums);
            for (neuron, &sum) in neurons.zip(sums.iter()) {
                let sum = sum + layer.bias[neuron];
                match is_last {
                    true => logit = sum,
                    false => shared.hidden[index][neuron]
                        .store(sum.max(0.0).to_bits(), Ordering::Relaxed),
                }
            }
            self.clock(network.convolutions.len() + index, started);
            if !is_last {
                meeting.wait();
            }
        }
        logit
    }

    fn clock(&mut self, layer: usize, started: Option<Duration>) {
        if let (Some(times), Some(started)) = (&mut self.times, started) {
            times[layer] += cpu_time().saturating_sub(started);
        }
    }
}

/// One pooled row of the first convolution; zeros where a tile reaches beyond the last.
fn first_row(
    network: &FloatNetwork,
    image: &[u8],
    row: usize,
    lines: &mut [f32],
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let [channels, rows, columns] = network.image;
    let first = &network.convolutions[0];
    let out = &mut out[..first.row_used()];
    if row >= first.pooled[0] {
        return out.fill(0.0);
    }
    for (index, line) in lines.chunks_exact_mut(columns).enumerate() {
        let (line_index, channel) = (index / channels, index % channels);
        let pixels = &image[(channel * rows + 2 * row + line_index) * columns..][..columns];
        for (to, &from) in line.iter_mut().zip(pixels) {
            *to = f32::from(from);
        }
    }
    let lines = ImageLines {
        values: lines,
        channels,
        columns,
    };
    float::first_row(&first.layer, &lines, scratch, out);
}

/// Two pooled rows, or the last odd one.
fn convolve_pair(
    convolution: &Convolution,
    rows: &[&[f32]; SIDE],
    map: &FeatureMap<f32>,
    pair: usize,
    scratch: &mut Scratch,
) {
    let n = convolution.row_used();
    let mut top = map.row_mut(2 * pair);
    let has_bottom = 2 * pair + 1 < convolution.pooled[0];
    let mut bottom = has_bottom.then(|| map.row_mut(2 * pair + 1));
    let bottom = bottom.as_mut().map_or(&mut [][..], |row| &mut row[..n]);
    float::convolve_rows(&convolution.layer, rows, scratch, [&mut top[..n], bottom]);
}

/// The last feature map in the order of the dense weights: `[channel, row, column]`.
fn flatten(shared: &Shared, features: &mut [f32]) {
    let Some((convolution, map)) = shared.network.convolutions.last().zip(shared.maps.last())
    else {
        return;
    };
    let [rows, columns] = convolution.pooled;
    for row_index in 0..rows {
        let row = map.row(row_index);
        for (channel, plane) in features.chunks_exact_mut(rows * columns).enumerate() {
            let line = &mut plane[row_index * columns..][..columns];
            for (to, from) in line
                .iter_mut()
                .zip(row.chunks_exact(convolution.layer.out_stride()))
            {
                *to = from[channel];
            }
        }
    }
}
