//! Storage Commitment Push Model (PS3.4 annex J), each side off by default.
//!
//! As user, for our own results: a document that the PACS accepted is [`asked`] about, [`asking`] sends the N-ACTION and whoever hears the
//! N-EVENT-REPORT, on that association or on one of the PACS's own, tells [`asked::Asked`]. As provider, for what peers stored here: an N-ACTION
//! becomes a [`promised`] transaction whose objects are pinned against retention, and [`reporting`] sends the N-EVENT-REPORT where the
//! requesting association is gone. [`message`] is the data set that both are about. Association and roles are `intake`'s and `send`'s business.

pub(crate) mod asked;
pub(crate) mod asking;
pub(crate) mod message;
pub(crate) mod node;
pub(crate) mod promised;
pub(crate) mod reporting;
#[cfg(test)]
mod scripted;

use std::sync::Arc;

/// SOP Class UID.
pub(crate) const SOP_CLASS_UID: &str = "1.2.840.10008.1.20.1";
/// The one, well-known SOP Instance UID.
pub(crate) const SOP_INSTANCE_UID: &str = "1.2.840.10008.1.20.1.1";
/// Action Type ID of "Request Storage Commitment".
pub(crate) const REQUEST_ACTION: u16 = 1;
/// Event Type ID of "Storage Commitment Request Successful".
pub(crate) const ALL_COMMITTED: u16 = 1;
/// Event Type ID of "Storage Commitment Request Complete - Failures Exist".
pub(crate) const FAILURES_EXIST: u16 = 2;
/// N-EVENT-REPORT-RQ (PS3.7 annex E.1).
pub(crate) const EVENT_REPORT: u16 = 0x0100;
/// N-ACTION-RQ.
pub(crate) const ACTION: u16 = 0x0130;

/// What is asked and what is promised.
#[derive(Clone, Debug)]
pub(crate) struct Commitments {
    /// Of the PACS.
    pub(crate) asked: Arc<asked::Asked>,
    /// To peers.
    pub(crate) promised: Arc<promised::Promised>,
}
