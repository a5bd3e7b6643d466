//! Storage commitment on the wire: the node as provider, and the role that it takes reports in.

#![allow(clippy::unwrap_used, reason = "a step that fails fails its test")]

mod node;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use dicom_ul::pdu::{
    AssociationAC, PDataValueType, Pdu, PresentationContextResult, PresentationContextResultReason,
    RequestorRoles, UserVariableItem,
};
use node::{
    CT, Client, IMPLICIT, Node, PATIENCE, command, connect, data_set, elements, encode, receive,
    request, uid, value,
};

const CLASS: &str = "1.2.840.10008.1.20.1";
const INSTANCE: &str = "1.2.840.10008.1.20.1.1";
const SR: &str = "1.2.840.10008.5.1.4.1.1.88.67";
const EXPLICIT: &str = node::EXPLICIT;
/// A command's elements, and its data set.
type Message = (BTreeMap<u16, Vec<u8>>, Vec<u8>);

const CONTEXTS: [node::Proposed<'_>; 2] = [(CT, &[EXPLICIT]), (CLASS, &[IMPLICIT])];

/// An element in implicit VR.
fn element(group: u16, number: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = group.to_le_bytes().to_vec();
    bytes.extend(number.to_le_bytes());
    bytes.extend(u32::try_from(value.len()).unwrap().to_le_bytes());
    bytes.extend(value);
    bytes
}

/// Action information: these instances under these classes.
fn asked(transaction: &str, instances: &[(&str, &str)]) -> Vec<u8> {
    let items = instances.iter().map(|(class, instance)| {
        let item = [
            element(8, 0x1150, &uid(class)),
            element(8, 0x1155, &uid(instance)),
        ];
        element(0xFFFE, 0xE000, &item.concat())
    });
    let items: Vec<u8> = items.flatten().collect();
    [
        element(8, 0x1195, &uid(transaction)),
        element(8, 0x1199, &items),
    ]
    .concat()
}

fn action(context: u8, data: &[u8]) -> Vec<u8> {
    let action = command(&[
        (0x0003, uid(CLASS)),
        (0x0100, 0x0130_u16.to_le_bytes().to_vec()),
        (0x0110, 9_u16.to_le_bytes().to_vec()),
        (0x0800, 1_u16.to_le_bytes().to_vec()),
        (0x1001, uid(INSTANCE)),
        (0x1008, 1_u16.to_le_bytes().to_vec()),
    ]);
    let command = value(context, PDataValueType::Command, true, &action);
    [command, value(context, PDataValueType::Data, true, data)].concat()
}

/// The next command and its data set, where it has one.
fn message(stream: &mut TcpStream) -> Message {
    let mut parts = Vec::new();
    loop {
        let Some(Pdu::PData { data }) = receive(stream).unwrap() else {
            panic!("no message");
        };
        parts.extend(data);
        let found = elements(&parts[0].data);
        let has_data = found[&0x0800] != 0x0101_u16.to_le_bytes();
        if parts.len() == 1 + usize::from(has_data) {
            return (
                found,
                parts
                    .get(1)
                    .map(|part| part.data.clone())
                    .unwrap_or_default(),
            );
        }
    }
}

fn answer(context: u8, field: u16, message_id: &[u8]) -> Vec<u8> {
    let answer = command(&[
        (0x0100, (field | 0x8000).to_le_bytes().to_vec()),
        (0x0120, message_id.to_vec()),
        (0x0800, 0x0101_u16.to_le_bytes().to_vec()),
        (0x0900, vec![0, 0]),
    ]);
    value(context, PDataValueType::Command, true, &answer)
}

/// What a report says: its event type, and its bytes without instance UIDs being parsed.
#[track_caller]
fn check_report(
    report: &Message,
    transaction: &str,
    committed: &[(&str, &str)],
    failed: &[(&str, &str, u16)],
) {
    let (command, data) = report;
    assert_eq!(command[&0x0100], [0x00, 0x01]);
    assert_eq!(command[&0x1002], [if failed.is_empty() { 1 } else { 2 }, 0]);
    assert_eq!(command[&0x1000], uid(INSTANCE));
    let failed = failed.iter().map(|(class, instance, reason)| {
        let item = [
            element(8, 0x1150, &uid(class)),
            element(8, 0x1155, &uid(instance)),
            element(8, 0x1197, &reason.to_le_bytes()),
        ];
        element(0xFFFE, 0xE000, &item.concat())
    });
    let failed: Vec<u8> = failed.flatten().collect();
    let all = asked(transaction, committed);
    let (head, references) = all.split_at(8 + uid(transaction).len());
    let mut wanted = head.to_vec();
    if !failed.is_empty() {
        wanted.extend(element(8, 0x1198, &failed));
    }
    if !committed.is_empty() {
        wanted.extend(references);
    }
    assert_eq!(data, &wanted);
}

fn stored(node: &Node, instances: &[&str]) -> Client {
    let mut client = Client::open(node.dicom, &CONTEXTS).unwrap();
    for instance in instances {
        let slice = data_set(CT, instance, 1000);
        assert_eq!(client.store(1, CT, instance, &slice).unwrap(), 0);
    }
    client
}

fn status(command: &BTreeMap<u16, Vec<u8>>) -> u16 {
    u16::from_le_bytes(command[&0x0900].as_slice().try_into().unwrap())
}

#[test]
fn what_is_stored_is_committed_and_the_rest_named_with_reasons() {
    let node = Node::start("[commitment]\nkeep_days = 1\n");
    let mut client = stored(&node, &["1.2.1", "1.2.2"]);
    let instances = [(CT, "1.2.1"), (CT, "1.2.2")];
    client
        .stream
        .write_all(&action(3, &asked("1.9.1", &instances)))
        .unwrap();
    let (response, _) = message(&mut client.stream);
    assert_eq!(
        (status(&response), response[&0x0100].clone()),
        (0, vec![0x30, 0x81])
    );
    let report = message(&mut client.stream);
    check_report(&report, "1.9.1", &instances, &[]);
    let said = answer(3, 0x0100, &report.0[&0x0110]);
    client.stream.write_all(&said).unwrap();
    // The association goes on, and a second request may fail in part.
    let instances = [(CT, "1.2.1"), (CT, "1.2.9"), (SR, "1.2.2")];
    client
        .stream
        .write_all(&action(3, &asked("1.9.2", &instances)))
        .unwrap();
    assert_eq!(status(&message(&mut client.stream).0), 0);
    let report = message(&mut client.stream);
    let failed = [(CT, "1.2.9", 0x0112), (SR, "1.2.2", 0x0119)];
    check_report(&report, "1.9.2", &[(CT, "1.2.1")], &failed);
    client
        .stream
        .write_all(&answer(3, 0x0100, &report.0[&0x0110]))
        .unwrap();
    client.stream.write_all(&action(3, b"no data set")).unwrap();
    assert_eq!(status(&message(&mut client.stream).0), 0x0115);
    client.release();
    assert!(node.is_alive());
}

#[test]
fn an_object_too_old_to_be_kept_for_so_long_is_not_committed() {
    // Room for a day less a moment: what came a second ago goes by age before the commitment would end.
    let node = Node::start("[retention]\nmax_age_days = 1.00001\n[commitment]\nkeep_days = 1\n");
    let mut client = stored(&node, &["1.2.1"]);
    std::thread::sleep(std::time::Duration::from_millis(1200));
    client
        .stream
        .write_all(&action(3, &asked("1.9.1", &[(CT, "1.2.1")])))
        .unwrap();
    assert_eq!(status(&message(&mut client.stream).0), 0);
    let report = message(&mut client.stream);
    check_report(&report, "1.9.1", &[], &[(CT, "1.2.1", 0x0213)]);
}

#[test]
fn without_the_section_and_without_the_role_the_class_is_not_offered() {
    let node = Node::start("");
    let client = Client::open(node.dicom, &CONTEXTS).unwrap();
    let contexts = client.answer.presentation_contexts.iter();
    let reasons: Vec<_> = contexts.map(|context| context.reason.clone()).collect();
    use PresentationContextResultReason as Reason;
    assert_eq!(
        reasons,
        [Reason::Acceptance, Reason::AbstractSyntaxNotSupported]
    );
    client.release();
}

/// Asks for an association with the class and a role. Out: the stream, whether the context was accepted, and the role item of the answer.
fn with_role(node: &Node, roles: RequestorRoles) -> (TcpStream, bool, Option<RequestorRoles>) {
    let Pdu::AssociationRQ(mut asked) = request("PACS", "PEEDGE", &[(CLASS, &[IMPLICIT])]) else {
        unreachable!()
    };
    let item = UserVariableItem::ScuScpRoleSelectionSubItem(CLASS.to_owned(), roles);
    asked.user_variables.push(item);
    let mut stream = connect(node.dicom);
    stream
        .write_all(&encode(&Pdu::AssociationRQ(asked)))
        .unwrap();
    let Some(Pdu::AssociationAC(accepted)) = receive(&mut stream).unwrap() else {
        panic!("not accepted");
    };
    let is_accepted =
        accepted.presentation_contexts[0].reason == PresentationContextResultReason::Acceptance;
    let role = accepted.user_variables.iter().find_map(|item| match item {
        UserVariableItem::ScuScpRoleSelectionSubItem(_, roles) => Some(*roles),
        _ => None,
    });
    (stream, is_accepted, role)
}

#[test]
fn a_pacs_may_report_on_an_association_of_its_own_by_role_selection() {
    let pacs =
        "[pacs]\nae_title = \"PACS\"\nhost = \"127.0.0.1\"\nport = 1\nstorage_commitment = true\n";
    let node = Node::start(pacs);
    let (scu, scp) = (
        RequestorRoles {
            scu: true,
            scp: false,
        },
        RequestorRoles {
            scu: false,
            scp: true,
        },
    );
    let (_, is_accepted, role) = with_role(&node, scu);
    assert!(!is_accepted, "we are no provider");
    assert_eq!(
        role,
        Some(RequestorRoles {
            scu: false,
            scp: false
        })
    );
    let (mut stream, is_accepted, role) = with_role(&node, scp);
    assert!(is_accepted);
    assert_eq!(role, Some(scp));
    let report = command(&[
        (0x0002, uid(CLASS)),
        (0x0100, 0x0100_u16.to_le_bytes().to_vec()),
        (0x0110, 1_u16.to_le_bytes().to_vec()),
        (0x0800, 1_u16.to_le_bytes().to_vec()),
        (0x1000, uid(INSTANCE)),
        (0x1002, 1_u16.to_le_bytes().to_vec()),
    ]);
    let command = value(1, PDataValueType::Command, true, &report);
    stream.write_all(&command).unwrap();
    let data = asked("1.9.1", &[(CT, "1.2.1")]);
    stream
        .write_all(&value(1, PDataValueType::Data, true, &data))
        .unwrap();
    let (response, _) = message(&mut stream);
    // Heard and understood: it is only no transaction of ours.
    assert_eq!(
        (status(&response), response[&0x0100].clone()),
        (0x0115, vec![0x00, 0x81])
    );
    // An N-ACTION has no place in this role.
    stream.write_all(&action(1, &data)).unwrap();
    assert_eq!(status(&message(&mut stream).0), 0x0211);
}

/// Takes the association that the node opens to report, and its report.
fn reported(listener: &TcpListener, role: bool) -> Option<Message> {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let Some(Pdu::AssociationRQ(asked)) = receive(&mut stream).unwrap() else {
        panic!("no request");
    };
    let item = UserVariableItem::ScuScpRoleSelectionSubItem(
        CLASS.to_owned(),
        RequestorRoles {
            scu: false,
            scp: true,
        },
    );
    assert_eq!(
        (
            asked.calling_ae_title.as_str(),
            asked.called_ae_title.as_str()
        ),
        ("PEEDGE", "TESTER")
    );
    assert!(asked.user_variables.contains(&item));
    let mut user_variables = vec![UserVariableItem::MaxLength(16_384)];
    if role {
        user_variables.push(item);
    }
    let accepted = Pdu::AssociationAC(AssociationAC {
        protocol_version: 1,
        calling_ae_title: asked.calling_ae_title,
        called_ae_title: asked.called_ae_title,
        application_context_name: asked.application_context_name,
        presentation_contexts: vec![PresentationContextResult {
            id: 1,
            reason: PresentationContextResultReason::Acceptance,
            transfer_syntax: IMPLICIT.to_owned(),
        }],
        user_variables,
    });
    stream.write_all(&encode(&accepted)).unwrap();
    if !role {
        assert_eq!(receive(&mut stream).unwrap(), Some(Pdu::ReleaseRQ));
        return None;
    }
    let report = message(&mut stream);
    stream
        .write_all(&answer(1, 0x0100, &report.0[&0x0110]))
        .unwrap();
    assert_eq!(receive(&mut stream).unwrap(), Some(Pdu::ReleaseRQ));
    stream.write_all(&encode(&Pdu::ReleaseRP)).unwrap();
    drop(stream.read(&mut [0]));
    Some(report)
}

#[test]
fn a_report_follows_its_peer_when_the_association_is_gone_over_a_restart_too() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let settings =
        format!("[commitment]\nkeep_days = 1\n[peers.TESTER]\nreport_to = \"127.0.0.1:{port}\"\n");
    let node = Node::start(&settings);
    let instances = [(CT, "1.2.1")];
    let mut client = stored(&node, &["1.2.1"]);
    client
        .stream
        .write_all(&action(3, &asked("1.9.1", &instances)))
        .unwrap();
    assert_eq!(status(&message(&mut client.stream).0), 0);
    // The peer leaves without an answer to the report; later it does not take us for the provider.
    drop(client);
    assert!(reported(&listener, false).is_none());
    let node = Node::start_in(node.kill(), &settings);
    let report = reported(&listener, true).unwrap();
    check_report(&report, "1.9.1", &instances, &[]);
    // What was answered is not reported again.
    let (status, folder) = node.stop();
    assert_eq!(status.code(), Some(0));
    listener.set_nonblocking(true).unwrap();
    let node = Node::start_in(folder, &settings);
    assert!(node.is_alive());
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(listener.accept().is_err());
}
