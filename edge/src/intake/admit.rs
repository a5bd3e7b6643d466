//! Who may open an association, and what it may carry.
//!
//! In: an A-ASSOCIATE-RQ and the address it came from. Out: a presentation context result for each proposed context, or the
//! reason for an A-ASSOCIATE-RJ (PS3.8 section 9.3.4). What may be carried at all stands in [`super::classes`], how many may come in [`super::slots`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use dicom_ul::pdu::{
    AssociationRJ, AssociationRJResult, AssociationRJServiceProviderASCEReason,
    AssociationRJServiceProviderPresentationReason, AssociationRJServiceUserReason,
    AssociationRJSource, PresentationContextProposed, PresentationContextResult,
    PresentationContextResultReason, RequestorRoles, UserVariableItem,
};
use shared::dicom::Decodable;

use super::classes::{
    EXPLICIT_LITTLE, IMPLICIT_LITTLE, SopClass, Use, sop_class, transfer_syntaxes,
};
use crate::commitment;
use crate::config::Config;

/// The DICOM application context, PS3.7 annex A.
pub(super) const APPLICATION_CONTEXT: &str = "1.2.840.10008.3.1.1.1";

/// Why an association is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Rejection {
    /// Result 1, source 2, reason 2.
    #[error("protocol version not supported")]
    ProtocolVersion,
    /// Result 1, source 1, reason 2.
    #[error("application context name not supported")]
    ApplicationContext,
    /// Result 1, source 1, reason 3: title or address is not listed.
    #[error("calling AE title or address not listed")]
    Calling,
    /// Result 1, source 1, reason 7.
    #[error("called AE title is not ours")]
    Called,
    /// Result 2, source 3, reason 2.
    #[error("too many associations")]
    Limit,
}

impl Rejection {
    /// The PDU.
    pub(super) fn pdu(self) -> AssociationRJ {
        use AssociationRJServiceUserReason as User;
        use AssociationRJSource::{
            ServiceProviderASCE as Acse, ServiceProviderPresentation as Presentation, ServiceUser,
        };
        let source = match self {
            Self::ProtocolVersion => {
                Acse(AssociationRJServiceProviderASCEReason::ProtocolVersionNotSupported)
            }
            Self::ApplicationContext => ServiceUser(User::ApplicationContextNameNotSupported),
            Self::Calling => ServiceUser(User::CallingAETitleNotRecognized),
            Self::Called => ServiceUser(User::CalledAETitleNotRecognized),
            Self::Limit => {
                Presentation(AssociationRJServiceProviderPresentationReason::LocalLimitExceeded)
            }
        };
        let result = match self {
            Self::Limit => AssociationRJResult::Transient,
            _ => AssociationRJResult::Permanent,
        };
        AssociationRJ { result, source }
    }
}

/// Whether a peer may open an association: title and address listed, or nobody listed.
///
/// # Errors
/// The rejection that it gets.
pub(super) fn peer(
    config: &Config,
    calling: &str,
    called: &str,
    address: IpAddr,
) -> Result<(), Rejection> {
    if !config.accept_any_called && called != config.ae_title {
        return Err(Rejection::Called);
    }
    if config.peers.is_empty() {
        return Ok(());
    }
    let Some(peer) = config.peers.get(calling) else {
        return Err(Rejection::Calling);
    };
    let is_address_listed = peer.addresses.is_empty()
        || peer
            .addresses
            .iter()
            .any(|network| network.contains(address));
    if is_address_listed {
        Ok(())
    } else {
        Err(Rejection::Calling)
    }
}

/// An accepted presentation context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Context {
    /// Its class.
    pub(super) class: &'static SopClass,
    /// Its transfer syntax.
    pub(super) transfer_syntax: &'static str,
    /// What we are in it, where it is about commitment.
    pub(super) roles: Roles,
}

/// What we are towards storage commitment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Roles {
    /// We asked, and take reports.
    pub(super) is_user: bool,
    /// We are asked, and report.
    pub(super) is_provider: bool,
}

impl Roles {
    /// What of it a peer proposes, who is user where it selects no role (PS3.7 annex D.3.3.4). Out: the roles, and the item that says so.
    pub(super) fn agreed(self, proposed: &[UserVariableItem]) -> (Self, Option<UserVariableItem>) {
        let theirs = proposed.iter().find_map(|item| match item {
            UserVariableItem::ScuScpRoleSelectionSubItem(uid, roles) => {
                (trim_uid(uid) == commitment::SOP_CLASS_UID).then_some(*roles)
            }
            _ => None,
        });
        let agreed = Self {
            is_user: self.is_user && theirs.is_some_and(|theirs| theirs.scp),
            is_provider: self.is_provider && theirs.is_none_or(|theirs| theirs.scu),
        };
        let item = theirs.map(|_| {
            let roles = RequestorRoles {
                scu: agreed.is_provider,
                scp: agreed.is_user,
            };
            let uid = commitment::SOP_CLASS_UID.to_owned();
            UserVariableItem::ScuScpRoleSelectionSubItem(uid, roles)
        });
        (agreed, item)
    }

    fn is_none(self) -> bool {
        !self.is_user && !self.is_provider
    }
}

/// Answers each proposed context. Out: the accepted ones by identifier, and the results in the order proposed.
pub(super) fn negotiate(
    proposed: &[PresentationContextProposed],
    roles: Roles,
) -> (BTreeMap<u8, Context>, Vec<PresentationContextResult>) {
    let preferred = transfer_syntaxes();
    let mut accepted = BTreeMap::new();
    let mut results = Vec::with_capacity(proposed.len());
    for context in proposed {
        let chosen = choose(context, &preferred, roles);
        let (reason, transfer_syntax) = match &chosen {
            Ok(chosen) => (
                PresentationContextResultReason::Acceptance,
                chosen.transfer_syntax,
            ),
            Err(reason) => (reason.clone(), IMPLICIT_LITTLE),
        };
        if let Ok(chosen) = chosen {
            accepted.insert(context.id, chosen);
        }
        results.push(PresentationContextResult {
            id: context.id,
            reason,
            transfer_syntax: transfer_syntax.to_owned(),
        });
    }
    (accepted, results)
}

fn choose(
    context: &PresentationContextProposed,
    preferred: &[Decodable],
    roles: Roles,
) -> Result<Context, PresentationContextResultReason> {
    let is_commitment = |class: &SopClass| class.purpose == Use::Commitment;
    let class = sop_class(trim_uid(&context.abstract_syntax))
        .filter(|class| !is_commitment(class) || !roles.is_none())
        .ok_or(PresentationContextResultReason::AbstractSyntaxNotSupported)?;
    let is_proposed = |uid: &str| {
        context
            .transfer_syntaxes
            .iter()
            .any(|proposed| trim_uid(proposed) == uid)
    };
    let syntax = preferred
        .iter()
        // Its data sets are read here and not by the worker, so the two plain syntaxes do.
        .filter(|syntax| {
            !is_commitment(class) || [EXPLICIT_LITTLE, IMPLICIT_LITTLE].contains(&syntax.uid)
        })
        .find(|syntax| is_proposed(syntax.uid))
        .ok_or(PresentationContextResultReason::TransferSyntaxesNotSupported)?;
    Ok(Context {
        class,
        transfer_syntax: syntax.uid,
        roles,
    })
}

/// A UID without the padding that some peers send.
pub(super) fn trim_uid(uid: &str) -> &str {
    uid.trim_matches(['\0', ' '])
}
