//! Codestream headers: what a JPEG, JPEG-LS or JPEG 2000 frame claims about itself.
//!
//! In: one frame's codestream. Out: its size, precision and coding process, so that a frame that disagrees with its data set, or
//! that would make a decoder allocate more than the data set says, is refused before a decoder sees it. ISO/IEC 10918-1 B.2.2
//! (frame header), 14495-1 C.2.2, 15444-1 A.5.1 (SIZ). Entropy-coded data is left to the decoders.

/// What a frame's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Marker of the frame header: 0xC0 to 0xCF, 0xF7 for JPEG-LS; 0x51 (SIZ) for JPEG 2000.
    pub(super) marker: u8,
    /// Rows.
    pub(super) rows: u32,
    /// Columns.
    pub(super) columns: u32,
    /// Bits of a sample.
    pub(super) precision: u8,
    /// Components of a pixel.
    pub(super) n_components: u16,
}

/// Marker of a JPEG 2000 image and tile size segment.
pub(super) const SIZ: u8 = 0x51;
/// Most tiles of a JPEG 2000 frame.
const MAX_TILES: u64 = 1_024;
/// Most precincts of a JPEG 2000 frame; openjp2 needs about 2 KiB for each.
const MAX_PRECINCTS: u64 = 16_384;
/// Most packets (precincts x quality layers) of a JPEG 2000 frame; openjp2 allocates and visits them all.
const MAX_PACKETS: u64 = 262_144;
/// Smallest code-block exponent as written (2 less than it is): 16 rows or columns.
const MIN_CODE_BLOCK_EXPONENT: u8 = 2;
/// Most decomposition levels (15444-1 table A.15).
const MAX_LEVELS: u8 = 32;
/// Most marker segments before a frame header, and most in a JPEG 2000 codestream.
const MAX_SEGMENTS: usize = 256;
const MAX_JPEG2000_SEGMENTS: usize = 16_384;
/// How far into a frame a JPEG 2000 codestream may begin (some writers leave the file format's boxes around it).
const MAX_BOX_BYTES: usize = 1_024;

/// Bytes that [`begins`] looks at.
pub(super) const BEGIN_BYTES: usize = 4;

/// Whether the bytes begin a JPEG, JPEG-LS or JPEG 2000 codestream: tells where a frame begins among fragments.
pub(super) fn begins(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xFF, 0xD8, 0xFF]) || bytes.starts_with(&[0xFF, 0x4F, 0xFF, SIZ])
}

/// Reads the frame header of a JPEG or JPEG-LS codestream.
///
/// # Errors
///
/// What is wrong, where no frame header is found.
pub(super) fn jpeg(bytes: &[u8]) -> Result<Header, &'static str> {
    const BROKEN: &str = "a JPEG codestream without frame header";
    let mut rest = bytes
        .strip_prefix(&[0xFF, 0xD8])
        .ok_or("no JPEG start of image")?;
    for _ in 0..MAX_SEGMENTS {
        let [0xFF, marker, ..] = *rest else {
            return Err(BROKEN);
        };
        // Fill bytes before a marker (B.1.1.2).
        if marker == 0xFF {
            rest = &rest[1..];
            continue;
        }
        let length = rest
            .get(2..4)
            .map(|length| usize::from(u16::from_be_bytes([length[0], length[1]])))
            .ok_or(BROKEN)?;
        if matches!(marker, 0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF | 0xF7) {
            let &[_, _, _, _, precision, y0, y1, x0, x1, n_components] =
                rest.first_chunk().ok_or(BROKEN)?;
            return Ok(Header {
                marker,
                rows: u32::from(u16::from_be_bytes([y0, y1])),
                columns: u32::from(u16::from_be_bytes([x0, x1])),
                precision,
                n_components: u16::from(n_components),
            });
        }
        if marker == 0xDA || length < 2 {
            return Err(BROKEN);
        }
        rest = rest.get(2 + length..).ok_or(BROKEN)?;
    }
    Err(BROKEN)
}

/// Finds the codestream of a JPEG 2000 frame, reads its SIZ segment and holds its coding styles against the bounds.
///
/// # Errors
///
/// What is wrong, where there is none or its tiles, precincts, packets or code-blocks exceed the bounds.
pub(super) fn jpeg2000(bytes: &[u8]) -> Result<Header, &'static str> {
    let start = bytes
        .windows(4)
        .take(MAX_BOX_BYTES)
        .position(|window| window == [0xFF, 0x4F, 0xFF, SIZ])
        .ok_or("no JPEG 2000 codestream")?;
    let segment: &[u8; 41] = bytes
        .get(start + 4..)
        .and_then(<[u8]>::first_chunk)
        .ok_or("a JPEG 2000 header that breaks off")?;
    let word = |offset: usize| {
        u32::from_be_bytes([
            segment[offset],
            segment[offset + 1],
            segment[offset + 2],
            segment[offset + 3],
        ])
    };
    // Lsiz 0, Rsiz 2, Xsiz 4, Ysiz 8, XOsiz 12, YOsiz 16, XTsiz 20, YTsiz 24, XTOsiz 28, YTOsiz 32, Csiz 36, then Ssiz, XRsiz, YRsiz.
    let (x, y, x0, y0) = (word(4), word(8), word(12), word(16));
    let (tile_x, tile_y) = (word(20), word(24));
    if tile_x == 0 || tile_y == 0 || x0 != 0 || y0 != 0 || word(28) != 0 || word(32) != 0 {
        return Err("a JPEG 2000 image or tile with an offset or without size");
    }
    if u64::from(x.div_ceil(tile_x)) * u64::from(y.div_ceil(tile_y)) > MAX_TILES {
        return Err("more JPEG 2000 tiles than allowed");
    }
    if segment[39] != 1 || segment[40] != 1 {
        return Err("a subsampled JPEG 2000 component");
    }
    let tiles = Tiles {
        rows: tile_y.min(y),
        columns: tile_x.min(x),
        n_tiles: u64::from(x.div_ceil(tile_x)) * u64::from(y.div_ceil(tile_y)),
    };
    check_coding_styles(bytes.get(start + 2..).unwrap_or_default(), &tiles)?;
    Ok(Header {
        marker: SIZ,
        rows: y,
        columns: x,
        precision: (segment[38] & 0x7F) + 1,
        n_components: u16::from_be_bytes([segment[36], segment[37]]),
    })
}

/// Size and number of a JPEG 2000 frame's tiles.
#[derive(Debug)]
struct Tiles {
    rows: u32,
    columns: u32,
    n_tiles: u64,
}

/// Walks the marker segments of the main header and of all tile-part headers (15444-1 A.2) and checks every coding style in them.
/// A codestream that ends without its last marker passes: decoders take what there is.
fn check_coding_styles(codestream: &[u8], tiles: &Tiles) -> Result<(), &'static str> {
    const BROKEN: &str = "a JPEG 2000 header that is malformed";
    let mut position = 0;
    let mut tile_part_end = codestream.len();
    let mut n_layers = 1;
    for _ in 0..MAX_JPEG2000_SEGMENTS {
        let Some(&[0xFF, marker, l0, l1]) =
            codestream.get(position..).and_then(<[u8]>::first_chunk)
        else {
            return if position + 4 > codestream.len() {
                Ok(())
            } else {
                Err(BROKEN)
            };
        };
        // End of codestream, and start of data: the tile-part's packets are stepped over.
        match marker {
            0xD9 => return Ok(()),
            0x93 if tile_part_end > position => {
                position = tile_part_end;
                continue;
            }
            _ => {}
        }
        let length = usize::from(u16::from_be_bytes([l0, l1]));
        let Some(segment) = codestream.get(position + 4..position + 2 + length) else {
            return Err(BROKEN);
        };
        match (marker, segment) {
            // Start of tile-part; length 0 means up to the end.
            (0x90, &[_, _, p0, p1, p2, p3, ..]) => {
                tile_part_end = match u32::from_be_bytes([p0, p1, p2, p3]) {
                    0 => codestream.len(),
                    length => position.saturating_add(length as usize),
                };
            }
            // Coding style default: style, progression, layers, component transform, then the component's style.
            (0x52, &[style, _, n0, n1, _, ref rest @ ..]) => {
                n_layers = u16::from_be_bytes([n0, n1]);
                check_coding_style(style, rest, n_layers, tiles)?;
            }
            // Coding style of a component.
            (0x53, &[_, style, ref rest @ ..]) => check_coding_style(style, rest, n_layers, tiles)?,
            (0x90 | 0x52 | 0x53, _) => return Err(BROKEN),
            _ => {}
        }
        position += 2 + length;
    }
    Err("more JPEG 2000 marker segments than allowed")
}

/// Counts the precincts and packets that a coding style makes (15444-1 A.6.1, B.6).
fn check_coding_style(
    style: u8,
    parameters: &[u8],
    n_layers: u16,
    tiles: &Tiles,
) -> Result<(), &'static str> {
    const BROKEN: &str = "a JPEG 2000 coding style that is malformed";
    let &[levels, block_columns, block_rows, _, _, ref precincts @ ..] = parameters else {
        return Err(BROKEN);
    };
    if levels > MAX_LEVELS || block_columns.min(block_rows) < MIN_CODE_BLOCK_EXPONENT {
        return Err("JPEG 2000 decomposition levels or code-blocks outside the allowed sizes");
    }
    let mut n_precincts = 0_u64;
    for resolution in 0..=levels {
        let exponents = if style & 1 == 0 {
            0xFF
        } else {
            *precincts.get(usize::from(resolution)).ok_or(BROKEN)?
        };
        let scale = u32::from(levels - resolution);
        let across = |side: u32, exponent: u8| {
            let side = u64::from(side).div_ceil(1 << scale);
            side.div_ceil(1 << exponent)
        };
        n_precincts += across(tiles.columns, exponents & 0x0F) * across(tiles.rows, exponents >> 4);
    }
    n_precincts = n_precincts.saturating_mul(tiles.n_tiles);
    if n_precincts > MAX_PRECINCTS || n_precincts * u64::from(n_layers) > MAX_PACKETS {
        return Err("more JPEG 2000 precincts or packets than allowed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frame_header_is_found_behind_other_segments() {
        let bytes = [
            0xFF, 0xD8, 0xFF, 0xE0, 0, 4, 1, 2, 0xFF, 0xFF, 0xC3, 0, 11, 16, 2, 0, 1, 0, 1, 1,
            0x11, 0,
        ];
        assert_eq!(
            jpeg(&bytes),
            Ok(Header {
                marker: 0xC3,
                rows: 512,
                columns: 256,
                precision: 16,
                n_components: 1
            })
        );
        for end in 0..19 {
            assert!(jpeg(&bytes[..end]).is_err());
        }
    }

    /// A codestream of one tile with the given segment after SIZ.
    fn codestream(side: u32, segment: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0xFF, 0x4F, 0xFF, SIZ, 0, 41, 0, 0];
        for word in [side, side, 0, 0, side, side, 0, 0] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend([0, 1, 15, 1, 1]);
        bytes.extend(segment);
        bytes.extend([0xFF, 0xD9, 0, 0]);
        bytes
    }

    #[test]
    fn coding_styles_are_held_against_the_bounds() {
        let check = |side: u32, segment: &[u8], is_allowed: bool| {
            let answer = jpeg2000(&codestream(side, segment));
            assert_eq!(
                answer.is_ok(),
                is_allowed,
                "{side} {segment:02X?}: {answer:?}"
            );
        };
        // Five levels, blocks of 64, one layer, no precincts.
        let usual = [0xFF, 0x52, 0, 12, 0, 0, 0, 1, 0, 5, 4, 4, 0, 1];
        check(2048, &usual, true);
        let with = |changes: &[(usize, u8)], more: &[u8]| {
            let mut segment = [&usual[..], more].concat();
            for &(place, value) in changes {
                segment[place] = value;
            }
            segment
        };
        check(2048, &with(&[(9, 33)], &[]), false);
        check(2048, &with(&[(10, 0)], &[]), false);
        check(2048, &with(&[(3, 18), (4, 1)], &[0x77; 6]), true);
        check(2048, &with(&[(3, 18), (4, 1)], &[0x11; 6]), false);
        check(
            2048,
            &with(&[(3, 18), (4, 1), (6, 0xFF)], &[0x77; 6]),
            false,
        );
        check(2048, &with(&[(4, 1)], &[]), false);
        check(2048, &[0xFF, 0x52, 0, 3, 1], false);
        check(2048, &[0xFF, 0x64, 0xFF, 0xFF], false);
        // In the header of a tile-part, and for a component.
        let tile_part = [0xFF, 0x90, 0, 10, 0, 0, 0, 0, 0, 0, 0, 1];
        check(
            2048,
            &[
                &usual[..],
                &tile_part,
                &with(&[(3, 18), (4, 1)], &[0x11; 6]),
            ]
            .concat(),
            false,
        );
        let component = [0xFF, 0x53, 0, 15, 0, 1, 5, 4, 4, 0, 1, 0, 0, 0, 0, 0, 0];
        check(2048, &[&usual[..], &component].concat(), false);
        check(
            2048,
            &[&usual[..], &tile_part, &[0xFF, 0x93], &[0; 50]].concat(),
            true,
        );
    }

    #[test]
    fn tile_bomb_is_refused() {
        let mut bytes = vec![0xFF, 0x4F, 0xFF, SIZ, 0, 41, 0, 0];
        for word in [4096_u32, 4096, 0, 0, 1, 1, 0, 0] {
            bytes.extend(word.to_be_bytes());
        }
        bytes.extend([0, 1, 15, 1, 1]);
        assert_eq!(jpeg2000(&bytes), Err("more JPEG 2000 tiles than allowed"));
    }
}
