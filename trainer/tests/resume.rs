//! A run that is killed with SIGKILL, optimiser state and all, goes on to the weights of one that was not.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

mod program;

use std::path::Path;
use std::time::{Duration, Instant};

use program::{PATIENCE, TRIALS, done, prepared, trainer};

const EPOCHS: &str = "10";

/// Adam, a schedule, augmentation, class weights: all that a run carries from step to step.
fn arguments<'a>(cache: &'a str, out: &'a str) -> Vec<&'a str> {
    let options = "train --model final --width 0.01 --batch 5 --shift 2 --flip --schedule cosine --class-weights --sampling all";
    options
        .split(' ')
        .chain(["--data", cache, "--epochs", EPOCHS, "--out", out])
        .collect()
}

fn n_lines(path: &Path) -> usize {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().count()
}

/// Kills a run with SIGKILL once it has trained more than `n_epochs` epochs; false where it ended before.
fn is_killed(arguments: &[&str], run: &str, n_epochs: usize) -> bool {
    let mut child = trainer(arguments).spawn().unwrap();
    let begin = Instant::now();
    while n_lines(&Path::new(run).join("epochs.csv")) <= n_epochs {
        assert!(begin.elapsed() < PATIENCE, "no epoch was trained");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    !child.wait().unwrap().success()
}

#[test]
fn a_run_killed_by_sigkill_goes_on_to_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let cache = prepared(folder.path(), "16");
    let (whole, killed) = (path("whole"), path("killed"));
    done(trainer(&arguments(&cache, &whole)));
    let mut resumed = arguments(&cache, &killed);
    resumed.push("--resume");
    // Killed twice: in a first process, and in one that was itself resumed.
    let is_killed_twice = |_| {
        drop(std::fs::remove_dir_all(&killed));
        [2, 5].iter().all(|&n| is_killed(&resumed, &killed, n))
    };
    assert!(
        (0..TRIALS).any(is_killed_twice),
        "it always ended before the kill"
    );
    assert!(!Path::new(&killed).join("model.safetensors").exists());
    done(trainer(&resumed));
    let read = |run: &str, name: &str| std::fs::read(Path::new(run).join(name)).unwrap();
    for name in ["model.safetensors", "checkpoint.safetensors", "history.csv"] {
        assert!(read(&whole, name) == read(&killed, name), "{name}");
    }
    // What is finished stays so, and says so.
    let said = done(trainer(&resumed));
    assert!(said.contains("nothing was left to train"), "{said}");
    assert!(!said.contains("NaN"), "{said}");
}
