//! Runs a packed network on images: buffers, threads, order of execution.
//!
//! In: u8 images `[n, channel, row, column]`. Out: one logit each. Everything is allocated when the session is made; a
//! run allocates nothing.
//!
//! Order of a run. The first two convolutions are fused: a row of the second needs four rows of the first, which stand in a ring
//! of four, so the first feature map never exists whole. Threads share the rows of the second convolution; each has its own ring.
//! After a barrier come the rows of the third convolution, then the neurons of the dense layers, a barrier before each.
//! Every number is an integer until the last multiplication, so the split cannot change a bit.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use shared::quantize::requantize;

use crate::contributions::{Contributions, divide};
use crate::crew::{Crew, Meeting, Place, Work};
use crate::idle::Idle;
use crate::kernels::{self, WinogradScratch, cpu_time};
use crate::maps::FeatureMap;
use crate::network::{KERNEL_SIDE, Network, Weights};
use crate::rows::{first_row, pooled_row, pooled_row_of_image};

/// Input rows under a pooled row of a 3 x 3 convolution; also the size of the ring.
const STRIP_ROWS: usize = KERNEL_SIDE + 1;

/// Image rows under the last pooled row of the second convolution, beyond the four of its step.
const FIELD_BELOW: usize = 6;

/// Buffers and threads that run one network.
#[derive(Debug)]
pub(crate) struct Runner {
    crew: Crew<Shared>,
}

/// What the threads of a runner share.
#[derive(Debug)]
struct Shared {
    network: Arc<Network>,
    /// One map for each convolution but the first of two or more.
    maps: Vec<FeatureMap<u8>>,
    /// Output of each hidden dense layer.
    hidden: Vec<Vec<AtomicU8>>,
    n_threads: usize,
}

/// One thread's own buffers.
#[derive(Debug)]
struct Worker {
    place: Place,
    /// Patches under one pooled row of the first convolution.
    patches: Vec<u8>,
    /// The latest rows of the first convolution, row `r` at `r % 4`.
    ring: [Vec<u8>; STRIP_ROWS],
    /// Input of the dense layer at work, contiguous.
    features: Vec<u8>,
    sums: Vec<i32>,
    scratch: WinogradScratch,
    idle: Idle,
    /// CPU time spent in each layer, convolutions first, where it is measured.
    times: Option<Vec<Duration>>,
}

impl Runner {
    /// Allocates everything and starts `n_threads - 1` helpers.
    pub(crate) fn new(network: Arc<Network>, n_threads: usize) -> std::io::Result<Self> {
        let whole_maps = if network.convolutions.len() > 1 {
            &network.convolutions[1..]
        } else {
            &network.convolutions
        };
        let hidden = network
            .dense
            .iter()
            .map(|layer| (0..layer.n_outputs()).map(|_| AtomicU8::new(0)).collect());
        let shared = Shared {
            maps: whole_maps
                .iter()
                .map(|layer| FeatureMap::new(layer.pooled[0], layer.row_bytes()))
                .collect(),
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

    /// The logit of the latest image, divided over the last feature map; `None` unless there are exactly two dense layers.
    pub(crate) fn contributions(&self) -> Option<Contributions> {
        let shared = self.crew.work();
        let network = &shared.network;
        let [hidden, last] = &network.dense[..] else {
            return None;
        };
        let map = network.convolutions.last()?.pooled;
        let mut features = vec![0; hidden.n_inputs];
        flatten(shared, &mut features);
        let activations = shared.hidden.first()?;
        let activations: Vec<u8> = activations
            .iter()
            .map(|activation| activation.load(Ordering::Relaxed))
            .collect();
        let n_convolutions = network.convolutions.len();
        Some(divide(
            hidden,
            last,
            &features,
            &activations,
            map,
            n_convolutions,
        ))
    }

    /// Share of the columns of the first two convolutions that this session did not have to compute, on the calling thread.
    pub(crate) fn idle_share(&self) -> Option<f64> {
        let [looked, constant] = self.crew.worker().idle.counts;
        #[expect(clippy::cast_precision_loss, reason = "a share for people")]
        (looked > 0).then(|| constant as f64 / looked as f64)
    }

    /// Bytes of activations that the session holds, all threads together.
    pub(crate) fn activation_bytes(&self) -> usize {
        let (shared, worker) = (self.crew.work(), self.crew.worker());
        let ring: usize = worker.ring.iter().map(Vec::len).sum();
        let own = worker.patches.len() + ring + worker.features.len() + worker.scratch.bytes();
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
    fn new(network: &Network, place: Place) -> Self {
        let first = &network.convolutions[0];
        let patch_bytes = 2 * first.pooled[1] * first.column_bytes + first.kernel_row_bytes;
        let ring_bytes = if network.convolutions.len() > 1 {
            first.row_bytes()
        } else {
            0
        };
        let widest = network
            .dense
            .iter()
            .map(|layer| layer.n_inputs)
            .max()
            .unwrap_or(0);
        let mut scratch = WinogradScratch::default();
        for convolution in &network.convolutions {
            if let Weights::Winograd(layer) = &convolution.weights {
                layer.reserve(convolution.pooled[1], &mut scratch);
            }
        }
        Self {
            place,
            patches: vec![0; patch_bytes],
            ring: std::array::from_fn(|_| vec![0; ring_bytes]),
            features: vec![0; widest],
            sums: vec![
                0;
                network
                    .dense
                    .iter()
                    .map(crate::network::Dense::n_outputs)
                    .max()
                    .unwrap_or(0)
            ],
            scratch,
            idle: Idle::new(network),
            times: None,
        }
    }

    /// This thread's part of one image; the logit is meaningful on thread 0.
    fn run(&mut self, shared: &Shared, image: &[u8], meeting: &Meeting) -> f32 {
        let network = &*shared.network;
        for (index, map) in shared.maps.iter().enumerate() {
            let rows = self.place.share(map.n_rows());
            match index.checked_sub(1) {
                Some(previous) => self.whole_map(shared, previous, rows),
                None if network.convolutions.len() > 1 => {
                    self.fused_maps(network, image, map, rows)
                }
                None => self.first_map(network, image, map, rows),
            }
            meeting.wait();
        }
        self.dense(shared, meeting)
    }

    /// Rows of the only convolution.
    fn first_map(
        &mut self,
        network: &Network,
        image: &[u8],
        map: &FeatureMap<u8>,
        rows: Range<usize>,
    ) {
        self.idle.look(image, 2 * rows.start..2 * rows.end + 2);
        for row in rows {
            let started = self.times.is_some().then(cpu_time);
            let mut out = map.row_mut(row);
            let Self {
                patches,
                idle,
                scratch,
                ..
            } = self;
            first_row(network, image, row, patches, idle, scratch, &mut out);
            self.clock(0, started);
        }
    }

    /// Rows of the second convolution, with the rows of the first made just before they are needed.
    fn fused_maps(
        &mut self,
        network: &Network,
        image: &[u8],
        map: &FeatureMap<u8>,
        rows: Range<usize>,
    ) {
        let started = self.times.is_some().then(cpu_time);
        self.idle
            .look(image, 4 * rows.start..4 * rows.end + FIELD_BELOW);
        self.clock(0, started);
        let mut next = 2 * rows.start;
        for row in rows {
            let started = self.times.is_some().then(cpu_time);
            for first in next..2 * row + STRIP_ROWS {
                let Self {
                    patches,
                    idle,
                    scratch,
                    ..
                } = self;
                let out = &mut self.ring[first % STRIP_ROWS];
                first_row(network, image, first, patches, idle, scratch, out);
            }
            next = 2 * row + STRIP_ROWS;
            self.clock(0, started);

            let started = self.times.is_some().then(cpu_time);
            let strip: [&[u8]; STRIP_ROWS] =
                std::array::from_fn(|i| self.ring[(2 * row + i) % STRIP_ROWS].as_slice());
            let mut out = map.row_mut(row);
            let Self { idle, scratch, .. } = self;
            pooled_row_of_image(network, image, 1, row, &strip, idle, scratch, &mut out);
            self.clock(1, started);
        }
    }

    /// Rows of a convolution whose input map is whole.
    fn whole_map(&mut self, shared: &Shared, previous: usize, rows: Range<usize>) {
        let layer = previous + 2;
        for row in rows {
            let started = self.times.is_some().then(cpu_time);
            let input = &shared.maps[previous];
            let strip: [_; STRIP_ROWS] = std::array::from_fn(|i| input.row(2 * row + i));
            let strip: [&[u8]; STRIP_ROWS] = std::array::from_fn(|i| strip[i].as_slice());
            let mut out = shared.maps[previous + 1].row_mut(row);
            pooled_row(&shared.network, layer, &strip, &mut self.scratch, &mut out);
            self.clock(layer, started);
        }
    }

    /// The dense layers; every thread gathers its own copy of a layer's input.
    fn dense(&mut self, shared: &Shared, meeting: &Meeting) -> f32 {
        let network = &*shared.network;
        let mut logit = f32::NAN;
        for (index, layer) in network.dense.iter().enumerate() {
            let started = self.times.is_some().then(cpu_time);
            let is_last = index + 1 == network.dense.len();
            let neurons = match (is_last, self.place.index) {
                (false, _) => self.place.share(layer.n_outputs()),
                (true, 0) => 0..1,
                (true, _) => return logit,
            };
            let features = &mut self.features[..layer.n_inputs];
            match index.checked_sub(1) {
                Some(previous) => {
                    for (to, from) in features.iter_mut().zip(&shared.hidden[previous]) {
                        *to = from.load(Ordering::Relaxed);
                    }
                }
                None => flatten(shared, features),
            }
            let sums = &mut self.sums[..neurons.len()];
            let weights =
                &layer.weights[neurons.start * layer.n_inputs..neurons.end * layer.n_inputs];
            kernels::dense(network.kernel, features, weights, sums);
            for (neuron, &sum) in neurons.zip(sums.iter()) {
                let sum = sum + layer.bias[neuron];
                if is_last {
                    logit = to_logit(sum, layer.scale[neuron]);
                } else {
                    let activation = requantize(sum, layer.scale[neuron]);
                    shared.hidden[index][neuron].store(activation, Ordering::Relaxed);
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

/// `f32(sum) x scale`, one rounding each: the last layer's output.
#[expect(
    clippy::cast_precision_loss,
    reason = "the conversion to f32 is the definition of the logit"
)]
fn to_logit(sum: i32, scale: f32) -> f32 {
    sum as f32 * scale
}

/// The last feature map in the order of the dense weights: `[channel, row, column]`.
fn flatten(shared: &Shared, features: &mut [u8]) {
    let Some((convolution, map)) = shared.network.convolutions.last().zip(shared.maps.last())
    else {
        return;
    };
    let [rows, columns] = convolution.pooled;
    for row_index in 0..map.n_rows() {
        let row = map.row(row_index);
        for (channel, plane) in features.chunks_exact_mut(rows * columns).enumerate() {
            let line = &mut plane[row_index * columns..][..columns];
            for (to, from) in line
                .iter_mut()
                .zip(row.chunks_exact(convolution.channel_stride()))
            {
                *to = from[channel];
            }
        }
    }
}
