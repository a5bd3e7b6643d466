//! `edge status`: asks the running node over HTTP, as the page does.
//!
//! In: the configuration, for the address and the token. Out: the node's [`Status`], as JSON or as lines.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};

use super::command::StatusArgs;
use super::status::Status;
use crate::config::Config;
use crate::exit::{Exit, Failure, failure};
use crate::page::system_view::{bytes, duration};

/// How long the node may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longest answer.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// `edge status`.
///
/// # Errors
/// `Configuration` for faults of the file, `Unavailable` where no node answers.
pub(crate) fn run(arguments: &StatusArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let config = Config::load(arguments.config.config.as_deref());
    let config = config.map_err(failure(Exit::Configuration))?;
    let status = ask(&config)
        .with_context(|| format!("no node answers on http://{}", reachable(config.http_bind)))
        .map_err(failure(Exit::Unavailable))?;
    let written = if arguments.output.json {
        serde_json::to_string(&status)
            .map_err(Into::into)
            .and_then(|text| writeln!(out, "{text}"))
    } else {
        lines(&status, out)
    };
    written.map_err(failure(Exit::CannotWrite))?;
    Ok(match status.state.as_str() {
        "ready" => Exit::Ok,
        _ => Exit::FailedCheck,
    })
}

/// The status of the node that this configuration describes.
///
/// # Errors
/// Nothing answers, or something else does.
pub(crate) fn ask(config: &Config) -> anyhow::Result<Status> {
    let settings = crate::page::node::settings(config)?;
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(DEADLINE))
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into();
    let address = format!("http://{}/api/status", reachable(config.http_bind));
    let mut request = agent.get(&address);
    if let Some(token) = settings.token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    let mut answer = request.call()?;
    if answer.status() != 200 {
        bail!("{address} answers {}", answer.status());
    }
    let text = answer
        .body_mut()
        .with_config()
        .limit(MAX_ANSWER_BYTES)
        .read_to_vec()?;
    serde_json::from_slice(&text).context("the answer is no status")
}

/// An address that is bound everywhere is reached on loopback.
pub(crate) fn reachable(bind: SocketAddr) -> SocketAddr {
    let address = match bind.ip() {
        IpAddr::V4(address) if address.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(address) if address.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        address => address,
    };
    SocketAddr::new(address, bind.port())
}

fn lines(status: &Status, out: &mut impl Write) -> std::io::Result<()> {
    writeln!(
        out,
        "{}  {} port {}, up {}",
        status.state,
        status.ae_title,
        status.dicom_port,
        duration(status.uptime_s)
    )?;
    for problem in &status.problems {
        writeln!(out, "  ! {problem}")?;
    }
    writeln!(
        out,
        "model      {} (self-test: {})",
        status.model, status.self_test
    )?;
    writeln!(
        out,
        "received   {} objects since the start, {} waiting",
        status.received, status.waiting
    )?;
    writeln!(
        out,
        "slices     {} analysed, {} not analysed since the start",
        status.analysed, status.not_analysed
    )?;
    writeln!(
        out,
        "studies    {}, {} suspected",
        status.studies, status.positive_studies
    )?;
    writeln!(
        out,
        "results    {} waiting, {} given up",
        status.outbox_waiting, status.dead_letters
    )?;
    writeln!(
        out,
        "disk       {} free of {}",
        bytes(status.disk_free_bytes),
        bytes(status.disk_total_bytes)
    )?;
    if let Some(celsius) = status.temperature_celsius {
        writeln!(out, "processor  {celsius:.0} °C")?;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_bound_everywhere_is_reached_on_loopback() {
        let reached = |bind: &str| reachable(bind.parse().unwrap()).to_string();
        assert_eq!(reached("0.0.0.0:8080"), "127.0.0.1:8080");
        assert_eq!(reached("[::]:8080"), "[::1]:8080");
        assert_eq!(reached("10.1.2.3:80"), "10.1.2.3:80");
    }

    #[test]
    fn problems_are_printed_first() {
        let status = Status {
            state: "degraded".into(),
            problems: vec!["the clock is not set".into()],
            ..Status::default()
        };
        let mut text = Vec::new();
        lines(&status, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let place = |part: &str| text.find(part).unwrap();
        assert!(place("degraded") < place("clock") && place("clock") < place("model"));
    }
}
