use std::fs;

use super::run::append;
use super::*;
use crate::cache::{CacheManifest, FORMAT_VERSION};
use crate::checkpoint;
use crate::index::{Part, Row, to_csv};
use crate::quantization_aware;
use crate::random::Random;
use shared::TENSOR_BYTES;
use shared::manifest::DataKind;
use shared::uid::Uid;

/// A cache of `n` images of noise, those with PE a little brighter; two of ten are for validation.
fn cache(folder: &Path, n: usize) -> Cache {
    cache_where(folder, n, |_| (), |_| ())
}

/// The same, with rows and manifest changed.
fn cache_where(
    folder: &Path,
    n: usize,
    change_row: impl Fn(&mut Row),
    change_manifest: impl Fn(&mut CacheManifest),
) -> Cache {
    let mut random = Random::new(9, 0);
    let (mut tensors, mut rows) = (Vec::new(), Vec::new());
    for index in 0..n {
        let pe_present = index % 2 == 1;
        let offset = if pe_present { 40 } else { 0 };
        tensors
            .extend((0..TENSOR_BYTES).map(|_| u8::try_from(random.below(200) + offset).unwrap()));
        let uid = |text: String| Uid::new(&text).unwrap();
        rows.push(Row {
            study_uid: uid(format!("1.2.{index}")),
            series_uid: uid(format!("1.2.{index}.1")),
            sop_uid: uid(format!("1.2.{index}.1.1")),
            part: if index % 10 < 8 {
                Part::Train
            } else {
                Part::Val
            },
            pe_present,
            exam_labels: None,
            z_mm: None,
            manufacturer: None,
            spacing_mm: None,
        });
    }
    rows.iter_mut().for_each(change_row);
    let index = to_csv(&rows).unwrap();
    let mut manifest = CacheManifest {
        format_version: FORMAT_VERSION,
        preprocess: shared::spec::PreprocessSpec::default(),
        kind: DataKind::Phantom,
        source: "test".into(),
        source_digest: "0".repeat(64),
        split: "study".into(),
        n_rows: n as u64,
        tensors_digest: "1".repeat(64),
        index_digest: blake3::hash(&index).to_hex().to_string(),
        left_out: Vec::new(),
    };
    change_manifest(&mut manifest);
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("tensors.u8"), tensors).unwrap();
    fs::write(folder.join("index.csv"), index).unwrap();
    fs::write(
        folder.join("manifest.json"),
        serde_json::to_string(&manifest).unwrap(),
    )
    .unwrap();
    Cache::open(folder).unwrap()
}

fn options() -> TrainOptions {
    TrainOptions {
        width: 0.001,
        epochs: Some(2),
        batch: 6,
        seed: 5,
        ..TrainOptions::default()
    }
}

fn weights(run: &Path) -> Vec<u8> {
    fs::read(run.join(WEIGHTS_FILE)).unwrap()
}

#[test]
fn weights_are_the_same_bits_for_every_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(&folder.path().join("cache"), 20);
    let mut found = Vec::new();
    for threads in [1, 2, 5] {
        let out = folder.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let summary = pool.install(|| train(&options(), &cache, &out)).unwrap();
        assert_eq!(
            (summary.steps, summary.epochs, summary.is_stopped),
            (6, 2, false)
        );
        found.push(weights(&out));
    }
    assert!(found.iter().all(|weights| *weights == found[0]));
    let history = fs::read_to_string(folder.path().join("1/history.csv")).unwrap();
    assert_eq!(history.lines().count(), 7);
    assert!(history.starts_with("step,epoch,loss\n1,1,"));
}

#[test]
fn stopped_run_continues_to_the_same_weights_and_tables() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(&folder.path().join("cache"), 20);
    let options = TrainOptions {
        augmentation: Augmentation {
            flip: true,
            shift: 3,
        },
        ..options()
    };
    let whole = folder.path().join("whole");
    train(&options, &cache, &whole).unwrap();
    let parts = folder.path().join("parts");
    // Stopped before its first step, which leaves a checkpoint; then, as by a kill, rows written past it.
    assert!(
        train_until(&options, &cache, &parts, &AtomicBool::new(true))
            .unwrap()
            .is_stopped
    );
    let resumed = TrainOptions {
        resume: true,
        ..options.clone()
    };
    writeln!(append(&parts.join("history.csv")).unwrap(), "1,1,9.5").unwrap();
    assert!(
        train(&options, &cache, &parts).is_err(),
        "a run is not overwritten without --resume"
    );
    train(&resumed, &cache, &parts).unwrap();
    assert!(weights(&whole) == weights(&parts));
    let history = |run: &Path| fs::read_to_string(run.join("history.csv")).unwrap();
    assert_eq!(history(&whole), history(&parts));
    let resumed_once = resumed.clone();
    let other = TrainOptions { seed: 6, ..resumed };
    let message = format!("{:#}", train(&other, &cache, &parts).unwrap_err());
    assert!(message.contains("started with seed 5, not 6;"), "{message}");
    let again = train(&resumed_once, &cache, &parts).unwrap();
    let last = fs::read_to_string(parts.join("epochs.csv")).unwrap();
    let last = last.lines().last().unwrap().split(',').nth(1).unwrap();
    assert_eq!(again.loss, last.parse().ok());
    assert_eq!((again.n_images, again.steps), (0, 6));
}

#[test]
fn frozen_backbone_keeps_its_weights_and_needs_to_know_where_they_come_from() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(&folder.path().join("cache"), 10);
    let frozen = TrainOptions {
        model: "resnet50-frozen".into(),
        ..options()
    };
    let error = train(&frozen, &cache, &folder.path().join("none")).unwrap_err();
    assert!(format!("{error:#}").contains("--random-init"), "{error:#}");
    let random = TrainOptions {
        random_init: true,
        ..frozen.clone()
    };
    let run = folder.path().join("run");
    train(&random, &cache, &run).unwrap();
    // Its own weights are first weights too, as torchvision's are; those it began with come back from a run of no epochs.
    let first = folder.path().join("first");
    let begun = TrainOptions {
        epochs: Some(0),
        ..random
    };
    train(&begun, &cache, &first).unwrap();
    let read = |run: &Path| {
        crate::export::read_weights(&run.join(WEIGHTS_FILE))
            .unwrap()
            .2
    };
    let (before, after) = (read(&first), read(&run));
    for (name, weight) in &before {
        assert_eq!(*weight == after[name], !name.starts_with("fc."), "{name}");
    }
    let from_file = TrainOptions {
        init: Some(first.join(WEIGHTS_FILE)),
        ..frozen
    };
    let again = folder.path().join("again");
    train(&from_file, &cache, &again).unwrap();
    assert!(read(&again) == after);
}

#[test]
fn quantization_aware_run_continues_to_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(&folder.path().join("cache"), 20);
    let options = TrainOptions {
        model: "vanilla".into(),
        qat_epochs: 1,
        ..options()
    };
    let whole = folder.path().join("whole");
    let summary = train(&options, &cache, &whole).unwrap();
    assert!(whole.join(quantization_aware::FILE_NAME).exists());
    let parts = folder.path().join("parts");
    let stop = AtomicBool::new(true);
    assert!(
        train_until(&options, &cache, &parts, &stop)
            .unwrap()
            .is_stopped
    );
    let resumed = TrainOptions {
        resume: true,
        ..options.clone()
    };
    // The second time nothing is left to train, as after a kill between the last checkpoint and the weights.
    for _ in 0..2 {
        let again = train(&resumed, &cache, &parts).unwrap();
        assert!(weights(&whole) == weights(&parts));
        assert_eq!(again.val_loss, summary.val_loss);
    }
    let transfer = TrainOptions {
        model: "resnet50".into(),
        random_init: true,
        ..options
    };
    let error = train(&transfer, &cache, &folder.path().join("other")).unwrap_err();
    assert_eq!(crate::exit::code_of(&error), Exit::Usage);
}

#[test]
fn quantization_aware_run_takes_slices_prepared_as_the_jpeg_copy() {
    let folder = tempfile::tempdir().unwrap();
    let as_jpeg = |manifest: &mut CacheManifest| {
        manifest.preprocess.normalisation = shared::spec::Normalisation::SeriesMinmax;
    };
    let cache = cache_where(&folder.path().join("cache"), 20, |_| (), as_jpeg);
    let options = TrainOptions {
        model: "vanilla".into(),
        epochs: Some(1),
        qat_epochs: 1,
        ..options()
    };
    let run = folder.path().join("run");
    train(&options, &cache, &run).unwrap();
    assert!(run.join(quantization_aware::FILE_NAME).exists());
}

#[test]
fn early_stopping_without_validation_slices_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let train_alone = |row: &mut Row| row.part = Part::Train;
    let cache = cache_where(&folder.path().join("cache"), 10, train_alone, |_| ());
    let patient = TrainOptions {
        patience: Some(1),
        ..options()
    };
    let error = train(&patient, &cache, &folder.path().join("run")).unwrap_err();
    assert!(error.to_string().contains("--patience"), "{error}");
}

#[test]
fn a_cache_is_no_run_folder() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(folder.path(), 10);
    let before = fs::read(folder.path().join("manifest.json")).unwrap();
    let error = train(&options(), &cache, folder.path()).unwrap_err();
    assert_eq!(crate::exit::code_of(&error), Exit::CannotWrite);
    assert_eq!(
        fs::read(folder.path().join("manifest.json")).unwrap(),
        before
    );
}

#[test]
fn best_weights_from_before_the_quantized_epochs_name_no_ranges() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(&folder.path().join("cache"), 20);
    let options = TrainOptions {
        model: "vanilla".into(),
        qat_epochs: 1,
        patience: Some(5),
        ..options()
    };
    let run = folder.path().join("run");
    train_until(&options, &cache, &run, &AtomicBool::new(true)).unwrap();
    // As if the first weights were such that no epoch can better them.
    let mut network =
        Network::new(checked(&options).unwrap(), options.width, 5, &Device::Cpu).unwrap();
    let fingerprint = fingerprint(&options, &cache).unwrap();
    let found = checkpoint::load(&run, network.parameters(), &fingerprint).unwrap();
    let (moments, position) = found.unwrap();
    let position = Position {
        best_loss: 0.0,
        ..position
    };
    checkpoint::save(
        &run,
        network.parameters(),
        &moments,
        &position,
        &fingerprint,
    )
    .unwrap();
    let split = Split {
        by: options.split,
        seed: options.seed,
    };
    network.provenance = provenance::of_training(split, &cache).unwrap();
    network.save(&run.join(BEST_FILE)).unwrap();
    let resumed = TrainOptions {
        resume: true,
        ..options
    };
    let summary = train(&resumed, &cache, &run).unwrap();
    assert_eq!((summary.epochs, summary.best_epoch), (2, Some(0)));
    assert!(run.join(quantization_aware::FILE_NAME).exists());
    assert!(weights(&run) == fs::read(run.join(BEST_FILE)).unwrap());
}

#[test]
fn order_file_fixes_the_batches() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(&folder.path().join("cache"), 10);
    let order = folder.path().join("order.csv");
    fs::write(&order, "0 1 2\n3 4\n").unwrap();
    let ordered = TrainOptions {
        order: Some(order.clone()),
        ..options()
    };
    assert_eq!(
        train(&ordered, &cache, &folder.path().join("a"))
            .unwrap()
            .steps,
        2
    );
    fs::write(&order, "0 10\n").unwrap();
    assert!(train(&ordered, &cache, &folder.path().join("b")).is_err());
}

#[test]
fn sgd_loss_falls_on_separable_images() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(&folder.path().join("cache"), 20);
    let vanilla = TrainOptions {
        model: "vanilla".into(),
        epochs: Some(6),
        learning_rate: Some(0.03),
        ..options()
    };
    train(&vanilla, &cache, &folder.path().join("run")).unwrap();
    let epochs = fs::read_to_string(folder.path().join("run/epochs.csv")).unwrap();
    let loss = |line: &str| line.split(',').nth(1).unwrap().parse::<f64>().unwrap();
    let losses: Vec<f64> = epochs.lines().skip(1).map(loss).collect();
    assert!(losses[5] < losses[0], "{losses:?}");
}

#[test]
fn early_stopping_takes_the_best_epoch_and_says_which() {
    let folder = tempfile::tempdir().unwrap();
    // Labels exchanged in the validation part: what is learnt makes its loss grow.
    let exchange = |row: &mut Row| row.pe_present ^= row.part == Part::Val;
    let cache = cache_where(&folder.path().join("cache"), 20, exchange, |_| ());
    let eager = TrainOptions {
        model: "vanilla".into(),
        epochs: Some(8),
        patience: Some(1),
        learning_rate: Some(0.03),
        ..options()
    };
    let out = folder.path().join("run");
    let summary = train(&eager, &cache, &out).unwrap();
    let best = summary.best_epoch.unwrap();
    assert!(best < summary.epochs && summary.epochs < 8, "{summary:?}");
    let epochs = fs::read_to_string(out.join("epochs.csv")).unwrap();
    let losses: Vec<f64> = epochs
        .lines()
        .skip(1)
        .map(|line| line.split(',').nth(2).unwrap().parse().unwrap())
        .collect();
    let least = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(losses[best as usize - 1].to_bits(), least.to_bits());
    assert!((summary.val_loss.unwrap() - least).abs() < 1e-12);
    assert_eq!(weights(&out), fs::read(out.join(BEST_FILE)).unwrap());
}

#[test]
fn epochs_table_holds_the_learning_rate_of_each_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let cache = cache(&folder.path().join("cache"), 10);
    let stepped = TrainOptions {
        epochs: Some(3),
        schedule: Schedule::Step,
        ..options()
    };
    let out = folder.path().join("run");
    train(&stepped, &cache, &out).unwrap();
    let epochs = fs::read_to_string(out.join("epochs.csv")).unwrap();
    let rates = epochs.lines().skip(1);
    let rates = rates.map(|line| line.split(',').nth(4).unwrap().parse::<f64>().unwrap());
    for (rate, expected) in rates.zip([1e-3, 1e-4, 1e-5]) {
        assert!((rate / expected - 1.0).abs() < 1e-9, "{rate}");
    }
}
