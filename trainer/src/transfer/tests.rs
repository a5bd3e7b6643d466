use std::collections::BTreeMap;

use candle_core::Device;

use super::*;
use crate::architecture::{Architecture, find};
use crate::network::Network;
use crate::random::Random;

/// A feature map in f64.
#[derive(Clone)]
struct Map {
    channels: usize,
    sides: [usize; 2],
    values: Vec<f64>,
}

impl Map {
    /// The value at a place that padding may have moved outside.
    fn at(&self, channel: usize, row: usize, column: usize, padding: [usize; 2]) -> Option<f64> {
        let (row, column) = (
            row.checked_sub(padding[0])?,
            column.checked_sub(padding[1])?,
        );
        let is_inside = row < self.sides[0] && column < self.sides[1];
        is_inside.then(|| self.values[(channel * self.sides[0] + row) * self.sides[1] + column])
    }

    fn of(channels: usize, sides: [usize; 2], f: impl Fn(usize, usize, usize) -> f64) -> Self {
        let mut values = Vec::new();
        for channel in 0..channels {
            for row in 0..sides[0] {
                values.extend((0..sides[1]).map(|column| f(channel, row, column)));
            }
        }
        Self {
            channels,
            sides,
            values,
        }
    }
}

type Values = BTreeMap<String, Vec<f64>>;

/// Convolution, normalisation and ReLU as plainly as possible.
fn convolution(backbone: &Backbone, node: &Node, input: &Map, weights: &Values) -> Map {
    let Layer::Convolution {
        kernel_name,
        norm_name,
        window,
        has_relu,
    } = &node.layer
    else {
        unreachable!("called for convolutions")
    };
    let kernel = &weights[&format!("{kernel_name}.weight")];
    let norm = |field: &str, channel: usize| weights[&format!("{norm_name}.{field}")][channel];
    let [rows, columns] = window.kernel;
    Map::of(
        node.channels,
        window.output(input.sides).unwrap(),
        |out, row, column| {
            let mut sum = 0.0;
            for channel in 0..input.channels {
                for i in 0..rows {
                    for j in 0..columns {
                        let (y, x) = (row * window.stride + i, column * window.stride + j);
                        let place = ((out * input.channels + channel) * rows + i) * columns + j;
                        let value = input.at(channel, y, x, window.padding).unwrap_or(0.0);
                        sum += kernel[place] * value;
                    }
                }
            }
            let deviation = (norm("running_var", out) + f64::from(backbone.epsilon)).sqrt();
            let normalised = (sum - norm("running_mean", out)) / deviation;
            let value = normalised * norm("weight", out) + norm("bias", out);
            if *has_relu { value.max(0.0) } else { value }
        },
    )
}

fn pool(input: &Map, window: Window, is_mean: bool) -> Map {
    Map::of(
        input.channels,
        window.output(input.sides).unwrap(),
        |channel, row, column| {
            let mut under = Vec::new();
            for i in 0..window.kernel[0] {
                for j in 0..window.kernel[1] {
                    let (y, x) = (row * window.stride + i, column * window.stride + j);
                    under.push(input.at(channel, y, x, window.padding));
                }
            }
            if is_mean {
                under.iter().flatten().sum::<f64>() / under.len() as f64
            } else {
                under
                    .into_iter()
                    .flatten()
                    .fold(f64::NEG_INFINITY, f64::max)
            }
        },
    )
}

/// The logit of one u8 image.
fn logit(backbone: &Backbone, weights: &Values, image: &[u8], side: usize) -> f64 {
    let image = Map::of(3, [side, side], |channel, row, column| {
        let value = f64::from(image[(channel * side + row) * side + column]) / 255.0;
        (value - f64::from(backbone.mean[channel])) / f64::from(backbone.deviation[channel])
    });
    let mut maps: Vec<Map> = Vec::new();
    for node in &backbone.nodes {
        let of_source = |source: &Source| match *source {
            Source::Image => &image,
            Source::Node(index) => &maps[index],
        };
        let inputs: Vec<&Map> = node.inputs.iter().map(of_source).collect();
        let first = inputs[0];
        maps.push(match &node.layer {
            Layer::Convolution { .. } => convolution(backbone, node, first, weights),
            Layer::MaxPool(window) => pool(first, *window, false),
            Layer::AveragePool(window) => pool(first, *window, true),
            Layer::GlobalAverage => {
                let window = Window {
                    kernel: first.sides,
                    stride: 1,
                    padding: [0, 0],
                };
                pool(first, window, true)
            }
            Layer::AddRelu => Map {
                values: first
                    .values
                    .iter()
                    .zip(&inputs[1].values)
                    .map(|(a, b)| (a + b).max(0.0))
                    .collect(),
                ..first.clone()
            },
            Layer::Concat => Map {
                channels: inputs.iter().map(|map| map.channels).sum(),
                sides: first.sides,
                values: inputs.iter().flat_map(|map| map.values.clone()).collect(),
            },
        });
    }
    let features = &maps.last().unwrap().values;
    let products = features
        .iter()
        .zip(&weights["fc.weight"])
        .map(|(a, b)| a * b);
    products.sum::<f64>() + weights["fc.bias"][0]
}

/// A network of four channels a layer, with weights and statistics that are all different, and its weights in f64.
fn network(name: &str, images: &Tensor) -> (Network, Values) {
    // The table's Inception-v3 is frozen; its gradients are held all the same.
    let unfrozen = Architecture {
        is_backbone_frozen: false,
        ..*find(name).unwrap()
    };
    let unfrozen = Box::leak(Box::new(unfrozen));
    let network = Network::new(unfrozen, 0.001, 3, &Device::Cpu).unwrap();
    network.settle(images).unwrap();
    let mut random = Random::new(8, 0);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a random share is rounded to f32"
    )]
    let mut share = || random.uniform() as f32;
    let mut values = Values::new();
    for parameter in network.parameters() {
        let mut of_one: Vec<f32> = parameter.variable.flatten_all().unwrap().to_vec1().unwrap();
        let is_norm = parameter.variable.rank() == 1;
        for value in of_one.iter_mut().filter(|_| is_norm) {
            *value = *value * (0.75 + share() / 2.0) + 0.1 * share();
        }
        let shape = parameter.variable.shape();
        let tensor = Tensor::from_vec(of_one.clone(), shape, &Device::Cpu).unwrap();
        parameter.variable.set(&tensor).unwrap();
        let wide = of_one.into_iter().map(f64::from).collect();
        values.insert(parameter.name.clone(), wide);
    }
    (network, values)
}

/// The whole network, four channels a layer, against its definition: logits, and the gradient of some values against finite differences of the definition.
#[track_caller]
fn check(name: &str, side: usize) {
    let mut random = Random::new(4, 0);
    let bytes: Vec<u8> = (0..2 * 3 * side * side)
        .map(|_| u8::try_from(random.below(256)).unwrap())
        .collect();
    let images = Tensor::from_vec(bytes.clone(), (2, 3, side, side), &Device::Cpu).unwrap();
    let (network, mut values) = network(name, &images);
    let of_definition = |values: &Values| -> Vec<f64> {
        let images = bytes.chunks_exact(3 * side * side);
        images
            .map(|image| logit(network.backbone().unwrap(), values, image, side))
            .collect()
    };
    let expected = of_definition(&values);
    let logits = network.forward(&images).unwrap();
    let found: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
    for (found, expected) in found.iter().zip(&expected) {
        let difference = (f64::from(*found) - expected).abs();
        assert!(
            difference < 1e-4 * expected.abs().max(1.0),
            "{name}: {found} {expected}"
        );
    }
    let gradients = logits.sum_all().unwrap().backward().unwrap();
    let mut n_checked = 0;
    // A seventh of them: kernels, gammas and betas of all kinds of layers.
    let trained = network
        .parameters()
        .iter()
        .filter(|parameter| parameter.is_trained);
    for parameter in trained.step_by(7) {
        let gradient = gradients.get(&parameter.variable).unwrap();
        let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
        let largest = gradient
            .iter()
            .fold(0f32, |largest, value| largest.max(value.abs()));
        let place = random.below(gradient.len());
        let step = 1e-6;
        let [plus, minus] = [step, -step].map(|step| {
            values.get_mut(&parameter.name).unwrap()[place] += step;
            let sum: f64 = of_definition(&values).iter().sum();
            values.get_mut(&parameter.name).unwrap()[place] -= step;
            sum
        });
        let (numeric, found) = ((plus - minus) / (2.0 * step), f64::from(gradient[place]));
        let allowed = 1e-3 * f64::from(largest).max(1e-3);
        assert!(
            (numeric - found).abs() <= allowed,
            "{name}: {} {place}: {found}, by differences {numeric}",
            parameter.name
        );
        n_checked += 1;
    }
    assert!(n_checked > 1);
}

#[test]
fn resnet_and_its_gradients_equal_their_definition() {
    check("resnet50", 35);
}

#[test]
fn inception_and_its_gradients_equal_their_definition() {
    check("inception-v3", 79);
}

#[test]
fn weights_of_other_classes_and_the_auxiliary_classifier_are_left_out_and_faults_are_named() {
    let network = Network::new(find("inception-v3").unwrap(), 0.001, 1, &Device::Cpu).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("imagenet.safetensors");
    let mut parts = Vec::new();
    for parameter in network.parameters() {
        let (name, variable) = (parameter.name.clone(), &parameter.variable);
        let mut shape = variable.dims().to_vec();
        if name.starts_with("fc.") {
            shape[0] = 1000;
        }
        let n = shape.iter().product();
        parts.push((name, shape, vec![0.25; n]));
    }
    parts.push(("AuxLogits.fc.bias".to_owned(), vec![2], vec![0.0; 2]));
    let write = |parts: &[(String, Vec<usize>, Vec<f32>)]| {
        let bytes = crate::network::to_safetensors(parts, &BTreeMap::new());
        std::fs::write(&path, bytes).unwrap();
    };
    let head = |network: &Network| -> Vec<f32> {
        let [.., weight, _] = network.parameters() else {
            unreachable!("it has parameters")
        };
        weight.variable.flatten_all().unwrap().to_vec1().unwrap()
    };
    write(&parts);
    let before = head(&network);
    network.set_pretrained(&path).unwrap();
    assert_eq!(head(&network), before);
    let kernel = network.parameters()[0].variable.flatten_all().unwrap();
    assert!(
        kernel
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .all(|&value| value.to_bits() == 0.25f32.to_bits())
    );
    let refused = |parts: &[(String, Vec<usize>, Vec<f32>)], name: &str| {
        write(parts);
        let message = network.set_pretrained(&path).unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    };
    refused(&parts[1..], "Conv2d_1a_3x3.conv.weight");
    parts.push(("layer1.0.conv1.weight".to_owned(), vec![1], vec![0.0]));
    refused(&parts, "layer1.0.conv1.weight");
}

#[test]
fn frozen_backbone_trains_its_last_layer_alone() {
    let network = Network::new(find("resnet50-frozen").unwrap(), 0.01, 1, &Device::Cpu).unwrap();
    let trained = network
        .parameters()
        .iter()
        .filter(|parameter| parameter.is_trained);
    let names: Vec<&str> = trained.map(|parameter| parameter.name.as_str()).collect();
    assert_eq!(names, ["fc.weight", "fc.bias"]);
}
