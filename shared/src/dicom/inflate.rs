//! Inflation: a deflated data set (PS3.5 section A.5) to plain bytes, within a bound.
//!
//! In: everything after the file meta information. Out: at most [`MAX_BYTES`] bytes of Explicit VR Little Endian, or an error;
//! the stream is read in steps, so that a bomb costs no more than the bound.

use super::ReadError;
use super::transfer_syntax::TransferSyntax;

/// Most bytes of an inflated data set: 120 slices of 512 x 512 pixels of 16 bits.
pub(super) const MAX_BYTES: usize = 64 << 20;

/// Inflates `deflated`.
///
/// # Errors
///
/// [`ReadError::TransferSyntax`] in a build without the feature; [`ReadError::Inflate`] and [`ReadError::InflatedSize`] otherwise.
#[cfg(not(feature = "deflate"))]
pub(super) fn inflate(_deflated: &[u8], syntax: &TransferSyntax) -> Result<Vec<u8>, ReadError> {
    Err(ReadError::TransferSyntax {
        name: syntax.name,
        feature: syntax.feature.unwrap_or("none"),
    })
}

/// Inflates `deflated`.
///
/// # Errors
///
/// [`ReadError::TransferSyntax`] in a build without the feature; [`ReadError::Inflate`] and [`ReadError::InflatedSize`] otherwise.
#[cfg(feature = "deflate")]
pub(super) fn inflate(deflated: &[u8], syntax: &TransferSyntax) -> Result<Vec<u8>, ReadError> {
    use dicom_encoding::transfer_syntax::{Codec, TransferSyntaxIndex};
    use dicom_transfer_syntax_registry::TransferSyntaxRegistry;
    use std::io::Read;

    let registered = TransferSyntaxRegistry
        .get(syntax.uid)
        .map(dicom_encoding::TransferSyntax::codec);
    let Some(Codec::Dataset(Some(adapter))) = registered else {
        return Err(ReadError::Inflate);
    };
    let mut inflated = Vec::new();
    adapter
        .adapt_reader(Box::new(deflated))
        .take(MAX_BYTES as u64 + 1)
        .read_to_end(&mut inflated)
        .map_err(|_| ReadError::Inflate)?;
    if inflated.len() > MAX_BYTES {
        return Err(ReadError::InflatedSize { allowed: MAX_BYTES });
    }
    Ok(inflated)
}
