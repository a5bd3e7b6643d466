//! What is deleted, and when.
//!
//! In: what the spool keeps, the configured bounds and the clock. Out: objects purged and quarantined files removed. Two rules: what is older
//! than the maximum age goes, analysed or not, as soon as the clock can be trusted; and when room gets short, what is finished goes, first
//! what is never analysed, then the oldest. What is not finished never goes for lack of room: intake refuses instead. Databases and audit log
//! keep the same maximum age by themselves ([`super::clock`]).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Intake;
use super::clock::Ages;
use super::spool::{Kept, Spool, SpoolError};
use crate::config::Retention;

/// How often room is looked at.
const ROOM_INTERVAL: Duration = Duration::from_secs(1);
/// How often ages are looked at.
const AGE_INTERVAL: Duration = Duration::from_secs(60);
/// Objects that are deleted in one turn of the spool's writer.
const PURGED_AT_ONCE: usize = 32;
/// Files of the quarantine that are looked at in one round.
const MAX_QUARANTINE_FILES: usize = 10_000;

/// Deletes what has to go, until the node stops.
pub(crate) async fn run(intake: Arc<Intake>, mut stopping: watch::Receiver<bool>) {
    let mut ages_looked_at: Option<Instant> = None;
    loop {
        let config = Arc::clone(&intake.config.borrow());
        let retention = &config.retention;
        let ages = intake.clock.ages(retention);
        let finished = finished_for_room(&intake.spool, retention, ages);
        purge(&intake.spool, finished, "room").await;
        if ages_looked_at.is_none_or(|at| at.elapsed() >= AGE_INTERVAL) {
            ages_looked_at = Some(Instant::now());
            if let Some(ages) = ages {
                let old = too_old(&intake.spool.kept(), ages);
                purge(&intake.spool, old, "age").await;
                let quarantine = super::quarantine_folder(&config);
                let removed =
                    tokio::task::spawn_blocking(move || remove_old_files(&quarantine, ages));
                drop(removed.await);
            }
        }
        tokio::select! {
            _ = stopping.wait_for(|is_stopping| *is_stopping) => return,
            () = tokio::time::sleep(ROOM_INTERVAL) => {}
        }
    }
}

/// Deletes a few objects at a time: whoever stores meanwhile waits for a few, not for all.
async fn purge(spool: &Spool, sequences: Vec<u64>, reason: &'static str) {
    let mut failed = None;
    for few in sequences.chunks(PURGED_AT_ONCE) {
        match spool.purge(few.to_vec()).await {
            Ok(()) => {}
            Err(SpoolError::Closed) => return,
            // What cannot be deleted keeps nothing else from it.
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if let Some(error) = failed {
        tracing::error!(%error, "not all objects could be purged");
    } else if !sequences.is_empty() {
        tracing::info!(n_objects = sequences.len(), reason, "objects purged");
    }
}

/// What goes for lack of room, looked for only when room is short.
fn finished_for_room(spool: &Spool, retention: &Retention, ages: Option<Ages>) -> Vec<u64> {
    let used_bytes = spool.counts().used_bytes;
    let free_bytes = spool.free_bytes().unwrap_or(u64::MAX);
    let wanted = bytes_to_free(used_bytes, free_bytes, retention);
    if wanted == 0 {
        return Vec::new();
    }
    first_to_go(spool.kept(), wanted, ages)
}

/// Bytes that should be freed: from nine tenths of the quota down to eight, and up to one and a half times the free
/// space that is kept, as soon as less than one and a quarter is left. 0 while there is room.
fn bytes_to_free(used_bytes: u64, free_bytes: u64, retention: &Retention) -> u64 {
    let tenth = retention.quota_bytes / 10;
    let over_quota = if used_bytes > tenth * 9 {
        used_bytes - tenth * 8
    } else {
        0
    };
    let quarter = retention.keep_free_bytes / 4;
    let under_free = if free_bytes < quarter.saturating_mul(5) {
        quarter.saturating_mul(6).saturating_sub(free_bytes)
    } else {
        0
    };
    over_quota.max(under_free)
}

/// Finished objects worth so many bytes, what is committed to not among them: those that are never analysed first, then the oldest.
fn first_to_go(kept: Vec<Kept>, wanted_bytes: u64, ages: Option<Ages>) -> Vec<u64> {
    // By a clock that may be wrong, no pin has ended.
    let is_pinned = |kept: &Kept| {
        let has_ended = ages.is_some_and(|ages| ages.has_come(kept.pinned_until_ms));
        kept.pinned_until_ms > 0 && !has_ended
    };
    let may_go = |kept: &Kept| kept.is_finished && !is_pinned(kept);
    let mut finished: Vec<Kept> = kept.into_iter().filter(may_go).collect();
    finished.sort_by_key(|kept| (kept.is_analysed_class, kept.sequence));
    let mut freed = 0_u64;
    let enough = finished.into_iter().take_while(|kept| {
        let is_wanted = freed < wanted_bytes;
        freed = freed.saturating_add(kept.bytes);
        is_wanted
    });
    enough.map(|kept| kept.sequence).collect()
}

/// Objects that are too old. What came while the clock was wrong counts from when it was right again.
fn too_old(kept: &[Kept], ages: Ages) -> Vec<u64> {
    kept.iter()
        .filter(|kept| ages.is_gone_by(kept.received_ms))
        .map(|kept| kept.sequence)
        .collect()
}

/// The name says when a file came into the quarantine; what a sender's clock said of it plays no part.
fn remove_old_files(folder: &Path, ages: Ages) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.take(MAX_QUARANTINE_FILES).flatten() {
        let name = entry.file_name();
        let came_ms = name.to_str().and_then(|name| name.split('-').next());
        let came_ms = came_ms.and_then(|digits| digits.parse().ok());
        if ages.is_gone_by(came_ms.unwrap_or(0)) {
            // One that cannot be removed is tried again in the next round.
            drop(std::fs::remove_file(entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::spool::{Header, SpoolLimits};

    const NOW_MS: i64 = 1_790_000_000_000;
    const DAY_MS: i64 = 86_400_000;

    fn kept(sequence: u64, received_ms: i64) -> Kept {
        Kept {
            sequence,
            bytes: 100,
            received_ms,
            is_finished: false,
            is_analysed_class: true,
            pinned_until_ms: 0,
        }
    }

    fn ages(since_ms: i64) -> Ages {
        let mut ages = Ages::before(NOW_MS - 7 * DAY_MS);
        (ages.now_ms, ages.since_ms) = (NOW_MS, since_ms);
        ages
    }

    fn retention() -> Retention {
        Retention {
            max_age: Duration::from_secs(7 * 86_400),
            keep_free_bytes: 400,
            quota_bytes: 1000,
        }
    }

    #[test]
    fn old_objects_go_finished_or_not() {
        let ages = ages(NOW_MS);
        let objects = [
            kept(1, NOW_MS - 8 * DAY_MS),
            kept(2, NOW_MS - 6 * DAY_MS),
            kept(3, ages.oldest_ms),
        ];
        assert_eq!(too_old(&objects, ages), [1]);
    }

    #[test]
    fn an_object_that_came_while_the_clock_was_wrong_counts_from_when_it_was_right() {
        for received_ms in [5_000, NOW_MS + 400 * DAY_MS] {
            let objects = [kept(1, received_ms)];
            assert_eq!(too_old(&objects, ages(NOW_MS)), [] as [u64; 0]);
            assert_eq!(too_old(&objects, ages(NOW_MS - 8 * DAY_MS)), [1]);
        }
    }

    #[test]
    fn an_object_that_comes_while_many_are_deleted_waits_for_few() {
        let folder = tempfile::tempdir().unwrap();
        let limits = SpoolLimits {
            keep_free_bytes: 0,
            ..SpoolLimits::default()
        };
        let spool = Spool::open(folder.path(), &limits).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let store = || async {
                let mut entry = spool.begin(Header::default()).unwrap();
                entry.write(b"object").unwrap();
                entry.commit().await.unwrap()
            };
            let mut old = Vec::new();
            for _ in 0..10 * PURGED_AT_ONCE {
                old.push(store().await);
            }
            let mut purging = std::pin::pin!(purge(&spool, old, "age"));
            let stored = tokio::select! {
                biased;
                () = &mut purging => panic!("all were deleted first"),
                stored = store() => stored,
            };
            assert!(spool.counts().objects > 8 * PURGED_AT_ONCE);
            purging.await;
            assert_eq!(spool.sequences_after(0).collect::<Vec<_>>(), [stored]);
        });
    }

    #[test]
    fn room_is_made_from_what_is_finished_never_analysed_first() {
        let finished = |sequence, is_analysed_class| Kept {
            is_finished: true,
            is_analysed_class,
            ..kept(sequence, NOW_MS)
        };
        let objects = vec![
            kept(1, NOW_MS),
            finished(2, true),
            finished(3, true),
            finished(4, false),
        ];
        let now = Some(ages(NOW_MS));
        assert_eq!(first_to_go(objects.clone(), 1, now), [4]);
        assert_eq!(first_to_go(objects.clone(), 150, now), [4, 2]);
        assert_eq!(first_to_go(objects.clone(), 10_000, now), [4, 2, 3]);
        let mut pinned = objects;
        pinned[1].pinned_until_ms = NOW_MS + 1;
        assert_eq!(first_to_go(pinned.clone(), 10_000, now), [4, 3]);
        assert_eq!(first_to_go(pinned.clone(), 10_000, None), [4, 3]);
        pinned[1].pinned_until_ms = NOW_MS;
        assert_eq!(first_to_go(pinned, 10_000, now), [4, 2, 3]);
    }

    #[test]
    fn room_is_made_before_intake_has_to_refuse() {
        let retention = retention();
        assert_eq!(bytes_to_free(900, 500, &retention), 0);
        assert_eq!(bytes_to_free(901, 500, &retention), 101);
        assert_eq!(bytes_to_free(0, 499, &retention), 101);
        assert_eq!(bytes_to_free(2000, 0, &retention), 1200);
    }

    #[test]
    fn old_files_of_the_quarantine_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = |came_ms: i64| folder.path().join(format!("{came_ms}-0.file"));
        let (old_ms, new_ms) = (NOW_MS - 8 * DAY_MS, NOW_MS - 6 * DAY_MS);
        // As their senders last wrote to them: before the other came, and ahead of time.
        for (came_ms, modified_ms) in [(old_ms, NOW_MS + 800 * DAY_MS), (new_ms, 0)] {
            let file = std::fs::File::create(path(came_ms)).unwrap();
            let modified = Duration::from_millis(modified_ms.cast_unsigned());
            file.set_modified(std::time::UNIX_EPOCH + modified).unwrap();
        }
        remove_old_files(folder.path(), ages(NOW_MS));
        assert!(!path(old_ms).exists());
        assert!(path(new_ms).exists());
    }
}
