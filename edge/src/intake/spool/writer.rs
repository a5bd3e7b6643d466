//! The one thread that writes: it takes everything that waits, appends it, syncs once and answers all.
//!
//! One writer makes sequence, place in the file and order of durability the same thing, so only what was never acknowledged can be torn.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};

use heapless::Deque;
use tokio::sync::{Notify, oneshot};

use super::record::{Record, record_bytes};
use super::segment::{ABANDONED_BYTES, Name, Segment, remove};
use super::{Place, STREAM_CHUNK_BYTES, Shared, SpoolError, lock};

/// Objects that may wait for the writer; who comes then waits to enqueue.
const QUEUE_LENGTH: usize = 64;
/// Buffers that are kept for the next objects.
const SPARE_BUFFERS: usize = 8;
/// Largest buffer that is kept.
const MAX_SPARE_BYTES: usize = 1 << 20;

/// What the writer is asked for.
#[derive(Debug)]
pub(super) enum Work {
    /// Make an object durable.
    Commit(Pending),
    /// Delete objects.
    Purge {
        sequences: Vec<u64>,
        reply: oneshot::Sender<Result<(), SpoolError>>,
    },
}

/// An object that waits to become durable.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) record: Record,
    pub(super) body: Body,
    pub(super) budget_bytes: usize,
    pub(super) reply: oneshot::Sender<Result<u64, SpoolError>>,
}

/// The bytes of an object.
#[derive(Debug)]
pub(super) enum Body {
    /// In memory, behind room for the block.
    Buffered(Vec<u8>),
    /// In a file of its own.
    Streamed(Box<Stream>),
}

/// A file that is being written. Dropped before it is adopted, it is removed.
#[derive(Debug)]
pub(super) struct Stream {
    segment: Segment,
    is_adopted: bool,
    waiting: Vec<u8>,
    written_bytes: u64,
    /// Of those, the bytes that are durable.
    synced_bytes: u64,
}

impl Stream {
    pub(super) fn new(segment: Segment) -> Self {
        Self {
            segment,
            is_adopted: false,
            waiting: Vec::with_capacity(STREAM_CHUNK_BYTES),
            written_bytes: 0,
            synced_bytes: 0,
        }
    }

    /// Bytes that a crash would lose.
    pub(super) fn unsynced_bytes(&self) -> u64 {
        self.written_bytes - self.synced_bytes
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.waiting.len() + bytes.len() > STREAM_CHUNK_BYTES {
            super::blocking(|| self.flush())?;
        }
        if bytes.len() > STREAM_CHUNK_BYTES {
            super::blocking(|| self.segment.file.write_all_at(bytes, self.written_bytes))?;
            self.written_bytes += bytes.len() as u64;
        } else {
            self.waiting.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Makes what was written durable; the block is not written yet.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        self.segment.file.sync_data()?;
        self.synced_bytes = self.written_bytes;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.segment
            .file
            .write_all_at(&self.waiting, self.written_bytes)?;
        self.written_bytes += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.is_adopted {
            self.segment.remove();
        }
    }
}

/// The bounded hand-off to the writer.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    has_work: Condvar,
    has_room: Notify,
    #[cfg(test)]
    has_room_blocking: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: Deque<Work, QUEUE_LENGTH>,
    spare: heapless::Vec<Vec<u8>, SPARE_BUFFERS>,
    is_closed: bool,
}

impl Queue {
    /// Hands work over; waits while the queue is full.
    pub(super) async fn push(&self, work: Work) -> Result<(), SpoolError> {
        let mut work = work;
        loop {
            let room = self.has_room.notified();
            match self.try_push(work)? {
                None => return Ok(()),
                Some(refused) => work = refused,
            }
            room.await;
        }
    }

    #[cfg(test)]
    pub(super) fn push_blocking(&self, work: Work) -> Result<(), SpoolError> {
        let mut work = work;
        while let Some(refused) = self.try_push(work)? {
            work = refused;
            let state = lock(&self.state);
            let waited = self
                .has_room_blocking
                .wait_while(state, |state| state.waiting.is_full());
            drop(waited);
        }
        Ok(())
    }

    fn try_push(&self, work: Work) -> Result<Option<Work>, SpoolError> {
        let mut state = lock(&self.state);
        if state.is_closed {
            return Err(SpoolError::Closed);
        }
        let refused = state.waiting.push_back(work).err();
        if refused.is_none() {
            self.has_work.notify_one();
        }
        Ok(refused)
    }

    /// Takes everything that waits, in order; `None` when the queue is closed and empty.
    fn take(&self) -> Option<Deque<Work, QUEUE_LENGTH>> {
        let state = lock(&self.state);
        let idle = |state: &mut State| state.waiting.is_empty() && !state.is_closed;
        let mut state = match self.has_work.wait_while(state, idle) {
            Ok(state) => state,
            Err(poisoned) => poisoned.into_inner(),
        };
        let taken = std::mem::take(&mut state.waiting);
        drop(state);
        self.has_room.notify_waiters();
        #[cfg(test)]
        self.has_room_blocking.notify_all();
        (!taken.is_empty()).then_some(taken)
    }

    pub(super) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.has_work.notify_all();
        self.has_room.notify_waiters();
    }

    /// An empty buffer, used before where there is one.
    pub(super) fn spare_buffer(&self) -> Vec<u8> {
        lock(&self.state).spare.pop().unwrap_or_default()
    }

    /// Keeps a buffer for the next object, where there is room for it.
    pub(super) fn keep_buffer(&self, mut buffer: Vec<u8>) {
        if buffer.capacity() <= MAX_SPARE_BYTES {
            buffer.clear();
            drop(lock(&self.state).spare.push(buffer));
        }
    }
}

/// Where the next record goes.
struct Writer<'a> {
    shared: &'a Shared,
    next_sequence: u64,
    active: Option<Active>,
    /// A segment that could not be made durable when it was sealed; what this batch put there is lost.
    broken: Option<io::Error>,
}

struct Active {
    segment: Segment,
    end: u64,
    reserved_bytes: u64,
}

impl Active {
    /// What a failed sync left behind is unknown: nothing more is written to this file, and its length says that it was not sealed.
    fn abandon(self) {
        // A medium that fails here too leaves the length that it had.
        drop(self.segment.file.set_len(self.end + ABANDONED_BYTES));
    }
}

/// Works until the queue is closed.
pub(super) fn run(shared: &Shared, next_sequence: u64, empty: Option<Segment>) {
    let mut writer = Writer {
        shared,
        next_sequence,
        active: None,
        broken: None,
    };
    if let Some(segment) = empty {
        // Without reserved blocks the segment still works.
        let reserved_bytes = lock(&shared.limits).segment_bytes;
        drop(segment.reserve(reserved_bytes));
        writer.active = Some(Active {
            segment,
            end: 0,
            reserved_bytes,
        });
    }
    while let Some(batch) = shared.queue.take() {
        let mut commits = heapless::Vec::<Pending, QUEUE_LENGTH>::new();
        for work in batch {
            match work {
                // The queue is no longer than the list.
                Work::Commit(pending) => drop(commits.push(pending)),
                Work::Purge { sequences, reply } => {
                    writer.commit(std::mem::take(&mut commits));
                    drop(reply.send(writer.purge(&sequences)));
                }
            }
        }
        writer.commit(commits);
    }
    writer.seal();
}

impl Writer<'_> {
    fn commit(&mut self, batch: heapless::Vec<Pending, QUEUE_LENGTH>) {
        if batch.is_empty() {
            return;
        }
        let mut placed =
            heapless::Vec::<(Result<Place, SpoolError>, u64, Reply), QUEUE_LENGTH>::new();
        let mut is_folder_changed = false;
        let mut is_segment_written = false;
        for mut pending in batch {
            let sequence = self.next_sequence;
            pending.record.header.sequence = sequence;
            self.shared.give_budget(pending.budget_bytes);
            let place = match pending.body {
                Body::Buffered(buffer) => {
                    is_segment_written = true;
                    self.append(&pending.record, buffer, &mut is_folder_changed)
                }
                Body::Streamed(stream) => {
                    is_folder_changed = true;
                    self.adopt(&pending.record, *stream)
                }
            };
            if place.is_ok() {
                self.next_sequence += 1;
            }
            // The list is as long as the batch can be.
            drop(placed.push((place, sequence, pending.reply)));
        }
        let durable = self.make_durable(is_segment_written, is_folder_changed);
        self.answer(placed, &durable);
    }

    /// Writes a record at the segment's end, in a new segment where it does not fit.
    fn append(
        &mut self,
        record: &Record,
        mut buffer: Vec<u8>,
        is_folder_changed: &mut bool,
    ) -> Result<Place, SpoolError> {
        buffer[..super::BLOCK_BYTES].copy_from_slice(&record.encode());
        let bytes = record_bytes(record.object_bytes);
        let fits = |active: &Active| active.end.saturating_add(bytes) <= active.reserved_bytes;
        if !self.active.as_ref().is_some_and(fits) {
            self.rotate(bytes)?;
            *is_folder_changed = true;
        }
        let active = self.active.as_mut().ok_or(SpoolError::Closed)?;
        active.segment.file.write_all_at(&buffer, active.end)?;
        let place = Place::new(Arc::clone(&active.segment.path), active.end, record);
        active.end += bytes;
        let written = buffer.len() as u64;
        self.shared
            .written_bytes
            .fetch_add(written, Ordering::Relaxed);
        self.shared.queue.keep_buffer(buffer);
        Ok(place)
    }

    /// Gives a streamed object, which is durable, its block.
    fn adopt(&self, record: &Record, mut stream: Stream) -> Result<Place, SpoolError> {
        let segment = &stream.segment;
        segment.file.write_all_at(&record.encode(), 0)?;
        self.shared.sync(&segment.file)?;
        let place = Place::new(Arc::clone(&segment.path), 0, record);
        stream.is_adopted = true;
        let written = record.object_bytes + 2 * super::BLOCK_BYTES as u64;
        self.shared
            .written_bytes
            .fetch_add(written, Ordering::Relaxed);
        Ok(place)
    }

    fn make_durable(
        &mut self,
        is_segment_written: bool,
        is_folder_changed: bool,
    ) -> io::Result<()> {
        let mut done = self.broken.take().map_or(Ok(()), Err);
        if is_segment_written && let Some(active) = &self.active {
            done = done.and(self.shared.sync(&active.segment.file));
        }
        if is_folder_changed {
            self.shared.sync_calls.fetch_add(1, Ordering::Relaxed);
            done = done.and(self.shared.folder_file.sync_all());
        }
        if done.is_err()
            && let Some(active) = self.active.take()
        {
            active.abandon();
        }
        done
    }

    fn answer(
        &self,
        placed: heapless::Vec<(Result<Place, SpoolError>, u64, Reply), QUEUE_LENGTH>,
        durable: &io::Result<()>,
    ) {
        let mut latest = None;
        let mut answers = heapless::Vec::<_, QUEUE_LENGTH>::new();
        let mut index = lock(&self.shared.index);
        for (place, sequence, reply) in placed {
            let answer = match (place, durable) {
                (Ok(place), Ok(())) => {
                    let bytes = record_bytes(place.object_bytes);
                    self.shared.used_bytes.fetch_add(bytes, Ordering::Relaxed);
                    index.insert(sequence, place);
                    latest = Some(sequence);
                    Ok(sequence)
                }
                (Ok(_), Err(error)) => Err(io::Error::new(error.kind(), error.to_string()).into()),
                (Err(error), _) => Err(error),
            };
            drop(answers.push((reply, answer)));
        }
        drop(index);
        if let Some(latest) = latest {
            self.shared.latest.send_replace(latest);
        }
        for (reply, answer) in answers {
            // Who no longer waits has lost the association; the object stays.
            drop(reply.send(answer));
        }
    }

    /// Begins a segment with room for a record of `bytes`; for none it takes no blocks, so that deleting works on a full disk.
    fn rotate(&mut self, bytes: u64) -> Result<(), SpoolError> {
        let reserved_bytes = match bytes {
            0 => 0,
            _ => lock(&self.shared.limits).segment_bytes.max(bytes),
        };
        if let Some(active) = self.active.as_mut().filter(|active| active.end == 0) {
            active.segment.reserve(reserved_bytes)?;
            active.reserved_bytes = reserved_bytes;
            return Ok(());
        }
        self.seal();
        let name = Name::Segment(self.next_sequence);
        let segment = Segment::create(&self.shared.folder, name, reserved_bytes)?;
        self.active = Some(Active {
            segment,
            end: 0,
            reserved_bytes,
        });
        Ok(())
    }

    /// Syncs the segment, gives its unused blocks back and writes no more to it.
    ///
    /// Only the newest segment's objects are checked at the next start, so a segment must be durable before there is a newer one.
    fn seal(&mut self) {
        let Some(active) = self.active.take() else {
            return;
        };
        let cut = active.segment.file.set_len(active.end);
        if let Err(error) = cut.and_then(|()| self.shared.sync(&active.segment.file)) {
            self.broken = Some(error);
            active.abandon();
        }
    }

    fn purge(&mut self, sequences: &[u64]) -> Result<(), SpoolError> {
        // By where the name lies in memory, which all objects of a file share: names themselves are slow to compare.
        let file_of = |place: &Place| Arc::as_ptr(&place.path).cast::<u8>();
        let mut touched: BTreeMap<*const u8, Arc<Path>> = BTreeMap::new();
        let mut done = Ok(());
        for sequence in sequences {
            let place = lock(&self.shared.index).get(sequence).cloned();
            let Some(place) = place else { continue };
            // What cannot be deleted stays in the index and is tried again; the others go all the same.
            if let Err(error) = erase(&place) {
                done = done.and(Err(error));
                continue;
            }
            lock(&self.shared.index).remove(sequence);
            let bytes = record_bytes(place.object_bytes);
            self.shared.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
            touched.insert(file_of(&place), place.path);
        }
        for place in lock(&self.shared.index).values() {
            touched.remove(&file_of(place));
        }
        let emptied: Vec<Arc<Path>> = touched.into_values().collect();
        if emptied.is_empty() {
            return Ok(done?);
        }
        // The number of the newest segment is what sequences go on from, so a new one comes before an old one goes.
        self.rotate(0)?;
        self.shared.folder_file.sync_all()?;
        for path in emptied {
            remove(&path);
        }
        Ok(done?)
    }
}

/// Gives an object's space back. One whose file is gone is deleted already.
fn erase(place: &Place) -> io::Result<()> {
    match Segment::open(Arc::clone(&place.path)) {
        Ok(segment) => segment.punch(place.offset, place.object_bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

type Reply = oneshot::Sender<Result<u64, SpoolError>>;
