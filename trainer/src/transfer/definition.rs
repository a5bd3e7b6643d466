//! What a transfer learner computes in a step, written as plainly as possible in f64: loss, logits and the gradient of every parameter. The CPU's operators and the GPU's are
//! tested against it; it is tested by finite differences.
//!
//! `stored` is what becomes of a value that is written to memory: itself, except where a GPU stores it in bf16.

use std::collections::BTreeMap;

use super::NORM_FIELDS;
use crate::backbone::{Backbone, Layer, Node, Source, Window};
use crate::operators::definition::{Map, convolution, convolution_gradient, pool, pool_gradient};

/// Parameters, or their gradients, by name.
pub(crate) type Values = BTreeMap<String, Vec<f64>>;

/// A transfer learner whose parameters are all trained.
#[derive(Debug)]
pub(crate) struct Definition<'a> {
    pub(crate) backbone: &'a Backbone,
    pub(crate) weights: &'a Values,
    pub(crate) side: usize,
    pub(crate) stored: fn(f64) -> f64,
}

/// What a step comes to.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) loss: f64,
    pub(crate) logits: Vec<f64>,
    pub(crate) gradients: Values,
}

/// Gradients of a folded filter and its bias.
type Sums = (Vec<f64>, Vec<f64>);

/// A convolution with its normalisation: filter, bias, and what they were made of.
struct Folded {
    filter: Vec<f64>,
    bias: Vec<f64>,
    factors: Vec<f64>,
    deviations: Vec<f64>,
}

impl Definition<'_> {
    /// For images with label and weight, and their mean taken over `n_total`.
    pub(crate) fn step<'i>(
        &self,
        images: impl Iterator<Item = (&'i [u8], [f32; 2])>,
        n_total: usize,
    ) -> Step {
        let folded: Vec<Option<Folded>> =
            self.backbone.nodes.iter().map(|n| self.fold(n)).collect();
        let mut step = Step {
            loss: 0.0,
            logits: Vec::new(),
            gradients: self
                .weights
                .iter()
                .map(|(name, w)| (name.clone(), vec![0.0; w.len()]))
                .collect(),
        };
        let mut sums: Vec<Sums> = folded
            .iter()
            .map(|folded| {
                let n = |values: fn(&Folded) -> usize| vec![0.0; folded.as_ref().map_or(0, values)];
                (
                    n(|folded| folded.filter.len()),
                    n(|folded| folded.bias.len()),
                )
            })
            .collect();
        for (image, [label, weight]) in images {
            let image = self.normalised(image);
            let maps = self.maps(&image, &folded);
            let logit = self.logit_of(&maps);
            let (label, share) = (f64::from(label), f64::from(weight) / n_total as f64);
            step.logits.push(logit);
            step.loss += share * (logit.max(0.0) - logit * label + (-logit.abs()).exp().ln_1p());
            let g = share * (1.0 / (1.0 + (-logit).exp()) - label);
            self.backward(g, &image, &maps, &folded, (&mut sums, &mut step.gradients));
        }
        for ((node, folded), (filter, bias)) in self.backbone.nodes.iter().zip(&folded).zip(&sums) {
            if let Some(folded) = folded {
                self.unfold(node, folded, filter, bias, &mut step.gradients);
            }
        }
        step
    }

    fn normalised(&self, image: &[u8]) -> Map {
        let area = self.side * self.side;
        let Backbone {
            mean, deviation, ..
        } = self.backbone;
        let values = image.iter().enumerate().map(|(at, value)| {
            let (mean, deviation) = (mean[at / area], deviation[at / area]);
            (self.stored)((f64::from(*value) / 255.0 - f64::from(mean)) / f64::from(deviation))
        });
        Map {
            channels: 3,
            rows: self.side,
            columns: self.side,
            values: values.collect(),
        }
    }

    fn fold(&self, node: &Node) -> Option<Folded> {
        let Layer::Convolution {
            kernel_name,
            norm_name,
            ..
        } = &node.layer
        else {
            return None;
        };
        let kernel = &self.weights[&format!("{kernel_name}.weight")];
        let [gamma, beta, mean, variance] =
            NORM_FIELDS.map(|field| &self.weights[&format!("{norm_name}.{field}")]);
        let epsilon = f64::from(self.backbone.epsilon);
        let deviations: Vec<f64> = variance.iter().map(|v| (v + epsilon).sqrt()).collect();
        let factors: Vec<f64> = gamma.iter().zip(&deviations).map(|(g, d)| g / d).collect();
        let length = kernel.len() / gamma.len();
        let filter = kernel
            .iter()
            .enumerate()
            .map(|(at, w)| (self.stored)(w * factors[at / length]));
        let bias = (0..gamma.len()).map(|at| beta[at] - mean[at] * factors[at]);
        Some(Folded {
            filter: filter.collect(),
            bias: bias.collect(),
            factors,
            deviations,
        })
    }

    /// Gradients of kernel, gamma and beta.
    fn unfold(
        &self,
        node: &Node,
        folded: &Folded,
        filter: &[f64],
        bias: &[f64],
        gradients: &mut Values,
    ) {
        let Layer::Convolution {
            kernel_name,
            norm_name,
            ..
        } = &node.layer
        else {
            return;
        };
        let (kernel_name, mean_name) = (
            format!("{kernel_name}.weight"),
            format!("{norm_name}.running_mean"),
        );
        let (kernel, mean) = (&self.weights[&kernel_name], &self.weights[&mean_name]);
        let length = kernel.len() / bias.len();
        // A filter's gradient is summed over the images before it is stored.
        let filter: Vec<f64> = filter.iter().map(|g| (self.stored)(*g)).collect();
        let of_kernel = filter
            .iter()
            .enumerate()
            .map(|(at, g)| g * folded.factors[at / length]);
        gradients.insert(kernel_name, of_kernel.collect());
        let of_gamma = (0..bias.len()).map(|at| {
            let pairs = filter[at * length..][..length]
                .iter()
                .zip(&kernel[at * length..]);
            let sum: f64 = pairs.map(|(g, w)| g * w).sum();
            (sum - mean[at] * bias[at]) / folded.deviations[at]
        });
        gradients.insert(format!("{norm_name}.weight"), of_gamma.collect());
        gradients.insert(format!("{norm_name}.bias"), bias.to_vec());
    }

    fn map<'m>(&self, source: Source, image: &'m Map, maps: &'m [Map]) -> &'m Map {
        match source {
            Source::Image => image,
            Source::Node(index) => &maps[index],
        }
    }

    /// The output of every node.
    fn maps(&self, image: &Map, folded: &[Option<Folded>]) -> Vec<Map> {
        let mut maps: Vec<Map> = Vec::new();
        for (node, folded) in self.backbone.nodes.iter().zip(folded) {
            let inputs = node
                .inputs
                .iter()
                .map(|source| self.map(*source, image, &maps));
            let inputs: Vec<&Map> = inputs.collect();
            let mut map = match (&node.layer, folded) {
                (
                    Layer::Convolution {
                        window, has_relu, ..
                    },
                    Some(folded),
                ) => {
                    let mut map = convolution(inputs[0], &folded.filter, node.channels, *window);
                    let area = map.rows * map.columns;
                    for (at, value) in map.values.iter_mut().enumerate() {
                        *value = (self.stored)(*value) + folded.bias[at / area];
                    }
                    if !has_relu {
                        // Its sum with another map is what is stored.
                        maps.push(map);
                        continue;
                    }
                    map
                }
                (Layer::MaxPool(window), _) => pool(inputs[0], *window, false),
                (Layer::AveragePool(window), _) => pool(inputs[0], *window, true),
                (Layer::GlobalAverage, _) => {
                    maps.push(pool(inputs[0], whole(inputs[0]), true));
                    continue;
                }
                (Layer::AddRelu, _) => Map {
                    values: inputs[0]
                        .values
                        .iter()
                        .zip(&inputs[1].values)
                        .map(|(a, b)| a + b)
                        .collect(),
                    ..inputs[0].clone()
                },
                _ => Map {
                    channels: inputs.iter().map(|map| map.channels).sum(),
                    values: inputs.iter().flat_map(|map| map.values.clone()).collect(),
                    ..inputs[0].clone()
                },
            };
            let has_relu = matches!(node.layer, Layer::Convolution { .. } | Layer::AddRelu);
            for value in &mut map.values {
                *value = (self.stored)(if has_relu { value.max(0.0) } else { *value });
            }
            maps.push(map);
        }
        maps
    }

    fn logit_of(&self, maps: &[Map]) -> f64 {
        let pairs = maps[maps.len() - 1]
            .values
            .iter()
            .zip(&self.weights["fc.weight"]);
        pairs.map(|(a, b)| a * b).sum::<f64>() + self.weights["fc.bias"][0]
    }

    /// From the logit's gradient to those of filters and biases, which are added to `sums`, and of the last layer.
    fn backward(
        &self,
        g: f64,
        image: &Map,
        maps: &[Map],
        folded: &[Option<Folded>],
        (sums, gradients): (&mut [Sums], &mut Values),
    ) {
        let features = &maps[maps.len() - 1].values;
        let last = &self.weights["fc.weight"];
        add(gradients.entry("fc.bias".into()).or_default(), [g]);
        let products = features.iter().map(|f| g * f);
        add(gradients.entry("fc.weight".into()).or_default(), products);
        let mut of_maps: Vec<Vec<f64>> = maps.iter().map(|m| vec![0.0; m.values.len()]).collect();
        of_maps[maps.len() - 1] = last.iter().map(|w| (self.stored)(g * w)).collect();
        for (index, node) in self.backbone.nodes.iter().enumerate().rev() {
            let mut gradient = Map {
                values: std::mem::take(&mut of_maps[index]),
                ..maps[index].clone()
            };
            let input = self.map(node.inputs[0], image, maps);
            let mut give = |source: Source, values: Vec<f64>| {
                if let Source::Node(index) = source {
                    add(&mut of_maps[index], values);
                }
            };
            let stored_all = |values: Vec<f64>| values.into_iter().map(self.stored).collect();
            match (&node.layer, &folded[index]) {
                (
                    Layer::Convolution {
                        window, has_relu, ..
                    },
                    Some(folded),
                ) => {
                    if *has_relu {
                        self.close(&mut gradient.values, &maps[index].values);
                    }
                    let (of_input, of_filter) =
                        convolution_gradient(input, &folded.filter, *window, &gradient);
                    let (filter, bias) = &mut sums[index];
                    add(filter, of_filter);
                    let area = gradient.rows * gradient.columns;
                    add(
                        bias,
                        gradient.values.chunks(area).map(|plane| plane.iter().sum()),
                    );
                    give(node.inputs[0], stored_all(of_input));
                }
                (Layer::MaxPool(window), _) => {
                    give(
                        node.inputs[0],
                        stored_all(pool_gradient(input, *window, false, &gradient)),
                    );
                }
                (Layer::AveragePool(window), _) => {
                    give(
                        node.inputs[0],
                        stored_all(pool_gradient(input, *window, true, &gradient)),
                    );
                }
                (Layer::GlobalAverage, _) => {
                    give(
                        node.inputs[0],
                        pool_gradient(input, whole(input), true, &gradient),
                    );
                }
                (Layer::AddRelu, _) => {
                    self.close(&mut gradient.values, &maps[index].values);
                    for source in &node.inputs {
                        give(*source, gradient.values.clone());
                    }
                }
                _ => {
                    let mut begin = 0;
                    for source in &node.inputs {
                        let n = self.map(*source, image, maps).values.len();
                        give(*source, gradient.values[begin..begin + n].to_vec());
                        begin += n;
                    }
                }
            }
        }
    }

    /// What a ReLU that gave `output` lets through.
    fn close(&self, gradient: &mut [f64], output: &[f64]) {
        for (gradient, output) in gradient.iter_mut().zip(output) {
            *gradient = if *output > 0.0 {
                (self.stored)(*gradient)
            } else {
                0.0
            };
        }
    }
}

fn add(to: &mut [f64], values: impl IntoIterator<Item = f64>) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += value;
    }
}

fn whole(map: &Map) -> Window {
    Window {
        kernel: [map.rows, map.columns],
        stride: 1,
        padding: [0, 0],
    }
}
