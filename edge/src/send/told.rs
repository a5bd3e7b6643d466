//! Tests: what reaches a webhook, a STOW-RS server and an HL7 receiver, and how often.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::connection::Connection;
use super::delivered::{Node, folder, impatient, no_ways};
use super::delivery::Ways;
use super::hl7::Hl7;
use super::http;
use super::outbox::Counts;
use super::sample;
use super::stow::Stow;
use super::webhook::{Secret, Webhook};

/// One request: head and body; for MLLP the head is empty.
type Log = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// Serves one connection after another: `take` reads a request, `script` says what to write, nothing once to cut.
fn serve(
    script: Vec<String>,
    take: fn(&mut BufReader<TcpStream>) -> (String, Vec<u8>),
) -> (u16, Log) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let log: Log = Arc::default();
    let written = Arc::clone(&log);
    std::thread::spawn(move || {
        for answer in script {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            let request = take(&mut reader);
            written.lock().unwrap().push(request);
            drop(reader.get_mut().write_all(answer.as_bytes()));
        }
    });
    (port, log)
}

fn http_request(reader: &mut BufReader<TcpStream>) -> (String, Vec<u8>) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert!(reader.read_line(&mut head).unwrap() > 0);
    }
    let length = head.to_lowercase();
    let length = length.split("content-length: ").nth(1).unwrap();
    let mut body = vec![0; length.split("\r\n").next().unwrap().parse().unwrap()];
    reader.read_exact(&mut body).unwrap();
    (head, body)
}

fn mllp_message(reader: &mut BufReader<TcpStream>) -> (String, Vec<u8>) {
    let mut message = Vec::new();
    reader.read_until(0x1C, &mut message).unwrap();
    (String::new(), message)
}

fn status(line: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {line}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
}

/// Decides one positive result and waits until it is settled.
async fn tell(ways: Ways) -> Counts {
    let (_folder, database) = folder();
    let node = Node::start_with(&database, &ways);
    node.decide(&sample::positive());
    node.settled().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_gets_the_same_signed_body_until_it_takes_it() {
    let script = vec![
        status("503 Busy", ""),
        String::new(),
        status("204 No Content", ""),
    ];
    let (port, log) = serve(script, http_request);
    let webhook = Webhook {
        url: format!("http://127.0.0.1:{port}/hook"),
        secret: Secret(b"key".to_vec()),
        agent: http::agent(),
    };
    let ways = Ways {
        webhook: Some(webhook),
        ..no_ways(impatient())
    };
    assert_eq!(tell(ways).await, Counts::default());
    let log = log.lock().unwrap().clone();
    assert_eq!(log.len(), 3);
    assert!(log.iter().all(|request| *request == log[0]));
    let head = log[0].0.to_lowercase();
    assert!(head.starts_with("post /hook "));
    assert!(
        head.contains("idempotency-key: 2.25.") && head.contains("x-pe-edge-signature: sha256=")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stow_server_that_knows_not_the_class_gets_the_older_one() {
    let failed = r#"{"00081198":{"vr":"SQ","Value":[{"00081197":{"vr":"US","Value":[290]}}]}}"#;
    let script = vec![status("409 Conflict", failed), status("200 OK", "{}")];
    let (port, log) = serve(script, http_request);
    let stow = Stow {
        url: format!("http://127.0.0.1:{port}/dicom-web/"),
        token: Some(Secret(b"open\n".to_vec())),
        agent: http::agent(),
    };
    let ways = Ways {
        stow: Some(stow),
        ..no_ways(impatient())
    };
    assert_eq!(tell(ways).await, Counts::default());
    let log = log.lock().unwrap();
    for ((head, body), class) in log.iter().zip(["88.34", "88.33"]) {
        assert!(head.starts_with("POST /dicom-web/studies "), "{head}");
        assert!(
            head.to_lowercase()
                .contains("authorization: bearer open\r\n")
        );
        let body = String::from_utf8_lossy(body);
        assert!(
            body.contains("DICM") && body.contains(&format!("1.2.840.10008.5.1.4.1.1.{class}"))
        );
    }
    assert_eq!(log.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hl7_receiver_gets_the_same_message_until_it_acknowledges_it() {
    let answer = |code: &str, id: &str| format!("\u{b}MSH|^~\\&|R\rMSA|{code}|{id}\r\u{1c}\r");
    let ways_to = |port: u16| Ways {
        hl7: Some(Hl7 {
            connection: Connection {
                host: "127.0.0.1".to_owned(),
                port,
                tls: None,
            },
            sending_facility: String::new(),
            receiving_application: String::new(),
            receiving_facility: String::new(),
        }),
        ..no_ways(impatient())
    };
    let key = super::identity::document_uid(&sample::positive(), "hl7");
    let id = &key.as_str()[key.as_str().len() - 20..];
    let script = vec![String::new(), answer("AA", "another"), answer("AA", id)];
    let (port, log) = serve(script, mllp_message);
    assert_eq!(tell(ways_to(port)).await, Counts::default());
    let log = log.lock().unwrap().clone();
    assert_eq!(log.len(), 3);
    assert!(log.iter().all(|message| *message == log[0]));
    assert!(log[0].1.starts_with(b"\x0bMSH|"));

    let (port, _) = serve(vec![answer("AE", id)], mllp_message);
    assert_eq!(tell(ways_to(port)).await.dead, 1);
}
