//! Who came: for the system view, and for the audit log.
//!
//! In: associations as they are accepted, turned away and ended. Out: a bounded list of peers with what they sent, and audit lines: one for each association
//! that sent objects, one for each that was turned away. An association that only echoes leaves none, and of those turned away at most
//! [`MAX_LINES_A_MINUTE`] are written, so that nobody can push the log's memory out by knocking.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::audit::{Audit, Event};

/// Peers that are remembered; the one heard longest ago is forgotten.
const MAX_SEEN: usize = 64;
/// Lines of associations turned away.
const MAX_LINES_A_MINUTE: u32 = 30;

/// Who came.
#[derive(Debug, Default)]
pub(crate) struct Visitors {
    audit: OnceLock<Arc<Audit>>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    seen: BTreeMap<(String, IpAddr), Seen>,
    minute: Option<(Instant, u32)>,
}

/// What is known of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Unix time in ms.
    pub(crate) last_ms: i64,
    /// Objects taken from it since the start.
    pub(crate) n_objects: u64,
}

/// An association that was accepted; it is recorded when this is dropped.
#[derive(Debug)]
pub(crate) struct Visit {
    visitors: Arc<Visitors>,
    calling_ae: String,
    address: IpAddr,
    n_objects: u64,
    n_refused: u64,
}

impl Visitors {
    /// From now on lines go to `audit`.
    pub(crate) fn audit_to(&self, audit: Arc<Audit>) {
        // An error means that it is set already.
        drop(self.audit.set(audit));
    }

    /// An association was accepted.
    pub(crate) fn enter(self: &Arc<Self>, calling_ae: &str, address: IpAddr) -> Visit {
        let visit = Visit {
            visitors: Arc::clone(self),
            calling_ae: calling_ae.to_owned(),
            address,
            n_objects: 0,
            n_refused: 0,
        };
        self.note(&visit);
        visit
    }

    /// An association was turned away.
    pub(crate) fn turned_away(&self, calling_ae: &str, address: IpAddr, why: &str) {
        if self.may_write(Instant::now()) {
            self.record(&Event::Association {
                calling_ae,
                address: &address.to_string(),
                answer: why,
            });
        }
    }

    /// The peers that were heard, by title and address.
    pub(crate) fn seen(&self) -> Vec<((String, IpAddr), Seen)> {
        let known = self.lock();
        known
            .seen
            .iter()
            .map(|(peer, seen)| (peer.clone(), *seen))
            .collect()
    }

    fn note(&self, visit: &Visit) {
        let mut known = self.lock();
        let peer = (visit.calling_ae.clone(), visit.address);
        let seen = known.seen.entry(peer).or_default();
        seen.last_ms = crate::intake::unix_ms();
        seen.n_objects += visit.n_objects;
        if known.seen.len() > MAX_SEEN {
            let oldest = known.seen.iter().min_by_key(|(_, seen)| seen.last_ms);
            if let Some(oldest) = oldest.map(|(peer, _)| peer.clone()) {
                known.seen.remove(&oldest);
            }
        }
    }

    fn may_write(&self, now: Instant) -> bool {
        let mut known = self.lock();
        let (since, n_lines) = known
            .minute
            .filter(|(since, _)| now.saturating_duration_since(*since) < Duration::from_secs(60))
            .unwrap_or((now, 0));
        known.minute = Some((since, n_lines + 1));
        n_lines < MAX_LINES_A_MINUTE
    }

    pub(crate) fn record(&self, event: &Event<'_>) {
        if let Some(audit) = self.audit.get()
            && let Err(error) = audit.record(event, jiff::Timestamp::now())
        {
            tracing::error!(%error, "the audit log cannot be written");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Visit {
    /// An object was answered with success.
    pub(crate) fn stored(&mut self) {
        self.n_objects += 1;
    }

    /// An object was refused.
    pub(crate) fn refused(&mut self) {
        self.n_refused += 1;
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.visitors.note(self);
        if self.n_objects + self.n_refused > 0 {
            self.visitors.record(&Event::Received {
                calling_ae: &self.calling_ae,
                address: &self.address.to_string(),
                n_objects: self.n_objects,
                n_refused: self.n_refused,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn audited() -> (tempfile::TempDir, Arc<Visitors>) {
        let folder = tempfile::tempdir().unwrap();
        let visitors = Arc::new(Visitors::default());
        visitors.audit_to(Arc::new(Audit::open(folder.path(), 1 << 20).unwrap()));
        (folder, visitors)
    }

    fn lines(folder: &tempfile::TempDir) -> Vec<String> {
        let text = std::fs::read_to_string(folder.path().join("audit.jsonl")).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn what_a_peer_sent_is_one_line_and_an_echo_none() {
        let (folder, visitors) = audited();
        drop(visitors.enter("CT1", HERE));
        let mut visit = visitors.enter("CT1", HERE);
        visit.stored();
        visit.stored();
        visit.refused();
        drop(visit);
        let lines = lines(&folder);
        assert_eq!(lines.len(), 1);
        assert!(
            lines[0].contains("\"n_objects\":2,\"n_refused\":1"),
            "{}",
            lines[0]
        );
        assert_eq!(visitors.seen()[0].1.n_objects, 2);
    }

    #[test]
    fn knocking_fills_neither_the_log_nor_the_memory() {
        let (folder, visitors) = audited();
        for n in 0..500_u32 {
            visitors.turned_away("X", HERE, "calling AE title not recognized");
            drop(visitors.enter(&format!("AE{n}"), HERE));
        }
        assert_eq!(lines(&folder).len(), MAX_LINES_A_MINUTE as usize);
        assert_eq!(visitors.seen().len(), MAX_SEEN);
        let later = Instant::now() + Duration::from_secs(61);
        assert!(visitors.may_write(later), "the next minute begins anew");
    }
}
