//! The scanner: field of view, slice positions, point spread, noise, and how it stores its values.

use alloc::vec;
use alloc::vec::Vec;

use super::canvas::{narrow, round_i32};
use super::random::{Random, scatter};

/// How the reconstruction treats fine detail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    Soft,
    Standard,
    Sharp,
}

impl Kernel {
    /// The name in Convolution Kernel (0018,1210).
    #[cfg(feature = "std")]
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Soft => "SOFT",
            Self::Standard => "STANDARD",
            Self::Sharp => "SHARP",
        }
    }
}

/// How stored values mean HU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// 12 of 16 bits, unsigned, intercept -1024.
    Unsigned12,
    /// 16 bits, signed, intercept 0.
    Signed16,
    /// 16 bits, signed, intercept -1024.
    Signed16Shifted,
}

/// One scanner and its protocol.
#[derive(Clone, Debug)]
pub(super) struct Scanner {
    pub(super) field_of_view_mm: f64,
    /// Centre of the field of view in patient coordinates.
    pub(super) centre_mm: [f64; 2],
    pub(super) kernel: Kernel,
    /// Standard deviation of the noise in soft tissue, HU.
    pub(super) noise_hu: f64,
    /// The lowest HU that is stored.
    pub(super) floor_hu: i16,
    /// HU outside the round field of view, where the scanner pads.
    pub(super) padding_hu: Option<i16>,
    /// Whether PixelPaddingValue says so.
    #[cfg_attr(not(feature = "std"), expect(dead_code, reason = "only files say so"))]
    pub(super) declares_padding: bool,
    pub(super) storage: Storage,
    pub(super) table_y_mm: f64,
    pub(super) first_z_mm: f64,
    pub(super) spacing_z_mm: f64,
    #[cfg_attr(not(feature = "std"), expect(dead_code, reason = "only files tell it"))]
    pub(super) thickness_mm: f64,
    /// Sideways jump between the two halves of a moved acquisition, pixels of 512.
    pub(super) motion_mm: f64,
}

impl Scanner {
    /// The field of view is set to the patient, as a radiographer does: `chest_mm` is the width of the rib cage.
    pub(super) fn new(n_slices: u32, has_motion: bool, chest_mm: f64, random: &mut Random) -> Self {
        let low = random.range(-112.0, -78.0);
        let high = random.range(56.0, 92.0);
        let spacing = (high - low) / f64::from(n_slices.max(1));
        let storage = [
            Storage::Unsigned12,
            Storage::Signed16,
            Storage::Signed16Shifted,
        ][random.below(3)];
        let pads = storage != Storage::Unsigned12 && random.chance(0.5);
        let padding = if storage == Storage::Signed16 {
            -2000
        } else {
            -3024
        };
        Self {
            field_of_view_mm: (chest_mm * random.range(1.02, 1.12)).clamp(250.0, 500.0),
            centre_mm: [random.range(-6.0, 6.0), random.range(-6.0, 10.0)],
            kernel: [Kernel::Soft, Kernel::Standard, Kernel::Sharp][random.below(3)],
            noise_hu: random.range(8.0, 18.0),
            floor_hu: if random.chance(0.4) { -1000 } else { -1024 },
            padding_hu: pads.then_some(padding),
            declares_padding: random.chance(0.7),
            storage,
            table_y_mm: random.range(4.0, 12.0),
            first_z_mm: low + 0.5 * spacing,
            spacing_z_mm: spacing,
            thickness_mm: spacing.clamp(0.6, 3.0),
            motion_mm: if has_motion {
                random.range(2.0, 4.5)
            } else {
                0.0
            },
        }
    }

    pub(super) fn z_mm(&self, slice_index: u32) -> f64 {
        self.first_z_mm + self.spacing_z_mm * f64::from(slice_index)
    }

    /// Turns painted tissue into what the scanner shows.
    pub(super) fn expose(&self, hu: &mut [i16], side: usize, seed: u64) {
        if self.motion_mm > 0.0 {
            double(
                hu,
                side,
                round_i32(self.motion_mm * side as f64 / self.field_of_view_mm),
            );
        }
        let centre = if side < 384 {
            [10, 6, 4]
        } else {
            match self.kernel {
                Kernel::Soft => [2, 2, 2],
                Kernel::Standard => [4, 3, 2],
                Kernel::Sharp => [6, 4, 3],
            }
        };
        let weight = match self.kernel {
            Kernel::Soft => centre[2],
            Kernel::Standard => centre[1],
            Kernel::Sharp => centre[0],
        };
        spread(hu, side, weight);
        self.grain(hu, side, seed);
        let floor = self.floor_hu;
        for value in hu.iter_mut() {
            *value = (*value).clamp(floor, 3071);
        }
        self.pad(hu, side);
    }

    /// Adds correlated noise. Its spectrum follows the kernel: soft reconstructions have coarse grain.
    fn grain(&self, hu: &mut [i16], side: usize, seed: u64) {
        // White noise from the four bytes of a word: standard deviation 147.8.
        let white = |row: usize, line: &mut [i32]| {
            let key = scatter(seed ^ (row as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            for (column, pair) in line.chunks_mut(2).enumerate() {
                let bits = scatter(key.wrapping_add(column as u64)).to_le_bytes();
                for (value, bytes) in pair.iter_mut().zip(bits.chunks_exact(4)) {
                    *value = bytes.iter().map(|&byte| i32::from(byte)).sum::<i32>() - 510;
                }
            }
        };
        // Binomial smoothing [1, c, 1] both ways; the gain of the standard deviation is (2 + c^2) for the sum.
        let c = match self.kernel {
            Kernel::Soft => 1,
            Kernel::Standard => 2,
            Kernel::Sharp => 8,
        };
        let gain = 147.8 * f64::from(2 + c * c);
        let scale = round_i32(self.noise_hu / gain * 16_777_216.0);
        let mut raw = vec![0; side];
        let smooth = |raw: &[i32], out: &mut [i32]| {
            let n = raw.len();
            for column in 1..n - 1 {
                out[column] = raw[column - 1] + c * raw[column] + raw[column + 1];
            }
            out[0] = c * raw[0] + 2 * raw[1];
            out[n - 1] = c * raw[n - 1] + 2 * raw[n - 2];
        };
        let mut lines = [vec![0; side], vec![0; side], vec![0; side]];
        for row in 0..2 {
            white(row, &mut raw);
            smooth(&raw, &mut lines[row + 1]);
        }
        for (row, line) in hu.chunks_exact_mut(side).enumerate() {
            if row > 0 {
                lines.rotate_left(1);
                white(row + 1, &mut raw);
                smooth(&raw, &mut lines[2]);
            }
            let [above, middle, below] = &lines;
            for (column, pixel) in line.iter_mut().enumerate() {
                let sum = i64::from(above[column] + c * middle[column] + below[column])
                    * i64::from(scale);
                #[expect(clippy::cast_possible_truncation, reason = "noise stays below 200 HU")]
                let noise = (sum >> 24) as i32;
                *pixel = narrow(i32::from(*pixel) + noise);
            }
        }
    }

    /// Writes the padding value outside the inscribed circle.
    fn pad(&self, hu: &mut [i16], side: usize) {
        let Some(padding) = self.padding_hu else {
            return;
        };
        let radius = side as f64 / 2.0;
        for (row, line) in hu.chunks_exact_mut(side).enumerate() {
            let y = row as f64 + 0.5 - radius;
            let half = libm::sqrt((radius * radius - y * y).max(0.0));
            let first = usize::try_from(round_i32(radius - half))
                .unwrap_or(0)
                .min(side);
            let end = usize::try_from(round_i32(radius + half))
                .unwrap_or(0)
                .clamp(first, side);
            line[..first].fill(padding);
            line[end..].fill(padding);
        }
    }
}

/// Overlays the image with itself, moved sideways and half as far down.
fn double(hu: &mut [i16], side: usize, by: i32) {
    let by = usize::try_from(by).unwrap_or(0).clamp(1, side - 1);
    for row in (0..side).rev() {
        let other = row.saturating_sub(by / 2);
        let (head, tail) = hu.split_at_mut(row * side);
        let line = &mut tail[..side];
        for column in (by..side).rev() {
            let ghost = if other == row {
                line[column - by]
            } else {
                head[other * side + column - by]
            };
            line[column] = narrow((i32::from(line[column]) * 9 + i32::from(ghost) * 7) >> 4);
        }
    }
}

/// Point spread [1, weight, 1] in both directions.
fn spread(hu: &mut [i16], side: usize, weight: i32) {
    let total = (weight + 2) * (weight + 2);
    let scale = 65_536 / total;
    let across = |line: &[i16], out: &mut [i32]| {
        let n = line.len();
        for column in 1..n - 1 {
            out[column] = i32::from(line[column - 1])
                + weight * i32::from(line[column])
                + i32::from(line[column + 1]);
        }
        out[0] = (weight + 2) * i32::from(line[0]);
        out[n - 1] = (weight + 2) * i32::from(line[n - 1]);
    };
    let mut lines: [Vec<i32>; 3] = [vec![0; side], vec![0; side], vec![0; side]];
    across(&hu[..side], &mut lines[1]);
    across(&hu[..side], &mut lines[2]);
    for row in 0..side {
        lines.rotate_left(1);
        let next = (row + 1).min(side - 1);
        across(&hu[next * side..(next + 1) * side], &mut lines[2]);
        let [above, middle, below] = &lines;
        for (column, pixel) in hu[row * side..(row + 1) * side].iter_mut().enumerate() {
            let sum = i64::from(above[column] + weight * middle[column] + below[column]);
            #[expect(
                clippy::cast_possible_truncation,
                reason = "a weighted mean of 16-bit values"
            )]
            let mean = ((sum * i64::from(scale)) >> 16) as i32;
            *pixel = narrow(mean);
        }
    }
}
