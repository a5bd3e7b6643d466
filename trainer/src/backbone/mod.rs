//! The transfer learners' layers as data: ResNet-50 and Inception-v3, as torchvision builds them.
//!
//! In: a family and a width factor. Out: a list of nodes in the order the data meets them, each with the names that
//! torchvision gives its weights, its inputs and the shape of its output. Whoever runs, loads or writes such a network walks
//! over this list: [`crate::transfer`], [`crate::export`]. Sources: He et al. 2016, table 1 (stride on the 3x3 convolution, as
//! torchvision), Szegedy et al. 2016 (torchvision's `inception_v3` without its auxiliary classifier).
//!
//! Every convolution is followed by a batch normalisation, whose means and variances are constants here: see
//! [`crate::transfer`].

mod inception;
mod resnet;

use self::inception::inception_v3;
use self::resnet::resnet50;
use crate::architecture::Family;

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
