//! How associations are answered, bounded and ended: each rule against a running node.

#![allow(clippy::unwrap_used, reason = "a step that fails fails its test")]

mod node;

use std::io::{Read, Write};
use std::time::Duration;

use dicom_ul::pdu::{
    AssociationRJ, AssociationRJResult, AssociationRJServiceProviderPresentationReason,
    AssociationRJServiceUserReason, AssociationRJSource, AssociationRQ, PDataValue, PDataValueType,
    Pdu, PresentationContextResultReason, UserVariableItem,
};
use node::{
    CT, Client, ECHO, EXPLICIT, IMPLICIT, JPEG_BASELINE, JPEG_LOSSLESS, Node, RLE, connect,
    data_set, encode, receive, request, value, wait_until,
};

const SR: &str = "1.2.840.10008.5.1.4.1.1.88.67";

fn permanent(reason: AssociationRJServiceUserReason) -> Option<AssociationRJ> {
    Some(AssociationRJ {
        result: AssociationRJResult::Permanent,
        source: AssociationRJSource::ServiceUser(reason),
    })
}

fn limit() -> Option<AssociationRJ> {
    Some(AssociationRJ {
        result: AssociationRJResult::Transient,
        source: AssociationRJSource::ServiceProviderPresentation(
            AssociationRJServiceProviderPresentationReason::LocalLimitExceeded,
        ),
    })
}

/// The rejection that an attempt gets, `None` where it is accepted.
fn rejection(node: &Node, calling: &str, called: &str) -> Option<AssociationRJ> {
    Client::open_as(node.dicom, calling, called, &[(ECHO, &[IMPLICIT])])
        .map(Client::release)
        .err()
}

/// Waits until the node ends a connection. Out: whether it said so by an A-ABORT.
fn ended(stream: &mut std::net::TcpStream) -> bool {
    match receive(stream).unwrap() {
        Some(Pdu::AbortRQ { .. }) => {
            assert_eq!(receive(stream).unwrap(), None);
            true
        }
        None => false,
        other => panic!("{other:?}"),
    }
}

#[test]
fn object_is_stored_whole_with_what_was_negotiated() {
    let node = Node::start("");
    let mut client = Client::open(node.dicom, &[(CT, &[EXPLICIT]), (SR, &[EXPLICIT])]).unwrap();
    let slice = data_set(CT, "1.2.3", 600_000);
    assert_eq!(client.store(1, CT, "1.2.3", &slice).unwrap(), 0);
    let report = data_set(SR, "1.2.4", 10);
    assert_eq!(client.store(3, SR, "1.2.4", &report).unwrap(), 0);
    client.release();
    let (status, folder) = node.stop();
    assert_eq!(status.code(), Some(0));
    let objects = node::spooled(folder.path());
    let named: Vec<&str> = objects
        .iter()
        .map(|object| object.sop_instance.as_str())
        .collect();
    assert_eq!(named, ["1.2.3", "1.2.4"]);
    assert_eq!(objects[0].calling_ae, "TESTER");
    assert_eq!(objects[0].transfer_syntax, EXPLICIT);
    assert!(objects[0].file.ends_with(&slice));
    assert_eq!(&objects[0].file[128..132], b"DICM");
}

#[test]
fn contexts_are_answered_by_class_then_by_syntax() {
    let node = Node::start("");
    let unknown = "1.2.840.10008.5.1.4.1.1.481.3";
    let contexts: [node::Proposed<'_>; 6] = [
        (CT, &[JPEG_BASELINE, RLE, IMPLICIT, EXPLICIT]),
        (CT, &[JPEG_BASELINE, RLE, IMPLICIT]),
        (CT, &[JPEG_BASELINE, JPEG_LOSSLESS]),
        (CT, &[JPEG_BASELINE]),
        (CT, &["1.2.840.10008.1.2.4.100"]),
        (unknown, &[EXPLICIT]),
    ];
    let client = Client::open(node.dicom, &contexts).unwrap();
    let answers: Vec<_> = client
        .answer
        .presentation_contexts
        .iter()
        .map(|context| (context.reason.clone(), context.transfer_syntax.as_str()))
        .collect();
    use PresentationContextResultReason as Reason;
    assert_eq!(
        answers,
        [
            (Reason::Acceptance, EXPLICIT),
            (Reason::Acceptance, IMPLICIT),
            (Reason::Acceptance, JPEG_LOSSLESS),
            (Reason::Acceptance, JPEG_BASELINE),
            (Reason::TransferSyntaxesNotSupported, IMPLICIT),
            (Reason::AbstractSyntaxNotSupported, IMPLICIT),
        ]
    );
    let offered = UserVariableItem::MaxLength(131_072);
    assert!(client.answer.user_variables.contains(&offered));
    client.release();
}

#[test]
fn unlisted_peers_are_refused_once_one_is_listed() {
    let node = Node::start(
        "[peers.CT1]\naddress = [\"127.0.0.0/8\"]\n[peers.CT2]\naddress = \"192.0.2.1\"\n[peers.CT3]\n",
    );
    use AssociationRJServiceUserReason as Reason;
    assert_eq!(rejection(&node, "CT1", "PEEDGE"), None);
    assert_eq!(rejection(&node, "CT3", "PEEDGE"), None);
    let calling = permanent(Reason::CallingAETitleNotRecognized);
    assert_eq!(rejection(&node, "CT4", "PEEDGE"), calling);
    assert_eq!(rejection(&node, "CT2", "PEEDGE"), calling, "wrong address");
    let called = permanent(Reason::CalledAETitleNotRecognized);
    assert_eq!(rejection(&node, "CT1", "OTHER"), called);
    // A reload counts for the next association.
    node.reload("[peers.CT4]\n");
    assert_eq!(rejection(&node, "CT4", "PEEDGE"), None);
    assert_eq!(rejection(&node, "CT1", "PEEDGE"), calling);
}

#[test]
fn wrong_protocol_version_and_context_name_are_rejected() {
    let node = Node::start("");
    let mut answers = Vec::new();
    for change in [
        |request: &mut AssociationRQ| request.protocol_version = 2,
        |request: &mut AssociationRQ| request.application_context_name = "1.2.3".to_owned(),
    ] {
        let Pdu::AssociationRQ(mut asked) = request("T", "PEEDGE", &[(CT, &[EXPLICIT])]) else {
            unreachable!()
        };
        change(&mut asked);
        let mut stream = connect(node.dicom);
        let bytes = encode(&Pdu::AssociationRQ(asked));
        stream.write_all(&bytes).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        answers.push(answer);
    }
    // Result, source, reason are the last three bytes.
    assert_eq!(answers[0], [3, 0, 0, 0, 0, 4, 0, 1, 2, 2]);
    assert_eq!(answers[1], [3, 0, 0, 0, 0, 4, 0, 1, 1, 2]);
}

#[test]
fn commands_that_a_class_does_not_have_are_declined() {
    let node = Node::start("");
    let contexts: [node::Proposed<'_>; 2] = [(CT, &[EXPLICIT]), (ECHO, &[IMPLICIT])];
    let mut client = Client::open(node.dicom, &contexts).unwrap();
    let echo_on_storage = client.echo(1).unwrap();
    assert_eq!(echo_on_storage, 0x0211);
    let slice = data_set(CT, "1.2.3", 100);
    assert_eq!(client.store(3, CT, "1.2.3", &slice).unwrap(), 0x0122);
    // C-FIND, with an identifier that is taken off the wire.
    let find = node::command(&[
        (0x0100, 0x0020_u16.to_le_bytes().to_vec()),
        (0x0110, 7_u16.to_le_bytes().to_vec()),
        (0x0800, 1_u16.to_le_bytes().to_vec()),
    ]);
    let find = value(1, PDataValueType::Command, true, &find);
    client.stream.write_all(&find).unwrap();
    client.data(1, &slice).unwrap();
    assert_eq!(client.status().unwrap(), 0x0211);
    assert_eq!(client.store(1, CT, "1.2.3", &slice).unwrap(), 0);
    client.release();
}

#[test]
fn unconfigured_node_takes_any_peer_and_any_called_title() {
    let node = Node::start("");
    assert_eq!(rejection(&node, "X", "ANY-SCP"), None);
}

#[test]
fn faulty_reload_changes_nothing() {
    let node = Node::start("");
    node.reload("colour = 3\n");
    let line = node.wait_for_log("configuration not reloaded");
    assert!(line.contains("unknown key `colour`"), "{line}");
    assert!(node.is_alive());
}

#[test]
fn associations_are_capped_and_places_come_back() {
    let contexts: &[node::Proposed<'_>] = &[(ECHO, &[IMPLICIT])];
    let node = Node::start("[limits]\nmax_associations = 2\nkept_for_listed = 0\n");
    let first = Client::open(node.dicom, contexts).unwrap();
    let second = Client::open(node.dicom, contexts).unwrap();
    assert_eq!(rejection(&node, "TESTER", "PEEDGE"), limit());
    first.release();
    // The place is free when the node has seen the close, a moment after we have.
    wait_until("the place is free", || {
        rejection(&node, "TESTER", "PEEDGE").is_none()
    });
    second.release();
    let node = Node::start("[limits]\nmax_per_address = 1\n");
    let first = Client::open(node.dicom, contexts).unwrap();
    assert_eq!(rejection(&node, "TESTER", "PEEDGE"), limit());
    first.release();
}

#[test]
fn last_places_are_kept_for_listed_peers_that_have_none() {
    let node = Node::start(
        "[limits]\nmax_associations = 3\nkept_for_listed = 1\n[peers.CT1]\n[peers.CT2]\n",
    );
    let contexts: &[node::Proposed<'_>] = &[(ECHO, &[IMPLICIT])];
    let open = |title| Client::open_as(node.dicom, title, "PEEDGE", contexts);
    let held = [open("CT1").unwrap(), open("CT1").unwrap()];
    assert_eq!(rejection(&node, "CT1", "PEEDGE"), limit());
    assert_eq!(rejection(&node, "CT2", "PEEDGE"), None);
    for client in held {
        client.release();
    }
}

#[test]
fn statuses_say_what_is_wrong_and_the_association_goes_on() {
    let node = Node::start("[limits]\nmax_object_mib = 1\n");
    let mut client = Client::open(node.dicom, &[(CT, &[EXPLICIT]), (SR, &[EXPLICIT])]).unwrap();
    let slice = data_set(CT, "1.2.3", 1000);
    let mut store = |context, class: &str, instance: &str, data: &[u8]| {
        client.store(context, class, instance, data).unwrap()
    };
    assert_eq!(
        store(1, SR, "1.2.3", &slice),
        0xa900,
        "class of another context"
    );
    assert_eq!(store(1, CT, "1.2.9", &slice), 0xa900, "another instance");
    assert_eq!(
        store(3, SR, "1.2.3", &slice),
        0xa900,
        "class of another object"
    );
    assert_eq!(store(1, CT, "1.2.3", b"no data set at all"), 0xc000);
    assert_eq!(store(1, CT, "1.2.3", b""), 0xc000);
    assert_eq!(store(1, CT, "no UID", &slice), 0xc000);
    let large = data_set(CT, "1.2.5", 1 << 20);
    assert_eq!(store(1, CT, "1.2.5", &large), 0x0124, "larger than allowed");
    assert_eq!(store(1, CT, "1.2.3", &slice), 0);
    client.release();
    let stored: Vec<String> = node
        .spooled()
        .into_iter()
        .map(|object| object.sop_instance)
        .collect();
    assert_eq!(stored, ["1.2.3"]);
}

#[test]
fn quota_refuses_with_a700_and_recovers_without_a_restart() {
    let node = Node::start("[retention]\nquota_mib = 1\n");
    let mut client = Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    let mut store = |instance: &str| {
        let slice = data_set(CT, instance, 700_000);
        client.store(1, CT, instance, &slice).unwrap()
    };
    assert_eq!(store("1.2.1"), 0);
    assert_eq!(store("1.2.2"), 0, "the quota is reached with this one");
    assert_eq!(store("1.2.3"), 0xa700);
    node.reload("[retention]\nquota_mib = 100\n");
    assert_eq!(store("1.2.3"), 0, "the same association goes on");
    node.reload("[retention]\nkeep_free_mib = 1000000000\n");
    // The free space is looked up a few times a second.
    wait_until("the disk is too full", || store("1.2.4") == 0xa700);
    client.release();
    assert!(node.is_alive());
}

#[test]
fn commands_and_values_may_be_cut_and_joined_anywhere() {
    let node = Node::start("");
    let mut client = Client::open(node.dicom, &[(CT, &[EXPLICIT]), (ECHO, &[IMPLICIT])]).unwrap();
    let slice = data_set(CT, "1.2.3", 5000);
    let mut whole = Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    whole.max_pdu = 131_072;
    let large = data_set(CT, "1.2.4", 300_000);
    assert_eq!(whole.store(1, CT, "1.2.4", &large).unwrap(), 0);
    whole.release();
    let command = node::command(&[
        (0x0002, format!("{CT}\0").into_bytes()),
        (0x0100, 1_u16.to_le_bytes().to_vec()),
        (0x0110, 5_u16.to_le_bytes().to_vec()),
        (0x0800, 0_u16.to_le_bytes().to_vec()),
        (0x1000, b"1.2.3\0".to_vec()),
    ]);
    let part = |kind, is_last, data: &[u8]| PDataValue {
        presentation_context_id: 1,
        value_type: kind,
        is_last,
        data: data.to_vec(),
    };
    use PDataValueType::{Command, Data};
    let bytes = encode(&Pdu::PData {
        data: vec![
            part(Command, false, &command[..11]),
            part(Command, true, &command[11..]),
            part(Data, false, &slice[..3]),
            part(Data, false, b""),
            part(Data, false, &slice[3..4000]),
        ],
    });
    for byte in bytes {
        client.stream.write_all(&[byte]).unwrap();
    }
    let rest = value(1, Data, true, &slice[4000..]);
    client.stream.write_all(&rest).unwrap();
    assert_eq!(client.status().unwrap(), 0);
    assert_eq!(client.echo(3).unwrap(), 0);
    client.release();
    let objects = node.spooled();
    assert!(objects[0].file.ends_with(&large));
    assert!(objects[1].file.ends_with(&slice));
}

#[test]
fn large_proposal_is_accepted() {
    let node = Node::start("");
    let syntaxes: Vec<String> = (0..39)
        .map(|index| format!("1.2.840.10008.1.2.4.{}", 1000 + index))
        .collect();
    let mut syntaxes: Vec<&str> = syntaxes.iter().map(String::as_str).collect();
    syntaxes.push(EXPLICIT);
    let contexts = vec![(CT, syntaxes.as_slice()); 128];
    let client = Client::open(node.dicom, &contexts).unwrap();
    assert_eq!(client.answer.presentation_contexts.len(), 128);
    assert!(
        client
            .answer
            .presentation_contexts
            .iter()
            .all(|context| context.transfer_syntax == EXPLICIT)
    );
    client.release();
}

#[test]
fn what_is_no_dicom_is_aborted() {
    let node = Node::start("");
    let mut web = connect(node.dicom);
    web.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert!(ended(&mut web));
    let mut early = connect(node.dicom);
    early.write_all(&encode(&Pdu::ReleaseRQ)).unwrap();
    assert!(ended(&mut early));
    let mut broken = connect(node.dicom);
    let mut bytes = encode(&request("T", "PEEDGE", &[(CT, &[EXPLICIT])]));
    // The length of the first item.
    bytes[76] = 0xff;
    broken.write_all(&bytes).unwrap();
    assert!(ended(&mut broken));
    assert!(node.is_alive());
}

#[test]
fn breach_of_the_protocol_is_aborted_and_stores_nothing() {
    let node = Node::start("");
    let open = || Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    let breach = |mut client: Client, bytes: &[u8]| {
        client.stream.write_all(bytes).unwrap();
        assert!(ended(&mut client.stream));
    };
    breach(open(), &value(7, PDataValueType::Command, true, b""));
    breach(open(), &value(1, PDataValueType::Data, true, b"x"));
    breach(
        open(),
        &value(1, PDataValueType::Command, true, b"\x08\0\0\0\0\0\0\0"),
    );
    breach(open(), &[4, 0, 0, 0, 0, 6, 0, 0, 0, 99, 1, 3]);
    breach(open(), &[4, 0, 0, 2, 0, 1]);
    let mut client = open();
    client.store_command(1, CT, "1.2.3").unwrap();
    breach(client, &value(1, PDataValueType::Command, true, b""));
    let mut leaves = open();
    leaves.store_command(1, CT, "1.2.3").unwrap();
    let part = value(1, PDataValueType::Data, false, &data_set(CT, "1.2.3", 100));
    leaves.stream.write_all(&part).unwrap();
    drop(leaves);
    assert!(node.is_alive());
    assert_eq!(node.spooled(), []);
}

/// A node with one short deadline, so that no other ends what a test that is held up itself does.
fn with_limit(limit: &str) -> Node {
    Node::start(&format!("[limits]\n{limit}\n"))
}

#[test]
fn deadlines_end_the_request_the_pdu_the_idle_and_the_slow() {
    let node = with_limit("request_timeout_s = 0.4");
    assert!(ended(&mut connect(node.dicom)), "no request");
    node.wait_for_log("nothing came for 400ms");
    let request = encode(&request("T", "PEEDGE", &[(CT, &[EXPLICIT])]));
    wait_until("the end of a request that drips", || {
        let mut dripping = connect(node.dicom);
        for byte in &request {
            if dripping.write_all(&[*byte]).is_err() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let log = node.log().join("\n");
        log.contains("PDU not complete after 400ms")
    });

    let open = |node: &Node| Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    let node = with_limit("idle_timeout_s = 0.5");
    assert!(ended(&mut open(&node).stream), "idle");
    node.wait_for_log("nothing came for 500ms");

    let node = with_limit("pdu_timeout_s = 0.6");
    let mut unfinished = open(&node);
    unfinished.stream.write_all(&[4, 0, 0, 0]).unwrap();
    assert!(ended(&mut unfinished.stream), "half a PDU");
    node.wait_for_log("PDU not complete after 600ms");

    // Whole PDUs, each in time, and yet too slow.
    let node = with_limit("rate_window_s = 0.3\nmin_bytes_per_second = 10000");
    let mut slow = open(&node);
    slow.store_command(1, CT, "1.2.3").unwrap();
    let part = value(1, PDataValueType::Data, false, b"\x08\0\x05\0CS\x02\0x ");
    wait_until("the end of a sender that is too slow", || {
        std::thread::sleep(Duration::from_millis(50));
        slow.stream.write_all(&part).is_err()
    });
    node.wait_for_log("less than 10000 bytes a second");
    assert_eq!(node.spooled(), []);
}

#[test]
fn echo_is_answered_while_300_connections_drip() {
    let node = Node::start("[peers.TESTER]\n");
    let request = encode(&request("TESTER", "PEEDGE", &[(CT, &[EXPLICIT])]));
    let mut dripping: Vec<_> = (0..300).map(|_| connect(node.dicom)).collect();
    for byte in &request[..3] {
        for stream in &mut dripping {
            stream.write_all(&[*byte]).unwrap();
        }
        assert!(node.is_alive());
    }
}

#[test]
fn stop_finishes_the_message_under_way_and_answers_it() {
    let node = Node::start("");
    let mut idle = Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    let mut sending = Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    let slice = data_set(CT, "1.2.3", 100_000);
    sending.store_command(1, CT, "1.2.3").unwrap();
    let (first, rest) = slice.split_at(50_000);
    for part in first.chunks(10_000) {
        let part = value(1, PDataValueType::Data, false, part);
        sending.stream.write_all(&part).unwrap();
    }
    // The message is under way when the node has read some of it.
    node.wait_until_read(&sending.stream);
    node.signal(rustix::process::Signal::TERM);
    node.wait_for_log("\"stopping\"");
    assert!(ended(&mut idle.stream));
    sending.data(1, rest).unwrap();
    assert_eq!(sending.status().unwrap(), 0);
    assert!(ended(&mut sending.stream));
    let mut node = node;
    assert_eq!(node.wait().code(), Some(0));
    assert_eq!(node.spooled().len(), 1);
}
