//! What `trainer evaluate` leaves behind, and what `trainer export` makes of it.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

mod program;

use std::path::Path;

use program::{done, prepared, refused, trainer};
use shared::RESEARCH_USE;
use trainer::metrics::{Sample, Sorted};

const STUDIES: &str = "60";

fn trained(cache: &str, run: &str, seed: &str) {
    let options = "train --model vanilla --width 0.01 --batch 16 --epochs 1";
    let paths = ["--data", cache, "--out", run, "--seed", seed];
    done(trainer(
        &options.split(' ').chain(paths).collect::<Vec<_>>(),
    ));
}

fn columns(path: &Path, names: &[&str]) -> Vec<Vec<String>> {
    let mut reader = csv::Reader::from_path(path).unwrap();
    let header = reader.headers().unwrap().clone();
    let place = |name: &&str| header.iter().position(|found| found == *name).unwrap();
    let places: Vec<usize> = names.iter().map(place).collect();
    let records = reader.records().map(Result::unwrap);
    records
        .map(|record| {
            places
                .iter()
                .map(|&place| record[place].to_owned())
                .collect()
        })
        .collect()
}

/// AUROC of lines of study, label and score.
fn auroc(lines: &[Vec<String>]) -> f64 {
    let mut studies: Vec<&String> = lines.iter().map(|line| &line[0]).collect();
    studies.sort_unstable();
    let sample = |line: &Vec<String>| Sample {
        study: studies.binary_search(&&line[0]).unwrap(),
        pe_present: line[1] == "1",
        logit: line[2].parse().unwrap(),
    };
    Sorted::new(lines.iter().map(sample).collect())
        .measure(0.0)
        .values[0]
}

#[test]
fn the_report_goes_elsewhere_with_its_curves_and_the_logits_it_rests_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (cache, run, out) = (prepared(folder.path(), STUDIES), path("run"), path("out"));
    trained(&cache, &run, "1");
    let model = format!("{run}/model.safetensors");
    done(trainer(&[
        "evaluate", "--model", &model, "--data", &cache, "--out", &out,
    ]));
    let out = Path::new(&out);
    let report = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(report.contains(">Training</h3>"));
    for name in [
        "roc.svg",
        "precision-recall.svg",
        "reliability.svg",
        "study-scores.svg",
    ] {
        let svg = std::fs::read_to_string(out.join(name)).unwrap();
        assert!(svg.contains(RESEARCH_USE), "{name}");
    }
    let metrics = std::fs::read_to_string(out.join("metrics.json")).unwrap();
    let metrics: serde_json::Value = serde_json::from_str(&metrics).unwrap();
    let slices = columns(
        &out.join("predictions.csv"),
        &["study_uid", "pe_present", "logit"],
    );
    assert_eq!(metrics["slice"]["n"], slices.len());
    let close = |found: f64, level: &str| {
        let told = metrics[level]["auroc"]["value"].as_f64().unwrap();
        assert!((found - told).abs() < 1e-9, "{level}: {found} {told}");
    };
    close(auroc(&slices), "slice");
    let studies = columns(
        &out.join("studies.csv"),
        &["study_uid", "pe_present", "score"],
    );
    assert_eq!(metrics["study"]["n"], studies.len());
    close(auroc(&studies), "study");
    // Every label column is a subgroup.
    let groups = metrics["subgroups"].as_array().unwrap();
    for label in trainer::index::EXAM_LABELS {
        assert!(groups.iter().any(|group| group["name"] == label), "{label}");
    }
}

#[test]
fn export_takes_the_figures_of_its_own_weights_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (cache, own, other) = (prepared(folder.path(), STUDIES), path("own"), path("other"));
    trained(&cache, &own, "1");
    trained(&cache, &other, "2");
    let model = format!("{own}/model.safetensors");
    done(trainer(&["evaluate", "--model", &model, "--data", &cache]));
    let file = path("model.onnx");
    done(trainer(&["export", "--run", &own, "--out", &file]));
    std::fs::copy(
        format!("{own}/manifest.json"),
        format!("{other}/manifest.json"),
    )
    .unwrap();
    let (code, message) = refused(trainer(&["export", "--run", &other, "--out", &file]));
    assert_eq!(code, 65, "{message}");
    assert!(message.contains("manifest.json is not of"), "{message}");
    let (code, message) = refused(trainer(&[
        "export",
        "--random-init",
        "--model",
        "final",
        "--width",
        "0",
        "--out",
        &file,
    ]));
    assert_eq!(code, 2, "{message}");
    assert!(message.contains("above 0"), "{message}");
}
