use std::collections::BTreeMap;

use candle_core::Device;

use super::definition::{Definition, Values};
use super::*;
use crate::architecture::{Architecture, find};
use crate::network::Network;
use crate::operators::loss::BinaryCrossEntropy;
use crate::random::Random;

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

/// The whole network, four channels a layer, against its definition: logits and gradients; and the definition's gradients against finite differences.
#[track_caller]
fn check(name: &str, side: usize) {
    let mut random = Random::new(4, 0);
    let bytes: Vec<u8> = (0..2 * 3 * side * side)
        .map(|_| u8::try_from(random.below(256)).unwrap())
        .collect();
    let images = Tensor::from_vec(bytes.clone(), (2, 3, side, side), &Device::Cpu).unwrap();
    let (network, mut values) = network(name, &images);
    let targets = [[0.0, 1.0], [1.0, 1.5f32]];
    let backbone = network.backbone().unwrap().clone();
    let of_definition = |values: &Values| {
        let definition = Definition {
            backbone: &backbone,
            weights: values,
            side,
            stored: |value| value,
        };
        let images = bytes.chunks_exact(3 * side * side).zip(targets);
        definition.step(images, targets.len())
    };
    let expected = of_definition(&values);
    let logits = network.forward(&images).unwrap();
    let found: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
    for (found, expected) in found.iter().zip(&expected.logits) {
        let difference = (f64::from(*found) - expected).abs();
        assert!(
            difference < 1e-4 * expected.abs().max(1.0),
            "{name}: {found} {expected}"
        );
    }
    let targets = Tensor::new(&targets, &Device::Cpu).unwrap();
    let loss = logits.apply_op2(&targets, BinaryCrossEntropy).unwrap();
    let gradients = loss.backward().unwrap();
    let trained = network
        .parameters()
        .iter()
        .filter(|parameter| parameter.is_trained);
    for (index, parameter) in trained.enumerate() {
        let gradient = gradients.get(&parameter.variable).unwrap();
        let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
        let expected = &expected.gradients[&parameter.name];
        let largest = expected.iter().fold(0.0, |most: f64, g| most.max(g.abs()));
        for (place, (found, expected)) in gradient.iter().zip(expected).enumerate() {
            assert!(
                (f64::from(*found) - expected).abs() <= 1e-3 * largest,
                "{name}: {} {place}: {found} not {expected}",
                parameter.name
            );
        }
        // The definition's own gradient, for a seventh of them: kernels, gammas and betas of all kinds of layers.
        if index % 7 > 0 {
            continue;
        }
        let place = random.below(gradient.len());
        let step = 1e-6;
        let [plus, minus] = [step, -step].map(|step| {
            values.get_mut(&parameter.name).unwrap()[place] += step;
            let loss = of_definition(&values).loss;
            values.get_mut(&parameter.name).unwrap()[place] -= step;
            loss
        });
        let (numeric, expected) = ((plus - minus) / (2.0 * step), expected[place]);
        assert!(
            (numeric - expected).abs() <= 1e-4 * largest.max(1e-3),
            "{name}: {} {place}: {expected}, by differences {numeric}",
            parameter.name
        );
    }
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
