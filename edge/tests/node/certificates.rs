//! Certificates, made anew for each test: an authority, and who has certificates of it.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};

/// Writes `NAME.crt` and `NAME.key` for `node`, `peer`, `expired`, and `stranger`, who has another authority, and `ca.crt`.
pub(crate) fn write(folder: &Path) {
    let known = authority();
    std::fs::write(folder.join("ca.crt"), known.0).unwrap();
    for name in ["node", "peer"] {
        issue(folder, name, 2120, &known.1);
    }
    issue(folder, "expired", 2020, &known.1);
    issue(folder, "stranger", 2120, &authority().1);
}

fn authority() -> (String, Issuer<'static, KeyPair>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap();
    (certificate.pem(), Issuer::new(params, key))
}

fn issue(folder: &Path, name: &str, last_year: i32, issuer: &Issuer<'_, KeyPair>) {
    let key = KeyPair::generate().unwrap();
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let mut params = CertificateParams::new(names).unwrap();
    params.not_before = date_time_ymd(2019, 1, 1);
    params.not_after = date_time_ymd(last_year, 1, 1);
    let certificate = params.signed_by(&key, issuer).unwrap();
    std::fs::write(folder.join(format!("{name}.crt")), certificate.pem()).unwrap();
    std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}
