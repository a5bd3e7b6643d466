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
