//! The contract of `edge classify` and `edge bench`, held by running the built program.
//!
//! Files are phantoms, hostile bytes made here, and, where `PE_EDGE_REAL_DATA` names their folder, real ones.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use shared::RESEARCH_USE;
use shared::phantom::{StudyPlan, dicom_file, multi_frame_file};
use shared::preprocess::Preprocessor;
use shared::spec::PreprocessSpec;

const EXPLICIT_LE: &str = "1.2.840.10008.1.2.1";
const RLE: &str = "1.2.840.10008.1.2.5";

fn edge() -> Command {
    Command::new(env!("CARGO_BIN_EXE_edge"))
}

/// Exit code and lines of `edge classify --json` with these arguments.
fn classify(arguments: &[&Path]) -> (i32, Vec<Value>) {
    let output = edge()
        .args(["classify", "--json"])
        .args(arguments)
        .output()
        .unwrap();
    let lines = String::from_utf8(output.stdout).unwrap();
    let values = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    (output.status.code().unwrap(), values.collect())
}

fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["kind"] == kind).collect()
}

/// A folder with a phantom study of `n_slices` slices.
fn study(n_slices: u32, transfer_syntax: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let plan = StudyPlan::new(7, 0, n_slices, 128);
    for index in 0..n_slices {
        let bytes = dicom_file(&plan, index, transfer_syntax).unwrap();
        fs::write(folder.path().join(format!("{index:03}.dcm")), bytes).unwrap();
    }
    folder
}

fn keys(value: &Value) -> BTreeSet<&str> {
    let object = value.as_object().unwrap();
    object.keys().map(String::as_str).collect()
}

#[track_caller]
fn check_fields(value: &Value, fields: &str) {
    for field in fields.split(' ') {
        assert!(keys(value).contains(field), "{field} is missing in {value}");
    }
}

#[test]
fn a_study_prints_every_field_of_the_contract() {
    let folder = study(6, RLE);
    let (exit, lines) = classify(&[folder.path()]);
    assert_eq!(exit, 0);
    let slices = of_kind(&lines, "slice");
    assert_eq!((slices.len(), lines.len()), (6, 7));
    for (index, slice) in slices.iter().enumerate() {
        check_fields(
            slice,
            "kind file frame study_uid series_uid sop_uid status reason logit probability positive model micros",
        );
        let file = slice["file"].as_str().unwrap();
        assert!(file.ends_with(&format!("{index:03}.dcm")));
        assert_eq!(slice["status"], "analysed");
        assert!(slice["reason"].is_null() && slice["frame"].is_null());
        let probability = slice["probability"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&probability));
        assert!(slice["logit"].is_number() && slice["micros"].is_u64());
        assert!(slice["notice"].as_str().unwrap().contains(RESEARCH_USE));
    }
    let study = lines.last().unwrap();
    check_fields(
        study,
        "kind study_uid series_uid slices analysed not_analysed score positive top",
    );
    assert_eq!(study["study_uid"], slices[0]["study_uid"]);
    assert_eq!(study["series_uid"], slices[0]["series_uid"]);
    let counts = ["slices", "analysed", "not_analysed"].map(|field| study[field].as_u64());
    assert_eq!(counts, [Some(6), Some(6), Some(0)]);
    let logit = |slice: &&&Value| slice["logit"].as_f64().unwrap();
    let highest = slices
        .iter()
        .max_by(|a, b| logit(a).total_cmp(&logit(b)))
        .unwrap();
    assert_eq!(study["top"][0]["sop_uid"], highest["sop_uid"]);
}

#[test]
fn the_same_files_give_the_same_lines() {
    let folder = study(4, EXPLICIT_LE);
    let without_times = || {
        let (_, mut lines) = classify(&[folder.path()]);
        for line in &mut lines {
            line.as_object_mut().unwrap().remove("micros");
        }
        lines
    };
    assert_eq!(without_times(), without_times());
}

#[test]
fn frames_of_one_object_are_numbered_from_1() {
    let folder = tempfile::tempdir().unwrap();
    let plan = StudyPlan::new(7, 1, 5, 128);
    let bytes = multi_frame_file(&plan, 5, EXPLICIT_LE).unwrap();
    fs::write(folder.path().join("enhanced.dcm"), bytes).unwrap();
    let tensors = tempfile::tempdir().unwrap();
    let (exit, lines) = classify(&[folder.path(), Path::new("--tensors"), tensors.path()]);
    assert_eq!(exit, 0);
    let slices = of_kind(&lines, "slice");
    let frames = slices.iter().map(|slice| slice["frame"].as_u64().unwrap());
    assert_eq!(frames.collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert_eq!(of_kind(&lines, "study")[0]["analysed"], 5);
    let sop_uid = lines[0]["sop_uid"].as_str().unwrap();
    assert!(tensors.path().join(format!("{sop_uid}.3.npy")).is_file());
}

#[test]
fn tensors_are_those_of_the_preprocessing() {
    let folder = study(1, EXPLICIT_LE);
    let tensors = tempfile::tempdir().unwrap();
    let (exit, lines) = classify(&[folder.path(), Path::new("--tensors"), tensors.path()]);
    assert_eq!(exit, 0);
    let sop_uid = lines[0]["sop_uid"].as_str().unwrap();
    let npy = fs::read(tensors.path().join(format!("{sop_uid}.npy"))).unwrap();
    let bytes = fs::read(folder.path().join("000.dcm")).unwrap();
    let slice = shared::dicom::read(&bytes).unwrap().frame(0).unwrap();
    let mut expected = vec![0; shared::TENSOR_BYTES];
    Preprocessor::new(&PreprocessSpec::default())
        .unwrap()
        .tensor(&slice.pixels(), &mut expected)
        .unwrap();
    assert_eq!(npy.len(), 128 + expected.len());
    assert!(npy[128..] == expected, "the tensors differ");
}

#[test]
fn heat_maps_are_pictures_named_by_their_slices() {
    let folder = study(2, EXPLICIT_LE);
    let maps = tempfile::tempdir().unwrap();
    let (exit, lines) = classify(&[folder.path(), Path::new("--heatmap"), maps.path()]);
    assert_eq!(exit, 0);
    for slice in of_kind(&lines, "slice") {
        let sop_uid = slice["sop_uid"].as_str().unwrap();
        let file = fs::read(maps.path().join(format!("{sop_uid}.png"))).unwrap();
        assert!(file.starts_with(b"\x89PNG"));
    }
    assert_eq!(fs::read_dir(maps.path()).unwrap().count(), 2);
}

/// A Part 10 file whose data set is `data_set`, in Explicit VR Little Endian.
fn part10(data_set: &[u8]) -> Vec<u8> {
    let plan = StudyPlan::new(1, 0, 1, 64);
    let file = dicom_file(&plan, 0, EXPLICIT_LE).unwrap();
    let length = u32::from_le_bytes(file[140..144].try_into().unwrap()) as usize;
    [&file[..144 + length], data_set].concat()
}

#[test]
fn hostile_files_get_a_reason_each_and_the_good_one_its_answer() {
    let folder = study(1, EXPLICIT_LE);
    let at = |name: &str| folder.path().join(name);
    let good = fs::read(at("000.dcm")).unwrap();
    fs::write(at("a-truncated"), &good[..good.len() - 777]).unwrap();
    fs::write(at("b-empty"), "").unwrap();
    fs::write(at("c-text"), "not DICOM\n").unwrap();
    let claim = b"\x10\0\x10\0UN\0\0\xF0\xFF\xFF\xFF";
    fs::write(at("d-4-gib"), part10(claim)).unwrap();
    let open = b"\x40\0\x75\x02SQ\0\0\xFF\xFF\xFF\xFF\xFE\xFF\0\xE0\xFF\xFF\xFF\xFF";
    fs::write(at("e-nested"), part10(&open.repeat(5_000))).unwrap();
    let large = fs::File::create(at("f-large")).unwrap();
    large.set_len(1 << 40).unwrap();
    symlink(".", at("g-loop")).unwrap();
    symlink("nowhere", at("h-dangling")).unwrap();
    let made = Command::new("mkfifo").arg(at("i-pipe")).status().unwrap();
    assert!(made.success());
    let (exit, lines) = classify(&[folder.path(), &at("j-missing")]);
    assert_eq!(exit, 0);
    let slices = of_kind(&lines, "slice");
    let seen = slices.iter().map(|slice| {
        let (_, name) = slice["file"].as_str().unwrap().rsplit_once('/').unwrap();
        let reason = slice["reason"].as_str().unwrap_or("analysed");
        (name, reason.split(':').next().unwrap())
    });
    assert_eq!(
        seen.collect::<Vec<_>>(),
        [
            ("000.dcm", "analysed"),
            ("a-truncated", "length"),
            ("b-empty", "empty"),
            ("c-text", "not-dicom"),
            ("d-4-gib", "length"),
            ("e-nested", "nesting-depth"),
            ("f-large", "file-size"),
            ("g-loop", "folder-link"),
            ("h-dangling", "unreadable"),
            ("i-pipe", "special-file"),
            ("j-missing", "unreadable"),
        ]
    );
}

#[test]
fn nothing_analysed_is_exit_code_65() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(classify(&[folder.path()]), (65, vec![]));
    fs::write(folder.path().join("text"), "not DICOM").unwrap();
    let (exit, lines) = classify(&[folder.path()]);
    assert_eq!((exit, lines.len()), (65, 1));
    assert_eq!(lines[0]["status"], "not_analysed");
    assert!(lines[0]["study_uid"].is_null() && lines[0]["logit"].is_null());
    let reason = lines[0]["reason"].as_str().unwrap();
    assert!(reason.starts_with("not-dicom: "), "{reason}");
}

/// The process numbers of a process's children.
fn children(parent: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task"));
    let files = tasks.into_iter().flatten().flatten();
    let texts = files.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let numbers = texts.collect::<Vec<_>>().join(" ");
    numbers.split_whitespace().map(str::to_owned).collect()
}

/// Runs over `n_slices` slices and kills the worker after each line for which `kill` says so.
fn classify_and_kill(n_slices: u32, kill: impl Fn(usize) -> bool) -> Vec<Value> {
    let folder = study(n_slices, EXPLICIT_LE);
    let mut process = edge()
        .args(["classify", "--json"])
        .arg(folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let number = process.id();
    let output = BufReader::new(process.stdout.take().unwrap());
    let lines = output.lines().enumerate().map(|(index, line)| {
        if kill(index) {
            for child in children(number) {
                // It may be gone already.
                drop(Command::new("kill").args(["-9", &child]).output());
            }
        }
        serde_json::from_str(&line.unwrap()).unwrap()
    });
    let lines = lines.collect();
    assert_eq!(process.wait().unwrap().code(), Some(0));
    lines
}

#[test]
fn a_worker_killed_once_costs_no_slice() {
    let lines = classify_and_kill(24, |index| index == 3);
    assert_eq!(of_kind(&lines, "slice").len(), 24);
    assert_eq!(of_kind(&lines, "study")[0]["analysed"], 24);
}

#[test]
fn a_worker_killed_again_and_again_leaves_a_reason_for_each_slice() {
    let lines = classify_and_kill(24, |_| true);
    let slices = of_kind(&lines, "slice");
    assert_eq!(slices.len(), 24);
    for slice in slices {
        let reason = slice["reason"].as_str();
        assert!(
            reason.is_none_or(|reason| reason.starts_with("worker: ")),
            "{reason:?}"
        );
    }
}

#[test]
fn the_table_says_what_it_is_and_never_negative() {
    let folder = study(2, EXPLICIT_LE);
    let output = edge().arg("classify").arg(folder.path()).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(RESEARCH_USE), "{text}");
    assert!(!text.to_lowercase().contains("negative"), "{text}");
    assert_eq!(text.matches(".dcm").count(), 2, "{text}");
}

#[track_caller]
fn check_exit(arguments: &[&str], expected: i32) -> String {
    let output = edge().args(arguments).output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert_eq!(output.status.code(), Some(expected), "{text}");
    text
}

#[test]
fn exit_codes_are_those_of_the_table() {
    check_exit(&["classify"], 2);
    check_exit(&["classify", "--threads", "0", "x"], 2);
    check_exit(&["classify", "--kernel", "none", "x"], 2);
    assert!(check_exit(&["--help"], 0).contains("65  bad data"));
    assert!(check_exit(&["classify", "--help"], 0).contains("Examples:"));
    check_exit(&["classify", "--model", "/nonexistent", "x"], 78);
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.onnx");
    fs::write(&model, "not ONNX").unwrap();
    check_exit(&["classify", "--model", model.to_str().unwrap(), "x"], 65);
    check_exit(&["classify", "--tensors", "/proc/nowhere", "x"], 73);
}

#[test]
fn every_kernel_and_number_of_threads_gives_the_same_bits() {
    let folder = study(2, EXPLICIT_LE);
    let logits = |arguments: &[&str]| {
        let mut all = vec![folder.path()];
        all.extend(arguments.iter().map(Path::new));
        let (exit, lines) = classify(&all);
        assert_eq!(exit, 0);
        let slices = of_kind(&lines, "slice");
        let logits = slices.iter().map(|slice| slice["logit"].to_string());
        logits.collect::<Vec<_>>()
    };
    let expected = logits(&["--kernel", "scalar", "--threads", "1"]);
    assert_eq!(logits(&["--threads", "1"]), expected);
    assert_eq!(logits(&["--threads", "3"]), expected);
}

#[test]
fn bench_prints_the_fields_of_the_contract() {
    let arguments = "bench --slices 3 --threads 1 --explain --json";
    let output = edge().args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success());
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    check_fields(
        &result,
        "model kernel threads slices micros_median micros_min load_micros resident_bytes peak_bytes macs share_of_peak",
    );
    let number = |field: &str| result[field].as_u64().unwrap();
    assert!(number("peak_bytes") >= number("resident_bytes"));
    assert!(number("micros_median") >= number("micros_min"));
    assert!(number("macs") > 0);
    assert!(!result["layers"].as_array().unwrap().is_empty());
}

#[test]
fn real_files_all_have_an_answer_or_a_reason() {
    let Ok(folder) = std::env::var("PE_EDGE_REAL_DATA") else {
        eprintln!("PE_EDGE_REAL_DATA is not set: real files were not tested");
        return;
    };
    let folder = Path::new(&folder);
    assert!(folder.is_dir(), "{} is missing", folder.display());
    let (exit, lines) = classify(&[folder]);
    assert_eq!(exit, 0);
    let slices = of_kind(&lines, "slice");
    for slice in &slices {
        let is_analysed = slice["status"] == "analysed";
        assert_eq!(is_analysed, slice["reason"].is_null(), "{slice}");
        assert!(!slice["reason"].to_string().contains("worker: "), "{slice}");
    }
    let files: BTreeSet<&str> = slices
        .iter()
        .filter_map(|slice| slice["file"].as_str())
        .collect();
    let found = Command::new("find")
        .arg(folder)
        .args(["-type", "f"])
        .output()
        .unwrap();
    let n_files = String::from_utf8(found.stdout).unwrap().lines().count();
    assert_eq!(files.len(), n_files);

    let (exit, lines) = classify(&[&folder.join("chest_ct_contrast_series")]);
    assert_eq!(exit, 0);
    let analysed = lines.iter().filter(|line| line["status"] == "analysed");
    let studies = of_kind(&lines, "study");
    assert_eq!((analysed.count(), studies.len()), (40, 1));
    let counts = ["slices", "analysed"].map(|field| studies[0][field].as_u64());
    assert_eq!(counts, [Some(40), Some(40)]);
}
