//! Where an object's bytes come from: memory, or somewhere that is asked for the parts that are needed.
//!
//! In: ranges. Out: bytes. An object of many frames is then never in memory as a whole: its headers pass through a small window, and each
//! frame is asked for when its turn comes. What is behind a [`Source`] (a file, a pipe to who has one) is the caller's business.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

/// Bytes of the window through which headers are read; a single slice's fit into one.
const WINDOW_BYTES: usize = 16 << 10;

/// Something that has an object's bytes.
pub trait Source {
    /// Bytes of the object.
    fn n_bytes(&self) -> usize;

    /// Fills `buffer` from `offset` on; `false` where that cannot be had, also only in part. Why, is for the implementor to remember.
    fn read_at(&self, offset: usize, buffer: &mut [u8]) -> bool;
}

/// An object's bytes.
pub(super) enum Data<'a> {
    /// In memory.
    Bytes(Cow<'a, [u8]>),
    /// Elsewhere.
    Source(&'a dyn Source),
}

impl fmt::Debug for Data<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Data({} bytes)", self.len())
    }
}

impl Data<'_> {
    /// Bytes of the object.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Source(source) => source.n_bytes(),
        }
    }

    /// The bytes of a range; `None` where not all of them can be had.
    pub(super) fn get(&self, range: Range<usize>) -> Option<Cow<'_, [u8]>> {
        match self {
            Self::Bytes(bytes) => bytes.get(range).map(Cow::Borrowed),
            Self::Source(source) => {
                if range.start > range.end || range.end > source.n_bytes() {
                    return None;
                }
                let mut buffer = vec![0; range.len()];
                source
                    .read_at(range.start, &mut buffer)
                    .then_some(Cow::Owned(buffer))
            }
        }
    }
}

/// A few bytes of a [`Data`] at a time, in rising order without many questions.
#[derive(Debug, Clone, Default)]
pub(super) struct Window {
    start: usize,
    bytes: Vec<u8>,
}

impl Window {
    /// `N` bytes at `position`; `None` where they cannot be had.
    pub(super) fn array<const N: usize>(
        &mut self,
        data: &Data<'_>,
        position: usize,
    ) -> Option<[u8; N]> {
        let source = match data {
            Data::Bytes(bytes) => return bytes.get(position..)?.first_chunk().copied(),
            Data::Source(source) => source,
        };
        let end = position.checked_add(N)?;
        if position < self.start || end > self.start + self.bytes.len() {
            let left = source.n_bytes().checked_sub(position)?;
            if left < N {
                return None;
            }
            self.start = position;
            self.bytes.resize(left.min(WINDOW_BYTES), 0);
            if !source.read_at(position, &mut self.bytes) {
                self.bytes.clear();
                return None;
            }
        }
        self.bytes
            .get(position - self.start..)?
            .first_chunk()
            .copied()
    }
}
