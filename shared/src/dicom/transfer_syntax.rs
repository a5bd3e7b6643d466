//! Transfer syntaxes: what a UID says about the data set's encoding and about the pixel data's.
//!
//! In: a Transfer Syntax UID (PS3.5 annex A, PS3.6 annex A). Out: how elements are encoded, how frames are encoded, and which
//! feature of this crate reads them. Decoding itself is left to [`super::pixels`].

/// How data elements are laid out (PS3.5 section 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Implicit VR Little Endian.
    ImplicitLittle,
    /// Explicit VR Little Endian.
    ExplicitLittle,
    /// Explicit VR Big Endian (retired, still met in archives).
    ExplicitBig,
}

impl Encoding {
    /// Whether each element carries its VR.
    pub(super) fn is_explicit(self) -> bool {
        self != Self::ImplicitLittle
    }

    /// Reads a 16-bit unsigned integer in this byte order.
    pub(super) fn u16(self, bytes: [u8; 2]) -> u16 {
        match self {
            Self::ExplicitBig => u16::from_be_bytes(bytes),
            Self::ImplicitLittle | Self::ExplicitLittle => u16::from_le_bytes(bytes),
        }
    }

    /// Reads a 32-bit unsigned integer in this byte order.
    pub(super) fn u32(self, bytes: [u8; 4]) -> u32 {
        match self {
            Self::ExplicitBig => u32::from_be_bytes(bytes),
            Self::ImplicitLittle | Self::ExplicitLittle => u32::from_le_bytes(bytes),
        }
    }
}

/// How one frame of Pixel Data is coded (PS3.5 section 8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PixelCoding {
    /// Stored values as they are.
    Native,
    /// Native values in one fragment a frame (Encapsulated Uncompressed Explicit VR Little Endian).
    EncapsulatedNative,
    /// RLE Lossless (PS3.5 annex G).
    Rle,
    /// JPEG in the sense of ISO/IEC 10918-1: baseline, extended and lossless.
    Jpeg,
    /// JPEG-LS, ISO/IEC 14495-1.
    JpegLs,
    /// JPEG 2000 and High-Throughput JPEG 2000, ISO/IEC 15444.
    Jpeg2000,
}

/// Whether decoded values can differ from what the scanner reconstructed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// Never.
    Lossless,
    /// The syntax allows both; Lossy Image Compression (0028,2110) decides, and its absence counts as lossy.
    Possible,
    /// Always.
    Lossy,
}

/// One row of the table of transfer syntaxes that can be read, with or without a feature.
#[derive(Debug)]
pub(super) struct TransferSyntax {
    /// The UID.
    pub(super) uid: &'static str,
    /// Its name in PS3.6.
    pub(super) name: &'static str,
    /// Encoding of elements.
    pub(super) encoding: Encoding,
    /// Whether the data set is deflated after the file meta information.
    pub(super) is_deflated: bool,
    /// Coding of frames.
    pub(super) coding: PixelCoding,
    /// Whether values can have been changed.
    pub(super) loss: Loss,
    /// The feature of this crate that is needed, where one is needed.
    pub(super) feature: Option<&'static str>,
}

impl TransferSyntax {
    /// Whether this build reads it.
    pub(super) fn is_built_in(&self) -> bool {
        match self.feature {
            None => true,
            Some("jpeg2000") => cfg!(feature = "jpeg2000"),
            Some("jpegls") => cfg!(feature = "jpegls"),
            Some("deflate") => cfg!(feature = "deflate"),
            Some(_) => false,
        }
    }
}

const fn row(
    uid: &'static str,
    name: &'static str,
    encoding: Encoding,
    coding: PixelCoding,
    loss: Loss,
    feature: Option<&'static str>,
) -> TransferSyntax {
    TransferSyntax {
        uid,
        name,
        encoding,
        is_deflated: false,
        coding,
        loss,
        feature,
    }
}

const fn compressed(
    uid: &'static str,
    name: &'static str,
    coding: PixelCoding,
    loss: Loss,
    feature: Option<&'static str>,
) -> TransferSyntax {
    row(uid, name, Encoding::ExplicitLittle, coding, loss, feature)
}

/// Implicit VR Little Endian, the DICOM default.
pub(super) const IMPLICIT_LITTLE: &TransferSyntax = &TABLE[0];
/// Explicit VR Little Endian.
pub(super) const EXPLICIT_LITTLE: &TransferSyntax = &TABLE[1];
/// Explicit VR Big Endian.
pub(super) const EXPLICIT_BIG: &TransferSyntax = &TABLE[2];

/// Every transfer syntax that is read, or would be in a build with another feature.
static TABLE: [TransferSyntax; 19] = [
    row(
        "1.2.840.10008.1.2",
        "Implicit VR Little Endian",
        Encoding::ImplicitLittle,
        PixelCoding::Native,
        Loss::Lossless,
        None,
    ),
    row(
        "1.2.840.10008.1.2.1",
        "Explicit VR Little Endian",
        Encoding::ExplicitLittle,
        PixelCoding::Native,
        Loss::Lossless,
        None,
    ),
    row(
        "1.2.840.10008.1.2.2",
        "Explicit VR Big Endian",
        Encoding::ExplicitBig,
        PixelCoding::Native,
        Loss::Lossless,
        None,
    ),
    TransferSyntax {
        is_deflated: true,
        ..row(
            "1.2.840.10008.1.2.1.99",
            "Deflated Explicit VR Little Endian",
            Encoding::ExplicitLittle,
            PixelCoding::Native,
            Loss::Lossless,
            Some("deflate"),
        )
    },
    compressed(
        "1.2.840.10008.1.2.1.98",
        "Encapsulated Uncompressed Explicit VR Little Endian",
        PixelCoding::EncapsulatedNative,
        Loss::Lossless,
        None,
    ),
    compressed(
        "1.2.840.10008.1.2.5",
        "RLE Lossless",
        PixelCoding::Rle,
        Loss::Lossless,
        None,
    ),
    compressed(
        "1.2.840.10008.1.2.4.50",
        "JPEG Baseline (Process 1)",
        PixelCoding::Jpeg,
        Loss::Lossy,
        None,
    ),
    compressed(
        "1.2.840.10008.1.2.4.51",
        "JPEG Extended (Process 2 and 4)",
        PixelCoding::Jpeg,
        Loss::Lossy,
        None,
    ),
    compressed(
        "1.2.840.10008.1.2.4.57",
        "JPEG Lossless (Process 14)",
        PixelCoding::Jpeg,
        Loss::Lossless,
        None,
    ),
    compressed(
        "1.2.840.10008.1.2.4.70",
        "JPEG Lossless (Process 14, Selection Value 1)",
        PixelCoding::Jpeg,
        Loss::Lossless,
        None,
    ),
    compressed(
        "1.2.840.10008.1.2.4.80",
        "JPEG-LS Lossless",
        PixelCoding::JpegLs,
        Loss::Lossless,
        Some("jpegls"),
    ),
    compressed(
        "1.2.840.10008.1.2.4.81",
        "JPEG-LS Near-Lossless",
        PixelCoding::JpegLs,
        Loss::Possible,
        Some("jpegls"),
    ),
    compressed(
        "1.2.840.10008.1.2.4.90",
        "JPEG 2000 Lossless",
        PixelCoding::Jpeg2000,
        Loss::Lossless,
        Some("jpeg2000"),
    ),
    compressed(
        "1.2.840.10008.1.2.4.91",
        "JPEG 2000",
        PixelCoding::Jpeg2000,
        Loss::Possible,
        Some("jpeg2000"),
    ),
    compressed(
        "1.2.840.10008.1.2.4.92",
        "JPEG 2000 Part 2 Lossless",
        PixelCoding::Jpeg2000,
        Loss::Lossless,
        Some("jpeg2000"),
    ),
    compressed(
        "1.2.840.10008.1.2.4.93",
        "JPEG 2000 Part 2",
        PixelCoding::Jpeg2000,
        Loss::Possible,
        Some("jpeg2000"),
    ),
    compressed(
        "1.2.840.10008.1.2.4.201",
        "High-Throughput JPEG 2000 Lossless",
        PixelCoding::Jpeg2000,
        Loss::Lossless,
        Some("jpeg2000"),
    ),
    compressed(
        "1.2.840.10008.1.2.4.202",
        "High-Throughput JPEG 2000 RPCL Lossless",
        PixelCoding::Jpeg2000,
        Loss::Lossless,
        Some("jpeg2000"),
    ),
    compressed(
        "1.2.840.10008.1.2.4.203",
        "High-Throughput JPEG 2000",
        PixelCoding::Jpeg2000,
        Loss::Possible,
        Some("jpeg2000"),
    ),
];

/// A transfer syntax that this build decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decodable {
    /// The UID.
    pub uid: &'static str,
    /// Its name in PS3.6.
    pub name: &'static str,
    /// Whether it never changes values.
    pub is_lossless: bool,
}

/// The transfer syntaxes that this build decodes, in the order of the table.
pub fn decodable() -> impl Iterator<Item = Decodable> {
    let built_in = TABLE.iter().filter(|row| row.is_built_in());
    built_in.map(|row| Decodable {
        uid: row.uid,
        name: row.name,
        is_lossless: row.loss == Loss::Lossless,
    })
}

/// The row of a UID, `None` where nothing is known of its pixel data.
pub(super) fn find(uid: &str) -> Option<&'static TransferSyntax> {
    TABLE.iter().find(|row| row.uid == uid)
}
