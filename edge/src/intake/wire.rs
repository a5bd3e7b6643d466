//! PDUs of one connection, read and written under deadlines (PS3.8 section 9.3).
//!
//! In: a byte stream. Out: one whole PDU at a time, in a buffer that grows only with the bytes that came, never with the length that was
//! claimed. A deadline per read is defeated by a peer that drips; so a PDU as a whole has a deadline, and a message as a whole a
//! least rate. Time in which we do not read, because the spool is busy, is never held against the peer. What PDUs mean is
//! [`super::association`]'s business.

use std::io;
use std::ops::Range;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout};

use crate::config::Limits;

/// Largest P-DATA-TF that we offer to receive, and so the largest that is read.
pub(crate) const MAX_PDU_BYTES: u32 = 128 << 10;
/// Largest A-ASSOCIATE-RQ: 128 contexts with 40 transfer syntaxes each.
pub(super) const MAX_REQUEST_BYTES: u32 = 256 << 10;
/// PDU type, reserved byte, length.
const HEADER_BYTES: usize = 6;
/// What the buffer begins with.
const FIRST_BYTES: usize = 2048;

/// Why no PDU was read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    /// The peer closed the connection between two PDUs.
    #[error("connection closed")]
    Closed,
    /// The peer was silent for too long.
    #[error("nothing came for {0:?}")]
    Idle(Duration),
    /// A PDU took too long.
    #[error("PDU not complete after {0:?}")]
    Slow(Duration),
    /// A message came too slowly.
    #[error("less than {0} bytes a second")]
    Rate(u64),
    /// A PDU is longer than was agreed.
    #[error("PDU of {found} bytes, at most {most}")]
    TooLong {
        /// Its length.
        found: u32,
        /// The most.
        most: u32,
    },
    /// The connection failed.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
}

/// A connection and what was read ahead.
#[derive(Debug)]
pub(super) struct Wire<S> {
    stream: S,
    buffer: Vec<u8>,
    filled: usize,
    /// The PDU that was returned last and may be overwritten.
    consumed: usize,
    rate: Rate,
}

/// Bytes and the time waited for them within a message.
#[derive(Debug, Default)]
struct Rate {
    is_measured: bool,
    waited: Duration,
    bytes: u64,
}

/// What a read brought.
enum Filled {
    /// Bytes, or the end of a rate window that was fast enough.
    Some,
    /// The end of the stream.
    End,
    /// Nothing before the deadline.
    Late,
}

/// How long to wait for a PDU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For its first byte.
    pub(super) first_byte: Duration,
    /// From its first byte to its last.
    pub(super) whole: Duration,
    /// Its longest.
    pub(super) max_bytes: u32,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            filled: 0,
            consumed: 0,
            rate: Rate::default(),
        }
    }

    /// Begins or ends the measuring of the rate: within a message, bytes must come.
    pub(super) fn measure_rate(&mut self, is_measured: bool) {
        self.rate = Rate {
            is_measured,
            ..Rate::default()
        };
    }

    /// Waits for the beginning of a PDU; nothing is lost when the wait is given up.
    pub(super) async fn wait(
        &mut self,
        patience: Patience,
        limits: &Limits,
    ) -> Result<(), WireError> {
        self.discard();
        let deadline = Instant::now() + patience.first_byte;
        while self.filled == 0 {
            match self.fill(FIRST_BYTES, deadline, limits).await? {
                Filled::Some => {}
                Filled::End => return Err(WireError::Closed),
                Filled::Late => return Err(WireError::Idle(patience.first_byte)),
            }
        }
        Ok(())
    }

    /// Reads a PDU. Out: its type, and where its body lies in the buffer.
    pub(super) async fn read(
        &mut self,
        patience: Patience,
        limits: &Limits,
    ) -> Result<(u8, Range<usize>), WireError> {
        self.wait(patience, limits).await?;
        let deadline = Instant::now() + patience.whole;
        let mut needed = HEADER_BYTES;
        loop {
            if let Some(header) = self.buffer[..self.filled].first_chunk::<HEADER_BYTES>() {
                let found = u32::from_be_bytes([header[2], header[3], header[4], header[5]]);
                if found > patience.max_bytes {
                    return Err(WireError::TooLong {
                        found,
                        most: patience.max_bytes,
                    });
                }
                needed = HEADER_BYTES + found as usize;
            }
            if self.filled >= needed {
                break;
            }
            // The buffer doubles with what came, so a claimed length alone costs nothing.
            let room = needed.min((2 * self.filled).max(FIRST_BYTES));
            match self.fill(room, deadline, limits).await? {
                Filled::Some => {}
                Filled::End => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Filled::Late => return Err(WireError::Slow(patience.whole)),
            }
        }
        self.consumed = needed;
        Ok((self.buffer[0], HEADER_BYTES..needed))
    }

    /// Lends the buffer, so that a PDU's body can be handled while answers are written.
    pub(super) fn lend(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }

    /// Takes the buffer back.
    pub(super) fn restore(&mut self, buffer: Vec<u8>) {
        self.buffer = buffer;
    }

    /// Reads once, into at least `room` bytes of buffer.
    async fn fill(
        &mut self,
        room: usize,
        deadline: Instant,
        limits: &Limits,
    ) -> Result<Filled, WireError> {
        self.make_room(room);
        let asked = Instant::now();
        let mut patience = deadline.saturating_duration_since(asked);
        if self.rate.is_measured {
            patience = patience.min(limits.rate_window.saturating_sub(self.rate.waited));
        }
        let read = self.stream.read(&mut self.buffer[self.filled..]);
        let read = timeout(patience, read).await;
        self.rate.waited += asked.elapsed();
        match read {
            Ok(Ok(0)) => return Ok(Filled::End),
            Ok(read) => {
                let bytes = read?;
                self.filled += bytes;
                self.rate.bytes += bytes as u64;
            }
            Err(_) if Instant::now() >= deadline => return Ok(Filled::Late),
            Err(_) => {}
        }
        self.check_rate(limits)?;
        Ok(Filled::Some)
    }

    fn check_rate(&mut self, limits: &Limits) -> Result<(), WireError> {
        if !self.rate.is_measured || self.rate.waited < limits.rate_window {
            return Ok(());
        }
        // In ms, so that windows below a second count too; no product comes near 2^64.
        let waited_ms = u64::try_from(self.rate.waited.as_millis()).unwrap_or(u64::MAX);
        let least = limits.min_bytes_per_second.saturating_mul(waited_ms) / 1000;
        if self.rate.bytes < least {
            return Err(WireError::Rate(limits.min_bytes_per_second));
        }
        self.measure_rate(true);
        Ok(())
    }

    /// Writes bytes whole.
    pub(super) async fn write(&mut self, bytes: &[u8], within: Duration) -> Result<(), WireError> {
        let write = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        timeout(within, write)
            .await
            .map_err(|_| WireError::Slow(within))??;
        Ok(())
    }

    /// Says that nothing more will come, and waits a little for the peer to have read it.
    pub(super) async fn close(&mut self, within: Duration) {
        let close = async {
            self.stream.shutdown().await?;
            let mut rest = [0; 512];
            // Bytes that are left unread would turn the close into a reset, which can overtake our last PDU.
            for _ in 0..64 {
                if self.stream.read(&mut rest).await? == 0 {
                    break;
                }
            }
            Ok::<(), io::Error>(())
        };
        // There is nobody left to tell of a failure.
        drop(timeout(within, close).await);
    }

    fn discard(&mut self) {
        let consumed = std::mem::take(&mut self.consumed);
        self.buffer.copy_within(consumed..self.filled, 0);
        self.filled -= consumed;
    }

    fn make_room(&mut self, bytes: usize) {
        if self.buffer.len() < bytes {
            self.buffer.resize(bytes, 0);
        }
    }
}
