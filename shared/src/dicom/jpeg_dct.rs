//! Lossy JPEG: one grey frame of the baseline and extended sequential processes (1, 2 and 4), of 8 or 12 bits.
//!
//! In: one frame's codestream, whose header [`super::codestream`] has compared with the data set. Out: its samples, 16 bits
//! little endian. ISO/IEC 10918-1: B.2 (marker segments), F.2 (sequential Huffman decoding), A.3.3 (inverse DCT), all for one
//! component in one scan. (jpeg-decoder refuses 12 bits, and its inverse DCT differs between CPUs.) Here the inverse DCT is computed
//! in f64 with written-out cosines, so that every CPU gives the same samples. Arithmetic coding, progression and several components
//! are left out: no transfer syntax still in use asks for them in CT.

use std::f64::consts::FRAC_1_SQRT_2;

/// Most marker segments before the scan.
const MAX_SEGMENTS: usize = 256;
/// Rows and columns of a block.
const BLOCK: usize = 8;
/// Longest Huffman code in bits.
const MAX_CODE_BITS: usize = 16;

const BROKEN: &str = "a JPEG codestream that breaks off or is malformed";
const UNSUPPORTED: &str = "a JPEG scan of another form than one sequential grey component";

/// Where the k-th coefficient of the zigzag order lies, row-major (A.3.6).
const ZIGZAG: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// cos(k pi / 16) for k = 0 to 8.
const COSINES: [f64; 9] = [
    1.0,
    0.980_785_280_403_230_4,
    0.923_879_532_511_286_7,
    0.831_469_612_302_545_2,
    FRAC_1_SQRT_2,
    0.555_570_233_019_602_2,
    0.382_683_432_365_089_8,
    0.195_090_322_016_128_27,
    0.0,
];

/// `[x][u]`: c(u) / 2 x cos((2x + 1) u pi / 16), c(0) = 1 / sqrt(2), otherwise 1 (A.3.3).
static BASIS: [[f64; BLOCK]; BLOCK] = basis();

/// Decodes one frame of `rows` x `columns` samples.
///
/// # Errors
///
/// What is wrong, where the codestream breaks off or is not as B.2 and F.2 say.
pub(super) fn decode(codestream: &[u8], rows: u16, columns: u16) -> Result<Vec<u8>, &'static str> {
    let (rows, columns) = (usize::from(rows), usize::from(columns));
    let scan = Scan::read(codestream)?;
    let mut bits = Bits::new(scan.entropy_coded);
    let mut samples = vec![0; rows * columns * 2];
    let blocks_across = columns.div_ceil(BLOCK);
    let mut dc = 0_i32;
    for block_index in 0..blocks_across * rows.div_ceil(BLOCK) {
        if scan.restart_interval > 0 && block_index > 0 && block_index % scan.restart_interval == 0
        {
            bits.restart()?;
            dc = 0;
        }
        let coefficients = scan.block(&mut bits, &mut dc)?;
        let (top, left) = (
            block_index / blocks_across * BLOCK,
            block_index % blocks_across * BLOCK,
        );
        let block = inverse_dct(&coefficients);
        for (row, values) in (top..rows).zip(block.chunks_exact(BLOCK)) {
            for (column, value) in (left..columns).zip(values) {
                let place = (row * columns + column) * 2;
                samples[place..place + 2]
                    .copy_from_slice(&sample(*value, scan.precision).to_le_bytes());
            }
        }
    }
    Ok(samples)
}

/// Undoes the level shift (A.3.1), rounds half up and keeps to the range of `precision` bits.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the value is clamped to 0 to 4095, and NaN becomes 0"
)]
fn sample(value: f64, precision: u8) -> u16 {
    let beyond = f64::from(1_u16 << precision);
    (value + beyond / 2.0 + 0.5)
        .floor()
        .clamp(0.0, beyond - 1.0) as u16
}

/// The 8 x 8 inverse DCT (A.3.3), rows first; input row-major by vertical, then horizontal frequency.
fn inverse_dct(coefficients: &[f64; 64]) -> [f64; 64] {
    let mut across = [0.0; 64];
    for (target, row) in across
        .chunks_exact_mut(BLOCK)
        .zip(coefficients.chunks_exact(BLOCK))
    {
        for (value, basis) in target.iter_mut().zip(&BASIS) {
            *value = row
                .iter()
                .zip(basis)
                .map(|(coefficient, weight)| coefficient * weight)
                .sum();
        }
    }
    let mut block = [0.0; 64];
    for (target, basis) in block.chunks_exact_mut(BLOCK).zip(&BASIS) {
        for (row, weight) in across.chunks_exact(BLOCK).zip(basis) {
            for (value, coefficient) in target.iter_mut().zip(row) {
                *value += coefficient * weight;
            }
        }
    }
    block
}

const fn basis() -> [[f64; BLOCK]; BLOCK] {
    let mut basis = [[0.0; BLOCK]; BLOCK];
    let mut x = 0;
    while x < BLOCK {
        let mut u = 0;
        while u < BLOCK {
            // The cosine's period is 32 sixteenths of pi; it is even, and odd about 8.
            let k = (2 * x + 1) * u % 32;
            let k = if k > 16 { 32 - k } else { k };
            let cosine = if k > 8 { -COSINES[16 - k] } else { COSINES[k] };
            let scale = if u == 0 { FRAC_1_SQRT_2 } else { 1.0 };
            basis[x][u] = scale / 2.0 * cosine;
            u += 1;
        }
        x += 1;
    }
    basis
}

/// A scan with the tables it uses.
#[derive(Debug)]
struct Scan<'a> {
    /// Bits of a sample: 8 or 12.
    precision: u8,
    /// Divisors in zigzag order.
    quantization: [u16; 64],
    dc: HuffmanTable,
    ac: HuffmanTable,
    /// Blocks between restart markers, 0 for none.
    restart_interval: usize,
    /// What follows the scan header.
    entropy_coded: &'a [u8],
}

/// Tables and parameters met before the scan.
#[derive(Debug, Default)]
struct Tables {
    quantization: [Option<[u16; 64]>; 4],
    dc: [Option<HuffmanTable>; 4],
    ac: [Option<HuffmanTable>; 4],
    restart_interval: usize,
    /// Precision and the component's quantization table, by the frame header.
    frame: Option<(u8, usize)>,
}

impl<'a> Scan<'a> {
    /// Reads the marker segments up to the scan header.
    fn read(codestream: &'a [u8]) -> Result<Self, &'static str> {
        let mut rest = codestream.strip_prefix(&[0xFF, 0xD8]).ok_or(BROKEN)?;
        let mut tables = Tables::default();
        for _ in 0..MAX_SEGMENTS {
            let &[0xFF, marker, l0, l1] = rest.first_chunk().ok_or(BROKEN)? else {
                return Err(BROKEN);
            };
            // Fill bytes before a marker (B.1.1.2).
            if marker == 0xFF {
                rest = &rest[1..];
                continue;
            }
            let end = 2 + usize::from(u16::from_be_bytes([l0, l1]));
            let segment = rest.get(4..end).ok_or(BROKEN)?;
            rest = &rest[end..];
            match marker {
                0xDB => tables.quantization(segment)?,
                0xC4 => tables.huffman(segment)?,
                0xC0 | 0xC1 => tables.frame(segment)?,
                0xDD => {
                    let &[r0, r1] = segment else {
                        return Err(BROKEN);
                    };
                    tables.restart_interval = usize::from(u16::from_be_bytes([r0, r1]));
                }
                0xDA => return tables.scan(segment, rest),
                // Application data and comments.
                0xE0..=0xEF | 0xFE => {}
                _ => return Err(UNSUPPORTED),
            }
        }
        Err(BROKEN)
    }

    /// Decodes one block's coefficients (F.2.2) and multiplies them with the quantization table, row-major.
    fn block(&self, bits: &mut Bits<'_>, dc: &mut i32) -> Result<[f64; 64], &'static str> {
        let mut coefficients = [0.0; 64];
        let size = self.dc.symbol(bits)?;
        *dc = dc.wrapping_add(bits.signed(size)?);
        coefficients[0] = f64::from(*dc) * f64::from(self.quantization[0]);
        let mut k = 0;
        while k < 63 {
            let symbol = self.ac.symbol(bits)?;
            let (run, size) = (usize::from(symbol >> 4), symbol & 0x0F);
            match (run, size) {
                (15, 0) => k += 16,
                (_, 0) => break,
                _ => {
                    k += run + 1;
                    let place = *ZIGZAG.get(k).ok_or(BROKEN)?;
                    coefficients[place] =
                        f64::from(bits.signed(size)?) * f64::from(self.quantization[k]);
                }
            }
        }
        Ok(coefficients)
    }
}

impl Tables {
    /// A DQT segment (B.2.4.1).
    fn quantization(&mut self, mut segment: &[u8]) -> Result<(), &'static str> {
        while let Some((&head, values)) = segment.split_first() {
            let width = match head >> 4 {
                0 => 1,
                1 => 2,
                _ => return Err(BROKEN),
            };
            let bytes = values.get(..64 * width).ok_or(BROKEN)?;
            let mut table = [0; 64];
            for (entry, value) in table.iter_mut().zip(bytes.chunks_exact(width)) {
                *entry = value
                    .iter()
                    .fold(0, |entry, &byte| entry << 8 | u16::from(byte));
            }
            *self
                .quantization
                .get_mut(usize::from(head & 0x0F))
                .ok_or(BROKEN)? = Some(table);
            segment = &values[64 * width..];
        }
        Ok(())
    }

    /// A DHT segment (B.2.4.2).
    fn huffman(&mut self, mut segment: &[u8]) -> Result<(), &'static str> {
        while let Some((&head, rest)) = segment.split_first() {
            let (table, rest) = HuffmanTable::read(rest)?;
            let tables = match head >> 4 {
                0 => &mut self.dc,
                1 => &mut self.ac,
                _ => return Err(BROKEN),
            };
            *tables.get_mut(usize::from(head & 0x0F)).ok_or(BROKEN)? = Some(table);
            segment = rest;
        }
        Ok(())
    }

    /// The frame header (B.2.2); its size has been compared with the data set already.
    fn frame(&mut self, segment: &[u8]) -> Result<(), &'static str> {
        match *segment {
            [
                precision @ (8 | 12),
                _,
                _,
                _,
                _,
                1,
                _,
                _,
                quantization @ 0..=3,
            ] => {
                self.frame = Some((precision, usize::from(quantization)));
                Ok(())
            }
            _ => Err(UNSUPPORTED),
        }
    }

    /// The scan header (B.2.3).
    fn scan<'a>(
        mut self,
        segment: &[u8],
        entropy_coded: &'a [u8],
    ) -> Result<Scan<'a>, &'static str> {
        let &[1, _, selectors, 0, 63, 0] = segment else {
            return Err(UNSUPPORTED);
        };
        let table = |tables: &mut [Option<HuffmanTable>; 4], index: u8| {
            tables
                .get_mut(usize::from(index))
                .and_then(Option::take)
                .ok_or(BROKEN)
        };
        let (precision, quantization) = self.frame.ok_or(BROKEN)?;
        Ok(Scan {
            precision,
            quantization: self.quantization[quantization].ok_or(BROKEN)?,
            dc: table(&mut self.dc, selectors >> 4)?,
            ac: table(&mut self.ac, selectors & 0x0F)?,
            restart_interval: self.restart_interval,
            entropy_coded,
        })
    }
}

/// A Huffman table in canonical form (annex C, F.2.2.3).
#[derive(Debug)]
struct HuffmanTable {
    /// For each code length: the first code beyond that length's codes, and what to add to a code to get its symbol's index.
    lengths: [(i32, i32); MAX_CODE_BITS],
    symbols: Vec<u8>,
}

impl HuffmanTable {
    /// Reads counts and symbols; also gives what follows.
    fn read(bytes: &[u8]) -> Result<(Self, &[u8]), &'static str> {
        let (counts, rest) = bytes.split_first_chunk::<MAX_CODE_BITS>().ok_or(BROKEN)?;
        let n_symbols = counts.iter().map(|&count| usize::from(count)).sum();
        let symbols = rest.get(..n_symbols).ok_or(BROKEN)?.to_vec();
        let mut lengths = [(0, 0); MAX_CODE_BITS];
        let (mut code, mut index) = (0_i32, 0_i32);
        for (length, &count) in lengths.iter_mut().zip(counts) {
            let count = i32::from(count);
            *length = (code + count, index - code);
            index += count;
            // Wrong counts run beyond the codes of their length; 16 doublings of 256 stay far inside 32 bits.
            code = (code + count) << 1;
        }
        Ok((Self { lengths, symbols }, &rest[n_symbols..]))
    }

    /// Decodes the next symbol.
    fn symbol(&self, bits: &mut Bits<'_>) -> Result<u8, &'static str> {
        let mut code = 0_i32;
        for (beyond, offset) in self.lengths {
            code = code << 1 | i32::from(bits.bit()?);
            if code < beyond {
                let index = usize::try_from(code + offset).map_err(|_| BROKEN)?;
                return self.symbols.get(index).copied().ok_or(BROKEN);
            }
        }
        Err(BROKEN)
    }
}

/// Entropy-coded bits, without stuffed bytes.
#[derive(Debug)]
struct Bits<'a> {
    bytes: &'a [u8],
    current: u8,
    n_left: u8,
}

impl<'a> Bits<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            current: 0,
            n_left: 0,
        }
    }

    fn bit(&mut self) -> Result<bool, &'static str> {
        if self.n_left == 0 {
            let (&byte, rest) = self.bytes.split_first().ok_or(BROKEN)?;
            self.bytes = match (byte, rest) {
                (0xFF, [0, rest @ ..]) => rest,
                (0xFF, _) => return Err(BROKEN),
                _ => rest,
            };
            self.current = byte;
            self.n_left = 8;
        }
        self.n_left -= 1;
        Ok(self.current >> self.n_left & 1 == 1)
    }

    /// A number of `size` bits in JPEG's signed form: EXTEND (F.2.2.1).
    fn signed(&mut self, size: u8) -> Result<i32, &'static str> {
        let mut value = 0_i32;
        for _ in 0..size {
            value = value << 1 | i32::from(self.bit()?);
        }
        match size {
            0 => Ok(0),
            1..=15 if value >> (size - 1) == 0 => Ok(value - (1 << size) + 1),
            1..=15 => Ok(value),
            _ => Err(BROKEN),
        }
    }

    /// Steps over a restart marker (F.2.1.3.1).
    fn restart(&mut self) -> Result<(), &'static str> {
        self.n_left = 0;
        match self.bytes {
            [0xFF, 0xD0..=0xD7, rest @ ..] => {
                self.bytes = rest;
                Ok(())
            }
            _ => Err(BROKEN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIDE: u16 = 20;

    /// A picture with edges and gradients over the whole 12-bit range.
    fn picture() -> Vec<u16> {
        (0..SIDE * SIDE)
            .map(|index| (index / SIDE * 150 + index % SIDE * 57) % 4096)
            .collect()
    }

    /// Codes `picture` with all divisors 1 and Huffman codes of 8 bits each.
    fn encode(picture: &[u16], restart_interval: u16) -> Vec<u8> {
        let symbols: Vec<u8> = (0..=254).collect();
        let mut bytes = vec![0xFF, 0xD8, 0xFF, 0xDB, 0, 67, 0];
        bytes.extend([1; 64]);
        bytes.extend([0xFF, 0xC1, 0, 11, 12, 0, 20, 0, 20, 1, 1, 0x11, 0]);
        for head in [0x00, 0x10] {
            bytes.extend([
                0xFF, 0xC4, 1, 18, head, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 0,
            ]);
            bytes.extend(&symbols);
        }
        bytes.extend([0xFF, 0xDD, 0, 4]);
        bytes.extend(restart_interval.to_be_bytes());
        bytes.extend([0xFF, 0xDA, 0, 8, 1, 1, 0x00, 0, 63, 0]);
        let mut writer = Writer {
            bytes,
            current: 0,
            n_bits: 0,
        };
        let side = usize::from(SIDE);
        let across = side.div_ceil(BLOCK);
        let mut prediction = 0;
        for index in 0..across * across {
            if restart_interval > 0 && index > 0 && index % usize::from(restart_interval) == 0 {
                writer.align();
                let marker =
                    0xD0 + u8::try_from((index / usize::from(restart_interval) - 1) % 8).unwrap();
                writer.bytes.extend([0xFF, marker]);
                prediction = 0;
            }
            let block = forward(picture, index / across * BLOCK, index % across * BLOCK);
            writer.coefficient(0, block[0] - prediction);
            prediction = block[0];
            let mut run = 0;
            for &value in &block[1..] {
                if value == 0 {
                    run += 1;
                    continue;
                }
                while run > 15 {
                    writer.bits(0xF0, 8);
                    run -= 16;
                }
                writer.coefficient(run, value);
                run = 0;
            }
            if run > 0 {
                writer.bits(0, 8);
            }
        }
        writer.align();
        writer.bytes.extend([0xFF, 0xD9]);
        writer.bytes
    }

    /// The forward DCT of one block, zigzag, rounded.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a coefficient of 12-bit samples has 15 bits"
    )]
    fn forward(picture: &[u16], top: usize, left: usize) -> [i32; 64] {
        let side = usize::from(SIDE);
        let value = |row: usize, column: usize| {
            f64::from(picture[row.min(side - 1) * side + column.min(side - 1)]) - 2048.0
        };
        ZIGZAG.map(|place| {
            let (v, u) = (place / BLOCK, place % BLOCK);
            let places = (0..BLOCK).flat_map(|y| (0..BLOCK).map(move |x| (y, x)));
            let sum: f64 = places
                .map(|(y, x)| value(top + y, left + x) * BASIS[y][v] * BASIS[x][u])
                .sum();
            sum.round() as i32
        })
    }

    struct Writer {
        bytes: Vec<u8>,
        current: u8,
        n_bits: u8,
    }

    impl Writer {
        fn bits(&mut self, value: u32, n_bits: u32) {
            for place in (0..n_bits).rev() {
                self.current = self.current << 1 | u8::from(value >> place & 1 == 1);
                self.n_bits += 1;
                if self.n_bits == 8 {
                    self.bytes.push(self.current);
                    if self.current == 0xFF {
                        self.bytes.push(0);
                    }
                    self.n_bits = 0;
                }
            }
        }

        fn coefficient(&mut self, run: u32, value: i32) {
            let size = 32 - value.unsigned_abs().leading_zeros();
            self.bits(run << 4 | size, 8);
            let bits = if value < 0 { value - 1 } else { value };
            self.bits(bits.cast_unsigned() & ((1 << size) - 1), size);
        }

        fn align(&mut self) {
            while self.n_bits != 0 {
                self.bits(1, 1);
            }
        }
    }

    #[test]
    fn decoded_samples_are_those_encoded() {
        for restart_interval in [0, 1, 4] {
            let decoded = decode(&encode(&picture(), restart_interval), SIDE, SIDE).unwrap();
            let decoded = decoded
                .chunks_exact(2)
                .map(|cell| u16::from_le_bytes([cell[0], cell[1]]));
            for (index, (found, expected)) in decoded.zip(picture()).enumerate() {
                assert!(
                    found.abs_diff(expected) <= 2,
                    "{index}: {found} for {expected}"
                );
            }
        }
    }

    #[test]
    fn truncation_and_damage_are_answered() {
        let whole = encode(&picture(), 4);
        for end in 0..whole.len() - 2 {
            assert!(decode(&whole[..end], SIDE, SIDE).is_err(), "{end}");
        }
        for place in 0..whole.len() {
            for value in [0, 0x7F, 0xFF] {
                let mut damaged = whole.clone();
                damaged[place] = value;
                let answer = decode(&damaged, SIDE, SIDE);
                assert!(answer.is_err() || answer.is_ok_and(|samples| samples.len() == 800));
            }
        }
    }

    #[test]
    fn basis_is_orthonormal() {
        for u in 0..BLOCK {
            for v in 0..BLOCK {
                let product: f64 = BASIS.iter().map(|row| row[u] * row[v]).sum();
                let expected = if u == v { 1.0 } else { 0.0 };
                assert!((product - expected).abs() < 1e-15);
            }
        }
    }
}
