//! What objects may come: the SOP classes that are accepted as SCP, and the transfer syntaxes that this build decodes.
//!
//! The tables here are the ones that `docs/conformance.md` lists; a test compares them.

use shared::dicom::{Decodable, decodable};

use crate::commitment;

/// Verification SOP Class.
pub(crate) const VERIFICATION: &str = "1.2.840.10008.1.1";
/// Explicit VR Little Endian.
pub(super) const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";
/// Implicit VR Little Endian.
pub(super) const IMPLICIT_LITTLE: &str = "1.2.840.10008.1.2";

/// What is done with objects of a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Nothing is stored: C-ECHO.
    Verification,
    /// Stored and analysed.
    Analysed,
    /// Nothing is stored: reports and, where configured, requests of storage commitment.
    Commitment,
    /// Stored because auto-send brings it along; never analysed, purged first.
    Stored,
}

impl Use {
    /// Whether objects of the class are stored.
    pub(crate) fn is_storage(self) -> bool {
        matches!(self, Self::Analysed | Self::Stored)
    }
}

/// A SOP class that is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SopClass {
    /// UID, PS3.6 annex A.
    pub(crate) uid: &'static str,
    /// Its name there.
    pub(crate) name: &'static str,
    /// What is done with its objects.
    pub(crate) purpose: Use,
}

const fn class(uid: &'static str, name: &'static str, purpose: Use) -> SopClass {
    SopClass { uid, name, purpose }
}

/// Every SOP class that is accepted as SCP.
pub(crate) static SOP_CLASSES: [SopClass; 21] = [
    class(VERIFICATION, "Verification", Use::Verification),
    class(
        commitment::SOP_CLASS_UID,
        "Storage Commitment Push Model",
        Use::Commitment,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.2",
        "CT Image Storage",
        Use::Analysed,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.2.1",
        "Enhanced CT Image Storage",
        Use::Analysed,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.2.2",
        "Legacy Converted Enhanced CT Image Storage",
        Use::Analysed,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7",
        "Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7.1",
        "Multi-frame Single Bit Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7.2",
        "Multi-frame Grayscale Byte Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7.3",
        "Multi-frame Grayscale Word Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7.4",
        "Multi-frame True Color Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.11.1",
        "Grayscale Softcopy Presentation State Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.11.2",
        "Color Softcopy Presentation State Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.66",
        "Raw Data Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.11",
        "Basic Text SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.22",
        "Enhanced SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.33",
        "Comprehensive SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.34",
        "Comprehensive 3D SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.59",
        "Key Object Selection Document Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.67",
        "X-Ray Radiation Dose SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.73",
        "Patient Radiation Dose SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.104.1",
        "Encapsulated PDF Storage",
        Use::Stored,
    ),
];

/// The row of a SOP class.
pub(crate) fn sop_class(uid: &str) -> Option<&'static SopClass> {
    SOP_CLASSES.iter().find(|class| class.uid == uid)
}

/// Whether objects of a class are analysed.
pub(crate) fn is_analysed(uid: &str) -> bool {
    sop_class(uid).is_some_and(|class| class.purpose == Use::Analysed)
}

/// The transfer syntaxes that this build decodes, the preferred first: Explicit LE, Implicit LE, lossless, lossy.
pub(crate) fn transfer_syntaxes() -> Vec<Decodable> {
    let mut syntaxes: Vec<Decodable> = decodable().collect();
    syntaxes.sort_by_key(|syntax| match syntax.uid {
        EXPLICIT_LITTLE => 0,
        IMPLICIT_LITTLE => 1,
        _ if syntax.is_lossless => 2,
        _ => 3,
    });
    syntaxes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows between `<!-- name -->` and `<!-- end -->`.
    fn documented(name: &str) -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/conformance.md");
        let text = std::fs::read_to_string(path).unwrap();
        let start = format!("<!-- {name} -->\n");
        let table = text.split(&start).nth(1).unwrap();
        table.split("<!-- end -->").next().unwrap().to_owned()
    }

    #[test]
    fn tables_of_the_conformance_statement_are_the_programs() {
        let mut classes = "| SOP class | UID | Use |\n|---|---|---|\n".to_owned();
        for class in &SOP_CLASSES {
            let purpose = match class.purpose {
                Use::Verification => "verification",
                Use::Analysed => "stored and analysed",
                Use::Stored => "stored",
                Use::Commitment => "commitment",
            };
            classes += &format!("| {} | {} | {purpose} |\n", class.name, class.uid);
        }
        assert_eq!(documented("sop classes"), classes);
        let mut syntaxes = "| Transfer syntax | UID | |\n|---|---|---|\n".to_owned();
        let by_feature = |uid: &str| {
            cfg!(any(
                feature = "jpeg2000",
                feature = "jpegls",
                feature = "deflate"
            )) && !documented("transfer syntaxes").contains(&format!("| {uid} |"))
        };
        let built = transfer_syntaxes();
        for syntax in built.iter().filter(|syntax| !by_feature(syntax.uid)) {
            let loss = if syntax.is_lossless {
                "lossless"
            } else {
                "can be lossy"
            };
            syntaxes += &format!("| {} | {} | {loss} |\n", syntax.name, syntax.uid);
        }
        assert_eq!(documented("transfer syntaxes"), syntaxes);
    }

    #[test]
    fn sop_classes_are_named_once_and_are_uids() {
        for (index, class) in SOP_CLASSES.iter().enumerate() {
            shared::uid::Uid::new(class.uid).unwrap();
            assert_eq!(sop_class(class.uid), Some(&SOP_CLASSES[index]));
        }
    }
}
