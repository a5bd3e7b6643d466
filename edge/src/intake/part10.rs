//! What stands before a data set in a file: preamble and File Meta Information (PS3.10 section 7.1).

/// Our Implementation Class UID.
pub(crate) const IMPLEMENTATION_CLASS_UID: &str = "2.25.318442953927414187529283165394721805126";
/// Our Implementation Version Name.
pub(crate) const IMPLEMENTATION_VERSION_NAME: &str = "PEEDGE_0.1";

/// The bytes before the data set of an object that was received.
///
/// Always Explicit VR Little Endian; every value has less than 2^16 bytes because its texts have at most 64.
pub(super) fn preamble(
    sop_class_uid: &str,
    sop_instance_uid: &str,
    transfer_syntax_uid: &str,
    source_ae: &str,
) -> Vec<u8> {
    let mut meta = Vec::with_capacity(320);
    // Version, in the long form of OB.
    meta.extend_from_slice(&[2, 0, 1, 0, b'O', b'B', 0, 0, 2, 0, 0, 0, 0, 1]);
    element(&mut meta, 0x0002, *b"UI", sop_class_uid, 0);
    element(&mut meta, 0x0003, *b"UI", sop_instance_uid, 0);
    element(&mut meta, 0x0010, *b"UI", transfer_syntax_uid, 0);
    element(&mut meta, 0x0012, *b"UI", IMPLEMENTATION_CLASS_UID, 0);
    element(&mut meta, 0x0013, *b"SH", IMPLEMENTATION_VERSION_NAME, b' ');
    if !source_ae.is_empty() {
        element(&mut meta, 0x0016, *b"AE", source_ae, b' ');
    }
    let mut bytes = vec![0; 128];
    bytes.extend_from_slice(b"DICM");
    bytes.extend_from_slice(&[2, 0, 0, 0, b'U', b'L', 4, 0]);
    let length = u32::try_from(meta.len()).unwrap_or(0);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&meta);
    bytes
}

fn element(meta: &mut Vec<u8>, element: u16, vr: [u8; 2], value: &str, padding: u8) {
    let padded = value.len().next_multiple_of(2);
    meta.extend_from_slice(&[2, 0]);
    meta.extend_from_slice(&element.to_le_bytes());
    meta.extend_from_slice(&vr);
    meta.extend_from_slice(&u16::try_from(padded).unwrap_or(0).to_le_bytes());
    meta.extend_from_slice(value.as_bytes());
    if padded > value.len() {
        meta.push(padding);
    }
}

/// What the file meta information says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) sop_class_uid: String,
    pub(super) sop_instance_uid: String,
    pub(super) transfer_syntax_uid: String,
}

/// Reads the file meta information from the beginning of a file; `None` where there is none, or it lacks a UID.
pub(super) fn read_meta(bytes: &[u8]) -> Option<Meta> {
    let mut rest = bytes.get(128..)?.strip_prefix(b"DICM")?;
    let mut uids = [const { None }; 3];
    while let Some((head, tail)) = rest.split_first_chunk::<8>() {
        if head[..2] != [2, 0] {
            break;
        }
        let (length, tail) = match &head[4..6] {
            b"OB" | b"OW" | b"UN" => {
                let (length, tail) = tail.split_first_chunk::<4>()?;
                (u32::from_le_bytes(*length), tail)
            }
            _ => (u32::from(u16::from_le_bytes([head[6], head[7]])), tail),
        };
        let (value, tail) = tail.split_at_checked(usize::try_from(length).ok()?)?;
        rest = tail;
        let index = match u16::from_le_bytes([head[2], head[3]]) {
            0x0002 => 0,
            0x0003 => 1,
            0x0010 => 2,
            _ => continue,
        };
        let uid = shared::uid::Uid::new(std::str::from_utf8(value).ok()?).ok()?;
        uids[index] = Some(uid.as_str().to_owned());
    }
    let [sop_class_uid, sop_instance_uid, transfer_syntax_uid] = uids;
    Some(Meta {
        sop_class_uid: sop_class_uid?,
        sop_instance_uid: sop_instance_uid?,
        transfer_syntax_uid: transfer_syntax_uid?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_is_read_back_and_cut_anywhere_is_none_or_the_same() {
        let bytes = preamble("1.2.3", "1.2.4.55", "1.2.840.10008.1.2", "CT1");
        let meta = read_meta(&bytes).unwrap();
        assert_eq!(meta.sop_class_uid, "1.2.3");
        assert_eq!(meta.sop_instance_uid, "1.2.4.55");
        assert_eq!(meta.transfer_syntax_uid, "1.2.840.10008.1.2");
        for length in 0..bytes.len() {
            assert!(read_meta(&bytes[..length]).is_none_or(|cut| cut == meta));
        }
    }

    #[test]
    fn group_length_counts_what_follows_it() {
        let bytes = preamble("1.2.3", "1.2.4.55", "1.2.840.10008.1.2", "");
        let length = u32::from_le_bytes(bytes[140..144].try_into().unwrap());
        assert_eq!(length as usize, bytes.len() - 144);
    }
}
