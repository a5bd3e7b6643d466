//! Results as HL7 v2.5.1 ORU^R01 over MLLP (HL7 v2.5.1 chapters 2 and 7; transport specification MLLP release 1).
//!
//! One message, one connection, one acknowledgement whose MSA-2 must name the message. AA and CA accept it; every other code is a refusal
//! that a person must look at. Text is UTF-8.

use std::time::Duration;

use jiff::Timestamp;
use shared::probability::sigmoid;
use shared::uid::Uid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::connection::Connection;
use super::content::{self, Code};
use super::delivery::Verdict;
use super::structured_report;
use crate::page::person;
use crate::result::{Outcome, State, StudyResult};

/// Start and end of a message.
const START: u8 = 0x0B;
/// First byte of the end.
const END: [u8; 2] = [0x1C, 0x0D];
/// Longest acknowledgement.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Longest MSH-10 of version 2.5.1.
const CONTROL_ID_DIGITS: usize = 20;

/// An HL7 receiver.
#[derive(Clone, Debug)]
pub(crate) struct Hl7 {
    /// Where it is; with TLS, MLLP over it (IHE ITI-19, RFC 8446).
    pub(crate) connection: Connection,
    /// MSH-4.
    pub(crate) sending_facility: String,
    /// MSH-5.
    pub(crate) receiving_application: String,
    /// MSH-6.
    pub(crate) receiving_facility: String,
}

impl Hl7 {
    /// One attempt.
    pub(crate) async fn send(&self, key: &Uid, message: &[u8], deadline: Duration) -> Verdict {
        match timeout(deadline, self.exchange(message)).await {
            Ok(Ok(answer)) => judge(&answer, &control_id(key)),
            Ok(Err(error)) => Verdict::Down(error.to_string()),
            Err(_) => Verdict::Down(format!("no answer within {} s", deadline.as_secs())),
        }
    }

    async fn exchange(&self, message: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut stream = self.connection.connect().await?;
        let mut framed = vec![START];
        framed.extend(message);
        framed.extend(END);
        stream.write_all(&framed).await?;
        stream.flush().await?;
        let mut answer = Vec::new();
        let mut part = [0; 1024];
        while !answer.ends_with(&END) && answer.len() < MAX_ANSWER_BYTES {
            let count = stream.read(&mut part).await?;
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            answer.extend(&part[..count]);
        }
        Ok(answer)
    }

    /// The message: the same bytes for the same result.
    pub(crate) fn message(&self, result: &StudyResult, key: &Uid) -> Vec<u8> {
        let segments = [
            self.header(result, key),
            patient(result),
            order(result),
            observation(
                1,
                "CWE",
                content::PULMONARY_EMBOLISM,
                &presence(result),
                "",
                result,
            ),
        ];
        let mut message = segments.join("\r");
        let mut set = 2;
        if let Some(score) = result.score {
            let value = format!("{:.2}", f64::from(sigmoid(score)) * 100.0);
            let segment = observation(
                set,
                "NM",
                content::PROBABILITY,
                &value,
                "%^Percent^UCUM",
                result,
            );
            message.push('\r');
            message.push_str(&segment);
            set += 1;
        }
        let words = escaped(&structured_report::words(result));
        message.push('\r');
        message.push_str(&observation(
            set,
            "TX",
            content::COMMENT,
            &words,
            "",
            result,
        ));
        message.push('\r');
        message.into_bytes()
    }

    fn header(&self, result: &StudyResult, key: &Uid) -> String {
        format!(
            "MSH|^~\\&|PEEDGE|{}|{}|{}|{}||ORU^R01^ORU_R01|{}|P|2.5.1|||AL|NE||UNICODE UTF-8",
            escaped(&self.sending_facility),
            escaped(&self.receiving_application),
            escaped(&self.receiving_facility),
            time(result.decided_ms),
            control_id(key),
        )
    }
}

fn patient(result: &StudyResult) -> String {
    let text = |tag| person::attribute(&result.patient, tag);
    let sex = text((0x0010, 0x0040));
    let sex = if ["M", "F", "O"].contains(&sex.as_str()) {
        sex.as_str()
    } else {
        "U"
    };
    format!(
        "PID|1||{}^^^{}||{}||{}|{sex}",
        escaped(&text((0x0010, 0x0020))),
        escaped(&text((0x0010, 0x0021))),
        name(&text((0x0010, 0x0010))),
        escaped(&text((0x0010, 0x0030))),
    )
}

/// OBR: the accession number as placer's and the Study Instance UID as filler's number; OBR-22 and OBR-25 say when and how final.
fn order(result: &StudyResult) -> String {
    let text = |tag| escaped(&person::attribute(&result.patient, tag));
    format!(
        "OBR|1|{}|{}|{}|||{}{}|||||||||||||||{}||CT|{}",
        text((0x0008, 0x0050)),
        result.study_uid,
        coded(content::CT),
        text((0x0008, 0x0020)),
        text((0x0008, 0x0030)).split('.').next().unwrap_or_default(),
        time(result.decided_ms),
        status(result),
    )
}

fn observation(
    set: u32,
    value_type: &str,
    concept: Code,
    value: &str,
    unit: &str,
    result: &StudyResult,
) -> String {
    format!(
        "OBX|{set}|{value_type}|{}||{value}|{unit}|||||{}",
        coded(concept),
        status(result)
    )
}

fn presence(result: &StudyResult) -> String {
    coded(match result.outcome {
        Outcome::Positive => content::DETECTED,
        Outcome::NotDetected => content::NOT_DETECTED,
        Outcome::Pending | Outcome::NotAnalysed { .. } => content::NOT_ATTEMPTED,
    })
}

/// OBX-11: preliminary, or final.
fn status(result: &StudyResult) -> &'static str {
    match result.state {
        State::Complete => "F",
        State::Receiving | State::Provisional => "P",
    }
}

fn coded(code: Code) -> String {
    format!("{}^{}^{}", code.value, code.meaning, code.scheme)
}

/// The last digits of the key: as good as random.
fn control_id(key: &Uid) -> String {
    let digits = key.as_str().as_bytes();
    let first = digits.len().saturating_sub(CONTROL_ID_DIGITS);
    String::from_utf8_lossy(&digits[first..]).into_owned()
}

/// DICOM's family^given^middle^prefix^suffix as HL7's family^given^middle^suffix^prefix.
fn name(value: &str) -> String {
    let group = value.split('=').next().unwrap_or_default();
    let part = |index| escaped(group.split('^').nth(index).unwrap_or_default().trim());
    let parts = [part(0), part(1), part(2), part(4), part(3)].join("^");
    parts.trim_end_matches('^').to_owned()
}

fn time(at_ms: i64) -> String {
    let at = Timestamp::from_millisecond(at_ms).unwrap_or(Timestamp::UNIX_EPOCH);
    at.strftime("%Y%m%d%H%M%S+0000").to_string()
}

/// Delimiters as escape sequences (chapter 2.7); control characters left out.
fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for letter in value.chars() {
        match letter {
            '|' => out.push_str("\\F\\"),
            '^' => out.push_str("\\S\\"),
            '&' => out.push_str("\\T\\"),
            '~' => out.push_str("\\R\\"),
            '\\' => out.push_str("\\E\\"),
            letter if letter.is_control() => out.push(' '),
            letter => out.push(letter),
        }
    }
    out
}

/// What an acknowledgement says.
fn judge(answer: &[u8], control_id: &str) -> Verdict {
    let text = String::from_utf8_lossy(answer);
    let segments = text
        .trim_matches(['\u{b}', '\u{1c}', '\r', '\n'])
        .split(['\r', '\n']);
    let Some(segment) = segments
        .into_iter()
        .find(|segment| segment.starts_with("MSA|"))
    else {
        return Verdict::Down("an answer without MSA segment".to_owned());
    };
    let mut fields = segment.split('|').skip(1);
    let (code, of) = (fields.next().unwrap_or(""), fields.next().unwrap_or(""));
    if of.trim() != control_id {
        return Verdict::Down("an acknowledgement of another message".to_owned());
    }
    match code {
        "AA" | "CA" => Verdict::Accepted(None),
        _ => {
            // The receiver's own words might repeat patient data; its code is enough.
            let known = ["AE", "AR", "CE", "CR"]
                .into_iter()
                .find(|known| *known == code);
            Verdict::Refused(format!(
                "acknowledged with {}",
                known.unwrap_or("an unknown code")
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    fn receiver(port: u16) -> Hl7 {
        Hl7 {
            connection: Connection {
                host: "127.0.0.1".to_owned(),
                port,
                tls: None,
            },
            sending_facility: "RAD|IOLOGY".to_owned(),
            receiving_application: "RIS".to_owned(),
            receiving_facility: "HOSPITAL".to_owned(),
        }
    }

    #[test]
    fn the_message_is_the_result_segment_by_segment() {
        let key = Uid::new("2.25.123456789012345678901234567890").unwrap();
        let message = receiver(1).message(&sample::positive(), &key);
        let message = String::from_utf8(message).unwrap();
        let segments: Vec<_> = message.split('\r').collect();
        assert_eq!(
            segments,
            [
                "MSH|^~\\&|PEEDGE|RAD\\F\\IOLOGY|RIS|HOSPITAL|20261123101700+0000||ORU^R01^ORU_R01|12345678901234567890|P|2.5.1|||AL|NE||UNICODE UTF-8",
                "PID|1||4711^^^||M\u{fc}ller^J\u{fc}rgen||19610203|M",
                "OBR|1|A-17|1.2.826.0.1.3680043.10.1399.5|25045-6^CT unspecified body region^LN|||20261123101500|||||||||||||||20261123101700+0000||CT|F",
                "OBX|1|CWE|59282003^Pulmonary embolism^SCT||260373001^Detected^SCT||||||F",
                "OBX|2|NM|122157^Probability^DCM||97.07|%^Percent^UCUM|||||F",
                "OBX|3|TX|121106^Comment^DCM||Suspected; 5 of 6 slices analysed. 1 could not be analysed. Demonstration model, trained on synthetic data. Research use only, not a medical device.||||||F",
                "",
            ]
        );
        // OBR-22, OBR-24, OBR-25 and OBX-11 stand where the standard has them.
        let field = |segment: usize, index: usize| segments[segment].split('|').nth(index);
        assert_eq!((field(2, 24), field(2, 25)), (Some("CT"), Some("F")));
        assert_eq!(
            (field(2, 22), field(3, 11)),
            (Some("20261123101700+0000"), Some("F"))
        );
        assert_eq!(field(2, 7), Some("20261123101500"));
    }

    #[test]
    fn delimiters_in_a_name_cannot_make_segments() {
        assert_eq!(
            escaped("a|b^c&d~e\\f\rMSH"),
            "a\\F\\b\\S\\c\\T\\d\\R\\e\\E\\f MSH"
        );
        assert_eq!(name("Doe^Jo|hn^^Dr^Jr=x^y"), "Doe^Jo\\F\\hn^^Jr^Dr");
    }

    #[track_caller]
    fn check(answer: &[u8], expected: &str) {
        let verdict = format!("{:?}", judge(answer, "42"));
        assert!(verdict.starts_with(expected), "{verdict}");
    }

    #[test]
    fn only_an_acknowledgement_of_this_message_accepts_it() {
        check(b"\x0bMSH|^~\\&|R|\rMSA|AA|42\r\x1c\r", "Accepted");
        check(b"\x0bMSH|^~\\&|R|\rMSA|CA|42|ok\r\x1c\r", "Accepted");
        check(
            b"\x0bMSH|^~\\&|R|\rMSA|AE|42|planted name\r\x1c\r",
            "Refused(\"acknowledged with AE\")",
        );
        check(b"\x0bMSH|^~\\&|R|\rMSA|AR|42\r\x1c\r", "Refused");
        check(b"\x0bMSH|^~\\&|R|\rMSA|AA|41\r\x1c\r", "Down");
        check(b"\x0bMSH|^~\\&|R|\r\x1c\r", "Down");
        check(b"", "Down");
    }
}
