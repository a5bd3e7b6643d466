//! The configuration of `edge serve`: a TOML file in, a [`Config`] with every default applied and every range checked out.
//!
//! Only [`Config`] travels. All faults of a file are reported at once, each with line, column and, for an unknown key, the
//! nearest known one. `edge config init` prints `default.toml`, which a test holds to the defaults here. Whether ports can be
//! bound, folders written and peers reached is left to the parts that do so.

mod read;
mod sections;
mod show;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeTable;

pub(crate) use read::Fault;
use read::{Faults, Section};
pub(crate) use show::show;

/// The commented configuration that `edge config init` prints.
pub(crate) const INITIAL: &str = include_str!("default.toml");
/// Largest configuration file.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most listed peers.
const MAX_PEERS: usize = 256;

/// Everything that can be set.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// Our AE title.
    pub(crate) ae_title: String,
    /// Address the DICOM listener binds.
    pub(crate) dicom_bind: IpAddr,
    /// Its port; 0 lets the system choose.
    pub(crate) dicom_port: u16,
    /// Where the page is served.
    pub(crate) http_bind: SocketAddr,
    /// The one folder that is written.
    pub(crate) state_dir: PathBuf,
    /// The model file; `None`: the demonstration model.
    pub(crate) model: Option<PathBuf>,
    /// Threads of the network; `None`: all cores.
    pub(crate) threads: Option<u32>,
    /// A study without a new object for this long is complete.
    pub(crate) quiet_time: Duration,
    /// Whether an association that calls another AE title than ours is accepted. Default: while no peer is listed.
    pub(crate) accept_any_called: bool,
    /// Whether results of a model trained on the phantom may leave the box for studies that are no phantoms.
    pub(crate) allow_demo_results: bool,
    /// A folder whose files are taken in, too.
    pub(crate) watch_folder: Option<PathBuf>,
    /// Who may send, by calling AE title. Empty: everyone.
    pub(crate) peers: BTreeMap<String, Peer>,
    /// Bounds of the listener.
    pub(crate) limits: Limits,
    /// Where results go by C-STORE.
    pub(crate) pacs: Option<Pacs>,
    /// What is kept, and for how long.
    pub(crate) retention: Retention,
    /// Whether this node commits to what peers store here.
    pub(crate) commitment: Option<Commitment>,
    /// DICOM over TLS.
    pub(crate) tls: Option<Tls>,
    /// Results as JSON by HTTP POST.
    pub(crate) webhook: Option<Webhook>,
    /// Results as HL7 ORU^R01 over MLLP.
    pub(crate) hl7: Option<Hl7>,
    /// Results by STOW-RS.
    pub(crate) stow: Option<Stow>,
    /// The page.
    pub(crate) page: Page,
}

/// A peer that may send.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Addresses and networks it may come from; empty: any.
    pub(crate) addresses: Vec<Network>,
    /// Where reports of storage commitment go when its association is gone: host and port.
    pub(crate) report_to: Option<(String, u16)>,
}

/// Storage commitment to peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Commitment {
    /// How long an instance is kept from the commitment on.
    pub(crate) keep: Duration,
}

/// An address, or all addresses that share its first bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Network {
    address: IpAddr,
    prefix_bits: u8,
}

/// Bounds of the listener.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Limits {
    /// Associations at a time.
    pub(crate) max_associations: usize,
    /// Associations at a time from one address.
    pub(crate) max_per_address: usize,
    /// Of `max_associations`, those that only listed peers get.
    pub(crate) kept_for_listed: usize,
    /// From the connection to the whole A-ASSOCIATE-RQ.
    pub(crate) request_timeout: Duration,
    /// From the first byte of a PDU to its last, and for each write.
    pub(crate) pdu_timeout: Duration,
    /// Between messages of an association.
    pub(crate) idle_timeout: Duration,
    /// Fewest bytes a second while a message is being sent, averaged over `rate_window`.
    pub(crate) min_bytes_per_second: u64,
    /// Over how long the rate is averaged.
    pub(crate) rate_window: Duration,
    /// Largest object.
    pub(crate) max_object_bytes: u64,
    /// How long associations may finish what they send when the node stops.
    pub(crate) drain_timeout: Duration,
}

/// The PACS that gets results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pacs {
    /// Its AE title.
    pub(crate) ae_title: String,
    /// Host name or address.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
    /// Whether it is spoken to over TLS, with the certificate of `[tls]`.
    pub(crate) tls: bool,
    /// Whether a secondary capture goes beside the structured report.
    pub(crate) secondary_capture: bool,
    /// Whether storage commitment is asked for.
    pub(crate) storage_commitment: bool,
    /// How long the report may take.
    pub(crate) commitment_timeout: Duration,
}

/// What is kept, and for how long.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Retention {
    /// Everything with patient data is deleted after this time.
    pub(crate) max_age: Duration,
    /// Free bytes on the file system below which objects are refused.
    pub(crate) keep_free_bytes: u64,
    /// Most bytes of spooled objects.
    pub(crate) quota_bytes: u64,
}

/// DICOM over TLS (BCP 195 profile of PS3.15 annex B.9).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tls {
    /// Certificate chain, PEM.
    pub(crate) certificate: PathBuf,
    /// Private key, PEM.
    pub(crate) key: PathBuf,
    /// Authorities whose certificates peers must show, PEM.
    pub(crate) client_ca: PathBuf,
}

/// A webhook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Webhook {
    /// Where to POST.
    pub(crate) url: String,
    /// File with the key of the HMAC signature.
    pub(crate) secret_file: PathBuf,
}

/// An HL7 receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hl7 {
    /// Host name or address.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
    /// Whether MLLP goes over TLS, with the certificate of `[tls]`.
    pub(crate) tls: bool,
    /// MSH-4.
    pub(crate) sending_facility: String,
    /// MSH-5.
    pub(crate) receiving_application: String,
    /// MSH-6.
    pub(crate) receiving_facility: String,
}

/// A STOW-RS server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stow {
    /// The service's root, to which `/studies` is appended.
    pub(crate) url: String,
    /// File with a bearer token.
    pub(crate) token_file: Option<PathBuf>,
}

/// The page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// File with the token that browsers must give; without it only loopback is served.
    pub(crate) token_file: Option<PathBuf>,
    /// Whether patient names stay hidden.
    pub(crate) hide_patient_names: bool,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("{}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than a configuration can be.
    #[error("{}: more than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
    },
    /// Its faults.
    #[error("{}", Listed { path, faults })]
    Faults {
        /// Which.
        path: PathBuf,
        /// All of them, in the order of the file.
        faults: Vec<Fault>,
    },
    /// Nothing says where to keep state.
    #[error("no state folder: set state_dir in a configuration file, or HOME")]
    NoStateFolder,
}

struct Listed<'a> {
    path: &'a Path,
    faults: &'a [Fault],
}

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} fault(s)", self.path.display(), self.faults.len())?;
        for fault in self.faults {
            write!(f, "\n  {fault}")?;
        }
        Ok(())
    }
}

impl Config {
    /// Reads the file, or takes the defaults where there is none.
    ///
    /// # Errors
    /// The file cannot be read or has faults: all of them.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let fallback = default_state_dir();
        let Some(path) = path else {
            let config = Self::parse("", Path::new(""), fallback);
            return config.map_err(|_| ConfigError::NoStateFolder);
        };
        let unreadable = |source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
        if bytes > MAX_FILE_BYTES {
            return Err(ConfigError::TooLarge {
                path: path.to_owned(),
            });
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        Self::parse(&text, folder, fallback).map_err(|faults| ConfigError::Faults {
            path: path.to_owned(),
            faults,
        })
    }

    /// Reads a configuration; paths in it are relative to `folder`.
    ///
    /// # Errors
    /// Every fault, in the order of the text.
    pub(crate) fn parse(
        text: &str,
        folder: &Path,
        state_dir: Option<PathBuf>,
    ) -> Result<Self, Vec<Fault>> {
        let faults = Faults::new(text);
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            faults.push(&error.span().unwrap_or(0..0), error.message());
        }
        let span = table.span().start..table.span().start;
        let mut root = Section::root(table.get_ref(), span, &faults);
        let config = sections::read_config(&mut root, folder, state_dir);
        root.finish();
        let faults = faults.into_list();
        match config {
            Some(config) if faults.is_empty() => Ok(config),
            _ => Err(faults),
        }
    }
}

impl Network {
    /// Reads `192.0.2.7` or `192.0.2.0/24`.
    fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is neither an address nor a network such as 192.0.2.0/24");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match bits {
            Some(bits) => bits.parse().ok().filter(|bits| *bits <= most),
            None => Some(most),
        };
        Ok(Self {
            address,
            prefix_bits: prefix_bits.ok_or_else(wrong)?,
        })
    }

    /// Whether an address lies in it.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_bits));
                (network.to_bits() ^ address.to_bits()) & mask.unwrap_or(0) == 0
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_bits));
                (network.to_bits() ^ address.to_bits()) & mask.unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
}

/// Where state is kept without a configuration: systemd's folder, else the user's.
fn default_state_dir() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let user = || {
        let base = variable("XDG_STATE_HOME").map(PathBuf::from);
        let home = || variable("HOME").map(|home| Path::new(&home).join(".local/state"));
        base.or_else(home).map(|base| base.join("pe-edge"))
    };
    variable("STATE_DIRECTORY").map(PathBuf::from).or_else(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Vec<Fault>> {
        Config::parse(text, Path::new("/etc/pe"), Some(PathBuf::from("/state")))
    }

    #[track_caller]
    fn check_fault(text: &str, wanted: &str) {
        let faults = parse(text).unwrap_err();
        let printed: Vec<String> = faults.iter().map(Fault::to_string).collect();
        assert_eq!(printed, [wanted]);
    }

    #[test]
    fn empty_file_is_the_shipped_configuration() {
        let config = parse("").unwrap();
        assert_eq!(config.ae_title, "PEEDGE");
        assert_eq!(config.dicom_port, 11112);
        assert_eq!(config.http_bind.to_string(), "127.0.0.1:8080");
        assert_eq!(config.quiet_time, Duration::from_secs(60));
        assert!(config.accept_any_called && config.pacs.is_none());
    }

    #[test]
    fn initial_file_uncommented_at_the_top_is_the_shipped_configuration() {
        assert_eq!(parse(INITIAL), parse(""));
        let settings = INITIAL.split("\n#[peers").next().unwrap();
        let settings: String = uncomment(settings)
            .lines()
            .filter(|line| !line.starts_with("state_dir") && !line.starts_with("model"))
            .filter(|line| !line.starts_with("watch_folder") && !line.starts_with("threads"))
            .filter(|line| !line.starts_with("token_file"))
            .map(|line| format!("{line}\n"))
            .collect();
        assert_eq!(parse(&settings), parse(""), "{settings}");
    }

    #[test]
    fn initial_file_wholly_uncommented_has_no_fault_and_names_every_key() {
        let config = parse(&uncomment(INITIAL)).unwrap();
        assert!(config.pacs.is_some() && config.tls.is_some() && config.stow.is_some());
        assert!(config.commitment.is_some());
        assert!(config.model.is_some() && config.threads.is_some());
        assert!(config.watch_folder.is_some() && config.page.token_file.is_some());
        let shown = show(&config);
        assert_eq!(parse(&shown), Ok(config), "{shown}");
        for line in shown.lines().filter(|line| line.contains(" = ")) {
            let key = line.split(' ').next().unwrap();
            assert!(INITIAL.contains(&format!("#{key} = ")), "{key}");
        }
    }

    /// Settings are commented as `#key` and `#[section]`, prose as `# text`.
    fn uncomment(text: &str) -> String {
        let uncommented = text.lines().map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c == '[' || c.is_ascii_lowercase()) => rest,
            _ => line,
        });
        uncommented.map(|line| format!("{line}\n")).collect()
    }

    #[test]
    fn unknown_key_is_placed_and_answered_with_the_nearest_one() {
        check_fault(
            "\nae_titel = \"X\"\n",
            "line 2, column 1: unknown key `ae_titel`; did you mean `ae_title`?",
        );
        check_fault(
            "[limits]\nmax_asociations = 3",
            "line 2, column 1: unknown key `max_asociations` in [limits]; did you mean `max_associations`?",
        );
    }

    #[test]
    fn range_type_and_missing_key_are_placed() {
        check_fault(
            "dicom_port = 70000",
            "line 1, column 14: dicom_port = 70000 is outside 0 to 65535",
        );
        check_fault(
            "dicom_port = \"x\"",
            "line 1, column 14: dicom_port must be a whole number, found string",
        );
        check_fault(
            "[pacs]\nhost = \"h\"\nae_title = \"A\"",
            "line 1, column 1: [pacs] needs port",
        );
        check_fault(
            "[commitment]\nkeep_days = 7",
            "line 2, column 13: keep_days must be less than [retention] max_age_days: nothing is kept for longer",
        );
        check_fault(
            "[peers.CT1]\n[pacs]\nae_title = \"P\"\nhost = \"h\"\nport = 104\nstorage_commitment = true",
            "line 2, column 1: [pacs] storage_commitment needs [peers.P] too: its reports come on associations of its own",
        );
        check_fault(
            "[peers.CT1]\nreport_to = \"192.0.2.7\"",
            "line 2, column 13: report_to: `192.0.2.7` is not HOST:PORT such as 192.0.2.7:104",
        );
        check_fault(
            "http_bind = \"0.0.0.0:80\"",
            "line 1, column 13: http_bind: only loopback is served without [page] token_file",
        );
    }

    #[test]
    fn all_faults_are_reported_at_once_in_the_order_of_the_file() {
        let faults =
            parse("colour = 1\ndicom_port = -1\n[tls]\nkey = 3\n[peers]\nX = 1").unwrap_err();
        let lines: Vec<usize> = faults.iter().map(|fault| fault.line).collect();
        assert_eq!(lines, [1, 2, 3, 3, 4, 6], "{faults:?}");
    }

    #[test]
    fn text_that_is_no_toml_is_a_fault_with_its_place() {
        let faults = parse("ae_title = \n").unwrap_err();
        assert_eq!(faults[0].line, 1, "{faults:?}");
    }

    #[test]
    fn network_contains_its_addresses_only() {
        let inside = |network: &str, address: &str| {
            Network::parse(network)
                .unwrap()
                .contains(address.parse().unwrap())
        };
        assert!(inside("192.0.2.0/24", "192.0.2.255"));
        assert!(!inside("192.0.2.0/24", "192.0.3.0"));
        assert!(inside("192.0.2.7", "::ffff:192.0.2.7"));
        assert!(inside("0.0.0.0/0", "203.0.113.9"));
        assert!(!inside("0.0.0.0/0", "2001:db8::1"));
        assert!(inside("2001:db8::/32", "2001:db8:1::1"));
        assert!(Network::parse("192.0.2.0/33").is_err());
    }

    #[test]
    fn relative_paths_are_relative_to_the_file() {
        let config = parse("model = \"m.onnx\"\nstate_dir = \"/var/x\"").unwrap();
        assert_eq!(config.model, Some(PathBuf::from("/etc/pe/m.onnx")));
        assert_eq!(config.state_dir, PathBuf::from("/var/x"));
    }
}
