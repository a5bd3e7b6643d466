//! Runs of the program on a GPU; where there is none, on the emulated libraries.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

#[path = "emulator/build.rs"]
mod emulator;

use self::emulator::{build, has_gpu};

/// Longest wait for a file of another process.
const PATIENCE: Duration = Duration::from_secs(120);

/// The emulated libraries' folder; nothing where there is a GPU.
fn libraries() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        (!has_gpu()).then(|| {
            let folder = tempfile::tempdir().unwrap().keep();
            build(&folder);
            folder
        })
    });
    folder.as_deref()
}

fn trainer(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trainer"));
    command.args(arguments.split_whitespace());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"] {
        command.env_remove(name);
    }
    if let Some(folder) = libraries() {
        command.env("LD_LIBRARY_PATH", folder);
    }
    command
}

#[track_caller]
fn done(mut command: Command) -> Output {
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    output
}

/// A cache, and the folder it is in.
fn prepared() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache").to_str().unwrap().to_owned();
    done(trainer(&format!(
        "prepare --phantom 16 --slices 6 --matrix 64 --seed 4 --out {cache}"
    )));
    (folder, cache)
}

/// Two epochs of three steps, the last of which is shorter; images are mirrored and moved.
fn run(cache: &str, out: &Path, options: &str) -> String {
    format!(
        "train --model final --width 0.001 --batch 4 --images 10 --epochs 2 --flip --shift 3 --data {cache} --out {} {options}",
        out.display()
    )
}

fn losses(out: &Path) -> Vec<f64> {
    let history = std::fs::read_to_string(out.join("history.csv")).unwrap();
    let lines = history.lines().skip(1);
    lines
        .map(|line| line.rsplit(',').next().unwrap().parse().unwrap())
        .collect()
}

fn weights(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model.safetensors")).unwrap()
}

#[test]
fn a_run_follows_the_cpu_and_is_the_same_by_every_way_of_data() {
    let (folder, cache) = prepared();
    let out = |name: &str| folder.path().join(name);
    done(trainer(&run(&cache, &out("cpu"), "--device cpu")));
    let expected = losses(&out("cpu"));
    assert_eq!(expected.len(), 6);
    for (precision, bound) in [("f32", 1e-4), ("bf16", 2e-2)] {
        let name = format!("gpu-{precision}");
        let options = format!("--device cuda:0 --precision {precision} --json");
        let output = done(trainer(&run(&cache, &out(&name), &options)));
        let found = losses(&out(&name));
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= bound * expected.max(0.05),
                "{precision}: {found} not {expected}"
            );
        }
        let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(summary["gpu"]["precision"], precision);
        assert!(summary["val_loss"].as_f64().unwrap().is_finite());
    }
    // Images step by step, streams as late as their waits allow, sums through NCCL: the same bits. Without --device it is the GPU.
    for (name, variable, value) in [
        ("streamed", "PE_EDGE_STREAM_IMAGES", "1"),
        ("nccl", "WORLD_SIZE", "1"),
    ] {
        let mut command = trainer(&run(&cache, &out(name), "--precision f32"));
        command.env(variable, value).env("RANK", "0");
        command.env("CUDA_EMULATOR_ORDER", "lazy");
        done(command);
        assert_eq!(weights(&out(name)), weights(&out("gpu-f32")), "{name}");
    }
}

#[test]
fn transfer_learners_follow_the_cpu() {
    let (folder, cache) = prepared();
    for model in ["resnet50", "resnet50-frozen", "inception-v3"] {
        let run = |device: &str| {
            let out = folder.path().join(format!("{model}-{device}"));
            done(trainer(&format!(
                "train --model {model} --random-init --width 0.001 --batch 4 --images 6 --epochs 1 --flip --data {cache} --out {} --device {device} --precision f32",
                out.display()
            )));
            losses(&out)
        };
        let (expected, found) = (run("cpu"), run("cuda:0"));
        assert_eq!((expected.len(), found.len()), (2, 2));
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() <= 1e-3 * expected.max(0.05),
                "{model}: {found} not {expected}"
            );
        }
    }
}

#[test]
fn compare_trains_on_the_gpu_and_the_tables_name_the_rate_of_the_last_step() {
    let (folder, cache) = prepared();
    let out = |name: &str| folder.path().join(name);
    let options = format!("--width 0.001 --epochs 2 --batch 4 --data {cache}");
    done(trainer(&format!(
        "compare --models adam {options} --out {}",
        out("compared").display()
    )));
    let train = |name: &str, more: &str| {
        let out = out(name);
        let out = out.display();
        done(trainer(&format!(
            "train --model adam --images 800 {options} {more} --out {out}"
        )));
    };
    train("gpu", "--device cuda:0");
    train("cpu", "--device cpu");
    let compared = losses(&out("compared/adam"));
    assert_eq!(compared, losses(&out("gpu")));
    assert_ne!(compared, losses(&out("cpu")));
    let rates = |name: &str| -> Vec<String> {
        let table = std::fs::read_to_string(out(name).join("epochs.csv")).unwrap();
        let lines = table.lines().skip(1);
        lines
            .map(|line| line.split(',').nth(4).unwrap().to_owned())
            .collect()
    };
    train("gpu-cosine", "--device cuda:0 --schedule cosine");
    train("cpu-cosine", "--device cpu --schedule cosine");
    assert_eq!(rates("gpu-cosine"), rates("cpu-cosine"));
}

#[test]
fn a_stopped_run_continues_to_the_same_weights() {
    let (folder, cache) = prepared();
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    done(trainer(&run(
        &cache,
        &whole,
        "--device cuda:0 --precision f32",
    )));
    let child = trainer(&run(&cache, &parts, "--device cuda:0 --precision f32"))
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while !parts.join("history.csv").exists() {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(10));
    }
    let status = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(status.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && message.contains("--resume"),
        "{message}"
    );
    done(trainer(&run(
        &cache,
        &parts,
        "--device cuda:0 --precision f32 --resume",
    )));
    assert_eq!(losses(&parts), losses(&whole));
    assert_eq!(weights(&parts), weights(&whole));
}

#[test]
fn what_cannot_compute_says_so() {
    let (folder, cache) = prepared();
    let refused = |options: &str, code: i32, words: &str| {
        let mut command = trainer(&run(&cache, &folder.path().join("no"), options));
        if words.contains("libcuda") {
            command.env_remove("LD_LIBRARY_PATH");
        }
        let output = command.output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(message.contains(words), "{message}");
    };
    refused("--device cuda:64", 69, "no device cuda:64");
    refused("--device cuda:0 --qat", 2, "--device cpu");
    if !has_gpu() {
        refused("--device cuda:0", 69, "no libcuda here");
    }
}
