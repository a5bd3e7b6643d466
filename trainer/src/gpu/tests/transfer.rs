//! Transfer learners on the GPU against their definition in f64, and steps of theirs against the CPU's.

use candle_core::{Device as Cpu, Tensor};

use super::emulator::{device, turn};
use super::reference::bf16;
use super::{distance, memory};
use crate::architecture::{Architecture, Family, OptimiserKind, find};
use crate::backbone::{Backbone, Layer, Node, Source, Window, backbone};
use crate::gpu::network::{Design, Images, Network, Targets};
use crate::network::Network as OnCpu;
use crate::operators::loss::BinaryCrossEntropy;
use crate::operators::optimiser::{AdamStep, Moments, adam_rate};
use crate::random::Random;
use crate::train::Precision;
use crate::transfer::definition::{Definition, Values};
use crate::transfer::{First, plan};

/// Adam's, as for fine-tuning.
const RATE: f64 = 1e-4;

/// A backbone in the making.
struct Draft(Vec<Node>);

impl Draft {
    fn push(&mut self, layer: Layer, inputs: &[Source], channels: usize) -> Source {
        let name = format!("node{}", self.0.len());
        let inputs = inputs.to_vec();
        self.0.push(Node {
            name,
            layer,
            inputs,
            channels,
        });
        Source::Node(self.0.len() - 1)
    }

    /// Kernel, stride, padding.
    fn convolution(
        &mut self,
        input: Source,
        channels: usize,
        (kernel, stride, padding): ([usize; 2], usize, [usize; 2]),
        has_relu: bool,
    ) -> Source {
        let name = format!("node{}", self.0.len());
        let layer = Layer::Convolution {
            kernel_name: format!("{name}.conv"),
            norm_name: format!("{name}.bn"),
            window: Window {
                kernel,
                stride,
                padding,
            },
            has_relu,
        };
        self.push(layer, &[input], channels)
    }

    fn finish(mut self, last: Source) -> Backbone {
        let Source::Node(index) = last else {
            unreachable!("the last layer is no image")
        };
        let channels = self.0[index].channels;
        self.push(Layer::GlobalAverage, &[last], channels);
        Backbone {
            nodes: self.0,
            mean: [0.485, 0.5, 0.406],
            deviation: [0.229, 0.5, 0.225],
            epsilon: 1e-3,
            weights_name: "none",
        }
    }
}

const fn window(kernel: usize, stride: usize, padding: usize) -> Window {
    Window {
        kernel: [kernel; 2],
        stride,
        padding: [padding; 2],
    }
}

/// Sums: a shortcut with a convolution and one without, a pool with padding before them, units that are no multiple of 8.
fn sums() -> Backbone {
    let mut draft = Draft(Vec::new());
    let stem = draft.convolution(Source::Image, 5, ([7, 7], 2, [3, 3]), true);
    let mut last = draft.push(Layer::MaxPool(window(3, 2, 1)), &[stem], 5);
    for (stride, narrow) in [(2, 12), (1, 9)] {
        let first = draft.convolution(last, narrow, ([1, 1], 1, [0, 0]), true);
        let second = draft.convolution(first, narrow, ([3, 3], stride, [1, 1]), true);
        let third = draft.convolution(second, 20, ([1, 1], 1, [0, 0]), false);
        if stride == 2 {
            last = draft.convolution(last, 20, ([1, 1], 2, [0, 0]), false);
        }
        last = draft.push(Layer::AddRelu, &[third, last], 20);
    }
    draft.finish(last)
}

/// Concatenations: one within the other, long kernels, both pools as branches, parts whose channels do not fill 8.
fn concatenations() -> Backbone {
    let mut draft = Draft(Vec::new());
    let stem = draft.convolution(Source::Image, 5, ([3, 3], 2, [0, 0]), true);
    let pooled = draft.push(Layer::MaxPool(window(2, 1, 0)), &[stem], 5);
    let one = draft.convolution(pooled, 5, ([1, 1], 1, [0, 0]), true);
    let long = draft.convolution(pooled, 9, ([1, 7], 1, [0, 3]), true);
    let [wide, high] = [([1, 5], 1, [0, 2]), ([5, 1], 1, [2, 0])]
        .map(|shape| draft.convolution(long, 3, shape, true));
    let both = draft.push(Layer::Concat, &[wide, high], 6);
    let mean = draft.push(Layer::AveragePool(window(3, 1, 1)), &[pooled], 5);
    let cell = draft.push(Layer::Concat, &[one, both, mean], 16);
    let narrow = draft.convolution(cell, 10, ([3, 3], 2, [0, 0]), true);
    let largest = draft.push(Layer::MaxPool(window(3, 2, 0)), &[cell], 16);
    let means = draft.push(Layer::AveragePool(window(3, 2, 0)), &[cell], 16);
    let last = draft.push(Layer::Concat, &[narrow, largest, means], 42);
    draft.finish(last)
}

/// Parameters that are all different, by name and in the files' order.
fn parameters(backbone: &Backbone, random: &mut Random) -> (Vec<String>, Vec<Vec<f32>>) {
    let plans = plan(backbone, false).into_iter();
    let draw = plans.map(|plan| {
        let n: usize = plan.shape.iter().product();
        let mut share = || random.uniform() as f32;
        let value = |share: &mut dyn FnMut() -> f32| match plan.first {
            First::Glorot(fan_in, _) => (share() - 0.5) * (12.0 / fan_in as f32).sqrt(),
            First::Constant(value) => value * (0.75 + share() / 2.0) + 0.2 * (share() - 0.25),
        };
        let values = (0..n).map(|_| value(&mut share)).collect();
        (plan.name, values)
    });
    draw.unzip()
}

/// Noise, and areas of one value, in which every window has ties.
fn pixels(n: usize, side: usize, random: &mut Random) -> Vec<u8> {
    let value = |at: usize| {
        let (row, column) = (at / side % side, at % side);
        if row < side / 2 {
            random.below(256)
        } else {
            60 * (row / 9 + column / 11 + at / side / side) % 256
        }
    };
    let values = (0..n * 3 * side * side).map(value);
    values.map(|value| u8::try_from(value).unwrap()).collect()
}

/// Label and weight of each image.
fn targets(n: usize) -> Vec<f32> {
    let of_image = |at: usize| [(at % 2) as f32, 1.0 + at as f32 / 4.0];
    (0..n).flat_map(of_image).collect()
}

/// The memory that a step reads and writes.
struct Step {
    pixels: crate::gpu::device::Memory,
    numbers: crate::gpu::device::Memory,
    targets: crate::gpu::device::Memory,
    loss: crate::gpu::device::Memory,
    n: usize,
}

impl Step {
    fn new(network: &Network, pixels: &[u8], n: usize) -> Self {
        Self {
            pixels: memory(network, pixels),
            numbers: memory(network, &(0..n as i64).collect::<Vec<_>>()),
            targets: memory(network, &targets(n)),
            loss: memory(network, &[f32::NAN]),
            n,
        }
    }

    fn images(&self) -> Images {
        Images {
            pixels: self.pixels.pointer(),
            numbers: self.numbers.pointer(),
            changes: 0,
            n: self.n,
        }
    }

    /// Computes loss and gradients.
    fn run(&self, network: &mut Network) -> f32 {
        let targets = Targets {
            targets: self.targets.pointer(),
            n_total: self.n,
            loss: self.loss.pointer(),
        };
        let run = network.gradients_of(self.images(), targets, |_, _| Ok(()));
        run.unwrap();
        network.base.device.read(&self.loss, 0, 1).unwrap()[0]
    }
}

#[track_caller]
fn check(backbone: &Backbone, side: usize, bounds: [(f64, f64); 2]) {
    let _turn = turn();
    let mut random = Random::new(9, 0);
    let n = 2;
    let (names, weights) = parameters(backbone, &mut random);
    let pixels = pixels(n, side, &mut random);
    let wide = weights.iter().map(|w| w.iter().map(|v| f64::from(*v)));
    let values: Values = names
        .iter()
        .cloned()
        .zip(wide.map(Iterator::collect))
        .collect();
    for (precision, (near, far)) in [Precision::F32, Precision::Bf16].into_iter().zip(bounds) {
        let definition = Definition {
            backbone,
            weights: &values,
            side,
            stored: match precision {
                Precision::F32 => |value| value,
                Precision::Bf16 => bf16,
            },
        };
        let targets = targets(n);
        let images = pixels.chunks_exact(3 * side * side);
        let expected = definition.step(images.zip(targets.as_chunks().0.iter().copied()), n);
        let design = Design::Transfer {
            backbone: backbone.clone(),
            is_trained: true,
        };
        let adam = OptimiserKind::Adam;
        let mut network = Network::new(device(), design, side, n + 1, precision, adam).unwrap();
        network
            .set(&weights, &vec![Moments::default(); weights.len()])
            .unwrap();
        let step = Step::new(&network, &pixels, n);
        let loss = f64::from(step.run(&mut network));
        let logits = network.logits(step.images()).unwrap();
        let apart = distance(&logits, &expected.logits);
        assert!(apart < near, "{precision:?}: logits differ by {apart:e}");
        assert!(
            (loss - expected.loss).abs() < near * expected.loss,
            "{precision:?}: loss {loss} not {}",
            expected.loss
        );
        let gradients = network.gradients().unwrap();
        let mut n_closed = 0;
        for (name, found) in names.iter().zip(&gradients) {
            if name.contains(".running_") {
                assert!(found.is_empty());
                continue;
            }
            let expected = &expected.gradients[name];
            let apart = distance(found, expected);
            assert!(
                apart < far,
                "{precision:?}: gradient of {name} differs by {apart:e}"
            );
            n_closed += usize::from(expected.iter().all(|value| *value == 0.0));
        }
        // Of four channels all may be closed.
        assert!(
            20 * n_closed < names.len(),
            "{n_closed} gradients are nothing"
        );
    }
}

#[test]
fn sums_and_their_gradients_are_the_definition() {
    check(&sums(), 29, [(2e-6, 2e-5), (2e-3, 8e-3)]);
}

#[test]
fn concatenations_and_their_gradients_are_the_definition() {
    check(&concatenations(), 26, [(2e-6, 2e-5), (2e-3, 8e-3)]);
}

#[test]
fn resnet_and_its_gradients_are_the_definition() {
    let backbone = backbone(Family::Resnet50, 0.001).unwrap();
    check(&backbone, 35, [(2e-6, 2e-5), (2e-3, 8e-3)]);
}

#[test]
fn inception_and_its_gradients_are_the_definition() {
    let backbone = backbone(Family::InceptionV3, 0.001).unwrap();
    check(&backbone, 79, [(1e-4, 1e-3), (2e-2, 8e-2)]);
}

/// Losses of Adam's first steps on the CPU and on the GPU, from the same weights.
#[track_caller]
fn follow(architecture: &'static Architecture, side: usize, precision: Precision, bound: f32) {
    let _turn = turn();
    let (n, n_steps) = (4, 3);
    let mut random = Random::new(2, 0);
    let pixels = pixels(n, side, &mut random);
    let cpu = OnCpu::new(architecture, 0.001, 5, &Cpu::Cpu).unwrap();
    let images = Tensor::from_slice(&pixels, (n, 3, side, side), &Cpu::Cpu).unwrap();
    // Not the statistics of these images: normalising four channels by those of few places would magnify bf16's rounding.
    let (_, drawn) = parameters(cpu.backbone().unwrap(), &mut random);
    for (parameter, values) in cpu.parameters().iter().zip(drawn) {
        let shape = parameter.variable.shape();
        let tensor = Tensor::from_vec(values, shape, &Cpu::Cpu).unwrap();
        parameter.variable.set(&tensor).unwrap();
    }
    let values = |cpu: &OnCpu| -> Vec<Vec<f32>> {
        let all = cpu.parameters().iter();
        all.map(|p| p.variable.flatten_all().unwrap().to_vec1().unwrap())
            .collect()
    };
    let before = values(&cpu);
    let mut moments = vec![Moments::default(); before.len()];
    let design = Design::of(architecture, 0.001);
    let adam = OptimiserKind::Adam;
    let mut gpu = Network::new(device(), design, side, n, precision, adam).unwrap();
    gpu.set(&before, &moments).unwrap();
    gpu.tune(n).unwrap();
    let step = Step::new(&gpu, &pixels, n);
    let targets = Tensor::from_vec(targets(n), (n, 2), &Cpu::Cpu).unwrap();
    for number in 1..=n_steps {
        let logits = cpu.forward(&images).unwrap();
        let loss = logits.apply_op2(&targets, BinaryCrossEntropy).unwrap();
        let gradients = loss.backward().unwrap();
        let parameters = cpu.parameters().iter().zip(&mut moments);
        for (parameter, moments) in parameters.filter(|(p, _)| p.is_trained) {
            let gradient = gradients.get(&parameter.variable).unwrap();
            let adam = AdamStep::new(moments, number, RATE);
            adam.apply(&parameter.variable, gradient).unwrap();
        }
        let (expected, found) = (loss.to_scalar::<f32>().unwrap(), step.run(&mut gpu));
        gpu.update(adam_rate(number, RATE)).unwrap();
        eprintln!(
            "{} {precision:?} {number}: {found} {expected}",
            architecture.name
        );
        assert!(
            (found - expected).abs() <= bound * expected.max(0.05),
            "{} {precision:?} step {number}: {found} not {expected}",
            architecture.name
        );
    }
    let (after, after_moments) = gpu.get().unwrap();
    let on_cpu = values(&cpu);
    let pairs = before.iter().zip(&on_cpu).zip(&after);
    let all = cpu.parameters().iter().zip(pairs).zip(&after_moments);
    for ((parameter, ((before, on_cpu), on_gpu)), moments) in all {
        // Of four channels all may be closed: then nothing is learned here or there.
        assert_eq!(before == on_cpu, before == on_gpu, "{}", parameter.name);
        assert_eq!(parameter.is_trained, !moments.first.is_empty());
    }
}

#[test]
fn steps_of_transfer_learners_follow_the_cpu() {
    // The table's Inception-v3 is frozen; it could be fine-tuned all the same.
    let unfrozen = Box::leak(Box::new(Architecture {
        is_backbone_frozen: false,
        ..*find("inception-v3").unwrap()
    }));
    for (architecture, side) in [
        (find("resnet50").unwrap(), 35),
        (find("resnet50-frozen").unwrap(), 35),
        (find("inception-v3").unwrap(), 79),
        (unfrozen, 79),
    ] {
        follow(architecture, side, Precision::F32, 1e-5);
        follow(architecture, side, Precision::Bf16, 1e-2);
    }
}

#[test]
fn nan_is_not_hidden_by_a_backbone() {
    let _turn = turn();
    for backbone in [sums(), concatenations()] {
        let mut random = Random::new(9, 0);
        let (names, mut weights) = parameters(&backbone, &mut random);
        let first = names
            .iter()
            .position(|name| name == "node0.bn.bias")
            .unwrap();
        weights[first].fill(f32::NAN);
        let design = Design::Transfer {
            backbone,
            is_trained: false,
        };
        let (precision, sgd) = (Precision::Bf16, OptimiserKind::Sgd);
        let mut network = Network::new(device(), design, 29, 1, precision, sgd).unwrap();
        network.set(&weights, &[]).unwrap();
        let step = Step::new(&network, &[9; 3 * 29 * 29], 1);
        assert!(network.logits(step.images()).unwrap()[0].is_nan());
    }
}
