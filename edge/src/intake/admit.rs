//! Who may open an association, and what it may carry.
//!
//! In: an A-ASSOCIATE-RQ and the address it came from. Out: a presentation context result for each proposed context, or the
//! reason for an A-ASSOCIATE-RJ (PS3.8 section 9.3.4). The tables of SOP classes and transfer syntaxes here are the ones that
//! `docs/conformance.md` lists; a test compares them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use dicom_ul::pdu::{
    AssociationRJ, AssociationRJResult, AssociationRJServiceProviderASCEReason,
    AssociationRJServiceProviderPresentationReason, AssociationRJServiceUserReason,
    AssociationRJSource, PresentationContextProposed, PresentationContextResult,
    PresentationContextResultReason, RequestorRoles, UserVariableItem,
};
use shared::dicom::{Decodable, decodable};

use crate::commitment;
use crate::config::{Config, Limits};

/// The DICOM application context, PS3.7 annex A.
pub(super) const APPLICATION_CONTEXT: &str = "1.2.840.10008.3.1.1.1";
/// Verification SOP Class.
pub(crate) const VERIFICATION: &str = "1.2.840.10008.1.1";
const EXPLICIT_LITTLE: &str = "1.2.840.10008.1.2.1";
/// Implicit VR Little Endian.
pub(super) const IMPLICIT_LITTLE: &str = "1.2.840.10008.1.2";

/// What is done with objects of a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Nothing is stored: C-ECHO.
    Verification,
    /// Stored and analysed.
    Analysed,
    /// Nothing is stored: reports and, where configured, requests of storage commitment.
    Commitment,
    /// Stored because auto-send brings it along; never analysed, purged first.
    Stored,
}

impl Use {
    /// Whether objects of the class are stored.
    pub(crate) fn is_storage(self) -> bool {
        matches!(self, Self::Analysed | Self::Stored)
    }
}

/// A SOP class that is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SopClass {
    /// UID, PS3.6 annex A.
    pub(crate) uid: &'static str,
    /// Its name there.
    pub(crate) name: &'static str,
    /// What is done with its objects.
    pub(crate) purpose: Use,
}

const fn class(uid: &'static str, name: &'static str, purpose: Use) -> SopClass {
    SopClass { uid, name, purpose }
}

/// Every SOP class that is accepted as SCP.
pub(crate) static SOP_CLASSES: [SopClass; 21] = [
    class(VERIFICATION, "Verification", Use::Verification),
    class(
        commitment::SOP_CLASS_UID,
        "Storage Commitment Push Model",
        Use::Commitment,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.2",
        "CT Image Storage",
        Use::Analysed,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.2.1",
        "Enhanced CT Image Storage",
        Use::Analysed,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.2.2",
        "Legacy Converted Enhanced CT Image Storage",
        Use::Analysed,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7",
        "Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7.1",
        "Multi-frame Single Bit Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7.2",
        "Multi-frame Grayscale Byte Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7.3",
        "Multi-frame Grayscale Word Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.7.4",
        "Multi-frame True Color Secondary Capture Image Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.11.1",
        "Grayscale Softcopy Presentation State Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.11.2",
        "Color Softcopy Presentation State Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.66",
        "Raw Data Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.11",
        "Basic Text SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.22",
        "Enhanced SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.33",
        "Comprehensive SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.34",
        "Comprehensive 3D SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.59",
        "Key Object Selection Document Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.67",
        "X-Ray Radiation Dose SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.88.73",
        "Patient Radiation Dose SR Storage",
        Use::Stored,
    ),
    class(
        "1.2.840.10008.5.1.4.1.1.104.1",
        "Encapsulated PDF Storage",
        Use::Stored,
    ),
];

/// The row of a SOP class.
pub(crate) fn sop_class(uid: &str) -> Option<&'static SopClass> {
    SOP_CLASSES.iter().find(|class| class.uid == uid)
}

/// Whether objects of a class are analysed.
pub(crate) fn is_analysed(uid: &str) -> bool {
    sop_class(uid).is_some_and(|class| class.purpose == Use::Analysed)
}

/// The transfer syntaxes that this build decodes, the preferred first: Explicit LE, Implicit LE, lossless, lossy.
pub(crate) fn transfer_syntaxes() -> Vec<Decodable> {
    let mut syntaxes: Vec<Decodable> = decodable().collect();
    syntaxes.sort_by_key(|syntax| match syntax.uid {
        EXPLICIT_LITTLE => 0,
        IMPLICIT_LITTLE => 1,
        _ if syntax.is_lossless => 2,
        _ => 3,
    });
    syntaxes
}

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

/// Who has how many associations.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    open: Arc<Mutex<Open>>,
}

#[derive(Debug, Default)]
struct Open {
    total: usize,
    by_address: HashMap<IpAddr, usize>,
    by_title: HashMap<String, usize>,
}

/// One association's place; given back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    open: Arc<Mutex<Open>>,
    address: IpAddr,
    title: String,
}

impl Slots {
    /// Associations that are open.
    pub(crate) fn open(&self) -> usize {
        lock(&self.open).total
    }

    /// Takes a place; `None` where a cap is reached. While peers are listed, the last `kept_for_listed` places go only to a peer
    /// that has none, so that one console with many associations locks nobody out.
    pub(super) fn take(
        &self,
        address: IpAddr,
        title: &str,
        is_listed: bool,
        limits: &Limits,
    ) -> Option<Slot> {
        let mut open = lock(&self.open);
        let of_title = open.by_title.get(title).copied().unwrap_or(0);
        let most = if is_listed && of_title > 0 {
            limits
                .max_associations
                .saturating_sub(limits.kept_for_listed)
        } else {
            limits.max_associations
        };
        let of_address = open.by_address.get(&address).copied().unwrap_or(0);
        let is_first_of_listed = is_listed && of_title == 0;
        if open.total >= most || (of_address >= limits.max_per_address && !is_first_of_listed) {
            return None;
        }
        open.total += 1;
        *open.by_address.entry(address).or_default() += 1;
        *open.by_title.entry(title.to_owned()).or_default() += 1;
        Some(Slot {
            open: Arc::clone(&self.open),
            address,
            title: title.to_owned(),
        })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut open = lock(&self.open);
        open.total = open.total.saturating_sub(1);
        if let Some(count) = open.by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.by_address.remove(&self.address);
            }
        }
        if let Some(count) = open.by_title.get_mut(&self.title) {
            *count -= 1;
            if *count == 0 {
                open.by_title.remove(&self.title);
            }
        }
    }
}

fn lock(open: &Mutex<Open>) -> std::sync::MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows between `<!-- name -->` and `<!-- end -->`.
    fn documented(name: &str) -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/conformance.md");
        let text = std::fs::read_to_string(path).unwrap();
        let start = format!("<!-- {name} -->\n");
        let table = text.split(&start).nth(1).unwrap();
        table.split("<!-- end -->").next().unwrap().to_owned()
    }

    #[test]
    fn tables_of_the_conformance_statement_are_the_programs() {
        let mut classes = "| SOP class | UID | Use |\n|---|---|---|\n".to_owned();
        for class in &SOP_CLASSES {
            let purpose = match class.purpose {
                Use::Verification => "verification",
                Use::Analysed => "stored and analysed",
                Use::Stored => "stored",
                Use::Commitment => "commitment",
            };
            classes += &format!("| {} | {} | {purpose} |\n", class.name, class.uid);
        }
        assert_eq!(documented("sop classes"), classes);
        let mut syntaxes = "| Transfer syntax | UID | |\n|---|---|---|\n".to_owned();
        let by_feature = |uid: &str| {
            cfg!(any(
                feature = "jpeg2000",
                feature = "jpegls",
                feature = "deflate"
            )) && !documented("transfer syntaxes").contains(&format!("| {uid} |"))
        };
        let built = transfer_syntaxes();
        for syntax in built.iter().filter(|syntax| !by_feature(syntax.uid)) {
            let loss = if syntax.is_lossless {
                "lossless"
            } else {
                "can be lossy"
            };
            syntaxes += &format!("| {} | {} | {loss} |\n", syntax.name, syntax.uid);
        }
        assert_eq!(documented("transfer syntaxes"), syntaxes);
    }

    #[test]
    fn sop_classes_are_named_once_and_are_uids() {
        for (index, class) in SOP_CLASSES.iter().enumerate() {
            shared::uid::Uid::new(class.uid).unwrap();
            assert_eq!(sop_class(class.uid), Some(&SOP_CLASSES[index]));
        }
    }

    #[test]
    fn place_is_given_back_by_address_and_title() {
        let config = Config::parse("", std::path::Path::new(""), Some("/state".into())).unwrap();
        let slots = Slots::default();
        let address = IpAddr::from([192, 0, 2, 1]);
        let slot = slots.take(address, "CT1", true, &config.limits).unwrap();
        assert_eq!(slots.open(), 1);
        drop(slot);
        assert_eq!(slots.open(), 0);
        let open = lock(&slots.open);
        assert!(open.by_address.is_empty() && open.by_title.is_empty());
    }
}
