//! RLE Lossless (PS3.5 annex G): the encoder that the DICOM library lacks.
//!
//! 16-bit cells come in as little-endian bytes; one frame's segments (most significant byte first) go out behind their header.

use alloc::vec::Vec;

/// Encodes one frame of 16-bit cells (`little_endian`, rows of `columns` cells) as an RLE fragment of even length.
pub(super) fn encode(little_endian: &[u8], columns: usize) -> Vec<u8> {
    let n = little_endian.len() / 2;
    let mut out = alloc::vec![0; 64];
    out[0] = 2;
    let mut plane = Vec::with_capacity(n);
    for (segment, byte) in [1, 0].into_iter().enumerate() {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a frame of at most 1024 x 1024 cells is below 4 GiB"
        )]
        let offset = out.len() as u32;
        out[4 + 4 * segment..8 + 4 * segment].copy_from_slice(&offset.to_le_bytes());
        plane.clear();
        plane.extend(little_endian.chunks_exact(2).map(|cell| cell[byte]));
        // Each row is encoded by itself (PS3.5 G.3.1).
        for row in plane.chunks(columns.max(1)) {
            pack(row, &mut out);
        }
        if out.len() % 2 == 1 {
            out.push(0);
        }
    }
    out
}

/// PackBits of one row.
fn pack(row: &[u8], out: &mut Vec<u8>) {
    let mut at = 0;
    while at < row.len() {
        let run = run_length(&row[at..]);
        if run >= 3 {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "a run has at most 128 bytes"
            )]
            out.push((257 - run) as u8);
            out.push(row[at]);
            at += run;
            continue;
        }
        let mut end = at + run;
        while end < row.len() && end - at < 128 && run_length(&row[end..]) < 3 {
            end += 1;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a literal has at most 128 bytes"
        )]
        out.push((end - at - 1) as u8);
        out.extend_from_slice(&row[at..end]);
        at = end;
    }
}

/// How often the first byte repeats, at most 128.
fn run_length(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .take(128)
        .take_while(|&&byte| Some(&byte) == bytes.first())
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(mut packed: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        while let [control, rest @ ..] = packed {
            let control = usize::from(*control);
            if control < 128 {
                out.extend_from_slice(&rest[..control + 1]);
                packed = &rest[control + 1..];
            } else {
                out.extend(core::iter::repeat_n(rest[0], 257 - control));
                packed = &rest[1..];
            }
        }
        out
    }

    #[test]
    fn packed_rows_unpack_to_themselves() {
        for seed in 0..200_u64 {
            let mut random = super::super::random::Random::new(seed, 0);
            let row: Vec<u8> = (0..random.below(700))
                .map(|_| {
                    if random.chance(0.6) {
                        7
                    } else {
                        random.bits().to_le_bytes()[0] & 3
                    }
                })
                .collect();
            let mut packed = Vec::new();
            pack(&row, &mut packed);
            assert_eq!(unpack(&packed), row, "seed {seed}");
        }
    }
}
