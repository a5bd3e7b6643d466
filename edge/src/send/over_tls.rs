//! Tests: results over TLS, to a PACS and an HL7 receiver behind a door that asks for our certificate and shows its own.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::ClientConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::connection::Connection;
use super::data_set::Syntax;
use super::delivered::{Node, folder, impatient, no_ways};
use super::delivery::Ways;
use super::hl7::Hl7;
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

/// An MLLP receiver that accepts every message. Out: its port, and the messages.
async fn receiver() -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let received: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = Arc::clone(&received);
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut message = Vec::new();
            while !message.ends_with(&[0x1C, 0x0D])
                && socket.read_buf(&mut message).await.unwrap() > 0
            {}
            // A door that was not opened brings nothing.
            let message = String::from_utf8(message).unwrap();
            let Some(control_id) = message.split('|').nth(9) else {
                continue;
            };
            let answer = format!("\x0bMSH|^~\\&|RIS\rMSA|AA|{control_id}\r\x1c\r");
            log.lock().unwrap().push(message.clone());
            socket.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    (port, received)
}

/// A node whose results go as HL7 to the receiver on `port`, with the certificate of `ours`.
fn telling(pki: &Path, ours: &str, port: u16, database: &Path) -> Node {
    let hl7 = Hl7 {
        connection: connection("127.0.0.1", port, identity(pki, ours).client),
        sending_facility: "RADIOLOGY".to_owned(),
        receiving_application: "RIS".to_owned(),
        receiving_facility: "HOSPITAL".to_owned(),
    };
    let ways = Ways {
        hl7: Some(hl7),
        ..no_ways(impatient())
    };
    Node::start_with(database, &ways)
}

#[tokio::test(flavor = "multi_thread")]
async fn hl7_speaks_mutual_tls_and_says_nothing_to_a_stranger() {
    let pki = tempfile::tempdir().unwrap();
    certificates::write(pki.path());
    let (inside, received) = receiver().await;
    let (_folder, database) = folder();
    let door_of_a_stranger = door(pki.path(), "stranger", inside).await;
    let node = telling(pki.path(), "peer", door_of_a_stranger, &database);
    node.decide(&sample::positive());
    node.tried(3).await;
    assert_eq!(node.outbox.counts().unwrap().waiting, 1);
    assert!(received.lock().unwrap().is_empty());
    drop(node);

    let right_door = door(pki.path(), "node", inside).await;
    let (_folder, database) = folder();
    let node = telling(pki.path(), "peer", right_door, &database);
    node.decide(&sample::positive());
    assert_eq!(node.settled().await, Counts::default());
    let received = received.lock().unwrap();
    assert_eq!(received.len(), 1);
    assert!(received[0].contains("|ORU^R01^ORU_R01|") && received[0].contains("59282003"));
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
        .open_for(&["1.2.840.10008.1.1"], Duration::from_secs(120))
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
