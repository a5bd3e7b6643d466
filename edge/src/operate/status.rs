//! What the daemon says of itself: `/api/status`, the system view and `edge status` are this one structure.
//!
//! No patient data. Names of fields are a contract with whoever reads the JSON.

use serde::{Deserialize, Serialize};

/// The daemon at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    /// Of the program.
    pub(crate) version: String,
    /// `ready`, `degraded` or `refusing`.
    pub(crate) state: String,
    /// What is wrong, in words; empty where nothing is.
    pub(crate) problems: Vec<String>,
    /// AE title of the node.
    pub(crate) ae_title: String,
    /// Port of the DICOM node.
    pub(crate) dicom_port: u16,
    /// Objects answered with success since the start.
    pub(crate) received: u64,
    /// Slices analysed since the start.
    pub(crate) analysed: u64,
    /// Slices not analysed since the start.
    pub(crate) not_analysed: u64,
    /// Objects that wait for analysis.
    pub(crate) waiting: u64,
    /// Studies on the worklist.
    pub(crate) studies: u64,
    /// Positive ones among them.
    pub(crate) positive_studies: u64,
    /// Results that wait to be delivered.
    pub(crate) outbox_waiting: u64,
    /// Results given up.
    pub(crate) dead_letters: u64,
    /// Of those, the last.
    pub(crate) given_up: Vec<GivenUp>,
    /// Results that were delivered and that the PACS has yet to commit to.
    pub(crate) commitments_waiting: u64,
    /// Results that were delivered and that it has not committed to.
    pub(crate) not_committed: u64,
    /// Free bytes where the state lies.
    pub(crate) disk_free_bytes: u64,
    /// Size of that file system.
    pub(crate) disk_total_bytes: u64,
    /// Bytes of the spool.
    pub(crate) spool_bytes: u64,
    /// Whether objects are accepted; not below the disk watermark.
    pub(crate) is_accepting: bool,
    /// Name of the model.
    pub(crate) model: String,
    /// BLAKE3 of its file.
    pub(crate) model_digest: String,
    /// What every result must say.
    pub(crate) model_notice: String,
    /// Whether it was trained on the phantom.
    pub(crate) is_demonstration: bool,
    /// `passed`, `absent`, or what is wrong.
    pub(crate) self_test: String,
    /// Associations that are open.
    pub(crate) associations_open: u64,
    /// Workers replaced since the start.
    pub(crate) workers_replaced: u64,
    /// Who sends, and where results go.
    pub(crate) peers: Vec<Peer>,
    /// Of the processor, where the machine says it.
    pub(crate) temperature_celsius: Option<f32>,
    /// Whether the clock is plausible.
    pub(crate) is_clock_trusted: bool,
    /// Whether what is too old is deleted: not within an hour of a start or of a jump of the clock.
    pub(crate) is_deleting_by_age: bool,
    /// When the TLS certificate expires, Unix time.
    pub(crate) certificate_expires_s: Option<i64>,
    /// Seconds since the start.
    pub(crate) uptime_s: u64,
}

impl Status {
    /// Whether the model may analyse: it passed its self-test, or its file states none, as f32 files do.
    pub(crate) fn is_model_sound(&self) -> bool {
        matches!(self.self_test.as_str(), "passed" | "absent")
    }
}

/// A result that a receiver will not get, unless it is sent again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct GivenUp {
    /// Of which study.
    pub(crate) study_uid: String,
    /// Through what.
    pub(crate) channel: String,
    /// When, Unix time in ms.
    pub(crate) ended_ms: i64,
    /// Why.
    pub(crate) reason: String,
}

/// A peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Peer {
    /// Its AE title, or the name of the channel.
    pub(crate) ae_title: String,
    /// Its address.
    pub(crate) address: String,
    /// `sends` or `receives`.
    pub(crate) role: String,
    /// When it was last heard, Unix time in ms.
    pub(crate) last_seen_ms: Option<i64>,
    /// Objects from it, or to it, since the start.
    pub(crate) n_objects: u64,
}
