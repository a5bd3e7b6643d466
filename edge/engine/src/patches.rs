//! The image as the first convolution reads it.
//!
//! In: u8 `[channel, row, column]`. Out: the patches under one pooled row. A patch holds the four lines by three columns under a column of
//! two positions, `[line, channel, column]`. So one convolution with a kernel of one row of 27 bytes (of a three-channel image) does the work
//! of three by three, and the lower position begins one line, [`bytes_per_line`], after the upper one.

use crate::network::KERNEL_SIDE;

/// Lines under two positions, one below the other.
const LINES: usize = KERNEL_SIDE + 1;

/// Channels of the images of the published systems.
const COLOURS: usize = 3;

/// Bytes of a patch's line, all channels.
pub(crate) fn bytes_per_line(channels: usize) -> usize {
    KERNEL_SIDE * channels
}

/// Bytes of a patch.
pub(crate) fn patch_bytes(channels: usize) -> usize {
    LINES * bytes_per_line(channels)
}

/// Fills patches with those of an image of one value a channel.
pub(crate) fn fill(patches: &mut [u8], value: &[u8]) {
    for (index, pixels) in patches.chunks_mut(KERNEL_SIDE).enumerate() {
        pixels.fill(value[index % value.len()]);
    }
}

/// One filter from `[channel, row, column]` to the order of a patch.
pub(crate) fn arrange_filter(from: &[u8], to: &mut [u8], channels: usize) {
    for (index, taps) in from.chunks_exact(KERNEL_SIDE).enumerate() {
        let (channel, row) = (index / KERNEL_SIDE, index % KERNEL_SIDE);
        to[(row * channels + channel) * KERNEL_SIDE..][..KERNEL_SIDE].copy_from_slice(taps);
    }
}

/// The patches of the positions whose upper row is `row`, one a column.
///
/// Bytes of `patches` after those of the last column stay whatever they are: their weights are 0.
pub(crate) fn gather_patches(
    [channels, rows, columns]: [usize; 3],
    image: &[u8],
    row: usize,
    patches: &mut [u8],
) {
    let line = |index: usize| {
        let (line, channel) = (index / channels, index % channels);
        &image[(channel * rows + row + line) * columns..][..columns]
    };
    if channels == COLOURS {
        return gather_colours(&std::array::from_fn(line), patches);
    }
    for index in 0..LINES * channels {
        let patches = patches.chunks_exact_mut(patch_bytes(channels));
        for (patch, pixels) in patches.zip(line(index).windows(KERNEL_SIDE)) {
            patch[KERNEL_SIDE * index..][..KERNEL_SIDE].copy_from_slice(pixels);
        }
    }
}

/// As [`gather_patches`]: four bytes are copied for each three, of which the next line's overwrite the fourth, at the end of a patch those of
/// the next patch. The last column has no fourth byte and is copied as it is.
fn gather_colours(lines: &[&[u8]; LINES * COLOURS], patches: &mut [u8]) {
    const PATCH: usize = LINES * COLOURS * KERNEL_SIDE;
    let n_wide = lines[0].len().saturating_sub(KERNEL_SIDE);
    let lines = lines.map(|line| &line[..n_wide + KERNEL_SIDE]);
    let n_patches = patches.len() / PATCH;
    for column in 0..n_patches.min(n_wide) {
        let Some(patch) = patches[column * PATCH..].first_chunk_mut::<{ PATCH + 1 }>() else {
            break;
        };
        for (index, line) in lines.iter().enumerate() {
            patch[KERNEL_SIDE * index..][..4].copy_from_slice(&line[column..][..4]);
        }
    }
    if let Some(patch) = patches.chunks_exact_mut(PATCH).nth(n_wide) {
        for (to, line) in patch.chunks_exact_mut(KERNEL_SIDE).zip(lines) {
            to.copy_from_slice(&line[n_wide..]);
        }
    }
}
