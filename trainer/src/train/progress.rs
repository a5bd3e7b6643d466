//! Progress of a run on standard error.

use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between progress lines where standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress of an epoch on standard error: a bar, or a line every ten seconds where it is not a terminal.
pub(super) struct Progress {
    bar: ProgressBar,
    is_plain: bool,
    epoch: String,
    /// Images of the epochs after this one.
    n_later: u64,
    last_line: std::cell::Cell<Instant>,
}

impl Progress {
    pub(super) fn new(n_epochs: u32, epoch_index: u32, steps: &[Vec<usize>], first: usize) -> Self {
        let count = |steps: &[Vec<usize>]| steps.iter().map(Vec::len).sum::<usize>() as u64;
        let target = ProgressDrawTarget::stderr();
        let is_plain = target.is_hidden();
        let bar = ProgressBar::with_draw_target(Some(count(steps)), target);
        if let Ok(style) =
            ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} images, {msg}")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        let epoch = format!("epoch {}/{n_epochs}", epoch_index + 1);
        bar.set_prefix(epoch.clone());
        bar.set_position(count(&steps[..first.min(steps.len())]));
        let n_epochs_later = u64::from(n_epochs.saturating_sub(1).saturating_sub(epoch_index));
        Self {
            bar,
            is_plain,
            epoch,
            n_later: n_epochs_later * count(steps),
            last_line: std::cell::Cell::new(Instant::now()),
        }
    }

    #[expect(clippy::print_stderr, reason = "progress belongs to standard error")]
    pub(super) fn tell(&self, n_images: u64, loss: f64, images_per_second: f64) {
        self.bar.inc(n_images);
        let (done, all) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let n_left = all.saturating_sub(done) + self.n_later;
        let left = HumanDuration(time_of(n_left, images_per_second));
        let message =
            format!("{images_per_second:.1} images/s, loss {loss:.4}, {left} of training left");
        if !self.is_plain {
            self.bar.set_message(message);
        } else if self.last_line.get().elapsed() >= LINE_INTERVAL {
            self.last_line.set(Instant::now());
            eprintln!("{}: {done} of {all} images, {message}", self.epoch);
        }
    }
}

/// How long so many images take, validation not counted.
#[expect(clippy::cast_precision_loss, reason = "a time for people")]
fn time_of(n_images: u64, images_per_second: f64) -> Duration {
    Duration::try_from_secs_f64((n_images as f64 / images_per_second).ceil()).unwrap_or_default()
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
