//! The second way in: files that appear in a folder.
//!
//! In: a folder that others write to. Out: each complete DICOM file in the spool and gone from the folder, each other file in quarantine
//! with a reason. A file is complete when its writer has closed it or renamed it into place, or, where the file system does not tell (network mounts),
//! when it has not changed for [`SETTLED`]. A lost event costs time, never a file: the folder is looked through every [`RESCAN`]. Without
//! room files stay where they are. Names are never trusted: links are not followed, and no name is used for anything of ours.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode, ModifyKind, RenameMode};
use notify::{EventKind, RecursiveMode, Watcher};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::spool::{Header, SpoolError};
use super::{Intake, classes, part10, unix_ms};

/// How often the folder is looked through without an event.
const RESCAN: Duration = Duration::from_secs(5);
/// How long a file whose writer we did not see must stay the same.
const SETTLED: Duration = Duration::from_secs(10);
/// How often the end of the node is looked for.
const TICK: Duration = Duration::from_millis(200);
/// Closed files that wait; more are found by looking through the folder.
const MAX_CLOSED: usize = 512;
/// Files that are looked at in one round; the others come in the next ones.
const MAX_FILES: usize = 10_000;
/// Folders within folders.
const MAX_DEPTH: usize = 8;
/// Bytes of a file that are read at a time; its meta information must lie in the first of them.
const CHUNK_BYTES: usize = 256 << 10;

/// Why a file is in quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Reason {
    /// It has no preamble and file meta information.
    #[error("not a DICOM file")]
    NotDicom,
    /// Its SOP class is not accepted.
    #[error("SOP class not accepted")]
    SopClass,
    /// This build does not decode its transfer syntax.
    #[error("transfer syntax not supported")]
    TransferSyntax,
    /// It is larger than objects may be.
    #[error("larger than max_object_mib")]
    TooLarge,
}

/// A file as it was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    inode: u64,
    bytes: u64,
    modified: Option<SystemTime>,
}

/// What is known of the files of the folder between two rounds.
#[derive(Debug, Default)]
struct Memory {
    /// Not complete yet: as seen, and since when.
    settling: HashMap<PathBuf, (Seen, Instant)>,
    /// Taken, but could not be removed.
    taken: HashMap<PathBuf, Seen>,
}

/// Paths of files that their writers have closed.
#[derive(Debug, Default)]
struct Closed {
    paths: Mutex<heapless::Deque<PathBuf, MAX_CLOSED>>,
    wake: Condvar,
}

/// What became of a file.
enum Taken {
    Stored,
    Quarantined(Reason),
    NoRoom,
    /// Somebody wrote to it while it was read.
    Changed,
}

/// Takes files until the node stops. Runs on a thread of its own; follows the configuration when it changes.
pub(crate) fn run(intake: &Arc<Intake>, runtime: &Handle, stopping: &watch::Receiver<bool>) {
    let mut watched: Option<(PathBuf, Option<notify::RecommendedWatcher>)> = None;
    let closed = Arc::new(Closed::default());
    let mut memory = Memory::default();
    let mut looked_through: Option<Instant> = None;
    while !is_over(stopping) {
        let folder = intake.config.borrow().watch_folder.clone();
        let Some(folder) = folder else {
            watched = None;
            std::thread::sleep(TICK);
            continue;
        };
        if watched.as_ref().is_none_or(|(path, _)| *path != folder) {
            watched = Some((folder.clone(), watcher(&folder, &closed)));
            memory = Memory::default();
            looked_through = None;
        }
        let ready = closed.take();
        for path in ready {
            if path.starts_with(&folder) {
                memory.consider(intake, runtime, &path, true);
            }
        }
        if looked_through.is_none_or(|at| at.elapsed() >= RESCAN) {
            looked_through = Some(Instant::now());
            let mut files = Vec::new();
            list(&folder, MAX_DEPTH, &mut files);
            memory.forget_all_but(&files);
            for path in &files {
                if is_over(stopping) {
                    return;
                }
                memory.consider(intake, runtime, path, false);
            }
        }
    }
}

/// Whether the node stops, or has not even started.
fn is_over(stopping: &watch::Receiver<bool>) -> bool {
    *stopping.borrow() || stopping.has_changed().is_err()
}

fn watcher(folder: &Path, closed: &Arc<Closed>) -> Option<notify::RecommendedWatcher> {
    let closed = Arc::clone(closed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        let Ok(event) = event else { return };
        let is_complete = matches!(
            event.kind,
            EventKind::Access(AccessKind::Close(AccessMode::Write))
                | EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both))
        );
        if is_complete && let Some(path) = event.paths.into_iter().next_back() {
            closed.add(path);
        }
    });
    let watching = watcher.and_then(|mut watcher| {
        watcher.watch(folder, RecursiveMode::Recursive)?;
        Ok(watcher)
    });
    watching
        .inspect_err(|error| tracing::warn!(%error, "folder is only looked through"))
        .ok()
}

impl Closed {
    fn add(&self, path: PathBuf) {
        let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        // A path without room is found when the folder is looked through.
        drop(paths.push_back(path));
        self.wake.notify_one();
    }

    fn take(&self) -> Vec<PathBuf> {
        let paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .wake
            .wait_timeout_while(paths, TICK, |paths| paths.is_empty());
        let mut paths = match waited {
            Ok((paths, _)) => paths,
            Err(poisoned) => poisoned.into_inner().0,
        };
        std::iter::from_fn(|| paths.pop_front()).collect()
    }
}

/// Regular files below a folder, in the order of names. Links are left alone.
fn list(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    let mut entries: Vec<_> = entries.flatten().take(MAX_FILES).collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if files.len() >= MAX_FILES {
            return;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            Ok(kind) if kind.is_dir() && depth > 0 => list(&entry.path(), depth - 1, files),
            _ => {}
        }
    }
}

/// Whether a name says that the file is not for us yet: hidden, or a usual name of something unfinished.
fn is_unfinished_name(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with('.'))
        || path
            .extension()
            .and_then(|extension| extension.to_str())
            .is_some_and(|extension| matches!(extension, "part" | "tmp" | "partial" | "filepart"))
}

impl Memory {
    /// Takes a file when it is complete.
    fn consider(&mut self, intake: &Intake, runtime: &Handle, path: &Path, is_closed: bool) {
        if is_unfinished_name(path) {
            return;
        }
        let Some((seen, mut file)) = open(path) else {
            return;
        };
        if self.taken.get(path) == Some(&seen) {
            return;
        }
        if !is_closed && !self.is_settled(path, seen) {
            return;
        }
        let taken = match take(intake, runtime, &mut file, seen) {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(%error, "file of the watched folder not taken; it is tried again");
                return;
            }
        };
        let removed = match taken {
            Taken::NoRoom | Taken::Changed => return,
            Taken::Stored => {
                intake.counters.files_taken.add();
                remove(path, seen)
            }
            Taken::Quarantined(reason) => {
                let folder = super::quarantine_folder(&intake.config.borrow());
                match quarantine(&folder, path, (seen, &mut file), reason) {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => {
                        tracing::warn!(%error, %reason, "file of the watched folder not put into quarantine; it is tried again");
                        return;
                    }
                }
                intake.counters.files_quarantined.add();
                tracing::warn!(%reason, "file of the watched folder put into quarantine");
                remove(path, seen)
            }
        };
        self.settling.remove(path);
        if let Err(error) = removed {
            tracing::warn!(%error, "file of the watched folder cannot be removed");
            if self.taken.len() < MAX_FILES {
                self.taken.insert(path.to_owned(), seen);
            }
        }
    }

    fn is_settled(&mut self, path: &Path, seen: Seen) -> bool {
        let now = Instant::now();
        match self.settling.get(path) {
            Some((before, since)) if *before == seen => since.elapsed() >= SETTLED,
            _ => {
                if self.settling.len() < MAX_FILES {
                    self.settling.insert(path.to_owned(), (seen, now));
                }
                false
            }
        }
    }

    fn forget_all_but(&mut self, files: &[PathBuf]) {
        self.settling.retain(|path, _| files.contains(path));
        self.taken.retain(|path, _| files.contains(path));
    }
}

/// Opens a regular file, not through a link.
fn open(path: &Path) -> Option<(Seen, File)> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .ok()?;
    let metadata: Metadata = file.metadata().ok()?;
    // A second name of the same file may belong to somebody who still writes through it.
    if !metadata.is_file() || metadata.nlink() > 1 {
        return None;
    }
    Some((Seen::of(&metadata), file))
}

impl Seen {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

/// Removes a file that was taken, unless it is another one by now: that one comes next.
fn remove(path: &Path, taken: Seen) -> io::Result<()> {
    if is_still(path, taken) {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Whether a path holds the file that was seen there, as it was then. What cannot be looked at counts as that file, so that whoever
/// acts on it hears the error.
fn is_still(path: &Path, seen: Seen) -> bool {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) => Seen::of(&metadata) == seen,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Copies a file to the spool, where it is still the one that was seen when its last byte is read.
fn take(
    intake: &Intake,
    runtime: &Handle,
    file: &mut File,
    seen: Seen,
) -> Result<Taken, SpoolError> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let filled = fill(file, &mut chunk)?;
    let Some(meta) = part10::read_meta(&chunk[..filled]) else {
        return Ok(Taken::Quarantined(Reason::NotDicom));
    };
    if classes::sop_class(&meta.sop_class_uid).is_none_or(|class| !class.purpose.is_storage()) {
        return Ok(Taken::Quarantined(Reason::SopClass));
    }
    let is_decoded = |uid: &str| {
        classes::transfer_syntaxes()
            .iter()
            .any(|syntax| syntax.uid == uid)
    };
    if !is_decoded(&meta.transfer_syntax_uid) {
        return Ok(Taken::Quarantined(Reason::TransferSyntax));
    }
    let header = Header {
        received_ms: unix_ms(),
        sop_class_uid: meta.sop_class_uid,
        sop_instance_uid: meta.sop_instance_uid,
        transfer_syntax_uid: meta.transfer_syntax_uid,
        ..Header::default()
    };
    let mut entry = match intake.spool.begin(header) {
        Ok(entry) => entry,
        Err(SpoolError::Io(error)) => return Err(error.into()),
        Err(_) => return Ok(Taken::NoRoom),
    };
    let mut filled = filled;
    while filled > 0 {
        match entry.write(&chunk[..filled]) {
            Err(SpoolError::TooLarge { .. }) => return Ok(Taken::Quarantined(Reason::TooLarge)),
            written => written?,
        }
        filled = fill(file, &mut chunk)?;
    }
    if Seen::of(&file.metadata()?) != seen {
        return Ok(Taken::Changed);
    }
    runtime.block_on(entry.commit())?;
    Ok(Taken::Stored)
}

fn fill(file: &mut File, chunk: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < chunk.len() {
        match file.read(&mut chunk[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

/// Moves a file to the quarantine under a name of ours, with its reason beside it; over file systems, and where it cannot be moved, it is copied.
/// Out: whether it was still there as it was read; what is there otherwise comes next. A failure leaves nothing behind.
fn quarantine(
    folder: &Path,
    path: &Path,
    (seen, file): (Seen, &mut File),
    reason: Reason,
) -> io::Result<bool> {
    if !is_still(path, seen) {
        return Ok(false);
    }
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)?;
    for attempt in 0..1000 {
        let target = folder.join(format!("{}-{attempt}.file", unix_ms()));
        let created = File::options().write(true).create_new(true).open(&target);
        let mut copy = match created {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            created => created?,
        };
        let why = target.with_extension("reason");
        let moved = std::fs::write(&why, format!("{reason}\n")).and_then(|()| {
            std::fs::rename(path, &target).or_else(|_| {
                io::Seek::rewind(file)?;
                io::copy(file, &mut copy)?;
                copy.sync_all()
            })
        });
        if moved.is_err() {
            // Whichever of them is there.
            drop(std::fs::remove_file(&target));
            drop(std::fs::remove_file(&why));
        }
        return moved.map(|()| true);
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_unfinished_files_are_left_alone() {
        for name in [".hidden", "a.part", "a.tmp", "b.dcm.filepart"] {
            assert!(is_unfinished_name(Path::new(name)), "{name}");
        }
        for name in ["a.dcm", "IM0001", "tmp"] {
            assert!(!is_unfinished_name(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn file_whose_writer_was_not_seen_must_stay_the_same() {
        let mut memory = Memory::default();
        let path = Path::new("a");
        let seen = |bytes| Seen {
            inode: 1,
            bytes,
            modified: None,
        };
        assert!(!memory.is_settled(path, seen(1)));
        assert!(!memory.is_settled(path, seen(2)));
        let (_, since) = memory.settling.get_mut(path).unwrap();
        *since = Instant::now().checked_sub(SETTLED).unwrap();
        assert!(memory.is_settled(path, seen(2)));
        assert!(!memory.is_settled(path, seen(3)));
    }

    #[test]
    fn a_file_that_is_another_one_by_now_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"taken").unwrap();
        let (taken, _) = open(&path).unwrap();
        std::fs::write(&path, b"written since").unwrap();
        remove(&path, taken).unwrap();
        let next = folder.path().join("b");
        std::fs::write(&next, b"taken").unwrap();
        let (taken, _) = open(&next).unwrap();
        std::fs::rename(&path, &next).unwrap();
        remove(&next, taken).unwrap();
        assert_eq!(std::fs::read(&next).unwrap(), b"written since");
        let (taken, _) = open(&next).unwrap();
        remove(&next, taken).unwrap();
        assert!(!next.exists());
    }

    #[test]
    fn what_nobody_has_read_is_neither_removed_nor_put_into_quarantine() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("a"), folder.path().join("b"));
        let seen = || {
            std::fs::write(&path, b"read").unwrap();
            open(&path).unwrap()
        };
        let replace: [fn(&Path, &Path); 3] = [
            |other, path| std::fs::rename(other, path).unwrap(),
            // As writers do that link their file into place and then remove its first name.
            |other, path| {
                std::fs::remove_file(path).unwrap();
                std::fs::hard_link(other, path).unwrap();
            },
            |other, path| {
                std::fs::remove_file(path).unwrap();
                std::os::unix::fs::symlink(other, path).unwrap();
            },
        ];
        for replace in replace {
            let (seen, mut file) = seen();
            std::fs::write(&other, b"another file").unwrap();
            replace(&other, &path);
            let target = folder.path().join("quarantine");
            assert!(!quarantine(&target, &path, (seen, &mut file), Reason::NotDicom).unwrap());
            remove(&path, seen).unwrap();
            assert!(!target.exists());
            assert_eq!(std::fs::read(&path).unwrap(), b"another file");
            std::fs::remove_file(&path).unwrap();
        }
        let (seen, _) = seen();
        std::fs::remove_file(&path).unwrap();
        remove(&path, seen).unwrap();
    }

    #[test]
    fn links_and_files_with_two_names_are_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"x").unwrap();
        assert!(open(&path).is_some());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(open(&link).is_none());
        std::fs::hard_link(&path, folder.path().join("second")).unwrap();
        assert!(open(&path).is_none());
    }

    /// What lies in a folder, sorted; nothing there is named after a patient.
    fn texts(folder: &Path) -> Vec<String> {
        let mut texts: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .inspect(|path| assert!(!path.to_string_lossy().contains("DOE")))
            .map(|path| std::fs::read_to_string(path).unwrap())
            .collect();
        texts.sort();
        texts
    }

    #[test]
    fn quarantine_uses_no_foreign_name_and_says_why_on_another_file_system_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("DOE^JANE.dcm");
        let memory = tempfile::tempdir_in("/dev/shm").ok();
        let others = memory.iter().map(|other| other.path().join("quarantine"));
        for target in others.chain([folder.path().join("quarantine")]) {
            std::fs::write(&path, b"content").unwrap();
            let (seen, mut file) = open(&path).unwrap();
            assert!(quarantine(&target, &path, (seen, &mut file), Reason::NotDicom).unwrap());
            remove(&path, seen).unwrap();
            assert!(!path.exists());
            assert_eq!(texts(&target), ["content", "not a DICOM file\n"]);
        }
    }

    #[test]
    fn what_cannot_be_put_into_quarantine_stays_and_leaves_nothing_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, b"content").unwrap();
        let (seen, mut file) = open(&path).unwrap();
        let no_folder = path.join("quarantine");
        assert!(quarantine(&no_folder, &path, (seen, &mut file), Reason::NotDicom).is_err());
        if let Ok(memory) = tempfile::tempdir_in("/dev/shm") {
            let mut unreadable = File::options().append(true).open(&path).unwrap();
            let put = |file| quarantine(memory.path(), &path, (seen, file), Reason::NotDicom);
            // Where both are one file system, it is moved.
            if put(&mut unreadable).is_ok() {
                return;
            }
            assert!(texts(memory.path()).is_empty());
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"content");
    }
}
