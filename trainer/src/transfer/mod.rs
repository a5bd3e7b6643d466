//! The transfer learners: a backbone of convolutions with batch normalisation, and one dense layer `fc` on its features.
//!
//! In: u8 images `[image, 3, row, column]` and weights under torchvision's names (`layer1.0.conv1.weight`, `layer1.0.bn1.running_mean`, ...,
//! `fc.weight [1, features]`, `fc.bias`). Out: features and logits. Which layers there are is [`crate::backbone`]'s.
//!
//! **Normalisation.** The batch normalisations keep the means and variances of their weights file, also while a backbone is
//! fine-tuned (as Keras' guide to transfer learning has it): with batches of a few dozen slices of few studies, statistics of the batch
//! would say more of the batch than of the data. So `gamma (W x - mean) / sqrt(variance + epsilon) + beta` is a convolution with folded kernel and bias,
//! in training as in the exported file, and gamma and beta learn through the folding. Random weights get their statistics from the first images:
//! [`settle`].

#[cfg(test)]
pub(crate) mod definition;

use candle_core::{D, DType, Result, Tensor, Var, bail};

use crate::backbone::{Backbone, Layer, Node, Source, Window};
use crate::network::{Parameter, Plan};
use crate::operators::dense::Dense;
use crate::operators::spatial::{AddRelu, Convolution, Pool, Pooled};

/// Parameters of one convolution: kernel, gamma, beta, mean, variance.
pub(crate) const PER_CONVOLUTION: usize = 5;
/// Endings of the names of a normalisation, in the order of the parameters behind the kernel.
const NORM_FIELDS: [&str; 4] = ["weight", "bias", "running_mean", "running_var"];

/// The parameters of a transfer learner, in the order the data meets them.
pub(crate) fn plan(backbone: &Backbone, is_frozen: bool) -> Vec<Plan> {
    let mut plans = Vec::new();
    for node in &backbone.nodes {
        let Layer::Convolution {
            kernel_name,
            norm_name,
            window,
            ..
        } = &node.layer
        else {
            continue;
        };
        let n_in = backbone.channels_of(node.inputs[0]);
        let [rows, columns] = window.kernel;
        let taps = rows * columns;
        plans.push(Plan {
            name: format!("{kernel_name}.weight"),
            shape: vec![node.channels, n_in, rows, columns],
            first: First::Glorot(taps * n_in, taps * node.channels),
            is_trained: !is_frozen,
        });
        for (field, value) in NORM_FIELDS.into_iter().zip([1.0, 0.0, 0.0, 1.0]) {
            plans.push(Plan {
                name: format!("{norm_name}.{field}"),
                shape: vec![node.channels],
                first: First::Constant(value),
                is_trained: !is_frozen && !field.starts_with("running"),
            });
        }
    }
    let n_features = backbone.n_features();
    plans.push(Plan {
        name: "fc.weight".into(),
        shape: vec![1, n_features],
        first: First::Glorot(n_features, 1),
        is_trained: true,
    });
    plans.push(Plan {
        name: "fc.bias".into(),
        shape: vec![1],
        first: First::Constant(0.0),
        is_trained: true,
    });
    plans
}

/// First values of a parameter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum First {
    /// Uniform, by the fans in and out.
    Glorot(usize, usize),
    /// All the same.
    Constant(f32),
}

/// Features `[image, feature]` of u8 images `[image, 3, row, column]`.
pub(crate) fn features(
    backbone: &Backbone,
    parameters: &[Parameter],
    images: &Tensor,
) -> Result<Tensor> {
    let map = walk(backbone, images, |index, has_input_gradient, input| {
        let of_layer = &parameters[index * PER_CONVOLUTION..][..PER_CONVOLUTION];
        let (window, has_relu) = convolution_at(backbone, index)?;
        let (kernel, bias) = folded(backbone, of_layer)?;
        let operator = Convolution {
            window,
            has_relu,
            needs_input_gradient: has_input_gradient && of_layer[0].is_trained,
        };
        input.apply_op3(&kernel, &bias, operator)
    })?;
    map.flatten_from(1)
}

/// Logits `[image, 1]` of features.
pub(crate) fn head(parameters: &[Parameter], features: &Tensor) -> Result<Tensor> {
    let [.., weight, bias] = parameters else {
        bail!("a transfer learner without `fc`")
    };
    features.apply_op3(
        weight.variable.as_tensor(),
        bias.variable.as_tensor(),
        Dense { has_relu: false },
    )
}

/// Sets each normalisation's mean and variance to what its convolution gives on `images`: random weights then begin with outputs of mean
/// 0 and variance 1, as a first batch would give them.
pub(crate) fn settle(backbone: &Backbone, parameters: &[Parameter], images: &Tensor) -> Result<()> {
    walk(backbone, images, |index, _, input| {
        let of_layer = &parameters[index * PER_CONVOLUTION..][..PER_CONVOLUTION];
        let (window, has_relu) = convolution_at(backbone, index)?;
        let raw = |kernel: &Tensor, bias: &Tensor, has_relu| {
            let operator = Convolution {
                window,
                has_relu,
                needs_input_gradient: false,
            };
            input
                .detach()
                .apply_op3(&kernel.detach(), &bias.detach(), operator)
        };
        let zeros = of_layer[2].variable.zeros_like()?;
        let output = raw(of_layer[0].variable.as_tensor(), &zeros, false)?;
        let by_channel = output
            .transpose(0, 1)?
            .flatten_from(1)?
            .to_dtype(DType::F64)?;
        let mean = by_channel.mean_keepdim(D::Minus1)?;
        let variance = by_channel.broadcast_sub(&mean)?.sqr()?.mean(D::Minus1)?;
        let set = |variable: &Var, value: Tensor| variable.set(&value.to_dtype(DType::F32)?);
        set(&of_layer[3].variable, mean.squeeze(D::Minus1)?)?;
        set(&of_layer[4].variable, variance)?;
        let (kernel, bias) = folded(backbone, of_layer)?;
        raw(&kernel, &bias, has_relu)
    })?;
    Ok(())
}

/// Kernel and bias of a convolution with its normalisation; they carry the gradients of kernel, gamma and beta where these are trained.
fn folded(backbone: &Backbone, of_layer: &[Parameter]) -> Result<(Tensor, Tensor)> {
    let tensor = |index: usize| {
        let parameter: &Parameter = &of_layer[index];
        if parameter.is_trained {
            parameter.variable.as_tensor().clone()
        } else {
            parameter.variable.as_detached_tensor()
        }
    };
    let (kernel, gamma, beta, mean, variance) =
        (tensor(0), tensor(1), tensor(2), tensor(3), tensor(4));
    let deviation = (variance + f64::from(backbone.epsilon))?.sqrt()?;
    let factor = (gamma / deviation)?;
    let bias = (beta - (mean * &factor)?)?;
    let kernel = kernel.broadcast_mul(&factor.reshape(((), 1, 1, 1))?)?;
    Ok((kernel, bias))
}

/// Window and ReLU of the convolution with that number.
fn convolution_at(backbone: &Backbone, index: usize) -> Result<(Window, bool)> {
    let mut convolutions = backbone.nodes.iter().filter_map(|node| match &node.layer {
        Layer::Convolution {
            window, has_relu, ..
        } => Some((*window, *has_relu)),
        _ => None,
    });
    match convolutions.nth(index) {
        Some(found) => Ok(found),
        None => bail!("no convolution {index}"),
    }
}

/// Runs the nodes in their order. `convolve` gets the number of the convolution, whether its input is a feature map, and the input. A
/// feature map is dropped when its last reader is done.
fn walk(
    backbone: &Backbone,
    images: &Tensor,
    mut convolve: impl FnMut(usize, bool, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let image = normalised(backbone, images)?;
    let mut maps: Vec<Option<Tensor>> = Vec::with_capacity(backbone.nodes.len());
    let last_readers = last_readers(&backbone.nodes);
    let mut n_convolutions = 0;
    for (number, node) in backbone.nodes.iter().enumerate() {
        let of_source = |source: &Source| match *source {
            Source::Image => Ok(&image),
            Source::Node(index) => match maps.get(index) {
                Some(Some(map)) => Ok(map),
                _ => bail!("{}: input {index} is not there", node.name),
            },
        };
        let inputs: Vec<&Tensor> = node.inputs.iter().map(of_source).collect::<Result<_>>()?;
        let [first, others @ ..] = inputs.as_slice() else {
            bail!("{} has no input", node.name)
        };
        let pool = |pooled, window| first.apply_op1(Pool { pooled, window });
        let map = match &node.layer {
            Layer::Convolution { .. } => {
                n_convolutions += 1;
                let is_map = node.inputs[0] != Source::Image;
                convolve(n_convolutions - 1, is_map, first)?
            }
            Layer::MaxPool(window) => pool(Pooled::Largest, *window)?,
            Layer::AveragePool(window) => pool(Pooled::Mean, *window)?,
            Layer::GlobalAverage => pool(Pooled::Mean, whole(first)?)?,
            Layer::AddRelu => match others {
                [second] => first.apply_op2(second, AddRelu)?,
                _ => bail!("{} does not add two inputs", node.name),
            },
            Layer::Concat => Tensor::cat(&inputs, 1)?,
        };
        maps.push(Some(map));
        for (index, last) in last_readers.iter().enumerate() {
            if *last == Some(number) {
                maps[index] = None;
            }
        }
    }
    match maps.pop().flatten() {
        Some(map) => Ok(map),
        None => bail!("a backbone without layers"),
    }
}

/// For each node the last one that reads it.
fn last_readers(nodes: &[Node]) -> Vec<Option<usize>> {
    let mut last = vec![None; nodes.len()];
    for (number, node) in nodes.iter().enumerate() {
        for source in &node.inputs {
            if let Source::Node(index) = *source {
                last[index] = Some(number);
            }
        }
    }
    last
}

/// The window that covers a whole feature map.
fn whole(map: &Tensor) -> Result<Window> {
    let (_, _, rows, columns) = map.dims4()?;
    Ok(Window {
        kernel: [rows, columns],
        stride: 1,
        padding: [0, 0],
    })
}

/// u8 images to what the backbone was trained on: `(x / 255 - mean) / deviation` in each channel.
fn normalised(backbone: &Backbone, images: &Tensor) -> Result<Tensor> {
    let of_channels = |values: [f32; 3]| Tensor::from_slice(&values, (1, 3, 1, 1), images.device());
    let scaled = (images.to_dtype(DType::F32)? * (1.0 / 255.0))?;
    scaled
        .broadcast_sub(&of_channels(backbone.mean)?)?
        .broadcast_div(&of_channels(backbone.deviation)?)
}

#[cfg(test)]
mod tests;
