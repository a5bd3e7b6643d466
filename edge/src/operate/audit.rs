//! The audit log: who sent what, what was decided, and where it went. No patient data but the Study Instance UID.
//!
//! One JSON object a line in `state_dir/audit/audit.jsonl`, readable by its owner alone. A file that reaches [`MAX_FILE_BYTES`] becomes `audit.1.jsonl`, and
//! so on to [`MAX_FILES`]; the oldest is deleted, so that the log never fills the disk. A line is handed to the system at once and is not synced: a
//! power cut may lose the last seconds of it, never the results themselves. A torn last line is closed when the log is opened.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use shared::uid::Uid;

/// Size at which a file is closed.
pub(crate) const MAX_FILE_BYTES: u64 = 4 << 20;
/// Files kept, the current one included.
pub(crate) const MAX_FILES: u32 = 5;

/// What is recorded.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub(crate) enum Event<'a> {
    /// The daemon started.
    Started {
        /// Of the program.
        version: &'a str,
        /// Name of the model.
        model: &'a str,
        /// `passed`, `absent`, or what is wrong.
        self_test: &'a str,
    },
    /// The daemon stops, drained.
    Stopped,
    /// The configuration was read again.
    Reloaded {
        /// Whether the new one is in force.
        is_in_force: bool,
    },
    /// An association was asked for and turned away.
    Association {
        /// As it calls itself.
        calling_ae: &'a str,
        /// Where it comes from.
        address: &'a str,
        /// Why.
        answer: &'a str,
    },
    /// An association that sent objects ended.
    Received {
        /// As it called itself.
        calling_ae: &'a str,
        /// Where it came from.
        address: &'a str,
        /// Objects answered with success.
        n_objects: u64,
        /// Objects refused.
        n_refused: u64,
    },
    /// A result was decided.
    Decided {
        /// The study.
        study_uid: &'a Uid,
        /// Of the result.
        revision: u32,
        /// `provisional` or `complete`.
        state: &'a str,
        /// `positive`, `not_detected` or `not_analysed`.
        outcome: &'a str,
        /// The reason's code, where it was not analysed.
        code: Option<&'a str>,
        /// A logit.
        score: Option<f32>,
        /// Slices.
        n_slices: usize,
        /// Those analysed.
        n_analysed: usize,
        /// Name of the model.
        model: &'a str,
    },
    /// A result was handed over, or given up.
    Delivered {
        /// The study.
        study_uid: &'a Uid,
        /// Of the result.
        revision: u32,
        /// Through what.
        channel: &'a str,
        /// `delivered` or `dead`.
        how: &'a str,
    },
    /// The results database was made anew, and what is stored is decided again.
    ResultsLost {
        /// `missing` or `broken`.
        why: &'a str,
    },
    /// The PACS has committed to a result that was handed over, or has not.
    Commitment {
        /// The study.
        study_uid: &'a Uid,
        /// Of the result.
        revision: u32,
        /// Through what it was delivered.
        channel: &'a str,
        /// `committed` or `not_committed`.
        how: &'a str,
        /// Why not.
        reason: Option<&'a str>,
    },
    /// This node has committed to what a peer stored.
    Promised {
        /// As it calls itself.
        calling_ae: &'a str,
        /// Instances that are kept.
        n_committed: usize,
        /// Instances that are not.
        n_failed: usize,
    },
    /// A study's results were deleted by age.
    Deleted {
        /// The study.
        study_uid: &'a Uid,
    },
    /// Another model is in force, at the latest from the next `Started` on.
    Model {
        /// `installed` or `rolled_back` by an operator, `rolled_back_by_itself` by the node.
        change: &'a str,
        /// BLAKE3 of its file, hexadecimal; empty for the demonstration model.
        digest: &'a str,
    },
}

/// A line.
#[derive(Debug, Serialize)]
struct Line<'a> {
    time: String,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

/// The log.
#[derive(Debug)]
pub(crate) struct Audit {
    folder: PathBuf,
    max_file_bytes: u64,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    file: File,
    n_bytes: u64,
}

impl Audit {
    /// Opens the log in `folder`, which is made where it does not exist.
    ///
    /// # Errors
    /// Where the folder or the file cannot be made.
    pub(crate) fn open(folder: &Path, max_file_bytes: u64) -> io::Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        Ok(Self {
            folder: folder.to_owned(),
            max_file_bytes,
            current: Mutex::new(open(&path(folder, 0))?),
        })
    }

    /// Appends a line at `time`.
    ///
    /// # Errors
    /// Where it cannot be written; the caller counts it and goes on, because results matter more.
    pub(crate) fn record(&self, event: &Event<'_>, time: jiff::Timestamp) -> io::Result<()> {
        let time = time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
        let mut line = serde_json::to_vec(&Line { time, event })?;
        line.push(b'\n');
        let n_bytes = line.len() as u64;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.n_bytes > 0 && current.n_bytes + n_bytes > self.max_file_bytes {
            self.rotate()?;
            *current = open(&path(&self.folder, 0))?;
        }
        current.file.write_all(&line)?;
        current.n_bytes += n_bytes;
        Ok(())
    }

    fn rotate(&self) -> io::Result<()> {
        for number in (0..MAX_FILES - 1).rev() {
            let renamed = fs::rename(path(&self.folder, number), path(&self.folder, number + 1));
            match renamed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

fn path(folder: &Path, number: u32) -> PathBuf {
    match number {
        0 => folder.join("audit.jsonl"),
        _ => folder.join(format!("audit.{number}.jsonl")),
    }
}

fn open(path: &Path) -> io::Result<Current> {
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    let n_bytes = file.metadata()?.len();
    if n_bytes > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    }
    Ok(Current { n_bytes, file })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: jiff::Timestamp = jiff::Timestamp::UNIX_EPOCH;

    fn lines(folder: &Path, number: u32) -> Vec<String> {
        let text = fs::read_to_string(path(folder, number)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_is_one_json_object_whatever_a_peer_calls_itself() {
        let folder = tempfile::tempdir().unwrap();
        let audit = Audit::open(folder.path(), MAX_FILE_BYTES).unwrap();
        let event = Event::Association {
            calling_ae: "A\n\"B",
            address: "192.0.2.1",
            answer: "accepted",
        };
        audit.record(&event, TIME).unwrap();
        let line = lines(folder.path(), 0).remove(0);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["event"], "association");
        assert_eq!(value["calling_ae"], "A\n\"B");
        assert_eq!(value["time"], "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn the_log_is_bounded_and_loses_the_oldest() {
        let folder = tempfile::tempdir().unwrap();
        let audit = Audit::open(folder.path(), 200).unwrap();
        let mut n = 0_u32;
        for _ in 0..200 {
            n += 1;
            let version = n.to_string();
            let event = Event::Started {
                version: &version,
                model: "m",
                self_test: "passed",
            };
            audit.record(&event, TIME).unwrap();
        }
        let files = fs::read_dir(folder.path()).unwrap();
        let sizes: Vec<u64> = files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(sizes.len(), MAX_FILES as usize);
        assert!(sizes.iter().all(|size| *size <= 200), "{sizes:?}");
        assert!(lines(folder.path(), 0).last().unwrap().contains("\"200\""));
    }

    #[test]
    fn a_torn_line_is_closed_and_only_the_owner_reads() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        fs::write(path(folder.path(), 0), "{\"time\":\"20").unwrap();
        let audit = Audit::open(folder.path(), MAX_FILE_BYTES).unwrap();
        audit.record(&Event::Stopped, TIME).unwrap();
        let lines = lines(folder.path(), 0);
        assert_eq!(lines.len(), 2);
        assert!(lines[1].contains("\"stopped\""));
        let fresh = Audit::open(&folder.path().join("new"), MAX_FILE_BYTES).unwrap();
        fresh.record(&Event::Stopped, TIME).unwrap();
        let mode = fs::metadata(path(&fresh.folder, 0))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0);
    }
}
