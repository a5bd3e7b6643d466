//! DICOM over TLS: who shows no certificate, or a stranger's, gets nothing.

#![allow(clippy::unwrap_used, reason = "a step that fails fails its test")]

mod node;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dicom_ul::pdu::Pdu;
use node::{ECHO, IMPLICIT, Node, connect, encode, receive, request};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

fn pem(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/certificates")
        .join(name)
}

fn settings(certificate: &str) -> String {
    format!(
        "[tls]\ncertificate = {:?}\nkey = {:?}\nclient_ca = {:?}\n",
        pem(&format!("{certificate}.crt")),
        pem(&format!("{certificate}.key")),
        pem("ca.crt")
    )
}

/// What an association request over TLS gets.
fn associate(node: &Node, who: Option<&str>) -> io::Result<Option<Pdu>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut authorities = RootCertStore::empty();
    let authority = CertificateDer::from_pem_file(pem("ca.crt")).unwrap();
    authorities.add(authority).unwrap();
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(authorities);
    let config = match who {
        None => config.with_no_client_auth(),
        Some(who) => {
            let chain = CertificateDer::from_pem_file(pem(&format!("{who}.crt"))).unwrap();
            let key = PrivateKeyDer::from_pem_file(pem(&format!("{who}.key"))).unwrap();
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
    let node = Node::start(&settings("node"));
    let accepted = associate(&node, Some("peer")).unwrap();
    assert!(
        matches!(accepted, Some(Pdu::AssociationAC(_))),
        "{accepted:?}"
    );
    assert!(associate(&node, None).is_err());
    assert!(associate(&node, Some("stranger")).is_err());
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
    let node = Node::start(&settings("node"));
    node.reload(&settings("stranger"));
    let refused = associate(&node, Some("peer"));
    assert!(refused.is_err(), "the node shows a stranger's certificate");
    node.reload("[tls]\ncertificate = \"missing\"\nkey = \"missing\"\nclient_ca = \"missing\"\n");
    node.wait_for_log("configuration not reloaded");
    node.reload(&settings("node"));
    let accepted = associate(&node, Some("peer")).unwrap();
    assert!(matches!(accepted, Some(Pdu::AssociationAC(_))));
}

#[test]
fn unusable_certificate_is_a_fault_of_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("edge.toml");
    std::fs::write(&config, settings("node").replace("node.key", "ca.crt")).unwrap();
    let checked = std::process::Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(["check", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    assert_eq!(checked.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&checked.stderr).contains("[tls]"));
}
