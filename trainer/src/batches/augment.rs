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

/// How one image is changed: pixel (row, column) becomes that of (row + down, column + right) of the image, mirrored before where `is_flipped`; 0 outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Mirrored left to right.
    pub is_flipped: bool,
    /// Rows.
    pub down: i32,
    /// Columns.
    pub right: i32,
}

/// The changes of `n` images of a step; they follow from (seed, epoch, step in the epoch). `first` is the place of the first of them among those of the
/// whole step, of which other ranks hold the rest. Empty where nothing is to be changed.
#[must_use]
pub fn changes(
    options: Augmentation,
    seed: u64,
    epoch: u32,
    step: usize,
    first: usize,
    n: usize,
) -> Vec<Change> {
    if options == Augmentation::default() {
        return Vec::new();
    }
    let stream = STREAM_AUGMENT
        .wrapping_add(u64::from(epoch) << 40)
        .wrapping_add(step as u64);
    let mut random = Random::new(seed, stream);
    let shift = usize::from(options.shift);
    let offset = |random: &mut Random| {
        let drawn = random.below(2 * shift + 1);
        i32::try_from(drawn).map_or(0, |drawn| drawn - i32::from(options.shift))
    };
    let change = || {
        let is_flipped = options.flip && random.below(2) == 1;
        let (down, right) = (offset(&mut random), offset(&mut random));
        Change {
            is_flipped,
            down,
            right,
        }
    };
    std::iter::repeat_with(change).skip(first).take(n).collect()
}

/// Changes the images of a batch in place, as [`changes`] says.
pub fn augment(
    options: Augmentation,
    seed: u64,
    epoch: u32,
    step: usize,
    first: usize,
    batch: &mut Batch,
) {
    let changes = changes(options, seed, epoch, step, first, batch.n_images());
    let images = batch.images.chunks_exact_mut(TENSOR_BYTES);
    for (image, change) in images.zip(changes) {
        let before = image.to_vec();
        for plane in 0..CHANNELS {
            for row in 0..SIDE {
                for column in 0..SIDE {
                    let from_column = if change.is_flipped {
                        SIDE - 1 - column
                    } else {
                        column
                    };
                    let moved = |at: usize, by: i32| at.checked_add_signed(by as isize);
                    let from = moved(row, change.down).zip(moved(from_column, change.right));
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
