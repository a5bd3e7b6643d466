//! The daemon's log: JSON lines on standard error for the journal, or plain text on a terminal.
//!
//! Only this program's own events pass: libraries say things about the bytes they read, and those belong to patients. Its own events name
//! counts, codes and addresses, never an attribute of a patient; UIDs only at `debug`. The level is `info`, or what the environment
//! variable `EDGE_LOG` says (`error`, `warn`, `info`, `debug`, `trace`).

use std::io::IsTerminal;

use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;

/// The environment variable.
const LEVEL_VARIABLE: &str = "EDGE_LOG";

/// Begins to log to standard error. Does nothing where something logs already.
pub(crate) fn begin() {
    let level = std::env::var(LEVEL_VARIABLE).ok();
    let level = level
        .and_then(|level| level.parse().ok())
        .unwrap_or(LevelFilter::INFO);
    let is_terminal = std::io::stderr().is_terminal();
    // An error means that a subscriber is set; it stays.
    drop(tracing::subscriber::set_global_default(subscriber(
        level,
        is_terminal,
        std::io::stderr,
    )));
}

/// What writes events of this program to `writer`.
pub(crate) fn subscriber<W>(
    level: LevelFilter,
    is_terminal: bool,
    writer: W,
) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // Where the log's reader is gone, lines are lost. Complaining about that on standard error would panic.
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .log_internal_errors(false);
    let own = Targets::new().with_target("edge", level);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = if is_terminal {
        Box::new(layer.with_ansi(false).with_target(false).with_filter(own))
    } else {
        Box::new(layer.json().flatten_event(true).with_filter(own))
    };
    Registry::default().with(layer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn only_this_programs_events_are_written_each_as_a_json_object() {
        let written = Written::default();
        let writer = written.clone();
        let subscriber = subscriber(LevelFilter::INFO, false, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(port = 11112, "listening");
            tracing::debug!("hidden");
            tracing::error!(target: "dicom_ul", "PatientName is DOE^JOHN");
        });
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 1, "{text}");
        assert_eq!(lines[0]["message"], "listening");
        assert_eq!(lines[0]["port"], 11112);
    }
}
