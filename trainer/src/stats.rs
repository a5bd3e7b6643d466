//! `trainer stats`: what is in a cache.
//!
//! In: a cache. Out: class balance by slice and by study, in total and by part; the exam labels (location, RV/LV, quality) by study; spacing and
//! makers where known; and a leak report: studies in several parts, and tensors of equal content in several parts. Printed, and drawn as `stats.svg`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use rayon::prelude::*;
use serde::Serialize;
use shared::RESEARCH_USE;
use shared::manifest::DataKind;

use crate::cache::{Cache, make_folder, write_atomically};
use crate::index::{EXAM_LABELS, Part, Row};
use crate::plots;

/// Arguments of `trainer stats`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Example:\n  trainer stats --data cache --out stats")]
pub struct StatsArgs {
    /// Cache folder
    #[arg(long, value_name = "CACHE")]
    pub data: PathBuf,
    /// Folder for stats.svg
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// Slices and studies with how many of them are positive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Balance {
    /// Slices.
    pub slices: u64,
    /// Slices that show an embolus.
    pub positive_slices: u64,
    /// Studies.
    pub studies: u64,
    /// Studies with such a slice.
    pub positive_studies: u64,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// [`RESEARCH_USE`].
    pub notice: &'static str,
    /// What the data is.
    pub source: String,
    /// Digest of the cache.
    pub data_digest: String,
    /// All parts together.
    pub total: Balance,
    /// Each part.
    pub parts: BTreeMap<&'static str, Balance>,
    /// Studies that have labels.
    pub labelled_studies: u64,
    /// Studies with each label.
    pub labels: Vec<(&'static str, u64)>,
    /// Slices of each maker.
    pub manufacturers: BTreeMap<String, u64>,
    /// Least, median and greatest spacing of rows, mm.
    pub spacing_mm: Option<[f64; 3]>,
    /// Least, median and greatest distance of neighbouring slices, mm.
    pub slice_distance_mm: Option<[f64; 3]>,
    /// Slices left out when the cache was made.
    pub left_out: u64,
    /// Studies in more than one part.
    pub leaking_studies: u64,
    /// Contents that stand in more than one part.
    pub leaking_tensors: u64,
    /// Rows whose content stands elsewhere in the cache too.
    pub repeated_tensors: u64,
}

/// Runs the command.
///
/// # Errors
/// The cache cannot be read or the plot not be written.
pub fn run(args: &StatsArgs) -> Result<ExitCode> {
    let cache = Cache::open(&args.data)?;
    cache.check_digests()?;
    let stats = stats(&cache);
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&stats)?)?;
    } else {
        write!(stdout, "{}", text(&stats))?;
    }
    if let Some(out) = &args.out {
        make_folder(out)?;
        write_atomically(&out.join("stats.svg"), plot(&stats).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Counts a cache. Reads every tensor once, for the leak report.
#[must_use]
pub fn stats(cache: &Cache) -> Stats {
    let rows = cache.rows();
    /// Whether positive, the parts, the labels.
    type Study = (bool, BTreeSet<Part>, Option<[bool; EXAM_LABELS.len()]>);
    let mut studies: BTreeMap<&str, Study> = BTreeMap::new();
    for row in rows {
        let study = studies.entry(row.study_uid.as_str()).or_default();
        study.0 |= row.pe_present;
        study.1.insert(row.part);
        study.2 = study.2.or(row.exam_labels);
    }
    let balance = |wanted: &dyn Fn(Part) -> bool| {
        let slices = rows.iter().filter(|row| wanted(row.part));
        let of_studies = studies
            .values()
            .filter(|study| study.1.iter().any(|part| wanted(*part)));
        Balance {
            slices: slices.clone().count() as u64,
            positive_slices: slices.filter(|row| row.pe_present).count() as u64,
            studies: of_studies.clone().count() as u64,
            positive_studies: of_studies.filter(|study| study.0).count() as u64,
        }
    };
    let labelled: Vec<[bool; 13]> = studies.values().filter_map(|study| study.2).collect();
    let labels = EXAM_LABELS.iter().enumerate().map(|(index, name)| {
        let n = labelled.iter().filter(|labels| labels[index]).count();
        (*name, n as u64)
    });
    let mut manufacturers = BTreeMap::new();
    for maker in rows.iter().filter_map(|row| row.manufacturer.clone()) {
        *manufacturers.entry(maker).or_default() += 1;
    }
    let (leaking_tensors, repeated_tensors) = repeats(cache);
    Stats {
        notice: RESEARCH_USE,
        source: cache.manifest().source.clone(),
        data_digest: cache.digest(),
        total: balance(&|_| true),
        parts: [Part::Train, Part::Val, Part::Test]
            .into_iter()
            .map(|part| (part.name(), balance(&|found| found == part)))
            .collect(),
        labelled_studies: labelled.len() as u64,
        labels: labels.collect(),
        manufacturers,
        spacing_mm: range(rows.iter().filter_map(|row| row.spacing_mm).collect()),
        // The JPEG copy has ranks in place of positions.
        slice_distance_mm: (cache.manifest().kind != DataKind::Jpeg)
            .then(|| range(distances(rows)))
            .flatten(),
        left_out: cache.manifest().left_out.len() as u64,
        leaking_studies: studies.values().filter(|study| study.1.len() > 1).count() as u64,
        leaking_tensors,
        repeated_tensors,
    }
}

/// Contents in several parts, and rows whose content is repeated.
fn repeats(cache: &Cache) -> (u64, u64) {
    let digests: Vec<blake3::Hash> = (0..cache.n_rows())
        .into_par_iter()
        .map(|row| blake3::hash(cache.tensor(row)))
        .collect();
    let mut contents: HashMap<blake3::Hash, (u64, BTreeSet<Part>)> = HashMap::new();
    for (digest, row) in digests.into_iter().zip(cache.rows()) {
        let content = contents.entry(digest).or_default();
        content.0 += 1;
        content.1.insert(row.part);
    }
    let leaking = contents.values().filter(|content| content.1.len() > 1);
    let repeated = contents.values().filter(|content| content.0 > 1);
    (
        leaking.count() as u64,
        repeated.map(|content| content.0).sum(),
    )
}

fn distances(rows: &[Row]) -> Vec<f64> {
    rows.windows(2)
        .filter(|pair| pair[0].series_uid == pair[1].series_uid)
        .filter_map(|pair| Some((pair[1].z_mm? - pair[0].z_mm?).abs()))
        .collect()
}

fn range(mut values: Vec<f64>) -> Option<[f64; 3]> {
    values.sort_by(f64::total_cmp);
    Some([
        *values.first()?,
        *values.get(values.len() / 2)?,
        *values.last()?,
    ])
}

fn text(stats: &Stats) -> String {
    let mut text = format!(
        "{}\n\n{:<8}{:>22}{:>20}\n",
        stats.source, "part", "positive slices", "positive studies"
    );
    let share = |n: u64, total: u64| {
        format!(
            "{n} of {total} ({:.1} %)",
            100.0 * n as f64 / total.max(1) as f64
        )
    };
    let all = [("all", stats.total)];
    for (name, balance) in all
        .into_iter()
        .chain(stats.parts.iter().map(|(name, balance)| (*name, *balance)))
    {
        // Writing to a String does not fail.
        _ = writeln!(
            text,
            "{name:<8}{:>22}{:>20}",
            share(balance.positive_slices, balance.slices),
            share(balance.positive_studies, balance.studies)
        );
    }
    if stats.labelled_studies > 0 {
        text.push_str("\nlabels by study\n");
        for (name, n) in &stats.labels {
            _ = writeln!(text, "  {name:<28}{}", share(*n, stats.labelled_studies));
        }
    }
    for line in facts(stats) {
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// What is no share, in lines: makers, distances, leaks, and the notice.
fn facts(stats: &Stats) -> Vec<String> {
    let makers = stats.manufacturers.iter();
    let mut lines: Vec<String> = makers
        .map(|(maker, n)| format!("manufacturer {maker}: {n} slices"))
        .collect();
    for (name, range) in [
        ("spacing of rows", stats.spacing_mm),
        ("distance of slices", stats.slice_distance_mm),
    ] {
        if let Some([low, median, high]) = range {
            lines.push(format!(
                "{name}: {low:.3} to {high:.3} mm, median {median:.3}"
            ));
        }
    }
    lines.push(format!(
        "left out when the cache was made: {}",
        stats.left_out
    ));
    lines.push(format!(
        "leaks: {} studies and {} contents in several parts; {} slices repeat another's content",
        stats.leaking_studies, stats.leaking_tensors, stats.repeated_tensors
    ));
    lines.push(RESEARCH_USE.to_owned());
    lines
}

fn plot(stats: &Stats) -> String {
    let mut bars = vec![
        (
            "positive slices".to_owned(),
            stats.total.positive_slices,
            stats.total.slices,
        ),
        (
            "positive studies".to_owned(),
            stats.total.positive_studies,
            stats.total.studies,
        ),
    ];
    for (name, part) in &stats.parts {
        bars.push((
            format!("{name}: positive slices"),
            part.positive_slices,
            part.slices,
        ));
        bars.push((
            format!("{name}: positive studies"),
            part.positive_studies,
            part.studies,
        ));
    }
    for (name, n) in &stats.labels {
        bars.push(((*name).to_owned(), *n, stats.labelled_studies));
    }
    plots::bars(&stats.source, &bars, &facts(stats))
}

#[cfg(test)]
mod tests {
    use shared::spec::PreprocessSpec;

    use super::*;
    use crate::source::Source;

    fn stats_of(kind: DataKind) -> Stats {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("cache");
        let source = Source::phantom(3, 1, 3, 64, false);
        let spec = PreprocessSpec::default();
        let mut manifest = crate::prepare::prepare(&source, &spec, 1, None, &out).unwrap();
        manifest.kind = kind;
        let text = serde_json::to_vec(&manifest).unwrap();
        write_atomically(&out.join("manifest.json"), &text).unwrap();
        stats(&Cache::open(&out).unwrap())
    }

    #[test]
    fn ranks_of_the_jpeg_copy_are_no_millimetres() {
        assert!(stats_of(DataKind::Phantom).slice_distance_mm.is_some());
        assert_eq!(stats_of(DataKind::Jpeg).slice_distance_mm, None);
    }

    #[test]
    fn slices_in_falling_order_are_as_far_apart_as_in_rising_order() {
        let row = |z_mm| Row {
            study_uid: shared::uid::Uid::new("1.2").unwrap(),
            series_uid: shared::uid::Uid::new("1.2.3").unwrap(),
            sop_uid: shared::uid::Uid::new("1.2.3.4").unwrap(),
            part: Part::Train,
            pe_present: false,
            exam_labels: None,
            z_mm: Some(z_mm),
            manufacturer: None,
            spacing_mm: None,
        };
        assert_eq!(distances(&[row(9.0), row(6.0), row(3.0)]), [3.0, 3.0]);
    }

    #[test]
    fn the_plot_says_what_the_text_says() {
        let mut stats = stats_of(DataKind::Phantom);
        stats.source = "a \"b\" <c>".into();
        let plot = plot(&stats);
        for line in facts(&stats) {
            assert!(plot.contains(&format!(">{line}</text>")), "{line}");
        }
        for part in ["train", "val", "test"] {
            assert!(plot.contains(&format!("{part}: positive slices")));
        }
        assert!(
            plot.contains("aria-label=\"a &quot;b&quot; &lt;c>\""),
            "{plot}"
        );
    }
}
