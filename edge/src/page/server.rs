//! The HTTP side: a bounded number of connections, each with a deadline, until the node stops.
//!
//! A connection beyond [`MAX_CONNECTIONS`] waits in the system's queue. Every connection ends after [`MAX_LIFE`]: a browser opens the next by
//! itself, and one that drips bytes holds its place no longer.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Sleep, sleep};

/// Connections at a time, listening browsers included.
const MAX_CONNECTIONS: usize = 128;
/// Longest life of a connection.
const MAX_LIFE: Duration = Duration::from_secs(600);
/// Pause after an accept that failed, for example without free descriptors.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves until `stopping` is true; open answers are not waited for, because a browser may listen for ever.
pub(crate) async fn run(
    listener: TcpListener,
    router: Router,
    mut stopping: watch::Receiver<bool>,
) {
    let listener = Bounded {
        listener,
        places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
    };
    tokio::select! {
        served = axum::serve(listener, router) => if let Err(error) = served {
            tracing::error!(%error, "the page ended");
        },
        _ = stopping.wait_for(|is_stopping| *is_stopping) => {}
    }
}

#[derive(Debug)]
struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let place = Arc::clone(&self.places).acquire_owned().await;
            let Ok(place) = place else {
                // The semaphore is never closed; waiting is the harmless answer.
                std::future::pending::<()>().await;
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let end = Box::pin(sleep(MAX_LIFE));
                    let connection = Connection {
                        stream,
                        end,
                        _place: place,
                    };
                    return (connection, address);
                }
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that ends at its time.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        self.end.as_mut().poll(context).is_ready()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_over(context) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
