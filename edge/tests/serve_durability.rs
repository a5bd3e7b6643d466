//! What was acknowledged is there after a kill, and nothing else is broken.

#![allow(clippy::unwrap_used, reason = "a step that fails fails its test")]

mod node;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use node::{CT, Client, EXPLICIT, Node, data_set};

const SENDERS: usize = 4;

/// Sends until the node is gone. Out: what was acknowledged.
fn send(address: std::net::SocketAddr, sender: usize, acknowledged: &AtomicUsize) -> Vec<String> {
    let mut kept = Vec::new();
    let Some(mut client) = Client::open_if_there(address, &[(CT, &[EXPLICIT])]) else {
        return kept;
    };
    for index in 0..10_000 {
        let instance = format!("1.2.{sender}.{index}");
        let slice = data_set(CT, &instance, 20_000 + 7919 * (index % 13));
        match client.store(1, CT, &instance, &slice) {
            Ok(0) => {
                kept.push(instance);
                acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            Ok(status) => panic!("status {status:04x}"),
            Err(_) => break,
        }
    }
    kept
}

#[test]
fn acknowledged_slices_are_there_exactly_once_after_a_kill() {
    let mut node = Node::start("");
    let mut acknowledged: Vec<String> = Vec::new();
    for round in 0..3 {
        let address = node.dicom;
        let count = AtomicUsize::new(0);
        let folder = std::thread::scope(|scope| {
            let senders: Vec<_> = (0..SENDERS)
                .map(|sender| {
                    let (count, sender) = (&count, round * SENDERS + sender);
                    scope.spawn(move || send(address, sender, count))
                })
                .collect();
            while count.load(Ordering::Relaxed) < 40 {
                std::thread::sleep(Duration::from_millis(1));
            }
            let folder = node.kill();
            for sender in senders {
                acknowledged.extend(sender.join().unwrap());
            }
            folder
        });
        node = Node::start_in(folder, "");
    }
    let (_, folder) = node.stop();
    let objects = node::spooled(folder.path());
    let mut by_instance: BTreeMap<&str, usize> = BTreeMap::new();
    for object in &objects {
        *by_instance.entry(&object.sop_instance).or_default() += 1;
        let index: usize = object
            .sop_instance
            .rsplit('.')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        let slice = data_set(CT, &object.sop_instance, 20_000 + 7919 * (index % 13));
        assert!(object.file.ends_with(&slice), "{}", object.sop_instance);
    }
    for instance in &acknowledged {
        assert_eq!(by_instance.get(instance.as_str()), Some(&1), "{instance}");
    }
    // What was not acknowledged is at most the one object that each sender had under way.
    assert!(objects.len() <= acknowledged.len() + 3 * SENDERS);
    let sequences: Vec<u64> = objects.iter().map(|object| object.sequence).collect();
    assert!(sequences.is_sorted() && sequences.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn second_node_on_the_same_folder_ends_with_unavailable() {
    let node = Node::start("");
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(["serve", "--config"])
        .arg(node.folder.path().join("edge.toml"))
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(69));
    assert!(node.is_alive());
}

#[test]
fn large_object_arrives_whole() {
    let node = Node::start("");
    let mut client = Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    client.max_pdu = 131_072;
    let object = data_set(CT, "1.2.3", 20 << 20);
    assert_eq!(client.store(1, CT, "1.2.3", &object).unwrap(), 0);
    client.release();
    let folder = node.kill();
    let node = Node::start_in(folder, "");
    let objects = node.spooled();
    assert_eq!(objects.len(), 1);
    assert!(objects[0].file.ends_with(&object));
}
