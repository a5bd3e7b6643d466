//! Tells browsers that something changed, by server-sent events (WHATWG HTML 9.2).
//!
//! An event holds no data of a study: the browser fetches the page again. A browser that falls behind gets one event for all that it missed.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use tokio::sync::broadcast;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::BroadcastStream;

/// Most browsers that listen at once; each holds a connection.
const MAX_LISTENERS: usize = 64;
/// How often something is sent where nothing changes, so that a dead connection is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Counts listeners.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listeners(Arc<AtomicUsize>);

/// A place among the listeners; given back when dropped.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Listeners {
    fn enter(&self) -> Option<Place> {
        let place = Place(Arc::clone(&self.0));
        let n_before = self.0.fetch_add(1, Ordering::Relaxed);
        (n_before < MAX_LISTENERS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The stream of events; 503 where too many listen.
pub(crate) fn events(changed: broadcast::Receiver<()>, listeners: &Listeners) -> Response {
    let Some(place) = listeners.enter() else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let stream = BroadcastStream::new(changed).map(move |_changed_or_lagged| {
        let _held = &place;
        Ok::<Event, Infallible>(Event::default().event("changed").data("1"))
    });
    let first = tokio_stream::once(Ok(Event::default().event("hello").data("1")));
    Sse::new(first.chain(stream))
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_bounded_and_places_are_given_back() {
        let listeners = Listeners::default();
        let mut places: Vec<Place> = (0..MAX_LISTENERS)
            .map(|_| listeners.enter().unwrap())
            .collect();
        assert!(listeners.enter().is_none());
        places.pop();
        assert!(listeners.enter().is_some());
    }
}
