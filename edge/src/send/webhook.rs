//! Results as signed JSON by HTTP POST.
//!
//! The body is the same at every attempt; `Idempotency-Key` is the letter's key, `X-PE-Edge-Signature` is `sha256=` and the HMAC-SHA256 (RFC 2104) of
//! the body in hexadecimal. The body names the study by UID and accession number, never the patient.

use std::time::Duration;

use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;
use shared::RESEARCH_USE;
use shared::probability::sigmoid;
use shared::uid::Uid;
use ureq::Agent;

use super::delivery::Verdict;
use super::{http, structured_report};
use crate::page::person;
use crate::result::{Outcome, State, StudyResult};

/// Accession Number.
const ACCESSION: (u16, u16) = (0x0008, 0x0050);

/// A webhook.
#[derive(Clone, Debug)]
pub(crate) struct Webhook {
    /// Where to.
    pub(crate) url: String,
    /// Key of the signature.
    pub(crate) secret: Secret,
    /// Who asks.
    pub(crate) agent: Agent,
}

/// A key, never printed.
#[derive(Clone)]
pub(crate) struct Secret(pub(crate) Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Webhook {
    /// One attempt. Blocks.
    pub(crate) fn send(&self, key: &Uid, body: &[u8], deadline: Duration) -> Verdict {
        let signature = signature(&self.secret, body);
        let headers = [
            ("Content-Type", "application/json"),
            ("Idempotency-Key", key.as_str()),
            ("X-PE-Edge-Signature", signature.as_str()),
        ];
        match http::post(&self.agent, &self.url, &headers, body, deadline) {
            Ok(answer) => http::judge(answer.status),
            Err(reason) => Verdict::Down(reason),
        }
    }
}

/// `sha256=` and the HMAC in hexadecimal.
fn signature(secret: &Secret, body: &[u8]) -> String {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(&secret.0).expect("HMAC takes a key of any length");
    mac.update(body);
    let digits = mac.finalize().into_bytes();
    let digits: String = digits.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256={digits}")
}

/// The body.
pub(crate) fn body(result: &StudyResult, key: &Uid) -> Vec<u8> {
    let (outcome, reason) = match &result.outcome {
        Outcome::Pending => ("pending", None),
        Outcome::Positive => ("positive", None),
        Outcome::NotDetected => ("not_detected", None),
        Outcome::NotAnalysed { code, .. } => ("not_analysed", Some(code)),
    };
    let top = result
        .top
        .iter()
        .filter_map(|&index| result.slices.get(index));
    let top: Vec<Value> = top
        .map(|slice| {
            json!({
                "sop_uid": slice.sop_uid,
                "frame": slice.frame,
                "probability": slice.logit.map(sigmoid),
            })
        })
        .collect();
    let body = json!({
        "format": 1,
        "id": key,
        "notice": RESEARCH_USE,
        "study_uid": result.study_uid,
        "series_uid": result.series_uid,
        "accession_number": person::attribute(&result.patient, ACCESSION),
        "revision": result.revision,
        "is_final": result.state == State::Complete,
        "outcome": outcome,
        "reason": reason,
        "probability": result.score.map(sigmoid),
        "threshold": result.threshold.map(sigmoid),
        "slices": result.slices.len(),
        "analysed": result.n_analysed(),
        "top": top,
        "words": structured_report::words(result),
        "model": result.model.name,
        "model_digest": result.model.digest,
        "is_demonstration": result.model.is_demonstration,
        "decided_ms": result.decided_ms,
    });
    body.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn the_signature_is_hmac_sha256() {
        // RFC 4231, test case 2.
        let secret = Secret(b"Jefe".to_vec());
        assert_eq!(
            signature(&secret, b"what do ya want for nothing?"),
            "sha256=5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
        assert!(!format!("{secret:?}").contains("74"));
    }

    #[test]
    fn the_body_tells_the_result_and_not_the_patient() {
        let result = sample::positive();
        let key = Uid::new("2.25.7").unwrap();
        let text = String::from_utf8(body(&result, &key)).unwrap();
        for planted in ["ller", "4711", "19610203", "1961", "cker"] {
            assert!(!text.contains(planted), "{planted} in {text}");
        }
        let body: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(body["accession_number"], "A-17");
        assert_eq!(body["outcome"], "positive");
        assert_eq!((&body["slices"], &body["analysed"]), (&json!(6), &json!(5)));
        assert_eq!(body["top"][0]["sop_uid"], result.slices[3].sop_uid.as_str());
    }
}
