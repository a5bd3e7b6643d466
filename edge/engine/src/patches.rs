//! The image as the first convolution reads it.
//!
//! In: u8 `[channel, row, column]`. Out: one row of patches. A patch of a three-channel image is 27 bytes, so that one convolution with a
//! kernel of one row does the work of three by three.

use crate::network::{KERNEL_SIDE, Network};

/// The patches of one row of positions: for each column the bytes that the 3 x 3 kernel covers, `[channel, row, column]`.
///
/// Bytes of a patch beyond those stay whatever they are: their weights are 0.
pub(crate) fn gather_patches(network: &Network, image: &[u8], row: usize, patches: &mut [u8]) {
    let [channels, rows, columns] = network.image;
    let patch_bytes = network.convolutions[0].column_bytes;
    let mut lines = image.chunks_exact(rows * columns).flat_map(|plane| {
        plane[row * columns..]
            .chunks_exact(columns)
            .take(KERNEL_SIDE)
    });
    if channels == 3 && patch_bytes > 3 * KERNEL_SIDE * KERNEL_SIDE {
        let lines = std::array::from_fn(|_| lines.next().unwrap_or_default());
        return gather_three_channels(&lines, patch_bytes, patches);
    }
    for (index, line) in lines.enumerate() {
        let patches = patches.chunks_exact_mut(patch_bytes);
        for (patch, pixels) in patches.zip(line.windows(KERNEL_SIDE)) {
            patch[KERNEL_SIDE * index..][..KERNEL_SIDE].copy_from_slice(pixels);
        }
    }
}

/// As [`gather_patches`], for three channels: four bytes are copied for each three, of which the next line's overwrite the fourth.
///
/// `patch_bytes` must be above 27. The last column has no fourth byte and is copied as it is.
fn gather_three_channels(lines: &[&[u8]; 3 * KERNEL_SIDE], patch_bytes: usize, patches: &mut [u8]) {
    let n_wide = lines[0].len().saturating_sub(KERNEL_SIDE);
    let lines = lines.map(|line| &line[..n_wide + KERNEL_SIDE]);
    let mut patches = patches.chunks_exact_mut(patch_bytes);
    for (column, patch) in patches.by_ref().take(n_wide).enumerate() {
        let patch: &mut [u8] = &mut patch[..3 * KERNEL_SIDE * KERNEL_SIDE + 1];
        for (index, line) in lines.iter().enumerate() {
            patch[KERNEL_SIDE * index..][..4].copy_from_slice(&line[column..][..4]);
        }
    }
    if let Some(patch) = patches.next() {
        for (to, line) in patch.chunks_exact_mut(KERNEL_SIDE).zip(lines) {
            to.copy_from_slice(&line[n_wide..]);
        }
    }
}
