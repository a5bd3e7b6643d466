//! What the sections of the file mean: each key with its range and its default.
//!
//! In: a parsed table. Out: the [`Config`], and every fault where it stands. How keys are read is [`super::read`]'s business.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::read::Section;
use super::{
    Commitment, Config, Hl7, Limits, MAX_PEERS, Network, Pacs, Page, Peer, Retention, Stow, Tls,
    Webhook,
};

/// Reads all sections even where one has faults; `None` where something without a default is missing, with its fault kept.
pub(super) fn read_config(
    root: &mut Section<'_>,
    folder: &Path,
    state_dir: Option<PathBuf>,
) -> Option<Config> {
    let peers = read_peers(root);
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
    let page = read_page(root, folder);
    let http_bind = root.parsed("http_bind", socket_address).unwrap_or(loopback);
    if !http_bind.ip().is_loopback() && page.token_file.is_none() {
        let message = "http_bind: only loopback is served without [page] token_file";
        root.fault("http_bind", message);
    }
    let pacs = read_pacs(root);
    let tls = read_tls(root, folder);
    let hl7 = read_hl7(root);
    if tls.is_none() && pacs.as_ref().is_some_and(|pacs| pacs.tls) {
        root.fault("pacs", "[pacs] tls = true needs a section [tls]");
    }
    if tls.is_none() && hl7.as_ref().is_some_and(|hl7| hl7.tls) {
        root.fault("hl7", "[hl7] tls = true needs a section [tls]");
    }
    if let Some(pacs) = pacs.as_ref().filter(|pacs| pacs.storage_commitment)
        && !peers.is_empty()
        && !peers.contains_key(&pacs.ae_title)
    {
        let message = format!(
            "[pacs] storage_commitment needs [peers.{}] too: its reports come on associations of its own",
            pacs.ae_title
        );
        root.fault("pacs", message);
    }
    let retention = read_retention(root);
    let commitment = read_commitment(root, &retention);
    let state_dir = root.parsed("state_dir", path(folder)).or(state_dir);
    if state_dir.is_none() {
        root.fault(
            "",
            "state_dir is missing, and the environment names no home",
        );
    }
    Some(Config {
        ae_title: root
            .checked_text("ae_title", ae_title)
            .unwrap_or_else(|| "PEEDGE".to_owned()),
        dicom_bind: root
            .parsed("dicom_bind", address)
            .unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        dicom_port: root.integer("dicom_port", 0..=u16::MAX).unwrap_or(11112),
        http_bind,
        model: root.parsed("model", path(folder)),
        threads: root.integer("threads", 1..=64),
        quiet_time: seconds(root.number("quiet_time_s", 0.1..=86_400.0), 60.0),
        accept_any_called: root.flag("accept_any_called", peers.is_empty()),
        allow_demo_results: root.flag("allow_demo_results", false),
        watch_folder: root.parsed("watch_folder", path(folder)),
        peers,
        limits: read_limits(root),
        pacs,
        retention,
        commitment,
        tls,
        webhook: read_webhook(root, folder),
        hl7,
        stow: read_stow(root, folder),
        page,
        state_dir: state_dir?,
    })
}

fn read_peers(root: &mut Section<'_>) -> BTreeMap<String, Peer> {
    let mut peers = BTreeMap::new();
    for (title, _, mut section) in root.named_sections("peers") {
        if let Err(message) = ae_title(&title) {
            section.fault("", format!("[peers]: {message}"));
        }
        let addresses = section.list("address", Network::parse);
        let report_to = section.parsed("report_to", host_and_port);
        section.finish();
        let peer = Peer {
            addresses,
            report_to,
        };
        peers.insert(title, peer);
    }
    if peers.len() > MAX_PEERS {
        root.fault("peers", format!("[peers]: more than {MAX_PEERS}"));
    }
    peers
}

fn read_limits(root: &mut Section<'_>) -> Limits {
    let mut section = root.section("limits");
    let max_associations = section.integer("max_associations", 1..=256).unwrap_or(32);
    let limits = Limits {
        max_associations,
        max_per_address: section.integer("max_per_address", 1..=256).unwrap_or(16),
        kept_for_listed: section
            .integer("kept_for_listed", 0..=256)
            .unwrap_or(max_associations / 4),
        request_timeout: seconds(section.number("request_timeout_s", 0.05..=600.0), 10.0),
        pdu_timeout: seconds(section.number("pdu_timeout_s", 0.05..=600.0), 30.0),
        idle_timeout: seconds(section.number("idle_timeout_s", 0.05..=86_400.0), 300.0),
        min_bytes_per_second: section
            .integer("min_bytes_per_second", 0..=1 << 30)
            .unwrap_or(1024),
        rate_window: seconds(section.number("rate_window_s", 0.05..=600.0), 10.0),
        max_object_bytes: mib(section.integer("max_object_mib", 1..=65_536), 1024),
        drain_timeout: seconds(section.number("drain_timeout_s", 0.0..=600.0), 10.0),
    };
    if limits.kept_for_listed >= limits.max_associations && limits.kept_for_listed > 0 {
        section.fault(
            "kept_for_listed",
            format!(
                "kept_for_listed = {} leaves nothing of max_associations = {max_associations}",
                limits.kept_for_listed
            ),
        );
    }
    section.finish();
    limits
}

fn read_pacs(root: &mut Section<'_>) -> Option<Pacs> {
    let mut section = root.section("pacs");
    let title = section.checked_text("ae_title", ae_title);
    let host = section.checked_text("host", not_empty);
    let port = section.integer("port", 1..=u16::MAX);
    let tls = section.flag("tls", false);
    let secondary_capture = section.flag("secondary_capture", false);
    let storage_commitment = section.flag("storage_commitment", false);
    let commitment_timeout = section.number("commitment_timeout_s", 0.05..=604_800.0);
    section.require("ae_title");
    section.require("host");
    section.require("port");
    section.finish();
    Some(Pacs {
        ae_title: title?,
        host: host?,
        port: port?,
        tls,
        secondary_capture,
        storage_commitment,
        commitment_timeout: seconds(commitment_timeout, 3600.0),
    })
}

fn read_retention(root: &mut Section<'_>) -> Retention {
    let mut section = root.section("retention");
    let days = section.number("max_age_days", 0.001..=365.0).unwrap_or(7.0);
    let retention = Retention {
        max_age: Duration::from_secs_f64(days * 86_400.0),
        keep_free_bytes: mib(section.integer("keep_free_mib", 0..=1 << 30), 1024),
        quota_bytes: mib(section.integer("quota_mib", 1..=1 << 30), 32_768),
    };
    section.finish();
    retention
}

fn read_commitment(root: &mut Section<'_>, retention: &Retention) -> Option<Commitment> {
    let mut section = root.section("commitment");
    let days = section.number("keep_days", 0.0001..=365.0);
    section.require("keep_days");
    let keep = days.map(|days| Duration::from_secs_f64(days * 86_400.0));
    if keep.is_some_and(|keep| keep >= retention.max_age) {
        let message =
            "keep_days must be less than [retention] max_age_days: nothing is kept for longer";
        section.fault("keep_days", message);
    }
    section.finish();
    Some(Commitment { keep: keep? })
}

fn read_tls(root: &mut Section<'_>, folder: &Path) -> Option<Tls> {
    let mut section = root.section("tls");
    let certificate = section.parsed("certificate", path(folder));
    let key = section.parsed("key", path(folder));
    let client_ca = section.parsed("client_ca", path(folder));
    section.require("certificate");
    section.require("key");
    section.require("client_ca");
    section.finish();
    Some(Tls {
        certificate: certificate?,
        key: key?,
        client_ca: client_ca?,
    })
}

fn read_webhook(root: &mut Section<'_>, folder: &Path) -> Option<Webhook> {
    let mut section = root.section("webhook");
    let url = section.checked_text("url", http_url);
    let secret_file = section.parsed("secret_file", path(folder));
    section.require("url");
    section.require("secret_file");
    section.finish();
    Some(Webhook {
        url: url?,
        secret_file: secret_file?,
    })
}

fn read_hl7(root: &mut Section<'_>) -> Option<Hl7> {
    let mut section = root.section("hl7");
    let host = section.checked_text("host", not_empty);
    let port = section.integer("port", 1..=u16::MAX);
    let tls = section.flag("tls", false);
    let sending_facility = section.text("sending_facility").unwrap_or_default();
    let receiving_application = section.text("receiving_application").unwrap_or_default();
    let receiving_facility = section.text("receiving_facility").unwrap_or_default();
    section.require("host");
    section.require("port");
    section.finish();
    Some(Hl7 {
        host: host?,
        port: port?,
        tls,
        sending_facility,
        receiving_application,
        receiving_facility,
    })
}

fn read_stow(root: &mut Section<'_>, folder: &Path) -> Option<Stow> {
    let mut section = root.section("stow");
    let url = section.checked_text("url", http_url);
    let token_file = section.parsed("token_file", path(folder));
    section.require("url");
    section.finish();
    Some(Stow {
        url: url?,
        token_file,
    })
}

fn read_page(root: &mut Section<'_>, folder: &Path) -> Page {
    let mut section = root.section("page");
    let page = Page {
        token_file: section.parsed("token_file", path(folder)),
        hide_patient_names: section.flag("hide_patient_names", false),
    };
    section.finish();
    page
}

/// Whether a text can be an AE title: PS3.5 section 6.2, VR AE.
fn ae_title(text: &str) -> Result<(), String> {
    let is_character = |c: char| (c == ' ' || c.is_ascii_graphic()) && c != '\\';
    let is_title = !text.is_empty()
        && text.len() <= 16
        && text.chars().all(is_character)
        && text.trim().len() == text.len();
    if is_title {
        Ok(())
    } else {
        Err(format!(
            "`{text}` is no AE title: 1 to 16 ASCII characters, no backslash, no space at either end"
        ))
    }
}

fn not_empty(text: &str) -> Result<(), String> {
    if text.is_empty() {
        Err("is empty".to_owned())
    } else {
        Ok(())
    }
}

fn http_url(text: &str) -> Result<(), String> {
    if text.starts_with("http://") || text.starts_with("https://") {
        Ok(())
    } else {
        Err(format!("`{text}` must begin with https:// or http://"))
    }
}

fn address(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| format!("`{text}` is no address"))
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not ADDRESS:PORT such as 127.0.0.1:8080"))
}

fn host_and_port(text: &str) -> Result<(String, u16), String> {
    let wrong = || format!("`{text}` is not HOST:PORT such as 192.0.2.7:104");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = port.parse().map_err(|_| wrong())?;
    if host.is_empty() || port == 0 {
        return Err(wrong());
    }
    Ok((host.to_owned(), port))
}

fn path(folder: &Path) -> impl Fn(&str) -> Result<PathBuf, String> {
    move |text| not_empty(text).map(|()| folder.join(text))
}

fn seconds(value: Option<f64>, default: f64) -> Duration {
    Duration::from_secs_f64(value.unwrap_or(default))
}

fn mib(value: Option<u64>, default: u64) -> u64 {
    value.unwrap_or(default) << 20
}
