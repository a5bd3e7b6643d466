//! Tests: results over TLS, to a PACS and an HL7 receiver behind a door that asks for our certificate and shows its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::connection::Connection;
use super::data_set::Syntax;
use super::delivered::{Node, folder, impatient, no_ways};
use super::delivery::Ways;
use super::outbox::Counts;
use super::sample;
use super::scripted_pacs::ScriptedPacs;
use super::structured_report::Class;
use crate::config::Tls;
use crate::intake::tls::{Identity, load};

#[path = "../../tests/node/certificates.rs"]
mod certificates;

fn identity(folder: &Path, who: &str) -> Identity {
    let settings = Tls {
        certificate: folder.join(format!("{who}.crt")),
        key: folder.join(format!("{who}.key")),
        client_ca: folder.join("ca.crt"),
    };
    load(&settings).unwrap()
}

/// Takes TLS as `who` and passes on what is inside. Out: its port.
async fn door(folder: &Path, who: &str, to: u16) -> u16 {
    let acceptor = TlsAcceptor::from(identity(folder, who).server);
    let listener = TcpListener::bind(("0.0.0.0", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut inside = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                if let Ok(mut outside) = acceptor.accept(socket).await {
                    drop(tokio::io::copy_bidirectional(&mut outside, &mut inside).await);
                }
            });
        }
    });
    port
}

fn connection(host: &str, port: u16, tls: Arc<ClientConfig>) -> Connection {
    Connection {
        host: host.to_owned(),
        port,
        tls: Some(tls),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_reaches_a_pacs_over_mutual_tls() {
    let pki = tempfile::tempdir().unwrap();
    certificates::write(pki.path());
    const CLASSES: &[&str] = &[Class::Comprehensive3D.uid()];
    let pacs = ScriptedPacs::start(CLASSES, Syntax::Explicit, &[]).await;
    let mut address = pacs.address();
    let port = door(pki.path(), "node", address.connection.port).await;
    address.connection = connection("127.0.0.1", port, identity(pki.path(), "peer").client);
    let (_folder, database) = folder();
    let ways = Ways {
        pacs: Some(address),
        ..no_ways(impatient())
    };
    let node = Node::start_with(&database, &ways);
    node.decide(&sample::positive());
    assert_eq!(node.settled().await, Counts::default());
    assert_eq!(pacs.requests().len(), 1);
}

/// What stands in the way of an association with a PACS that shows the certificate of `theirs`, asked for by `ours` under `host`.
async fn refusal(theirs: &str, ours: &str, host: &str) -> String {
    let pki = tempfile::tempdir().unwrap();
    certificates::write(pki.path());
    let pacs = ScriptedPacs::start(&["1.2.840.10008.1.1"], Syntax::Explicit, &[]).await;
    let mut address = pacs.address();
    let port = door(pki.path(), theirs, address.connection.port).await;
    address.connection = connection(host, port, identity(pki.path(), ours).client);
    let opened = address
        .open_for(&["1.2.840.10008.1.1"], Duration::from_secs(20))
        .await;
    opened.map_or_else(|error| error.to_string(), |_| String::new())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_the_wrong_authority_name_or_time_is_refused_with_the_reason() {
    for (theirs, ours, host, why) in [
        ("node", "peer", "127.0.0.1", ""),
        ("stranger", "peer", "127.0.0.1", "invalid peer certificate"),
        ("expired", "peer", "127.0.0.1", "expired"),
        ("node", "peer", "127.0.0.2", "not valid for name"),
        ("node", "stranger", "127.0.0.1", "alert"),
        ("node", "expired", "127.0.0.1", "alert"),
    ] {
        let said = refusal(theirs, ours, host).await;
        let is_said = said.contains(why) && said.is_empty() == why.is_empty();
        assert!(is_said, "{theirs} to {ours} as {host}: {said}");
    }
}
