//! The processes that train one network together, each on its share of every batch.
//!
//! In: what the launcher says in the environment (torchrun's variables, `srun`, Open MPI's `mpirun`). Out: [`Ranks::sum`], the one
//! function through which ranks exchange numbers: gradients, the loss, validation logits and first weights all go through it.
//! Rank 0 listens; it adds in the order of the ranks, in f64, so that the sum is the same bits however messages arrive, and every
//! rank gets the same bits. Messages are f32 little-endian in pieces of at most [`BUCKET`] values. The network between the ranks is trusted.

mod place;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

pub use self::place::Place;
use crate::exit::{Exit, fault};

/// Values that travel in one piece: 4 MiB.
const BUCKET: usize = 1 << 20;
/// How long the ranks look for each other.
const MEETING_TIME: Duration = Duration::from_secs(120);
/// How long one that has come may take to say who it is.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(50);
/// A rank that is silent for so long is lost.
const SILENCE: Duration = Duration::from_secs(300);
/// First bytes of a greeting.
const MAGIC: [u8; 8] = *b"pe-rank1";
/// Magic, rank and number of ranks (u32 little-endian), BLAKE3 of what all must have in common.
const GREETING_BYTES: usize = 8 + 4 + 4 + 32;
/// What rank 0 says before a piece: all is well, or the rank that was lost.
const WELL: u32 = u32::MAX;

/// All processes of a run, as one of them sees them.
#[derive(Debug)]
pub enum Ranks {
    /// One process: sums are what they are.
    Alone,
    /// Rank 0, with the connections to ranks 1, 2, ... in their order.
    Root(Vec<TcpStream>),
    /// Another rank with its connection to rank 0.
    Member {
        /// From 1.
        rank: u32,
        /// Processes.
        n: u32,
        /// To rank 0.
        root: TcpStream,
    },
}

impl Ranks {
    /// Meets the other ranks; `common` must be equal on all of them (what the run is, its data and options).
    ///
    /// # Errors
    /// Ranks that do not come in time, or that come with something else in mind.
    pub fn meet(place: Option<&Place>, common: &str) -> Result<Self> {
        let Some(place) = place else {
            return Ok(Self::Alone);
        };
        let digest = *blake3::hash(common.as_bytes()).as_bytes();
        if place.rank == 0 {
            receive(place, &digest)
        } else {
            join(place, &digest)
        }
    }

    /// This process' number, from 0.
    #[must_use]
    pub fn rank(&self) -> u32 {
        match self {
            Self::Alone | Self::Root(_) => 0,
            Self::Member { rank, .. } => *rank,
        }
    }

    /// Number of processes.
    #[must_use]
    pub fn n(&self) -> u32 {
        match self {
            Self::Alone => 1,
            Self::Root(members) => u32::try_from(members.len() + 1).unwrap_or(u32::MAX),
            Self::Member { n, .. } => *n,
        }
    }

    /// Whether this process writes the files: rank 0.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.rank() == 0
    }

    /// This rank's piece of `length` places: pieces follow each other in the order of the ranks and differ by one at most.
    #[must_use]
    pub fn share(&self, length: usize) -> std::ops::Range<usize> {
        let (rank, n) = (self.rank() as usize, self.n() as usize);
        rank * length / n..(rank + 1) * length / n
    }

    /// Replaces `values` by their sums over all ranks; every rank must call it with as many.
    ///
    /// # Errors
    /// A rank was lost; the message names it.
    pub fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        for piece in values.chunks_mut(BUCKET) {
            match self {
                Self::Alone => {}
                Self::Root(members) => sum_as_root(members, piece)?,
                Self::Member { root, .. } => sum_as_member(root, piece)?,
            }
        }
        Ok(())
    }

    /// Replaces `values` by those of rank 0.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn spread(&mut self, values: &mut [f32]) -> Result<()> {
        if !self.is_root() {
            values.fill(-0.0);
        }
        self.sum(values)
    }
}

fn lost(rank: usize, error: &std::io::Error) -> anyhow::Error {
    let reason = match error.kind() {
        ErrorKind::UnexpectedEof => "it ended".to_owned(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            format!("nothing heard for {} s", SILENCE.as_secs())
        }
        _ => error.to_string(),
    };
    fault(
        Exit::PeerDown,
        format!(
            "rank {rank} was lost: {reason}; continue from the last checkpoint with --resume, with any number of ranks"
        ),
    )
}

/// Receives a piece from each member in turn, adds it, and sends the sums; a lost member's rank is told to the others.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the sum is rounded to f32 once"
)]
fn sum_as_root(members: &mut [TcpStream], piece: &mut [f32]) -> Result<()> {
    let mut sums: Vec<f64> = piece.iter().map(|value| f64::from(*value)).collect();
    let mut bytes = vec![0; piece.len() * 4];
    for member in 0..members.len() {
        if let Err(error) = members[member].read_exact(&mut bytes) {
            let rank = u32::try_from(member + 1).unwrap_or(0);
            for other in members.iter_mut() {
                // Whoever cannot hear it any more needs not know.
                drop(other.write_all(&rank.to_le_bytes()));
            }
            return Err(lost(member + 1, &error));
        }
        for (sum, value) in sums.iter_mut().zip(floats(&bytes)) {
            *sum += f64::from(value);
        }
    }
    for (value, sum) in piece.iter_mut().zip(sums) {
        *value = sum as f32;
    }
    let mut message = WELL.to_le_bytes().to_vec();
    message.extend(piece.iter().flat_map(|value| value.to_le_bytes()));
    for (member, stream) in members.iter_mut().enumerate() {
        let sent = stream.write_all(&message);
        sent.map_err(|error| lost(member + 1, &error))?;
    }
    Ok(())
}

fn sum_as_member(root: &mut TcpStream, piece: &mut [f32]) -> Result<()> {
    let bytes: Vec<u8> = piece.iter().flat_map(|value| value.to_le_bytes()).collect();
    // Where rank 0 is ending because another rank was lost, it has said so: that is read first.
    let sent = root.write_all(&bytes);
    let mut word = [0; 4];
    let heard = root.read_exact(&mut word);
    let word = u32::from_le_bytes(word);
    if heard.is_ok() && word != WELL {
        let error = std::io::Error::from(ErrorKind::UnexpectedEof);
        return Err(lost(word as usize, &error));
    }
    let mut bytes = bytes;
    let received = sent.and(heard).and_then(|()| root.read_exact(&mut bytes));
    received.map_err(|error| lost(0, &error))?;
    for (value, sum) in piece.iter_mut().zip(floats(&bytes)) {
        *value = sum;
    }
    Ok(())
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> + '_ {
    let words = bytes.chunks_exact(4);
    words.map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}

/// Rank 0: waits until all others have come. A connection that does not greet as a rank is dropped.
fn receive(place: &Place, digest: &[u8; 32]) -> Result<Ranks> {
    let address = (place.host.as_str(), place.port);
    let listener = TcpListener::bind(address)
        .with_context(|| format!("listening on {}:{} as rank 0", place.host, place.port))?;
    listener.set_nonblocking(true)?;
    let begin = Instant::now();
    let mut members: Vec<Option<TcpStream>> = (1..place.n).map(|_| None).collect();
    while let Some(missing) = members.iter().position(Option::is_none) {
        match listener.accept() {
            Ok((stream, _)) => {
                let Some((rank, stream)) = greeted(stream, place, digest)? else {
                    continue;
                };
                members[rank as usize - 1] = Some(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if begin.elapsed() > MEETING_TIME {
                    let seconds = MEETING_TIME.as_secs();
                    let rank = missing + 1;
                    let message = format!("rank {rank} did not come within {seconds} s");
                    return Err(fault(Exit::PeerDown, message));
                }
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(error).context("waiting for the other ranks"),
        }
    }
    let members: Vec<TcpStream> = members.into_iter().flatten().collect();
    for mut member in &members {
        member.write_all(&MAGIC).context("greeting a rank")?;
    }
    Ok(Ranks::Root(members))
}

/// The rank that greets on a connection; `None` for a stranger.
fn greeted(
    mut stream: TcpStream,
    place: &Place,
    digest: &[u8; 32],
) -> Result<Option<(u32, TcpStream)>> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(GREETING_TIME))?;
    let mut greeting = [0; GREETING_BYTES];
    if stream.read_exact(&mut greeting).is_err() || greeting[..8] != MAGIC {
        return Ok(None);
    }
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| greeting[at + byte]));
    let (rank, n) = (word(8), word(12));
    if n != place.n || !(1..place.n).contains(&rank) || greeting[16..] != digest[..] {
        return Err(fault(
            Exit::Usage,
            format!(
                "rank {rank} of {n} was started for another run: data, options, checkpoint and number of ranks must be the same"
            ),
        ));
    }
    settle(&stream)?;
    Ok(Some((rank, stream)))
}

/// Another rank: finds rank 0, which may start later.
fn join(place: &Place, digest: &[u8; 32]) -> Result<Ranks> {
    let begin = Instant::now();
    let connect = || -> std::io::Result<TcpStream> {
        let mut last = std::io::Error::from(ErrorKind::AddrNotAvailable);
        for address in (place.host.as_str(), place.port).to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, GREETING_TIME) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    let mut root = loop {
        match connect() {
            Ok(stream) => break stream,
            Err(error) if begin.elapsed() > MEETING_TIME => {
                let at = format!("{}:{}", place.host, place.port);
                let message = format!("rank 0 is not at {at}: {error}");
                return Err(fault(Exit::PeerDown, message));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    };
    settle(&root)?;
    let mut greeting = MAGIC.to_vec();
    greeting.extend(place.rank.to_le_bytes());
    greeting.extend(place.n.to_le_bytes());
    greeting.extend(digest);
    let mut answer = [0; 8];
    let met = root
        .write_all(&greeting)
        .and_then(|()| root.read_exact(&mut answer));
    met.map_err(|error| lost(0, &error))?;
    Ok(Ranks::Member {
        rank: place.rank,
        n: place.n,
        root,
    })
}

fn settle(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    Ok(())
}

#[cfg(test)]
mod tests;
