//! The worklist's rows, kept ready: a study has hundreds of slices, and the worklist needs few words of each.
//!
//! In: every study once, then those that have changed. Out: the first [`MAX_LISTED`] rows in their order, and how many more there are. Rows beyond
//! these are not kept: where one of them moves up, or too many changes were missed, all studies are looked at again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};

use shared::uid::Uid;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::TryRecvError;

use super::worklist::{Listed, Place};
use super::{EachStudy, MAX_LISTED, OneStudy};
use crate::decide::Changed;

/// The rows.
#[derive(Debug)]
pub(crate) struct Listing(Mutex<Known>);

#[derive(Debug)]
struct Known {
    changes: Receiver<Changed>,
    /// Whether everything must be looked at.
    is_stale: bool,
    is_anonymous: bool,
    rows: BTreeMap<(Place, Uid), Listed>,
    places: HashMap<Uid, Place>,
}

impl Listing {
    /// Nothing is known yet; `changes` tells of every study that changes from now on.
    pub(crate) fn new(changes: Receiver<Changed>) -> Self {
        Self(Mutex::new(Known {
            changes,
            is_stale: true,
            is_anonymous: false,
            rows: BTreeMap::new(),
            places: HashMap::new(),
        }))
    }

    /// The rows as they are now, and how many older ones there are of `n_studies`.
    pub(crate) fn rows(
        &self,
        each: &EachStudy,
        one: &OneStudy,
        n_studies: usize,
        is_anonymous: bool,
    ) -> (Vec<Listed>, usize) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = known.changed();
        known.is_stale |= known.is_anonymous != is_anonymous;
        known.is_anonymous = is_anonymous;
        for study_uid in changed {
            if !known.is_stale {
                known.update(study_uid, one, n_studies);
            }
        }
        if known.is_stale || known.rows.len() < n_studies.min(MAX_LISTED) {
            known.look_at_all(each);
        }
        let rows: Vec<Listed> = known.rows.values().cloned().collect();
        let n_more = n_studies.saturating_sub(rows.len());
        (rows, n_more)
    }
}

impl Known {
    /// Studies that have changed since the last time.
    fn changed(&mut self) -> BTreeSet<Uid> {
        let mut changed = BTreeSet::new();
        loop {
            match self.changes.try_recv() {
                Ok(change) => drop(changed.insert(change.study_uid)),
                Err(TryRecvError::Lagged(_)) => self.is_stale = true,
                Err(TryRecvError::Empty | TryRecvError::Closed) => return changed,
            }
        }
    }

    fn update(&mut self, study_uid: Uid, one: &OneStudy, n_studies: usize) {
        let before = self.forget(&study_uid);
        let Some(result) = one(&study_uid) else {
            return;
        };
        let row = Listed::new(&result, self.is_anonymous);
        let last = self.rows.keys().next_back().map(|(place, _)| *place);
        let is_last = last.is_none_or(|last| row.place > last);
        if is_last && n_studies > self.rows.len() + 1 {
            // It stands among rows that are not kept: one of those may come before it now.
            self.is_stale |= before.is_some();
        } else {
            self.insert(study_uid, row);
        }
    }

    fn look_at_all(&mut self, each: &EachStudy) {
        self.rows.clear();
        self.places.clear();
        each(&mut |result| {
            let row = Listed::new(&result, self.is_anonymous);
            self.insert(result.study_uid, row);
        });
        self.is_stale = false;
    }

    fn insert(&mut self, study_uid: Uid, row: Listed) {
        self.places.insert(study_uid.clone(), row.place);
        self.rows.insert((row.place, study_uid), row);
        if self.rows.len() > MAX_LISTED
            && let Some(((_, study_uid), _)) = self.rows.pop_last()
        {
            self.places.remove(&study_uid);
        }
    }

    fn forget(&mut self, study_uid: &Uid) -> Option<Listed> {
        let place = self.places.remove(study_uid)?;
        self.rows.remove(&(place, study_uid.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::broadcast;

    use super::*;
    use crate::page::example;
    use crate::result::{Outcome, StudyResult};

    /// A store of studies that counts how often all of them are read.
    struct Bench {
        studies: Arc<Mutex<BTreeMap<Uid, StudyResult>>>,
        n_looks: Arc<AtomicUsize>,
        changed: broadcast::Sender<Changed>,
        listing: Listing,
    }

    impl Bench {
        fn new(n_studies: u32) -> Self {
            let changed = broadcast::Sender::new(8);
            let bench = Self {
                studies: Arc::default(),
                n_looks: Arc::default(),
                listing: Listing::new(changed.subscribe()),
                changed,
            };
            (0..n_studies).for_each(|index| bench.store(study(index)));
            bench
        }

        fn store(&self, result: StudyResult) {
            self.tell(&result.study_uid);
            let mut studies = self.studies.lock().unwrap();
            studies.insert(result.study_uid.clone(), result);
        }

        fn tell(&self, study_uid: &Uid) {
            let study_uid = study_uid.clone();
            let is_said = false;
            drop(self.changed.send(Changed { study_uid, is_said }));
        }

        /// Whether the rows are those that all studies give, and how often all were read for it.
        #[track_caller]
        fn check(&self, n_looks: usize) {
            let (studies, counted) = (Arc::clone(&self.studies), Arc::clone(&self.n_looks));
            let all = move |show: &mut dyn FnMut(StudyResult)| {
                counted.fetch_add(1, Ordering::Relaxed);
                studies.lock().unwrap().values().cloned().for_each(show);
            };
            let studies = Arc::clone(&self.studies);
            let one = move |uid: &Uid| studies.lock().unwrap().get(uid).cloned();
            let n_studies = self.studies.lock().unwrap().len();
            let (rows, n_more) = self.listing.rows(&all, &one, n_studies, false);
            let mut expected: Vec<_> = (self.studies.lock().unwrap().values())
                .map(|result| (Listed::new(result, false).place, result.study_uid.clone()))
                .collect();
            expected.sort();
            expected.truncate(MAX_LISTED);
            let found: Vec<Place> = rows.iter().map(|row| row.place).collect();
            let expected: Vec<Place> = expected.into_iter().map(|(place, _)| place).collect();
            assert_eq!(found, expected);
            assert_eq!(n_more, n_studies - rows.len());
            assert_eq!(self.n_looks.load(Ordering::Relaxed), n_looks);
        }
    }

    fn study(index: u32) -> StudyResult {
        let mut result = example::not_detected();
        result.study_uid = Uid::new(&format!("1.2.{index}")).unwrap();
        result.last_received_ms = i64::from(index);
        result
    }

    #[test]
    fn a_study_that_changes_is_read_alone() {
        let bench = Bench::new(20);
        bench.check(1);
        bench.check(1);
        bench.store(study(20));
        let mut positive = study(3);
        positive.outcome = Outcome::Positive;
        bench.store(positive);
        bench.check(1);
        bench.studies.lock().unwrap().remove(&study(5).study_uid);
        bench.tell(&study(5).study_uid);
        bench.check(1);
    }

    #[test]
    fn rows_are_bounded_and_follow_what_moves_up_from_behind() {
        let n_studies = u32::try_from(MAX_LISTED).unwrap() + 10;
        let bench = Bench::new(n_studies);
        bench.check(1);
        bench.store(study(n_studies));
        bench.check(1);
        // One that is not listed changes and stays where it is.
        bench.store(study(2));
        bench.check(1);
        // One that is listed becomes the oldest: the next one moves up.
        let mut oldest = study(n_studies);
        oldest.last_received_ms = -1;
        bench.store(oldest);
        bench.check(2);
    }

    #[test]
    fn where_changes_were_missed_everything_is_looked_at() {
        let bench = Bench::new(3);
        bench.check(1);
        (0..20).for_each(|index| bench.store(study(index)));
        bench.check(2);
    }
}
