//! The parameters in the GPU's memory: master weights, gradients, moments, and the copy that the matrix units read, each one flat array in one order.
//!
//! In: what each parameter is in the files. Out: its place ([`Spans`], pure arithmetic), and the arrays ([`Parameters`]). Parameters that are trained stand
//! before those that are not, in the order in which the data meets them; gradients and moments are as long as they are.
//!
//! Channels and units are filled up to a multiple of 8, which the matrix units want. What fills up has weights and biases of 0, so its outputs are 0,
//! ReLU is closed there, its gradients are 0 and it stays 0. What is `[out, in, place..]` in files is `[out, place.., in]` here, as the feature map before it lies.

use std::ops::Range;

use anyhow::Result;
use rayon::prelude::*;

use super::device::Argument::{Float, Long, Pointer};
use super::device::{Device, Grid, Memory, Pinned};
use super::network::BLOCKS_EACH;
use crate::architecture::OptimiserKind;
use crate::operators::optimiser::Moments;

/// Multiple to which channels and units are filled up.
pub(crate) const FILL: usize = 8;
/// Multiple of values at which each parameter begins: 256 bytes of f32, 128 of bf16.
const ALIGNMENT: usize = 64;

/// The inner dimensions of a parameter that is `[out, in, place..]` in files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inner {
    /// Places: taps of a kernel, pixels of a map.
    pub(crate) places: usize,
    /// Where each channel of the files stands among the `width` ones here.
    pub(crate) channels: Vec<usize>,
    /// Channels here.
    pub(crate) width: usize,
}

/// A parameter's place in the flat arrays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) begin: usize,
    pub(crate) length: usize,
    /// The layer whose backward pass gives its gradient.
    layer: usize,
    is_trained: bool,
    /// How many values it has in files.
    n: usize,
    /// `None`: it lies as in files.
    inner: Option<Inner>,
}

/// The places of all parameters, in the files' order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spans {
    pub(crate) all: Vec<Span>,
    /// Values of the trained ones, which come first.
    pub(crate) n_trained: usize,
    /// Values of all.
    pub(crate) n_values: usize,
}

impl Span {
    /// A list of `n` values, filled up to `length`.
    pub(crate) fn list(layer: usize, n: usize, length: usize, is_trained: bool) -> Self {
        Self {
            begin: 0,
            length,
            layer,
            is_trained,
            n,
            inner: None,
        }
    }

    /// `n_out` times `inner`, filled up to `out`.
    pub(crate) fn matrix(
        layer: usize,
        n_out: usize,
        out: usize,
        inner: Inner,
        is_trained: bool,
    ) -> Self {
        Self {
            begin: 0,
            length: out * inner.places * inner.width,
            layer,
            is_trained,
            n: n_out * inner.places * inner.channels.len(),
            inner: Some(inner),
        }
    }

    /// Its values in the files' order, of the flat array.
    fn gather(&self, flat: &[f32]) -> Vec<f32> {
        let from = &flat[self.begin..][..self.length];
        let Some(inner) = &self.inner else {
            return from[..self.n].to_vec();
        };
        let mut values = vec![0.0; self.n];
        let to = values.par_chunks_mut(inner.channels.len() * inner.places);
        to.zip(from.par_chunks(inner.places * inner.width))
            .for_each(|(to, from)| {
                for (to, channel) in to.chunks_mut(inner.places).zip(&inner.channels) {
                    for (to, from) in to.iter_mut().zip(from.chunks(inner.width)) {
                        *to = from[*channel];
                    }
                }
            });
        values
    }

    /// Puts values of the files' order to their places in the flat array.
    fn spread(&self, values: &[f32], flat: &mut [f32]) {
        let to = &mut flat[self.begin..][..self.length];
        let Some(inner) = &self.inner else {
            to[..values.len()].copy_from_slice(values);
            return;
        };
        let from = values.par_chunks(inner.channels.len() * inner.places);
        to.par_chunks_mut(inner.places * inner.width)
            .zip(from)
            .for_each(|(to, from)| {
                for (from, channel) in from.chunks(inner.places).zip(&inner.channels) {
                    for (to, from) in to.chunks_mut(inner.width).zip(from) {
                        to[*channel] = *from;
                    }
                }
            });
    }
}

impl Spans {
    /// Gives each its place.
    pub(crate) fn new(all: Vec<Span>) -> Self {
        let mut spans = Self {
            all,
            n_trained: 0,
            n_values: 0,
        };
        for is_trained in [true, false] {
            for span in spans.all.iter_mut().filter(|s| s.is_trained == is_trained) {
                span.begin = spans.n_values;
                spans.n_values = (spans.n_values + span.length).next_multiple_of(ALIGNMENT);
            }
            if is_trained {
                spans.n_trained = spans.n_values;
            }
        }
        spans
    }

    /// How many values parameter `index` has in the files.
    #[cfg(test)]
    pub(crate) fn length(&self, index: usize) -> usize {
        self.all[index].n
    }

    /// Where value `at` of parameter `index`, in the files' order, stands in the flat arrays.
    #[cfg(test)]
    pub(crate) fn place(&self, index: usize, at: usize) -> usize {
        let span = &self.all[index];
        let within = span.inner.as_ref().map_or(at, |inner| {
            let n_in = inner.channels.len();
            let (place, channel, out) = (
                at % inner.places,
                at / inner.places % n_in,
                at / inner.places / n_in,
            );
            (out * inner.places + place) * inner.width + inner.channels[channel]
        });
        span.begin + within
    }

    /// Values of the parameters that stand among the first `n` of `memory`, in the files' order, once the stream has come here; of the others none.
    fn gather(
        &self,
        device: &Device,
        memory: &Memory,
        n: usize,
        staging: &mut Pinned,
    ) -> Result<Vec<Vec<f32>>> {
        device.download(memory, staging, 0, 4 * n)?;
        device.stream.synchronize()?;
        let flat = &staging.floats()[..n];
        let among = |span: &Span| {
            if span.begin < n {
                span.gather(flat)
            } else {
                Vec::new()
            }
        };
        Ok(self.all.iter().map(among).collect())
    }

    /// The ranges whose gradients are summed over the ranks together, in the order in which the backward pass completes them: each a
    /// layer's or several layers', at least `least` values where there are as many, with the number of the layer that completes it.
    pub(crate) fn buckets(&self, least: usize) -> Vec<(usize, Range<usize>)> {
        let mut buckets = Vec::new();
        let mut end = self.n_trained;
        let trained = self.all.iter().filter(|span| span.is_trained);
        let mut firsts: Vec<(usize, usize)> = trained.map(|s| (s.layer, s.begin)).collect();
        firsts.dedup_by_key(|(layer, _)| *layer);
        for (layer, begin) in firsts.into_iter().rev() {
            if end - begin >= least || begin == 0 {
                buckets.push((layer, begin..end));
                end = begin;
            }
        }
        buckets
    }
}

/// The parameters of a run.
#[derive(Debug)]
pub(crate) struct Parameters {
    pub(crate) spans: Spans,
    optimiser: OptimiserKind,
    weights: Memory,
    /// f32; summed over ranks in place.
    pub(crate) gradients: Memory,
    moments: [Memory; 2],
    copy: Option<Memory>,
    /// Where one of these arrays is on its way between the GPU and the host.
    staging: Pinned,
}

impl Parameters {
    /// All zeros; `has_copy`: with a bf16 copy of the weights.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn new(
        device: &Device,
        spans: Spans,
        optimiser: OptimiserKind,
        has_copy: bool,
    ) -> Result<Self> {
        let zeros = |n_bytes: usize| device.zeros(n_bytes);
        let trained = 4 * spans.n_trained;
        Ok(Self {
            optimiser,
            weights: zeros(4 * spans.n_values)?,
            gradients: zeros(trained)?,
            moments: match optimiser {
                OptimiserKind::Adam => [zeros(trained)?, zeros(trained)?],
                OptimiserKind::Sgd => [zeros(0)?, zeros(0)?],
            },
            copy: if has_copy {
                Some(zeros(2 * spans.n_values)?)
            } else {
                None
            },
            staging: device.pinned(4 * spans.n_values)?,
            spans,
        })
    }

    fn range(&self, flat: &Memory, index: usize) -> u64 {
        let span = &self.spans.all[index];
        flat.range(4 * span.begin, 4 * span.length)
    }

    /// Where a parameter's master weights lie.
    pub(crate) fn weight(&self, index: usize) -> u64 {
        self.range(&self.weights, index)
    }

    /// Where the gradient of a trained parameter lies.
    pub(crate) fn gradient(&self, index: usize) -> u64 {
        self.range(&self.gradients, index)
    }

    /// Where the values of a parameter lie that activations are multiplied with.
    pub(crate) fn factor(&self, index: usize) -> u64 {
        let span = &self.spans.all[index];
        match &self.copy {
            Some(copy) => copy.range(2 * span.begin, 2 * span.length),
            None => self.weight(index),
        }
    }

    /// Replaces the weights, and the moments where there are any (else they become 0); waits.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn set(
        &mut self,
        device: &mut Device,
        weights: &[Vec<f32>],
        moments: &[Moments],
    ) -> Result<()> {
        self.spread(device, None, &mut weights.iter().map(Vec::as_slice))?;
        if self.optimiser == OptimiserKind::Adam {
            let mut first = moments.iter().map(|moments| moments.first.as_slice());
            self.spread(device, Some(0), &mut first)?;
            let mut second = moments.iter().map(|moments| moments.second.as_slice());
            self.spread(device, Some(1), &mut second)?;
        }
        if let Some(copy) = &self.copy {
            let n = self.spans.n_values;
            let grid = Grid::of(n, BLOCKS_EACH * device.n_multiprocessors());
            let (from, to) = (self.weights.pointer(), copy.pointer());
            device.launch("to_bf16_copy", grid, &[Pointer(from), Pointer(to), Long(n)])?;
        }
        Ok(())
    }

    /// Weights and moments in the files' order, once the stream has come here; what is not trained has no moments.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn get(&mut self, device: &Device) -> Result<(Vec<Vec<f32>>, Vec<Moments>)> {
        let (spans, staging) = (&self.spans, &mut self.staging);
        let weights = spans.gather(device, &self.weights, spans.n_values, staging)?;
        let moments = match self.optimiser {
            OptimiserKind::Sgd => vec![Moments::default(); weights.len()],
            OptimiserKind::Adam => {
                let [first, second] = &self.moments;
                let first = spans.gather(device, first, spans.n_trained, staging)?;
                let second = spans.gather(device, second, spans.n_trained, staging)?;
                let both = first.into_iter().zip(second);
                both.map(|(first, second)| Moments { first, second })
                    .collect()
            }
        };
        Ok((weights, moments))
    }

    /// Gradients in the files' order, once the stream has come here.
    #[cfg(test)]
    pub(crate) fn gradients(&mut self, device: &Device) -> Result<Vec<Vec<f32>>> {
        let (spans, staging) = (&self.spans, &mut self.staging);
        spans.gather(device, &self.gradients, spans.n_trained, staging)
    }

    /// Replaces the weights or a moment by values in the files' order; waits.
    fn spread(
        &mut self,
        device: &Device,
        moment: Option<usize>,
        values: &mut dyn Iterator<Item = &[f32]>,
    ) -> Result<()> {
        let (memory, n) = match moment {
            None => (&self.weights, self.spans.n_values),
            Some(moment) => (&self.moments[moment], self.spans.n_trained),
        };
        let flat = &mut self.staging.floats_mut()[..self.spans.n_values];
        flat.fill(0.0);
        for (span, values) in self.spans.all.iter().zip(values) {
            span.spread(values, flat);
        }
        device.upload(&device.stream, &self.staging, memory, 4 * n)?;
        Ok(device.stream.synchronize()?)
    }

    /// One step of the optimiser on what is trained; for Adam `rate` has the correction of the step in it.
    ///
    /// # Errors
    /// CUDA's.
    pub(crate) fn update(&mut self, device: &mut Device, rate: f32) -> Result<()> {
        let n = self.spans.n_trained;
        let grid = Grid::of(n / 4, BLOCKS_EACH * device.n_multiprocessors());
        let copy = self.copy.as_ref().map_or(0, Memory::pointer);
        let (weights, gradients) = (self.weights.pointer(), self.gradients.pointer());
        match self.optimiser {
            OptimiserKind::Adam => {
                let [first, second] = [0, 1].map(|moment| self.moments[moment].pointer());
                let arguments = [
                    Pointer(weights),
                    Pointer(first),
                    Pointer(second),
                    Pointer(gradients),
                    Pointer(copy),
                    Long(n),
                    Float(rate),
                ];
                device.launch("adam", grid, &arguments)
            }
            OptimiserKind::Sgd => {
                let arguments = [
                    Pointer(weights),
                    Pointer(gradients),
                    Pointer(copy),
                    Long(n),
                    Float(rate),
                ];
                device.launch("sgd", grid, &arguments)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// A kernel of 2 x 3 taps on channels that stand apart, and lists; the second is not trained.
    fn spans() -> Spans {
        let inner = Inner {
            places: 6,
            channels: vec![0, 1, 8, 9, 10],
            width: 16,
        };
        Spans::new(vec![
            Span::matrix(0, 3, 8, inner.clone(), true),
            Span::list(0, 3, 8, false),
            Span::list(1, 70, 72, true),
            Span::matrix(2, 1, 1, Inner { places: 1, ..inner }, true),
        ])
    }

    #[test]
    fn every_value_has_a_place_of_its_own_within_its_parameter() {
        let spans = spans();
        let lengths = [3 * 5 * 6, 3, 70, 5];
        let mut all = BTreeSet::new();
        let mut flat = vec![0.0; spans.n_values];
        for (index, length) in lengths.into_iter().enumerate() {
            let span = &spans.all[index];
            assert_eq!(spans.length(index), length, "parameter {index}");
            let values: Vec<f32> = (1u16..).take(length).map(f32::from).collect();
            span.spread(&values, &mut flat);
            for (at, value) in values.iter().enumerate() {
                let place = spans.place(index, at);
                assert!((span.begin..span.begin + span.length).contains(&place));
                assert!(all.insert(place));
                let stands = flat[place].to_bits();
                assert_eq!(stands, value.to_bits(), "parameter {index}, value {at}");
            }
            assert_eq!(span.gather(&flat), values);
        }
        // Out 2, channel 3, row 1, column 2.
        let place = spans.place(0, ((2 * 5 + 3) * 2 + 1) * 3 + 2);
        assert_eq!(place, ((2 * 2 + 1) * 3 + 2) * 16 + 9);
    }

    #[test]
    fn what_is_trained_stands_first_and_in_buckets() {
        let spans = spans();
        let begins: Vec<usize> = spans.all.iter().map(|span| span.begin).collect();
        assert_eq!(begins, [0, 768 + 128 + 64, 768, 768 + 128]);
        assert_eq!((spans.n_trained, spans.n_values), (960, 1024));
        assert_eq!(spans.buckets(150), [(1, 768..960), (0, 0..768)]);
        assert_eq!(spans.buckets(1000), [(0, 0..960)]);
    }
}
