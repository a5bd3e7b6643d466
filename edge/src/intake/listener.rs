//! Accepts connections and gives each to a task; stops gracefully.
//!
//! In: a bound socket. A connection without a request costs a task and 2 KiB; at most [`MAX_WAITING`] of them are kept, and a
//! newer one displaces the oldest, so peers that connect and say nothing, or drip, keep nobody out. What an association
//! may do is [`super::association`]'s business.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::Intake;
use super::admit::Rejection;
use super::association::{self, Ending, Surroundings};
use super::wire::WireError;

/// Connections that may wait before their request.
const MAX_WAITING: usize = 512;
/// Connections that the kernel keeps until we accept them.
const BACKLOG: u32 = 1024;
/// Pause after a connection could not be accepted, for lack of file descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A bound socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
}

/// Connections without a request, the oldest first.
#[derive(Clone, Debug, Default)]
struct Waiting {
    tasks: Arc<Mutex<BTreeMap<u64, AbortHandle>>>,
}

impl Listener {
    /// Binds an address; port 0 lets the system choose.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub(crate) fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let socket = socket.listen(BACKLOG)?;
        Ok(Self { socket })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system does not say.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Serves until `stopping` turns true, then lets associations finish what they send for at most the configured time.
    pub(crate) async fn run(self, intake: Arc<Intake>, stopping: watch::Receiver<bool>) {
        let mut tasks = JoinSet::new();
        let waiting = Waiting::default();
        let mut until = stopping.clone();
        let mut number = 0;
        loop {
            let accepted = tokio::select! {
                biased;
                _ = until.wait_for(|is_stopping| *is_stopping) => break,
                Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
                accepted = self.socket.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "connection not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            number += 1;
            intake.counters.connections.add();
            let around = Surroundings {
                config: Arc::clone(&intake.config.borrow()),
                intake: Arc::clone(&intake),
                address: address.ip().to_canonical(),
                stopping: stopping.clone(),
            };
            let connection = connection(stream, around, waiting.clone(), number);
            if waiting.add(number, || tasks.spawn(connection)) {
                intake.counters.connections_displaced.add();
            }
        }
        drop(self.socket);
        waiting.abort_all();
        let drain = intake.config.borrow().limits.drain_timeout;
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(drain, all).await.is_err() {
            tracing::warn!(associations = intake.slots.open(), "associations cut off");
        }
        // What is left is aborted when the set is dropped.
    }
}

async fn connection(stream: TcpStream, around: Surroundings, waiting: Waiting, number: u64) {
    // A peer without it only gets its answers later.
    drop(stream.set_nodelay(true));
    let intake = Arc::clone(&around.intake);
    let address = around.address;
    let admitted = || waiting.remove(number);
    let identity = intake.tls.borrow().clone();
    let done = match identity {
        None => association::serve(stream, around, admitted).await,
        Some(identity) => {
            let within = around.config.limits.request_timeout;
            let handshake = TlsAcceptor::from(identity.server).accept(stream);
            match tokio::time::timeout(within, handshake).await {
                Ok(Ok(stream)) => association::serve(stream, around, admitted).await,
                Ok(Err(error)) => Err(Ending::Handshake(error)),
                Err(_) => Err(WireError::Slow(within).into()),
            }
        }
    };
    waiting.remove(number);
    let Err(ending) = done else {
        return;
    };
    match &ending {
        Ending::Rejected(Rejection::Limit) => intake.counters.rejected_limit.add(),
        Ending::Rejected(_) | Ending::Handshake(_) => intake.counters.rejected_peer.add(),
        Ending::Wire(WireError::Idle(_) | WireError::Slow(_) | WireError::Rate(_)) => {
            intake.counters.timed_out.add();
        }
        // A connection that closes before it says anything is a port scan or a health check.
        Ending::Wire(WireError::Closed) | Ending::Stopping => {}
        _ => intake.counters.aborted.add(),
    }
    tracing::info!(%address, reason = %ending, "association ended");
}

impl Waiting {
    /// Starts and adds a connection. Out: whether the oldest was displaced for it.
    fn add(&self, number: u64, spawn: impl FnOnce() -> AbortHandle) -> bool {
        // Under the lock, so that the task cannot remove itself before it is there.
        let mut tasks = self.lock();
        tasks.insert(number, spawn());
        if tasks.len() <= MAX_WAITING {
            return false;
        }
        if let Some((_, oldest)) = tasks.pop_first() {
            oldest.abort();
        }
        true
    }

    fn remove(&self, number: u64) {
        self.lock().remove(&number);
    }

    fn abort_all(&self) {
        for task in self.lock().values() {
            task.abort();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, AbortHandle>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
