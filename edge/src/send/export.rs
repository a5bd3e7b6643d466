//! `edge report`: the documents of a result as files, for whoever wants to see what would be sent.
//!
//! In: a file with a study's result as JSON, as the store keeps it. Out: `comprehensive-3d-sr.dcm`, `comprehensive-sr.dcm` and
//! `secondary-capture.dcm` in a folder; the pixels are not at hand here, so the capture's slices are black.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use image::RgbImage;
use jiff::tz::TimeZone;

use super::data_set::{self, DataSet, Syntax};
use super::equipment::Device;
use super::identity;
use super::secondary_capture::{self, KeySlice};
use super::structured_report::{self, Class};
use crate::exit::{Exit, Failure, failure};
use crate::result::StudyResult;

/// Largest file that is read.
const MAX_RESULT_BYTES: u64 = 64 << 20;

/// What `edge report` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct ReportArguments {
    /// A study's result as JSON.
    pub(crate) result: PathBuf,
    /// Folder that the documents go to.
    #[arg(long)]
    pub(crate) out: PathBuf,
}

/// Writes the documents and prints their paths.
///
/// # Errors
/// `BadData` where the file holds no result or the result makes no document; `CannotWrite` where the folder cannot be written.
pub(crate) fn run(arguments: &ReportArguments, out: &mut dyn Write) -> Result<Exit, Failure> {
    let result = read(arguments).map_err(failure(Exit::BadData))?;
    let device = Device {
        uid: identity::series_uid(&result, "device"),
        serial: "0".to_owned(),
        station: "PEEDGE".to_owned(),
        time_zone: TimeZone::UTC,
    };
    for (class, name) in [
        (Class::Comprehensive3D, "comprehensive-3d-sr.dcm"),
        (Class::Comprehensive, "comprehensive-sr.dcm"),
    ] {
        let set = structured_report::report(&result, class, &device, None)
            .ok_or_else(|| anyhow!("nothing is sent for a study with this outcome"))
            .map_err(failure(Exit::BadData))?;
        let path = arguments.out.join(name);
        write(&result, class.uid(), &set, &path, out)?;
    }
    let slices: Vec<_> = secondary_capture::key_slices(&result)
        .map(|slice| KeySlice {
            slice,
            picture: RgbImage::new(256, 256),
        })
        .collect();
    let set = secondary_capture::capture(&result, &device, &slices);
    let path = arguments.out.join("secondary-capture.dcm");
    write(&result, secondary_capture::SOP_CLASS_UID, &set, &path, out)?;
    Ok(Exit::Ok)
}

fn write(
    result: &StudyResult,
    class: &str,
    set: &DataSet,
    path: &Path,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let uid = identity::document_uid(result, class);
    let file = data_set::file(class, uid.as_str(), &set.encode(Syntax::Explicit));
    fs::write(path, file)
        .with_context(|| path.display().to_string())
        .map_err(failure(Exit::CannotWrite))?;
    writeln!(out, "{}", path.display()).map_err(failure(Exit::CannotWrite))
}

fn read(arguments: &ReportArguments) -> anyhow::Result<StudyResult> {
    let path = &arguments.result;
    let context = || path.display().to_string();
    let bytes = fs::metadata(path).with_context(context)?.len();
    anyhow::ensure!(
        bytes <= MAX_RESULT_BYTES,
        "{}: more than {MAX_RESULT_BYTES} bytes",
        path.display()
    );
    let text = fs::read(path).with_context(context)?;
    serde_json::from_slice(&text).with_context(context)
}
