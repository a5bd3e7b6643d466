//! DICOM over TLS: who shows no certificate, or a stranger's, gets nothing.

#![allow(clippy::unwrap_used, reason = "a step that fails fails its test")]

mod node;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dicom_ul::pdu::Pdu;
use node::{ECHO, IMPLICIT, Node, connect, encode, receive, request, wait_until};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

/// Certificates of a test, in a folder of its own.
struct Pki(tempfile::TempDir);

impl Pki {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        node::certificates::write(folder.path());
        Self(folder)
    }

    fn pem(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn settings(&self, who: &str) -> String {
        format!(
            "[tls]\ncertificate = {:?}\nkey = {:?}\nclient_ca = {:?}\n",
            self.pem(&format!("{who}.crt")),
            self.pem(&format!("{who}.key")),
            self.pem("ca.crt")
        )
    }
}

/// What an association request over TLS gets.
fn associate(pki: &Pki, node: &Node, who: Option<&str>) -> io::Result<Option<Pdu>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut authorities = RootCertStore::empty();
    let authority = CertificateDer::from_pem_file(pki.pem("ca.crt")).unwrap();
    authorities.add(authority).unwrap();
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(authorities);
    let config = match who {
        None => config.with_no_client_auth(),
        Some(who) => {
            let chain = CertificateDer::from_pem_file(pki.pem(&format!("{who}.crt"))).unwrap();
            let key = PrivateKeyDer::from_pem_file(pki.pem(&format!("{who}.key"))).unwrap();
            config.with_client_auth_cert(vec![chain], key).unwrap()
        }
    };
    let name = ServerName::try_from("localhost").unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = StreamOwned::new(connection, connect(node.dicom));
    stream.write_all(&encode(&request(
        "TESTER",
        "PEEDGE",
        &[(ECHO, &[IMPLICIT])],
    )))?;
    receive(&mut stream)
}

#[test]
fn only_peers_with_a_certificate_of_the_authority_are_served() {
    let pki = Pki::new();
    let node = Node::start(&pki.settings("node"));
    let accepted = associate(&pki, &node, Some("peer")).unwrap();
    assert!(
        matches!(accepted, Some(Pdu::AssociationAC(_))),
        "{accepted:?}"
    );
    assert!(associate(&pki, &node, None).is_err());
    assert!(associate(&pki, &node, Some("stranger")).is_err());
    assert!(associate(&pki, &node, Some("expired")).is_err());
    // What the operator reads says why.
    for why in ["no certificates", "bad signature", "certificate expired"] {
        let why = why.to_lowercase();
        let is_said = |line: &String| {
            let line = line.to_lowercase();
            line.contains("tls:") && (line.contains(&why) || line.contains(&why.replace(' ', "")))
        };
        wait_until(&why, || node.log().iter().any(is_said));
    }
    let mut plain = connect(node.dicom);
    plain
        .write_all(&encode(&request(
            "TESTER",
            "PEEDGE",
            &[(ECHO, &[IMPLICIT])],
        )))
        .unwrap();
    // A TLS alert or a closed connection, never an answer.
    let answered = std::panic::catch_unwind(move || receive(&mut plain));
    assert!(!matches!(answered, Ok(Ok(Some(Pdu::AssociationAC(_))))));
}

#[test]
fn certificates_are_read_again_and_faulty_ones_change_nothing() {
    let pki = Pki::new();
    let node = Node::start(&pki.settings("node"));
    node.reload(&pki.settings("stranger"));
    let refused = associate(&pki, &node, Some("peer"));
    assert!(refused.is_err(), "the node shows a stranger's certificate");
    node.reload("[tls]\ncertificate = \"missing\"\nkey = \"missing\"\nclient_ca = \"missing\"\n");
    node.wait_for_log("configuration not reloaded");
    node.reload(&pki.settings("node"));
    let accepted = associate(&pki, &node, Some("peer")).unwrap();
    assert!(matches!(accepted, Some(Pdu::AssociationAC(_))));
}

#[test]
fn unusable_certificate_is_a_fault_of_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("edge.toml");
    std::fs::write(
        &config,
        Pki::new().settings("node").replace("node.key", "ca.crt"),
    )
    .unwrap();
    let checked = std::process::Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(["check", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    assert_eq!(checked.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&checked.stderr).contains("[tls]"));
}

/// Runs `edge` with a configuration. Out: its exit code, and what it printed.
fn edge(config: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let done = std::process::Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(arguments)
        .arg("--config")
        .arg(config)
        .output()
        .unwrap();
    let printed = [done.stdout, done.stderr].concat();
    (
        done.status.code(),
        String::from_utf8_lossy(&printed).into_owned(),
    )
}

#[test]
fn studies_pings_and_the_doctor_speak_tls_with_the_node() {
    let pki = Pki::new();
    let node = Node::start(&pki.settings("node"));
    // The node's configuration with the ports that it was given.
    let text = std::fs::read_to_string(node.folder.path().join("edge.toml")).unwrap();
    let page = node.wait_for_log("\"http_address\":\"");
    let page = page.split("\"http_address\":\"").nth(1).unwrap();
    let page = page.split('"').next().unwrap();
    let port = node.dicom.port();
    let text = text
        .replace("dicom_port = 0", &format!("dicom_port = {port}"))
        .replace("127.0.0.1:0", page);
    let config = node.folder.path().join("known.toml");
    let pacs =
        format!("[pacs]\nae_title = \"PEEDGE\"\nhost = \"localhost\"\nport = {port}\ntls = true\n");
    std::fs::write(&config, format!("{text}{pacs}")).unwrap();
    let peer = format!("PEEDGE@127.0.0.1:{port}");
    assert_eq!(edge(&config, &["ping", &peer, "--tls"]).0, Some(0));
    assert_eq!(edge(&config, &["ping"]).0, Some(0), "the PACS over TLS");
    let (code, printed) = edge(&config, &["ping", &peer, "--timeout", "3"]);
    assert_eq!(code, Some(69), "plain: {printed}");
    let (_, printed) = edge(&config, &["doctor"]);
    for check in ["DICOM port", "PACS"] {
        let is_good = |line: &str| line.starts_with("ok") && line.contains(check);
        assert!(printed.lines().any(is_good), "{check} in {printed}");
    }
    // A whole study by C-STORE over mutual TLS.
    let slices = std::process::Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(["demo", "--slices", "3", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    assert_eq!(slices.status.code(), Some(0), "{slices:?}");
    assert_eq!(node.spooled().len(), 3);
    // Another's certificate is refused by the client, too.
    let text = std::fs::read_to_string(&config).unwrap();
    let wrong = text
        .replace("node.crt", "stranger.crt")
        .replace("node.key", "stranger.key");
    std::fs::write(&config, wrong).unwrap();
    let (code, printed) = edge(&config, &["ping", &peer, "--tls"]);
    assert_eq!(code, Some(69), "{printed}");
}

#[test]
fn a_peer_that_opens_tls_and_drips_is_ended() {
    let pki = Pki::new();
    let settings = format!(
        "{}[limits]\nrequest_timeout_s = 0.5\n",
        pki.settings("node")
    );
    let node = Node::start(&settings);
    let mut dripping = connect(node.dicom);
    // The head of a TLS record with a ClientHello, then a byte now and then.
    dripping.write_all(&[0x16, 3, 1, 2, 0, 1]).unwrap();
    wait_until("the end of a handshake that drips", || {
        std::thread::sleep(Duration::from_millis(20));
        dripping.write_all(&[0]).is_err()
    });
    node.wait_for_log("PDU not complete after 500ms");
    node.reload(&pki.settings("node"));
    let accepted = associate(&pki, &node, Some("peer")).unwrap();
    assert!(matches!(accepted, Some(Pdu::AssociationAC(_))));
}

#[test]
fn handshakes_that_are_never_finished_keep_nobody_out() {
    let pki = Pki::new();
    // Whoever waited for their deadline would wait for longer than the test does.
    let settings = format!(
        "{}[limits]\nrequest_timeout_s = 600\n",
        pki.settings("node")
    );
    let node = Node::start(&settings);
    let hello = [0x16, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3];
    let half_open: Vec<_> = (0..300)
        .map(|index| {
            let mut stream = connect(node.dicom);
            stream
                .write_all(&hello[..index % (hello.len() + 1)])
                .unwrap();
            stream
        })
        .collect();
    let accepted = associate(&pki, &node, Some("peer")).unwrap();
    assert!(
        matches!(accepted, Some(Pdu::AssociationAC(_))),
        "{accepted:?}"
    );
    drop(half_open);
}
