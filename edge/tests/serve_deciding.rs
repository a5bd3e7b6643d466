//! What `edge serve` says of studies that are sent to it, also over kills, without a sound model, and of large objects.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use node::{CT, Client, EXPLICIT, Node, wait_until};
use serde_json::Value;
use shared::phantom::{StudyPlan, UidRole, dicom_file, multi_frame_file};

const ENHANCED: &str = "1.2.840.10008.5.1.4.1.1.2.1";
const SIDE: u16 = 64;
const N_SLICES: u32 = 40;

/// A phantom study: each slice's SOP Instance UID and file.
fn study(index: u32) -> (String, Vec<(String, Vec<u8>)>) {
    let plan = StudyPlan::new(11, index, N_SLICES, SIDE);
    let file = |slice| {
        let bytes = dicom_file(&plan, slice, EXPLICIT).unwrap();
        (plan.uid(UidRole::Slice(slice)), bytes)
    };
    (plan.uid(UidRole::Study), (0..N_SLICES).map(file).collect())
}

/// The data set of a file: without preamble and file meta information.
fn data_set(file: &[u8]) -> &[u8] {
    let length = u32::from_le_bytes(file[140..144].try_into().unwrap()) as usize;
    &file[144 + length..]
}

/// Sends slices over one association; how many were acknowledged.
fn send(address: SocketAddr, slices: &[(String, Vec<u8>)]) -> usize {
    let Some(mut client) = Client::open_if_there(address, &[(CT, &[EXPLICIT])]) else {
        return 0;
    };
    let stored = slices.iter().take_while(|(instance, file)| {
        matches!(client.store(1, CT, instance, data_set(file)), Ok(0))
    });
    stored.count()
}

/// What `edge classify` says of the same files: the logit of each SOP Instance UID.
fn classified(slices: &[(String, Vec<u8>)]) -> BTreeMap<String, f64> {
    let folder = tempfile::tempdir().unwrap();
    for (instance, file) in slices {
        std::fs::write(folder.path().join(instance), file).unwrap();
    }
    let output = Command::new(env!("CARGO_BIN_EXE_edge"))
        .args(["classify", "--json"])
        .arg(folder.path())
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let values = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let slices = values.filter(|value| value["kind"] == "slice");
    slices
        .map(|value| {
            let sop_uid = value["sop_uid"].as_str().unwrap().to_owned();
            (sop_uid, value["logit"].as_f64().unwrap())
        })
        .collect()
}

fn logits(result: &Value) -> BTreeMap<String, f64> {
    let slices = result["slice_results"].as_array().unwrap();
    let one = |slice: &Value| {
        let sop_uid = slice["sop_uid"].as_str().unwrap().to_owned();
        (sop_uid, slice["logit"].as_f64().unwrap())
    };
    slices.iter().map(one).collect()
}

/// Child processes of the node: its worker.
fn workers(node: &Node) -> Vec<u32> {
    let id = node.id();
    let tasks = std::fs::read_dir(format!("/proc/{id}/task")).unwrap();
    let children =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok());
    let text: String = children.collect();
    text.split_whitespace()
        .map(|id| id.parse().unwrap())
        .collect()
}

/// Over any kill every acknowledged slice has its answer, the same as `edge classify` gives, and each thing is said once.
#[test]
fn each_slice_is_decided_exactly_once_over_kills_at_any_moment() {
    let (study_uid, slices) = study(0);
    let mut folder = Arc::new(tempfile::tempdir().unwrap());
    let mut n_sent = 0;
    for round in 0..6 {
        let node = Node::start_in(Arc::clone(&folder), "quiet_time_s = 0.5\n");
        let (address, rest) = (node.dicom, slices[n_sent..].to_vec());
        let sending = std::thread::spawn(move || send(address, &rest[..rest.len().min(9)]));
        // Between "nothing is decided" and "all is": the moments differ from round to round and from run to run.
        std::thread::sleep(Duration::from_millis(20 + 53 * round));
        folder = node.kill();
        n_sent += sending.join().unwrap();
    }
    let node = Node::start_in(folder, "quiet_time_s = 2\n");
    assert_eq!(send(node.dicom, &slices[n_sent..]), slices.len() - n_sent);
    let result = node.complete(&study_uid, slices.len());
    assert_eq!(result["analysed"], slices.len());
    assert_eq!(logits(&result), classified(&slices));
    let studies = node.json("/api/studies");
    assert_eq!(studies.as_array().unwrap().len(), 1);
    // Nothing more is said when nothing more comes.
    let revision = result["revision"].clone();
    let (_, folder) = node.stop();
    let node = Node::start_in(folder, "quiet_time_s = 0.1\n");
    let result = node.complete(&study_uid, slices.len());
    assert_eq!(result["revision"], revision);
    assert_eq!(node.json("/api/status")["analysed"], 0);
}

#[test]
fn the_worker_is_confined_and_one_that_is_killed_costs_no_slice() {
    let (study_uid, slices) = study(1);
    let node = Node::start("quiet_time_s = 1\n");
    assert_eq!(send(node.dicom, &slices[..1]), 1);
    node.wait_until_analysed(1);
    let [worker] = workers(&node)[..] else {
        panic!("not one worker: {:?}", workers(&node))
    };
    let status = std::fs::read_to_string(format!("/proc/{worker}/status")).unwrap();
    let is_native = std::env::var_os("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER").is_none();
    assert!(!is_native || status.contains("Seccomp:\t2"), "{status}");
    let address = node.dicom;
    let rest = slices[1..].to_vec();
    let sending = std::thread::spawn(move || send(address, &rest));
    // Each is killed while slices wait, and only after the one before it was replaced and has worked.
    for n_known in [2, 12, 22] {
        node.wait_until_analysed(n_known);
        for worker in workers(&node) {
            let process = rustix::process::Pid::from_raw(worker.cast_signed()).unwrap();
            let signal = rustix::process::Signal::KILL;
            // It may have ended by itself.
            rustix::process::kill_process(process, signal).unwrap_or_default();
        }
    }
    assert_eq!(sending.join().unwrap(), slices.len() - 1);
    let result = node.complete(&study_uid, slices.len());
    assert_eq!(result["analysed"], slices.len());
}

/// A model file whose expected bits are wrong: the node stays up and analyses later what it kept.
#[test]
fn a_failed_self_test_degrades_and_slices_are_analysed_when_the_model_is_sound() {
    let (study_uid, slices) = study(2);
    let folder = Arc::new(tempfile::tempdir().unwrap());
    let demo = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/model/demo.onnx")).unwrap();
    let text = b"\"logit_bits\":";
    let at = demo
        .windows(text.len())
        .position(|part| part == text)
        .unwrap()
        + text.len();
    let mut broken = demo.clone();
    // The second digit, so that it stays a number of 32 bits.
    broken[at + 1] = if broken[at + 1] == b'1' { b'0' } else { b'1' };
    let model = folder.path().join("model.onnx");
    std::fs::write(&model, &broken).unwrap();
    let settings = format!("quiet_time_s = 0.5\nmodel = \"{}\"\n", model.display());

    let node = Node::start_in(Arc::clone(&folder), &settings);
    assert_eq!(send(node.dicom, &slices), slices.len());
    let result = node.complete(&study_uid, slices.len());
    assert_eq!(result["outcome"]["code"], "self-test");
    assert_eq!(result["analysed"], 0);
    assert!(node.is_alive());
    let status = node.json("/api/status");
    assert_eq!(status["state"], "degraded");
    assert!(status["self_test"].as_str().unwrap().contains("self-test"));

    let (ended, folder) = node.stop();
    assert!(ended.success());
    std::fs::write(&model, &demo).unwrap();
    let node = Node::start_in(folder, &settings);
    let mut result = Value::Null;
    wait_until("all slices are judged", || {
        result = node.complete(&study_uid, slices.len());
        result["analysed"] == slices.len()
    });
    assert_eq!(logits(&result), classified(&slices));
    assert_ne!(result["outcome"]["kind"], "not_analysed");
}

/// Consoles use an association an image, pause, or leave one open: none of it ends a study, nor keeps it from ending.
#[test]
fn a_study_is_complete_by_quiet_time_whatever_associations_do() {
    const QUIET: Duration = Duration::from_secs(2);
    let (study_uid, slices) = study(6);
    let node = Node::start("quiet_time_s = 2\n");
    let mut open = Client::open(node.dicom, &[(CT, &[EXPLICIT])]).unwrap();
    let mut last = Instant::now();
    for part in slices.chunks(10) {
        // Longer than the quiet time in all, shorter each.
        std::thread::sleep(QUIET * 2 / 5);
        let result = node.json(&format!("/api/studies/{study_uid}"));
        // Where this test itself was held up for so long, the study may have ended.
        assert!(result["state"] != "complete" || last.elapsed() >= QUIET);
        last = Instant::now();
        assert_eq!(send(node.dicom, part), part.len());
    }
    node.complete(&study_uid, slices.len());
    assert!(last.elapsed() >= QUIET);
    // The association that was open all the time goes on, and what it brings is of no new study.
    let (instance, file) = &slices[0];
    assert_eq!(open.store(1, CT, instance, data_set(file)).unwrap(), 0);
    assert_eq!(node.json("/api/studies").as_array().unwrap().len(), 1);
}

/// Nearly all of the time its worker stands still: what comes faster than it is analysed waits on the disk, and no sender is refused or held up.
#[test]
fn four_studies_at_line_rate_are_taken_while_analysis_falls_far_behind() {
    const N_STUDIES: u32 = 4;
    let studies: Vec<_> = (20..20 + N_STUDIES).map(study).collect();
    let n_slices = studies.len() * N_SLICES as usize;
    let node = Node::start("quiet_time_s = 1\n");
    // The worker is there from the first object on.
    let (_, first) = study(30);
    assert_eq!(send(node.dicom, &first[..1]), 1);
    node.wait_until_analysed(1);
    let [worker] = workers(&node)[..] else {
        panic!("not one worker: {:?}", workers(&node))
    };
    let waiting = std::thread::scope(|scope| {
        let is_slow = Arc::new(AtomicBool::new(true));
        let slow = Arc::clone(&is_slow);
        scope.spawn(move || slow_down(worker, &slow));
        let senders: Vec<_> = studies
            .iter()
            .map(|(_, slices)| scope.spawn(|| send(node.dicom, slices)))
            .collect();
        let sent = senders.into_iter().map(|sender| sender.join().unwrap());
        let n_sent: usize = sent.sum();
        let status = node.json("/api/status");
        is_slow.store(false, Ordering::Relaxed);
        assert_eq!(n_sent, n_slices, "each was answered with success");
        status["waiting"].as_u64().unwrap()
    });
    assert!(waiting > 0, "analysis was not behind");
    for (study_uid, slices) in &studies {
        let result = node.complete(study_uid, slices.len());
        assert_eq!(result["analysed"], slices.len());
    }
}

/// Stops a process but for 2 ms in 100, as long as `is_slow`: each slice takes it far less than its deadline even so.
fn slow_down(process: u32, is_slow: &AtomicBool) {
    use rustix::process::Signal;
    let process = rustix::process::Pid::from_raw(process.cast_signed()).unwrap();
    let signal = |signal| rustix::process::kill_process(process, signal).unwrap();
    while is_slow.load(Ordering::Relaxed) {
        signal(Signal::STOP);
        std::thread::sleep(Duration::from_millis(98));
        signal(Signal::CONT);
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A results database that is lost or broken is made anew at the start; what is stored is decided again, with the same answers.
#[test]
fn lost_results_are_made_anew_from_what_is_stored() {
    let (study_uid, slices) = study(3);
    let node = Node::start("quiet_time_s = 0.5\n");
    assert_eq!(send(node.dicom, &slices), slices.len());
    let before = node.complete(&study_uid, slices.len());
    let (_, mut folder) = node.stop();
    for (damage, why) in [(&b"broken"[..], "broken"), (b"", "missing")] {
        let path = folder.path().join("state/results.redb");
        if damage.is_empty() {
            std::fs::remove_file(&path).unwrap();
        } else {
            std::fs::write(&path, damage).unwrap();
        }
        let node = Node::start_in(folder, "quiet_time_s = 0.5\n");
        node.wait_for_log(&format!("results.redb is {why}"));
        let after = node.complete(&study_uid, slices.len());
        assert_eq!(logits(&after), logits(&before));
        assert_eq!(after["outcome"], before["outcome"]);
        assert_eq!(node.json("/api/status")["state"], "ready");
        (_, folder) = node.stop();
        let audit = std::fs::read_to_string(folder.path().join("state/audit/audit.jsonl")).unwrap();
        let line = format!("\"event\":\"results_lost\",\"why\":\"{why}\"");
        assert!(audit.contains(&line), "{audit}");
    }
    let aside = folder.path().join("state/results.redb.broken");
    assert_eq!(std::fs::read(aside).unwrap(), b"broken");
}

/// What opens and yet cannot be used ends the start, and the next one makes it anew.
#[test]
fn a_database_that_fails_behind_its_opening_is_looked_at_by_the_next_start() {
    const UNASSIGNED: redb::TableDefinition<'_, u64, &[u8]> =
        redb::TableDefinition::new("unassigned");
    let (study_uid, slices) = study(4);
    let mut node = Node::start("quiet_time_s = 0.5\n");
    assert_eq!(send(node.dicom, &slices[..3]), 3);
    node.complete(&study_uid, 3);
    let (_, folder) = node.stop();
    let database = redb::Database::open(folder.path().join("state/results.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    let mut table = transaction.open_table(UNASSIGNED).unwrap();
    table.insert(7, &b"no row"[..]).unwrap();
    drop(table);
    transaction.commit().unwrap();
    drop(database);
    node = Node::start_in(folder, "quiet_time_s = 0.5\n");
    let ended = node.wait();
    assert_eq!(ended.code(), Some(69), "{:#?}", node.log());
    node = Node::start_in(Arc::clone(&node.folder), "quiet_time_s = 0.5\n");
    node.wait_for_log("results.redb is broken");
    node.complete(&study_uid, 3);
}

/// The page draws each frame of an object of many by itself, and says why where it cannot.
#[test]
fn frames_of_an_enhanced_ct_are_drawn_each_by_itself() {
    let plan = StudyPlan::new(11, 5, 24, SIDE);
    let file = multi_frame_file(&plan, 24, EXPLICIT).unwrap();
    let node = Node::start("quiet_time_s = 0.5\n");
    let mut client = Client::open(node.dicom, &[(ENHANCED, &[EXPLICIT])]).unwrap();
    let instance = plan.uid(UidRole::MultiFrame);
    let status = client.store(1, ENHANCED, &instance, data_set(&file));
    assert_eq!(status.unwrap(), 0);
    let study_uid = plan.uid(UidRole::Study);
    node.complete(&study_uid, 24);
    let mut pictures = BTreeSet::new();
    for index in [0, 7, 23] {
        for heatmap in [0, 1] {
            let path = format!("/studies/{study_uid}/slices/{index}.png?heatmap={heatmap}");
            let (head, body) = node.fetch(&path);
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
            assert!(body.starts_with(b"\x89PNG"));
            pictures.insert(body);
        }
    }
    assert_eq!(pictures.len(), 6, "no two are the same");
    let (head, _) = node.fetch(&format!("/studies/{study_uid}/slices/24.png"));
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
}

/// The most memory that a process had in KiB, without the pages of files: how many of its program are there depends on the machine.
fn peak_kib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let kib = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let text = line.unwrap().trim().trim_end_matches(" kB");
        text.parse::<u64>().unwrap()
    };
    kib("VmHWM:") - kib("RssFile:")
}

/// Frames are read one at a time: the worker's memory does not grow with their number.
#[test]
fn a_large_enhanced_ct_is_never_in_memory_as_a_whole() {
    let plan = StudyPlan::new(11, 4, 48, 256);
    let peak = |n_frames: u32| {
        let file = multi_frame_file(&plan, n_frames, EXPLICIT).unwrap();
        let node = Node::start("quiet_time_s = 3600\n");
        let mut client = Client::open(node.dicom, &[(ENHANCED, &[EXPLICIT])]).unwrap();
        let instance = plan.uid(UidRole::MultiFrame);
        let status = client
            .store(1, ENHANCED, &instance, data_set(&file))
            .unwrap();
        assert_eq!(status, 0);
        node.wait_until_analysed(u64::from(n_frames));
        let [worker] = workers(&node)[..] else {
            panic!("not one worker")
        };
        (peak_kib(worker), file.len() as u64 / 1024)
    };
    let (few, _) = peak(2);
    let (many, file_kib) = peak(48);
    assert!(file_kib > 6_000);
    assert!(
        many < few + 2_048,
        "{few} KiB for 2 frames, {many} KiB for 48"
    );
}
