//! A graph that is not one chain runs through tract with our layers in it.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the reference arithmetic of the test"
)]
#![allow(clippy::unwrap_used, reason = "test code")]

mod model_file;

use engine::{Kernel, Model, Options};
use model_file::{Network, Random};
use prost::Message as _;
use tract_onnx::pb::{ModelProto, NodeProto};

/// The network's file with an Identity before its logit, which ends no chain of ours.
fn with_identity(network: &Network) -> Vec<u8> {
    let mut model = ModelProto::decode(network.file().as_slice()).unwrap();
    let nodes = &mut model.graph.as_mut().unwrap().node;
    let last = nodes
        .iter_mut()
        .find(|node| node.output == ["logit"])
        .unwrap();
    last.output = vec!["before".into()];
    let identity = NodeProto {
        name: "identity".into(),
        op_type: "Identity".into(),
        input: vec!["before".into()],
        output: vec!["logit".into()],
        ..NodeProto::default()
    };
    let place = nodes
        .iter()
        .position(|node| node.output == ["before"])
        .unwrap();
    nodes.insert(place + 1, identity);
    model.encode_to_vec()
}

#[test]
fn layers_of_another_graph_run_on_our_kernels_to_the_bit() {
    let image = [3, 38, 30];
    let network = Network::random(31, image, &[20, 12], &[6, 1]);
    let file = with_identity(&network);
    let images = Random::new(32).bytes(3 * image.iter().product::<usize>());
    let expected: Vec<u32> = images
        .chunks_exact(images.len() / 3)
        .map(|image| network.logit(image).to_bits())
        .collect();
    for kernel in Kernel::available() {
        let options = Options {
            kernel: Some(kernel),
            threads: 1,
            ..Options::default()
        };
        let model = Model::load(&file, &options).unwrap();
        assert_eq!(model.kernel(), None, "tract runs the graph");
        let explanation = model.explain().unwrap();
        let runs_on = "tract, 2 convolutions on ";
        assert!(explanation.runs_on.starts_with(runs_on), "{explanation}");
        let ours = explanation.layers.iter().filter(|layer| layer.macs > 0);
        assert_eq!(ours.count(), 4, "{explanation}");
        let mut logits = [0.0; 3];
        model.session().logits(&images, &mut logits).unwrap();
        assert_eq!(logits.map(f32::to_bits).as_slice(), expected, "{kernel}");
    }
}

/// The network takes weights out of the file, so they must be one layer's own.
#[test]
fn two_layers_with_the_same_weights_run_on_our_kernels() {
    let image = [3, 46, 38];
    let mut network = Network::random(33, image, &[8, 8, 8], &[1]);
    network.convolutions[2].weights = network.convolutions[1].weights.clone();
    let mut model = ModelProto::decode(network.file().as_slice()).unwrap();
    let graph = model.graph.as_mut().unwrap();
    let weights = graph
        .initializer
        .iter()
        .filter(|tensor| tensor.dims.len() == 4);
    let weights: Vec<String> = weights.map(|tensor| tensor.name.clone()).collect();
    let inputs = graph.node.iter_mut().flat_map(|node| &mut node.input);
    let of_the_last = inputs.filter(|input| **input == weights[2]);
    of_the_last.for_each(|input| *input = weights[1].clone());
    let model = Model::load(&model.encode_to_vec(), &Options::default()).unwrap();
    let pixels = Random::new(34).bytes(image.iter().product());
    let mut logit = [0.0];
    model.session().logits(&pixels, &mut logit).unwrap();
    assert_eq!(logit[0].to_bits(), network.logit(&pixels).to_bits());
}
