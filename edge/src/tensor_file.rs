//! A slice's tensor as a NumPy file, for comparing preprocessings (NumPy format 1.0).

use std::fs;
use std::io;
use std::path::Path;

use shared::{CHANNELS, SIDE};

/// The `.npy` file of a u8 `[3, 256, 256]` tensor.
pub(crate) fn npy(tensor: &[u8]) -> Vec<u8> {
    const PREFIX_BYTES: usize = 10;
    let mut header = format!(
        "{{'descr': '|u1', 'fortran_order': False, 'shape': ({CHANNELS}, {SIDE}, {SIDE}), }}"
    );
    while !(PREFIX_BYTES + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let length = u16::try_from(header.len()).expect("the header has about a hundred characters");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(tensor);
    bytes
}

/// Writes a file whole or not at all: under another name first, then renamed.
///
/// # Errors
/// Where the folder cannot be written.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    fs::write(&partial, bytes)?;
    fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_padded_to_64_bytes() {
        let bytes = npy(&[7; 3 * 256 * 256]);
        assert_eq!(bytes.len(), 128 + 3 * 256 * 256);
        assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
        assert_eq!(bytes[127], b'\n');
        assert!(
            bytes[10..127]
                .starts_with(b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 256, 256), }")
        );
    }
}
