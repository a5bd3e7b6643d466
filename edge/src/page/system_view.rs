//! The system view: model, intake, storage, results out, machine, peers.

use maud::{Markup, html};

use super::layout::moment;
use crate::operate::status::Status;

/// The page.
pub(crate) fn page(status: &Status) -> Markup {
    html! {
        div.title { h1 { "System" } p.counts { span.state.(state_class(status)) { (status.state) } } }
        div.cards {
            (card("Model", &html! {
                dt { "Name" } dd { (status.model) }
                dt { "Digest" } dd.uid { (status.model_digest.get(..16).unwrap_or(&status.model_digest)) }
                dt { "Self-test" } dd.(good(status.is_model_sound())) { (status.self_test) }
                dt { "Note" } dd { (status.model_notice) }
            }))
            (card("Intake", &html! {
                dt { "Node" } dd { (status.ae_title) " · port " (status.dicom_port) }
                dt { "Accepting" } dd.(good(status.is_accepting)) { (if status.is_accepting { "yes" } else { "no: no room" }) }
                dt { "Associations" } dd { (status.associations_open) " open" }
                dt { "Received" } dd { (status.received) " objects" }
                dt { "Waiting" } dd { (status.waiting) }
                dt { "Slices" } dd { (status.analysed) " analysed, " (status.not_analysed) " not" }
                dt { "Workers replaced" } dd { (status.workers_replaced) }
            }))
            (card("Results out", &html! {
                dt { "Waiting" } dd { (status.outbox_waiting) }
                dt { "Given up" } dd.(good(status.dead_letters == 0)) { (status.dead_letters) }
                dt { "Not committed" } dd.(good(status.not_committed == 0)) { (status.not_committed) @if status.commitments_waiting > 0 { ", " (status.commitments_waiting) " asked" } }
                dt { "Studies" } dd { (status.studies) ", " (status.positive_studies) " suspected" }
            }))
            (card("Storage", &html! {
                dt { "Free" } dd { (bytes(status.disk_free_bytes)) " of " (bytes(status.disk_total_bytes)) (meter(status)) }
                dt { "Spool" } dd { (bytes(status.spool_bytes)) }
            }))
            (card("Machine", &html! {
                dt { "Temperature" } dd { @match status.temperature_celsius { Some(celsius) => (format!("{celsius:.0} °C")), None => "not measured" } }
                dt { "Clock" } dd.(good(status.is_clock_trusted)) { (clock(status)) }
                dt { "Up" } dd { (duration(status.uptime_s)) }
                dt { "Version" } dd { (status.version) }
                @if let Some(seconds) = status.certificate_expires_s { dt { "Certificate until" } dd { (moment(seconds.saturating_mul(1000))) } }
            }))
        }
        @if !status.given_up.is_empty() { section {
            h2 { "Given up" }
            p.quiet { "Kept until they are too old. A reload sends them again, as far as nothing later was delivered." }
            table.reasons {
                thead { tr { th scope="col" { "Study" } th scope="col" { "Through" } th scope="col" { "When" } th scope="col" { "Why" } } }
                tbody { @for letter in &status.given_up {
                    tr { td.uid { a href=(format!("/studies/{}", letter.study_uid)) { (letter.study_uid) } } td { (letter.channel) } td { (moment(letter.ended_ms)) } td { (letter.reason) } }
                } }
            }
        } }
        section {
            h2 { "Peers" }
            @if status.peers.is_empty() { p.quiet { "None yet." } } @else {
                table.reasons {
                    thead { tr { th scope="col" { "Name" } th scope="col" { "Address" } th scope="col" { "Role" } th scope="col" { "Objects" } th scope="col" { "Last heard" } } }
                    tbody { @for peer in &status.peers {
                        tr { td { (peer.ae_title) } td { (peer.address) } td { (peer.role) } td { (peer.n_objects) } td { @match peer.last_seen_ms { Some(time) => (moment(time)), None => "never" } } }
                    } }
                }
            }
        }
    }
}

fn clock(status: &Status) -> &'static str {
    match (status.is_clock_trusted, status.is_deleting_by_age) {
        (false, _) => "not set: nothing is deleted by age",
        (true, false) => {
            "plausible; nothing is deleted by age within an hour of a start or of a jump"
        }
        (true, true) => "plausible",
    }
}

fn card(title: &str, facts: &Markup) -> Markup {
    html! { section.card { h2 { (title) } dl.facts { (facts) } } }
}

fn state_class(status: &Status) -> &'static str {
    good(status.state == "ready")
}

fn good(is_good: bool) -> &'static str {
    if is_good { "good" } else { "bad" }
}

/// The share of the disk that is used, drawn.
fn meter(status: &Status) -> Markup {
    let used = status
        .disk_total_bytes
        .saturating_sub(status.disk_free_bytes);
    let share = (used.saturating_mul(100))
        .checked_div(status.disk_total_bytes)
        .unwrap_or(0);
    html! {
        svg.meter viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label=(format!("{share} percent used")) {
            rect width="100" height="6" fill="#2a323b" {}
            rect width=(share) height="6" fill=(if share < 85 { "#5f8fb8" } else { "#f0b24a" }) {}
        }
    }
}

/// Bytes for people.
#[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Seconds for people.
pub(crate) fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours) {
        (0, 0) => format!("{minutes} min"),
        (0, _) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::status::GivenUp;

    #[test]
    fn quantities_are_for_people() {
        assert_eq!(
            [bytes(999), bytes(1_500), bytes(42_000_000_000)],
            ["999 B", "1.5 kB", "42.0 GB"]
        );
        assert_eq!(
            [duration(59), duration(3_700), duration(90_000)],
            ["0 min", "1 h 1 min", "1 d 1 h"]
        );
    }

    #[test]
    fn what_is_wrong_is_marked() {
        let html = page(&Status {
            self_test: "logit bits differ".into(),
            ..Status::default()
        })
        .into_string();
        assert!(html.contains("<dd class=\"bad\">logit bits differ</dd>"));
        assert!(html.contains("no: no room"));
        assert!(!html.contains("Given up</h2>"));
    }

    #[test]
    fn a_clock_by_which_nothing_is_deleted_yet_says_so() {
        let said = |is_clock_trusted, is_deleting_by_age| {
            page(&Status {
                is_clock_trusted,
                is_deleting_by_age,
                ..Status::default()
            })
            .into_string()
        };
        assert!(said(true, true).contains("<dd class=\"good\">plausible</dd>"));
        assert!(said(true, false).contains("plausible; nothing is deleted by age"));
        assert!(said(false, false).contains("not set: nothing is deleted by age"));
    }

    #[test]
    fn a_result_given_up_is_named_with_its_reason() {
        let html = page(&Status {
            given_up: vec![GivenUp {
                study_uid: "1.2.3".into(),
                channel: "structured_report".into(),
                ended_ms: 0,
                reason: "C-STORE status C000H <0>".into(),
            }],
            ..Status::default()
        })
        .into_string();
        assert!(html.contains("href=\"/studies/1.2.3\">1.2.3</a>"));
        assert!(html.contains("C-STORE status C000H &lt;0&gt;"));
    }
}
