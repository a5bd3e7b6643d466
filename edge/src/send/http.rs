//! POST, for the webhook and for STOW-RS: one attempt with one deadline, no redirects.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use ureq::Agent;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::delivery::Verdict;

/// The certificate authorities that this machine trusts; without the file those of Mozilla are used.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Largest answer that is read.
const MAX_ANSWER_BYTES: u64 = 256 << 10;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// HTTP status.
    pub(crate) status: u16,
    /// Body, cut at [`MAX_ANSWER_BYTES`].
    pub(crate) body: Vec<u8>,
}

/// Something that can be asked.
pub(crate) fn agent() -> Agent {
    let tls = TlsConfig::builder().root_certs(authorities()).build();
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .tls_config(tls)
        .user_agent(concat!("pe-edge/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}

/// Posts `body`. Blocks.
///
/// # Errors
/// Why there is no answer.
pub(crate) fn post(
    agent: &Agent,
    url: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    deadline: Duration,
) -> Result<Answer, String> {
    let mut request = agent.post(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.config().timeout_global(Some(deadline)).build();
    let mut response = request.send(body).map_err(|error| error.to_string())?;
    let status = response.status().as_u16();
    let body = response.body_mut().with_config().limit(MAX_ANSWER_BYTES);
    // A body that is too long or cut short says nothing; the status does.
    let body = body.read_to_vec().unwrap_or_default();
    Ok(Answer { status, body })
}

/// What a status means for a letter.
pub(crate) fn judge(status: u16) -> Verdict {
    let said = format!("HTTP status {status}");
    match status {
        200..=299 => Verdict::Accepted(None),
        408 | 425 | 429 | 500..=599 => Verdict::Later(said),
        _ => Verdict::Refused(said),
    }
}

fn authorities() -> RootCerts {
    let Ok(pem) = fs::read(SYSTEM_AUTHORITIES) else {
        return RootCerts::WebPki;
    };
    let certificates: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return RootCerts::WebPki;
    }
    RootCerts::Specific(Arc::new(certificates))
}
