//! Seeded input images whose logits a model file states, so that an engine can prove itself at start.

use crate::{CHANNELS, SIDE, TENSOR_BYTES};

/// Side of a block of equal brightness before noise, in pixels.
const BLOCK: usize = 32;

/// Fills `image`, u8 `[3, 256, 256]`, from `seed`: blocks of random brightness with noise of +-32 on top.
///
/// Integer arithmetic alone (SplitMix64, Steele et al. 2014). Bytes of `image` beyond a tensor's length stay as they are.
pub fn image(seed: u64, image: &mut [u8]) {
    let mut state = seed;
    let mut blocks = [0_u8; CHANNELS * (SIDE / BLOCK) * (SIDE / BLOCK)];
    for block in &mut blocks {
        *block = split_mix(&mut state).to_le_bytes()[7];
    }
    let per_row = SIDE / BLOCK;
    for (index, pixel) in image.iter_mut().take(TENSOR_BYTES).enumerate() {
        let (channel, row, column) = (index / (SIDE * SIDE), index / SIDE % SIDE, index % SIDE);
        let block = blocks[(channel * per_row + row / BLOCK) * per_row + column / BLOCK];
        let noise = split_mix(&mut state).to_le_bytes()[7] / 4;
        *pixel = block.saturating_add(noise).saturating_sub(32);
    }
}

fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change of these bytes would fail the self-test of every model file there is.
    #[test]
    fn image_keeps_its_bytes() {
        let mut pixels = alloc::vec![0_u8; TENSOR_BYTES];
        image(1, &mut pixels);
        let digest = blake3::hash(&pixels).to_hex();
        assert_eq!(
            digest.as_str(),
            "cb1ae0a7168904693cb63465e5c7c72cc0d87685e2bff0ac204ffd15cb7869e8"
        );
    }

    #[test]
    fn image_depends_on_the_seed_alone() {
        let mut images = alloc::vec![alloc::vec![0_u8; TENSOR_BYTES]; 3];
        for (seed, pixels) in [1, 1, 2].into_iter().zip(&mut images) {
            image(seed, pixels);
        }
        assert_eq!(images[0], images[1]);
        assert_ne!(images[0], images[2]);
        assert_eq!(
            images[0].iter().map(|p| u64::from(*p)).sum::<u64>() / TENSOR_BYTES as u64,
            124,
            "the mean of seed 1"
        );
    }
}
