//! The durable spool: every object that is acknowledged lies here first, as a whole Part 10 file, until it is purged.
//!
//! In: bytes of one object after another, from any number of associations. Out: a sequence for each, given only after the object is
//! durable. Objects are gathered in memory (within a budget) and appended to one preallocated segment by one thread ([`writer`]): it writes
//! everything that waits and makes it durable by a single `fdatasync`. An object alone is committed at once; objects that come
//! while a sync runs share the next. Larger objects are streamed to a file of their own. Durability holds on storage that honours flush.
//! What is analysed, and when an object is finished, is `decide`'s business; what is purged, [`super::retention`]'s.

mod entry;
mod record;
mod recover;
mod segment;
mod writer;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use crate::launch::until_let_go;
use crate::vital;

pub(crate) use entry::Entry;
pub(crate) use record::Header;
use record::{BLOCK_BYTES, Record, record_bytes};
use segment::{Name, Segment};
use writer::{Body, Queue, Stream, Work};

/// Largest object that is gathered in memory.
const MAX_BUFFERED_BYTES: usize = 4 << 20;
/// Memory of all gathered objects together; beyond it objects are streamed to files.
const BUFFER_BUDGET_BYTES: usize = 24 << 20;
/// Steps in which the budget is taken.
const BUFFER_STEP_BYTES: usize = 256 << 10;
/// Bytes that are gathered before a streamed object is written.
const STREAM_CHUNK_BYTES: usize = 256 << 10;
/// Bytes of a streamed object that may be in the system's memory alone: whoever else waits for a sync may have to wait for them, too.
const STREAM_SYNC_BYTES: u64 = 16 << 20;
/// Most objects; the index stays under 32 MiB.
const MAX_OBJECTS: usize = 1 << 18;
/// How long a look at the file system's free space holds.
const FREE_SPACE_AGE: Duration = Duration::from_millis(200);

/// Bounds of the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpoolLimits {
    /// Bytes of a segment.
    pub(crate) segment_bytes: u64,
    /// Most bytes of all objects.
    pub(crate) quota_bytes: u64,
    /// Free bytes of the file system below which objects are refused.
    pub(crate) keep_free_bytes: u64,
    /// Largest object.
    pub(crate) max_object_bytes: u64,
}

impl Default for SpoolLimits {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            quota_bytes: 32 << 30,
            keep_free_bytes: 1 << 30,
            max_object_bytes: 1 << 30,
        }
    }
}

/// Why an object is not in the spool.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum SpoolError {
    /// The quota is used up.
    #[error("the spool holds {} of {} MiB ([retention] quota_mib)", used_bytes >> 20, quota_bytes >> 20)]
    Quota {
        /// Bytes in use.
        used_bytes: u64,
        /// Bytes allowed.
        quota_bytes: u64,
    },
    /// The file system is nearly full.
    #[error("{} MiB free, {} must stay free ([retention] keep_free_mib)", free_bytes >> 20, keep_free_bytes >> 20)]
    DiskFull {
        /// Free bytes.
        free_bytes: u64,
        /// Bytes that must stay free.
        keep_free_bytes: u64,
    },
    /// Too many objects.
    #[error("the spool holds {MAX_OBJECTS} objects, its most")]
    TooMany,
    /// The object is larger than allowed.
    #[error("object has more than {max_object_bytes} bytes")]
    TooLarge {
        /// Most bytes.
        max_object_bytes: u64,
    },
    /// A text of the header is longer than its kind allows.
    #[error("a header field is longer than 64 bytes")]
    Header,
    /// There is no such object, or no more.
    #[error("no object with sequence {0}")]
    Unknown(u64),
    /// Another process uses the folder.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The spool is closing.
    #[error("the spool is closing")]
    Closed,
    /// The medium failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The spool.
#[derive(Debug)]
pub(crate) struct Spool {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What the writer's thread and the callers share.
#[derive(Debug)]
struct Shared {
    folder: PathBuf,
    /// Held for its lock.
    folder_file: File,
    limits: Mutex<SpoolLimits>,
    index: Mutex<BTreeMap<u64, Place>>,
    used_bytes: AtomicU64,
    buffered_bytes: AtomicUsize,
    next_object: AtomicU64,
    sync_calls: AtomicU64,
    written_bytes: AtomicU64,
    queue: Queue,
    latest: watch::Sender<u64>,
    free_space: Mutex<Option<(Instant, u64)>>,
}

/// Where an object lies.
#[derive(Clone, Debug)]
struct Place {
    path: Arc<Path>,
    offset: u64,
    object_bytes: u64,
    received_ms: i64,
    is_finished: bool,
    is_analysed_class: bool,
    pinned_until_ms: i64,
}

/// An object as retention sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    /// Its sequence.
    pub(crate) sequence: u64,
    /// Bytes on the medium.
    pub(crate) bytes: u64,
    /// When it came, Unix time in ms.
    pub(crate) received_ms: i64,
    /// Whether nobody needs it any more.
    pub(crate) is_finished: bool,
    /// Whether its class is one that is analysed.
    pub(crate) is_analysed_class: bool,
    /// Until when it stays although nobody needs it, Unix time in ms.
    pub(crate) pinned_until_ms: i64,
}

/// What the spool has done and holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpoolCounts {
    /// Objects.
    pub(crate) objects: usize,
    /// Bytes they take.
    pub(crate) used_bytes: u64,
    /// Sync calls since the start.
    pub(crate) sync_calls: u64,
    /// Bytes written since the start.
    pub(crate) written_bytes: u64,
}

impl Spool {
    /// Opens the folder, recovers what lies in it and cuts a torn tail.
    ///
    /// # Errors
    /// The folder cannot be used, or another process uses it.
    pub(crate) fn open(folder: &Path, limits: &SpoolLimits) -> Result<Arc<Self>, SpoolError> {
        // Patients' data: nobody else reads it.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        let folder_file = File::open(folder)?;
        let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        let locked = until_let_go(
            || rustix::fs::flock(&folder_file, exclusive),
            |error| *error == rustix::io::Errno::WOULDBLOCK,
        );
        locked.map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => SpoolError::InUse(folder.to_owned()),
            error => SpoolError::Io(error.into()),
        })?;
        let recovered = recover::recover(folder)?;
        let shared = Arc::new(Shared {
            folder: folder.to_owned(),
            folder_file,
            limits: Mutex::new(limits.clone()),
            used_bytes: AtomicU64::new(used_bytes(&recovered.index)),
            index: Mutex::new(recovered.index),
            buffered_bytes: AtomicUsize::new(0),
            next_object: AtomicU64::new(recovered.next_object),
            sync_calls: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            queue: Queue::default(),
            latest: watch::Sender::new(recovered.next_sequence - 1),
            free_space: Mutex::new(None),
        });
        let for_writer = Arc::clone(&shared);
        let (next_sequence, empty) = (recovered.next_sequence, recovered.empty);
        let writing = move || writer::run(&for_writer, next_sequence, empty);
        let writer = std::thread::Builder::new()
            .name("spool".to_owned())
            .spawn(move || vital::work("spool", writing))?;
        Ok(Arc::new(Self {
            shared,
            writer: Mutex::new(Some(writer)),
        }))
    }

    /// Begins an object. `header.sequence` is set at the commit.
    ///
    /// # Errors
    /// There is no room ([`SpoolError::Quota`], [`SpoolError::DiskFull`], [`SpoolError::TooMany`]), or a header field is too long.
    pub(crate) fn begin(&self, header: Header) -> Result<Entry, SpoolError> {
        header.check()?;
        self.room()?;
        let mut buffer = self.shared.queue.spare_buffer();
        buffer.resize(BLOCK_BYTES, 0);
        Ok(Entry {
            shared: Arc::clone(&self.shared),
            header,
            body: Some(Body::Buffered(buffer)),
            hasher: crc32fast::Hasher::new(),
            object_bytes: 0,
            max_object_bytes: lock(&self.shared.limits).max_object_bytes,
            budget_bytes: 0,
        })
    }

    /// Whether another object would be taken.
    ///
    /// # Errors
    /// The reason why not.
    pub(crate) fn room(&self) -> Result<(), SpoolError> {
        self.shared.room()
    }

    /// Free bytes of the file system, looked up at most five times a second.
    ///
    /// # Errors
    /// The file system does not say.
    pub(crate) fn free_bytes(&self) -> Result<u64, SpoolError> {
        self.shared.free_bytes()
    }

    /// Changes the bounds; what is being written keeps the old ones.
    pub(crate) fn set_limits(&self, limits: SpoolLimits) {
        *lock(&self.shared.limits) = limits;
    }

    /// The highest durable sequence, as it grows.
    pub(crate) fn latest(&self) -> watch::Receiver<u64> {
        self.shared.latest.subscribe()
    }

    /// What is known of an object without reading it.
    ///
    /// # Errors
    /// There is no such object, or its block cannot be read.
    pub(crate) fn header(&self, sequence: u64) -> Result<Header, SpoolError> {
        let place = self.place(sequence)?;
        let record = Segment::open(place.path)?.record(place.offset)?;
        record
            .map(|record| record.header)
            .filter(|header| header.sequence == sequence)
            .ok_or(SpoolError::Unknown(sequence))
    }

    /// The file in which an object lies, where in it, and its bytes.
    ///
    /// # Errors
    /// There is no such object, or its file cannot be opened.
    pub(crate) fn object(&self, sequence: u64) -> Result<(File, u64, u64), SpoolError> {
        let place = self.place(sequence)?;
        let file = File::open(&place.path)?;
        Ok((file, place.offset + BLOCK_BYTES as u64, place.object_bytes))
    }

    /// The sequences above `sequence` that are there, in order.
    pub(crate) fn sequences_after(&self, sequence: u64) -> impl Iterator<Item = u64> + use<> {
        let index = lock(&self.shared.index);
        let after: Vec<u64> = index
            .range(sequence.saturating_add(1)..)
            .map(|(sequence, _)| *sequence)
            .collect();
        after.into_iter()
    }

    /// Marks an object as one that nobody needs any more; retention may purge it. After a crash `finish` is called again by who knows.
    pub(crate) fn finish(&self, sequence: u64) {
        if let Some(place) = lock(&self.shared.index).get_mut(&sequence) {
            place.is_finished = true;
        }
    }

    /// Pins an object until a time, Unix time in ms: it does not go for lack of room. Whether it is there. After a start `pin` is called again by who knows.
    pub(crate) fn pin(&self, sequence: u64, until_ms: i64) -> bool {
        let mut index = lock(&self.shared.index);
        let place = index.get_mut(&sequence);
        let is_there = place.is_some();
        if let Some(place) = place {
            place.pinned_until_ms = place.pinned_until_ms.max(until_ms);
        }
        is_there
    }

    /// Everything that is kept, in the order of sequences.
    pub(crate) fn kept(&self) -> Vec<Kept> {
        let kept = |(sequence, place): (&u64, &Place)| Kept {
            sequence: *sequence,
            bytes: record_bytes(place.object_bytes),
            received_ms: place.received_ms,
            is_finished: place.is_finished,
            is_analysed_class: place.is_analysed_class,
            pinned_until_ms: place.pinned_until_ms,
        };
        lock(&self.shared.index).iter().map(kept).collect()
    }

    /// Deletes objects and gives their space back, in the writer's turn.
    ///
    /// # Errors
    /// The spool is closing, or the medium failed.
    pub(crate) async fn purge(&self, sequences: Vec<u64>) -> Result<(), SpoolError> {
        let (reply, done) = oneshot::channel();
        self.shared
            .queue
            .push(Work::Purge { sequences, reply })
            .await?;
        done.await.map_err(|_| SpoolError::Closed)?
    }

    /// What it has done and holds.
    pub(crate) fn counts(&self) -> SpoolCounts {
        SpoolCounts {
            objects: lock(&self.shared.index).len(),
            used_bytes: self.shared.used_bytes.load(Ordering::Relaxed),
            sync_calls: self.shared.sync_calls.load(Ordering::Relaxed),
            written_bytes: self.shared.written_bytes.load(Ordering::Relaxed),
        }
    }

    fn place(&self, sequence: u64) -> Result<Place, SpoolError> {
        let index = lock(&self.shared.index);
        index
            .get(&sequence)
            .cloned()
            .ok_or(SpoolError::Unknown(sequence))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        self.shared.queue.close();
        if let Some(writer) = lock(&self.writer).take() {
            // The writer's own failures were told to those who waited.
            drop(writer.join());
        }
    }
}

impl Shared {
    fn room(&self) -> Result<(), SpoolError> {
        let limits = lock(&self.limits).clone();
        let used_bytes = self.used_bytes.load(Ordering::Relaxed);
        if used_bytes >= limits.quota_bytes {
            return Err(SpoolError::Quota {
                used_bytes,
                quota_bytes: limits.quota_bytes,
            });
        }
        if lock(&self.index).len() >= MAX_OBJECTS {
            return Err(SpoolError::TooMany);
        }
        let free_bytes = self.free_bytes()?;
        if free_bytes < limits.keep_free_bytes {
            return Err(SpoolError::DiskFull {
                free_bytes,
                keep_free_bytes: limits.keep_free_bytes,
            });
        }
        Ok(())
    }

    fn free_bytes(&self) -> Result<u64, SpoolError> {
        let mut known = lock(&self.free_space);
        if let Some((at, bytes)) = *known
            && at.elapsed() < FREE_SPACE_AGE
        {
            return Ok(bytes);
        }
        let stat = rustix::fs::fstatvfs(&self.folder_file).map_err(io::Error::from)?;
        let bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
        *known = Some((Instant::now(), bytes));
        Ok(bytes)
    }

    fn take_budget(&self, bytes: usize) -> bool {
        let take = |used: usize| {
            let used = used.checked_add(bytes)?;
            (used <= BUFFER_BUDGET_BYTES).then_some(used)
        };
        self.buffered_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
    }

    fn give_budget(&self, bytes: usize) {
        self.buffered_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Begins a file of its own with what was gathered so far.
    fn spill(&self, buffer: &[u8]) -> Result<Stream, SpoolError> {
        let number = self.next_object.fetch_add(1, Ordering::Relaxed);
        let segment = Segment::create(&self.folder, Name::Object(number), 0)?;
        let mut stream = Stream::new(segment);
        // The block stays zero until the object is durable, so that a crash leaves no record.
        stream.append(&[0; BLOCK_BYTES])?;
        stream.append(buffer.get(BLOCK_BYTES..).unwrap_or_default())?;
        Ok(stream)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.sync_calls.fetch_add(1, Ordering::Relaxed);
        file.sync_data()
    }
}

impl Place {
    fn new(path: Arc<Path>, offset: u64, record: &Record) -> Self {
        Self {
            path,
            offset,
            object_bytes: record.object_bytes,
            received_ms: record.header.received_ms,
            is_finished: false,
            pinned_until_ms: 0,
            is_analysed_class: crate::intake::classes::is_analysed(&record.header.sop_class_uid),
        }
    }
}

fn used_bytes(index: &BTreeMap<u64, Place>) -> u64 {
    let bytes = index.values().map(|place| record_bytes(place.object_bytes));
    bytes.fold(0, u64::saturating_add)
}

/// Runs something that waits for the medium without holding up the other tasks of this thread.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
