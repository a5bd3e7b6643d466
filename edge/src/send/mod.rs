//! Results out: from a study's result to the PACS and to whoever else is told.
//!
//! The stages in the order a result meets them: [`identity`] gives a document its UID, [`structured_report`] writes it ([`equipment`] says whose and by what, [`content`] holds its content
//! items, [`data_set`] encodes).

pub(crate) mod content;
pub(crate) mod data_set;
pub(crate) mod equipment;
pub(crate) mod export;
pub(crate) mod identity;
#[cfg(test)]
pub(crate) mod sample;
pub(crate) mod structured_report;
