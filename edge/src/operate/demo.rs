//! `edge demo`: a synthetic study by DICOM over loopback, so that everything that a real one meets is seen to work.
//!
//! In: the configuration, for the ports. A node that answers is used; where none does, one is started as a child with the same configuration, and ends
//! with this command. Out: the page's address. The study is `shared`'s phantom; its patient is synthetic.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use serde::Serialize;
use shared::phantom::{Finding, StudyPlan, UidRole, dicom_file};

use super::ask;
use super::command::DemoArgs;
use super::ping::{PeerAddress, block_on, calling_here, echo};
use crate::config::Config;
use crate::exit::{Exit, Failure, failure};

/// Our AE title where no peer is listed.
const CALLING: &str = "EDGEDEMO";
/// How long the node may take for one object.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a node may take to start.
const START_DEADLINE: Duration = Duration::from_secs(30);
/// Between two looks at whether it has.
const START_LOOK: Duration = Duration::from_millis(100);
/// Rows and columns of a slice.
const MATRIX: u16 = 512;
/// CT Image Storage.
const CT_IMAGE: &str = "1.2.840.10008.5.1.4.1.1.2";
/// Explicit VR Little Endian.
const EXPLICIT_LITTLE_ENDIAN: &str = "1.2.840.10008.1.2.1";
/// The preamble and `DICM` (PS3.10 section 7.1).
const PREFIX_BYTES: usize = 132;

/// What `edge demo` prints.
#[derive(Debug, Serialize)]
struct Report {
    page: String,
    study_uid: String,
    slices: u32,
    embolus: bool,
    seconds: f64,
}

/// `edge demo`.
///
/// # Errors
/// `Configuration` for faults of the file; `Unavailable` where the node does not start or refuses the study.
pub(crate) fn run(arguments: &DemoArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let config = Config::load(arguments.config.config.as_deref());
    let config = config.map_err(failure(Exit::Configuration))?;
    let node = PeerAddress::own_node(&config).map_err(failure(Exit::Configuration))?;
    let calling = calling_here(&config, CALLING).map_err(failure(Exit::Configuration))?;
    let own = if block_on(echo(&node, calling, DEADLINE))?.is_ok() {
        None
    } else {
        Some(start(arguments, &node, calling)?)
    };
    let report = send(arguments, &config, &node, calling).map_err(failure(Exit::Unavailable))?;
    let written = if arguments.output.json {
        let text = serde_json::to_string(&report).map_err(failure(Exit::CannotWrite))?;
        writeln!(out, "{text}")
    } else {
        let what = if report.embolus { "with" } else { "without" };
        writeln!(
            out,
            "sent {} slices {what} an embolus in {:.1} s\n{}",
            report.slices, report.seconds, report.page
        )
    };
    written
        .and_then(|()| out.flush())
        .map_err(failure(Exit::CannotWrite))?;
    if let Some(mut own) = own {
        // The child gets the terminal's interrupt as well and drains; this waits for it.
        own.0
            .wait()
            .context("the node")
            .map_err(failure(Exit::Unavailable))?;
    }
    Ok(Exit::Ok)
}

/// A node of our own; it ends when this is dropped.
struct Own(Child);

impl Drop for Own {
    fn drop(&mut self) {
        // Errors mean that it has ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start(arguments: &DemoArgs, node: &PeerAddress, calling: &str) -> Result<Own, Failure> {
    let unavailable = failure::<anyhow::Error>(Exit::Unavailable);
    let launch = crate::launch::launch()
        .context("starting a node")
        .map_err(&unavailable)?;
    let mut command = Command::new(&launch.program);
    command
        .args(&launch.arguments)
        .arg("serve")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if let Some(path) = &arguments.config.config {
        command.arg("--config").arg(path);
    }
    let child = command
        .spawn()
        .context("starting a node")
        .map_err(&unavailable)?;
    let mut own = Own(child);
    let end = Instant::now() + START_DEADLINE;
    loop {
        let has_ended = own.0.try_wait().ok().flatten();
        if let Some(status) = has_ended {
            return Err(unavailable(anyhow!(
                "the node ended at its start, {status}"
            )));
        }
        if block_on(echo(node, calling, DEADLINE))?.is_ok() {
            return Ok(own);
        }
        if Instant::now() >= end {
            let error = anyhow!(
                "the node did not start within {} s",
                START_DEADLINE.as_secs()
            );
            return Err(unavailable(error));
        }
        std::thread::sleep(START_LOOK);
    }
}

fn send(
    arguments: &DemoArgs,
    config: &Config,
    node: &PeerAddress,
    calling: &str,
) -> anyhow::Result<Report> {
    let plan = plan(arguments.seed, arguments.slices, arguments.without_embolus);
    let start = Instant::now();
    let sent = block_on(store(&plan, node, calling));
    sent.map_err(|failure| failure.error)??;
    let study_uid = plan.uid(UidRole::Study);
    let address = ask::reachable(config.http_bind);
    Ok(Report {
        page: format!("http://{address}/studies/{study_uid}"),
        study_uid,
        slices: plan.n_slices(),
        embolus: !arguments.without_embolus,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// The study; those of a seed with and without an embolus are two patients.
fn plan(seed: u64, n_slices: u32, is_without_embolus: bool) -> StudyPlan {
    let (number, finding) = match is_without_embolus {
        false => (0, Finding::Positive),
        true => (1, Finding::Negative),
    };
    StudyPlan::with_finding(seed, number, n_slices, MATRIX, finding)
}

async fn store(plan: &StudyPlan, node: &PeerAddress, calling: &str) -> anyhow::Result<()> {
    let mut association = node.open(calling, CT_IMAGE, DEADLINE).await?;
    for index in 0..plan.n_slices() {
        let file = dicom_file(plan, index, EXPLICIT_LITTLE_ENDIAN).context("the phantom")?;
        let data = data_set(&file).context("the phantom's file meta information")?;
        let uid = plan.uid(UidRole::Slice(index));
        let status = association.store(CT_IMAGE, &uid, data, DEADLINE).await?;
        if status != 0 {
            association.release().await;
            bail!(
                "the node refused slice {} with status {status:04X}",
                index + 1
            );
        }
    }
    association.release().await;
    Ok(())
}

/// What follows the file meta information: its group length (0002,0000) comes first, in Explicit VR Little Endian (PS3.10 section 7.1).
fn data_set(file: &[u8]) -> Option<&[u8]> {
    let meta = file.get(PREFIX_BYTES..)?;
    let length = meta.get(8..12)?.try_into().map(u32::from_le_bytes).ok()?;
    meta.get(12..)?.get(usize::try_from(length).ok()?..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_study_with_and_one_without_an_embolus_are_two() {
        let uid = |is_without_embolus| plan(1, 24, is_without_embolus).uid(UidRole::Study);
        assert_ne!(uid(false), uid(true));
    }

    #[test]
    fn a_data_set_begins_after_the_file_meta_information() {
        let plan = StudyPlan::with_finding(1, 0, 1, 64, Finding::Positive);
        let file = dicom_file(&plan, 0, EXPLICIT_LITTLE_ENDIAN).unwrap();
        let data = data_set(&file).unwrap();
        assert_eq!(
            &data[..4],
            &[0x08, 0x00, 0x05, 0x00],
            "(0008,0005) comes first"
        );
        assert!(data_set(&file[..140]).is_none());
    }
}
