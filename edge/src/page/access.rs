//! Who is let in, and the headers of every answer.
//!
//! Without a token the page is for this machine alone: the address is a loopback one, and the Host header must name it, so that a web site cannot
//! reach the page through the reader's browser (DNS rebinding). With a token, a browser signs in once and keeps a cookie derived from it;
//! programs send `Authorization: Bearer`. `/healthz` and `/readyz` say nothing of anybody and are open.

use axum::extract::{Request, State};
use axum::http::header::{self, HeaderValue};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Redirect, Response};

use super::routes::Shared;

/// Name of the cookie.
const COOKIE: &str = "edge";
/// Nothing but what this program itself serves, no inline script or style, in no foreign frame.
const POLICY: &str = "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";
/// Addresses that need no token.
const OPEN: [&str; 6] = [
    "/healthz",
    "/readyz",
    "/sign-in",
    "/icon.svg",
    STYLE.path,
    SCRIPT.path,
];

/// The style sheet.
pub(crate) const STYLE: Asset = Asset {
    path: "/style.css",
    content_type: "text/css; charset=utf-8",
    text: include_str!("style.css"),
};
/// The script.
pub(crate) const SCRIPT: Asset = Asset {
    path: "/live.js",
    content_type: "text/javascript; charset=utf-8",
    text: include_str!("live.js"),
};
/// The icon.
pub(crate) const ICON: Asset = Asset {
    path: "/icon.svg",
    content_type: "image/svg+xml",
    text: include_str!("icon.svg"),
};

/// A file that is part of the program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asset {
    /// Its address.
    pub(crate) path: &'static str,
    content_type: &'static str,
    text: &'static str,
}

impl Asset {
    /// Its address with the version of the program, so that a browser does not show an old one after an update.
    pub(crate) fn address(self) -> String {
        let digest = blake3::hash(self.text.as_bytes()).to_hex();
        format!("{}?{}", self.path, digest.get(..12).unwrap_or_default())
    }

    /// The answer that holds it.
    pub(crate) fn answer(self) -> Response {
        let headers = [
            (header::CONTENT_TYPE, self.content_type),
            (header::CACHE_CONTROL, "public, max-age=31536000, immutable"),
        ];
        (headers, self.text).into_response()
    }
}

/// Lets a request in or not, and gives the answer its headers.
pub(crate) async fn guard(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let settings = shared.settings();
    let token = settings.token.as_deref();
    let answer = match token {
        _ if OPEN.contains(&path) => next.run(request).await,
        None if is_local(request.headers()) => next.run(request).await,
        None => (
            StatusCode::FORBIDDEN,
            "the Host header names another machine\n",
        )
            .into_response(),
        Some(token) if has_token(request.headers(), token) => next.run(request).await,
        Some(_) if wants_html(request.headers()) => Redirect::to("/sign-in").into_response(),
        Some(_) => {
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
            (StatusCode::UNAUTHORIZED, challenge, "a token is needed\n").into_response()
        }
    };
    with_headers(answer)
}

fn with_headers(mut answer: Response) -> Response {
    let headers = answer.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    answer
}

/// Whether the Host header names this machine's loopback.
fn is_local(headers: &HeaderMap) -> bool {
    let Some(host) = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
    else {
        return false;
    };
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    matches!(name, Some("localhost" | "::1")) || name.is_some_and(is_loopback_v4)
}

fn is_loopback_v4(name: &str) -> bool {
    name.parse()
        .is_ok_and(|address: std::net::Ipv4Addr| address.is_loopback())
}

fn has_token(headers: &HeaderMap, token: &str) -> bool {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
    };
    let bearer = text(header::AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    if bearer.is_some_and(|given| is_same(given, token)) {
        return true;
    }
    let cookies = text(header::COOKIE).unwrap_or_default();
    let given = cookies.split(';').find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == COOKIE).then_some(value)
    });
    given.is_some_and(|given| is_same(given, &cookie_value(token)))
}

/// Compares digests, so that the time says nothing of where two secrets differ.
pub(crate) fn is_same(given: &str, expected: &str) -> bool {
    blake3::hash(given.as_bytes()) == blake3::hash(expected.as_bytes())
}

fn wants_html(headers: &HeaderMap) -> bool {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.contains("text/html"))
}

/// What the cookie holds: not the token itself.
fn cookie_value(token: &str) -> String {
    blake3::derive_key("PE Edge 2026-11 page cookie", token.as_bytes())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The Set-Cookie header after signing in.
pub(crate) fn cookie(token: &str) -> String {
    format!(
        "{COOKIE}={}; Path=/; HttpOnly; SameSite=Strict; Max-Age=43200",
        cookie_value(token)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: header::HeaderName, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        headers
    }

    #[test]
    fn only_loopback_names_are_local() {
        for host in [
            "localhost",
            "localhost:8080",
            "127.0.0.1:8080",
            "[::1]:8080",
            "127.9.9.9",
        ] {
            assert!(is_local(&with(header::HOST, host)), "{host}");
        }
        for host in [
            "evil.example",
            "127.0.0.1.evil.example",
            "10.0.0.1:8080",
            "",
            "[::2]",
        ] {
            assert!(!is_local(&with(header::HOST, host)), "{host}");
        }
        assert!(!is_local(&HeaderMap::new()));
    }

    #[test]
    fn a_token_is_taken_as_bearer_or_as_cookie_and_no_other() {
        let cookie = cookie("secret");
        let cookie = cookie.split(';').next().unwrap();
        assert!(!cookie.contains("secret"));
        assert!(has_token(
            &with(header::AUTHORIZATION, "Bearer secret"),
            "secret"
        ));
        assert!(has_token(
            &with(header::COOKIE, &format!("a=b; {cookie}")),
            "secret"
        ));
        assert!(!has_token(
            &with(header::AUTHORIZATION, "Bearer secret2"),
            "secret"
        ));
        assert!(!has_token(&with(header::COOKIE, "edge=secret"), "secret"));
        assert!(!has_token(&HeaderMap::new(), "secret"));
    }
}
