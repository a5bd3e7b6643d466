//! The systems of the publication, rows 0 to 13 of its table, as data.
//!
//! In: a name from the command line. Out: the layers' units, the optimiser, the number of epochs and of images that
//! the publication used, and its published figures. Building the network is left to [`crate::network`].

use crate::exit::{Exit, fault};

/// What kind of classifier a row of the table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Says "no PE" to every slice: no weights, nothing to train.
    Majority,
    /// 3x3 valid convolutions with ReLU, each followed by a 2x2 max pool, one hidden dense layer with ReLU, one logit.
    Convolutional,
    /// ResNet-50 with one logit in place of its 1000 classes.
    Resnet50,
    /// Inception-v3 (without its auxiliary classifier) with one logit.
    InceptionV3,
}

/// The optimiser a row was trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptimiserKind {
    /// Keras `SGD`: learning rate 0.01, no momentum.
    Sgd,
    /// Keras `Adam`: learning rate 0.001, beta 0.9 and 0.999, epsilon 1e-7.
    Adam,
}

/// The figures that the publication prints for a row. Its positive class is *no PE* (see `docs/`): read so, `recall`
/// is our specificity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Published {
    /// Share of slices classified rightly, 0 to 1.
    pub accuracy: f64,
    /// As printed, 0 to 1.
    pub recall: f64,
    /// As printed, 0 to 1.
    pub precision: f64,
    /// As printed, 0 to 1.
    pub f1: f64,
}

/// One row of the publication's table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Architecture {
    /// The name on the command line, in the model file and in the run folder.
    pub name: &'static str,
    /// The row's number in the publication, 0 to 13.
    pub row: u8,
    /// What the row says of itself, for tables.
    pub title: &'static str,
    /// Which kind of classifier it is.
    pub family: Family,
    /// Output channels of each convolution at width 1; empty for other families than [`Family::Convolutional`].
    pub convolutions: &'static [usize],
    /// Units of the hidden dense layer at width 1; 0 for other families than [`Family::Convolutional`].
    pub dense: usize,
    /// The optimiser.
    pub optimiser: OptimiserKind,
    /// Passes over the training part.
    pub epochs: u32,
    /// Slices the publication drew for training and validation together; 0 where it does not say.
    pub n_images: u32,
    /// Whether the backbone's weights stay as they were loaded and only the head learns.
    pub is_backbone_frozen: bool,
    /// The printed figures; `None` where the publication gives none.
    pub published: Option<Published>,
}

/// The units of a convolutional network after the width factor was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Units {
    /// Output channels of each convolution.
    pub convolutions: Vec<usize>,
    /// Units of the hidden dense layer.
    pub dense: usize,
}

#[expect(
    clippy::too_many_arguments,
    reason = "one argument for each column of the published table"
)]
const fn convolutional(
    row: u8,
    name: &'static str,
    title: &'static str,
    convolutions: &'static [usize],
    dense: usize,
    epochs: u32,
    n_images: u32,
    published: [f64; 4],
) -> Architecture {
    let [accuracy, recall, precision, f1] = published;
    Architecture {
        name,
        row,
        title,
        family: Family::Convolutional,
        convolutions,
        dense,
        optimiser: OptimiserKind::Adam,
        epochs,
        n_images,
        is_backbone_frozen: false,
        published: Some(Published {
            accuracy,
            recall,
            precision,
            f1,
        }),
    }
}

const fn transfer(
    row: u8,
    name: &'static str,
    title: &'static str,
    family: Family,
    is_backbone_frozen: bool,
) -> Architecture {
    Architecture {
        name,
        row,
        title,
        family,
        convolutions: &[],
        dense: 0,
        optimiser: OptimiserKind::Adam,
        epochs: 5,
        n_images: 1000,
        is_backbone_frozen,
        published: None,
    }
}

/// Every system of the publication, in its order.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "baseline",
        row: 0,
        title: "majority baseline",
        family: Family::Majority,
        convolutions: &[],
        dense: 0,
        optimiser: OptimiserKind::Sgd,
        epochs: 0,
        n_images: 0,
        is_backbone_frozen: false,
        published: Some(Published {
            accuracy: 0.946,
            recall: 0.0,
            precision: 0.0,
            f1: 0.0,
        }),
    },
    Architecture {
        optimiser: OptimiserKind::Sgd,
        ..convolutional(
            1,
            "vanilla",
            "vanilla",
            &[256, 256],
            128,
            5,
            1000,
            [0.797, 0.624, 0.942, 0.751],
        )
    },
    convolutional(
        2,
        "adam",
        "Adam",
        &[256, 256],
        128,
        5,
        1000,
        [0.848, 0.776, 0.900, 0.833],
    ),
    convolutional(
        3,
        "increasing",
        "Increasing Neurons",
        &[256, 512, 1024],
        128,
        5,
        1000,
        [0.842, 0.802, 0.866, 0.833],
    ),
    convolutional(
        4,
        "two-conv",
        "two convolutions",
        &[512, 512],
        128,
        5,
        1000,
        [0.862, 0.831, 0.881, 0.855],
    ),
    convolutional(
        5,
        "two-conv-dense256",
        "two convolutions, dense 256",
        &[512, 512],
        256,
        5,
        1000,
        [0.818, 0.916, 0.761, 0.831],
    ),
    convolutional(
        6,
        "two-conv-dense64",
        "Decreasing Neurons",
        &[512, 512],
        64,
        5,
        1000,
        [0.848, 0.792, 0.886, 0.836],
    ),
    convolutional(
        7,
        "halving",
        "halving",
        &[512, 256, 128],
        256,
        5,
        1000,
        [0.857, 0.853, 0.855, 0.854],
    ),
    convolutional(
        8,
        "halving-5k",
        "halving, more images",
        &[512, 256, 128],
        256,
        5,
        5000,
        [0.914, 0.896, 0.931, 0.913],
    ),
    convolutional(
        9,
        "halving-15ep",
        "halving, 15 epochs",
        &[512, 256, 128],
        256,
        15,
        5000,
        [0.915, 0.941, 0.896, 0.918],
    ),
    convolutional(
        10,
        "final",
        "final",
        &[512, 256, 128],
        256,
        10,
        5000,
        [0.916, 0.945, 0.893, 0.919],
    ),
    transfer(
        11,
        "resnet50",
        "ResNet-50, fine-tuned",
        Family::Resnet50,
        false,
    ),
    transfer(
        12,
        "resnet50-frozen",
        "ResNet-50, frozen backbone",
        Family::Resnet50,
        true,
    ),
    transfer(
        13,
        "inception-v3",
        "Inception-v3, frozen backbone",
        Family::InceptionV3,
        true,
    ),
];

/// Fewest units that a width factor leaves to a layer.
pub const MIN_UNITS: usize = 4;

/// The row of that name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|row| row.name == name)
}

/// As [`find`], for a name of the command line.
///
/// # Errors
/// No such row.
pub fn named(name: &str) -> anyhow::Result<&'static Architecture> {
    find(name).ok_or_else(|| {
        let names: Vec<&str> = ARCHITECTURES.iter().map(|row| row.name).collect();
        let message = format!("no model `{name}`; there are {}", names.join(", "));
        fault(Exit::Usage, message)
    })
}

/// The greatest width factor.
const MAX_WIDTH: f64 = 4.0;

/// Whether a width factor can be used: above 0 and at most 4.
#[must_use]
pub fn is_width(width: f64) -> bool {
    width > 0.0 && width <= MAX_WIDTH
}

/// A width factor of the command line.
///
/// # Errors
/// A text that is no number above 0 and at most 4.
pub fn parse_width(text: &str) -> Result<f64, String> {
    let width = text.parse().ok().filter(|width| is_width(*width));
    width.ok_or_else(|| format!("expected a factor above 0 and at most {MAX_WIDTH}"))
}

/// Units of one layer at a width factor: `units * width` rounded to the nearest integer (half away from zero), at
/// least [`MIN_UNITS`].
#[must_use]
pub fn scaled_units(units: usize, width: f64) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "units are a few thousand; a negative or NaN width saturates to 0 and the minimum holds"
    )]
    let n_units = (units as f64 * width).round() as usize;
    n_units.max(MIN_UNITS)
}

impl Architecture {
    /// The layers' units at a width factor (1.0 is the publication's); see [`scaled_units`].
    #[must_use]
    pub fn scaled(&self, width: f64) -> Units {
        Units {
            convolutions: self
                .convolutions
                .iter()
                .map(|&n| scaled_units(n, width))
                .collect(),
            dense: scaled_units(self.dense, width),
        }
    }
}

/// Side of the feature map after `n_convolutions` blocks of 3x3 valid convolution and 2x2 max pool, from `side`.
#[must_use]
pub fn pooled_side(side: usize, n_convolutions: usize) -> usize {
    (0..n_convolutions).fold(side, |side, _| side.saturating_sub(2) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_width_is_above_0_and_at_most_4() {
        for (text, expected) in [
            ("0.125", Some(0.125)),
            ("4", Some(4.0)),
            ("0", None),
            ("-1", None),
            ("4.1", None),
            ("NaN", None),
            ("inf", None),
            ("wide", None),
        ] {
            assert_eq!(parse_width(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn rows_stand_in_order_under_their_names() {
        for (index, row) in ARCHITECTURES.iter().enumerate() {
            assert_eq!(usize::from(row.row), index);
            assert_eq!(find(row.name).map(|found| found.row), Some(row.row));
        }
        assert_eq!(ARCHITECTURES.len(), 14);
        assert!(find("Final").is_none());
    }

    #[test]
    fn width_rounds_to_nearest_and_keeps_four_units() {
        let last = find("final").unwrap();
        assert_eq!(last.scaled(1.0).convolutions, [512, 256, 128]);
        assert_eq!(
            last.scaled(0.125),
            Units {
                convolutions: vec![64, 32, 16],
                dense: 32
            }
        );
        assert_eq!(
            last.scaled(0.001),
            Units {
                convolutions: vec![4, 4, 4],
                dense: 4
            }
        );
        assert_eq!(scaled_units(100, 0.125), 13);
    }

    #[test]
    fn final_model_flattens_to_115200() {
        let side = pooled_side(256, 3);
        assert_eq!(side * side * 128, 115_200);
    }
}
