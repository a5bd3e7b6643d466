//! The files of the spool: how they are named, made and read back after a crash.
//!
//! `NUMBER.segment` holds many records and is preallocated; its number is the sequence of its first record, so that sequences go
//! on where they were even when everything else was deleted. `NUMBER.object` holds one object too large to be held in memory; its
//! number only counts. No name comes from a peer.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use super::record::{ALIGNMENT, BLOCK_BYTES, Record, record_bytes};

const SEGMENT: &str = "segment";
const OBJECT: &str = "object";
/// What stands behind the records of a segment whose sync failed; a sealed one ends on a multiple of [`ALIGNMENT`].
pub(super) const ABANDONED_BYTES: u64 = 1;
/// Bytes read at a time when an object is checked.
const CHECK_BYTES: usize = 256 << 10;

/// A file of the spool that is open. Only what is being written stays so: a month of large objects would use up the process's descriptors.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) path: Arc<Path>,
    pub(super) file: File,
}

/// What the name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    /// Number of the first record.
    Segment(u64),
    /// A count.
    Object(u64),
}

/// A record found in a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) offset: u64,
    pub(super) record: Record,
}

/// How much a file is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// It was sealed, so every block's object is whole; one with [`ABANDONED_BYTES`] behind its records was not, and is checked as below.
    Blocks,
    /// It was being written: objects are checked, and what is torn is cut.
    Objects,
}

/// Deletes a file of the spool. One that is gone already is as good.
pub(super) fn remove(path: &Path) {
    drop(std::fs::remove_file(path));
}

impl Name {
    /// Reads a file name; `None` for files that are not ours.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let (number, kind) = name.split_once('.')?;
        let number = number.parse().ok()?;
        match kind {
            SEGMENT => Some(Self::Segment(number)),
            OBJECT => Some(Self::Object(number)),
            _ => None,
        }
    }

    pub(super) fn path(self, folder: &Path) -> PathBuf {
        match self {
            Self::Segment(number) => folder.join(format!("{number:020}.{SEGMENT}")),
            Self::Object(number) => folder.join(format!("{number:020}.{OBJECT}")),
        }
    }
}

impl Segment {
    /// Makes a file and reserves its blocks. The folder is not synced.
    pub(super) fn create(folder: &Path, name: Name, reserve_bytes: u64) -> io::Result<Self> {
        let path = name.path(folder);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        let segment = Self {
            path: path.into(),
            file,
        };
        if let Err(error) = segment.reserve(reserve_bytes) {
            segment.remove();
            return Err(error);
        }
        Ok(segment)
    }

    pub(super) fn open(path: Arc<Path>) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        Ok(Self { path, file })
    }

    /// Reserves blocks from the beginning, so that writing needs no new ones. A file system without preallocation goes without.
    pub(super) fn reserve(&self, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives a record's blocks back to the file system; a record that cannot be cut out stays until its whole file goes.
    pub(super) fn punch(&self, offset: u64, object_bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let bytes = record_bytes(object_bytes);
        match rustix::fs::fallocate(&self.file, flags, offset, bytes) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                self.file.write_all_at(&[0; BLOCK_BYTES], offset)
            }
            done => Ok(done?),
        }
    }

    /// Deletes the file. One that is gone already is as good.
    pub(super) fn remove(&self) {
        remove(&self.path);
    }

    /// Finds the records, and with [`Check::Objects`] cuts the torn ones.
    ///
    /// The search goes on behind a damaged record page by page, so that one bad page costs one record.
    pub(super) fn recover(&self, check: Check) -> io::Result<Vec<Found>> {
        let length = self.file.metadata()?.len();
        let mut found = Vec::new();
        let mut offset = 0;
        let mut end = 0;
        while offset + BLOCK_BYTES as u64 <= length {
            let Some(record) = self.record(offset)?.filter(|record| {
                let bytes = BLOCK_BYTES as u64 + offset;
                record.object_bytes <= length.saturating_sub(bytes)
            }) else {
                offset += ALIGNMENT;
                continue;
            };
            if check == Check::Objects && !self.is_whole(offset, &record)? {
                self.file.write_all_at(&[0; BLOCK_BYTES], offset)?;
                offset += ALIGNMENT;
                continue;
            }
            let next = offset.saturating_add(record_bytes(record.object_bytes));
            found.push(Found { offset, record });
            offset = next;
            end = next;
        }
        if check == Check::Blocks && length == end + ABANDONED_BYTES {
            return self.recover(Check::Objects);
        }
        if check == Check::Objects {
            self.file.set_len(end.min(length))?;
            self.file.sync_all()?;
        }
        Ok(found)
    }

    /// The record at an offset.
    pub(super) fn record(&self, offset: u64) -> io::Result<Option<Record>> {
        let mut block = [0; BLOCK_BYTES];
        self.file.read_exact_at(&mut block, offset)?;
        Ok(Record::decode(&block))
    }

    fn is_whole(&self, offset: u64, record: &Record) -> io::Result<bool> {
        let mut buffer = vec![0; CHECK_BYTES];
        let mut hasher = crc32fast::Hasher::new();
        let mut at = offset + BLOCK_BYTES as u64;
        let mut left = record.object_bytes;
        while left > 0 {
            let wanted = usize::try_from(left).map_or(CHECK_BYTES, |left| left.min(CHECK_BYTES));
            let part = &mut buffer[..wanted];
            self.file.read_exact_at(part, at)?;
            hasher.update(part);
            at += wanted as u64;
            left -= wanted as u64;
        }
        Ok(hasher.finalize() == record.object_crc)
    }
}
