use super::*;
use crate::operators::definition::{self, Map};
use crate::random::Random;

fn instructions() -> Vec<Instructions> {
    let mut all = vec![Instructions::Portable];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Instructions::Avx2);
        }
        if is_x86_feature_detected!("avx512f") {
            all.push(Instructions::Avx512);
        }
    }
    all
}

/// `[channel, row, column]` to blocks of 16 channels.
fn to_blocks(map: &Map) -> Vec<f32> {
    let area = map.rows * map.columns;
    let mut blocks = vec![0f32; map.channels.div_ceil(BLOCK) * BLOCK * area];
    for (index, &value) in map.values.iter().enumerate() {
        let (channel, pixel) = (index / area, index % area);
        blocks[(channel / BLOCK * area + pixel) * BLOCK + channel % BLOCK] = value as f32;
    }
    blocks
}

fn from_blocks(blocks: &[f32], channels: usize, rows: usize, columns: usize) -> Map {
    let area = rows * columns;
    let values = (0..channels * area)
        .map(|index| {
            let (channel, pixel) = (index / area, index % area);
            f64::from(blocks[(channel / BLOCK * area + pixel) * BLOCK + channel % BLOCK])
        })
        .collect();
    Map {
        channels,
        rows,
        columns,
        values,
    }
}

#[track_caller]
fn near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected
        .iter()
        .fold(1e-30, |scale: f64, value| scale.max(value.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found - expected).abs() <= tolerance * scale,
            "{what} {index}: {found} not {expected} (scale {scale})"
        );
    }
}

/// Values of a test: of any size, or so few that most windows have ties and all sums are exact.
#[derive(Clone, Copy)]
enum Values {
    Any,
    Ties,
}

impl Values {
    fn weight(self, random: &mut Random) -> f64 {
        match self {
            Self::Any => f64::from((random.uniform() - 0.5) as f32),
            Self::Ties => random.below(3) as f64 - 1.0,
        }
    }
    fn tolerance(self) -> f64 {
        match self {
            Self::Any => 1e-5,
            Self::Ties => 0.0,
        }
    }
}

#[track_caller]
fn check(
    n_images: usize,
    channels_in: usize,
    channels_out: usize,
    rows: usize,
    columns: usize,
    is_image: bool,
    kind: Values,
) {
    let mut random = Random::new(11, (rows * columns + channels_in) as u64);
    let geometry = Geometry {
        n_images,
        channels_in,
        channels_out,
        rows,
        columns,
        is_image,
    };
    let weight: Vec<f64> = (0..channels_out * channels_in * 9)
        .map(|_| kind.weight(&mut random))
        .collect();
    let bias: Vec<f64> = (0..channels_out)
        .map(|_| kind.weight(&mut random))
        .collect();
    let bytes: Vec<u8> = (0..n_images * channels_in * rows * columns)
        .map(|_| match kind {
            Values::Any => random.below(256) as u8,
            // 0 or 255, that is 0 or 1 after scaling.
            Values::Ties => random.below(2) as u8 * 255,
        })
        .collect();
    let maps: Vec<Map> = bytes
        .chunks_exact(channels_in * rows * columns)
        .map(|bytes| {
            let values = bytes
                .iter()
                .map(|&byte| f64::from(f32::from(byte) * IMAGE_SCALE))
                .collect();
            Map {
                channels: channels_in,
                rows,
                columns,
                values,
            }
        })
        .collect();
    let (out_rows, out_columns) = (geometry.pooled_rows(), geometry.pooled_columns());
    let gradients: Vec<Map> = (0..n_images)
        .map(|_| {
            let values = (0..channels_out * out_rows * out_columns)
                .map(|_| kind.weight(&mut random))
                .collect();
            Map {
                channels: channels_out,
                rows: out_rows,
                columns: out_columns,
                values,
            }
        })
        .collect();
    let (weight32, bias32): (Vec<f32>, Vec<f32>) = (
        weight.iter().map(|&v| v as f32).collect(),
        bias.iter().map(|&v| v as f32).collect(),
    );
    let blocks: Vec<f32> = maps.iter().flat_map(to_blocks).collect();
    let gradient_blocks: Vec<f32> = gradients.iter().flat_map(to_blocks).collect();
    let batch = if is_image {
        Batch::Images(&bytes)
    } else {
        Batch::Maps(&blocks)
    };
    for instructions in instructions() {
        let (pooled, argmax) = forward(instructions, &geometry, batch, &weight32, &bias32);
        let found = backward(
            instructions,
            &geometry,
            batch,
            &weight32,
            &argmax,
            &gradient_blocks,
            true,
        );
        let mut expected_weight = vec![0.0; weight.len()];
        let mut expected_bias = vec![0.0; bias.len()];
        for (image, map) in maps.iter().enumerate() {
            let expected = definition::convolution_relu_pool(map, &weight, &bias, |sum| sum);
            let part = &pooled[image * geometry.pooled_values()..][..geometry.pooled_values()];
            let part = from_blocks(part, channels_out, out_rows, out_columns);
            near("pooled", &part.values, &expected.values, kind.tolerance());
            let back = definition::convolution_relu_pool_gradient(
                map,
                &weight,
                &bias,
                &gradients[image],
                |sum| sum,
            );
            for (sum, value) in expected_weight.iter_mut().zip(&back.weight) {
                *sum += value;
            }
            for (sum, value) in expected_bias.iter_mut().zip(&back.bias) {
                *sum += value;
            }
            if let Some(input) = &found.input {
                let part = &input[image * geometry.input_values()..][..geometry.input_values()];
                let part = from_blocks(part, channels_in, rows, columns);
                near(
                    "input gradient",
                    &part.values,
                    &back.input,
                    kind.tolerance(),
                );
            }
        }
        assert_eq!(found.input.is_some(), !is_image);
        let wide = |values: &[f32]| {
            values
                .iter()
                .map(|&value| f64::from(value))
                .collect::<Vec<_>>()
        };
        near(
            "weight gradient",
            &wide(&found.weight),
            &expected_weight,
            kind.tolerance(),
        );
        near(
            "bias gradient",
            &wide(&found.bias),
            &expected_bias,
            kind.tolerance(),
        );
    }
}

#[test]
fn image_layer_equals_its_definition() {
    for kind in [Values::Any, Values::Ties] {
        check(2, 3, 5, 17, 17, true, kind);
        check(1, 3, 33, 8, 11, true, kind);
        check(1, 3, 64, 37, 76, true, kind);
        check(3, 3, 4, 4, 4, true, kind);
    }
}

#[test]
fn map_layer_equals_its_definition() {
    for kind in [Values::Any, Values::Ties] {
        check(2, 20, 7, 13, 16, false, kind);
        check(1, 16, 48, 9, 75, false, kind);
        check(2, 4, 4, 5, 6, false, kind);
        check(1, 33, 17, 20, 12, false, kind);
    }
}

#[test]
fn more_images_than_partial_sums_are_all_counted() {
    check(19, 3, 4, 6, 6, true, Values::Any);
    check(19, 4, 4, 6, 6, false, Values::Any);
}
