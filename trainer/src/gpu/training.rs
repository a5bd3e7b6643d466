//! A run's GPU: the images it trains on, the steps of an epoch and their losses.
//!
//! In: an epoch's steps as the trainer plans them on any device ([`Work`]). Out: losses, a block of steps at a time, and at an epoch's end the weights. The
//! host puts step after step on the GPU's stream and never waits for one: losses are written on the GPU and fetched when the next block of steps is under way already.
//!
//! The slices that the run uses lie in the GPU's memory as u8 where they fit (a kernel finds them by number); else each step's are read from the cache a few steps ahead, copied to pinned
//! memory and from there on a stream of their own. Each rank then reads its own images only.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cudarc::driver::{CudaEvent, CudaStream};
use shared::TENSOR_BYTES;

use super::device::{self, Device, Memory, Pinned};
use super::nccl::Communicator;
use super::network::{Base, Design, Images, Network, Targets};
use crate::architecture::Architecture;
use crate::batches::Change;
use crate::cache::Cache;
use crate::exit::{Exit, fault};
use crate::network::Parameter;
use crate::operators::optimiser::Moments;
use crate::ranks::Ranks;
use crate::train::{GpuFigures, Precision};

/// Steps' images that are under way to the GPU where they do not all lie there.
const SLOTS: usize = 3;
/// Share of the free memory that images may take: the rest is for the libraries.
const IMAGES_SHARE: f64 = 0.9;
/// Bytes that are copied at a time while the images are brought to the GPU.
const CHUNK_IMAGES: usize = 256;
/// Fewest gradients that are summed over the ranks together.
const BUCKET: usize = 1 << 20;
/// How long a block of steps may take on several GPUs before a rank counts as lost.
const SILENCE: Duration = Duration::from_secs(300);
/// Pause between two looks at an event.
const PAUSE: Duration = Duration::from_micros(200);

/// A step of this rank.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    /// Rows of the cache.
    pub(crate) rows: Vec<usize>,
    /// Label and weight of each.
    pub(crate) targets: Vec<f32>,
    /// How each image is changed; empty where none is.
    pub(crate) changes: Vec<Change>,
    /// Images of all ranks.
    pub(crate) n_total: usize,
}

/// What the GPU is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    pub(crate) ordinal: usize,
    pub(crate) precision: Precision,
    /// Images of the largest step of this rank.
    pub(crate) most_images: usize,
    /// Whether gradients go through NCCL.
    pub(crate) has_communicator: bool,
}

/// Where the pixels are.
#[derive(Debug)]
enum Pixels {
    /// All of them, and the number of each row.
    Resident(Memory, HashMap<usize, i64>),
    /// Those of a few steps.
    Streamed(Slots),
}

/// Places for the images of the next steps.
#[derive(Debug)]
struct Slots {
    stream: Arc<CudaStream>,
    slots: Vec<Slot>,
    next: usize,
}

#[derive(Debug)]
struct Slot {
    host: Pinned,
    memory: Memory,
    /// The copy is done: the host's memory is free.
    copied: CudaEvent,
    /// The step is done: the GPU's memory is free.
    used: CudaEvent,
}

/// The steps of an epoch in the GPU's memory.
#[derive(Debug)]
struct Epoch {
    /// First image of each step, and one more.
    starts: Vec<usize>,
    n_totals: Vec<usize>,
    numbers: Memory,
    targets: Memory,
    changes: Option<Memory>,
    losses: Memory,
    host_losses: Pinned,
}

/// Steps whose losses are on their way.
#[derive(Debug)]
pub(crate) struct Mark {
    begin: usize,
    end: usize,
    event: CudaEvent,
}

/// The GPU of a run.
#[derive(Debug)]
pub(crate) struct Gpu {
    /// Dropped first: where a rank is lost its sums never end, and freeing memory waits for them until they are aborted.
    communicator: Option<Communicator>,
    network: Network,
    pixels: Pixels,
    epoch: Option<Epoch>,
    buckets: Vec<(usize, std::ops::Range<usize>)>,
    summed: CudaEvent,
    precision: Precision,
    is_tuned: bool,
}

/// Number of GPUs of this machine.
pub(crate) fn count() -> usize {
    device::count()
}

impl Mark {
    /// The first of its steps.
    pub(crate) fn begin(&self) -> usize {
        self.begin
    }
}

impl Gpu {
    /// Brings the rows that a run uses to a GPU, or prepares to bring each step's.
    ///
    /// # Errors
    /// No GPU, no memory, CUDA's errors; the exit code is 69.
    pub(crate) fn open(
        choice: Choice,
        architecture: &Architecture,
        width: f64,
        cache: &Cache,
        rows: &[usize],
        ranks: &mut Ranks,
    ) -> Result<Self> {
        let device = Device::open(choice.ordinal)?;
        let summed = device.event()?;
        let network = Network::new(
            device,
            Design::of(architecture, width),
            shared::SIDE,
            choice.most_images.max(1),
            choice.precision,
            architecture.optimiser,
        )?;
        let buckets = network.base.parameters.spans.buckets(BUCKET);
        let device = &network.base.device;
        let communicator = choice
            .has_communicator
            .then(|| Communicator::meet(device, ranks))
            .transpose()?;
        let (free, _) = device.free_and_total()?;
        let needed = rows.len() * TENSOR_BYTES;
        #[expect(
            clippy::cast_precision_loss,
            reason = "bytes of a machine are far below 2^53"
        )]
        let fits =
            needed as f64 <= free as f64 * IMAGES_SHARE - super::convolution::most_workspace();
        let pixels = if fits && !is_streaming_forced() {
            resident(device, cache, rows)?
        } else {
            streamed(device, choice.most_images.max(1))?
        };
        Ok(Self {
            pixels,
            epoch: None,
            communicator,
            buckets,
            summed,
            precision: choice.precision,
            is_tuned: false,
            network,
        })
    }

    /// Whether each step's images must be given to [`Self::step`].
    pub(crate) fn is_streaming(&self) -> bool {
        matches!(self.pixels, Pixels::Streamed(_))
    }

    /// Replaces weights and moments.
    pub(crate) fn set(&mut self, parameters: &[Parameter], moments: &[Moments]) -> Result<()> {
        let values = parameters
            .iter()
            .map(|parameter| Ok(parameter.variable.flatten_all()?.to_vec1::<f32>()?));
        let values = values.collect::<Result<Vec<Vec<f32>>>>()?;
        self.network.set(&values, moments)
    }

    /// Brings the weights back into `parameters`, and the moments, after all steps so far.
    pub(crate) fn get(&mut self, parameters: &[Parameter]) -> Result<Vec<Moments>> {
        let (weights, moments) = self.network.get()?;
        for (parameter, values) in parameters.iter().zip(weights) {
            let variable = &parameter.variable;
            let tensor =
                candle_core::Tensor::from_vec(values, variable.shape(), variable.device())?;
            variable.set(&tensor)?;
        }
        Ok(moments)
    }

    /// Makes the steps of an epoch known. The first time cuDNN's plans are chosen, which takes seconds.
    pub(crate) fn begin(&mut self, steps: &[Work]) -> Result<()> {
        let device = &self.network.base.device;
        let mut starts = vec![0];
        let (mut numbers, mut targets, mut changes) = (Vec::new(), Vec::new(), Vec::new());
        for step in steps {
            for (place, row) in (0i64..).zip(&step.rows) {
                numbers.push(match &self.pixels {
                    Pixels::Resident(_, number) => {
                        *number.get(row).context("a row that was not brought")?
                    }
                    Pixels::Streamed(_) => place,
                });
            }
            targets.extend_from_slice(&step.targets);
            for change in &step.changes {
                changes.extend([i32::from(change.is_flipped), change.down, change.right]);
            }
            starts.push(numbers.len());
        }
        ensure!(
            changes.is_empty() || changes.len() == 3 * numbers.len(),
            "changes of some images only"
        );
        let filled = |n_bytes: usize| device.zeros(n_bytes);
        let epoch = Epoch {
            numbers: filled(8 * numbers.len())?,
            targets: filled(4 * targets.len())?,
            changes: if changes.is_empty() {
                None
            } else {
                Some(filled(4 * changes.len())?)
            },
            losses: filled(4 * steps.len())?,
            host_losses: device.pinned(4 * steps.len())?,
            n_totals: steps.iter().map(|step| step.n_total).collect(),
            starts,
        };
        device.write(&epoch.numbers, 0, &numbers)?;
        device.write(&epoch.targets, 0, &targets)?;
        if let Some(memory) = &epoch.changes {
            device.write(memory, 0, &changes)?;
        }
        self.epoch = Some(epoch);
        if !self.is_tuned {
            let most = steps.iter().map(|step| step.rows.len()).max().unwrap_or(0);
            if most > 0 {
                self.network.tune(most)?;
            }
            self.is_tuned = true;
        }
        Ok(())
    }

    /// Puts step `index` of the epoch on the GPU; `pixels` are its images where they are streamed.
    pub(crate) fn step(&mut self, index: usize, rate: f32, pixels: Option<&[u8]>) -> Result<()> {
        let epoch = self.epoch.as_ref().context("no epoch has begun")?;
        let (begin, end) = (epoch.starts[index], epoch.starts[index + 1]);
        let targets = Targets {
            targets: epoch.targets.range(8 * begin, 8 * (end - begin)),
            n_total: epoch.n_totals[index],
            loss: epoch.losses.range(4 * index, 4),
        };
        let numbers = epoch.numbers.range(8 * begin, 8 * (end - begin));
        let changes = epoch.changes.as_ref();
        let changes = changes.map_or(0, |all| all.range(12 * begin, 12 * (end - begin)));
        let slot = self.pixels_of(pixels)?;
        let images = Images {
            pixels: slot.0,
            numbers,
            changes,
            n: end - begin,
        };
        let (communicator, buckets, summed) = (&self.communicator, &self.buckets, &self.summed);
        let after = |base: &mut Base, layer: usize| {
            let Some(communicator) = communicator else {
                return Ok(());
            };
            let Some((_, range)) = buckets.iter().find(|(last, _)| *last == layer) else {
                return Ok(());
            };
            summed.record(&base.device.stream)?;
            communicator.stream.wait(summed)?;
            communicator.sum(&base.parameters.gradients, range.start, range.len())
        };
        if images.n > 0 {
            self.network.gradients_of(images, targets, after)?;
        } else {
            let losses = &self.epoch.as_ref().context("no epoch has begun")?.losses;
            self.network.no_gradients(losses, index)?;
            for (layer, _) in buckets {
                after(&mut self.network.base, *layer)?;
            }
        }
        if let Some(communicator) = communicator {
            summed.record(&communicator.stream)?;
            self.network.base.device.stream.wait(summed)?;
        }
        self.free_slot(slot.1)?;
        self.network.update(rate)
    }

    /// Where the pixels of a step are, and in which slot; in a slot the step's work waits for the copy.
    fn pixels_of(&mut self, pixels: Option<&[u8]>) -> Result<(u64, Option<usize>)> {
        let device = &self.network.base.device;
        match &mut self.pixels {
            Pixels::Resident(memory, _) => Ok((memory.pointer(), None)),
            Pixels::Streamed(slots) => {
                let pixels = pixels.context("a step's images")?;
                let index = slots.next;
                slots.next = (index + 1) % SLOTS;
                let slot = &mut slots.slots[index];
                // The copy from this pinned memory, SLOTS steps ago, must be done before it is written again.
                slot.copied.synchronize()?;
                slot.host.bytes_mut()[..pixels.len()].copy_from_slice(pixels);
                slots.stream.wait(&slot.used)?;
                device.upload(&slots.stream, &slot.host, &slot.memory, pixels.len())?;
                slot.copied.record(&slots.stream)?;
                device.stream.wait(&slot.copied)?;
                Ok((slot.memory.pointer(), Some(index)))
            }
        }
    }

    /// The slot may be filled again behind what was put on the stream so far.
    fn free_slot(&self, index: Option<usize>) -> Result<()> {
        if let (Pixels::Streamed(slots), Some(index)) = (&self.pixels, index) {
            slots.slots[index]
                .used
                .record(&self.network.base.device.stream)?;
        }
        Ok(())
    }

    /// Sends the losses of steps `begin..end`, which were put on the GPU, on their way.
    pub(crate) fn mark(&mut self, begin: usize, end: usize) -> Result<Mark> {
        let epoch = self.epoch.as_mut().context("no epoch has begun")?;
        let device = &self.network.base.device;
        device.download(
            &epoch.losses,
            &mut epoch.host_losses,
            4 * begin,
            4 * (end - begin),
        )?;
        let event = device.event()?;
        event.record(&device.stream)?;
        Ok(Mark { begin, end, event })
    }

    /// The losses of marked steps, once they are there: this rank's part of each step's mean.
    pub(crate) fn losses(&self, mark: &Mark) -> Result<Vec<f32>> {
        let epoch = self.epoch.as_ref().context("no epoch has begun")?;
        let Some(communicator) = &self.communicator else {
            mark.event.synchronize()?;
            return Ok(floats(epoch, mark));
        };
        // A rank that is lost leaves the others' sums waiting for ever.
        let begin = Instant::now();
        while !mark.event.try_is_complete()? {
            communicator.is_well()?;
            if begin.elapsed() > SILENCE {
                let message = format!(
                    "a rank was lost: no step ended for {} s; continue from the last checkpoint with --resume, with any number of ranks",
                    SILENCE.as_secs()
                );
                return Err(fault(Exit::PeerDown, message));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(floats(epoch, mark))
    }

    /// Logits of rows, in their order.
    pub(crate) fn logits(&mut self, cache: &Cache, rows: &[usize]) -> Result<Vec<f32>> {
        let mut logits = Vec::with_capacity(rows.len());
        for rows in rows.chunks(self.network.most_images()) {
            let mut pixels = Vec::new();
            let numbers: Vec<i64> = match &self.pixels {
                Pixels::Resident(_, number) => rows
                    .iter()
                    .map(|row| number.get(row).copied())
                    .collect::<Option<_>>()
                    .context("a row that was not brought")?,
                Pixels::Streamed(_) => {
                    rows.iter()
                        .for_each(|row| pixels.extend_from_slice(cache.tensor(*row)));
                    (0i64..).take(rows.len()).collect()
                }
            };
            let device = &self.network.base.device;
            let memory = device.zeros(8 * numbers.len())?;
            device.write(&memory, 0, &numbers)?;
            let slot = self.pixels_of(Some(&pixels))?;
            let images = Images {
                pixels: slot.0,
                numbers: memory.pointer(),
                changes: 0,
                n: rows.len(),
            };
            logits.extend(self.network.logits(images)?);
            self.free_slot(slot.1)?;
        }
        Ok(logits)
    }

    /// For the record.
    pub(crate) fn figures(&self) -> Result<GpuFigures> {
        let device = &self.network.base.device;
        let (free, total) = device.free_and_total()?;
        Ok(GpuFigures {
            device: device.name(),
            precision: match self.precision {
                Precision::Bf16 => "bf16".into(),
                Precision::F32 => "f32".into(),
            },
            used_bytes: total - free,
            image_bytes: match &self.pixels {
                Pixels::Resident(memory, _) => memory.n_bytes(),
                Pixels::Streamed(slots) => {
                    slots.slots.iter().map(|slot| slot.memory.n_bytes()).sum()
                }
            },
            workspace_bytes: self.network.workspace_bytes(),
        })
    }
}

/// Whether the environment asks for the way of data that does not fit: for its tests.
fn is_streaming_forced() -> bool {
    std::env::var_os("PE_EDGE_STREAM_IMAGES").is_some()
}

fn floats(epoch: &Epoch, mark: &Mark) -> Vec<f32> {
    let bytes = &epoch.host_losses.bytes()[4 * mark.begin..4 * mark.end];
    let words = bytes.chunks_exact(4);
    words
        .map(|word| f32::from_ne_bytes([word[0], word[1], word[2], word[3]]))
        .collect()
}

/// All rows on the GPU, in the order of the cache.
fn resident(device: &Device, cache: &Cache, rows: &[usize]) -> Result<Pixels> {
    let mut rows = rows.to_vec();
    rows.sort_unstable();
    rows.dedup();
    let memory = device.zeros(rows.len() * TENSOR_BYTES)?;
    let mut begin = 0;
    let mut chunk = Vec::new();
    for rows in rows.chunks(CHUNK_IMAGES) {
        chunk.clear();
        rows.iter()
            .for_each(|row| chunk.extend_from_slice(cache.tensor(*row)));
        device.write(&memory, begin, &chunk)?;
        begin += chunk.len();
    }
    Ok(Pixels::Resident(
        memory,
        rows.into_iter().zip(0..).collect(),
    ))
}

fn streamed(device: &Device, most_images: usize) -> Result<Pixels> {
    let slot = || -> Result<Slot> {
        Ok(Slot {
            host: device.pinned(most_images * TENSOR_BYTES)?,
            memory: device.zeros(most_images * TENSOR_BYTES)?,
            copied: device.event()?,
            used: device.event()?,
        })
    };
    let stream = device.new_stream()?;
    let slots = (0..SLOTS).map(|_| slot()).collect::<Result<_>>()?;
    // The slots were cleared on the device's stream.
    device.stream.synchronize()?;
    Ok(Pixels::Streamed(Slots {
        stream,
        slots,
        next: 0,
    }))
}
