//! What an operator and a reader meet: the page of a running node, what it writes, and its models.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod node;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use node::{CT, Client, EXPLICIT, Node, PATIENCE, wait_until};
use shared::phantom::{Finding, StudyPlan, UidRole, dicom_file};

/// What the phantom writes, and what a test plants there instead: the same lengths.
const PLANTED: [(&[u8], &[u8]); 3] = [
    (b"PHANTOM^SYNTHETIC", b"PLANTEDNAME^SARAH"),
    (b"PHANTOM-0000", b"PLANTEDID-77"),
    (b"PE-Edge phantom", b"Planted Scanner"),
];
const SECRETS: [&str; 3] = ["PLANTEDNAME", "PLANTEDID", "SARAH"];
const N_SLICES: u32 = 60;

/// A study of the phantom as data sets, with what is planted.
fn study(finding: Finding) -> (StudyPlan, Vec<Vec<u8>>) {
    let plan = StudyPlan::with_finding(3, 0, N_SLICES, 128, finding);
    let objects = (0..N_SLICES).map(|index| {
        let mut file = dicom_file(&plan, index, EXPLICIT).unwrap();
        for (found, planted) in PLANTED {
            assert_eq!(found.len(), planted.len());
            let places: Vec<usize> = file
                .windows(found.len())
                .enumerate()
                .filter(|(_, window)| window.eq_ignore_ascii_case(found))
                .map(|(place, _)| place)
                .collect();
            for place in places {
                file[place..place + planted.len()].copy_from_slice(planted);
            }
        }
        let meta = u32::from_le_bytes(file[140..144].try_into().unwrap());
        file[144 + meta as usize..].to_vec()
    });
    let objects = objects.collect();
    (plan, objects)
}

fn send(node: &Node, plan: &StudyPlan, objects: &[Vec<u8>]) {
    let mut client = Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    for (index, object) in (0..).zip(objects) {
        let uid = plan.uid(UidRole::Slice(index));
        assert_eq!(client.store(1, CT, &uid, object).unwrap(), 0);
    }
    client.release();
}

/// Every file below a folder but the database and the spool, which hold what came.
fn written(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let name = entry.path().display().to_string();
            if entry.file_type().unwrap().is_dir() && !name.ends_with("/spool") {
                folders.push(entry.path());
            } else if entry.file_type().unwrap().is_file() && !name.ends_with(".redb") {
                found.push((name, std::fs::read(entry.path()).unwrap()));
            }
        }
    }
    found
}

#[test]
fn patients_are_on_the_page_and_in_nothing_else_that_is_written() {
    let node = Node::start("quiet_time_s = 1\n");
    let (plan, objects) = study(Finding::Positive);
    send(&node, &plan, &objects);
    // One that breaks in the middle, and one whose sender calls itself by a patient's identifiers in the wrong places.
    let mut client = Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    let torn = &objects[0][..objects[0].len() / 2];
    client.store(1, CT, "1.2.3.4", torn).unwrap();
    client.release();
    let study_page = format!("/studies/{}", plan.uid(UidRole::Study));
    node.complete(plan.uid(UidRole::Study).as_str(), objects.len());
    let html = node.text(&study_page);
    assert!(
        html.contains("PLANTEDNAME, SARAH"),
        "the page names the patient: {html}"
    );
    assert!(node.text("/").contains("PLANTEDNAME, SARAH"));
    let png = node.text(&format!("{study_page}/slices/5.png?window=lung&heatmap=1"));
    assert!(png.starts_with("HTTP/1.1 200"), "{png:.300}");
    let mut said: Vec<(String, Vec<u8>)> = vec![("log".into(), node.log().join("\n").into())];
    let study = format!("/api{study_page}");
    for path in [
        "/api/studies",
        study.as_str(),
        "/api/status",
        "/metrics",
        "/system",
    ] {
        said.push((path.into(), node.text(path).into()));
    }
    let (status, folder) = node.stop();
    assert!(status.success());
    said.extend(written(&folder.path().join("state")));
    let audit = said.iter().find(|(name, _)| name.ends_with("audit.jsonl"));
    let audit = String::from_utf8(audit.unwrap().1.clone()).unwrap();
    for event in ["started", "received", "decided", "stopped"] {
        assert!(
            audit.contains(&format!("\"event\":\"{event}\"")),
            "{event}: {audit}"
        );
    }
    for (name, text) in said {
        let text = String::from_utf8_lossy(&text).to_uppercase();
        for secret in SECRETS {
            assert!(!text.contains(secret), "{secret} in {name}");
        }
    }
}

#[test]
fn names_stay_hidden_where_the_configuration_says_so() {
    let node = Node::start("quiet_time_s = 1\n[page]\nhide_patient_names = true\n");
    let (plan, objects) = study(Finding::Negative);
    send(&node, &plan, &objects);
    node.complete(plan.uid(UidRole::Study).as_str(), objects.len());
    for path in ["/".into(), format!("/studies/{}", plan.uid(UidRole::Study))] {
        let html = node.text(&path);
        assert!(html.starts_with("HTTP/1.1 200"));
        for secret in SECRETS {
            assert!(!html.to_uppercase().contains(secret), "{secret} on {path}");
        }
    }
    // A demonstration model says nothing of a patient, and this one is no phantom any more.
    assert!(node.text("/").contains("No statement"));
}

#[test]
fn the_service_manager_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let socket_path = folder.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&socket_path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let config = folder.path().join("edge.toml");
    let settings = "state_dir = \"state\"\ndicom_bind = \"127.0.0.1\"\ndicom_port = 0\nhttp_bind = \"127.0.0.1:0\"\n[retention]\nkeep_free_mib = 1\n";
    std::fs::write(&config, settings).unwrap();
    // The watchdog is meant for the process that systemd names.
    let command = "WATCHDOG_PID=$$ exec \"$0\" serve --config \"$1\"";
    let mut node = Command::new("/bin/sh")
        .args(["-c", command, env!("CARGO_BIN_EXE_edge")])
        .arg(&config)
        .env("NOTIFY_SOCKET", &socket_path)
        .env("WATCHDOG_USEC", "300000")
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let mut heard = String::new();
    let mut listen_for = |wanted: &str| {
        let mut message = [0; 4096];
        while !heard.contains(wanted) {
            let n_bytes = socket.recv(&mut message).unwrap();
            heard += &String::from_utf8_lossy(&message[..n_bytes]);
            heard.push('\n');
        }
    };
    listen_for("READY=1");
    listen_for("WATCHDOG=1");
    let id = rustix::process::Pid::from_child(&node);
    rustix::process::kill_process(id, rustix::process::Signal::HUP).unwrap();
    listen_for("RELOADING=1");
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    listen_for("STOPPING=1");
    assert!(node.wait().unwrap().success());
}

fn edge(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_model_that_breaks_after_its_installation_gives_way_at_the_next_start() {
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let config = folder.path().join("edge.toml");
    std::fs::write(&config, "state_dir = \"state\"\n").unwrap();
    std::fs::create_dir(folder.path().join("state")).unwrap();
    let config = config.to_str().unwrap();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/model/demo.onnx");
    let broken = folder.path().join("broken.onnx");
    std::fs::write(&broken, &std::fs::read(model).unwrap()[..5_000]).unwrap();
    let refused = edge(&[
        "model",
        "install",
        broken.to_str().unwrap(),
        "--unsigned",
        "--config",
        config,
    ]);
    assert_eq!(refused.status.code(), Some(65), "{refused:?}");
    let list = edge(&["model", "list", "--json", "--config", config]);
    assert!(
        String::from_utf8_lossy(&list.stdout).contains("\"current\":null"),
        "{list:?}"
    );
    let unsigned = edge(&["model", "install", model, "--config", config]);
    assert_eq!(
        unsigned.status.code(),
        Some(2),
        "a key or --unsigned is needed: {unsigned:?}"
    );
    let installed = edge(&[
        "model",
        "install",
        model,
        "--unsigned",
        "--json",
        "--config",
        config,
    ]);
    assert!(installed.status.success(), "{installed:?}");
    let said: serde_json::Value = serde_json::from_slice(&installed.stdout).unwrap();
    let digest = said["current"]["digest"].as_str().unwrap();
    let file = folder.path().join(format!("state/models/{digest}.onnx"));
    std::fs::write(&file, b"no longer a model").unwrap();
    let node = Node::start_in(Arc::clone(&folder), "");
    node.wait_for_log("the model before is in force again");
    wait_until("the model is in use", || {
        let status = node.json("/api/status");
        status["self_test"] == "passed" && status["state"] == "ready"
    });
    let (_, folder) = node.stop();
    let audit = std::fs::read_to_string(folder.path().join("state/audit/audit.jsonl")).unwrap();
    assert!(audit.contains("rolled_back_by_itself"), "{audit}");
    let installed = format!("\"change\":\"installed\",\"digest\":\"{digest}\"");
    assert!(audit.contains(&installed), "{audit}");
    // The broken model is not what a rollback brings back.
    let list = edge(&["model", "list", "--json", "--config", config]);
    let said: serde_json::Value = serde_json::from_slice(&list.stdout).unwrap();
    assert_eq!(said["previous"], serde_json::Value::Null, "{said}");
}

#[test]
fn commands_end_with_the_documented_codes() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("edge.toml");
    // A port where nobody is, of an address that nothing else here uses.
    let free = std::net::TcpListener::bind("127.0.0.77:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let settings = format!(
        "state_dir = \"state\"\ndicom_bind = \"127.0.0.1\"\ndicom_port = 0\nhttp_bind = \"{free}\"\n[retention]\nkeep_free_mib = 1\n"
    );
    std::fs::write(&config, settings).unwrap();
    let config = config.to_str().unwrap();
    let code = |arguments: &[&str]| edge(arguments).status.code();
    assert_eq!(code(&["status", "--config", config]), Some(69));
    assert_eq!(code(&["ping", &format!("X@{free}")]), Some(69));
    assert_eq!(code(&["ping", "nonsense"]), Some(2));
    assert_eq!(
        code(&["ping", "--config", config]),
        Some(78),
        "no PACS configured"
    );
    assert_eq!(code(&["model", "rollback", "--config", config]), Some(1));
    assert_eq!(code(&["status", "--config", "/nonexistent"]), Some(78));
    let doctor = edge(&["doctor", "--json", "--config", config]);
    assert_eq!(doctor.status.code(), Some(0), "{doctor:?}");
    let checks = String::from_utf8(doctor.stdout).unwrap();
    for name in [
        "clock",
        "sync",
        "disk",
        "DICOM port",
        "page",
        "model",
        "PACS",
    ] {
        let is_there = |line: &str| {
            let check: serde_json::Value = serde_json::from_str(line).unwrap();
            check["name"] == name
        };
        assert!(checks.lines().any(is_there), "{name}: {checks}");
    }
    let node = Node::start("");
    let peer = format!("PEEDGE@{}", node.dicom);
    assert_eq!(code(&["ping", &peer]), Some(0));
}
