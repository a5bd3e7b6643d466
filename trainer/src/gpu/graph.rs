//! A backbone as the GPU computes it: where its maps, filters and gradients lie. Pure arithmetic, so that it is tested without a GPU.
//!
//! In: a backbone as data ([`crate::backbone`]). Out: the places of its parameters, and for each node the memory it reads and writes. Maps are packed `[image, place, channel]`,
//! except those that are put together: each is written where its channels stand in the whole, so that a concatenation costs nothing.
//!
//! A map's gradient is never put together: each reader leaves its part, and whoever needs the gradient adds the parts up. So that memory is used again, a step is walked through here
//! once: forward node after node, then back, and each piece of memory ([`Region`]) is kept from its first use to its last.

use anyhow::{Result, bail, ensure};

use super::parameters::{FILL, Inner, Span, Spans};
use crate::backbone::{Backbone, Layer, Source, Window};
use crate::train::Precision;

/// Most values of a tensor: the libraries' and the kernels' sizes are i32.
const MOST_VALUES: usize = i32::MAX as usize;
/// Multiple of bytes at which each region begins.
const ALIGNMENT: usize = 256;
/// Multiple of values at which each filter and each bias begins.
const VALUES_ALIGNMENT: usize = 64;

/// A piece of memory of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    n_bytes: usize,
    /// First and last moment of its use.
    first: usize,
    last: usize,
    /// Where it begins.
    at: usize,
}

/// A feature map in memory.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    pub(crate) sides: [usize; 2],
    /// Channels, filled up.
    pub(crate) channels: usize,
    /// Where each channel of the network stands among them.
    places: Vec<usize>,
    region: usize,
    /// Its first channel among `pitch` ones of the region.
    first: usize,
    pub(crate) pitch: usize,
}

/// A reader's part of a map's gradient: its first value is at `first` in a region, or where there is none in the gradient of the features; values from one image to the
/// next and from one place to the next; factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Part {
    pub(crate) region: Option<usize>,
    pub(crate) first: usize,
    pub(crate) image: usize,
    pub(crate) place: usize,
    pub(crate) scale: f32,
}

/// A convolution's filter with what it is folded from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filter {
    /// Its number among the convolutions.
    pub(crate) layer: usize,
    pub(crate) window: Window,
    pub(crate) has_relu: bool,
    /// Values of one output channel.
    pub(crate) length: usize,
    /// Where it begins among the folded filters.
    pub(crate) at: usize,
}

/// What a node uses.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) map: Map,
    pub(crate) filter: Option<Filter>,
    /// A convolution's output before its bias, packed.
    pub(crate) raw: usize,
    /// Of a pool of largest values.
    pub(crate) argmax: usize,
    /// The gradient before the ReLU, packed.
    pub(crate) gradient: usize,
    /// The gradient of its input, packed, where that is a map.
    pub(crate) input_gradient: Option<usize>,
    /// Where its bias begins among all biases; a sum's is that of both convolutions before it.
    pub(crate) bias: usize,
    /// Where the sums of its gradient over images and places go, likewise.
    pub(crate) bias_gradient: usize,
    pub(crate) parts: Vec<Part>,
}

/// The backbone in memory.
#[derive(Clone, Debug)]
pub(crate) struct Graph {
    pub(crate) backbone: Backbone,
    pub(crate) is_trained: bool,
    pub(crate) image: Map,
    pub(crate) nodes: Vec<Node>,
    pub(crate) spans: Spans,
    /// Bytes of all regions together.
    pub(crate) n_bytes: usize,
    /// Values of all folded filters.
    pub(crate) n_filters: usize,
    /// Values of all biases.
    pub(crate) n_biases: usize,
    regions: Vec<Region>,
    n_images: usize,
    value_bytes: usize,
}

impl Map {
    pub(crate) fn n_places(&self) -> usize {
        self.sides[0] * self.sides[1]
    }

    fn n_values(&self) -> usize {
        self.n_places() * self.channels
    }
}

impl Graph {
    /// For steps of `n_images` images of `side` rows and columns.
    ///
    /// # Errors
    /// A window that does not fit, a connection that the kernels do not know, more images than sizes allow.
    pub(crate) fn new(
        backbone: Backbone,
        is_trained: bool,
        side: usize,
        n_images: usize,
        precision: Precision,
    ) -> Result<Self> {
        let mut graph = Self {
            image: Map {
                sides: [side; 2],
                channels: FILL,
                places: (0..shared::CHANNELS).collect(),
                region: 0,
                first: 0,
                pitch: FILL,
            },
            is_trained,
            nodes: Vec::new(),
            spans: Spans::default(),
            n_bytes: 0,
            n_filters: 0,
            n_biases: 0,
            regions: Vec::new(),
            n_images,
            value_bytes: precision.bytes(),
            backbone,
        };
        graph.add_nodes()?;
        let maps = graph.nodes.iter().map(|node| node.map.n_values());
        let largest = maps.chain([graph.image.n_values()]).max().unwrap_or(1);
        let most = (MOST_VALUES / largest).min(usize::from(u16::MAX));
        ensure!(
            (1..=most).contains(&n_images),
            "{n_images} images a step are not between 1 and {most} on a GPU at this width"
        );
        graph.add_regions()?;
        graph.walk();
        graph.arrange();
        graph.spans = graph.spans();
        Ok(graph)
    }

    pub(crate) fn map(&self, source: Source) -> &Map {
        match source {
            Source::Image => &self.image,
            Source::Node(index) => &self.nodes[index].map,
        }
    }

    /// The nodes that read a node's map, in their order.
    fn readers(&self, index: usize) -> Vec<usize> {
        let nodes = self.backbone.nodes.iter().enumerate();
        let readers = nodes.filter(|(_, node)| node.inputs.contains(&Source::Node(index)));
        readers.map(|(reader, _)| reader).collect()
    }

    /// Convolutions before the features.
    pub(crate) fn n_convolutions(&self) -> usize {
        self.nodes.iter().filter(|n| n.filter.is_some()).count()
    }

    /// Features, filled up.
    pub(crate) fn n_features(&self) -> usize {
        self.nodes.last().map_or(0, |node| node.map.channels)
    }

    /// Shapes, filters and biases.
    fn add_nodes(&mut self) -> Result<()> {
        let mut layer = 0;
        for node in self.backbone.nodes.clone() {
            let name = &node.name;
            let Some(input) = node.inputs.first().map(|source| self.map(*source).clone()) else {
                bail!("{name} has no input")
            };
            let is_twice = |at: usize| node.inputs[..at].contains(&node.inputs[at]);
            ensure!(
                !(1..node.inputs.len()).any(is_twice),
                "{name} reads one map twice"
            );
            let output = |window: Window| match window.output(input.sides) {
                Some(sides) => Ok(sides),
                None => bail!("{name}: {window:?} does not fit {:?}", input.sides),
            };
            let mut map = Map {
                region: usize::MAX,
                first: 0,
                ..input.clone()
            };
            let mut filter = None;
            match node.layer {
                Layer::Convolution {
                    window, has_relu, ..
                } => {
                    map.sides = output(window)?;
                    map.channels = node.channels.next_multiple_of(FILL);
                    map.places = (0..node.channels).collect();
                    let length = window.kernel[0] * window.kernel[1] * input.channels;
                    filter = Some(Filter {
                        layer,
                        window,
                        has_relu,
                        length,
                        at: self.n_filters,
                    });
                    layer += 1;
                    let n_values = length * map.channels;
                    self.n_filters = (self.n_filters + n_values).next_multiple_of(VALUES_ALIGNMENT);
                }
                Layer::MaxPool(window) | Layer::AveragePool(window) => {
                    // Its places are counted in a byte.
                    ensure!(
                        window.kernel[0] * window.kernel[1] <= 255,
                        "{name}: a window of {:?}",
                        window.kernel
                    );
                    map.sides = output(window)?;
                }
                Layer::GlobalAverage => map.sides = [1, 1],
                Layer::AddRelu => {
                    let same = node.inputs.iter().map(|source| self.map(*source));
                    let mut same = same.map(|map| (map.sides, &map.places));
                    let is_sound =
                        node.inputs.len() == 2 && same.all(|m| m == (map.sides, &map.places));
                    ensure!(is_sound, "{name} does not add two maps of one shape");
                }
                Layer::Concat => {
                    (map.channels, map.places) = (0, Vec::new());
                    for source in &node.inputs {
                        ensure!(
                            *source != Source::Image,
                            "{name} puts the image together with maps"
                        );
                        let part = self.map(*source);
                        ensure!(part.sides == map.sides, "{name}: maps of several sizes");
                        let places = part.places.iter().map(|place| map.channels + place);
                        map.places.extend(places);
                        map.channels += part.channels;
                    }
                }
            }
            map.pitch = map.channels;
            let bias = self.n_biases;
            self.n_biases = (bias + map.channels).next_multiple_of(VALUES_ALIGNMENT);
            self.nodes.push(Node {
                map,
                filter,
                raw: usize::MAX,
                argmax: usize::MAX,
                gradient: usize::MAX,
                input_gradient: None,
                bias,
                bias_gradient: bias,
                parts: Vec::new(),
            });
        }
        Ok(())
    }

    fn region(&mut self, n_bytes: usize) -> usize {
        self.regions.push(Region {
            n_bytes: (self.n_images * n_bytes).next_multiple_of(ALIGNMENT),
            first: usize::MAX,
            last: 0,
            at: 0,
        });
        self.regions.len() - 1
    }

    /// Memory of a packed map.
    fn packed(&mut self, map: &Map) -> usize {
        self.region(map.n_values() * self.value_bytes)
    }

    /// Regions of maps, gradients and the rest, and the parts of each gradient.
    fn add_regions(&mut self) -> Result<()> {
        self.image.region = self.packed(&self.image.clone());
        let nodes = self.backbone.nodes.clone();
        let Some((last, others)) = nodes.split_last() else {
            bail!("a backbone without layers")
        };
        ensure!(
            last.layer == Layer::GlobalAverage
                && others.iter().all(|n| n.layer != Layer::GlobalAverage),
            "the mean of each channel stands at the end, and there alone"
        );
        // From the last to the first, so that a whole is there before the maps that are put together in it, and what reads a map before the map.
        for (index, node) in nodes.iter().enumerate().rev() {
            let readers = self.readers(index);
            let map = self.nodes[index].map.clone();
            let whole = readers
                .iter()
                .find(|reader| nodes[**reader].layer == Layer::Concat);
            let is_last = index + 1 == nodes.len();
            ensure!(
                is_last || !readers.is_empty(),
                "nothing reads {}",
                node.name
            );
            if let Some(whole) = whole.copied() {
                ensure!(
                    readers.len() == 1,
                    "{} is put together with others and read by itself",
                    node.name
                );
                let before = nodes[whole].inputs.iter();
                let before = before.take_while(|source| **source != Source::Node(index));
                let first: usize = before.map(|source| self.map(*source).channels).sum();
                let of_whole = &self.nodes[whole].map;
                let (region, first, pitch) =
                    (of_whole.region, of_whole.first + first, of_whole.pitch);
                let map = &mut self.nodes[index].map;
                (map.region, map.first, map.pitch) = (region, first, pitch);
            } else if !is_last {
                self.nodes[index].map.region = self.packed(&map);
            }
            let of_input = match node.inputs[0] {
                Source::Node(input) if self.is_trained => Some(self.nodes[input].map.clone()),
                _ => None,
            };
            let mut has_input_gradient = false;
            match &node.layer {
                Layer::Convolution { has_relu, .. } => {
                    let is_packed = whole.is_none();
                    let region = self.nodes[index].map.region;
                    self.nodes[index].raw = if is_packed { region } else { self.packed(&map) };
                    has_input_gradient = true;
                    if *has_relu {
                        self.nodes[index].gradient = self.packed(&map);
                    } else {
                        // Its bias is added, and its gradient made, where the sum is.
                        let is_sound =
                            matches!(readers[..], [sum] if nodes[sum].layer == Layer::AddRelu);
                        ensure!(
                            is_sound,
                            "{} has no ReLU and is not only part of a sum",
                            node.name
                        );
                        let sum = &self.nodes[readers[0]];
                        let (gradient, bias_gradient) = (sum.gradient, sum.bias_gradient);
                        self.nodes[index].gradient = gradient;
                        self.nodes[index].bias_gradient = bias_gradient;
                    }
                }
                Layer::MaxPool(_) => {
                    self.nodes[index].argmax = self.region(map.n_values());
                    has_input_gradient = true;
                }
                Layer::AveragePool(_) => has_input_gradient = true,
                Layer::AddRelu => {
                    ensure!(whole.is_none(), "{} is put together with others", node.name);
                    self.nodes[index].gradient = self.packed(&map);
                }
                Layer::GlobalAverage | Layer::Concat => {}
            }
            if let (Some(map), true) = (of_input, has_input_gradient) {
                self.nodes[index].input_gradient = Some(self.packed(&map));
            }
            self.nodes[index].parts = self.parts_of(index, &readers);
        }
        Ok(())
    }

    /// The parts of a map's gradient that its readers leave.
    fn parts_of(&self, index: usize, readers: &[usize]) -> Vec<Part> {
        let map = &self.nodes[index].map;
        let mut parts = Vec::new();
        for reader in readers {
            let of_reader = &self.nodes[*reader];
            let packed = |region: usize| Part {
                region: Some(region),
                first: 0,
                image: map.n_values(),
                place: map.channels,
                scale: 1.0,
            };
            match self.backbone.nodes[*reader].layer {
                Layer::Convolution { .. } | Layer::MaxPool(_) | Layer::AveragePool(_) => {
                    parts.extend(of_reader.input_gradient.map(packed));
                }
                Layer::AddRelu => parts.push(packed(of_reader.gradient)),
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a map has a few thousand places"
                )]
                Layer::GlobalAverage => parts.push(Part {
                    region: None,
                    first: 0,
                    image: map.channels,
                    place: 0,
                    scale: 1.0 / map.n_places() as f32,
                }),
                Layer::Concat => {
                    let whole = of_reader.parts.iter();
                    parts.extend(whole.map(|part| Part {
                        first: part.first + map.first - of_reader.map.first,
                        ..*part
                    }));
                }
            }
        }
        parts
    }

    /// Walks through a step and notes for each region when it is used.
    fn walk(&mut self) {
        let n = self.nodes.len();
        let mut uses = vec![(self.image.region, 0)];
        for (index, (node, of_backbone)) in self.nodes.iter().zip(&self.backbone.nodes).enumerate()
        {
            let inputs = of_backbone.inputs.iter().map(|s| self.map(*s).region);
            let inputs: Vec<usize> = inputs.collect();
            let own = [node.map.region, node.raw, node.argmax];
            uses.extend(inputs.iter().chain(&own).map(|region| (*region, index)));
            if !self.is_trained {
                continue;
            }
            let back = 2 * n - 1 - index;
            let parts = node.parts.iter().filter_map(|part| part.region);
            uses.extend(parts.map(|region| (region, back)));
            uses.extend(node.input_gradient.map(|region| (region, back)));
            uses.extend([(node.gradient, back), (node.argmax, back)]);
            match &of_backbone.layer {
                Layer::Convolution { has_relu, .. } => {
                    uses.push((inputs[0], back));
                    if *has_relu {
                        uses.push((node.map.region, back));
                    }
                }
                Layer::AddRelu => uses.push((node.map.region, back)),
                _ => {}
            }
        }
        for (region, moment) in uses {
            if let Some(region) = self.regions.get_mut(region) {
                region.first = region.first.min(moment);
                region.last = region.last.max(moment);
            }
        }
    }

    /// Gives each region its place, the largest first, each as low as those allow that are used at the same time.
    fn arrange(&mut self) {
        let mut order: Vec<usize> = (0..self.regions.len()).collect();
        order.sort_by_key(|index| std::cmp::Reverse(self.regions[*index].n_bytes));
        let mut placed: Vec<Region> = Vec::new();
        for index in order {
            let mut region = self.regions[index];
            // What nobody uses has no place.
            if region.first > region.last {
                continue;
            }
            let meets = |other: &&Region| other.first <= region.last && region.first <= other.last;
            let mut at = 0;
            for other in placed.iter().filter(meets) {
                if at + region.n_bytes <= other.at {
                    break;
                }
                at = at.max(other.at + other.n_bytes);
            }
            region.at = at;
            self.regions[index] = region;
            self.n_bytes = self.n_bytes.max(at + region.n_bytes);
            let place = placed.partition_point(|other| other.at <= at);
            placed.insert(place, region);
        }
    }

    /// Where a region begins, and its bytes.
    pub(crate) fn range(&self, region: usize) -> (usize, usize) {
        let region = &self.regions[region];
        (region.at, region.n_bytes)
    }

    /// Where a map's first value lies, and the bytes from there on.
    pub(crate) fn range_of(&self, map: &Map) -> (usize, usize) {
        let (at, n_bytes) = self.range(map.region);
        let first = map.first * self.value_bytes;
        (at + first, n_bytes - first)
    }

    /// Values of the largest filter, and channels of the widest map.
    pub(crate) fn widest(&self) -> (usize, usize) {
        let filters = self.nodes.iter().filter_map(|node| {
            let filter = node.filter?;
            Some(filter.length * node.map.channels)
        });
        let channels = self.nodes.iter().map(|node| node.map.channels);
        (filters.max().unwrap_or(0), channels.max().unwrap_or(0))
    }

    /// Places of the parameters, in the files' order: [`crate::transfer`].
    fn spans(&self) -> Spans {
        let mut spans = Vec::new();
        for (node, of_backbone) in self.nodes.iter().zip(&self.backbone.nodes) {
            let Some(Filter { layer, window, .. }) = node.filter else {
                continue;
            };
            let input = self.map(of_backbone.inputs[0]);
            let inner = Inner {
                places: window.kernel[0] * window.kernel[1],
                channels: input.places.clone(),
                width: input.channels,
            };
            let (n, out) = (of_backbone.channels, node.map.channels);
            spans.push(Span::matrix(layer, n, out, inner, self.is_trained));
            for is_learned in [true, true, false, false] {
                spans.push(Span::list(layer, n, out, is_learned && self.is_trained));
            }
        }
        let layer = self.n_convolutions();
        let places = self.nodes.last().map(|n| n.map.places.clone());
        let inner = Inner {
            places: 1,
            channels: places.unwrap_or_default(),
            width: self.n_features(),
        };
        spans.push(Span::matrix(layer, 1, 1, inner, true));
        spans.push(Span::list(layer, 1, 1, true));
        Spans::new(spans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::Family;
    use crate::backbone::backbone;

    fn graph(family: Family, width: f64, is_trained: bool, n: usize) -> Graph {
        let backbone = backbone(family, width).unwrap();
        Graph::new(backbone, is_trained, shared::SIDE, n, Precision::Bf16).unwrap()
    }

    #[test]
    fn regions_that_are_used_together_do_not_overlap() {
        for (family, is_trained) in [
            (Family::Resnet50, true),
            (Family::Resnet50, false),
            (Family::InceptionV3, true),
            (Family::InceptionV3, false),
        ] {
            let graph = graph(family, 0.03, is_trained, 3);
            let used = graph.regions.iter().filter(|r| r.first <= r.last);
            let used: Vec<&Region> = used.collect();
            for (index, a) in used.iter().enumerate() {
                assert!(a.at + a.n_bytes <= graph.n_bytes);
                for b in &used[index + 1..] {
                    let is_together = a.first <= b.last && b.first <= a.last;
                    let is_apart = a.at + a.n_bytes <= b.at || b.at + b.n_bytes <= a.at;
                    assert!(!is_together || is_apart, "{a:?} {b:?}");
                }
            }
        }
    }

    #[test]
    fn every_gradient_has_the_parts_of_all_readers() {
        let graph = graph(Family::InceptionV3, 1.0, true, 1);
        let node = |name: &str| {
            let nodes = graph.backbone.nodes.iter();
            let found = nodes.zip(&graph.nodes).find(|(node, _)| node.name == name);
            found.unwrap().1
        };
        // The second branch of a cell stands behind the first one's 64 channels in a map of 256, which four branches of the next cell read.
        let branch = node("Mixed_5b.branch5x5_2");
        assert_eq!((branch.map.first, branch.map.pitch), (64, 256));
        assert_eq!(branch.parts.len(), 4);
        for part in &branch.parts {
            assert_eq!((part.first, part.place), (64, 256));
        }
        let last = node("Mixed_7c.branch_pool");
        let [part] = last.parts[..] else {
            panic!("{:?}", last.parts)
        };
        assert_eq!((part.region, part.first, part.place), (None, 1856, 0));
        assert_eq!((part.image, part.scale), (2048, 1.0 / 36.0));
    }

    #[test]
    fn memory_of_a_step_is_what_the_documentation_says() {
        let megabytes = |family, is_trained| graph(family, 1.0, is_trained, 50).n_bytes / 1_000_000;
        let found = [
            megabytes(Family::Resnet50, true),
            megabytes(Family::Resnet50, false),
            megabytes(Family::InceptionV3, false),
        ];
        assert_eq!(found, [1369, 314, 154]);
    }

    #[test]
    fn what_the_kernels_do_not_know_is_refused() {
        let refused = |change: &dyn Fn(&mut Backbone), words: &str| {
            let mut backbone = backbone(Family::InceptionV3, 0.03).unwrap();
            change(&mut backbone);
            let error = Graph::new(backbone, true, 79, 1, Precision::F32).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        };
        refused(&|b| drop(b.nodes.pop()), "stands at the end");
        // A branch that is put together with others and read by itself.
        let read_twice = |b: &mut Backbone| {
            let branch = b.nodes.iter().position(|n| n.name == "Mixed_5b.branch1x1");
            let reader = b
                .nodes
                .iter_mut()
                .find(|n| n.name == "Mixed_5b.branch5x5_1");
            reader.unwrap().inputs = vec![Source::Node(branch.unwrap())];
        };
        refused(&read_twice, "read by itself");
        let backbone = backbone(Family::Resnet50, 1.0).unwrap();
        let error = Graph::new(backbone, true, 256, 70_000, Precision::F32).unwrap_err();
        assert!(error.to_string().contains("images a step"), "{error}");
    }
}
