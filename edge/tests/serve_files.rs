//! Files that appear in the watched folder, and room that is made by itself.

#![allow(clippy::unwrap_used, reason = "a step that fails fails its test")]

mod node;

use std::time::{Duration, Instant};

use node::{CT, Client, EXPLICIT, Node, PATIENCE, data_set, spooled, wait_until};

const DOSE_REPORT: &str = "1.2.840.10008.5.1.4.1.1.88.67";

/// A Part 10 file around a data set.
fn file(class: &str, instance: &str, syntax: &str) -> Vec<u8> {
    let element = |element: u16, text: &str| {
        let mut value = text.as_bytes().to_vec();
        value.resize(value.len().next_multiple_of(2), 0);
        let mut bytes = vec![2, 0];
        bytes.extend_from_slice(&element.to_le_bytes());
        bytes.extend_from_slice(b"UI");
        bytes.extend_from_slice(&u16::try_from(value.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&value);
        bytes
    };
    let mut bytes = vec![0; 128];
    bytes.extend_from_slice(b"DICM");
    bytes.extend(element(2, class));
    bytes.extend(element(3, instance));
    bytes.extend(element(0x10, syntax));
    bytes.extend(data_set(class, instance, 50_000));
    bytes
}

#[test]
fn complete_files_are_taken_and_others_put_into_quarantine() {
    let folder = std::sync::Arc::new(tempfile::tempdir().unwrap());
    let incoming = folder.path().join("incoming");
    std::fs::create_dir_all(incoming.join("deeper")).unwrap();
    let node = Node::start_in(folder, "watch_folder = \"incoming\"\n");
    // The watch begins at the start; what lies there before is found by looking through the folder.
    wait_until("a first file is taken", || {
        let name = incoming.join("probe");
        if !name.exists() {
            std::fs::write(&name, file(CT, "1.2.1", EXPLICIT)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        !name.exists()
    });
    let good = file(CT, "1.2.3", EXPLICIT);
    std::fs::write(incoming.join("deeper/IM1"), &good).unwrap();
    let unfinished = incoming.join("IM2.part");
    std::fs::write(&unfinished, file(CT, "1.2.4", EXPLICIT)).unwrap();
    std::fs::write(incoming.join("DOE^JANE.txt"), b"not DICOM").unwrap();
    std::fs::write(incoming.join("IM3"), file("1.2.3.4", "1.2.5", EXPLICIT)).unwrap();
    std::fs::write(incoming.join("IM4"), file(CT, "1.2.6", "1.2.3.4")).unwrap();
    let is_there = |instance: &str| {
        let found = spooled(node.folder.path());
        found.iter().any(|object| object.sop_instance == instance)
    };
    wait_until("the good file", || {
        is_there("1.2.3") && !incoming.join("deeper/IM1").exists()
    });
    let quarantine = node.folder.path().join("state/quarantine");
    let reasons = || {
        let entries = std::fs::read_dir(&quarantine)
            .into_iter()
            .flatten()
            .flatten();
        let mut reasons: Vec<String> = entries
            .map(|entry| entry.path())
            .inspect(|path| assert!(!path.to_string_lossy().contains("DOE")))
            .filter(|path| path.extension().is_some_and(|kind| kind == "reason"))
            .map(|path| std::fs::read_to_string(path).unwrap().trim().to_owned())
            .collect();
        reasons.sort();
        reasons
    };
    let wanted = [
        "SOP class not accepted",
        "not a DICOM file",
        "transfer syntax not supported",
    ];
    wait_until("three files in quarantine with their reasons", || {
        reasons() == wanted
    });
    assert!(unfinished.exists());
    std::fs::rename(&unfinished, incoming.join("IM2")).unwrap();
    wait_until("the file renamed into place", || is_there("1.2.4"));
    let log = node.log().join("\n");
    assert!(!log.contains("DOE"), "{log}");
    let whole = spooled(node.folder.path());
    let taken = whole.iter().find(|object| object.sop_instance == "1.2.3");
    assert_eq!(taken.unwrap().file, good);
}

#[test]
fn room_is_made_from_objects_that_are_never_analysed() {
    let node = Node::start("[retention]\nquota_mib = 1\n");
    let mut client = Client::open(node.dicom, &[(DOSE_REPORT, &[EXPLICIT])]).unwrap();
    let mut store = |index: u32| {
        let instance = format!("1.2.{index}");
        let report = data_set(DOSE_REPORT, &instance, 400_000);
        client.store(1, DOSE_REPORT, &instance, &report).unwrap()
    };
    // Three times the quota goes through, with refusals in between that end by themselves.
    let start = Instant::now();
    let mut n_stored = 0;
    while n_stored < 9 {
        assert!(start.elapsed() < PATIENCE, "{n_stored} stored");
        match store(n_stored) {
            0 => n_stored += 1,
            status => {
                assert_eq!(status, 0xa700);
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
    client.release();
}

#[test]
fn root_leaves_the_state_folder_of_another_user_alone() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    std::fs::create_dir(&state).unwrap();
    if let Err(error) = std::os::unix::fs::chown(&state, Some(65_534), Some(65_534)) {
        // Who is not root cannot make such a folder, and leaves no files of root's in one.
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        return;
    }
    let config = folder.path().join("edge.toml");
    let text = "dicom_port = 0\nhttp_bind = \"127.0.0.1:0\"\nstate_dir = \"state\"\n";
    std::fs::write(&config, text).unwrap();
    let ended = std::process::Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(["serve", "--config"])
        .arg(config)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(73), "{said}");
    assert!(said.contains("start the node as that user"), "{said}");
    assert_eq!(std::fs::read_dir(&state).unwrap().count(), 0);
}

#[test]
fn check_names_every_file_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("empty"), " \n").unwrap();
    let config = folder.path().join("edge.toml");
    let text = "model = \"absent.onnx\"\nwatch_folder = \"absent\"\n[page]\ntoken_file = \"empty\"\n\
        [webhook]\nurl = \"https://hooks.example.org\"\nsecret_file = \"absent\"\n\
        [stow]\nurl = \"https://pacs.example.org\"\ntoken_file = \"empty\"\n\
        [tls]\ncertificate = \"node.crt\"\nkey = \"node.key\"\nclient_ca = \"ca.crt\"\n";
    std::fs::write(&config, text).unwrap();
    let checked = std::process::Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(["check", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&checked.stderr);
    assert_eq!(checked.status.code(), Some(78), "{said}");
    for part in [
        "8 fault(s)",
        "node.crt",
        "node.key",
        "ca.crt",
        "watch_folder ",
        "model ",
        "[page] token_file ",
        "/empty: the file is empty",
        "[webhook] secret_file",
        "[stow] token_file",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
}

fn started(folder: &std::path::Path, settings: &str) -> std::process::Child {
    std::process::Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(["serve", "--config"])
        .arg(node::write_config(folder, settings))
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_start_that_fails_ends_and_says_why_once() {
    let no_tls = "[tls]\ncertificate = \"a\"\nkey = \"b\"\nclient_ca = \"c\"\n";
    let no_secret = "[webhook]\nurl = \"http://127.0.0.1:9\"\nsecret_file = \"absent\"\n";
    for (settings, code, why) in [
        ("model = \"absent.onnx\"\n", 78, "absent.onnx"),
        (no_secret, 78, "secret_file"),
        (no_tls, 78, "[tls]: "),
        ("", 73, "state folder "),
    ] {
        let folder = tempfile::tempdir().unwrap();
        if settings.is_empty() {
            std::fs::write(folder.path().join("state"), "no folder").unwrap();
        }
        let mut child = started(folder.path(), settings);
        let mut status = None;
        wait_until("the end", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
        assert_eq!(status.unwrap().code(), Some(code), "{said}");
        let line = said.lines().last().unwrap();
        assert!(line.starts_with("edge: ") && line.contains(why), "{said}");
        assert_eq!(line.matches("os error").count(), 1, "{said}");
    }
}

#[test]
fn a_node_that_is_aborted_leaves_no_image_of_its_memory() {
    let node = Node::start("");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", node.id())).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    let core: Vec<&str> = core.unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"], "{limits}");
}

#[test]
fn a_node_whose_log_nobody_reads_any_more_works_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = started(folder.path(), "");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    let line = lines.find(|line| line.as_ref().unwrap().contains("\"dicom_address\":\""));
    drop(lines);
    let line = line.unwrap().unwrap();
    let address = line.split("\"dicom_address\":\"").nth(1).unwrap();
    let address = address.split('"').next().unwrap().parse().unwrap();
    let mut client = Client::open(address, &[(CT, &[EXPLICIT])]).unwrap();
    let slice = data_set(CT, "1.2.3", 100);
    assert_eq!(client.store(1, CT, "1.2.3", &slice).unwrap(), 0);
    client.release();
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
