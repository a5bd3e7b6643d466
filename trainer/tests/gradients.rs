//! The gradients of the layers after the convolutions against central finite differences of their own forward pass.
//!
//! The convolution has its own tests beside an f64 definition. Here the outputs are summed with fixed random weights, every
//! input is moved up and down by a step, and the slope is compared with what the backward pass says.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

use candle_core::{Device, Tensor, Var};
use trainer::operators::dense::{Dense, Flatten};
use trainer::operators::loss::BinaryCrossEntropy;

/// Half the distance of the two points of a difference.
const STEP: f32 = 1.0 / 32.0;

/// Allowed difference, relative to the largest gradient: f32 sums of at most 1,500 products, divided by the step.
const TOLERANCE: f32 = 2e-3;

/// Values in -1 to 1 that are no multiple of the step apart from 0, so that no difference straddles a kink of the ReLU by chance.
fn variable(seed: u64, shape: &[usize]) -> Var {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            f32::from(u16::try_from(state >> 48).unwrap()) / 32768.0 - 1.0
        })
        .collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn scalar(tensor: &Tensor) -> f64 {
    values(tensor).iter().map(|v| f64::from(*v)).sum()
}

/// Compares the gradient of `loss` at every `stride`-th value of each of `variables` with its central difference.
#[track_caller]
fn check(variables: &[&Var], stride: usize, loss: impl Fn() -> Tensor) {
    let gradients = loss().backward().unwrap();
    for (which, variable) in variables.iter().enumerate() {
        let (at, gradient) = (values(variable), values(gradients.get(variable).unwrap()));
        let largest = gradient.iter().fold(1e-3_f32, |a, g| a.max(g.abs()));
        for index in (0..at.len()).step_by(stride) {
            let moved = |by: f32| {
                let mut values = at.clone();
                values[index] += by;
                let shape = variable.dims();
                variable
                    .set(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
                    .unwrap();
                scalar(&loss())
            };
            #[expect(
                clippy::cast_possible_truncation,
                reason = "compared with an f32 gradient"
            )]
            let slope = ((moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP)) as f32;
            let difference = (slope - gradient[index]).abs();
            assert!(
                difference <= TOLERANCE * largest,
                "variable {which}, value {index}: difference quotient {slope}, gradient {}",
                gradient[index]
            );
        }
        let shape = variable.dims();
        variable
            .set(&Tensor::from_vec(at, shape, &Device::Cpu).unwrap())
            .unwrap();
    }
}

#[test]
fn dense_without_relu_has_the_gradient_of_its_differences() {
    for (n_images, n_in, n_out) in [(3, 7, 5), (2, 1500, 3), (1, 1025, 1)] {
        let (x, w, b) = (
            variable(1, &[n_images, n_in]),
            variable(2, &[n_out, n_in]),
            variable(3, &[n_out]),
        );
        let weights = variable(4, &[n_images, n_out]);
        check(&[&x, &w, &b], n_in.div_ceil(50), || {
            let y = x.apply_op3(&w, &b, Dense { has_relu: false }).unwrap();
            (y * weights.as_tensor()).unwrap().sum_all().unwrap()
        });
    }
}

#[test]
fn dense_with_relu_passes_the_gradient_of_open_units_only() {
    let (x, w) = (variable(5, &[4, 9]), variable(6, &[2, 9]));
    // One unit far open, one far shut: no step reaches the kink.
    let b = Var::new(&[20_f32, -20.0], &Device::Cpu).unwrap();
    let weights = variable(7, &[4, 2]);
    let loss = || {
        let y = x.apply_op3(&w, &b, Dense { has_relu: true }).unwrap();
        (y * weights.as_tensor()).unwrap().sum_all().unwrap()
    };
    check(&[&x, &w, &b], 1, loss);
    let gradients = loss().backward().unwrap();
    assert_eq!(
        values(gradients.get(&b).unwrap())[1].to_bits() << 1,
        0,
        "a shut unit learns nothing"
    );
}

#[test]
fn relu_has_gradient_0_at_0() {
    let x = Var::new(&[[1_f32, -1.0]], &Device::Cpu).unwrap();
    let w = Var::new(&[[2_f32, 2.0]], &Device::Cpu).unwrap();
    let b = Var::new(&[0_f32], &Device::Cpu).unwrap();
    let y = x.apply_op3(&w, &b, Dense { has_relu: true }).unwrap();
    let gradients = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(values(gradients.get(&b).unwrap())[0].to_bits() << 1, 0);
}

#[test]
fn flatten_has_the_gradient_of_its_differences() {
    let map = variable(8, &[2, 2, 3, 5, 16]);
    let weights = variable(9, &[2, 20 * 3 * 5]);
    check(&[&map], 7, || {
        let flat = map.apply_op1(Flatten { n_channels: 20 }).unwrap();
        (flat * weights.as_tensor()).unwrap().sum_all().unwrap()
    });
}

#[test]
fn cross_entropy_has_the_gradient_of_its_differences() {
    let logits = variable(10, &[6, 1]);
    let targets = Tensor::new(
        &[
            [0_f32, 1.0],
            [1.0, 1.0],
            [0.0, 2.5],
            [1.0, 0.5],
            [1.0, 1.0],
            [0.0, 0.0],
        ],
        &Device::Cpu,
    )
    .unwrap();
    check(&[&logits], 1, || {
        logits.apply_op2(&targets, BinaryCrossEntropy).unwrap()
    });
}

#[test]
fn cross_entropy_of_a_saturated_logit_is_finite_and_pulls_back() {
    let logits = Var::new(&[[80_f32], [-80.0]], &Device::Cpu).unwrap();
    let targets = Tensor::new(&[[0_f32, 1.0], [1.0, 1.0]], &Device::Cpu).unwrap();
    let loss = logits.apply_op2(&targets, BinaryCrossEntropy).unwrap();
    assert!((scalar(&loss) - 80.0).abs() < 1e-4);
    let gradient = values(loss.backward().unwrap().get(&logits).unwrap());
    assert!(
        (gradient[0] - 0.5).abs() < 1e-6 && (gradient[1] + 0.5).abs() < 1e-6,
        "{gradient:?}"
    );
}

/// Where its arithmetic holds (logits of moderate size), candle-nn is a second opinion that nobody here wrote.
#[test]
fn dense_and_cross_entropy_agree_with_candle_nn() {
    use candle_nn::{Linear, Module, loss::binary_cross_entropy_with_logit};
    let (x, w, b) = (
        variable(11, &[5, 37]),
        variable(12, &[1, 37]),
        variable(13, &[1]),
    );
    let labels = [1_f32, 0.0, 1.0, 1.0, 0.0];
    let targets: Vec<f32> = labels.iter().flat_map(|label| [*label, 1.0]).collect();
    let targets = Tensor::from_vec(targets, (5, 2), &Device::Cpu).unwrap();
    let labels = Tensor::from_slice(&labels, (5, 1), &Device::Cpu).unwrap();
    let ours = x.apply_op3(&w, &b, Dense { has_relu: false }).unwrap();
    let ours = ours.apply_op2(&targets, BinaryCrossEntropy).unwrap();
    let linear = Linear::new(w.as_tensor().clone(), Some(b.as_tensor().clone()));
    let theirs = binary_cross_entropy_with_logit(&linear.forward(&x).unwrap(), &labels).unwrap();
    assert!((scalar(&ours) - scalar(&theirs)).abs() < 1e-6);
    let (ours, theirs) = (ours.backward().unwrap(), theirs.backward().unwrap());
    for variable in [&x, &w, &b] {
        let of = |store: &candle_core::backprop::GradStore| values(store.get(variable).unwrap());
        for (a, b) in of(&ours).iter().zip(of(&theirs)) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }
}
