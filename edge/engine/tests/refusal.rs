//! Files outside the domain in which all kernels agree are refused by name.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "the reference arithmetic of the test"
)]

mod model_file;

use engine::{Kernel, LoadError, Model, Options, RunError};
use model_file::{Network, Random};
use prost::Message as _;
use tract_onnx::pb::tensor_proto::DataType;
use tract_onnx::pb::{AttributeProto, ModelProto, NodeProto, TensorProto};

const IMAGE: [usize; 3] = [3, 22, 22];

fn network() -> Network {
    Network::random(21, IMAGE, &[8, 4], &[4, 1])
}

fn load(network: &Network) -> Result<Model, LoadError> {
    Model::load(&network.file(), &Options::default())
}

#[test]
fn a_weight_of_minus_128_is_refused() {
    let mut network = network();
    network.convolutions[1].weights[5] = -128;
    assert!(matches!(load(&network), Err(LoadError::Weight { .. })));
}

#[test]
fn an_accumulator_that_could_overflow_is_refused_with_its_channel() {
    let mut network = network();
    network.dense[0].bias[2] = i32::MAX;
    assert!(matches!(
        load(&network),
        Err(LoadError::Overflow { channel: 2, .. })
    ));
}

#[test]
fn a_weight_or_scale_that_is_not_finite_is_refused() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut network = network();
        network.dense[0].weight_scales[0] = bad;
        for file in [network.file(), network.float_file()] {
            assert!(matches!(
                Model::load(&file, &Options::default()),
                Err(LoadError::NotFinite { .. })
            ));
        }
    }
}

#[test]
fn a_constant_that_is_a_node_and_not_finite_is_refused() {
    let tensor = TensorProto {
        data_type: DataType::Float as i32,
        raw_data: f32::NAN.to_le_bytes().to_vec(),
        ..TensorProto::default()
    };
    let values = [
        AttributeProto {
            t: Some(tensor),
            ..AttributeProto::default()
        },
        AttributeProto {
            f: f32::INFINITY,
            ..AttributeProto::default()
        },
        AttributeProto {
            floats: vec![0.0, f32::NAN],
            ..AttributeProto::default()
        },
    ];
    for value in values {
        let constant = NodeProto {
            name: "bad".to_owned(),
            op_type: "Constant".to_owned(),
            attribute: vec![value],
            ..NodeProto::default()
        };
        let mut proto = ModelProto::decode(network().float_file().as_slice()).unwrap();
        proto.graph.as_mut().unwrap().node.push(constant);
        let refused = Model::load(&proto.encode_to_vec(), &Options::default());
        assert!(matches!(refused, Err(LoadError::NotFinite { tensor }) if tensor == "bad"));
    }
}

/// Scales that are finite and make one that is not: kernels do not agree on what it does to a sum of 0.
#[test]
fn a_scale_that_is_not_finite_once_multiplied_is_refused() {
    let mut network = network();
    network.dense[0].weight_scales.fill(1e20);
    network.dense[0].output_scale = Some(1e-30);
    network.dense[1].input_scale = 1e-30;
    assert!(matches!(load(&network), Err(LoadError::NotFinite { .. })));

    let mut network = self::network();
    network.dense[1].weight_scales.fill(3e38);
    let options = Options {
        is_float: true,
        ..Options::default()
    };
    assert!(matches!(
        Model::load(&network.file(), &options),
        Err(LoadError::NotFinite { .. })
    ));
}

/// Behind the first layer the walk would come to the first layer again.
#[test]
fn a_value_that_is_defined_twice_is_refused() {
    let mut proto = ModelProto::decode(network().file().as_slice()).unwrap();
    let nodes = &mut proto.graph.as_mut().unwrap().node;
    let second = nodes
        .iter()
        .rposition(|node| node.op_type == "Conv")
        .unwrap();
    let first_value = nodes[0].output[0].clone();
    let its_input = nodes[second].input[0].clone();
    let before = nodes.iter_mut().find(|node| node.output[0] == its_input);
    before.unwrap().output[0] = first_value.clone();
    nodes.remove(second);
    let refused = Model::load(&proto.encode_to_vec(), &Options::default());
    assert!(matches!(refused, Err(LoadError::DefinedTwice { value }) if value == first_value));
}

#[test]
fn images_and_maps_beyond_any_use_are_refused() {
    let refused = |network: Network| match load(&network) {
        Err(LoadError::Size { what, bytes, .. }) => (what, bytes),
        other => panic!("{other:?}"),
    };
    // Of the file's few numbers 2 GB would become.
    let (what, bytes) = refused(Network::random(1, [1, 4096, 4096], &[1, 2000, 1], &[1]));
    assert!(bytes > 1022 * 1022 * 2000, "{bytes}");
    assert!(what.starts_with("Conv"), "{what}");
    let mut network = network();
    network.image = [1 << 20, 1 << 22, 1 << 22];
    assert_eq!(refused(network), ("the image".to_owned(), u64::MAX));
}

#[test]
fn bytes_that_are_no_onnx_are_refused() {
    assert!(matches!(
        Model::load(b"\xff\xff\xff", &Options::default()),
        Err(LoadError::Onnx(_))
    ));
    assert!(Model::load(b"", &Options::default()).is_err());
}

#[test]
fn every_truncation_of_a_file_is_an_error_or_another_model_but_no_panic() {
    let file = network().file();
    for n in (0..file.len()).step_by(file.len() / 40) {
        drop(Model::load(&file[..n], &Options::default()));
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let file = network().file();
    for threads in [0, 65] {
        let options = Options {
            kernel: None,
            threads,
            ..Options::default()
        };
        assert!(matches!(Model::load(&file, &options), Err(LoadError::Threads(n)) if n == threads));
    }
    let absent = Kernel::ALL
        .into_iter()
        .find(|kernel| !kernel.is_available());
    let options = Options {
        kernel: absent,
        threads: 1,
        ..Options::default()
    };
    assert!(
        matches!(Model::load(&file, &options), Err(LoadError::Kernel(kernel)) if Some(kernel) == absent)
    );
}

#[test]
fn images_of_another_length_are_refused() {
    let model = load(&network()).unwrap();
    let images = Random::new(1).bytes(100);
    assert!(matches!(
        model.session().logits(&images, &mut [0.0]),
        Err(RunError::Length { .. })
    ));
    assert!(model.session().logits(&[], &mut []).is_ok());
}

#[test]
fn a_graph_with_an_unknown_operator_is_refused() {
    let network = network();
    let mut file = network.file();
    // Not our chain, so tract takes over, which knows no such operator either.
    let position = file
        .windows(7)
        .position(|bytes| bytes == b"MaxPool")
        .unwrap();
    file[position..position + 7].copy_from_slice(b"MaxPoll");
    assert!(matches!(
        Model::load(&file, &Options::default()),
        Err(LoadError::Tract(_)) | Err(LoadError::Onnx(_))
    ));
}
