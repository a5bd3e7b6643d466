//! Structured reports by STOW-RS (PS3.18 section 10.5): multipart/related, one part with the file.

use std::time::Duration;

use serde_json::Value;
use ureq::Agent;

use super::delivery::Verdict;
use super::webhook::Secret;
use super::{data_set, http, pacs};

/// A STOW-RS server.
#[derive(Clone, Debug)]
pub(crate) struct Stow {
    /// The service's root.
    pub(crate) url: String,
    /// Bearer token.
    pub(crate) token: Option<Secret>,
    /// Who asks.
    pub(crate) agent: Agent,
}

impl Stow {
    /// One attempt with a data set in Explicit VR Little Endian. Blocks.
    pub(crate) fn send(&self, class: &str, uid: &str, data: &[u8], deadline: Duration) -> Verdict {
        let boundary = format!("pe-edge-{uid}");
        let media = format!("multipart/related; type=\"application/dicom\"; boundary={boundary}");
        let body = multipart(&boundary, &data_set::file(class, uid, data));
        let bearer = self.token.as_ref().map(|token| {
            let token = String::from_utf8_lossy(&token.0);
            format!("Bearer {}", token.trim())
        });
        let mut headers = vec![
            ("Content-Type", media.as_str()),
            ("Accept", "application/dicom+json"),
        ];
        headers.extend(bearer.as_deref().map(|bearer| ("Authorization", bearer)));
        let url = format!("{}/studies", self.url.trim_end_matches('/'));
        match http::post(&self.agent, &url, &headers, &body, deadline) {
            Ok(answer) => judge(&answer),
            Err(reason) => Verdict::Down(reason),
        }
    }
}

fn multipart(boundary: &str, file: &[u8]) -> Vec<u8> {
    let mut body = format!("--{boundary}\r\nContent-Type: application/dicom\r\n\r\n").into_bytes();
    body.extend(file);
    body.extend(format!("\r\n--{boundary}--\r\n").into_bytes());
    body
}

/// 200 and 202 are success unless the answer names a failure of the instance; 409 names it, too (PS3.18 section 10.5.3).
fn judge(answer: &http::Answer) -> Verdict {
    let (200..=299 | 409, Some(reason)) = (answer.status, failure_reason(&answer.body)) else {
        return http::judge(answer.status);
    };
    let said = format!(
        "HTTP status {}, failure reason {reason:04X}H",
        answer.status
    );
    match pacs::judge(reason) {
        pacs::Answer::Accepted(_) => Verdict::Accepted(Some(said)),
        pacs::Answer::Later => Verdict::Later(said),
        pacs::Answer::Refused => Verdict::Refused(said),
    }
}

/// Failure Reason (0008,1197) of the first item of Failed SOP Sequence (0008,1198), in DICOM JSON.
fn failure_reason(body: &[u8]) -> Option<u16> {
    let answer: Value = serde_json::from_slice(body).ok()?;
    let answer = answer.get(0).unwrap_or(&answer);
    let reason = answer.pointer("/00081198/Value/0/00081197/Value/0")?;
    u16::try_from(reason.as_u64()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(status: u16, body: &str, expected: &str) {
        let answer = http::Answer {
            status,
            body: body.as_bytes().to_vec(),
        };
        let verdict = format!("{:?}", judge(&answer));
        assert!(verdict.starts_with(expected), "{status} {body}: {verdict}");
    }

    fn failed(reason: u16) -> String {
        format!(
            r#"{{"00081198":{{"vr":"SQ","Value":[{{"00081197":{{"vr":"US","Value":[{reason}]}}}}]}}}}"#
        )
    }

    #[test]
    fn the_failure_reason_decides_where_there_is_one() {
        check(200, "", "Accepted(None)");
        check(202, r#"{"00081199":{}}"#, "Accepted(None)");
        check(200, &format!("[{}]", failed(0xA700)), "Later");
        check(202, &failed(0xC000), "Refused");
        check(409, &failed(0x0111), "Accepted(Some");
        check(409, &failed(0x0122), "Refused");
        check(409, "<html>", "Refused");
        check(503, &failed(0xC000), "Later");
        check(429, "", "Later");
        check(401, "", "Refused");
        check(302, "", "Refused");
    }

    #[test]
    fn the_body_is_one_part_with_the_file() {
        let body = multipart("b", b"FILE");
        let expected = "--b\r\nContent-Type: application/dicom\r\n\r\nFILE\r\n--b--\r\n";
        assert_eq!(String::from_utf8(body).unwrap(), expected);
    }
}
