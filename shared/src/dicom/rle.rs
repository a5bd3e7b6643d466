//! RLE Lossless: one frame of segments to native little-endian values.
//!
//! In: one frame's fragment. Out: exactly rows x columns x bytes per sample, or an error; nothing else is allocated, whatever the
//! segments claim. PS3.5 annex G: a header of 16 32-bit numbers (segment count, segment offsets), then one PackBits segment for
//! each byte of a sample, the most significant byte first. (dicom-rs' decoder trusts the segment count and lets PackBits expand
//! without bound.)

/// Bytes of the header: the count and 15 offsets.
const HEADER_BYTES: usize = 64;
/// Most segments that the header can name.
const MAX_SEGMENTS: usize = 15;

/// Decodes one frame of `n_samples` samples of `sample_bytes` bytes.
///
/// # Errors
///
/// What is wrong, where the header or a segment is not as annex G says.
pub(super) fn decode(
    fragment: &[u8],
    n_samples: usize,
    sample_bytes: usize,
) -> Result<Vec<u8>, &'static str> {
    let offsets = segment_offsets(fragment)?;
    if offsets.len() != sample_bytes {
        return Err("another number of RLE segments than bytes in a sample");
    }
    let mut values = vec![0; n_samples * sample_bytes];
    for (segment_index, &start) in offsets.iter().enumerate() {
        let end = offsets
            .get(segment_index + 1)
            .copied()
            .unwrap_or(fragment.len());
        let segment = fragment
            .get(start..end)
            .ok_or("an RLE segment outside the fragment")?;
        // The first segment holds the most significant byte; values are written little endian.
        let byte_index = sample_bytes - 1 - segment_index;
        let mut target = values.iter_mut().skip(byte_index).step_by(sample_bytes);
        unpack(segment, &mut target)?;
    }
    Ok(values)
}

/// The offsets of the segments, in rising order.
fn segment_offsets(fragment: &[u8]) -> Result<Vec<usize>, &'static str> {
    let header = fragment
        .get(..HEADER_BYTES)
        .ok_or("an RLE header that breaks off")?;
    let mut words = header
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]) as usize);
    let n_segments = words.next().unwrap_or(0);
    if n_segments == 0 || n_segments > MAX_SEGMENTS {
        return Err("an RLE segment count outside 1 to 15");
    }
    Ok(words.take(n_segments).collect())
}

/// Unpacks one PackBits segment (PS3.5 section G.3.2) into `target` until that is full.
fn unpack<'v>(
    segment: &[u8],
    target: &mut impl Iterator<Item = &'v mut u8>,
) -> Result<(), &'static str> {
    const SHORT: &str = "an RLE segment that ends before its last pixel";
    let mut bytes = segment.iter().copied();
    let mut next = target.next();
    while next.is_some() {
        let control = bytes.next().ok_or(SHORT)?;
        let (n_values, repeated) = match control {
            0..=127 => (usize::from(control) + 1, None),
            128 => continue,
            129..=255 => (257 - usize::from(control), Some(bytes.next().ok_or(SHORT)?)),
        };
        for _ in 0..n_values {
            let Some(value) = next else {
                return Ok(());
            };
            *value = match repeated {
                Some(value) => value,
                None => bytes.next().ok_or(SHORT)?,
            };
            next = target.next();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(segments: &[&[u8]]) -> Vec<u8> {
        let mut frame = vec![0; HEADER_BYTES];
        frame[0] = u8::try_from(segments.len()).unwrap();
        for (index, segment) in segments.iter().enumerate() {
            let offset = u32::try_from(frame.len()).unwrap();
            frame[4 * (index + 1)..4 * (index + 2)].copy_from_slice(&offset.to_le_bytes());
            frame.extend_from_slice(segment);
        }
        frame
    }

    #[test]
    fn packbits_of_annex_g_unpacks() {
        let packed = [
            0xFE, 0xAA, 0x02, 0x80, 0x00, 0x2A, 0xFD, 0xAA, 0x03, 0x80, 0x00, 0x2A, 0x22, 0xF7,
            0xAA,
        ];
        let expected = [
            0xAA, 0xAA, 0xAA, 0x80, 0x00, 0x2A, 0xAA, 0xAA, 0xAA, 0xAA, 0x80, 0x00, 0x2A, 0x22,
            0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA, 0xAA,
        ];
        assert_eq!(decode(&frame(&[&packed]), 24, 1), Ok(expected.to_vec()));
    }

    #[test]
    fn first_segment_is_the_most_significant_byte() {
        assert_eq!(
            decode(&frame(&[&[1, 0x01, 0x02], &[1, 0xAA, 0xBB]]), 2, 2),
            Ok(vec![0xAA, 0x01, 0xBB, 0x02])
        );
    }

    #[test]
    fn wrong_headers_are_refused() {
        for fragment in [
            vec![],
            vec![0; 63],
            vec![0; 64],
            vec![0xFF; 64],
            frame(&[&[0_u8][..]; 3]),
        ] {
            assert!(decode(&fragment, 4, 2).is_err());
        }
        let mut outside = frame(&[&[0, 1], &[0, 1]]);
        outside[7] = 0x7F;
        assert!(decode(&outside, 1, 2).is_err());
    }

    #[test]
    fn segment_that_ends_early_is_refused() {
        assert!(decode(&frame(&[&[0, 1]]), 2, 1).is_err());
        assert!(decode(&frame(&[&[5, 1]]), 6, 1).is_err());
        assert!(decode(&frame(&[&[0xFF]]), 2, 1).is_err());
    }

    #[test]
    fn segment_that_expands_too_far_stops_at_the_last_pixel() {
        let packed = [0x81, 7].repeat(1000);
        assert_eq!(decode(&frame(&[&packed]), 3, 1), Ok(vec![7; 3]));
    }
}
