//! Small changes of the training images, off by default.

use serde::{Deserialize, Serialize};
use shared::{CHANNELS, SIDE, TENSOR_BYTES};

use super::{Batch, STREAM_AUGMENT};
use crate::random::Random;

/// Small changes of the training images; all off by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Augmentation {
    /// Mirror half of the training slices left to right. Loses the side of the embolus
    #[arg(long)]
    pub flip: bool,
    /// Move each training slice by up to this many pixels in both directions
    #[arg(long, value_name = "PIXELS", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub shift: u16,
}

/// Changes the images of a batch in place; the changes follow from (seed, epoch, step in the epoch). `first` is the place of the batch's first image
/// among those of the whole step, of which other ranks hold the rest.
pub fn augment(
    options: Augmentation,
    seed: u64,
    epoch: u32,
    step: usize,
    first: usize,
    batch: &mut Batch,
) {
    if options == Augmentation::default() {
        return;
    }
    let stream = STREAM_AUGMENT
        .wrapping_add(u64::from(epoch) << 40)
        .wrapping_add(step as u64);
    let mut random = Random::new(seed, stream);
    let shift = usize::from(options.shift);
    let mut change = || {
        let is_flipped = options.flip && random.below(2) == 1;
        (
            is_flipped,
            random.below(2 * shift + 1),
            random.below(2 * shift + 1),
        )
    };
    for _ in 0..first {
        change();
    }
    for image in batch.images.chunks_exact_mut(TENSOR_BYTES) {
        let (is_flipped, down, right) = change();
        let before = image.to_vec();
        for plane in 0..CHANNELS {
            for row in 0..SIDE {
                for column in 0..SIDE {
                    let from_column = if is_flipped {
                        SIDE - 1 - column
                    } else {
                        column
                    };
                    let from = (row + down)
                        .checked_sub(shift)
                        .zip((from_column + right).checked_sub(shift));
                    let value = match from {
                        Some((row, column)) if row < SIDE && column < SIDE => {
                            before[(plane * SIDE + row) * SIDE + column]
                        }
                        _ => 0,
                    };
                    image[(plane * SIDE + row) * SIDE + column] = value;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flip_and_shift_move_the_image() {
        let mut images = vec![0u8; TENSOR_BYTES];
        images[100 * SIDE + 20] = 9;
        let count = |images: &[u8]| images.iter().filter(|&&value| value == 9).count();
        for step in 0..8 {
            let mut batch = Batch {
                images: images.clone(),
                targets: vec![1.0, 1.0],
            };
            augment(
                Augmentation {
                    flip: true,
                    shift: 5,
                },
                1,
                0,
                step,
                0,
                &mut batch,
            );
            assert_eq!(count(&batch.images), 1);
            let at = batch.images.iter().position(|&value| value == 9).unwrap();
            let (row, column) = (at / SIDE, at % SIDE);
            assert!((95..=105).contains(&row));
            assert!(
                (15..=25).contains(&column) || (230..=240).contains(&column),
                "{column}"
            );
        }
    }

    #[test]
    fn images_change_alike_whichever_rank_has_them() {
        let mut random = Random::new(3, 0);
        let mut whole = Batch {
            images: (0..3 * TENSOR_BYTES)
                .map(|_| u8::try_from(random.below(256)).unwrap())
                .collect(),
            targets: vec![1.0; 6],
        };
        let options = Augmentation {
            flip: true,
            shift: 5,
        };
        let mut second = Batch {
            images: whole.images[TENSOR_BYTES..].to_vec(),
            targets: vec![1.0; 4],
        };
        augment(options, 1, 2, 7, 0, &mut whole);
        augment(options, 1, 2, 7, 1, &mut second);
        assert!(whole.images[TENSOR_BYTES..] == second.images);
    }
}
