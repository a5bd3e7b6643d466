//! Which work a slice does not need: where all that an output sees is of one value, the output is a constant known in advance.
//!
//! In: the image. Out: for each pooled row of the first two convolutions, which columns are such constants; their bytes are computed once
//! for each value, by the same kernels from an image of that value, so skipping cannot change a bit. A CT slice has large regions of one value:
//! padding outside the field of view, and air where the body mask has set it.
//!
//! An image without such a region costs one comparison for each pixel of the first channel.

use std::ops::Range;

use crate::kernels::WinogradScratch;
use crate::network::Network;
use crate::patches;
use crate::rows::pooled_span;

/// Fused convolutions whose constants are known.
pub(crate) const LEVELS: usize = 2;

/// Values that are remembered: padding and air, and some more.
const MAX_VALUES: usize = 4;

/// Channels of an image whose values are remembered.
const MAX_CHANNELS: usize = 4;

/// Rows and columns of the image under one pooled output of each level: a 3 x 3 convolution widens the field by 2 steps, the pool by 1.
const FIELD: [usize; LEVELS] = [4, 10];

/// Pixels from one pooled output to the next.
const STEP: [usize; LEVELS] = [2, 4];

/// Pixels of the window in which a row is searched for one value.
const FLAT: usize = 4;

/// What one thread knows of the image at hand, and of the values it has met.
#[derive(Debug)]
pub(crate) struct Idle {
    shape: [usize; 3],
    /// 255 where the [`FLAT`] pixels from here on are equal in every channel, `[row, column]`; rows without any are not written.
    flat: Vec<u8>,
    /// Whether a row has any.
    has_flat: Vec<bool>,
    /// 255 where the pixel below is equal in every channel; written for rows that have any flat window.
    below: Vec<u8>,
    /// One row of results.
    line: Vec<u8>,
    constants: Vec<Constant>,
    n_constants: usize,
    /// For each column of the row at hand, the constant that stands there.
    marks: Vec<Option<usize>>,
    /// Pooled columns of the last level that were looked at, and those that were constant.
    pub(crate) counts: [u64; 2],
}

/// The outputs where all of the field is of one value.
#[derive(Debug)]
struct Constant {
    value: [u8; MAX_CHANNELS],
    /// One pooled pixel of each level.
    pixels: [Vec<u8>; LEVELS],
    /// Input of the level at hand: patches, or pixels of the level before.
    input: Vec<u8>,
}

impl Idle {
    /// Allocates for the images of a network.
    pub(crate) fn new(network: &Network) -> Self {
        let [_, rows, columns] = network.image;
        let pixel = |level: usize| {
            let convolution = network.convolutions.get(level);
            vec![0; convolution.map_or(0, |convolution| convolution.channel_stride())]
        };
        let first = &network.convolutions[0];
        let patches = 2 * first.column_bytes + first.kernel_row_bytes;
        let constant = || Constant {
            value: [0; MAX_CHANNELS],
            pixels: std::array::from_fn(pixel),
            input: vec![0; patches.max(4 * first.channel_stride())],
        };
        Self {
            shape: network.image,
            flat: vec![0; rows * columns],
            has_flat: vec![false; rows],
            below: vec![0; rows * columns],
            line: vec![0; columns],
            constants: (0..MAX_VALUES).map(|_| constant()).collect(),
            n_constants: 0,
            marks: vec![None; first.pooled[1]],
            counts: [0; 2],
        }
    }

    /// Searches these rows of an image.
    pub(crate) fn look(&mut self, image: &[u8], rows: Range<usize>) {
        let [channels, n_rows, columns] = self.shape;
        for row in rows.start..rows.end.min(n_rows) {
            self.has_flat[row] = false;
            if channels > MAX_CHANNELS || columns < FLAT {
                continue;
            }
            self.line.fill(255);
            let mut is_any = true;
            for plane in image.chunks_exact(n_rows * columns) {
                let line = &plane[row * columns..][..columns];
                for ((equal, a), b) in self.line.iter_mut().zip(line).zip(&line[1..]) {
                    *equal &= if a == b { 255 } else { 0 };
                }
                self.line[columns - 1] = 0;
                let windows = self.line.windows(FLAT - 1);
                is_any = windows.fold(false, |any, w| any | (w[0] & w[1] & w[2] != 0));
                if !is_any {
                    break;
                }
            }
            self.has_flat[row] = is_any;
            if is_any {
                self.write_row(image, row);
            }
        }
    }

    /// Keeps the windows of `line`, and compares the row with the next.
    fn write_row(&mut self, image: &[u8], row: usize) {
        let [_, n_rows, columns] = self.shape;
        let at = row * columns;
        let flat = &mut self.flat[at..][..columns];
        flat.fill(0);
        for (flat, w) in flat.iter_mut().zip(self.line.windows(FLAT - 1)) {
            *flat = w[0] & w[1] & w[2];
        }
        let below = &mut self.below[at..][..columns];
        below.fill(if row + 1 < n_rows { 255 } else { 0 });
        for plane in image.chunks_exact(n_rows * columns) {
            let (upper, lower) = plane[at..].split_at(columns);
            for ((equal, a), b) in below.iter_mut().zip(upper).zip(lower) {
                *equal &= if a == b { 255 } else { 0 };
            }
        }
    }

    /// Finds the constants of one pooled row; whether there are any. [`Self::spans`] tells them then.
    pub(crate) fn mark(
        &mut self,
        network: &Network,
        image: &[u8],
        level: usize,
        row: usize,
        scratch: &mut WinogradScratch,
    ) -> bool {
        let [_, _, columns] = self.shape;
        let n_columns = network.convolutions[level].pooled[1];
        if level + 1 == network.convolutions.len().min(LEVELS) {
            self.counts[0] += n_columns as u64;
        }
        let field = STEP[level] * row..STEP[level] * row + FIELD[level];
        if !self.has_flat[field.clone()].iter().all(|&any| any) {
            return false;
        }
        self.line.fill(255);
        for row in field.clone() {
            let flat = &self.flat[row * columns..][..columns];
            for (all, flat) in self.line.iter_mut().zip(flat) {
                *all &= flat;
            }
        }
        let mut n_found = 0;
        for column in 0..n_columns {
            let x = STEP[level] * column;
            // Windows of four that overlap in a pixel cover the field.
            let mut is_one = (0..FIELD[level] - 1)
                .step_by(FLAT - 1)
                .all(|offset| self.line.get(x + offset) == Some(&255));
            is_one = is_one
                && field
                    .clone()
                    .take(FIELD[level] - 1)
                    .all(|row| self.below[row * columns + x] == 255);
            self.marks[column] = match is_one {
                true => self.constant(network, image, field.start * columns + x, scratch),
                false => None,
            };
            n_found += u64::from(self.marks[column].is_some());
        }
        if level + 1 == network.convolutions.len().min(LEVELS) {
            self.counts[1] += n_found;
        }
        n_found > 0
    }

    /// The marked row as runs of columns, each with its constant pixel or `None` where it must be computed.
    pub(crate) fn spans(
        &self,
        level: usize,
        n_columns: usize,
    ) -> impl Iterator<Item = (Range<usize>, Option<&[u8]>)> {
        let runs = self.marks[..n_columns].chunk_by(|a, b| a == b);
        runs.scan(0, move |start, run| {
            let span = *start..*start + run.len();
            *start = span.end;
            Some((
                span,
                run[0].map(|index| self.constants[index].pixels[level].as_slice()),
            ))
        })
    }

    /// The constants of the value at a pixel; `None` where too many values are known already.
    fn constant(
        &mut self,
        network: &Network,
        image: &[u8],
        pixel: usize,
        scratch: &mut WinogradScratch,
    ) -> Option<usize> {
        let [_, rows, columns] = self.shape;
        let mut value = [0; MAX_CHANNELS];
        for (value, plane) in value.iter_mut().zip(image.chunks_exact(rows * columns)) {
            *value = plane[pixel];
        }
        let known = self.constants[..self.n_constants]
            .iter()
            .position(|known| known.value == value);
        if known.is_some() || self.n_constants == MAX_VALUES {
            return known;
        }
        self.constants[self.n_constants].compute(network, value, scratch);
        self.n_constants += 1;
        Some(self.n_constants - 1)
    }
}

impl Constant {
    /// Runs the convolutions on fields of one value.
    fn compute(
        &mut self,
        network: &Network,
        value: [u8; MAX_CHANNELS],
        scratch: &mut WinogradScratch,
    ) {
        self.value = value;
        let [channels, ..] = network.image;
        patches::fill(&mut self.input, &value[..channels]);
        let bottom = patches::bytes_per_line(channels);
        let [first, second] = &mut self.pixels;
        let rows: [&[u8]; 2] = [&self.input, &self.input[bottom..]];
        pooled_span(network, 0, &rows, 0..1, scratch, first);
        if network.convolutions.len() > 1 {
            for pixel in self.input.chunks_exact_mut(first.len()) {
                pixel.copy_from_slice(first);
            }
            pooled_span(
                network,
                1,
                &[self.input.as_slice(); 4],
                0..1,
                scratch,
                second,
            );
        }
    }
}
