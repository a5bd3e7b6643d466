//! How objects come in: by DICOM association or through a watched folder, into the durable spool.
//!
//! The stages in the order the data meets them: [`listener`] accepts connections ([`tls`] wraps them), [`wire`] frames PDUs under deadlines,
//! [`admit`] says who may send what of [`classes`], [`slots`] how many may come, [`association`] speaks with one peer, [`dimse`] reads its commands, [`store`] takes an
//! object ([`part10`] makes it a file) into the [`spool`]; files come by the [`watch_folder`]. [`retention`] deletes, by a [`clock`] that is right. Analysis reads the spool and never limits intake.

mod admit;
mod association;
pub(crate) mod classes;
pub(crate) mod clock;
mod dimse;
mod listener;
pub(crate) mod part10;
pub(crate) mod retention;
pub(crate) mod slots;
pub(crate) mod spool;
mod store;
pub(crate) mod tls;
pub(crate) mod watch_folder;
mod wire;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

use crate::commitment::Commitments;
use crate::config::Config;
use crate::operate::visitors::Visitors;
pub(crate) use listener::Listener;
use spool::Spool;

/// What all associations share.
#[derive(Debug)]
pub(crate) struct Intake {
    /// Where objects go.
    pub(crate) spool: Arc<Spool>,
    /// The configuration in force; a new one counts for the next association.
    pub(crate) config: watch::Receiver<Arc<Config>>,
    /// What was done and refused.
    pub(crate) counters: Counters,
    /// Who is connected.
    pub(crate) slots: slots::Slots,
    /// DICOM over TLS, where configured; a new one counts for the next connection.
    pub(crate) tls: watch::Receiver<Option<tls::Identity>>,
    /// Storage commitment, both ways.
    pub(crate) commitments: Commitments,
    /// Who came.
    pub(crate) visitors: Arc<Visitors>,
    /// By which things are too old.
    pub(crate) clock: clock::Clock,
    /// When it was last said that there is no room.
    refusal_said: store::Said,
}

impl Intake {
    /// Nothing has come yet.
    pub(crate) fn new(
        spool: Arc<Spool>,
        config: watch::Receiver<Arc<Config>>,
        tls: watch::Receiver<Option<tls::Identity>>,
        commitments: Commitments,
    ) -> Self {
        let clock = clock::Clock::open(&config.borrow().state_dir);
        Self {
            spool,
            config,
            counters: Counters::default(),
            slots: slots::Slots::default(),
            tls,
            commitments,
            visitors: Arc::default(),
            clock,
            refusal_said: store::Said::default(),
        }
    }
}

/// What was done and refused since the start, for the metrics.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Connections accepted.
    pub(crate) connections: Count,
    /// Connections closed for a newer one because too many were open without a request.
    pub(crate) connections_displaced: Count,
    /// Associations accepted.
    pub(crate) associations: Count,
    /// Associations rejected because of the peer: its titles, its address, its protocol.
    pub(crate) rejected_peer: Count,
    /// Associations rejected because of a cap.
    pub(crate) rejected_limit: Count,
    /// Connections and associations ended by a deadline or by the minimum rate.
    pub(crate) timed_out: Count,
    /// Associations ended by an abort of either side, or by a lost connection.
    pub(crate) aborted: Count,
    /// C-ECHO answered.
    pub(crate) echoes: Count,
    /// Objects stored by C-STORE.
    pub(crate) stored: Count,
    /// Objects refused with A7xx: no room.
    pub(crate) refused_room: Count,
    /// Objects refused with A9xx, Cxxx or 0124.
    pub(crate) refused_object: Count,
    /// Files taken from the watched folder.
    pub(crate) files_taken: Count,
    /// Files of the watched folder that were put into quarantine.
    pub(crate) files_quarantined: Count,
}

/// A count that only grows.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// One more.
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The count.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where files of the watched folder go that cannot be taken.
pub(crate) fn quarantine_folder(config: &Config) -> PathBuf {
    config.state_dir.join("quarantine")
}

/// Now, Unix time in ms.
pub(crate) fn unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}
