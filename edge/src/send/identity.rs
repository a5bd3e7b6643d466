//! UIDs of what this node makes: the same result gives the same UID, whatever is killed when.
//!
//! A UID is `2.25.` and a UUID (PS3.5 section B.2) whose 122 free bits are the first of a BLAKE3 hash. Every field is hashed with its length, so
//! that no two lists of fields run into each other.

use shared::uid::Uid;

use crate::result::{Outcome, SliceResult, State, StudyResult};

/// Separates these hashes from every other use of BLAKE3; changed where the meaning of a field changes.
const CONTEXT: &str = "pe-edge 2026 document UID v1";

/// SOP Instance UID of the document of class `sop_class_uid` for a result: study, judged series, model digest, sorted evidence,
/// identity and class. Evidence is each slice with its logit or reason, what is concluded from them, and whether more may come:
/// a preliminary and a final document of the same slices differ in their bytes and hence in their UID.
pub(crate) fn document_uid(result: &StudyResult, sop_class_uid: &str) -> Uid {
    let mut hash = Fields::new("document");
    hash.text(result.study_uid.as_str())
        .text(result.series_uid.as_ref().map_or("", Uid::as_str))
        .text(&result.model.digest)
        .text(sop_class_uid)
        .number(match result.state {
            State::Receiving | State::Provisional => 0,
            State::Complete => 1,
        });
    conclusion(&mut hash, result);
    evidence(&mut hash, &result.slices);
    hash.number(result.remarks.len() as u64);
    for remark in &result.remarks {
        hash.text(remark);
    }
    let mut elements: Vec<_> = result.patient.elements.iter().collect();
    elements.sort_by_key(|element| element.tag);
    for element in elements {
        let (group, number) = element.tag;
        hash.number(u64::from(group) << 16 | u64::from(number))
            .text(&element.vr)
            .bytes(&element.value);
    }
    hash.uid()
}

/// Series Instance UID of the documents of one modality about a study: one series, all revisions in it.
pub(crate) fn series_uid(result: &StudyResult, modality: &str) -> Uid {
    Fields::new("series")
        .text(result.study_uid.as_str())
        .text(&result.model.digest)
        .text(modality)
        .uid()
}

/// Tracking UID of the finding: the same over all revisions of a study.
pub(crate) fn tracking_uid(result: &StudyResult) -> Uid {
    Fields::new("tracking")
        .text(result.study_uid.as_str())
        .text(&result.model.digest)
        .uid()
}

/// Transaction UID of the request, counted from 1, that the PACS commits to a document of ours.
pub(crate) fn transaction_uid(sop_instance_uid: &Uid, number: u32) -> Uid {
    Fields::new("transaction")
        .text(sop_instance_uid.as_str())
        .number(number.into())
        .uid()
}

fn conclusion(hash: &mut Fields, result: &StudyResult) {
    match &result.outcome {
        Outcome::Pending => hash.number(0),
        Outcome::Positive => hash.number(1),
        Outcome::NotDetected => hash.number(2),
        Outcome::NotAnalysed { code, message } => hash.number(3).text(code).text(message),
    };
    for value in [result.score, result.threshold] {
        hash.number(value.map_or(u64::MAX, |value| value.to_bits().into()));
    }
}

fn evidence(hash: &mut Fields, slices: &[SliceResult]) {
    let mut slices: Vec<_> = slices.iter().collect();
    slices.sort_by(|a, b| (&a.sop_uid, a.frame).cmp(&(&b.sop_uid, b.frame)));
    hash.number(slices.len() as u64);
    for slice in slices {
        hash.text(slice.sop_uid.as_str())
            .number(slice.frame.map_or(0, u64::from))
            .number(slice.logit.map_or(u64::MAX, |logit| logit.to_bits().into()))
            .text(slice.reason.as_deref().unwrap_or(""));
    }
}

/// A hash over fields.
struct Fields(blake3::Hasher);

impl Fields {
    fn new(kind: &str) -> Self {
        let mut fields = Self(blake3::Hasher::new_derive_key(CONTEXT));
        fields.text(kind);
        fields
    }

    fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.number(value.len() as u64);
        self.0.update(value);
        self
    }

    fn text(&mut self, value: &str) -> &mut Self {
        self.bytes(value.as_bytes())
    }

    fn number(&mut self, value: u64) -> &mut Self {
        self.0.update(&value.to_le_bytes());
        self
    }

    /// The UUID has version 8 (RFC 9562 section 5.8): its bits are the maker's.
    fn uid(&self) -> Uid {
        let mut bits = [0; 16];
        self.0.finalize_xof().fill(&mut bits);
        let mut number = u128::from_be_bytes(bits);
        number = number & !(0xF << 76) | 8 << 76;
        number = number & !(0b11 << 62) | 0b10 << 62;
        Uid::new(&format!("2.25.{number}")).expect("2.25. and at most 39 digits")
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    const CLASS: &str = "1.2.840.10008.5.1.4.1.1.88.34";

    #[test]
    fn the_same_result_has_the_same_uid_in_any_order_and_place() {
        let result = sample::positive();
        let mut other = result.clone();
        other.slices.reverse();
        other.patient.elements.reverse();
        other.slices[0].sequence += 100;
        other.revision += 1;
        other.decided_ms += 5;
        assert_eq!(document_uid(&result, CLASS), document_uid(&other, CLASS));
        let uid = document_uid(&result, CLASS);
        let number: u128 = uid.as_str()["2.25.".len()..].parse().unwrap();
        assert_eq!(number >> 76 & 0xF, 8);
        assert_eq!(number >> 62 & 3, 2);
    }

    #[test]
    fn whatever_a_reader_would_see_differently_changes_the_uid() {
        let result = sample::positive();
        let uid = document_uid(&result, CLASS);
        let changes: [fn(&mut StudyResult); 10] = [
            |result| result.slices[1].logit = Some(-4.0),
            |result| result.slices[1].frame = Some(2),
            |result| drop(result.slices.pop()),
            |result| result.state = State::Provisional,
            |result| result.series_uid = None,
            |result| result.model.digest.push('0'),
            |result| result.outcome = Outcome::NotDetected,
            |result| result.patient.elements[0].value.push(b'x'),
            |result| result.remarks.push(String::new()),
            |result| result.slices[0].reason = Some("other".to_owned()),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut other = result.clone();
            change(&mut other);
            assert_ne!(document_uid(&other, CLASS), uid, "change {index}");
        }
        assert_ne!(document_uid(&result, "1.2.840.10008.5.1.4.1.1.88.33"), uid);
    }
}
