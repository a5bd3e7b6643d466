//! `trainer phantom`: synthetic studies on disk, in the layouts of the data that the trainer reads.
//!
//! In: a seed and numbers. Out: a folder with `train.csv` (all columns of the RSNA file), `emboli.csv` (centres of the visible emboli in patient
//! coordinates, mm) and either
//!
//! - `rsna`: `train/<StudyInstanceUID>/<SeriesInstanceUID>/<SOPInstanceUID>.dcm`,
//! - `jpeg`: `train-jpegs/<Study>/<Series>/NNNN_<SOP>.jpg`, 256x256 RGB of quality 95 with `series-minmax`, NNNN by ascending z, or
//! - `folders`: `no_pe/` and `pe_present/` with the same JPEG images.
//!
//! The same arguments write the same bytes. `train.csv` comes last: where it stands, the tree is whole.

mod picture;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use shared::phantom::{self, DicomFileError, Finding, StudyPlan, UidRole};

use self::picture::Painter;
use crate::exit::{Exit, fault};

/// How the files lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Layout {
    /// DICOM files as in the RSNA data set.
    Rsna,
    /// The JPEG copy that the publication was trained on.
    Jpeg,
    /// Two folders of JPEG images, `no_pe` and `pe_present`.
    Folders,
}

/// What the studies show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Findings {
    /// About a third positive, one in twenty-five indeterminate.
    Natural,
    /// Every study shows an embolus.
    Positive,
    /// No study shows an embolus.
    Negative,
}

/// Arguments of `trainer phantom`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer phantom --out rsna --studies 20 --seed 1\n  \
    trainer phantom --out jpeg --studies 20 --layout jpeg\n  \
    trainer phantom --out rle --studies 2 --slices 16 --transfer-syntax 1.2.840.10008.1.2.5"
)]
pub struct PhantomArgs {
    /// Folder to write; made where absent
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Number of studies
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub studies: u32,
    /// Seed; the same seed gives the same files
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Slices of a study
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub slices: u32,
    /// Rows and columns of a slice
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u16).range(64..=1024))]
    pub matrix: u16,
    /// Transfer syntax of the DICOM files
    #[arg(long, value_name = "UID", default_value = "1.2.840.10008.1.2.1")]
    pub transfer_syntax: String,
    /// How the files lie
    #[arg(long, value_enum, default_value_t = Layout::Rsna)]
    pub layout: Layout,
    /// What the studies show
    #[arg(long, value_enum, default_value_t = Findings::Natural)]
    pub findings: Findings,
    /// With the rsna layout: one Enhanced CT file a study beside the tree, in `enhanced/`
    #[arg(long)]
    pub enhanced: bool,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Written {
    /// Studies.
    pub studies: u64,
    /// Studies with at least one positive slice.
    pub positive_studies: u64,
    /// Slices.
    pub slices: u64,
    /// Slices that show an embolus.
    pub positive_slices: u64,
}

/// Runs the command: writes the tree and prints a summary.
///
/// # Errors
/// A transfer syntax that cannot be written, or a folder that cannot.
pub fn run(args: &PhantomArgs) -> anyhow::Result<ExitCode> {
    let bar = ProgressBar::new(u64::from(args.studies)).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} studies, {elapsed} gone, {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let written = write(args, &bar)?;
    bar.finish_and_clear();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&written)?)?;
    } else {
        let Written {
            studies,
            positive_studies,
            slices,
            positive_slices,
        } = written;
        writeln!(
            out,
            "{studies} synthetic studies ({positive_studies} positive), {slices} slices ({positive_slices} positive) in {}",
            args.out.display()
        )?;
        writeln!(out, "{}", shared::RESEARCH_USE)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the tree; `bar` advances by one for each study.
///
/// # Errors
/// As [`run`].
pub fn write(args: &PhantomArgs, bar: &ProgressBar) -> anyhow::Result<Written> {
    fs::create_dir_all(&args.out).with_context(|| format!("making {}", args.out.display()))?;
    if fs::read_dir(&args.out)?.next().is_some() {
        return Err(fault(
            Exit::CannotWrite,
            format!(
                "{} holds something already; give another --out or remove it",
                args.out.display()
            ),
        ));
    }
    let studies: Vec<Study> = (0..args.studies)
        .into_par_iter()
        .map(|study_index| {
            let study = write_study(args, study_index);
            bar.inc(1);
            study
        })
        .collect::<anyhow::Result<_>>()?;
    let mut rows = header();
    let mut emboli = String::from("SOPInstanceUID,x_mm,y_mm,z_mm\n");
    let mut written = Written::default();
    for study in &studies {
        rows.push_str(&study.rows);
        emboli.push_str(&study.emboli);
        written.studies += 1;
        written.slices += u64::from(args.slices);
        written.positive_slices += study.n_positive;
        written.positive_studies += u64::from(study.n_positive > 0);
    }
    place(&args.out.join("emboli.csv"), emboli.as_bytes())?;
    place(&args.out.join("train.csv"), rows.as_bytes())?;
    Ok(written)
}

/// What one study adds to the tables.
struct Study {
    rows: String,
    emboli: String,
    n_positive: u64,
}

fn write_study(args: &PhantomArgs, study_index: u32) -> anyhow::Result<Study> {
    let plan = match args.findings {
        Findings::Natural => StudyPlan::new(args.seed, study_index, args.slices, args.matrix),
        Findings::Positive => StudyPlan::with_finding(
            args.seed,
            study_index,
            args.slices,
            args.matrix,
            Finding::Positive,
        ),
        Findings::Negative => StudyPlan::with_finding(
            args.seed,
            study_index,
            args.slices,
            args.matrix,
            Finding::Negative,
        ),
    };
    let mut study = Study {
        rows: String::new(),
        emboli: String::new(),
        n_positive: 0,
    };
    let mut painter = match args.layout {
        Layout::Rsna => None,
        Layout::Jpeg | Layout::Folders => Some(Painter::new(&plan)?),
    };
    for slice_index in 0..plan.n_slices() {
        match &mut painter {
            None => write_dicom(args, &plan, slice_index)?,
            Some(painter) => painter.write(args, &plan, slice_index)?,
        }
        study.add(&plan, slice_index);
    }
    if args.enhanced && painter.is_none() {
        let folder = args.out.join("enhanced");
        fs::create_dir_all(&folder)?;
        let file = phantom::multi_frame_file(&plan, plan.n_slices(), &args.transfer_syntax)?;
        place(
            &folder.join(format!("{}.dcm", plan.uid(UidRole::MultiFrame))),
            &file,
        )?;
    }
    Ok(study)
}

impl Study {
    fn add(&mut self, plan: &StudyPlan, slice_index: u32) {
        let sop_uid = plan.uid(UidRole::Slice(slice_index));
        let emboli_mm = plan.emboli_mm(slice_index);
        let is_positive = !emboli_mm.is_empty();
        self.n_positive += u64::from(is_positive);
        let (study_uid, series_uid) = (plan.uid(UidRole::Study), plan.uid(UidRole::Series));
        self.rows.push_str(&format!(
            "{study_uid},{series_uid},{sop_uid},{}",
            u8::from(is_positive)
        ));
        for (_, value) in plan.labels().columns() {
            self.rows.push_str(if value { ",1" } else { ",0" });
        }
        self.rows.push('\n');
        for [x, y, z] in emboli_mm {
            self.emboli
                .push_str(&format!("{sop_uid},{x:.3},{y:.3},{z:.3}\n"));
        }
    }
}

fn header() -> String {
    let mut header =
        String::from("StudyInstanceUID,SeriesInstanceUID,SOPInstanceUID,pe_present_on_image");
    for (name, _) in phantom::ExamLabels::default().columns() {
        header.push(',');
        header.push_str(name);
    }
    header.push('\n');
    header
}

fn series_folder(plan: &StudyPlan, root: &Path) -> anyhow::Result<PathBuf> {
    let folder = root
        .join(plan.uid(UidRole::Study))
        .join(plan.uid(UidRole::Series));
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    Ok(folder)
}

fn write_dicom(args: &PhantomArgs, plan: &StudyPlan, slice_index: u32) -> anyhow::Result<()> {
    let file = phantom::dicom_file(plan, slice_index, &args.transfer_syntax).map_err(|error| {
        if matches!(error, DicomFileError::TransferSyntax { .. }) {
            fault(Exit::Usage, error.to_string())
        } else {
            error.into()
        }
    })?;
    let folder = series_folder(plan, &args.out.join("train"))?;
    place(
        &folder.join(format!("{}.dcm", plan.uid(UidRole::Slice(slice_index)))),
        &file,
    )
}

/// Writes a file under another name first, so that a half-written one never bears the right name.
fn place(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let unfinished = path.with_extension("unfinished");
    fs::write(&unfinished, bytes)
        .and_then(|()| fs::rename(&unfinished, path))
        .with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(out: &Path, layout: Layout) -> PhantomArgs {
        PhantomArgs {
            out: out.to_path_buf(),
            studies: 3,
            seed: 4,
            slices: 12,
            matrix: 96,
            transfer_syntax: "1.2.840.10008.1.2.1".to_owned(),
            layout,
            findings: Findings::Positive,
            enhanced: false,
            json: false,
        }
    }

    fn count(folder: &Path) -> usize {
        fs::read_dir(folder).map_or(0, |entries| {
            entries
                .filter_map(Result::ok)
                .map(|entry| {
                    if entry.path().is_dir() {
                        count(&entry.path())
                    } else {
                        1
                    }
                })
                .sum()
        })
    }

    #[test]
    fn the_rsna_tree_agrees_with_its_table() {
        let folder = tempfile::tempdir().unwrap();
        let mut args = arguments(folder.path(), Layout::Rsna);
        args.enhanced = true;
        let written = write(&args, &ProgressBar::hidden()).unwrap();
        assert_eq!(
            (written.studies, written.slices, written.positive_studies),
            (3, 36, 3)
        );
        assert_eq!(
            (
                count(&folder.path().join("train")),
                count(&folder.path().join("enhanced"))
            ),
            (36, 3)
        );
        let mut table = csv::Reader::from_path(folder.path().join("train.csv")).unwrap();
        let mut n_positive = 0;
        for row in table.deserialize() {
            let row: std::collections::HashMap<String, String> = row.unwrap();
            assert_eq!(row.len(), 17);
            let path = folder
                .path()
                .join("train")
                .join(&row["StudyInstanceUID"])
                .join(&row["SeriesInstanceUID"]);
            let file = fs::read(path.join(format!("{}.dcm", row["SOPInstanceUID"]))).unwrap();
            let object = shared::dicom::read(&file).unwrap();
            assert_eq!(
                object.identity().study_uid.as_ref().unwrap().as_str(),
                row["StudyInstanceUID"]
            );
            assert!(object.frame(0).is_ok());
            n_positive += u64::from(row["pe_present_on_image"] == "1");
        }
        assert_eq!(n_positive, written.positive_slices);
    }

    #[test]
    fn a_tree_that_is_there_already_keeps_its_table() {
        let folder = tempfile::tempdir().unwrap();
        let mut args = arguments(folder.path(), Layout::Rsna);
        write(&args, &ProgressBar::hidden()).unwrap();
        let table = fs::read(folder.path().join("train.csv")).unwrap();
        args.studies = 1;
        let error = write(&args, &ProgressBar::hidden()).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::CannotWrite);
        assert_eq!(fs::read(folder.path().join("train.csv")).unwrap(), table);
    }

    #[test]
    fn the_two_folders_hold_the_slices_by_label() {
        let folder = tempfile::tempdir().unwrap();
        let written = write(
            &arguments(folder.path(), Layout::Folders),
            &ProgressBar::hidden(),
        )
        .unwrap();
        assert_eq!(
            count(&folder.path().join("pe_present")) as u64,
            written.positive_slices
        );
        assert_eq!(
            count(&folder.path().join("no_pe")) as u64,
            written.slices - written.positive_slices
        );
    }

    #[test]
    fn the_jpeg_tree_is_256_square_rgb() {
        let folder = tempfile::tempdir().unwrap();
        write(
            &arguments(folder.path(), Layout::Jpeg),
            &ProgressBar::hidden(),
        )
        .unwrap();
        assert_eq!(count(&folder.path().join("train-jpegs")), 36);
        let plan = StudyPlan::with_finding(4, 0, 12, 96, Finding::Positive);
        let series = series_folder(&plan, &folder.path().join("train-jpegs")).unwrap();
        let picture =
            image::open(series.join(format!("0003_{}.jpg", plan.uid(UidRole::Slice(3))))).unwrap();
        assert_eq!(
            (picture.width(), picture.height(), picture.color()),
            (256, 256, image::ColorType::Rgb8)
        );
    }
}
