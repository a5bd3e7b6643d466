//! DICOM over TLS, both ways authenticated: the BCP 195 profile (PS3.15 annex B.9).
//!
//! In: PEM files. Out: configurations for the listener and for connections to peers, and when the certificate ends. TLS 1.2 and 1.3, only suites with forward
//! secrecy and authenticated encryption (all that the provider has), a client certificate required. Reading the files again gives a
//! new configuration for the next connection; open associations keep theirs.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme, SupportedProtocolVersion,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::config::Tls;

/// What is spoken, with whoever.
const VERSIONS: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];
/// Certificates in one file.
const MAX_CERTIFICATES: usize = 64;

/// Why TLS cannot be spoken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file cannot be read, or holds something else.
    #[error("{path}")]
    Pem {
        /// Which.
        path: String,
        /// Why.
        source: rustls_pki_types::pem::Error,
    },
    /// A file holds no certificate.
    #[error("{0}: no certificate")]
    Empty(String),
    /// Key and certificates do not fit, or are refused.
    #[error(transparent)]
    Refused(#[from] rustls::Error),
    /// The authorities cannot be used.
    #[error("client_ca")]
    Authorities(#[from] rustls::server::VerifierBuilderError),
}

/// A usable configuration.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// For the listener.
    pub(crate) server: Arc<ServerConfig>,
    /// For connections to peers, whose certificates must be of our authorities and name their host.
    pub(crate) client: Arc<ClientConfig>,
    /// For connections of this program to its own node, which shows this very certificate under any name.
    pub(crate) own: Arc<ClientConfig>,
    /// When the certificate ends, Unix time in s; `None` where that cannot be read.
    pub(crate) expires_s: Option<i64>,
}

/// Reads the files.
///
/// # Errors
/// What is wrong with which of them.
pub(crate) fn load(settings: &Tls) -> Result<Identity, TlsError> {
    let chain = certificates(&settings.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&settings.key).map_err(pem(&settings.key))?;
    let mut authorities = RootCertStore::empty();
    for authority in certificates(&settings.client_ca)? {
        authorities.add(authority)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let authorities = Arc::new(authorities);
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::clone(&authorities),
        Arc::clone(&provider),
    )
    .build()?;
    let expires_s = chain
        .first()
        .and_then(|certificate| not_after_s(certificate));
    let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(VERSIONS)?
        .with_root_certificates(authorities)
        .with_client_auth_cert(chain.clone(), key.clone_key())?;
    let mut own = client.clone();
    own.dangerous()
        .set_certificate_verifier(Arc::new(OwnCertificate {
            certificate: chain.first().cloned(),
            provider: Arc::clone(&provider),
        }));
    let server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(VERSIONS)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    Ok(Identity {
        server: Arc::new(server),
        client: Arc::new(client),
        own: Arc::new(own),
        expires_s,
    })
}

/// Each file that cannot be used; where all can, what [`load`] says.
pub(crate) fn faults(settings: &Tls) -> Vec<TlsError> {
    let key = PrivateKeyDer::from_pem_file(&settings.key).map_err(pem(&settings.key));
    let read = [
        certificates(&settings.certificate).err(),
        key.err(),
        certificates(&settings.client_ca).err(),
    ];
    let unread: Vec<TlsError> = read.into_iter().flatten().collect();
    if unread.is_empty() {
        load(settings).err().into_iter().collect()
    } else {
        unread
    }
}

/// Takes a server that has the private key of one certificate, whatever name it was reached under.
#[derive(Debug)]
struct OwnCertificate {
    certificate: Option<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for OwnCertificate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.certificate.as_ref() == Some(end_entity) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(pem(path))?
        .take(MAX_CERTIFICATES)
        .collect::<Result<_, _>>()
        .map_err(pem(path))?;
    if found.is_empty() {
        return Err(TlsError::Empty(path.display().to_string()));
    }
    Ok(found)
}

fn pem(path: &Path) -> impl Fn(rustls_pki_types::pem::Error) -> TlsError {
    let path = path.display().to_string();
    move |source| TlsError::Pem {
        path: path.clone(),
        source,
    }
}

/// `notAfter` of a certificate, Unix time in s (RFC 5280 section 4.1).
fn not_after_s(certificate: &[u8]) -> Option<i64> {
    let (_, certificate, _) = der(certificate)?;
    let (_, mut rest, _) = der(certificate)?;
    // The version is optional and tagged; then serial number, signature and issuer come before the validity.
    let (tag, _, after) = der(rest)?;
    if tag == 0xa0 {
        rest = after;
    }
    for _ in 0..3 {
        (_, _, rest) = der(rest)?;
    }
    let (_, validity, _) = der(rest)?;
    let (_, _, rest) = der(validity)?;
    let (tag, time, _) = der(rest)?;
    let text = std::str::from_utf8(time).ok()?;
    let text = match tag {
        0x17 if text.get(..2)? < "50" => format!("20{text}"),
        0x17 => format!("19{text}"),
        _ => text.to_owned(),
    };
    let time = jiff::civil::DateTime::strptime("%Y%m%d%H%M%SZ", &text).ok()?;
    Some(
        time.to_zoned(jiff::tz::TimeZone::UTC)
            .ok()?
            .timestamp()
            .as_second(),
    )
}

/// Splits off one DER element. Out: its tag, its content, what follows.
fn der(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = bytes.split_first_chunk::<2>()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let n_bytes = usize::from(first & 0x7f);
        if n_bytes > 4 {
            return None;
        }
        let (digits, rest) = rest.split_at_checked(n_bytes)?;
        let length = digits
            .iter()
            .fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
        (length, rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_of_a_certificate_is_read() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.not_after = rcgen::date_time_ymd(2126, 7, 1);
        let certificate = params.self_signed(&key).unwrap();
        let certificate = certificate.der();
        let expires_s = not_after_s(certificate).unwrap();
        let wanted: jiff::Timestamp = "2126-07-01T00:00:00Z".parse().unwrap();
        assert_eq!(expires_s, wanted.as_second());
        for length in 0..certificate.len() {
            let cut = not_after_s(&certificate[..length]);
            assert!(cut.is_none_or(|cut| cut == expires_s), "cut at {length}");
        }
    }
}
