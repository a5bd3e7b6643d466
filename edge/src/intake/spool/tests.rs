//! What the spool promises, each promise with a crash or a fault.

use super::*;
use std::io::Write as _;

fn limits() -> SpoolLimits {
    SpoolLimits {
        segment_bytes: 1 << 20,
        quota_bytes: 1 << 30,
        keep_free_bytes: 0,
        max_object_bytes: 64 << 20,
    }
}

fn open(folder: &Path) -> Arc<Spool> {
    Spool::open(folder, &limits()).unwrap()
}

fn header(name: &str) -> Header {
    Header {
        sequence: 0,
        received_ms: 1_790_000_000_000,
        calling_ae: "CT1".to_owned(),
        address: "127.0.0.1".to_owned(),
        sop_class_uid: "1.2.840.10008.5.1.4.1.1.2".to_owned(),
        sop_instance_uid: name.to_owned(),
        transfer_syntax_uid: "1.2.840.10008.1.2.1".to_owned(),
    }
}

fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

fn put(spool: &Spool, name: &str, object: &[u8]) -> u64 {
    let mut entry = spool.begin(header(name)).unwrap();
    for part in object.chunks(100_000) {
        entry.write(part).unwrap();
    }
    entry.commit_blocking().unwrap()
}

fn get(spool: &Spool, sequence: u64) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let (file, offset, length) = spool.object(sequence).unwrap();
    let mut object = vec![0; usize::try_from(length).unwrap()];
    file.read_exact_at(&mut object, offset).unwrap();
    object
}

fn sequences(spool: &Spool) -> Vec<u64> {
    spool.sequences_after(0).collect()
}

fn only_file(folder: &Path, extension: &str) -> PathBuf {
    let files = std::fs::read_dir(folder).unwrap();
    let mut files = files
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension));
    let file = files.next().unwrap();
    assert_eq!(files.next(), None);
    file
}

#[test]
fn objects_come_back_as_they_were_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let objects: Vec<Vec<u8>> = (0..5).map(|seed| bytes(seed, 300_000)).collect();
    let spool = open(folder.path());
    for (index, object) in objects.iter().enumerate() {
        let sequence = put(&spool, &format!("1.{index}"), object);
        assert_eq!(sequence, index as u64 + 1);
    }
    assert_eq!(*spool.latest().borrow(), 5);
    drop(spool);
    let spool = open(folder.path());
    assert_eq!(sequences(&spool), [1, 2, 3, 4, 5]);
    assert_eq!(*spool.latest().borrow(), 5);
    for (index, object) in objects.iter().enumerate() {
        let sequence = index as u64 + 1;
        assert!(get(&spool, sequence) == *object);
        let found = spool.header(sequence).unwrap();
        assert_eq!(found.sop_instance_uid, format!("1.{index}"));
        assert_eq!(found.sequence, sequence);
    }
    assert_eq!(put(&spool, "1.6", b"x"), 6);
}

#[test]
fn large_object_is_streamed_to_its_own_file_and_never_held() {
    let folder = tempfile::tempdir().unwrap();
    let object = bytes(1, 9 << 20);
    let spool = open(folder.path());
    let mut entry = spool.begin(header("1.1")).unwrap();
    let most = entry.shared.buffered_bytes.load(Ordering::Relaxed);
    assert_eq!(most, 0);
    for part in object.chunks(60_000) {
        entry.write(part).unwrap();
        let held = entry.shared.buffered_bytes.load(Ordering::Relaxed);
        assert!(held <= MAX_BUFFERED_BYTES, "{held}");
    }
    assert_eq!(entry.commit_blocking().unwrap(), 1);
    drop(only_file(folder.path(), "object"));
    drop(spool);
    let spool = open(folder.path());
    assert!(get(&spool, 1) == object);
}

#[test]
fn a_large_object_becomes_durable_while_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    let mut entry = spool.begin(header("1")).unwrap();
    let object = bytes(7, 50 << 20);
    let n_before = spool.counts().sync_calls;
    for part in object.chunks(128 << 10) {
        entry.write(part).unwrap();
    }
    // Whoever stores a slice meanwhile waits for the disk to take 16 MiB, not 50.
    assert_eq!(spool.counts().sync_calls - n_before, 3);
    let sequence = entry.commit_blocking().unwrap();
    assert_eq!(get(&spool, sequence), object);
}

#[test]
fn objects_that_are_stored_hold_no_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    for index in 0..20 {
        put(&spool, &format!("1.{index}"), &bytes(index, 5 << 20));
        put(&spool, &format!("2.{index}"), &bytes(index, 700_000));
    }
    let n_files = std::fs::read_dir(folder.path()).unwrap().count();
    assert!(n_files > 30, "{n_files}");
    let open_files = std::fs::read_dir("/proc/self/fd").unwrap();
    let ours = open_files
        .flatten()
        .filter_map(|one| std::fs::read_link(one.path()).ok())
        .filter(|path| path.starts_with(folder.path()));
    // The folder for its lock, and the segment that is being written.
    assert_eq!(ours.count(), 2);
}

#[test]
fn streamed_object_without_a_commit_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    let mut entry = spool.begin(header("1.1")).unwrap();
    entry.write(&bytes(1, 5 << 20)).unwrap();
    // As after a crash: the file is there, its block is not.
    let left = only_file(folder.path(), "object");
    std::fs::copy(&left, folder.path().join("copy")).unwrap();
    drop(entry);
    assert!(!left.exists());
    drop(spool);
    std::fs::rename(folder.path().join("copy"), &left).unwrap();
    let spool = open(folder.path());
    assert_eq!(sequences(&spool), [] as [u64; 0]);
    assert!(!left.exists());
}

/// Leaves the folder as a crash would: nothing is sealed.
fn crashed(folder: &Path, n_objects: usize) -> PathBuf {
    let spool = open(folder);
    for index in 0..n_objects {
        put(&spool, &format!("1.{index}"), &bytes(index as u64, 10_000));
    }
    let segment = only_file(folder, "segment");
    let unsealed = std::fs::read(&segment).unwrap();
    drop(spool);
    std::fs::write(&segment, unsealed).unwrap();
    segment
}

#[test]
fn torn_tail_is_cut_wherever_it_is_torn() {
    // A record of 10,000 bytes takes three pages.
    for torn_at in [
        2 * 12_288,
        2 * 12_288 + 100,
        2 * 12_288 + 600,
        3 * 12_288 - 4096,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let segment = crashed(folder.path(), 3);
        let mut file = std::fs::read(&segment).unwrap();
        file[torn_at..].fill(0);
        std::fs::write(&segment, file).unwrap();
        let spool = open(folder.path());
        assert_eq!(sequences(&spool), [1, 2], "torn at {torn_at}");
        assert_eq!(std::fs::metadata(&segment).unwrap().len(), 2 * 12_288);
        assert_eq!(put(&spool, "1.9", b"next"), 3);
        drop(spool);
        let spool = open(folder.path());
        assert_eq!(sequences(&spool), [1, 2, 3]);
        assert_eq!(get(&spool, 3), b"next");
    }
}

#[test]
fn bad_page_in_the_middle_costs_one_object_and_stays_away() {
    let folder = tempfile::tempdir().unwrap();
    let segment = crashed(folder.path(), 3);
    let mut file = std::fs::read(&segment).unwrap();
    file[12_288 + 5000] ^= 1;
    std::fs::write(&segment, file).unwrap();
    for _ in 0..2 {
        let spool = open(folder.path());
        assert_eq!(sequences(&spool), [1, 3]);
        assert!(matches!(spool.header(2), Err(SpoolError::Unknown(2))));
        // A newer segment makes this one a sealed one at the next start.
        put(&spool, "1.9", b"next");
        drop(spool);
        std::fs::remove_file(folder.path().join("00000000000000000004.segment")).unwrap();
    }
}

#[test]
fn a_segment_whose_sync_failed_is_checked_though_there_is_a_newer_one() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    for index in 0..3 {
        put(&spool, &format!("1.{index}"), &bytes(index, 10_000));
    }
    let segment = only_file(folder.path(), "segment");
    put(&spool, "1.3", &bytes(3, 1 << 20));
    drop(spool);
    // The block is there, its object is not.
    let mut abandoned = std::fs::read(&segment).unwrap();
    abandoned[12_288 + 5000] ^= 1;
    abandoned.push(0);
    std::fs::write(&segment, abandoned).unwrap();
    let spool = open(folder.path());
    assert_eq!(sequences(&spool), [1, 3, 4]);
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let name = "00000000000000000007.segment";
    std::fs::create_dir(folder.path().join(name)).unwrap();
    let error = Spool::open(folder.path(), &limits()).unwrap_err();
    assert!(error.to_string().contains(name), "{error}");
}

#[test]
fn segments_are_filled_one_after_another() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    for index in 0..5 {
        put(&spool, &format!("1.{index}"), &bytes(index, 400_000));
    }
    drop(spool);
    let spool = open(folder.path());
    assert_eq!(sequences(&spool), [1, 2, 3, 4, 5]);
    let names: Vec<Option<Name>> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| Name::parse(entry.unwrap().file_name().to_str().unwrap()))
        .collect();
    for number in [1, 3, 5] {
        assert!(names.contains(&Some(Name::Segment(number))), "{names:?}");
    }
}

#[test]
fn objects_that_wait_together_share_a_sync() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    put(&spool, "1.0", b"makes the segment");
    let before = spool.counts();
    let object = bytes(1, 50_000);
    let threads = 8;
    let each = 12;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (spool, object) = (&spool, &object);
            scope.spawn(move || {
                for index in 0..each {
                    put(spool, &format!("1.{thread}.{index}"), object);
                }
            });
        }
    });
    let n_objects = threads * each;
    let after = spool.counts();
    let syncs = after.sync_calls - before.sync_calls;
    let payload = object.len() as u64 * n_objects;
    assert_eq!(after.objects as u64, n_objects + 1);
    // Six segments of 1 MiB; each costs a sync of the folder and one for sealing.
    assert!(syncs <= n_objects + 12, "{syncs} syncs");
    let written = after.written_bytes - before.written_bytes;
    assert!(written * 10 <= payload * 11, "{written} of {payload}");
}

#[test]
fn object_alone_takes_one_sync() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    put(&spool, "1.0", b"makes the segment");
    let before = spool.counts().sync_calls;
    for index in 1..=10 {
        put(&spool, &format!("1.{index}"), &bytes(index, 20_000));
    }
    assert_eq!(spool.counts().sync_calls - before, 10);
}

#[test]
fn full_spool_refuses_and_takes_again_after_a_purge() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    spool.set_limits(SpoolLimits {
        quota_bytes: 600_000,
        ..limits()
    });
    put(&spool, "1.1", &bytes(1, 400_000));
    put(&spool, "1.2", &bytes(2, 400_000));
    assert!(matches!(
        spool.begin(header("1.3")),
        Err(SpoolError::Quota { .. })
    ));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(spool.purge(vec![1])).unwrap();
    assert_eq!(sequences(&spool), [2]);
    assert_eq!(put(&spool, "1.3", b"again"), 3);
}

#[test]
fn what_cannot_be_deleted_stays_known_and_the_rest_of_the_batch_goes() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    put(&spool, "1.1", &bytes(1, 5 << 20));
    let (broken, aside) = (
        only_file(folder.path(), "object"),
        folder.path().join("aside"),
    );
    put(&spool, "1.2", &bytes(2, 5 << 20));
    // A folder cannot be opened for writing, by root neither.
    std::fs::rename(&broken, &aside).unwrap();
    std::fs::create_dir(&broken).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let before = spool.counts().used_bytes;
    assert!(matches!(
        runtime.block_on(spool.purge(vec![1, 2])),
        Err(SpoolError::Io(_))
    ));
    assert_eq!(sequences(&spool), [1]);
    assert_eq!(spool.counts().used_bytes, before / 2);
    assert_eq!(only_file(folder.path(), "object"), broken);
    std::fs::remove_dir(&broken).unwrap();
    std::fs::rename(&aside, &broken).unwrap();
    runtime.block_on(spool.purge(vec![1])).unwrap();
    assert_eq!((sequences(&spool), broken.exists()), (Vec::new(), false));
}

#[test]
fn deleting_takes_no_room() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    put(&spool, "1", &bytes(1, 50_000));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(spool.purge(sequences(&spool))).unwrap();
    // The segment that sequences go on from: on a full disk no blocks can be had for it.
    let next = only_file(folder.path(), "segment").metadata().unwrap();
    assert_eq!((next.len(), next.blocks()), (0, 0));
    put(&spool, "2", &bytes(2, 50_000));
    let next = only_file(folder.path(), "segment").metadata().unwrap();
    assert_eq!(next.len(), limits().segment_bytes);
}

#[test]
fn sequences_go_on_after_everything_was_purged() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    for round in 0..3 {
        let spool = open(folder.path());
        assert_eq!(*spool.latest().borrow(), 2 * round);
        put(&spool, "1.1", &bytes(1, 1000));
        put(&spool, "1.2", &bytes(1, 5 << 20));
        runtime.block_on(spool.purge(sequences(&spool))).unwrap();
        assert_eq!(spool.counts().used_bytes, 0);
    }
    let files = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(files, 1, "only the segment that keeps the number");
}

#[test]
fn disk_below_the_watermark_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    spool.set_limits(SpoolLimits {
        keep_free_bytes: u64::MAX,
        ..limits()
    });
    assert!(matches!(spool.room(), Err(SpoolError::DiskFull { .. })));
    spool.set_limits(limits());
    spool.room().unwrap();
}

#[test]
fn object_over_the_limit_is_refused_while_it_comes() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    spool.set_limits(SpoolLimits {
        max_object_bytes: 1000,
        ..limits()
    });
    let mut entry = spool.begin(header("1.1")).unwrap();
    entry.write(&[0; 1000]).unwrap();
    assert!(matches!(
        entry.write(&[0]),
        Err(SpoolError::TooLarge { .. })
    ));
}

#[test]
fn memory_of_all_objects_has_a_budget() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    let part = bytes(1, 3 << 20);
    let mut entries: Vec<Entry> = (0..12)
        .map(|index| spool.begin(header(&format!("1.{index}"))).unwrap())
        .collect();
    for entry in &mut entries {
        entry.write(&part).unwrap();
    }
    let held = spool.shared.buffered_bytes.load(Ordering::Relaxed);
    assert!(held <= BUFFER_BUDGET_BYTES, "{held}");
    for entry in entries {
        entry.commit_blocking().unwrap();
    }
    assert_eq!(spool.shared.buffered_bytes.load(Ordering::Relaxed), 0);
    for sequence in sequences(&spool) {
        assert!(get(&spool, sequence) == part);
    }
}

#[test]
fn folder_has_one_owner() {
    let folder = tempfile::tempdir().unwrap();
    let spool = open(folder.path());
    assert!(matches!(
        Spool::open(folder.path(), &limits()),
        Err(SpoolError::InUse(_))
    ));
    drop(spool);
    drop(open(folder.path()));
}

#[test]
fn lock_that_a_killed_process_left_with_its_child_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let left = File::open(folder.path()).unwrap();
    rustix::fs::flock(&left, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let child = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(left);
    });
    drop(open(folder.path()));
    child.join().unwrap();
}

#[test]
fn foreign_files_in_the_folder_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut foreign = File::create(folder.path().join("notes.txt")).unwrap();
    foreign.write_all(b"not ours").unwrap();
    let spool = open(folder.path());
    put(&spool, "../../etc/passwd", b"a name that a peer chose");
    drop(spool);
    assert_eq!(sequences(&open(folder.path())), [1]);
    assert!(folder.path().join("notes.txt").exists());
}
