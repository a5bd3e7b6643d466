//! The fixed block that stands before every object in a segment.
//!
//! ```text
//!   0  magic "PESPOOL1"      32  CRC-32 of the object     508  CRC-32 of bytes 0..508
//!   8  sequence, u64         36  zero
//!  16  received, i64 ms      40  five texts, each a length byte and its bytes:
//!  24  object bytes, u64         calling AE, address, SOP class, SOP instance, transfer syntax
//! ```
//! All numbers are little endian. A record begins on a multiple of [`ALIGNMENT`], so that no page of the medium is written for two of
//! them; the object follows its block at once.

use super::SpoolError;

/// Bytes of the block.
pub(super) const BLOCK_BYTES: usize = 512;
/// What records begin on a multiple of.
pub(super) const ALIGNMENT: u64 = 4096;
const MAGIC: &[u8; 8] = b"PESPOOL1";
const TEXTS_AT: usize = 40;
const CRC_AT: usize = BLOCK_BYTES - 4;
/// Longest text; five of them fit the block.
const MAX_TEXT_BYTES: usize = 64;

/// What is known of an object without reading it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    /// Its place in the order of commits, from 1. Set by the spool.
    pub(crate) sequence: u64,
    /// When it came, Unix time in ms.
    pub(crate) received_ms: i64,
    /// Who sent it; empty for a file.
    pub(crate) calling_ae: String,
    /// From which address; empty for a file.
    pub(crate) address: String,
    /// SOP Class UID.
    pub(crate) sop_class_uid: String,
    /// SOP Instance UID.
    pub(crate) sop_instance_uid: String,
    /// Transfer Syntax UID.
    pub(crate) transfer_syntax_uid: String,
}

/// A header and the object that it announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) header: Header,
    pub(super) object_bytes: u64,
    pub(super) object_crc: u32,
}

impl Header {
    /// Whether every text fits.
    pub(super) fn check(&self) -> Result<(), SpoolError> {
        if self.texts().iter().all(|text| text.len() <= MAX_TEXT_BYTES) {
            Ok(())
        } else {
            Err(SpoolError::Header)
        }
    }

    fn texts(&self) -> [&str; 5] {
        [
            &self.calling_ae,
            &self.address,
            &self.sop_class_uid,
            &self.sop_instance_uid,
            &self.transfer_syntax_uid,
        ]
    }
}

impl Record {
    /// The block.
    pub(super) fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        block[..8].copy_from_slice(MAGIC);
        block[8..16].copy_from_slice(&self.header.sequence.to_le_bytes());
        block[16..24].copy_from_slice(&self.header.received_ms.to_le_bytes());
        block[24..32].copy_from_slice(&self.object_bytes.to_le_bytes());
        block[32..36].copy_from_slice(&self.object_crc.to_le_bytes());
        let mut at = TEXTS_AT;
        for text in self.header.texts() {
            let bytes = &text.as_bytes()[..text.len().min(MAX_TEXT_BYTES)];
            block[at] = u8::try_from(bytes.len()).unwrap_or(0);
            block[at + 1..][..bytes.len()].copy_from_slice(bytes);
            at += 1 + bytes.len();
        }
        let crc = crc32fast::hash(&block[..CRC_AT]);
        block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// Reads a block; `None` where it is none, or torn.
    pub(super) fn decode(block: &[u8; BLOCK_BYTES]) -> Option<Self> {
        if !block.starts_with(MAGIC) || crc32fast::hash(&block[..CRC_AT]) != u32_at(block, CRC_AT) {
            return None;
        }
        let mut at = TEXTS_AT;
        let mut text = || {
            let length = usize::from(*block.get(at)?);
            let bytes = block.get(at + 1..at + 1 + length)?;
            at += 1 + length;
            String::from_utf8(bytes.to_vec()).ok()
        };
        Some(Self {
            header: Header {
                sequence: u64_at(block, 8),
                received_ms: u64_at(block, 16).cast_signed(),
                calling_ae: text()?,
                address: text()?,
                sop_class_uid: text()?,
                sop_instance_uid: text()?,
                transfer_syntax_uid: text()?,
            },
            object_bytes: u64_at(block, 24),
            object_crc: u32_at(block, 32),
        })
    }
}

/// Bytes that a record takes of its segment, block and padding included; saturates.
pub(super) fn record_bytes(object_bytes: u64) -> u64 {
    object_bytes
        .saturating_add(BLOCK_BYTES as u64)
        .checked_next_multiple_of(ALIGNMENT)
        .unwrap_or(u64::MAX)
}

fn u64_at(block: &[u8; BLOCK_BYTES], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[at..at + 8]);
    u64::from_le_bytes(bytes)
}

fn u32_at(block: &[u8; BLOCK_BYTES], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&block[at..at + 4]);
    u32::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let longest = "9".repeat(MAX_TEXT_BYTES);
        Record {
            header: Header {
                sequence: 7,
                received_ms: -1,
                calling_ae: "CT1".to_owned(),
                address: "2001:db8::1".to_owned(),
                sop_class_uid: longest.clone(),
                sop_instance_uid: longest.clone(),
                transfer_syntax_uid: longest,
            },
            object_bytes: 1 << 40,
            object_crc: 0xdead_beef,
        }
    }

    #[test]
    fn block_gives_back_what_was_put_in() {
        assert_eq!(Record::decode(&record().encode()), Some(record()));
    }

    #[test]
    fn block_with_any_byte_changed_is_none() {
        let block = record().encode();
        for index in 0..BLOCK_BYTES {
            let mut torn = block;
            torn[index] ^= 0x10;
            assert_eq!(Record::decode(&torn), None, "byte {index}");
        }
    }

    #[test]
    fn record_bytes_are_whole_pages_and_never_overflow() {
        assert_eq!(record_bytes(0), 4096);
        assert_eq!(record_bytes(4096 - 512), 4096);
        assert_eq!(record_bytes(4096 - 511), 8192);
        assert_eq!(record_bytes(u64::MAX), u64::MAX);
    }
}
