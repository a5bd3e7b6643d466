//! The network: from a batch of images to logits, with its weights as candle variables.
//!
//! In: u8 images `[image, 3, 256, 256]`, channels lung, PE, mediastinal; scaling by 1/255 is part of the network. Out: one
//! logit an image; its sigmoid is the probability of PE. Which layers there are is [`crate::architecture`]'s; the
//! arithmetic is [`crate::operators`]'.

mod weights_file;

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor, Var};

use crate::architecture::{Architecture, Family, pooled_side};
use crate::backbone::{Backbone, backbone};
use crate::initialise::glorot_uniform;
use crate::operators::convolution::ConvolutionReluPool;
use crate::operators::dense::{Dense, Flatten};
use crate::quantization_aware::{Scales, TrainedRanges};
use crate::transfer::{self, First};

pub(crate) use self::weights_file::to_safetensors;

/// Why a network was not built, run, loaded or saved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// No such row, or a row without weights.
    #[error("`{0}` is not a network that can be trained")]
    NotTrainable(String),
    /// A network without backbone was asked for features.
    #[error("`{0}` has no backbone")]
    NoBackbone(String),
    /// The int8 graph has no form for it.
    #[error("`{0}` is no chain of layers: the int8 graph does not take it")]
    NotQuantized(String),
    /// The weights file lacks something or has another shape.
    #[error("weights file {path}: {fault}")]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
    /// The file could not be read or written.
    #[error("weights file {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A weights variable and the name it has in files.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// `conv1.weight`, `conv1.bias`, ..., `dense2.bias`; those of the transfer learners as torchvision names them.
    pub name: String,
    /// The values, f32.
    pub variable: Var,
    /// Whether training changes it.
    pub is_trained: bool,
}

/// A network with its weights.
#[derive(Debug)]
pub struct Network {
    architecture: &'static Architecture,
    width: f64,
    device: Device,
    parameters: Vec<Parameter>,
    body: Body,
    /// What the forward pass rounds to, where it computes as the int8 graph does.
    scales: Option<Scales>,
    /// How the weights came about, as their file says it beside architecture and width; see [`crate::provenance`].
    pub provenance: BTreeMap<String, String>,
}

/// What the images go through.
#[derive(Debug)]
enum Body {
    /// Convolutions with ReLU and max pool, and two dense layers.
    Convolutional { n_convolutions: usize },
    /// A backbone and one dense layer.
    Transfer(Backbone),
}

/// One parameter, before it has values.
pub(crate) struct Plan {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) first: First,
    pub(crate) is_trained: bool,
}

/// The parameters of a convolutional row, in the order the data meets them.
fn plan(architecture: &Architecture, width: f64, side: usize) -> Vec<Plan> {
    let units = architecture.scaled(width);
    let mut plans = Vec::new();
    let mut channels_in = shared::CHANNELS;
    let mut layer = |name: String, shape: Vec<usize>, fans: (usize, usize)| {
        let n_out = shape[0];
        plans.push(Plan {
            name: format!("{name}.weight"),
            shape,
            first: First::Glorot(fans.0, fans.1),
            is_trained: true,
        });
        plans.push(Plan {
            name: format!("{name}.bias"),
            shape: vec![n_out],
            first: First::Constant(0.0),
            is_trained: true,
        });
    };
    for (index, &channels) in units.convolutions.iter().enumerate() {
        layer(
            format!("conv{}", index + 1),
            vec![channels, channels_in, 3, 3],
            (9 * channels_in, 9 * channels),
        );
        channels_in = channels;
    }
    let side = pooled_side(side, units.convolutions.len());
    let n_flat = channels_in * side * side;
    layer(
        "dense1".into(),
        vec![units.dense, n_flat],
        (n_flat, units.dense),
    );
    layer("dense2".into(), vec![1, units.dense], (units.dense, 1));
    plans
}

impl Network {
    /// A network with Glorot-uniform weights and zero biases drawn from `seed`.
    ///
    /// # Errors
    /// When the row has no weights to train.
    pub fn new(
        architecture: &'static Architecture,
        width: f64,
        seed: u64,
        device: &Device,
    ) -> Result<Self, NetworkError> {
        Self::for_side(architecture, width, shared::SIDE, seed, device)
    }

    /// As [`Network::new`], for images of `side` rows and columns: the tests' small images.
    ///
    /// # Errors
    /// When the row has no weights to train.
    pub fn for_side(
        architecture: &'static Architecture,
        width: f64,
        side: usize,
        seed: u64,
        device: &Device,
    ) -> Result<Self, NetworkError> {
        let (body, plans) = match (architecture.family, backbone(architecture.family, width)) {
            (_, Some(backbone)) => {
                let plans = transfer::plan(&backbone, architecture.is_backbone_frozen);
                (Body::Transfer(backbone), plans)
            }
            (Family::Convolutional, None) => {
                let n_convolutions = architecture.convolutions.len();
                let body = Body::Convolutional { n_convolutions };
                (body, plan(architecture, width, side))
            }
            _ => return Err(NetworkError::NotTrainable(architecture.name.into())),
        };
        let mut parameters = Vec::new();
        for (stream, plan) in (0u64..).zip(plans) {
            let n: usize = plan.shape.iter().product();
            let first = match plan.first {
                First::Glorot(fan_in, fan_out) => glorot_uniform(n, fan_in, fan_out, seed, stream),
                First::Constant(value) => vec![value; n],
            };
            let variable = Var::from_tensor(&Tensor::from_vec(first, plan.shape, device)?)?;
            parameters.push(Parameter {
                name: plan.name,
                variable,
                is_trained: plan.is_trained,
            });
        }
        Ok(Self {
            architecture,
            width,
            device: device.clone(),
            parameters,
            body,
            scales: None,
            provenance: BTreeMap::new(),
        })
    }

    /// Logits `[image, 1]` f32 of u8 images `[image, 3, row, column]`.
    ///
    /// # Errors
    /// When the images have another shape or type.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor, NetworkError> {
        match &self.body {
            Body::Convolutional { n_convolutions } => self.convolutional(images, *n_convolutions),
            Body::Transfer(_) => self.head(&self.features(images)?),
        }
    }

    /// Features `[image, feature]` f32 of a transfer learner's backbone; [`Network::head`] makes logits of them.
    ///
    /// # Errors
    /// As [`Network::forward`]; where there is no backbone.
    pub fn features(&self, images: &Tensor) -> Result<Tensor, NetworkError> {
        let backbone = self.backbone()?;
        Ok(transfer::features(backbone, &self.parameters, images)?)
    }

    /// Logits `[image, 1]` f32 of a backbone's features.
    ///
    /// # Errors
    /// As [`Network::features`].
    pub fn head(&self, features: &Tensor) -> Result<Tensor, NetworkError> {
        self.backbone()?;
        Ok(transfer::head(&self.parameters, features)?)
    }

    /// Sets the statistics of a backbone's normalisations to those of `images`, for random weights; nothing where there is no backbone.
    ///
    /// # Errors
    /// As [`Network::forward`].
    pub fn settle(&self, images: &Tensor) -> Result<(), NetworkError> {
        if let Body::Transfer(backbone) = &self.body {
            transfer::settle(backbone, &self.parameters, images)?;
        }
        Ok(())
    }

    /// Whether it is a transfer learner.
    #[must_use]
    pub fn has_backbone(&self) -> bool {
        matches!(self.body, Body::Transfer(_))
    }

    /// Whether the features of an image stay what they are while the network learns.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.has_backbone() && self.architecture.is_backbone_frozen
    }

    pub(crate) fn backbone(&self) -> Result<&Backbone, NetworkError> {
        match &self.body {
            Body::Transfer(backbone) => Ok(backbone),
            Body::Convolutional { .. } => {
                Err(NetworkError::NoBackbone(self.architecture.name.into()))
            }
        }
    }

    fn convolutional(
        &self,
        images: &Tensor,
        n_convolutions: usize,
    ) -> Result<Tensor, NetworkError> {
        let mut map = images.clone();
        let mut layers = self.parameters.chunks_exact(2).enumerate();
        let mut n_channels = 0;
        for (index, layer) in layers.by_ref().take(n_convolutions) {
            let (weight, bias) = self.layer(index, layer)?;
            // Rounding is monotonic, so that it may follow the pool, where the int8 graph has it before and after.
            map = map.apply_op3(&weight, &bias, ConvolutionReluPool::new(index > 0))?;
            map = self.activation(index, map)?;
            n_channels = weight.dim(0)?;
        }
        let mut flat = map.apply_op1(Flatten { n_channels })?;
        for ((index, layer), has_relu) in layers.zip([true, false]) {
            let (weight, bias) = self.layer(index, layer)?;
            flat = flat.apply_op3(&weight, &bias, Dense { has_relu })?;
            flat = self.activation(index, flat)?;
        }
        Ok(flat)
    }

    /// Weight and bias of a layer, rounded where the network is quantized.
    fn layer(&self, index: usize, layer: &[Parameter]) -> Result<(Tensor, Tensor), NetworkError> {
        Ok(match &self.scales {
            Some(scales) => scales.layer(index, layer)?,
            None => (
                layer[0].variable.as_tensor().clone(),
                layer[1].variable.as_tensor().clone(),
            ),
        })
    }

    /// A layer's output, rounded where the network is quantized.
    fn activation(&self, index: usize, map: Tensor) -> Result<Tensor, NetworkError> {
        Ok(match &self.scales {
            Some(scales) => scales.activation(index, &map)?,
            None => map,
        })
    }

    /// From now on the forward pass computes what the int8 file of these weights and `ranges` computes. The weights stay f32.
    ///
    /// # Errors
    /// A transfer learner, which the int8 graph does not take; an activation without range.
    pub fn quantize(&mut self, ranges: &TrainedRanges) -> Result<(), NetworkError> {
        let Body::Convolutional { n_convolutions } = self.body else {
            return Err(NetworkError::NotQuantized(self.architecture.name.into()));
        };
        self.scales = Some(Scales::new(ranges, n_convolutions + 1)?);
        Ok(())
    }

    /// From now on the forward pass computes in f32 again.
    pub fn compute_in_f32(&mut self) {
        self.scales = None;
    }

    /// The weights in the order the data meets them.
    #[must_use]
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// How many values the weights hold together.
    #[must_use]
    pub fn n_parameters(&self) -> usize {
        self.parameters
            .iter()
            .map(|parameter| parameter.variable.elem_count())
            .sum()
    }

    /// The row of the publication's table.
    #[must_use]
    pub fn architecture(&self) -> &'static Architecture {
        self.architecture
    }

    /// The width factor.
    #[must_use]
    pub fn width(&self) -> f64 {
        self.width
    }
}
