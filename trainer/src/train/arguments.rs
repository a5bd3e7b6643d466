//! The command line of `trainer train`.

use std::path::PathBuf;

use anyhow::Result;

use super::{DEFAULT_BATCH, Precision, Processor, Schedule, TrainOptions, checked};
use crate::architecture::parse_width;
use crate::batches::{Augmentation, Sampling};
use crate::quantize::WeightBits;
use crate::split::SplitBy;

/// The arguments of `trainer train`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer train --data cache --width 0.125 --out runs/mine\n  \
    trainer train --data cache --width 0.125 --out runs/mine --resume\n  \
    trainer train --data cache --sampling all --class-weights --patience 3 --schedule cosine --shift 4 --out runs/all\n  \
    trainer train --data cache --model resnet50 --init resnet50.safetensors --out runs/resnet\n\n\
    Ctrl-C once saves and stops; --resume goes on. Without --resume a folder that holds a run is left as it is."
)]
pub struct TrainArgs {
    /// Cache folder of `trainer prepare`
    #[arg(long, value_name = "CACHE")]
    pub data: PathBuf,
    /// Run folder
    #[arg(long, value_name = "RUN")]
    pub out: PathBuf,
    /// A row of the publication's table: vanilla, adam, increasing, two-conv, two-conv-dense256, two-conv-dense64, halving, halving-5k,
    /// halving-15ep, final, resnet50, resnet50-frozen or inception-v3
    #[arg(long, value_name = "NAME", default_value = "final")]
    pub model: String,
    /// Factor on the units of every convolution and hidden dense layer
    #[arg(long, value_name = "F", default_value_t = 1.0, value_parser = parse_width)]
    pub width: f64,
    /// Passes over the training part [default: the architecture's]
    #[arg(long, value_name = "N")]
    pub epochs: Option<u32>,
    /// Images in a step
    #[arg(long, value_name = "N", default_value_t = DEFAULT_BATCH)]
    pub batch: usize,
    /// Seed of weights, sampling, order and augmentation
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// What is kept together between the parts; `image` reproduces the publication's leak
    #[arg(long, value_enum, default_value = "study")]
    pub split: SplitBy,
    /// Which slices of the training part are used
    #[arg(long, value_enum, default_value = "balanced")]
    pub sampling: Sampling,
    /// Let both classes weigh the same in the loss
    #[arg(long)]
    pub class_weights: bool,
    /// At most that many slices of the training part
    #[arg(long, value_name = "N")]
    pub images: Option<usize>,
    /// Learning rate [default: 0.001 for Adam, 0.01 for SGD]
    #[arg(long, value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// How the learning rate changes over the run
    #[arg(long, value_enum, default_value = "constant")]
    pub schedule: Schedule,
    /// Stop when the validation loss has not fallen for that many epochs
    #[arg(long, value_name = "EPOCHS")]
    pub patience: Option<u32>,
    #[command(flatten)]
    #[expect(missing_docs, reason = "a doc comment here would become help text")]
    pub augmentation: Augmentation,
    /// Where to compute: `cpu`, `cuda:N`, or `cuda` for the launcher's local rank [default: a GPU where there is one and this build can use it]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// How a GPU stores what it multiplies
    #[arg(long, value_enum, default_value = "bf16")]
    pub precision: Precision,
    /// First weights, a safetensors file; for the transfer learners one of ImageNet weights in torchvision's naming
    #[arg(long, value_name = "FILE", conflicts_with = "random_init")]
    pub init: Option<PathBuf>,
    /// Draw the first weights from the seed (the default, except for the transfer learners)
    #[arg(long)]
    pub random_init: bool,
    /// The cache rows of each step, one line a step; overrides split, sampling and epochs
    #[arg(long, value_name = "FILE")]
    pub order: Option<PathBuf>,
    /// Compute as the int8 graph does in the last epochs (quantization-aware fine-tuning); writes ranges.json for `trainer quantize --ranges`
    #[arg(long, conflicts_with = "order")]
    pub qat: bool,
    /// How many epochs that are
    #[arg(long, value_name = "N", default_value_t = 1, requires = "qat", value_parser = clap::value_parser!(u32).range(1..))]
    pub qat_epochs: u32,
    /// Bits of a weight in them
    #[arg(long, value_name = "BITS", default_value_t, requires = "qat")]
    pub qat_weight_bits: WeightBits,
    /// Continue the run in the folder where there is one
    #[arg(long)]
    pub resume: bool,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

impl TrainArgs {
    pub(super) fn options(&self) -> Result<TrainOptions> {
        let mut options = TrainOptions {
            model: self.model.clone(),
            width: self.width,
            epochs: self.epochs,
            batch: self.batch,
            seed: self.seed,
            split: self.split,
            sampling: self.sampling,
            class_weights: self.class_weights,
            images: self.images,
            learning_rate: self.learning_rate,
            schedule: self.schedule,
            patience: self.patience,
            augmentation: self.augmentation,
            init: self.init.clone(),
            random_init: self.random_init,
            order: self.order.clone(),
            qat_epochs: if self.qat { self.qat_epochs } else { 0 },
            qat_weight_bits: self.qat_weight_bits,
            resume: self.resume,
            processor: Processor::Cpu,
        };
        checked(&options)?;
        let (device, has_qat) = (self.device.as_deref(), options.qat_epochs > 0);
        options.processor = Processor::choose(device, self.precision, has_qat)?;
        Ok(options)
    }
}
