//! Threads that run one image together, round after round.
//!
//! In: a [`Work`], which says what one thread of several does, and images. Out: the logit that the calling thread, index 0, computed.
//! The helpers are started once; a round of the barrier starts each image.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

/// What a crew does.
pub(crate) trait Work: Send + Sync + 'static {
    /// One thread's own buffers.
    type Worker: Send + 'static;

    /// The buffers of one thread.
    fn worker(&self, place: Place) -> Self::Worker;

    /// One thread's part of an image. The logit counts on the calling thread alone.
    fn run(&self, worker: &mut Self::Worker, image: &[u8], meeting: &Meeting) -> f32;

    /// Bytes of one image.
    fn image_bytes(&self) -> usize;
}

/// Which of how many threads one is; the calling one has index 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) index: usize,
    pub(crate) n_threads: usize,
}

impl Place {
    /// The part of `0..n` that this thread does.
    pub(crate) fn share(self, n: usize) -> Range<usize> {
        n * self.index / self.n_threads..n * (self.index + 1) / self.n_threads
    }
}

/// Looks at the round before a waiting thread goes to sleep: some tens of microseconds, which is what waking it takes.
const LOOKS: u32 = 2_000;

/// Where the threads wait for each other.
///
/// The parts of a slice end at nearly the same time, so that a waiting thread first looks out for the last one and sleeps only when that takes
/// long, as it does between slices.
#[derive(Debug)]
pub(crate) struct Meeting {
    n_threads: usize,
    n_here: AtomicUsize,
    /// Counts the meetings; wraps.
    round: AtomicUsize,
    sleepers: Mutex<()>,
    wake: Condvar,
}

impl Meeting {
    fn new(n_threads: usize) -> Self {
        Self {
            n_threads,
            n_here: AtomicUsize::new(0),
            round: AtomicUsize::new(0),
            sleepers: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// Counts threads as here that do not exist. To be called by one that comes to the same meeting afterwards.
    fn excuse(&self, n_missing: usize) {
        self.n_here.fetch_add(n_missing, Ordering::AcqRel);
    }

    /// Waits until every thread of the crew is here. What each did before is seen by all after.
    pub(crate) fn wait(&self) {
        let round = self.round.load(Ordering::Acquire);
        if self.n_here.fetch_add(1, Ordering::AcqRel) + 1 == self.n_threads {
            self.n_here.store(0, Ordering::Relaxed);
            let sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
            self.round.store(round.wrapping_add(1), Ordering::Release);
            drop(sleepers);
            return self.wake.notify_all();
        }
        let is_over = || self.round.load(Ordering::Acquire) != round;
        for _ in 0..LOOKS {
            if is_over() {
                return;
            }
            std::hint::spin_loop();
        }
        let sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.wake.wait_while(sleepers, |()| !is_over()));
    }
}

/// Work, the calling thread's buffers, and the other threads.
#[derive(Debug)]
pub(crate) struct Crew<W: Work> {
    shared: Arc<Shared<W>>,
    worker: W::Worker,
    helpers: Vec<JoinHandle<()>>,
    n_threads: usize,
}

#[derive(Debug)]
struct Shared<W> {
    work: W,
    image: RwLock<Vec<u8>>,
    meeting: Meeting,
    is_stopping: AtomicBool,
}

impl<W: Work> Crew<W> {
    /// Allocates every thread's buffers and starts `n_threads - 1` helpers.
    pub(crate) fn new(work: W, n_threads: usize) -> std::io::Result<Self> {
        let mut crew = Self::alone(work, n_threads);
        (1..n_threads).try_for_each(|index| crew.start_helper(index))?;
        Ok(crew)
    }

    /// A crew whose helpers are still to be started.
    fn alone(work: W, n_threads: usize) -> Self {
        let image_bytes = if n_threads > 1 { work.image_bytes() } else { 0 };
        let index = 0;
        let worker = work.worker(Place { index, n_threads });
        let shared = Arc::new(Shared {
            work,
            image: RwLock::new(vec![0; image_bytes]),
            meeting: Meeting::new(n_threads),
            is_stopping: AtomicBool::new(false),
        });
        Self {
            shared,
            worker,
            helpers: Vec::new(),
            n_threads,
        }
    }

    fn start_helper(&mut self, index: usize) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let n_threads = self.n_threads;
        let mut worker = shared.work.worker(Place { index, n_threads });
        let helper = std::thread::Builder::new().name(format!("engine-{index}"));
        let helper = helper.spawn(move || shared.help(&mut worker))?;
        self.helpers.push(helper);
        Ok(())
    }

    /// The logit of one image of [`Work::image_bytes`] u8.
    pub(crate) fn logit(&mut self, image: &[u8]) -> f32 {
        let Self { shared, worker, .. } = self;
        if self.n_threads > 1 {
            shared
                .image
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .copy_from_slice(image);
            shared.meeting.wait();
        }
        shared.work.run(worker, image, &shared.meeting)
    }

    pub(crate) fn work(&self) -> &W {
        &self.shared.work
    }

    /// The calling thread's buffers.
    pub(crate) fn worker(&self) -> &W::Worker {
        &self.worker
    }

    pub(crate) fn worker_mut(&mut self) -> &mut W::Worker {
        &mut self.worker
    }
}

impl<W: Work> Shared<W> {
    fn help(&self, worker: &mut W::Worker) {
        loop {
            self.meeting.wait();
            if self.is_stopping.load(Ordering::Relaxed) {
                return;
            }
            let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
            self.work.run(worker, &image, &self.meeting);
        }
    }
}

impl<W: Work> Drop for Crew<W> {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
        if self.helpers.is_empty() {
            return;
        }
        // Helpers that the system refused to start do not come to the last meeting.
        let n_missing = self.n_threads - 1 - self.helpers.len();
        self.shared.meeting.excuse(n_missing);
        self.shared.meeting.wait();
        for helper in self.helpers.drain(..) {
            drop(helper.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Work for Nothing {
        type Worker = ();

        fn worker(&self, _place: Place) {}

        fn run(&self, _worker: &mut (), _image: &[u8], _meeting: &Meeting) -> f32 {
            0.0
        }

        fn image_bytes(&self) -> usize {
            1
        }
    }

    #[test]
    fn helpers_end_with_their_crew_even_where_one_could_not_be_started() {
        for n_started in 0..=3 {
            let mut crew = Crew::alone(Nothing, 4);
            (1..=n_started).for_each(|index| crew.start_helper(index).unwrap());
            let shared = Arc::downgrade(&crew.shared);
            drop(crew);
            assert!(
                shared.upgrade().is_none(),
                "{n_started} helpers were started"
            );
        }
    }

    /// More threads than cores, so that some look out and some sleep.
    #[test]
    fn nobody_leaves_a_meeting_before_all_are_here() {
        const THREADS: usize = 8;
        const ROUNDS: usize = 500;
        let meeting = Meeting::new(THREADS);
        let arrived = AtomicUsize::new(0);
        // Asserted at the end: a thread that panicked would leave the others waiting.
        let n_early = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for round in 1..=ROUNDS {
                        arrived.fetch_add(1, Ordering::Relaxed);
                        meeting.wait();
                        if arrived.load(Ordering::Relaxed) != round * THREADS {
                            n_early.fetch_add(1, Ordering::Relaxed);
                        }
                        meeting.wait();
                    }
                });
            }
        });
        assert_eq!(n_early.into_inner(), 0);
    }
}
