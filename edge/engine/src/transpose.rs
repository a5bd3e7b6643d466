//! Bytes `[row, column]` turned to `[column, row]`.

/// Side of the squares that are turned at once, in eight words.
const SQUARE: usize = 8;

/// A matrix of bytes: `columns` values in each row, rows `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) stride: usize,
}

/// `to[column x to_stride + row] = from[row x stride + column]`.
///
/// # Panics
///
/// Where a slice is too short.
pub(crate) fn transpose(from: &[u8], of: Matrix, to: &mut [u8], to_stride: usize) {
    let whole = [of.rows, of.columns].map(|n| n / SQUARE * SQUARE);
    for row in (0..whole[0]).step_by(SQUARE) {
        for column in (0..whole[1]).step_by(SQUARE) {
            let line = |index: usize| {
                let bytes = from[(row + index) * of.stride + column..].first_chunk();
                u64::from_le_bytes(*bytes.expect("eight columns are left"))
            };
            let turned = turn(std::array::from_fn(line));
            for (index, word) in turned.into_iter().enumerate() {
                to[(column + index) * to_stride + row..][..SQUARE]
                    .copy_from_slice(&word.to_le_bytes());
            }
        }
    }
    let below =
        (whole[0]..of.rows).flat_map(|row| (0..of.columns).map(move |column| (row, column)));
    let beside =
        (0..whole[0]).flat_map(|row| (whole[1]..of.columns).map(move |column| (row, column)));
    for (row, column) in below.chain(beside) {
        to[column * to_stride + row] = from[row * of.stride + column];
    }
}

/// Eight words of eight bytes, byte `j` of word `i` to byte `i` of word `j`: squares of 4, 2 and 1 bytes change places across the diagonal.
fn turn(mut words: [u64; SQUARE]) -> [u64; SQUARE] {
    for (distance, mask) in [
        (4, 0x0000_0000_ffff_ffff_u64),
        (2, 0x0000_ffff_0000_ffff),
        (1, 0x00ff_00ff_00ff_00ff),
    ] {
        let shift = 8 * distance;
        for upper in (0..SQUARE).filter(|index| index & distance == 0) {
            let lower = upper + distance;
            let (a, b) = (words[upper], words[lower]);
            words[upper] = a & mask | (b & mask) << shift;
            words[lower] = a >> shift & mask | b & !mask;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_is_turned() {
        for rows in 0..20 {
            for columns in 0..20 {
                let of = Matrix {
                    rows,
                    columns,
                    stride: columns + 3,
                };
                let from: Vec<u8> = (0..=255).cycle().take(rows * of.stride).collect();
                let mut to = vec![0; columns * (rows + 2)];
                transpose(&from, of, &mut to, rows + 2);
                for (column, line) in to.chunks_exact(rows + 2).enumerate() {
                    let expected = (0..rows).map(|row| from[row * of.stride + column]);
                    let expected: Vec<u8> = expected.chain([0, 0]).collect();
                    assert_eq!(line, expected, "{rows} x {columns}");
                }
            }
        }
    }
}
