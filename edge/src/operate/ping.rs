//! `edge ping`: a C-ECHO to a peer (PS3.4 annex A), for people who look for a fault.
//!
//! In: a peer as `AE@HOST:PORT`. Out: how long the answer took, or what stands in the way: no connection, a rejection with its reason, no
//! answer. Over TLS with the node's own certificate, where the configuration says so or `--tls` asks for it.

use std::fmt;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use dicom_core::VR;
use dicom_dictionary_std::tags;
use rustls::ClientConfig;
use serde::Serialize;

use super::command::PingArgs;
use crate::config::{self, Config};
use crate::exit::{Exit, Failure, failure, said};
use crate::intake::classes::VERIFICATION;
use crate::intake::tls;
use crate::send::association::{Association, Proposal};
use crate::send::connection::Connection;
use crate::send::data_set::DataSet;

/// C-ECHO-RQ (PS3.7 section 9.3.5).
const ECHO_REQUEST: u16 = 0x0030;

/// A DICOM node.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PeerAddress {
    /// Its AE title.
    pub(crate) ae_title: String,
    /// Host name or address.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
    /// TLS, where it is spoken.
    #[serde(skip)]
    pub(crate) tls: Option<Arc<ClientConfig>>,
}

impl PeerAddress {
    /// Reads `AE@HOST:PORT`; an IPv6 address stands in brackets.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let wrong = || anyhow!("a peer is AE@HOST:PORT, found {text:?}");
        let (ae_title, place) = text.split_once('@').ok_or_else(wrong)?;
        let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let is_title = (1..=16).contains(&ae_title.len()) && ae_title.is_ascii();
        if !is_title || host.is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            ae_title: ae_title.to_owned(),
            host: host.to_owned(),
            port: port.parse().map_err(|_| wrong())?,
            tls: None,
        })
    }

    /// The node of a configuration, reached from this machine.
    ///
    /// # Errors
    /// `[tls]` names files that cannot be used.
    pub(crate) fn own_node(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            ae_title: config.ae_title.clone(),
            host: own_address(config).to_string(),
            port: config.dicom_port,
            tls: identity(config)?.map(|identity| identity.own),
        })
    }

    /// The PACS of a configuration.
    ///
    /// # Errors
    /// `[tls]` names files that cannot be used.
    pub(crate) fn pacs(config: &Config, pacs: &config::Pacs) -> anyhow::Result<Self> {
        let tls = match pacs.tls {
            true => identity(config)?.map(|identity| identity.client),
            false => None,
        };
        Ok(Self {
            ae_title: pacs.ae_title.clone(),
            host: pacs.host.clone(),
            port: pacs.port,
            tls,
        })
    }

    /// Connects and asks for an association for one SOP class.
    ///
    /// # Errors
    /// No connection, or no association.
    pub(crate) async fn open(
        &self,
        calling: &str,
        sop_class_uid: &str,
        deadline: Duration,
    ) -> anyhow::Result<Association> {
        let connection = Connection {
            host: self.host.clone(),
            port: self.port,
            tls: self.tls.clone(),
        };
        let stream = connection.open(deadline).await.context("no connection")?;
        let proposal = Proposal {
            calling,
            called: &self.ae_title,
            sop_classes: &[sop_class_uid],
            is_provider: false,
        };
        Ok(Association::request(stream, &proposal, deadline).await?)
    }
}

/// The address under which this machine reaches its own node, and which the node then sees.
fn own_address(config: &Config) -> IpAddr {
    match config.dicom_bind {
        bind if !bind.is_unspecified() => bind,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

/// The AE title by which this machine calls its own node: `unlisted` where nobody is listed, else the first peer that may come from here.
///
/// # Errors
/// No listed peer may.
pub(crate) fn calling_here<'a>(config: &'a Config, unlisted: &'a str) -> anyhow::Result<&'a str> {
    let own = own_address(config);
    let is_here = |peer: &config::Peer| {
        peer.addresses.is_empty() || peer.addresses.iter().any(|network| network.contains(own))
    };
    match config.peers.iter().find(|(_, peer)| is_here(peer)) {
        Some((title, _)) => Ok(title),
        None if config.peers.is_empty() => Ok(unlisted),
        None => Err(anyhow!(
            "peers are listed, and none that may come from this machine: add [peers.{unlisted}] with address = \"{own}\""
        )),
    }
}

/// The certificate and the authorities of `[tls]`, where there is such a section.
fn identity(config: &Config) -> anyhow::Result<Option<tls::Identity>> {
    let identity = config.tls.as_ref().map(tls::load);
    identity.transpose().context("[tls]")
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}:{}", self.ae_title, self.host, self.port)
    }
}

/// Sends a C-ECHO. The time from the connection to the answer.
///
/// # Errors
/// No connection, no association, no answer, or a status other than success.
pub(crate) async fn echo(
    peer: &PeerAddress,
    calling: &str,
    deadline: Duration,
) -> anyhow::Result<Duration> {
    let start = Instant::now();
    let mut association = peer.open(calling, VERIFICATION, deadline).await?;
    let mut command = DataSet::default();
    command
        .text(tags::AFFECTED_SOP_CLASS_UID, VR::UI, VERIFICATION)
        .u16(tags::COMMAND_FIELD, ECHO_REQUEST);
    let answer = association
        .ask(VERIFICATION, command, None, deadline)
        .await?;
    let elapsed = start.elapsed();
    association.release().await;
    match answer.command.number(tags::STATUS) {
        Some(0) => Ok(elapsed),
        Some(status) => Err(anyhow!("C-ECHO answered with status {status:04X}")),
        None => Err(anyhow!("C-ECHO answered without a status")),
    }
}

/// What `edge ping --json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    peer: &'a PeerAddress,
    calling: &'a str,
    answered: bool,
    micros: Option<u64>,
    error: Option<String>,
}

/// `edge ping`.
///
/// # Errors
/// `Configuration` for faults of the file or where it names no PACS; `Unavailable` where the peer does not answer.
pub(crate) fn run(arguments: &PingArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let config = Config::load(arguments.config.config.as_deref());
    let config = config.map_err(failure(Exit::Configuration))?;
    let peer = match (&arguments.peer, &config.pacs) {
        (Some(text), _) => {
            let peer = PeerAddress::parse(text).map_err(failure(Exit::Usage))?;
            let tls = if arguments.tls {
                let identity = identity(&config).map_err(failure(Exit::Configuration))?;
                let missing = || anyhow!("--tls needs a section [tls] in the configuration");
                let identity = identity.ok_or_else(missing);
                Some(identity.map_err(failure(Exit::Configuration))?.client)
            } else {
                None
            };
            PeerAddress { tls, ..peer }
        }
        (None, Some(pacs)) => {
            PeerAddress::pacs(&config, pacs).map_err(failure(Exit::Configuration))?
        }
        (None, None) => {
            let error = anyhow!("no peer given, and the configuration names no PACS");
            return Err(failure(Exit::Configuration)(error));
        }
    };
    let calling = arguments.calling.as_deref().unwrap_or(&config.ae_title);
    let deadline = Duration::from_secs(arguments.timeout);
    let answer = block_on(echo(&peer, calling, deadline))?;
    let exit = if answer.is_ok() {
        Exit::Ok
    } else {
        Exit::Unavailable
    };
    let written = if arguments.output.json {
        let report = Report {
            peer: &peer,
            calling,
            answered: answer.is_ok(),
            micros: answer
                .as_ref()
                .ok()
                .and_then(|time| u64::try_from(time.as_micros()).ok()),
            error: answer.as_ref().err().map(said),
        };
        let text = serde_json::to_string(&report).map_err(failure(Exit::CannotWrite))?;
        writeln!(out, "{text}")
    } else {
        match &answer {
            Ok(time) => writeln!(out, "{peer} answers in {:.1} ms", time.as_secs_f64() * 1e3),
            Err(error) => writeln!(out, "{peer}: {}", said(error)),
        }
    };
    written
        .and_then(|()| out.flush())
        .map_err(failure(Exit::CannotWrite))?;
    Ok(exit)
}

/// Runs one task on a runtime of its own.
///
/// # Errors
/// `Unavailable` where the system refuses a runtime.
pub(crate) fn block_on<T>(task: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    Ok(runtime.map_err(failure(Exit::Unavailable))?.block_on(task))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_peer_is_read_from_its_text() {
        let peer = PeerAddress::parse("PACS@[::1]:104").unwrap();
        assert_eq!(
            (peer.ae_title.as_str(), peer.host.as_str(), peer.port),
            ("PACS", "::1", 104)
        );
        for wrong in [
            "",
            "PACS",
            "PACS@host",
            "@host:104",
            "PACS@:104",
            "PACS@host:x",
            "SEVENTEENLETTERSX@h:1",
        ] {
            assert!(PeerAddress::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn this_machine_calls_as_a_peer_that_may_come_from_it() {
        let calls = |peers: &str| {
            let config = Config::parse(peers, Path::new(""), Some("/state".into())).unwrap();
            calling_here(&config, "SELF")
                .map(str::to_owned)
                .map_err(|error| error.to_string())
        };
        let console = "[peers.CT1]\naddress = \"192.0.2.7\"\n";
        assert_eq!(calls(""), Ok("SELF".to_owned()));
        assert_eq!(calls("[peers.CT1]"), Ok("CT1".to_owned()));
        let both = format!("{console}[peers.DOOR]\naddress = \"127.0.0.0/8\"");
        assert_eq!(calls(&both), Ok("DOOR".to_owned()));
        let advice = calls(console).unwrap_err();
        assert!(
            advice.contains("[peers.SELF] with address = \"127.0.0.1\""),
            "{advice}"
        );
    }

    #[test]
    fn nobody_there_is_an_error_and_not_a_wait() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = PeerAddress::parse("X@127.0.0.1:1").unwrap();
        peer.port = listener.local_addr().unwrap().port();
        // A listener that never speaks.
        let silent = block_on(echo(&peer, "ME", Duration::from_millis(200))).unwrap();
        assert!(silent.is_err());
        drop(listener);
        let gone = block_on(echo(&peer, "ME", Duration::from_secs(20))).unwrap();
        assert!(gone.is_err());
    }
}
