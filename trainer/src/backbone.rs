//! The transfer learners' layers as data: ResNet-50 and Inception-v3, as torchvision builds them.
//!
//! In: a family and a width factor. Out: a list of nodes in the order the data meets them, each with the names that
//! torchvision gives its weights, its inputs and the shape of its output. Whoever runs, loads or writes such a network walks
//! over this list: [`crate::transfer`], [`crate::export`]. Sources: He et al. 2016, table 1 (stride on the 3x3 convolution, as
//! torchvision), Szegedy et al. 2016 (torchvision's `inception_v3` without its auxiliary classifier).
//!
//! Every convolution is followed by a batch normalisation, whose means and variances are constants here: see
//! [`crate::transfer`].

use crate::architecture::{Family, scaled_units};

/// What a node computes from its inputs, all `[image, channel, row, column]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Convolution without bias, batch normalisation, ReLU where asked for.
    Convolution {
        /// Name of the kernel without `.weight`, `[out, in, rows, columns]`.
        kernel_name: String,
        /// Name of the normalisation without `.weight`, `.bias`, `.running_mean`, `.running_var`.
        norm_name: String,
        /// Rows, columns, stride and padding.
        window: Window,
        /// Whether negative outputs become 0.
        has_relu: bool,
    },
    /// Largest value of each window; padding never is the largest.
    MaxPool(Window),
    /// Mean of each window, the padding counted as zeros.
    AveragePool(Window),
    /// Mean of each channel.
    GlobalAverage,
    /// Sum of two inputs, negative values become 0.
    AddRelu,
    /// The inputs' channels behind each other.
    Concat,
}

/// A window that moves over rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Rows and columns.
    pub kernel: [usize; 2],
    /// Step in both directions.
    pub stride: usize,
    /// Rows added above and below, columns added left and right.
    pub padding: [usize; 2],
}

impl Window {
    /// Rows and columns of what comes out; `None` where the window does not fit.
    #[must_use]
    pub fn output(&self, sides: [usize; 2]) -> Option<[usize; 2]> {
        let along = |axis: usize| {
            let padded = sides[axis] + 2 * self.padding[axis];
            Some(padded.checked_sub(self.kernel[axis])? / self.stride.max(1) + 1)
        };
        Some([along(0)?, along(1)?])
    }
}

/// Where a node's input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The normalised image.
    Image,
    /// The output of the node with that number.
    Node(usize),
}

/// One layer of a backbone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name in model files.
    pub name: String,
    /// What it computes.
    pub layer: Layer,
    /// From what.
    pub inputs: Vec<Source>,
    /// Channels of its output.
    pub channels: usize,
}

/// A network up to the features that its last, dense layer `fc` reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Backbone {
    /// The layers; the last one's output are the features.
    pub nodes: Vec<Node>,
    /// What is subtracted from each channel of the image in [0, 1] ...
    pub mean: [f32; 3],
    /// ... and what it is divided by then.
    pub deviation: [f32; 3],
    /// Added to the variances of the batch normalisations.
    pub epsilon: f32,
    /// Name of the file that torchvision publishes its weights in, without ending.
    pub weights_name: &'static str,
}

/// Means and deviations of `ImageNet`'s channels, with which torchvision trained its `ResNet`.
const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// Units, blocks and first stride of `ResNet`-50's stages.
const RESNET50_STAGES: [(usize, usize, usize); 4] =
    [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)];
/// A stage's output channels for each of its units.
const RESNET_EXPANSION: usize = 4;

/// The backbone of a family at a width factor; `None` for families without.
#[must_use]
pub fn backbone(family: Family, width: f64) -> Option<Backbone> {
    match family {
        Family::Resnet50 => Some(resnet50(width)),
        Family::InceptionV3 => Some(inception_v3(width)),
        Family::Majority | Family::Convolutional => None,
    }
}

impl Backbone {
    /// Channels of a node's input.
    #[must_use]
    pub fn channels_of(&self, source: Source) -> usize {
        match source {
            Source::Image => shared::CHANNELS,
            Source::Node(index) => self.nodes[index].channels,
        }
    }

    /// How many features `fc` reads.
    #[must_use]
    pub fn n_features(&self) -> usize {
        self.nodes.last().map_or(0, |node| node.channels)
    }
}

/// A backbone in the making.
struct Draft {
    width: f64,
    nodes: Vec<Node>,
}

impl Draft {
    fn push(&mut self, name: &str, layer: Layer, inputs: Vec<Source>, channels: usize) -> Source {
        self.nodes.push(Node {
            name: name.to_owned(),
            layer,
            inputs,
            channels,
        });
        Source::Node(self.nodes.len() - 1)
    }

    fn channels(&self, source: Source) -> usize {
        match source {
            Source::Image => shared::CHANNELS,
            Source::Node(index) => self.nodes[index].channels,
        }
    }

    /// A layer that leaves the channels as they are.
    fn pool(&mut self, name: &str, layer: Layer, input: Source) -> Source {
        let channels = self.channels(input);
        self.push(name, layer, vec![input], channels)
    }

    fn concat(&mut self, name: &str, inputs: Vec<Source>) -> Source {
        let channels = inputs.iter().map(|&input| self.channels(input)).sum();
        self.push(name, Layer::Concat, inputs, channels)
    }

    fn finish(
        mut self,
        last: Source,
        (mean, deviation): ([f32; 3], [f32; 3]),
        epsilon: f32,
        weights_name: &'static str,
    ) -> Backbone {
        self.pool("avgpool", Layer::GlobalAverage, last);
        Backbone {
            nodes: self.nodes,
            mean,
            deviation,
            epsilon,
            weights_name,
        }
    }
}

const fn square(kernel: usize, stride: usize, padding: usize) -> Window {
    Window {
        kernel: [kernel, kernel],
        stride,
        padding: [padding, padding],
    }
}

fn resnet50(width: f64) -> Backbone {
    let mut draft = Draft {
        width,
        nodes: Vec::new(),
    };
    let convolution =
        |kernel_name: String, norm_name: String, window, has_relu| Layer::Convolution {
            kernel_name,
            norm_name,
            window,
            has_relu,
        };
    let units = |n| scaled_units(n, width);
    let stem = convolution("conv1".into(), "bn1".into(), square(7, 2, 3), true);
    let stem = draft.push("conv1", stem, vec![Source::Image], units(64));
    let mut last = draft.pool("maxpool", Layer::MaxPool(square(3, 2, 1)), stem);
    for (stage, (n_units, n_blocks, first_stride)) in (1..).zip(RESNET50_STAGES) {
        for block in 0..n_blocks {
            let at = format!("layer{stage}.{block}");
            let (stride, n_wide) = (
                if block == 0 { first_stride } else { 1 },
                units(n_units * RESNET_EXPANSION),
            );
            let step = |draft: &mut Draft, number, input, window, n, has_relu| {
                let name = format!("{at}.conv{number}");
                let layer = convolution(name.clone(), format!("{at}.bn{number}"), window, has_relu);
                draft.push(&name, layer, vec![input], n)
            };
            let narrow = step(&mut draft, 1, last, square(1, 1, 0), units(n_units), true);
            let middle = step(
                &mut draft,
                2,
                narrow,
                square(3, stride, 1),
                units(n_units),
                true,
            );
            let wide = step(&mut draft, 3, middle, square(1, 1, 0), n_wide, false);
            if block == 0 {
                let (kernel, norm) = (format!("{at}.downsample.0"), format!("{at}.downsample.1"));
                let layer = convolution(kernel.clone(), norm, square(1, stride, 0), false);
                last = draft.push(&kernel, layer, vec![last], n_wide);
            }
            last = draft.push(
                &format!("{at}.add"),
                Layer::AddRelu,
                vec![wide, last],
                n_wide,
            );
        }
    }
    draft.finish(last, (IMAGENET_MEAN, IMAGENET_DEVIATION), 1e-5, "resnet50")
}

/// One step of a cell: where from, what, how many channels. `IN` is the cell's input.
#[derive(Clone, Copy)]
struct Step {
    name: &'static str,
    from: &'static str,
    kind: Kind,
    units: usize,
}

#[derive(Clone, Copy)]
enum Kind {
    Convolution(Window),
    Max(Window),
    Average(Window),
}

const IN: &str = "";
/// In place of a number of channels: the cell's own number.
const OWN: usize = 0;

/// A convolution that keeps rows and columns.
const fn same(name: &'static str, from: &'static str, units: usize, kernel: [usize; 2]) -> Step {
    let padding = [kernel[0] / 2, kernel[1] / 2];
    let window = Window {
        kernel,
        stride: 1,
        padding,
    };
    Step {
        name,
        from,
        kind: Kind::Convolution(window),
        units,
    }
}

/// A 3x3 convolution without padding.
const fn valid(name: &'static str, from: &'static str, units: usize, stride: usize) -> Step {
    Step {
        name,
        from,
        kind: Kind::Convolution(square(3, stride, 0)),
        units,
    }
}

const fn largest(name: &'static str, from: &'static str) -> Step {
    Step {
        name,
        from,
        kind: Kind::Max(square(3, 2, 0)),
        units: OWN,
    }
}

const fn mean(name: &'static str) -> Step {
    Step {
        name,
        from: IN,
        kind: Kind::Average(square(3, 1, 1)),
        units: OWN,
    }
}

/// A cell: its steps, and those whose outputs are put together; none: the last step's output.
struct Cell {
    steps: &'static [Step],
    outputs: &'static [&'static str],
}

const STEM: Cell = Cell {
    steps: &[
        valid("Conv2d_1a_3x3", IN, 32, 2),
        valid("Conv2d_2a_3x3", "Conv2d_1a_3x3", 32, 1),
        same("Conv2d_2b_3x3", "Conv2d_2a_3x3", 64, [3, 3]),
        largest("maxpool1", "Conv2d_2b_3x3"),
        same("Conv2d_3b_1x1", "maxpool1", 80, [1, 1]),
        valid("Conv2d_4a_3x3", "Conv2d_3b_1x1", 192, 1),
        largest("maxpool2", "Conv2d_4a_3x3"),
    ],
    outputs: &[],
};

const CELL_A: Cell = Cell {
    steps: &[
        same("branch1x1", IN, 64, [1, 1]),
        same("branch5x5_1", IN, 48, [1, 1]),
        same("branch5x5_2", "branch5x5_1", 64, [5, 5]),
        same("branch3x3dbl_1", IN, 64, [1, 1]),
        same("branch3x3dbl_2", "branch3x3dbl_1", 96, [3, 3]),
        same("branch3x3dbl_3", "branch3x3dbl_2", 96, [3, 3]),
        mean("pool"),
        same("branch_pool", "pool", OWN, [1, 1]),
    ],
    outputs: &["branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"],
};

const CELL_B: Cell = Cell {
    steps: &[
        valid("branch3x3", IN, 384, 2),
        same("branch3x3dbl_1", IN, 64, [1, 1]),
        same("branch3x3dbl_2", "branch3x3dbl_1", 96, [3, 3]),
        valid("branch3x3dbl_3", "branch3x3dbl_2", 96, 2),
        largest("pool", IN),
    ],
    outputs: &["branch3x3", "branch3x3dbl_3", "pool"],
};

const CELL_C: Cell = Cell {
    steps: &[
        same("branch1x1", IN, 192, [1, 1]),
        same("branch7x7_1", IN, OWN, [1, 1]),
        same("branch7x7_2", "branch7x7_1", OWN, [1, 7]),
        same("branch7x7_3", "branch7x7_2", 192, [7, 1]),
        same("branch7x7dbl_1", IN, OWN, [1, 1]),
        same("branch7x7dbl_2", "branch7x7dbl_1", OWN, [7, 1]),
        same("branch7x7dbl_3", "branch7x7dbl_2", OWN, [1, 7]),
        same("branch7x7dbl_4", "branch7x7dbl_3", OWN, [7, 1]),
        same("branch7x7dbl_5", "branch7x7dbl_4", 192, [1, 7]),
        mean("pool"),
        same("branch_pool", "pool", 192, [1, 1]),
    ],
    outputs: &["branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"],
};

const CELL_D: Cell = Cell {
    steps: &[
        same("branch3x3_1", IN, 192, [1, 1]),
        valid("branch3x3_2", "branch3x3_1", 320, 2),
        same("branch7x7x3_1", IN, 192, [1, 1]),
        same("branch7x7x3_2", "branch7x7x3_1", 192, [1, 7]),
        same("branch7x7x3_3", "branch7x7x3_2", 192, [7, 1]),
        valid("branch7x7x3_4", "branch7x7x3_3", 192, 2),
        largest("pool", IN),
    ],
    outputs: &["branch3x3_2", "branch7x7x3_4", "pool"],
};

const CELL_E: Cell = Cell {
    steps: &[
        same("branch1x1", IN, 320, [1, 1]),
        same("branch3x3_1", IN, 384, [1, 1]),
        same("branch3x3_2a", "branch3x3_1", 384, [1, 3]),
        same("branch3x3_2b", "branch3x3_1", 384, [3, 1]),
        same("branch3x3dbl_1", IN, 448, [1, 1]),
        same("branch3x3dbl_2", "branch3x3dbl_1", 384, [3, 3]),
        same("branch3x3dbl_3a", "branch3x3dbl_2", 384, [1, 3]),
        same("branch3x3dbl_3b", "branch3x3dbl_2", 384, [3, 1]),
        mean("pool"),
        same("branch_pool", "pool", 192, [1, 1]),
    ],
    outputs: &[
        "branch1x1",
        "branch3x3_2a",
        "branch3x3_2b",
        "branch3x3dbl_3a",
        "branch3x3dbl_3b",
        "branch_pool",
    ],
};

/// The cells behind the stem, each with its own number of channels.
const INCEPTION_V3: [(&str, &Cell, usize); 11] = [
    ("Mixed_5b", &CELL_A, 32),
    ("Mixed_5c", &CELL_A, 64),
    ("Mixed_5d", &CELL_A, 64),
    ("Mixed_6a", &CELL_B, OWN),
    ("Mixed_6b", &CELL_C, 128),
    ("Mixed_6c", &CELL_C, 160),
    ("Mixed_6d", &CELL_C, 160),
    ("Mixed_6e", &CELL_C, 192),
    ("Mixed_7a", &CELL_D, OWN),
    ("Mixed_7b", &CELL_E, OWN),
    ("Mixed_7c", &CELL_E, OWN),
];

impl Draft {
    /// Adds a cell; its steps' names begin with `prefix`.
    fn cell(&mut self, prefix: &str, cell: &Cell, own: usize, input: Source) -> Source {
        let mut known = vec![(IN, input)];
        let find = |known: &[(&str, Source)], name: &str| {
            let found = known.iter().find(|(step, _)| *step == name);
            found.map_or(input, |&(_, source)| source)
        };
        for step in cell.steps {
            let from = find(&known, step.from);
            let name = format!("{prefix}{}", step.name);
            let source = match step.kind {
                Kind::Convolution(window) => {
                    let units = if step.units == OWN { own } else { step.units };
                    let layer = Layer::Convolution {
                        kernel_name: format!("{name}.conv"),
                        norm_name: format!("{name}.bn"),
                        window,
                        has_relu: true,
                    };
                    let units = scaled_units(units, self.width);
                    self.push(&name, layer, vec![from], units)
                }
                Kind::Max(window) => self.pool(&name, Layer::MaxPool(window), from),
                Kind::Average(window) => self.pool(&name, Layer::AveragePool(window), from),
            };
            known.push((step.name, source));
        }
        if cell.outputs.is_empty() {
            return known.last().map_or(input, |&(_, source)| source);
        }
        let outputs = cell.outputs.iter().map(|name| find(&known, name)).collect();
        self.concat(prefix.trim_end_matches('.'), outputs)
    }
}

/// torchvision feeds the network it publishes with (x - 0.5) / 0.5, whatever its input's own normalisation (`transform_input`).
fn inception_v3(width: f64) -> Backbone {
    let mut draft = Draft {
        width,
        nodes: Vec::new(),
    };
    let mut last = draft.cell("", &STEM, OWN, Source::Image);
    for (name, cell, own) in INCEPTION_V3 {
        last = draft.cell(&format!("{name}."), cell, own, last);
    }
    draft.finish(last, ([0.5; 3], [0.5; 3]), 1e-3, "inception_v3")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Weights with those of a last layer for 1000 classes.
    fn n_parameters(backbone: &Backbone) -> usize {
        let of_node = |node: &Node| match &node.layer {
            Layer::Convolution { window, .. } => {
                let n_inputs = backbone.channels_of(node.inputs[0]);
                node.channels * (n_inputs * window.kernel[0] * window.kernel[1] + 2)
            }
            _ => 0,
        };
        let backbone_only: usize = backbone.nodes.iter().map(of_node).sum();
        backbone_only + (backbone.n_features() + 1) * 1000
    }

    #[test]
    fn parameters_are_as_many_as_torchvision_counts() {
        let resnet = backbone(Family::Resnet50, 1.0).unwrap();
        assert_eq!(
            (n_parameters(&resnet), resnet.n_features()),
            (25_557_032, 2048)
        );
        let inception = backbone(Family::InceptionV3, 1.0).unwrap();
        assert_eq!(
            (n_parameters(&inception), inception.n_features()),
            (23_834_568, 2048)
        );
    }

    #[test]
    fn every_name_is_there_once_and_every_window_fits() {
        for family in [Family::Resnet50, Family::InceptionV3] {
            let backbone = backbone(family, 1.0 / 16.0).unwrap();
            let names: std::collections::BTreeSet<&str> = backbone
                .nodes
                .iter()
                .map(|node| node.name.as_str())
                .collect();
            assert_eq!(names.len(), backbone.nodes.len());
            let mut sides: Vec<[usize; 2]> = Vec::new();
            for node in &backbone.nodes {
                let of_input = |source: &Source| match *source {
                    Source::Image => [shared::SIDE; 2],
                    Source::Node(index) => sides[index],
                };
                let inputs: Vec<[usize; 2]> = node.inputs.iter().map(of_input).collect();
                assert!(
                    inputs.iter().all(|side| *side == inputs[0]),
                    "{}",
                    node.name
                );
                sides.push(match &node.layer {
                    Layer::Convolution { window, .. }
                    | Layer::MaxPool(window)
                    | Layer::AveragePool(window) => window.output(inputs[0]).unwrap(),
                    Layer::GlobalAverage => [1, 1],
                    Layer::AddRelu | Layer::Concat => inputs[0],
                });
            }
            // What the last cells see: a 32nd of the image, rounded as each family rounds.
            let expected = if family == Family::Resnet50 {
                [8, 8]
            } else {
                [6, 6]
            };
            assert_eq!(sides[sides.len() - 2], expected);
        }
        assert!(backbone(Family::Convolutional, 1.0).is_none());
    }
}
