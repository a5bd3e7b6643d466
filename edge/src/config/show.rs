//! Prints a [`Config`] as the TOML file that would give it: what `edge config show` says is in force.

use std::path::Path;
use std::time::Duration;

use super::{Config, Limits, Retention};

/// The configuration as TOML, every value that is in force spelled out. Secrets are named by their files, never printed.
pub(crate) fn show(config: &Config) -> String {
    let mut out = Printer::default();
    out.text("ae_title", &config.ae_title);
    out.text("dicom_bind", &config.dicom_bind.to_string());
    out.value("dicom_port", config.dicom_port);
    out.text("http_bind", &config.http_bind.to_string());
    out.path("state_dir", Some(&config.state_dir));
    out.path("model", config.model.as_deref());
    if let Some(threads) = config.threads {
        out.value("threads", threads);
    }
    out.seconds("quiet_time_s", config.quiet_time);
    out.value("accept_any_called", config.accept_any_called);
    out.value("allow_demo_results", config.allow_demo_results);
    out.path("watch_folder", config.watch_folder.as_deref());
    limits(&mut out, &config.limits);
    retention(&mut out, &config.retention);
    out.section("page");
    out.path("token_file", config.page.token_file.as_deref());
    out.value("hide_patient_names", config.page.hide_patient_names);
    for (title, peer) in &config.peers {
        out.section(&format!("peers.{}", quoted(title)));
        let addresses: Vec<String> = peer.addresses.iter().map(ToString::to_string).collect();
        out.value("address", format!("{addresses:?}"));
        if let Some((host, port)) = &peer.report_to {
            out.text("report_to", &format!("{host}:{port}"));
        }
    }
    channels(&mut out, config);
    out.text
}

fn limits(out: &mut Printer, limits: &Limits) {
    out.section("limits");
    out.value("max_associations", limits.max_associations);
    out.value("max_per_address", limits.max_per_address);
    out.value("kept_for_listed", limits.kept_for_listed);
    out.seconds("request_timeout_s", limits.request_timeout);
    out.seconds("pdu_timeout_s", limits.pdu_timeout);
    out.seconds("idle_timeout_s", limits.idle_timeout);
    out.value("min_bytes_per_second", limits.min_bytes_per_second);
    out.seconds("rate_window_s", limits.rate_window);
    out.value("max_object_mib", limits.max_object_bytes >> 20);
    out.seconds("drain_timeout_s", limits.drain_timeout);
}

fn retention(out: &mut Printer, retention: &Retention) {
    out.section("retention");
    out.value("max_age_days", retention.max_age.as_secs_f64() / 86_400.0);
    out.value("keep_free_mib", retention.keep_free_bytes >> 20);
    out.value("quota_mib", retention.quota_bytes >> 20);
}

fn channels(out: &mut Printer, config: &Config) {
    if let Some(pacs) = &config.pacs {
        out.section("pacs");
        out.text("ae_title", &pacs.ae_title);
        out.text("host", &pacs.host);
        out.value("port", pacs.port);
        out.value("tls", pacs.tls);
        out.value("secondary_capture", pacs.secondary_capture);
        out.value("storage_commitment", pacs.storage_commitment);
        out.seconds("commitment_timeout_s", pacs.commitment_timeout);
    }
    if let Some(commitment) = &config.commitment {
        out.section("commitment");
        out.value("keep_days", commitment.keep.as_secs_f64() / 86_400.0);
    }
    if let Some(tls) = &config.tls {
        out.section("tls");
        out.path("certificate", Some(&tls.certificate));
        out.path("key", Some(&tls.key));
        out.path("client_ca", Some(&tls.client_ca));
    }
    if let Some(webhook) = &config.webhook {
        out.section("webhook");
        out.text("url", &webhook.url);
        out.path("secret_file", Some(&webhook.secret_file));
    }
    if let Some(hl7) = &config.hl7 {
        out.section("hl7");
        out.text("host", &hl7.host);
        out.value("port", hl7.port);
        out.value("tls", hl7.tls);
        out.text("sending_facility", &hl7.sending_facility);
        out.text("receiving_application", &hl7.receiving_application);
        out.text("receiving_facility", &hl7.receiving_facility);
    }
    if let Some(stow) = &config.stow {
        out.section("stow");
        out.text("url", &stow.url);
        out.path("token_file", stow.token_file.as_deref());
    }
}

#[derive(Default)]
struct Printer {
    text: String,
}

impl Printer {
    fn section(&mut self, name: &str) {
        self.line(format_args!("\n[{name}]"));
    }

    fn value(&mut self, key: &str, value: impl std::fmt::Display) {
        self.line(format_args!("{key} = {value}"));
    }

    fn text(&mut self, key: &str, text: &str) {
        self.value(key, quoted(text));
    }

    fn path(&mut self, key: &str, path: Option<&Path>) {
        if let Some(path) = path {
            self.text(key, &path.to_string_lossy());
        }
    }

    fn seconds(&mut self, key: &str, duration: Duration) {
        self.value(key, duration.as_secs_f64());
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        self.text.push_str(&format!("{line}\n"));
    }
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}
