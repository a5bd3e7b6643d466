//! Results out: from a study's result to the PACS and to whoever else is told.
//!
//! The stages in the order a result meets them: [`outbox`] keeps what is to be told, durably; [`delivery`] takes it from there, patiently
//! ([`back_off`]); [`letter`] makes the bytes: a [`structured_report`] (its UID from [`identity`], whose and by what from [`equipment`], items from
//! [`content`], encoded by [`data_set`]) or a [`secondary_capture`]; [`pacs`] and [`association`] over a [`connection`] are the way by C-STORE, [`webhook`] and
//! [`stow`] by [`http`], [`hl7`] by MLLP. [`node`] starts all
//! of it in the daemon, [`export`] writes documents as files.

pub(crate) mod association;
pub(crate) mod back_off;
pub(crate) mod connection;
pub(crate) mod content;
pub(crate) mod data_set;
#[cfg(test)]
mod delivered;
pub(crate) mod delivery;
pub(crate) mod equipment;
pub(crate) mod export;
pub(crate) mod hl7;
pub(crate) mod http;
pub(crate) mod identity;
pub(crate) mod letter;
pub(crate) mod node;
pub(crate) mod outbox;
#[cfg(test)]
mod over_tls;
pub(crate) mod pacs;
#[cfg(test)]
pub(crate) mod sample;
#[cfg(test)]
pub(crate) mod scripted_pacs;
pub(crate) mod secondary_capture;
pub(crate) mod stow;
pub(crate) mod structured_report;
#[cfg(test)]
mod told;
pub(crate) mod webhook;
