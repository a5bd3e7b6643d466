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
/// Most marker segments before a frame header.
const MAX_SEGMENTS: usize = 256;
/// How far into a frame a JPEG 2000 codestream may begin (some writers leave the file format's boxes around it).
const MAX_BOX_BYTES: usize = 1_024;

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

/// Finds the codestream of a JPEG 2000 frame and reads its SIZ segment.
///
/// # Errors
///
/// What is wrong, where there is none or its tiles exceed the bound.
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
    Ok(Header {
        marker: SIZ,
        rows: y,
        columns: x,
        precision: (segment[38] & 0x7F) + 1,
        n_components: u16::from_be_bytes([segment[36], segment[37]]),
    })
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
