//! `edge doctor`: everything that the node needs, looked at one by one, for the person who was called at night.
//!
//! In: the configuration. Out: a line for each check with what was found. Nothing is changed but that the state folder is made where it is not there, and
//! that a file in it is written, synced and deleted. It may run beside the node: ports that the node itself holds are asked, not bound.

use std::fs::{self, File};
use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::command::DoctorArgs;
use super::model_store::ModelStore;
use super::ping::{PeerAddress, block_on, calling_here, echo};
use super::{ask, board};
use crate::config::Config;
use crate::exit::{Exit, Failure, failure, said};
use crate::intake::unix_ms;
use crate::model::ReadyModel;
use crate::page::system_view::bytes;

/// How long a peer may take.
const PEER_DEADLINE: Duration = Duration::from_secs(5);
/// Syncs that are timed.
const N_SYNCS: usize = 10;
/// Bytes of each: a slice.
const SYNC_BYTES: usize = 512 << 10;
/// A sync above this slows a console down that waits for each answer.
const SLOW_SYNC: Duration = Duration::from_millis(100);
/// A processor above this throttles.
const HOT_CELSIUS: f32 = 80.0;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Found {
    /// As it should be.
    Good,
    /// It works, and somebody should look.
    Doubtful,
    /// It does not work.
    Bad,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    /// What was looked at.
    pub(crate) name: &'static str,
    /// How it ended.
    pub(crate) found: Found,
    /// What was found, and how to mend it.
    pub(crate) said: String,
}

fn check(name: &'static str, found: Found, said: impl Into<String>) -> Check {
    Check {
        name,
        found,
        said: said.into(),
    }
}

/// `edge doctor`.
///
/// # Errors
/// `Configuration` for faults of the file; `CannotWrite` where the output is gone.
pub(crate) fn run(arguments: &DoctorArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let config = Config::load(arguments.config.config.as_deref());
    let config = config.map_err(failure(Exit::Configuration))?;
    let checks = examine(&config);
    for check in &checks {
        let written = if arguments.output.json {
            let text = serde_json::to_string(check).map_err(failure(Exit::CannotWrite))?;
            writeln!(out, "{text}")
        } else {
            let mark = match check.found {
                Found::Good => "ok  ",
                Found::Doubtful => "look",
                Found::Bad => "BAD ",
            };
            writeln!(out, "{mark}  {:<12} {}", check.name, check.said)
        };
        written.map_err(failure(Exit::CannotWrite))?;
    }
    out.flush().map_err(failure(Exit::CannotWrite))?;
    let is_bad = checks.iter().any(|check| check.found == Found::Bad);
    Ok(if is_bad { Exit::FailedCheck } else { Exit::Ok })
}

fn examine(config: &Config) -> Vec<Check> {
    let status = ask::ask(config);
    let mut checks = vec![
        match &status {
            Ok(status) if status.state == "ready" => check("node", Found::Good, "running, ready"),
            Ok(status) => check(
                "node",
                Found::Bad,
                format!("running, {}: {}", status.state, status.problems.join(" ")),
            ),
            Err(error) => check(
                "node",
                Found::Doubtful,
                format!(
                    "not running, or not reached on http://{}: {}",
                    ask::reachable(config.http_bind),
                    said(error)
                ),
            ),
        },
        clock(
            unix_ms(),
            Path::new("/run/systemd/timesync/synchronized").exists(),
        ),
        temperature(board::temperature_celsius()),
    ];
    checks.extend(state_folder(config));
    checks.push(dicom_port(config, status.is_ok()));
    checks.push(page_port(config, status.is_ok()));
    checks.push(model(config));
    checks.push(pacs(config));
    checks
}

fn clock(now_ms: i64, is_synchronised: bool) -> Check {
    let now = jiff::Timestamp::from_millisecond(now_ms).map_or_else(
        |_| "unknown".into(),
        |now| now.strftime("%Y-%m-%d %H:%M UTC").to_string(),
    );
    match (board::is_clock_plausible(now_ms), is_synchronised) {
        (false, _) => check(
            "clock",
            Found::Bad,
            format!(
                "{now} cannot be: set it, or give the board NTP; until then nothing is deleted by age"
            ),
        ),
        (true, true) => check("clock", Found::Good, format!("{now}, synchronised")),
        (true, false) => check(
            "clock",
            Found::Good,
            format!("{now}; whether it is synchronised is not known here"),
        ),
    }
}

fn temperature(celsius: Option<f32>) -> Check {
    match celsius {
        Some(celsius) if celsius > HOT_CELSIUS => check(
            "temperature",
            Found::Doubtful,
            format!("{celsius:.0} °C: the processor throttles; look at fan and housing"),
        ),
        Some(celsius) => check("temperature", Found::Good, format!("{celsius:.0} °C")),
        None => check("temperature", Found::Good, "this machine does not say"),
    }
}

fn state_folder(config: &Config) -> Vec<Check> {
    let folder = &config.state_dir;
    if let Err(error) = fs::create_dir_all(folder) {
        let said = format!(
            "{}: {error}; state_dir must be a folder that this user may write",
            folder.display()
        );
        return vec![check("state folder", Found::Bad, said)];
    }
    let mut checks = vec![match sync_times(folder) {
        Ok(times) => sync_check(&times),
        Err(error) => check(
            "state folder",
            Found::Bad,
            format!("{}: {error}", folder.display()),
        ),
    }];
    checks.push(match board::disk_bytes(folder) {
        Some((free, total)) => disk(free, total, config.retention.keep_free_bytes),
        None => check(
            "disk",
            Found::Doubtful,
            "the file system does not say how much is free",
        ),
    });
    checks
}

/// Times of a write of a slice's size with its sync, sorted.
fn sync_times(folder: &Path) -> std::io::Result<Vec<Duration>> {
    let path = folder.join(format!("doctor.{}.tmp", std::process::id()));
    let timed = || {
        let mut file = File::create_new(&path)?;
        let slice = vec![0x5A; SYNC_BYTES];
        let mut times = Vec::with_capacity(N_SYNCS);
        for _ in 0..N_SYNCS {
            let start = Instant::now();
            file.write_all(&slice)?;
            file.sync_data()?;
            times.push(start.elapsed());
        }
        times.sort();
        Ok(times)
    };
    let times = timed();
    // Not there where it could not be made.
    drop(fs::remove_file(&path));
    times
}

fn sync_check(times: &[Duration]) -> Check {
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    let longest = times.last().copied().unwrap_or_default();
    let said = format!(
        "a slice is durable in {:.1} ms, {:.1} ms at most",
        milliseconds(median),
        milliseconds(longest)
    );
    if median > SLOW_SYNC {
        check(
            "sync",
            Found::Doubtful,
            format!(
                "{said}: a slow card; intake shares syncs, but a console that waits for each answer is slowed"
            ),
        )
    } else {
        check("sync", Found::Good, said)
    }
}

fn disk(free: u64, total: u64, keep_free: u64) -> Check {
    let said = format!("{} free of {}", bytes(free), bytes(total));
    if free < keep_free {
        check(
            "disk",
            Found::Bad,
            format!("{said}: below retention.keep_free_mib, objects are refused"),
        )
    } else if free < keep_free.saturating_mul(2) {
        check(
            "disk",
            Found::Doubtful,
            format!("{said}: soon below retention.keep_free_mib"),
        )
    } else {
        check("disk", Found::Good, said)
    }
}

fn dicom_port(config: &Config, is_running: bool) -> Check {
    if is_running {
        let own = match PeerAddress::own_node(config) {
            Ok(own) => own,
            Err(error) => return check("DICOM port", Found::Bad, said(&error)),
        };
        let calling = match calling_here(config, &config.ae_title) {
            Ok(calling) => calling,
            Err(error) => {
                return check(
                    "DICOM port",
                    Found::Doubtful,
                    format!("{own}: {}", said(&error)),
                );
            }
        };
        return match block_on(echo(&own, calling, PEER_DEADLINE)) {
            Ok(Ok(time)) => check(
                "DICOM port",
                Found::Good,
                format!("{own} answers in {:.1} ms", time.as_secs_f64() * 1e3),
            ),
            Ok(Err(error)) => check(
                "DICOM port",
                Found::Bad,
                format!("{own} as {calling}: {}", said(&error)),
            ),
            Err(failure) => check("DICOM port", Found::Bad, failure.to_string()),
        };
    }
    free_port(
        "DICOM port",
        SocketAddr::new(config.dicom_bind, config.dicom_port),
    )
}

fn page_port(config: &Config, is_running: bool) -> Check {
    if is_running {
        return check(
            "page",
            Found::Good,
            format!("http://{}", ask::reachable(config.http_bind)),
        );
    }
    free_port("page", config.http_bind)
}

fn free_port(name: &'static str, address: SocketAddr) -> Check {
    match TcpListener::bind(address) {
        Ok(_) => check(name, Found::Good, format!("{address} is free")),
        Err(error) => check(name, Found::Bad, format!("{address}: {error}")),
    }
}

fn model(config: &Config) -> Check {
    let store = ModelStore::new(&config.state_dir);
    let installed = match store.state() {
        Ok(state) => store.path(state.current.as_ref()),
        Err(failure) => return check("model", Found::Bad, failure.to_string()),
    };
    let is_installed = config.model.is_none() && installed.is_some();
    let path = config.model.clone().or(installed);
    let options = crate::cli::ModelArgs {
        model: None,
        threads: config.threads,
        kernel: None,
        float: false,
    }
    .options();
    match ReadyModel::load(path.as_deref(), &options) {
        Ok(ready) => {
            let self_test = if ready.manifest.self_test.is_empty() {
                "its file states no self-test"
            } else {
                "self-test passed"
            };
            let said = format!(
                "{}: {self_test}, loaded in {:.2} s; {}",
                ready.name,
                Duration::from_micros(ready.load_micros).as_secs_f64(),
                ready.notice
            );
            let found = if path.is_some() {
                Found::Good
            } else {
                Found::Doubtful
            };
            check("model", found, said)
        }
        Err(failure) if is_installed => check(
            "model",
            Found::Bad,
            format!("{failure}; `edge model rollback` brings the one before back"),
        ),
        Err(failure) => check("model", Found::Bad, failure.to_string()),
    }
}

fn pacs(config: &Config) -> Check {
    let Some(pacs) = &config.pacs else {
        return check(
            "PACS",
            Found::Doubtful,
            "none configured: results stay on the page",
        );
    };
    let peer = match PeerAddress::pacs(config, pacs) {
        Ok(peer) => peer,
        Err(error) => return check("PACS", Found::Bad, said(&error)),
    };
    match block_on(echo(&peer, &config.ae_title, PEER_DEADLINE)) {
        Ok(Ok(time)) => check(
            "PACS",
            Found::Good,
            format!("{peer} answers in {:.1} ms", time.as_secs_f64() * 1e3),
        ),
        Ok(Err(error)) => check("PACS", Found::Bad, format!("{peer}: {}", said(&error))),
        Err(failure) => check("PACS", Found::Bad, failure.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_has_its_weight() {
        assert_eq!(clock(0, true).found, Found::Bad);
        assert_eq!(clock(1_795_442_400_000, false).found, Found::Good);
        assert_eq!(temperature(Some(91.0)).found, Found::Doubtful);
        assert_eq!(disk(5, 100, 10).found, Found::Bad);
        assert_eq!(disk(15, 100, 10).found, Found::Doubtful);
        assert_eq!(disk(50, 100, 10).found, Found::Good);
        assert_eq!(
            sync_check(&[Duration::from_millis(300)]).found,
            Found::Doubtful
        );
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_bad_and_one_that_can_is_left_clean() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(sync_times(folder.path()).unwrap().len(), N_SYNCS);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let config = Config::parse("", Path::new(""), Some("/proc/none".into())).unwrap();
        assert_eq!(state_folder(&config)[0].found, Found::Bad);
    }

    #[test]
    fn a_port_that_somebody_else_holds_is_bad() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(
            free_port("page", held.local_addr().unwrap()).found,
            Found::Bad
        );
    }
}
