//! Progress of a run on standard error.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between progress lines where standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Progress of an epoch on standard error: a bar, or a line every ten seconds where it is not a terminal.
pub(super) struct Progress {
    bar: ProgressBar,
    is_plain: bool,
    epoch: String,
    last_line: std::cell::Cell<Instant>,
}

impl Progress {
    pub(super) fn new(n_epochs: u32, epoch: u32, steps: &[Vec<usize>], first: usize) -> Self {
        let count = |steps: &[Vec<usize>]| steps.iter().map(Vec::len).sum::<usize>() as u64;
        let target = ProgressDrawTarget::stderr();
        let is_plain = target.is_hidden();
        let bar = ProgressBar::with_draw_target(Some(count(steps)), target);
        if let Ok(style) = ProgressStyle::with_template(
            "{prefix} [{bar:30}] {pos}/{len} images, {msg}, {eta} left",
        ) {
            bar.set_style(style.progress_chars("=> "));
        }
        let epoch = format!("epoch {}/{n_epochs}", epoch + 1);
        bar.set_prefix(epoch.clone());
        bar.set_position(count(&steps[..first.min(steps.len())]));
        bar.reset_eta();
        Self {
            bar,
            is_plain,
            epoch,
            last_line: std::cell::Cell::new(Instant::now()),
        }
    }

    #[expect(clippy::print_stderr, reason = "progress belongs to standard error")]
    pub(super) fn tell(&self, n_images: u64, loss: f64, images_per_second: f64) {
        self.bar.inc(n_images);
        if !self.is_plain {
            self.bar
                .set_message(format!("{images_per_second:.1} images/s, loss {loss:.4}"));
        } else if self.last_line.get().elapsed() >= LINE_INTERVAL {
            self.last_line.set(Instant::now());
            eprintln!(
                "{}: {} of {} images, {images_per_second:.1} images/s, loss {loss:.4}, {} s left",
                self.epoch,
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
