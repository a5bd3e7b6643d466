//! One object on its way into the spool: gathered in memory within a budget, or streamed to a file of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::record::{Header, Record};
use super::writer::{Body, Pending, Stream, Work};
use super::{
    BUFFER_STEP_BYTES, MAX_BUFFERED_BYTES, STREAM_SYNC_BYTES, Shared, SpoolError, blocking,
};

/// An object that is being written. Dropped without a commit it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(super) shared: Arc<Shared>,
    pub(super) header: Header,
    pub(super) body: Option<Body>,
    pub(super) hasher: crc32fast::Hasher,
    pub(super) object_bytes: u64,
    pub(super) max_object_bytes: u64,
    pub(super) budget_bytes: usize,
}

impl Entry {
    /// Appends bytes of the object.
    ///
    /// # Errors
    /// The object is larger than allowed, or the medium failed.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), SpoolError> {
        self.object_bytes = self.object_bytes.saturating_add(bytes.len() as u64);
        if self.object_bytes > self.max_object_bytes {
            return Err(SpoolError::TooLarge {
                max_object_bytes: self.max_object_bytes,
            });
        }
        self.hasher.update(bytes);
        let body = self.body.take().ok_or(SpoolError::Closed)?;
        let body = match body {
            Body::Buffered(mut buffer) => {
                if self.may_buffer(buffer.len() + bytes.len()) {
                    buffer.extend_from_slice(bytes);
                    Body::Buffered(buffer)
                } else {
                    let mut stream = blocking(|| self.shared.spill(&buffer))?;
                    self.give_budget_back();
                    self.shared.queue.keep_buffer(buffer);
                    stream.append(bytes)?;
                    Body::Streamed(Box::new(stream))
                }
            }
            Body::Streamed(mut stream) => {
                // A large object must not take the last room while it comes.
                self.shared.room()?;
                stream.append(bytes)?;
                if stream.unsynced_bytes() >= STREAM_SYNC_BYTES {
                    self.sync(&mut stream)?;
                }
                Body::Streamed(stream)
            }
        };
        self.body = Some(body);
        Ok(())
    }

    /// Makes the object durable.
    ///
    /// # Errors
    /// The medium failed or the spool is closing; the object counts as never received.
    pub(crate) async fn commit(self) -> Result<u64, SpoolError> {
        let shared = Arc::clone(&self.shared);
        let (reply, done) = oneshot::channel();
        let pending = self.settle(reply)?;
        shared.queue.push(Work::Commit(pending)).await?;
        done.await.map_err(|_| SpoolError::Closed)?
    }

    /// As [`Self::commit`], for threads that are no tasks.
    ///
    /// # Errors
    /// As [`Self::commit`].
    #[cfg(test)]
    pub(crate) fn commit_blocking(self) -> Result<u64, SpoolError> {
        let shared = Arc::clone(&self.shared);
        let (reply, done) = oneshot::channel();
        let pending = self.settle(reply)?;
        shared.queue.push_blocking(Work::Commit(pending))?;
        done.blocking_recv().map_err(|_| SpoolError::Closed)?
    }

    fn settle(
        mut self,
        reply: oneshot::Sender<Result<u64, SpoolError>>,
    ) -> Result<Pending, SpoolError> {
        let mut body = self.body.take().ok_or(SpoolError::Closed)?;
        if let Body::Streamed(stream) = &mut body {
            self.sync(stream)?;
        }
        let record = Record {
            header: std::mem::take(&mut self.header),
            object_bytes: self.object_bytes,
            object_crc: std::mem::take(&mut self.hasher).finalize(),
        };
        Ok(Pending {
            record,
            body,
            budget_bytes: std::mem::take(&mut self.budget_bytes),
            reply,
        })
    }

    fn sync(&self, stream: &mut Stream) -> Result<(), SpoolError> {
        self.shared.sync_calls.fetch_add(1, Ordering::Relaxed);
        Ok(blocking(|| stream.sync())?)
    }

    fn may_buffer(&mut self, bytes: usize) -> bool {
        if bytes > MAX_BUFFERED_BYTES {
            return false;
        }
        let missing = bytes.saturating_sub(self.budget_bytes);
        let step = missing.next_multiple_of(BUFFER_STEP_BYTES);
        if missing > 0 && !self.shared.take_budget(step) {
            return false;
        }
        if missing > 0 {
            self.budget_bytes += step;
        }
        true
    }

    fn give_budget_back(&mut self) {
        self.shared
            .give_budget(std::mem::take(&mut self.budget_bytes));
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.give_budget_back();
        if let Some(Body::Buffered(buffer)) = self.body.take() {
            self.shared.queue.keep_buffer(buffer);
        }
    }
}
