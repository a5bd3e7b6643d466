//! Tests of the page as a browser and a program meet it, over HTTP.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use shared::TENSOR_BYTES;
use tokio::sync::broadcast;

use super::{NotShown, Settings, Shown, Sources, example, routes};
use crate::operate::metrics::{Counts, Metrics};
use crate::operate::status::Status;

/// A page over the examples; it ends with the test.
struct Served {
    address: SocketAddr,
    changed: broadcast::Sender<()>,
    _runtime: tokio::runtime::Runtime,
}

fn serve(settings: Settings) -> Served {
    let (changed, _) = broadcast::channel(8);
    let sources = Sources {
        studies: Box::new(|show| example::studies().into_iter().for_each(show)),
        study: Box::new(|uid| {
            example::studies()
                .into_iter()
                .find(|one| one.study_uid == *uid)
        }),
        slice: Box::new(|slice, _| match slice.sequence {
            1 => Err(NotShown::Purged),
            2 => Err(NotShown::Refused(
                "pixel-data: a JPEG scan ends early".into(),
            )),
            _ => Ok(Shown {
                tensor: vec![90; TENSOR_BYTES],
                contributions: None,
            }),
        }),
        status: Box::new(|| Status {
            state: "degraded".into(),
            problems: vec!["the self-test failed".into()],
            studies: 8,
            ..Status::default()
        }),
        counts: Box::new(Counts::default),
        metrics: Metrics::default(),
        changed: changed.clone(),
        study_changed: broadcast::Sender::new(1),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    let settings = tokio::sync::watch::Sender::new(Arc::new(settings)).subscribe();
    let app = routes::router(sources, settings);
    runtime.spawn(async move { axum::serve(listener, app).await });
    Served {
        address,
        changed,
        _runtime: runtime,
    }
}

impl Served {
    /// The answer to a GET with these headers, head and body.
    fn get(&self, path: &str, headers: &str) -> String {
        self.ask(&format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Connection: close\r\n\r\n"
        ))
    }

    fn ask(&self, request: &str) -> String {
        let mut connection = self.connect(request);
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Whether another listener is taken.
    fn listens(&self) -> bool {
        let connection = self.connect("GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let mut line = String::new();
        BufReader::new(connection).read_line(&mut line).unwrap();
        line.starts_with("HTTP/1.1 200")
    }

    fn connect(&self, request: &str) -> TcpStream {
        let mut connection = TcpStream::connect(self.address).unwrap();
        connection
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        connection.write_all(request.as_bytes()).unwrap();
        connection
    }
}

#[track_caller]
fn check(served: &Served, path: &str, status: &str, part: &str) {
    let answer = served.get(path, "");
    assert!(
        answer.starts_with(&format!("HTTP/1.1 {status}")),
        "{path}: {answer:.200}"
    );
    assert!(answer.contains(part), "{path}: {answer}");
}

#[test]
fn every_address_answers() {
    let served = serve(Settings::default());
    check(&served, "/", "200", "Worklist");
    check(&served, "/", "200", "the self-test failed");
    check(
        &served,
        "/studies/1.2.826.0.1.4?slice=9&window=lung&heatmap=1",
        "200",
        "9.png?window=lung&amp;heatmap=1",
    );
    check(
        &served,
        "/studies/1.2.826.0.1.4?slice=x",
        "200",
        "238 of 240",
    );
    check(&served, "/studies/1.2.9", "404", "no such study");
    check(&served, "/studies/..%2f..%2fetc", "404", "no such study");
    check(
        &served,
        "/studies/1.2.826.0.1.4/slices/0.png?window=pe",
        "200",
        "image/png",
    );
    check(
        &served,
        "/studies/1.2.826.0.1.4/slices/1.png",
        "410",
        "no longer stored",
    );
    check(
        &served,
        "/studies/1.2.826.0.1.4/slices/2.png",
        "422",
        "JPEG scan",
    );
    check(&served, "/studies/1.2.826.0.1.4/slices/999.png", "404", "");
    check(
        &served,
        "/studies/1.2.826.0.1.4/slices/0.png?window=bone",
        "404",
        "",
    );
    check(&served, "/system", "200", "Self-test");
    check(
        &served,
        "/api/studies",
        "200",
        "\"statement\":\"Not detected on 238 of 240 slices\"",
    );
    check(
        &served,
        "/api/studies/1.2.826.0.1.4",
        "200",
        "\"slice_results\":[",
    );
    check(&served, "/api/status", "200", "\"dead_letters\":0");
    check(&served, "/metrics", "200", "edge_studies 8.0");
    check(&served, "/healthz", "200", "ok");
    check(&served, "/readyz", "503", "degraded");
    check(&served, "/style.css", "200", "color-scheme: dark");
    check(&served, "/live.js", "200", "EventSource");
    check(&served, "/icon.svg", "200", "<svg");
    check(&served, "/none", "404", "Not found");
}

#[test]
fn every_page_says_research_use_and_allows_nothing_foreign() {
    let served = serve(Settings::default());
    for path in [
        "/",
        "/studies/1.2.826.0.1.4",
        "/system",
        "/none",
        "/sign-in",
    ] {
        let answer = served.get(path, "");
        assert!(
            answer.contains("Research use only. Not a medical device."),
            "{path}"
        );
        assert!(
            answer.contains("content-security-policy: default-src 'none';"),
            "{path}"
        );
        let (_, html) = answer.split_once("\r\n\r\n").unwrap();
        for forbidden in [
            "http://", "https://", "style=\"", "onclick", "<style", "<script>",
        ] {
            let html = html.replace("http://www.w3.org/2000/svg", "");
            assert!(!html.contains(forbidden), "{path}: {forbidden}");
        }
        for landmark in [
            "<main ",
            "<header>",
            "lang=\"en\"",
            "<h1",
            "Skip to content",
        ] {
            assert!(html.contains(landmark), "{path}: {landmark}");
        }
    }
}

#[test]
fn the_programs_interface_holds_no_name() {
    let served = serve(Settings::default());
    for path in [
        "/api/studies",
        "/api/studies/1.2.826.0.1.4",
        "/api/status",
        "/metrics",
    ] {
        let answer = served.get(path, "");
        for secret in ["Novak", "2031028", "19610228", "A048004"] {
            assert!(!answer.contains(secret), "{path}: {secret}");
        }
    }
}

#[test]
fn another_host_name_is_refused_without_a_token() {
    let served = serve(Settings::default());
    let answer = served.ask("GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
}

#[test]
fn with_a_token_nothing_of_a_study_is_reached_without_it() {
    let served = serve(Settings {
        token: Some("s3cret".into()),
        ..Settings::default()
    });
    for path in [
        "/",
        "/studies/1.2.826.0.1.4",
        "/studies/1.2.826.0.1.4/slices/0.png",
        "/system",
        "/api/studies",
        "/api/status",
        "/metrics",
        "/events",
    ] {
        assert!(served.get(path, "").starts_with("HTTP/1.1 401"), "{path}");
        assert!(
            served
                .get(path, "Accept: text/html\r\n")
                .contains("location: /sign-in"),
            "{path}"
        );
        if path != "/events" {
            assert!(
                served
                    .get(path, "Authorization: Bearer s3cret\r\n")
                    .starts_with("HTTP/1.1 200"),
                "{path}"
            );
        }
    }
    assert!(served.get("/healthz", "").starts_with("HTTP/1.1 200"));
    let sign_in = |token: &str| {
        let body = format!("token={token}");
        served.ask(&format!(
            "POST /sign-in HTTP/1.1\r\nHost: board\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        ))
    };
    assert!(sign_in("wrong").starts_with("HTTP/1.1 403"));
    let answer = sign_in("s3cret");
    let cookie = answer
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: "))
        .unwrap();
    assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"));
    let pair = cookie.split(';').next().unwrap();
    assert!(
        served
            .get("/", &format!("Cookie: {pair}\r\n"))
            .starts_with("HTTP/1.1 200")
    );
}

#[test]
fn a_picture_that_the_browser_knows_is_not_drawn_again() {
    let served = serve(Settings::default());
    let path = "/studies/1.2.826.0.1.4/slices/0.png";
    let answer = served.get(path, "");
    let tag = answer
        .lines()
        .find_map(|line| line.strip_prefix("etag: "))
        .unwrap();
    let again = served.get(path, &format!("If-None-Match: {tag}\r\n"));
    assert!(again.starts_with("HTTP/1.1 304"), "{again}");
    let other = served.get(
        &format!("{path}?window=lung"),
        &format!("If-None-Match: {tag}\r\n"),
    );
    assert!(other.starts_with("HTTP/1.1 200"));
}

#[test]
fn a_change_reaches_a_listening_browser() {
    let served = serve(Settings::default());
    let connection = served.connect("GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut lines = BufReader::new(connection).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "event: hello"));
    served.changed.send(()).unwrap();
    assert!(lines.any(|line| line == "event: changed"));
}

/// Relative luminance of `--name: #rrggbb;` in the style sheet (WCAG 2.2).
fn luminance(style: &str, name: &str) -> f64 {
    let (_, rest) = style.split_once(&format!("--{name}: #")).unwrap();
    let channel = |at: usize| {
        let value = f64::from(u8::from_str_radix(&rest[at..at + 2], 16).unwrap()) / 255.0;
        if value <= 0.04045 {
            value / 12.92
        } else {
            ((value + 0.055) / 1.055).powf(2.4)
        }
    };
    0.2126 * channel(0) + 0.7152 * channel(2) + 0.0722 * channel(4)
}

#[test]
fn text_stands_out_from_its_ground() {
    let style = include_str!("style.css");
    for ground in ["ground", "raised", "alarm-ground", "attention-ground"] {
        for (text, least) in [
            ("text", 7.0),
            ("quiet", 4.5),
            ("alarm", 4.5),
            ("attention", 4.5),
            ("calm", 4.5),
            ("link", 4.5),
        ] {
            let ratio = (luminance(style, text) + 0.05) / (luminance(style, ground) + 0.05);
            assert!(ratio >= least, "{text} on {ground}: {ratio:.1}");
        }
    }
}

#[test]
fn listeners_that_never_read_hold_nobody_up() {
    let served = serve(Settings::default());
    let request = "GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let silent: Vec<TcpStream> = (0..64).map(|_| served.connect(request)).collect();
    // Each has been taken in when the next is turned away.
    while served.listens() {}
    for _ in 0..100_000 {
        served.changed.send(()).unwrap();
    }
    check(&served, "/", "200", "Worklist");
    drop(silent);
    for _ in 0..12_000 {
        if served.listens() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the places of those that left are not given back");
}
