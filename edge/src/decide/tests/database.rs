//! What is kept, forgotten, and made anew where it is lost.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use super::*;
use crate::decide::store::{Origin, StoreError};
use crate::decide::studies::deleted_beside;
use crate::intake::clock::Ages;
use crate::send::identity::document_uid;

#[test]
fn a_database_of_a_later_version_is_refused_with_a_message() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.redb");
    drop(Store::open(&path, &Present::default()).unwrap());
    let database = redb::Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta: redb::TableDefinition<'_, &str, u64> = redb::TableDefinition::new("meta");
    transaction
        .open_table(meta)
        .unwrap()
        .insert("schema", 99)
        .unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = Store::open(&path, &Present::default()).unwrap_err();
    assert!(matches!(error, StoreError::Newer { found: 99, .. }));
    assert!(error.to_string().contains("install the later version"));
}

#[test]
fn what_is_too_old_is_forgotten_with_everything_that_belongs_to_it() {
    let mut bench = Bench::new();
    let mut slices = series("1.2", 1.0);
    let mut report = Slice::new("1.8", 1, 0.0).refused("sop-class");
    report.class = DOSE_REPORT;
    slices.push(report);
    bench.receive(&slices);
    bench.complete();
    let store = bench.store();
    assert_eq!(store.forget(Ages::before(RECEIVED_MS), 0).unwrap(), []);
    let old = Ages::before(RECEIVED_MS + 1);
    assert_eq!(store.forget(old, 0).unwrap(), [study_uid()]);
    assert_eq!(store.studies().unwrap(), []);
    let (rows, elements) = store.slices(&study_uid()).unwrap();
    assert!(rows.is_empty() && elements.is_empty());
    assert_eq!(store.statements(&study_uid()).unwrap(), []);
}

#[test]
fn what_came_while_the_clock_was_wrong_goes_with_the_last_of_its_objects() {
    // Ten minutes after 1970 began, and four years ahead.
    for received_ms in [600_000, RECEIVED_MS + 4 * 31_536_000_000] {
        let mut bench = Bench::new();
        let mut slices = series("1.2", 1.0);
        slices
            .iter_mut()
            .for_each(|slice| slice.received_ms = received_ms);
        bench.receive(&slices);
        bench.complete();
        let store = bench.store();
        let now = Ages::before(RECEIVED_MS);
        assert_eq!(store.forget(now, 59).unwrap(), []);
        assert_eq!(store.forget(now, 60).unwrap(), [study_uid()]);
    }
}

#[test]
fn objects_without_an_image_are_forgotten_too() {
    let mut bench = Bench::new();
    let mut report = Slice::new("1.8", 1, 0.0).refused("sop-class");
    report.class = DOSE_REPORT;
    bench.receive(&[report]);
    let store = bench.store();
    assert_eq!(store.slices(&study_uid()).unwrap().0.len(), 1);
    assert_eq!(store.forget(Ages::before(RECEIVED_MS + 1), 0).unwrap(), []);
    assert_eq!(store.slices(&study_uid()).unwrap().0.len(), 0);
}

/// A positive study of which everything has been said, and the document of it.
fn decided() -> (Bench, Uid) {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", 1.0));
    let result = bench.complete();
    assert_eq!(bench.said().len(), 2);
    bench.present.latest = 60;
    bench.next_sequence = 1;
    bench.said.lock().unwrap().clear();
    (bench, document_uid(&result, CT))
}

/// What is stored is decided again: nothing is said on the way, and at the end the same document.
#[track_caller]
fn check_decided_again(mut bench: Bench, document: &Uid) {
    assert_eq!(bench.store().count_studies().unwrap(), (0, 0));
    bench.receive(&series("1.2", 1.0)[..59]);
    assert_eq!(codes(&bench.result().outcome), "pending");
    bench.receive(&series("1.2", 1.0)[59..]);
    let result = bench.complete();
    assert_eq!(bench.said(), [(1, State::Complete, Outcome::Positive)]);
    assert_eq!(document_uid(&result, CT), *document);
    assert_eq!(bench.store().count_studies().unwrap(), (1, 1));
    // After the rebuild a positive is said at once again.
    bench.study = "1.10";
    bench.receive(&series("1.3", 1.0));
    assert_eq!(bench.said().last().unwrap().1, State::Provisional);
}

fn database(bench: &Bench) -> std::path::PathBuf {
    bench.folder.path().join("results.redb")
}

#[test]
fn a_database_that_is_missing_is_made_anew_from_what_is_stored() {
    let (bench, document) = decided();
    std::fs::remove_file(database(&bench)).unwrap();
    assert_eq!(*bench.store().origin(), Origin::Missing);
    check_decided_again(bench, &document);
    // A node that has never run has lost nothing.
    assert_eq!(*Bench::new().store().origin(), Origin::Found);
}

#[test]
fn a_database_that_is_broken_is_set_aside_and_made_anew() {
    type Damage = fn(&[u8]) -> Vec<u8>;
    let damages: [Damage; 4] = [
        |_| b"no database, but a text".to_vec(),
        |whole| whole[..whole.len() / 2].to_vec(),
        |whole| [&[0xA5; 4096], &whole[4096..]].concat(),
        |whole| [&whole[..9], &[0xFF; 512][..], &whole[521..]].concat(),
    ];
    for (index, damage) in damages.iter().enumerate() {
        let (bench, document) = decided();
        let whole = std::fs::read(database(&bench)).unwrap();
        let broken = damage(&whole);
        std::fs::write(database(&bench), &broken).unwrap();
        let store = bench.store();
        assert!(
            matches!(store.origin(), Origin::Broken(_)),
            "damage {index}: {:?}",
            store.origin()
        );
        assert_eq!(std::fs::read(store.aside()).unwrap(), broken);
        drop(store);
        check_decided_again(bench, &document);
    }
}

#[test]
fn a_row_that_cannot_be_read_is_found_at_the_start_after() {
    let (bench, document) = decided();
    let whole = std::fs::read(database(&bench)).unwrap();
    let text = b"\"pixel_digest\"";
    let places = || {
        let windows = whole.windows(text.len()).enumerate();
        windows.filter(|(_, part)| *part == text)
    };
    assert!(places().count() >= 60);
    let file = OpenOptions::new()
        .write(true)
        .open(database(&bench))
        .unwrap();
    for (place, _) in places() {
        file.write_all_at(b"#", place as u64).unwrap();
    }
    // Opening does not look at rows.
    let store = bench.store();
    assert_eq!(*store.origin(), Origin::Found);
    let fault = store.slices(&study_uid()).unwrap_err();
    assert!(fault.is_broken(), "{fault:?}");
    store.suspect();
    drop(store);
    assert!(matches!(bench.store().origin(), Origin::Broken(_)));
    assert_eq!(*bench.store().origin(), Origin::Found, "looked at once");
    check_decided_again(bench, &document);
}

#[test]
fn what_was_set_aside_goes_by_age() {
    let (bench, _) = decided();
    std::fs::write(database(&bench), b"broken").unwrap();
    let store = bench.store();
    let now_ms = crate::decide::now_ms();
    store.forget_aside(Ages::before(now_ms - 60_000)).unwrap();
    assert!(store.aside().exists());
    // Stamped ahead, it counts from when the clock was right.
    store
        .forget_aside(Ages::before(now_ms - 9 * 86_400_000))
        .unwrap();
    assert!(store.aside().exists());
    store.forget_aside(Ages::before(now_ms + 60_000)).unwrap();
    assert!(!store.aside().exists());
    store.forget_aside(Ages::before(now_ms + 60_000)).unwrap();
}

#[test]
fn a_study_that_is_decided_again_from_a_part_of_its_slices_says_so() {
    let (mut bench, document) = decided();
    std::fs::remove_file(database(&bench)).unwrap();
    // The spool has purged the first ten objects.
    bench.present.deleted = deleted_beside(11..=60);
    bench.next_sequence = 11;
    bench.receive(&series("1.2", 1.0)[10..]);
    let result = bench.complete();
    assert!(
        result.remarks[0]
            .starts_with("10 objects came among those of this study and may be missing"),
        "{:?}",
        result.remarks
    );
    assert_ne!(document_uid(&result, CT), document);
}

#[test]
fn deleted_sequences_are_known_beside_those_that_are_kept() {
    assert!(deleted_beside(std::iter::empty()).is_empty());
    assert!(deleted_beside(1..=500).is_empty());
    assert_eq!(deleted_beside([3, 6, 7].into_iter()), [1_u64, 2, 4, 5]);
    let deleted = deleted_beside(std::iter::once(1_000));
    let expected: Vec<u64> = (1..=64).chain(936..=999).collect();
    assert_eq!(deleted, expected);
    assert_eq!(deleted_beside((1..100_000).step_by(2)).len(), 4_096);
}

#[test]
fn studies_are_counted_as_they_come_change_and_go() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    assert_eq!(bench.store().count_studies().unwrap(), (1, 0));
    bench.receive(&series("1.3", 9.0)[..1]);
    let mut changed = series("1.2", 5.0);
    changed.iter_mut().for_each(|slice| slice.pixels = 1);
    bench.receive(&changed);
    assert_eq!(bench.store().count_studies().unwrap(), (1, 1));
    bench.study = "1.10";
    bench.receive(&series("1.4", 9.0));
    assert_eq!(bench.store().count_studies().unwrap(), (2, 2));
    let store = bench.store();
    store.forget(Ages::before(RECEIVED_MS + 1), 0).unwrap();
    assert_eq!(store.count_studies().unwrap(), (0, 0));
}
