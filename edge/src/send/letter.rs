//! The bytes of a letter: what a channel sends for a result.

use super::data_set::{DataSet, Syntax};
use super::delivery::Ways;
use super::equipment::Device;
use super::identity;
use super::outbox::{Channel, Document, Letter};
use super::structured_report::{self, Class, Predecessor};
use super::webhook;
use crate::result::StudyResult;

/// Draws the secondary capture of a result.
pub(crate) type Capture = dyn Fn(&StudyResult, &Device) -> Result<DataSet, NotMade> + Send + Sync;

/// Why there is no letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotMade {
    /// What it needs is not there yet.
    Later(String),
    /// It never will be.
    Never(String),
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    /// What it is, for DICOM objects.
    pub(crate) document: Option<Document>,
    /// The bytes.
    pub(crate) bytes: Vec<u8>,
}

/// Makes a letter, for DICOM objects in the class `sop_class_uid`.
///
/// # Errors
/// Why it cannot be made.
pub(crate) fn make(
    letter: &Letter,
    sop_class_uid: &str,
    result: &StudyResult,
    ways: &Ways,
    predecessor: Option<&Predecessor>,
    capture: &Capture,
) -> Result<Made, NotMade> {
    let document = |modality: &str| Document {
        sop_class_uid: sop_class_uid.to_owned(),
        series_uid: identity::series_uid(result, modality),
        sop_instance_uid: identity::document_uid(result, sop_class_uid),
    };
    let key = &letter.key;
    match letter.channel {
        Channel::StructuredReport | Channel::Stow => {
            let class = if sop_class_uid == Class::Comprehensive.uid() {
                Class::Comprehensive
            } else {
                Class::Comprehensive3D
            };
            let set = structured_report::report(result, class, &ways.device, predecessor);
            let set =
                set.ok_or_else(|| NotMade::Never("nothing is said of this study".to_owned()))?;
            Ok(Made {
                document: Some(document("SR")),
                bytes: set.encode(Syntax::Explicit),
            })
        }
        Channel::SecondaryCapture => Ok(Made {
            document: Some(document("OT")),
            bytes: capture(result, &ways.device)?.encode(Syntax::Explicit),
        }),
        Channel::Webhook => Ok(Made {
            document: None,
            bytes: webhook::body(result, key),
        }),
        Channel::Hl7 => {
            let gone = || NotMade::Later("HL7 is not configured any more".to_owned());
            let hl7 = ways.hl7.as_ref().ok_or_else(gone)?;
            Ok(Made {
                document: None,
                bytes: hl7.message(result, key),
            })
        }
    }
}
