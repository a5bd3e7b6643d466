//! The counters as text for Prometheus.
//!
//! In: [`Counts`], [`Status`] and [`Metrics`] at the moment of the scrape. Out: OpenMetrics 1.0, or the older Prometheus text format 0.0.4, which
//! differs in the names of counters' headers and has no end mark.

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::metrics::{Counts, Metrics};
use super::status::Status;

/// A gauge of a real number.
type RealGauge = Gauge<f64, AtomicU64>;

/// The two text forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TextForm {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus text format 0.0.4.
    Prometheus,
}

impl TextForm {
    /// What a scraper's Accept header asks for.
    pub(crate) fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    /// Its Content-Type.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

impl Metrics {
    /// All counters, and the gauges that `status` holds, as text.
    pub(crate) fn text(&self, counts: &Counts, status: &Status, form: TextForm) -> String {
        let mut registry = Registry::with_prefix("edge");
        register_counts(&mut registry, counts);
        register_status(&mut registry, status);
        self.register(&mut registry);
        let mut text = String::new();
        // Writing to a String cannot fail.
        let encoded = prometheus_client::encoding::text::encode(&mut text, &registry);
        debug_assert!(encoded.is_ok());
        match form {
            TextForm::OpenMetrics => text,
            TextForm::Prometheus => prometheus_text(&text),
        }
    }
}

/// Counters that the stages hold themselves.
fn register_counts(registry: &mut Registry, counts: &Counts) {
    let mut labelled = |name: &str, help: &str, label: &'static str, values: &[(&str, u64)]| {
        let family = Family::<Vec<(&'static str, String)>, Counter>::default();
        for (value, count) in values {
            let labels = vec![(label, (*value).to_owned())];
            family.get_or_create(&labels).inc_by(*count);
        }
        registry.register(name, help, family);
    };
    labelled(
        "associations",
        "Association requests by what was answered",
        "answer",
        &[
            ("accepted", counts.associations),
            ("rejected_peer", counts.rejected_peer),
            ("rejected_limit", counts.rejected_limit),
        ],
    );
    labelled(
        "associations_broken",
        "Associations and connections that did not end by a release",
        "why",
        &[("deadline", counts.timed_out), ("abort", counts.aborted)],
    );
    labelled(
        "objects_refused",
        "DICOM objects refused",
        "why",
        &[
            ("room", counts.refused_room),
            ("object", counts.refused_object),
        ],
    );
    labelled(
        "files",
        "Files of the watch folder",
        "how",
        &[
            ("taken", counts.files_taken),
            ("quarantined", counts.files_quarantined),
        ],
    );
    for (name, help, count) in single(counts) {
        let counter = Counter::<u64>::default();
        counter.inc_by(count);
        registry.register(name, help, counter);
    }
}

/// Counters without a label: name, help and count.
fn single(counts: &Counts) -> [(&'static str, &'static str, u64); 12] {
    [
        ("connections", "Connections accepted", counts.connections),
        ("echoes", "C-ECHO requests answered", counts.echoes),
        (
            "objects_received",
            "DICOM objects answered with success",
            counts.objects,
        ),
        ("spool_syncs", "Sync calls on the spool", counts.sync_calls),
        (
            "spool_written_bytes",
            "Bytes written to the spool",
            counts.written_bytes,
        ),
        ("slices_analysed", "Slices with an answer", counts.analysed),
        (
            "slices_not_analysed",
            "Slices without an answer",
            counts.not_analysed,
        ),
        (
            "slices_recognised",
            "Slices answered without inference, because they came before",
            counts.recognised,
        ),
        (
            "workers_replaced",
            "Worker processes that died or hung and were replaced",
            counts.workers_replaced,
        ),
        (
            "store_failures",
            "Failures of the results database",
            counts.store_failures,
        ),
        (
            "results_lost",
            "Times the results database was missing or broken at the start and was made anew",
            counts.results_lost,
        ),
        (
            "letters_lost",
            "Messages to receivers that were deleted, for their age or for want of room, and that none had accepted",
            counts.letters_lost,
        ),
    ]
}

/// Gauges that are read at the moment of the scrape.
#[expect(
    clippy::cast_precision_loss,
    reason = "a gauge is a 64-bit float on the wire; counts beyond 2^53 do not occur"
)]
fn register_status(registry: &mut Registry, status: &Status) {
    let mut gauge = |name: &str, help: &str, value: f64| {
        let gauge = RealGauge::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let count = |value: u64| value as f64;
    let is = |value: bool| if value { 1.0 } else { 0.0 };
    gauge(
        "associations_open",
        "Associations that are open",
        count(status.associations_open),
    );
    gauge(
        "waiting",
        "Objects that wait for analysis",
        count(status.waiting),
    );
    gauge("studies", "Studies on the worklist", count(status.studies));
    gauge(
        "positive_studies",
        "Positive ones among them",
        count(status.positive_studies),
    );
    gauge(
        "outbox_waiting",
        "Results that wait to be delivered",
        count(status.outbox_waiting),
    );
    gauge(
        "dead_letters",
        "Results given up",
        count(status.dead_letters),
    );
    gauge(
        "commitments_waiting",
        "Results delivered that the PACS has yet to commit to",
        count(status.commitments_waiting),
    );
    gauge(
        "not_committed",
        "Results delivered that the PACS has not committed to",
        count(status.not_committed),
    );
    gauge(
        "disk_free_bytes",
        "Free bytes where the state lies",
        count(status.disk_free_bytes),
    );
    gauge(
        "disk_total_bytes",
        "Size of that file system in bytes",
        count(status.disk_total_bytes),
    );
    gauge(
        "spool_bytes",
        "Bytes of the spool",
        count(status.spool_bytes),
    );
    gauge(
        "intake_open",
        "1 while objects are accepted, 0 for want of room",
        is(status.is_accepting),
    );
    gauge(
        "self_test_passed",
        "1 where the model gives the bits that its file states, or the file states none",
        is(status.is_model_sound()),
    );
    gauge(
        "demonstration_model",
        "1 where the model was trained on the phantom",
        is(status.is_demonstration),
    );
    gauge(
        "clock_trusted",
        "1 where the clock is plausible",
        is(status.is_clock_trusted),
    );
    gauge(
        "uptime_seconds",
        "Seconds since the start",
        count(status.uptime_s),
    );
    if let Some(celsius) = status.temperature_celsius {
        gauge(
            "temperature_celsius",
            "Temperature of the processor",
            f64::from(celsius),
        );
    }
    if let Some(seconds) = status.certificate_expires_s {
        gauge(
            "certificate_expiry_timestamp_seconds",
            "When the TLS certificate expires, Unix time",
            seconds as f64,
        );
    }
}

/// OpenMetrics text as Prometheus text 0.0.4: a counter's headers carry the suffix of its samples; units and the end mark are comments already.
fn prometheus_text(open_metrics: &str) -> String {
    let counters: Vec<&str> = open_metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::with_capacity(open_metrics.len() + 64 * counters.len());
    for line in open_metrics.lines() {
        if line == "# EOF" || line.starts_with("# UNIT ") {
            continue;
        }
        let header = ["# HELP ", "# TYPE "]
            .into_iter()
            .find_map(|kind| Some((kind, line.strip_prefix(kind)?.split_once(' ')?)));
        // Writing to a String cannot fail.
        let written = match header {
            Some((kind, (name, rest))) if counters.contains(&name) => {
                writeln!(text, "{kind}{name}_total {rest}")
            }
            _ => writeln!(text, "{line}"),
        };
        debug_assert!(written.is_ok());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operate::metrics::{
        Decided, DecidedOutcome, Delivery, DeliveryChannel, DeliveryEnd,
    };
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    fn used() -> Metrics {
        let metrics = Metrics::default();
        metrics.inference_seconds.observe(0.066);
        let decided = Decided {
            outcome: DecidedOutcome::not_detected,
        };
        metrics.results.get_or_create(&decided).inc();
        let delivery = Delivery {
            channel: DeliveryChannel::hl7,
            how: DeliveryEnd::delivered,
        };
        metrics.deliveries.get_or_create(&delivery).inc();
        metrics
    }

    fn written(status: &Status, form: TextForm) -> String {
        let counts = Counts {
            objects: 245,
            refused_room: 1,
            ..Counts::default()
        };
        used().text(&counts, status, form)
    }

    #[test]
    fn prometheus_text_names_counters_as_their_samples() {
        let text = written(&Status::default(), TextForm::Prometheus);
        for line in [
            "# TYPE edge_objects_received_total counter",
            "edge_objects_received_total 245",
            "edge_objects_refused_total{why=\"room\"} 1",
            "edge_slices_not_analysed_total 0",
            "# TYPE edge_inference_seconds histogram",
            "edge_disk_free_bytes 0.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("# EOF"));
        let open = written(&Status::default(), TextForm::OpenMetrics);
        assert!(open.ends_with("# EOF\n"));
    }

    #[test]
    fn a_model_whose_file_states_no_self_test_raises_no_alarm() {
        let passed = |self_test: &str| {
            let status = Status {
                self_test: self_test.into(),
                ..Status::default()
            };
            written(&status, TextForm::Prometheus).contains("\nedge_self_test_passed 1.0\n")
        };
        assert!(passed("passed") && passed("absent"));
        assert!(!passed("self-test: logit bits differ") && !passed(""));
    }

    #[test]
    fn alert_rules_and_dashboard_name_metrics_that_exist() {
        let status = Status {
            temperature_celsius: Some(50.0),
            certificate_expires_s: Some(1),
            ..Status::default()
        };
        let text = written(&status, TextForm::Prometheus);
        let asked = [
            include_str!("../../packaging/edge.rules.yml"),
            include_str!("../../packaging/dashboard.json"),
        ]
        .join("\n");
        let is_name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let names = asked
            .split(|c| !is_name(c))
            .filter(|name| name.starts_with("edge_"));
        let mut n_names = 0;
        for name in names {
            let has_it = text.lines().any(|line| {
                let rest = line.strip_prefix(name);
                rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
            });
            assert!(has_it, "{name}");
            n_names += 1;
        }
        assert!(n_names > 25);
    }

    #[test]
    fn every_alert_has_a_row_that_says_what_to_do() {
        let rules = include_str!("../../packaging/edge.rules.yml").lines();
        let alerts = rules.filter_map(|line| line.trim().strip_prefix("- alert: "));
        let rows = include_str!("../../../docs/operating.md").lines();
        let rows: Vec<&str> = rows.filter(|row| row.starts_with("| PeEdge")).collect();
        for alert in alerts {
            let is_named = |row: &&&str| {
                row.split('|')
                    .nth(1)
                    .is_some_and(|names| names.split(',').any(|name| name.trim() == alert))
            };
            assert_eq!(rows.iter().filter(is_named).count(), 1, "{alert}");
        }
    }

    #[test]
    fn panels_of_the_dashboard_have_a_place_and_something_to_show() {
        let dashboard: serde_json::Value =
            serde_json::from_str(include_str!("../../packaging/dashboard.json")).unwrap();
        let mut taken = std::collections::BTreeSet::new();
        let mut ids = std::collections::BTreeSet::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            assert!(ids.insert(panel["id"].as_u64().unwrap()));
            let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
            for row in at("y")..at("y") + at("h") {
                for column in at("x")..at("x") + at("w") {
                    assert!(
                        column < 24 && taken.insert((row, column)),
                        "{}",
                        panel["title"]
                    );
                }
            }
            let targets = panel["targets"].as_array().unwrap();
            assert!(!targets.is_empty());
            let references = targets
                .iter()
                .map(|target| target["refId"].as_str().unwrap());
            assert!(references.is_sorted_by(|a, b| a < b), "{}", panel["title"]);
            for target in targets {
                assert!(
                    target["expr"]
                        .as_str()
                        .unwrap()
                        .contains("instance=~\"$instance\"")
                );
            }
        }
    }

    #[test]
    fn promtool_finds_nothing_to_say() {
        let spawned = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut promtool) = spawned else {
            // Not installed here.
            return;
        };
        let text = written(&Status::default(), TextForm::Prometheus);
        let mut input = promtool.stdin.take().unwrap();
        input.write_all(text.as_bytes()).unwrap();
        drop(input);
        let output = promtool.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}");
    }
}
