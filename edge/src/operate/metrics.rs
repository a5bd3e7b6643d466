//! Counters of the daemon.
//!
//! Most stages hold their own counters and are asked at the scrape ([`Counts`]); what has labels is counted in the [`Metrics`], cheap to clone.
//! Labels come from small fixed sets, never from a peer: a peer cannot grow the memory that they take, and nothing of a patient can stand in them.
//! Their text is [`super::exposition`]'s.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// What is counted where it happens, with labels.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    /// Time of the network for one slice, seconds.
    pub(crate) inference_seconds: Seconds,
    /// Results decided, by outcome; a revision counts again.
    pub(crate) results: Family<Decided, Counter>,
    /// Attempts to hand a result to a channel, by how they went.
    pub(crate) deliveries: Family<Delivery, Counter>,
    /// Slice pictures made for the page.
    pub(crate) pictures: Counter,
}

/// What the stages have counted since the start, at the moment of the scrape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Connections accepted.
    pub(crate) connections: u64,
    /// Associations accepted.
    pub(crate) associations: u64,
    /// Associations rejected because of the peer.
    pub(crate) rejected_peer: u64,
    /// Associations rejected because of a cap.
    pub(crate) rejected_limit: u64,
    /// Associations ended by a deadline or the minimum rate.
    pub(crate) timed_out: u64,
    /// Associations ended by an abort or a lost connection.
    pub(crate) aborted: u64,
    /// C-ECHO answered.
    pub(crate) echoes: u64,
    /// Objects answered with success.
    pub(crate) objects: u64,
    /// Objects refused for want of room.
    pub(crate) refused_room: u64,
    /// Objects refused for what they are.
    pub(crate) refused_object: u64,
    /// Files taken from the watch folder.
    pub(crate) files_taken: u64,
    /// Files put into quarantine.
    pub(crate) files_quarantined: u64,
    /// Sync calls on the spool.
    pub(crate) sync_calls: u64,
    /// Bytes written to the spool.
    pub(crate) written_bytes: u64,
    /// Slices with an answer.
    pub(crate) analysed: u64,
    /// Slices without one.
    pub(crate) not_analysed: u64,
    /// Of those with an answer, those that came before with the same pixels.
    pub(crate) recognised: u64,
    /// Workers replaced.
    pub(crate) workers_replaced: u64,
    /// Times the results database failed.
    pub(crate) store_failures: u64,
    /// Whether the results database had to be made anew at the start.
    pub(crate) results_lost: u64,
    /// Letters deleted that no receiver had accepted.
    pub(crate) letters_lost: u64,
}

/// A histogram of seconds, from 1 ms to 16 s.
#[derive(Clone, Debug)]
pub(crate) struct Seconds(Histogram);

impl Default for Seconds {
    fn default() -> Self {
        Self(Histogram::new(exponential_buckets(0.001, 2.0, 15)))
    }
}

impl Seconds {
    /// Adds one observation.
    pub(crate) fn observe(&self, seconds: f64) {
        self.0.observe(seconds);
    }
}

/// How a study was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Decided {
    /// The outcome.
    pub(crate) outcome: DecidedOutcome,
}

/// See [`Decided`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(
    non_camel_case_types,
    reason = "the label's text, as the derive prints it"
)]
pub(crate) enum DecidedOutcome {
    /// Positive, the study complete.
    positive,
    /// Positive, told before the study is complete.
    provisional,
    /// Not detected.
    not_detected,
    /// Not analysed.
    not_analysed,
}

/// A result on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Delivery {
    /// Through which channel.
    pub(crate) channel: DeliveryChannel,
    /// How it went.
    pub(crate) how: DeliveryEnd,
}

/// The ways out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(
    non_camel_case_types,
    reason = "the label's text, as the derive prints it"
)]
pub(crate) enum DeliveryChannel {
    /// Structured report by C-STORE.
    structured_report,
    /// Secondary capture by C-STORE.
    secondary_capture,
    /// Webhook.
    webhook,
    /// HL7 over MLLP.
    hl7,
    /// STOW-RS.
    stow,
}

/// How one attempt to deliver went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(
    non_camel_case_types,
    reason = "the label's text, as the derive prints it"
)]
pub(crate) enum DeliveryEnd {
    /// Taken by the receiver.
    delivered,
    /// To be tried again.
    retried,
    /// Given up: a dead letter.
    dead,
}

impl Metrics {
    /// Adds what is counted here to what is shown.
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "inference",
            "Time of the network for one slice",
            Unit::Seconds,
            self.inference_seconds.0.clone(),
        );
        registry.register(
            "results",
            "Study results decided, revisions counted again",
            self.results.clone(),
        );
        registry.register(
            "deliveries",
            "Attempts to deliver a result, by channel and how they went",
            self.deliveries.clone(),
        );
        registry.register(
            "pictures",
            "Slice pictures made for the page",
            self.pictures.clone(),
        );
    }
}
