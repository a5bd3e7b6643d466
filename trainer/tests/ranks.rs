//! Several processes train one network: the program itself, over loopback.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

mod program;

use std::net::TcpListener;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use program::{PATIENCE, TRIALS, done, prepared, trainer};
use trainer::export::read_weights;

/// Plain SGD, where a difference in rounding stays one: Adam's first steps have the size of the rate whatever the gradient's.
fn arguments<'a>(cache: &'a str, epochs: &'a str, out: &'a str) -> Vec<&'a str> {
    let options = "train --model vanilla --width 0.01 --batch 5 --shift 2";
    options
        .split(' ')
        .chain(["--data", cache, "--epochs", epochs, "--out", out])
        .collect()
}

/// One of `n` ranks, not awaited.
fn rank(arguments: &[&str], rank: u32, n: u32, port: u16) -> Child {
    let mut command = trainer(arguments);
    command
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", n.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string());
    command.spawn().unwrap()
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Largest difference between the weights of two runs.
fn difference(a: &str, b: &str) -> f32 {
    let read = |run: &str| {
        read_weights(&Path::new(run).join("model.safetensors"))
            .unwrap()
            .2
    };
    let (a, b) = (read(a), read(b));
    assert_eq!(a.len(), b.len());
    let mut largest = 0.0_f32;
    for (name, weight) in &a {
        for (a, b) in weight.values.iter().zip(&b[name].values) {
            largest = largest.max((a - b).abs());
        }
    }
    largest
}

#[test]
fn two_ranks_equal_one_with_the_same_batch() {
    let folder = tempfile::tempdir().unwrap();
    let cache = prepared(folder.path(), "16");
    let [one, two] =
        ["one", "two"].map(|name| folder.path().join(name).to_str().unwrap().to_owned());
    done(trainer(&arguments(&cache, "3", &one)));
    let (ranked, port) = (arguments(&cache, "3", &two), free_port());
    let ranks = [0, 1].map(|number| rank(&ranked, number, 2, port));
    for (number, child) in ranks.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rank {number}: {message}");
        // Rank 0 alone speaks.
        assert_eq!(output.stdout.is_empty(), number > 0);
    }
    let found = difference(&one, &two);
    assert!(found <= 1e-6, "{found}");
    let losses = |run: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(Path::new(run).join("history.csv")).unwrap();
        let rows = text.lines().skip(1);
        rows.map(|row| row.rsplit(',').next().unwrap().parse().unwrap())
            .collect()
    };
    let (one, two) = (losses(&one), losses(&two));
    assert_eq!(one.len(), two.len());
    assert!(one.len() >= 6 && one.iter().zip(&two).all(|(a, b)| (a - b).abs() <= 1e-6));
}

/// Kills the second of three ranks after some epochs; false where the run ended before.
fn is_broken(arguments: &[&str], run: &str) -> bool {
    drop(std::fs::remove_dir_all(run));
    let port = free_port();
    let mut children = [0, 1, 2].map(|number| rank(arguments, number, 3, port));
    let table = Path::new(run).join("epochs.csv");
    let n_lines = || {
        let text = std::fs::read_to_string(&table).unwrap_or_default();
        text.lines().count()
    };
    let begin = Instant::now();
    while n_lines() < 3 {
        assert!(begin.elapsed() < PATIENCE, "no epoch was trained");
        std::thread::sleep(Duration::from_millis(5));
    }
    children[1].kill().unwrap();
    let [first, _, third] = children.map(|child| child.wait_with_output().unwrap());
    if first.status.success() {
        return false;
    }
    for output in [first, third] {
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(69), "{message}");
        assert!(message.contains("rank 1 was lost"), "{message}");
    }
    true
}

#[test]
fn a_run_that_lost_a_rank_says_so_and_goes_on_with_another_number() {
    let folder = tempfile::tempdir().unwrap();
    let cache = prepared(folder.path(), "16");
    let [whole, broken] =
        ["whole", "broken"].map(|name| folder.path().join(name).to_str().unwrap().to_owned());
    let epochs = "10";
    done(trainer(&arguments(&cache, epochs, &whole)));
    let mut resumed = arguments(&cache, epochs, &broken);
    let is_lost = (0..TRIALS).any(|_| is_broken(&resumed, &broken));
    assert!(is_lost, "it always ended before the kill");
    resumed.push("--resume");
    done(trainer(&resumed));
    let found = difference(&whole, &broken);
    assert!(found <= 1e-5, "{found}");
}
