//! The page: results for people, from the daemon itself, without a script, a font or a picture from elsewhere.
//!
//! In: what the [`Sources`] give. Out: HTML, JSON, pictures and text over HTTP. [`routes`] is the table of addresses; [`access`] decides who is
//! let in and sets the headers; [`layout`] is the frame of every page; [`worklist`], [`study_view`] and [`system_view`] are the pages; [`listing`] keeps the worklist's rows; [`strip`] and
//! [`picture`] draw; [`words`] and [`person`] say; [`live`] tells browsers that something changed. The page decodes nothing that a peer
//! sent: slices come as tensors from the worker process. Names of patients are escaped by the template engine, and nowhere logged.

pub(crate) mod access;
#[cfg(test)]
pub(crate) mod example;
pub(crate) mod layout;
pub(crate) mod listing;
pub(crate) mod live;
pub(crate) mod node;
pub(crate) mod person;
pub(crate) mod picture;
pub(crate) mod routes;
#[cfg(test)]
mod served;
pub(crate) mod server;
pub(crate) mod slices;
pub(crate) mod strip;
pub(crate) mod study_view;
pub(crate) mod system_view;
pub(crate) mod words;
pub(crate) mod worklist;

use std::fmt;

use engine::Contributions;
use shared::uid::Uid;
use tokio::sync::broadcast;

use crate::decide::Changed;
use crate::operate::exposition::TextForm;
use crate::operate::metrics::{Counts, Metrics};
use crate::operate::status::Status;
use crate::result::{SliceResult, StudyResult};

/// Most studies on the worklist; older ones are reached by their address.
pub(crate) const MAX_LISTED: usize = 500;

/// Hands every study to the function that it is given.
pub(crate) type EachStudy = dyn Fn(&mut dyn FnMut(StudyResult)) + Send + Sync;
/// The study of that UID.
pub(crate) type OneStudy = dyn Fn(&Uid) -> Option<StudyResult> + Send + Sync;
/// What a slice's picture is drawn from; with its heat map when asked for.
pub(crate) type Picture = dyn Fn(&SliceResult, bool) -> Result<Shown, NotShown> + Send + Sync;

/// Where the page gets what it shows. The functions may block; routes call them off the event loop.
pub(crate) struct Sources {
    /// Shows all studies, one at a time: a study has hundreds of slices.
    pub(crate) studies: Box<EachStudy>,
    /// One study.
    pub(crate) study: Box<OneStudy>,
    /// The tensor of a slice, and where its answer comes from when that is asked for.
    pub(crate) slice: Box<Picture>,
    /// The daemon's state.
    pub(crate) status: Box<dyn Fn() -> Status + Send + Sync>,
    /// What the stages have counted.
    pub(crate) counts: Box<dyn Fn() -> Counts + Send + Sync>,
    /// What is counted with labels.
    pub(crate) metrics: Metrics,
    /// Something changed.
    pub(crate) changed: broadcast::Sender<()>,
    /// A study changed.
    pub(crate) study_changed: broadcast::Sender<Changed>,
}

/// How the page is shown.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// Show no names, IDs and birth dates.
    pub(crate) is_anonymous: bool,
    /// Who may come in; `None` where only this machine can, because the address is a loopback one.
    pub(crate) token: Option<String>,
}

/// What a picture of a slice is drawn from.
#[derive(Debug)]
pub(crate) struct Shown {
    /// u8 `[3, 256, 256]`.
    pub(crate) tensor: Vec<u8>,
    /// Where the answer comes from.
    pub(crate) contributions: Option<Contributions>,
}

/// Why there is no picture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotShown {
    /// Retention has purged the object.
    #[error("the slice is no longer stored")]
    Purged,
    /// The worker refused it.
    #[error("{0}")]
    Refused(String),
    /// Too many are being drawn.
    #[error("too many pictures are being drawn; try again")]
    Busy,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

impl Sources {
    /// The counters as text.
    pub(crate) fn metrics_text(&self, form: TextForm) -> String {
        self.metrics.text(&(self.counts)(), &(self.status)(), form)
    }
}
