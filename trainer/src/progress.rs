//! A progress bar with the time left; on something that is not a terminal a plain line every ten seconds.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress of a known number of steps, told on standard error.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    what: &'static str,
    is_plain: bool,
    last_line: Mutex<Instant>,
}

impl Progress {
    /// Begins `n_steps` steps of `what`.
    #[must_use]
    pub fn new(what: &'static str, n_steps: u64) -> Self {
        let target = ProgressDrawTarget::stderr();
        let is_plain = target.is_hidden();
        let bar = ProgressBar::with_draw_target(Some(n_steps), target);
        if let Ok(style) =
            ProgressStyle::with_template("{prefix:>9} [{bar:30}] {pos}/{len} {per_sec}, {eta} left")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what);
        Self {
            bar,
            what,
            is_plain,
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// Says that `n_steps` were done before, in an earlier run.
    pub fn skip(&self, n_steps: u64) {
        self.bar.set_position(n_steps);
        self.bar.reset_eta();
    }

    /// Adds `n_steps`.
    #[expect(clippy::print_stderr, reason = "progress belongs to standard error")]
    pub fn add(&self, n_steps: u64) {
        self.bar.inc(n_steps);
        let Ok(mut last_line) = self.last_line.lock() else {
            return;
        };
        if self.is_plain && last_line.elapsed() >= LINE_INTERVAL {
            *last_line = Instant::now();
            eprintln!(
                "{}: {} of {}, {} s left",
                self.what,
                self.bar.position(),
                self.bar.length().unwrap_or(0),
                self.bar.eta().as_secs()
            );
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
