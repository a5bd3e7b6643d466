//! ResNet-50 (He et al. 2016, table 1), the stride on the 3x3 convolution as torchvision has it.

use super::{Backbone, Draft, Layer, Source, square};
use crate::architecture::scaled_units;

const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const IMAGENET_DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// Units, blocks and first stride of `ResNet`-50's stages.
const RESNET50_STAGES: [(usize, usize, usize); 4] =
    [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)];
/// A stage's output channels for each of its units.
const RESNET_EXPANSION: usize = 4;

pub(super) fn resnet50(width: f64) -> Backbone {
    let mut draft = Draft {
        width,
        nodes: Vec::new(),
    };
    let convolution =
        |kernel_name: String, norm_name: String, window, has_relu| Layer::Convolution {
            kernel_name,
            norm_name,
            window,
            has_relu,
        };
    let units = |n| scaled_units(n, width);
    let stem = convolution("conv1".into(), "bn1".into(), square(7, 2, 3), true);
    let stem = draft.push("conv1", stem, vec![Source::Image], units(64));
    let mut last = draft.pool("maxpool", Layer::MaxPool(square(3, 2, 1)), stem);
    for (stage, (n_units, n_blocks, first_stride)) in (1..).zip(RESNET50_STAGES) {
        for block in 0..n_blocks {
            let at = format!("layer{stage}.{block}");
            let (stride, n_wide) = (
                if block == 0 { first_stride } else { 1 },
                units(n_units * RESNET_EXPANSION),
            );
            let step = |draft: &mut Draft, number, input, window, n, has_relu| {
                let name = format!("{at}.conv{number}");
                let layer = convolution(name.clone(), format!("{at}.bn{number}"), window, has_relu);
                draft.push(&name, layer, vec![input], n)
            };
            let narrow = step(&mut draft, 1, last, square(1, 1, 0), units(n_units), true);
            let middle = step(
                &mut draft,
                2,
                narrow,
                square(3, stride, 1),
                units(n_units),
                true,
            );
            let wide = step(&mut draft, 3, middle, square(1, 1, 0), n_wide, false);
            if block == 0 {
                let (kernel, norm) = (format!("{at}.downsample.0"), format!("{at}.downsample.1"));
                let layer = convolution(kernel.clone(), norm, square(1, stride, 0), false);
                last = draft.push(&kernel, layer, vec![last], n_wide);
            }
            last = draft.push(
                &format!("{at}.add"),
                Layer::AddRelu,
                vec![wide, last],
                n_wide,
            );
        }
    }
    draft.finish(last, (IMAGENET_MEAN, IMAGENET_DEVIATION), 1e-5, "resnet50")
}
