//! From the bytes of Pixel Data to stored values (PS3.5 section 8, PS3.3 C.7.6.3).

use crate::hounsfield::Rescale;

/// Order of the bytes of one pixel cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ByteOrder {
    /// Least significant byte first: every transfer syntax but one.
    LittleEndian,
    /// Most significant byte first: Explicit VR Big Endian (retired).
    BigEndian,
}

/// How a stored value lies in its pixel cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PixelFormat {
    /// Bits Allocated (0028,0100): 8, 16 or 32.
    pub bits_allocated: u16,
    /// Bits Stored (0028,0101): 1 to Bits Allocated.
    pub bits_stored: u16,
    /// High Bit (0028,0102): Bits Stored - 1 to Bits Allocated - 1.
    pub high_bit: u16,
    /// Pixel Representation (0028,0103): two's complement when true.
    pub is_signed: bool,
    /// Byte order of the cell.
    pub byte_order: ByteOrder,
}

/// Pixel Padding Value (0028,0120) and Pixel Padding Range Limit (0028,0121), both as stored values.
///
/// The range is inclusive and may be given in either order (PS3.3 C.7.5.1.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PixelPadding {
    /// Pixel Padding Value, after sign extension from Bits Stored.
    pub value: i32,
    /// Pixel Padding Range Limit, after sign extension from Bits Stored.
    pub range_limit: Option<i32>,
}

/// One frame as it lies in the file: uncompressed, one sample a pixel, rows outermost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlicePixels<'a> {
    /// Rows (0028,0010).
    pub rows: usize,
    /// Columns (0028,0011).
    pub columns: usize,
    /// Layout of a pixel cell.
    pub format: PixelFormat,
    /// Padding that carries no HU.
    pub padding: Option<PixelPadding>,
    /// The Modality transformation.
    pub rescale: Rescale,
    /// `rows x columns` pixel cells; more bytes are ignored (Pixel Data is padded to an even length).
    pub bytes: &'a [u8],
}

/// Why a frame's pixels cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PixelError {
    /// Bits Allocated other than 8, 16, 32.
    #[error("Bits Allocated (0028,0100) is {found}; allowed are 8, 16 and 32")]
    BitsAllocated {
        /// What the data set says.
        found: u16,
    },
    /// Bits Stored does not fit the cell.
    #[error(
        "Bits Stored (0028,0101) is {found}; allowed are 1 to Bits Allocated, {bits_allocated}"
    )]
    BitsStored {
        /// What the data set says.
        found: u16,
        /// Bits of a cell.
        bits_allocated: u16,
    },
    /// High Bit leaves no room for Bits Stored or lies outside the cell.
    #[error("High Bit (0028,0102) is {found}; allowed are {lowest} to {highest}")]
    HighBit {
        /// What the data set says.
        found: u16,
        /// Bits Stored - 1.
        lowest: u16,
        /// Bits Allocated - 1.
        highest: u16,
    },
    /// Fewer bytes than Rows x Columns needs.
    #[error(
        "Pixel Data (7FE0,0010) has {found} bytes for this frame; Rows x Columns needs {needed}"
    )]
    Length {
        /// Bytes there are.
        found: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// A slope of 0, or a number that is not finite.
    #[error(
        "Rescale Slope (0028,1053) {slope} and Intercept (0028,1052) {intercept} must be finite, the slope not 0"
    )]
    Rescale {
        /// Slope found.
        slope: f64,
        /// Intercept found.
        intercept: f64,
    },
    /// An image whose shorter side would vanish in the network's input, with no pixel at all, or with too many.
    #[error(
        "Rows (0028,0010) x Columns (0028,0011) is {rows} x {columns}; each side must be 1 to {max} pixels, and at least 2 after scaling the longer to {side}",
        max = crate::resample::MAX_SIDE
    )]
    Size {
        /// Rows found.
        rows: usize,
        /// Columns found.
        columns: usize,
        /// Side of the output.
        side: usize,
    },
    /// The output slice has another length than a tensor.
    #[error("the output has {found} bytes; a tensor has {needed}")]
    Output {
        /// Length given.
        found: usize,
        /// Length needed.
        needed: usize,
    },
    /// `tensor` was called with a series normalisation, or the reverse.
    #[error("this normalisation needs {needed}")]
    Normalisation {
        /// The call to use instead.
        needed: &'static str,
    },
}

impl PixelFormat {
    /// Bytes of a pixel cell.
    #[must_use]
    pub fn bytes_per_pixel(&self) -> usize {
        usize::from(self.bits_allocated / 8)
    }

    /// Checks the three bit numbers against each other (PS3.5 section 8.1.1).
    ///
    /// # Errors
    /// The first of Bits Allocated, Bits Stored, High Bit that is out of its range.
    pub fn check(&self) -> Result<(), PixelError> {
        let Self {
            bits_allocated,
            bits_stored,
            high_bit,
            ..
        } = *self;
        if !matches!(bits_allocated, 8 | 16 | 32) {
            return Err(PixelError::BitsAllocated {
                found: bits_allocated,
            });
        }
        if bits_stored == 0 || bits_stored > bits_allocated {
            return Err(PixelError::BitsStored {
                found: bits_stored,
                bits_allocated,
            });
        }
        if high_bit + 1 < bits_stored || high_bit >= bits_allocated {
            return Err(PixelError::HighBit {
                found: high_bit,
                lowest: bits_stored - 1,
                highest: bits_allocated - 1,
            });
        }
        Ok(())
    }

    /// Number of different codes: `2 ^ Bits Stored`.
    #[must_use]
    pub fn n_codes(&self) -> u64 {
        1 << self.bits_stored
    }

    /// The bits of the stored value out of a cell: what lies above High Bit or below the value is masked away.
    #[must_use]
    #[inline]
    pub fn code(&self, cell: u32) -> u32 {
        let shift = u32::from(self.high_bit + 1 - self.bits_stored);
        (cell >> shift) & (u32::MAX >> (32 - u32::from(self.bits_stored)))
    }

    /// The stored value of a code: sign-extended from Bits Stored where Pixel Representation is 1.
    #[must_use]
    #[inline]
    pub fn stored_value(&self, code: u32) -> i64 {
        let code = i64::from(code);
        let range = 1_i64 << self.bits_stored;
        if self.is_signed && code >= range / 2 {
            code - range
        } else {
            code
        }
    }

    /// The cell at `index`; `bytes` must reach that far (0 beyond its end).
    #[must_use]
    #[inline]
    pub fn cell(&self, bytes: &[u8], index: usize) -> u32 {
        let width = self.bytes_per_pixel();
        let Some(cell) = bytes.get(index * width..(index + 1) * width) else {
            return 0;
        };
        let join = |value: u32, byte: &u8| (value << 8) | u32::from(*byte);
        match self.byte_order {
            ByteOrder::LittleEndian => cell.iter().rev().fold(0, join),
            ByteOrder::BigEndian => cell.iter().fold(0, join),
        }
    }
}

impl PixelPadding {
    /// Whether `stored_value` is padding.
    #[must_use]
    #[inline]
    pub fn contains(&self, stored_value: i64) -> bool {
        let first = i64::from(self.value);
        let last = i64::from(self.range_limit.unwrap_or(self.value));
        (first.min(last)..=first.max(last)).contains(&stored_value)
    }
}

impl SlicePixels<'_> {
    /// Checks format, rescale and the number of bytes.
    ///
    /// # Errors
    /// The first fault found, as [`PixelError`].
    pub fn check(&self) -> Result<(), PixelError> {
        self.format.check()?;
        if !self.rescale.is_usable() {
            return Err(PixelError::Rescale {
                slope: self.rescale.slope,
                intercept: self.rescale.intercept,
            });
        }
        let needed = self
            .rows
            .saturating_mul(self.columns)
            .saturating_mul(self.format.bytes_per_pixel());
        if self.bytes.len() < needed {
            return Err(PixelError::Length {
                found: self.bytes.len(),
                needed,
            });
        }
        Ok(())
    }

    /// HU of the pixel at `index` (row-major), or `None` for padding.
    #[must_use]
    pub fn hounsfield(&self, index: usize) -> Option<f64> {
        let stored_value = self
            .format
            .stored_value(self.format.code(self.format.cell(self.bytes, index)));
        match self.padding {
            Some(padding) if padding.contains(stored_value) => None,
            _ => Some(self.rescale.hounsfield(stored_value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(
        bits_allocated: u16,
        bits_stored: u16,
        high_bit: u16,
        is_signed: bool,
    ) -> PixelFormat {
        PixelFormat {
            bits_allocated,
            bits_stored,
            high_bit,
            is_signed,
            byte_order: ByteOrder::LittleEndian,
        }
    }

    #[track_caller]
    fn check(format: PixelFormat, bytes: &[u8], expected: i64) {
        format.check().unwrap();
        assert_eq!(
            format.stored_value(format.code(format.cell(bytes, 0))),
            expected
        );
    }

    #[test]
    fn stored_value_is_sign_extended_from_bits_stored() {
        check(format(16, 12, 11, true), &[0xFF, 0x0F], -1);
        check(format(16, 16, 15, true), &[0x30, 0xF8], -2000);
        check(format(16, 16, 15, false), &[0x30, 0xF8], 63536);
        check(format(8, 8, 7, true), &[0x80], -128);
        check(format(32, 32, 31, true), &[0xFE, 0xFF, 0xFF, 0xFF], -2);
        check(
            format(32, 32, 31, false),
            &[0xFE, 0xFF, 0xFF, 0xFF],
            4_294_967_294,
        );
    }

    #[test]
    fn bits_above_high_bit_and_below_the_value_are_masked() {
        check(format(16, 12, 11, false), &[0x34, 0xF2], 0x234);
        check(format(16, 12, 15, false), &[0x3F, 0x12], 0x123);
    }

    #[test]
    fn big_endian_cells_are_read_most_significant_byte_first() {
        let big = PixelFormat {
            byte_order: ByteOrder::BigEndian,
            ..format(16, 16, 15, false)
        };
        check(big, &[0x12, 0x34], 0x1234);
    }

    #[test]
    fn padding_range_is_inclusive_in_either_order() {
        let padding = PixelPadding {
            value: -2000,
            range_limit: Some(-2010),
        };
        for (value, expected) in [
            (-2011, false),
            (-2010, true),
            (-2005, true),
            (-2000, true),
            (-1999, false),
        ] {
            assert_eq!(padding.contains(value), expected, "{value}");
        }
    }

    #[test]
    fn impossible_bit_numbers_are_refused() {
        assert_eq!(
            format(12, 12, 11, false).check(),
            Err(PixelError::BitsAllocated { found: 12 })
        );
        assert_eq!(
            format(16, 17, 16, false).check(),
            Err(PixelError::BitsStored {
                found: 17,
                bits_allocated: 16
            })
        );
        assert_eq!(
            format(16, 12, 10, false).check(),
            Err(PixelError::HighBit {
                found: 10,
                lowest: 11,
                highest: 15
            })
        );
    }
}
