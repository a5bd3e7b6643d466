//! The GPU's operators against the definition in f64, and the whole step against the CPU's.
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "values of tests are small"
)]
#![expect(unsafe_code, reason = "opening the emulated libraries")]

mod emulator;
mod reference;
mod transfer;

use self::emulator::{device, turn};
use self::reference::{Reference, Step};
use super::device::Memory;
use super::layout::Layout;
use super::network::{Design, Images, Network, Targets};
use crate::architecture::OptimiserKind;
use crate::batches::Change;
use crate::operators::optimiser::{ADAM_EPSILON, Moments, adam_rate};
use crate::random::Random;
use crate::train::Precision;

/// What the images of a test hold.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// Noise.
    Random,
    /// 0 and 255.
    Saturated,
    /// Areas of one value: every window in them has ties.
    Tied,
}

/// What a test computes.
#[derive(Clone, Copy, Debug)]
struct Case {
    side: usize,
    convolutions: &'static [usize],
    units: usize,
    pattern: Pattern,
    n: usize,
    is_changed: bool,
}

const CASE: Case = Case {
    side: 30,
    convolutions: &[12, 5],
    units: 6,
    pattern: Pattern::Random,
    n: 2,
    is_changed: false,
};

impl Case {
    fn pixels(&self, n_stored: usize, random: &mut Random) -> Vec<u8> {
        let area = self.side * self.side;
        (0..n_stored * 3 * area)
            .map(|at| {
                let value = match self.pattern {
                    Pattern::Random => random.below(256),
                    Pattern::Saturated => 255 * random.below(2),
                    Pattern::Tied => {
                        let (row, column) = (at % area / self.side, at % self.side);
                        60 * (row / 7 + column / 5 + at / area) % 256
                    }
                };
                u8::try_from(value).unwrap()
            })
            .collect()
    }

    /// Weights of few bits, so that the first layer's sums are exact.
    fn weights(&self, layout: &Layout, random: &mut Random) -> Vec<Vec<f32>> {
        (0..layout.spans.all.len())
            .map(|index| {
                let n = layout.spans.length(index);
                let is_weight = index.is_multiple_of(2);
                let scale = match (is_weight, n) {
                    (false, _) => 1.0 / 64.0,
                    (true, 0..5000) => 1.0 / 128.0,
                    (true, _) => 1.0 / 1024.0,
                };
                // No sum of the first layer is exactly the negative bias: where ReLU opens does not hang on the last bit.
                let offset = if is_weight { 0.0 } else { 0.37 };
                let steps = |random: &mut Random| random.below(65) as f32 - 32.0 + offset;
                (0..n).map(|_| steps(random) * scale).collect()
            })
            .collect()
    }
}

/// Memory of the GPU with these values.
fn memory<T: Copy>(network: &Network, values: &[T]) -> Memory {
    let memory = network.base.device.zeros(size_of_val(values)).unwrap();
    network.base.device.write(&memory, 0, values).unwrap();
    memory
}

/// Difference of two lists relative to the size of the second.
fn distance(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let pairs = found.iter().zip(expected);
    let apart = squares(&mut pairs.map(|(found, expected)| f64::from(*found) - expected));
    let size = squares(&mut expected.iter().copied());
    (apart / size.max(1e-30)).sqrt()
}

#[track_caller]
fn check(case: Case, precision: Precision) {
    let _turn = turn();
    let mut random = Random::new(11, 0);
    let layout = Layout::new(case.side, case.convolutions, case.units);
    let weights = case.weights(&layout, &mut random);
    let n_stored = case.n + 2;
    let pixels = case.pixels(n_stored, &mut random);
    let numbers: Vec<i64> = (0..case.n as i64)
        .map(|at| (at * 2 + 1) % n_stored as i64)
        .collect();
    let changes: Vec<Change> = (0..if case.is_changed { case.n } else { 0 })
        .map(|at| Change {
            is_flipped: at % 2 == 0,
            down: at as i32 * 3 - 2,
            right: 1 - at as i32 * 2,
        })
        .collect();
    let targets: Vec<f32> = (0..case.n)
        .flat_map(|at| [(at % 2) as f32, 1.0 + at as f32 / 2.0])
        .collect();

    let mut network = Network::new(
        device(),
        Design::Chain(layout),
        case.side,
        case.n + 1,
        precision,
        OptimiserKind::Adam,
    )
    .unwrap();
    let moments = vec![Moments::default(); weights.len()];
    network.set(&weights, &moments).unwrap();
    network.tune(case.n).unwrap();
    let words: Vec<i32> = changes
        .iter()
        .flat_map(|change| [i32::from(change.is_flipped), change.down, change.right])
        .collect();
    let kept = [
        memory(&network, &pixels),
        memory(&network, &numbers),
        memory(&network, &words),
        memory(&network, &targets),
        memory(&network, &[f32::NAN; 2]),
    ];
    let images = Images {
        pixels: kept[0].pointer(),
        numbers: kept[1].pointer(),
        changes: if changes.is_empty() {
            0
        } else {
            kept[2].pointer()
        },
        n: case.n,
    };
    let loss = Targets {
        targets: kept[3].pointer(),
        n_total: case.n + 1,
        loss: kept[4].range(4, 4),
    };
    let mut layers = Vec::new();
    network
        .gradients_of(images, loss, |_, layer| {
            layers.push(layer);
            Ok(())
        })
        .unwrap();
    assert_eq!(
        layers,
        (0..=case.convolutions.len()).rev().collect::<Vec<_>>()
    );
    let found = network.gradients().unwrap();
    let losses: Vec<f32> = network.base.device.read(&kept[4], 0, 2).unwrap();
    let logits = network.logits(images).unwrap();

    let reference = Reference {
        side: case.side,
        precision,
        weights: &weights,
        n_total: case.n + 1,
    };
    let area = 3 * case.side * case.side;
    let chosen = numbers.iter().enumerate().map(|(place, number)| {
        let image = &pixels[*number as usize * area..][..area];
        let change = changes.get(place).copied().unwrap_or_default();
        (image, change, [targets[2 * place], targets[2 * place + 1]])
    });
    let Step {
        loss,
        logits: expected_logits,
        gradients,
    } = reference.step(chosen);
    // What is left after the same roundings: sums in f32, and a value that rounds to the other side here and there.
    let (near, far) = match precision {
        Precision::F32 => (2e-6, 2e-5),
        Precision::Bf16 => (2e-3, 8e-3),
    };
    let apart = distance(&logits, &expected_logits);
    assert!(apart < near, "{case:?}: logits differ by {apart:e}");
    assert!(losses[0].is_nan(), "the loss was written elsewhere");
    assert!(
        (f64::from(losses[1]) - loss).abs() < near * loss,
        "{case:?}: loss {} not {loss}",
        losses[1]
    );
    for (index, (found, expected)) in found.iter().zip(&gradients).enumerate() {
        let apart = distance(found, expected);
        assert!(
            apart < far,
            "{case:?} {precision:?}: gradient {index} differs by {apart:e}"
        );
        assert!(
            expected.iter().any(|value| *value != 0.0),
            "{case:?}: gradient {index} is nothing"
        );
    }
}

#[track_caller]
fn check_both(case: Case) {
    check(case, Precision::F32);
    check(case, Precision::Bf16);
}

#[test]
fn step_is_the_definition_on_noise() {
    check_both(CASE);
}

#[test]
fn step_is_the_definition_on_saturated_images() {
    check_both(Case {
        pattern: Pattern::Saturated,
        ..CASE
    });
}

#[test]
fn step_gives_ties_to_the_first_maximum() {
    check_both(Case {
        pattern: Pattern::Tied,
        ..CASE
    });
}

#[test]
fn step_drops_odd_rows_and_takes_odd_units() {
    check_both(Case {
        side: 31,
        convolutions: &[7, 9, 3],
        units: 11,
        n: 3,
        ..CASE
    });
}

#[test]
fn step_takes_more_windows_and_channels_than_a_block() {
    // One channel, so that the dense sums are short enough for the bounds in f32 in any order.
    check_both(Case {
        side: 262,
        convolutions: &[1],
        units: 4,
        n: 1,
        ..CASE
    });
    check_both(Case {
        side: 12,
        convolutions: &[300, 40],
        units: 40,
        ..CASE
    });
}

#[test]
fn step_changes_images_as_augmentation_does() {
    check_both(Case {
        is_changed: true,
        n: 3,
        ..CASE
    });
}

#[test]
fn optimisers_are_those_of_the_cpu() {
    let _turn = turn();
    for (optimiser, precision) in [
        (OptimiserKind::Adam, Precision::Bf16),
        (OptimiserKind::Adam, Precision::F32),
        (OptimiserKind::Sgd, Precision::Bf16),
    ] {
        let mut random = Random::new(3, 0);
        let layout = Layout::new(30, &[12, 5], 6);
        let mut draw = |index: usize| -> Vec<f32> {
            let n = layout.spans.length(index);
            (0..n).map(|_| random.uniform() as f32 - 0.5).collect()
        };
        let n = layout.spans.all.len();
        let weights: Vec<Vec<f32>> = (0..n).map(&mut draw).collect();
        let moments: Vec<Moments> = (0..n)
            .map(|index| Moments {
                first: draw(index),
                second: draw(index).iter().map(|value| value * value).collect(),
            })
            .collect();
        let gradients: Vec<Vec<f32>> = (0..n).map(&mut draw).collect();
        let mut flat = vec![0f32; layout.spans.n_values];
        for (index, values) in gradients.iter().enumerate() {
            for (at, value) in values.iter().enumerate() {
                flat[layout.spans.place(index, at)] = *value;
            }
        }
        let mut network =
            Network::new(device(), Design::Chain(layout), 30, 1, precision, optimiser).unwrap();
        network.set(&weights, &moments).unwrap();
        network
            .base
            .device
            .write(&network.base.parameters.gradients, 0, &flat)
            .unwrap();
        let rate = adam_rate(7, 0.01);
        network.update(rate).unwrap();
        let (after, after_moments) = network.get().unwrap();
        for index in 0..n {
            for at in 0..weights[index].len() {
                let gradient = f64::from(gradients[index][at]);
                let mut weight = f64::from(weights[index][at]);
                if optimiser == OptimiserKind::Adam {
                    let mut first = f64::from(moments[index].first[at]);
                    let mut second = f64::from(moments[index].second[at]);
                    first += 0.1 * (gradient - first);
                    second += 0.001 * (gradient * gradient - second);
                    weight -= f64::from(rate) * first / (second.sqrt() + f64::from(ADAM_EPSILON));
                    assert!((f64::from(after_moments[index].first[at]) - first).abs() < 1e-6);
                    assert!((f64::from(after_moments[index].second[at]) - second).abs() < 1e-6);
                } else {
                    weight -= f64::from(rate) * gradient;
                }
                let found = f64::from(after[index][at]);
                assert!(
                    (found - weight).abs() < 1e-6,
                    "{index} {at}: {found} not {weight}"
                );
            }
        }
    }
}

#[test]
fn nan_is_not_hidden_by_pool_or_relu() {
    let _turn = turn();
    for precision in [Precision::Bf16, Precision::F32] {
        let layout = Layout::new(30, &[8, 8], 8);
        let mut weights = CASE.weights(&layout, &mut Random::new(1, 0));
        weights[1].fill(f32::NAN);
        let mut network = Network::new(
            device(),
            Design::Chain(layout),
            30,
            1,
            precision,
            OptimiserKind::Sgd,
        )
        .unwrap();
        network.set(&weights, &[]).unwrap();
        let (pixels, numbers) = (memory(&network, &[9u8; 2700]), memory(&network, &[0i64]));
        let images = Images {
            pixels: pixels.pointer(),
            numbers: numbers.pointer(),
            changes: 0,
            n: 1,
        };
        assert!(network.logits(images).unwrap()[0].is_nan());
    }
}
