//! The PACS: how it is reached, and what its answers mean (PS3.4 section B.2.3, PS3.7 annex C).

use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;

use super::association::{Association, AssociationError, Proposal};
use super::connection::Connection;
use super::delivery::Verdict;
use super::outbox::Channel;
use super::secondary_capture;
use super::structured_report::Class;
use crate::config::{self, Config};

/// How long a connection may take, TLS included.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// A PACS.
#[derive(Clone, Debug)]
pub(crate) struct Pacs {
    /// Our AE title.
    pub(crate) calling: String,
    /// Its AE title.
    pub(crate) called: String,
    /// Where it is.
    pub(crate) connection: Connection,
    /// Whether captures are sent.
    pub(crate) has_captures: bool,
    /// Whether it is asked to commit to what it took.
    pub(crate) is_asked_to_commit: bool,
}

/// What a status means for a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It has the object; the remark is for the record.
    Accepted(Option<&'static str>),
    /// It may have it later.
    Later,
    /// It will never have this object.
    Refused,
}

/// The meaning of a C-STORE status.
pub(crate) fn judge(status: u16) -> Answer {
    match status {
        0x0000 => Answer::Accepted(None),
        0x0111 => Answer::Accepted(Some("the PACS had it already")),
        0x0001 | 0x0107 | 0x0116 | 0xB000..=0xBFFF => Answer::Accepted(Some("with a warning")),
        // Out of resources; processing failure, which servers give for a full disk or a database that is down.
        0xA700..=0xA7FF | 0x0110 => Answer::Later,
        _ => Answer::Refused,
    }
}

/// What a status means for the letter that it answers.
pub(crate) fn verdict(status: u16) -> Verdict {
    let said = format!("C-STORE status {status:04X}H");
    match judge(status) {
        Answer::Accepted(remark) => {
            Verdict::Accepted(remark.map(|remark| format!("{said}, {remark}")))
        }
        Answer::Later => Verdict::Later(said),
        Answer::Refused => Verdict::Refused(said),
    }
}

impl Pacs {
    /// The PACS of a configuration.
    pub(crate) fn configured(
        config: &Config,
        pacs: &config::Pacs,
        tls: Option<Arc<ClientConfig>>,
    ) -> Self {
        Self {
            calling: config.ae_title.clone(),
            called: pacs.ae_title.clone(),
            connection: Connection {
                host: pacs.host.clone(),
                port: pacs.port,
                tls,
            },
            has_captures: pacs.secondary_capture,
            is_asked_to_commit: pacs.storage_commitment,
        }
    }

    /// SOP classes to send a letter of a channel in, the first choice first.
    pub(crate) fn classes(channel: Channel) -> &'static [&'static str] {
        const REPORTS: [&str; 2] = [Class::Comprehensive3D.uid(), Class::Comprehensive.uid()];
        match channel {
            Channel::SecondaryCapture => &[secondary_capture::SOP_CLASS_UID],
            _ => &REPORTS,
        }
    }

    /// Connects and asks for an association for results.
    ///
    /// # Errors
    /// [`AssociationError`] says why there is none.
    pub(crate) async fn open(&self, deadline: Duration) -> Result<Association, AssociationError> {
        let mut classes = Self::classes(Channel::StructuredReport).to_vec();
        if self.has_captures {
            classes.extend(Self::classes(Channel::SecondaryCapture));
        }
        self.open_for(&classes, deadline).await
    }

    /// Connects and asks for an association for some SOP classes.
    ///
    /// # Errors
    /// [`AssociationError`] says why there is none.
    pub(crate) async fn open_for(
        &self,
        sop_classes: &[&str],
        deadline: Duration,
    ) -> Result<Association, AssociationError> {
        let stream = self.connection.open(CONNECT_DEADLINE).await?;
        let proposal = Proposal {
            calling: &self.calling,
            called: &self.called,
            sop_classes,
            is_provider: false,
        };
        Association::request(stream, &proposal, deadline).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_means_what_the_rules_say() {
        let warned = Answer::Accepted(Some("with a warning"));
        for (status, answer) in [
            (0x0000, Answer::Accepted(None)),
            (0xB000, warned),
            (0xB006, warned),
            (0xB007, warned),
            (0x0111, Answer::Accepted(Some("the PACS had it already"))),
            (0xA700, Answer::Later),
            (0xA702, Answer::Later),
            (0xA900, Answer::Refused),
            (0xC000, Answer::Refused),
            (0xCFFF, Answer::Refused),
            (0x0122, Answer::Refused),
            (0x0124, Answer::Refused),
            (0x0211, Answer::Refused),
        ] {
            assert_eq!(judge(status), answer, "{status:04X}");
        }
    }
}
