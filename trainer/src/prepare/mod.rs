//! `trainer prepare`: from a source to a cache folder.
//!
//! Units ([`crate::source`]) are decoded in parallel and written in order into `OUT.partial`: their tensors to `tensors.u8`, then a line
//! to `journal.jsonl`, each synced. A killed run is resumed at the first unit without a line. When all is done, index and manifest are
//! written and the folder is renamed to `OUT`: a folder of that name is whole. The same source gives the same bytes, whether in one run, in several,
//! or in shards (`--shard I/N`, unit number modulo N) that `--merge` puts together.
//!
//! A slice that cannot be used is left out with its reason and counted; the whole list is in the manifest.

mod decode;
mod files;
mod merge;
mod partial;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use shared::spec::{Normalisation, PreprocessSpec};

use self::decode::decode_unit;
use self::merge::merge;
use self::partial::{Done, Partial};
use crate::cache::{Cache, CacheManifest};
use crate::exit::{Exit, fault};
use crate::progress::Progress;
use crate::source::Source;

/// Reasons that are printed; all are in the manifest.
const SHOWN_REASONS: usize = 10;

/// Arguments of `trainer prepare`.
#[derive(Clone, Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  trainer prepare --phantom 100 --slices 32 --out cache\n  \
    trainer prepare --rsna /data/rsna --shard 0/4 --out shard-0\n  \
    trainer prepare --merge shard-0 shard-1 shard-2 shard-3 --out cache"
)]
#[command(group = clap::ArgGroup::new("source").required(true))]
pub struct PrepareArgs {
    /// RSNA tree: train.csv and train/<Study>/<Series>/<SOP>.dcm
    #[arg(long, value_name = "DIR", group = "source")]
    pub rsna: Option<PathBuf>,
    /// JPEG copy: train.csv and train-jpegs/<Study>/<Series>/NNNN_<SOP>.jpg, 256x256 RGB
    #[arg(long, value_name = "DIR", group = "source")]
    pub jpeg: Option<PathBuf>,
    /// Folder with no_pe/ and pe_present/ of JPEG, PNG or DICOM files
    #[arg(long, value_name = "DIR", group = "source")]
    pub folders: Option<PathBuf>,
    /// This many synthetic studies
    #[arg(long, value_name = "N", group = "source", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub phantom: Option<u32>,
    /// Put the shards of one source together
    #[arg(long, value_name = "SHARD", num_args = 1.., group = "source")]
    pub merge: Option<Vec<PathBuf>>,
    /// Folder to write
    #[arg(long, value_name = "CACHE")]
    pub out: PathBuf,
    /// Slices of a phantom study
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub slices: u32,
    /// Rows and columns of a phantom slice
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u16).range(64..=1024))]
    pub matrix: u16,
    /// Leave most negative training slices and half of the held-out phantom studies unpainted
    #[arg(long, requires = "phantom")]
    pub thin: bool,
    /// Seed of the phantom and of the split
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Only every N-th unit, counted from I (0 to N-1)
    #[arg(long, value_name = "I/N", value_parser = parse_shard, conflicts_with = "merge")]
    pub shard: Option<Shard>,
    /// Normalise by each series' own range as the publication's JPEG copy (the board refuses such models)
    #[arg(long)]
    pub series_minmax: bool,
    /// Print the summary as JSON
    #[arg(long)]
    pub json: bool,
}

/// One of `n` equal pieces of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// From 0.
    pub index: u32,
    /// How many there are.
    pub n: u32,
}

const WHOLE: Shard = Shard { index: 0, n: 1 };
const JOURNAL: &str = "journal.jsonl";
const SHARD_FILE: &str = "shard.json";

/// What the work is; a partial folder is resumed only for the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Work {
    listing_digest: String,
    description: String,
    kind: shared::manifest::DataKind,
    preprocess: PreprocessSpec,
    seed: u64,
    shard: Shard,
    n_units: u64,
    n_listed: u64,
}

/// Runs the command.
///
/// # Errors
/// A source that cannot be listed, an output folder that holds something else, a disk that refuses.
pub fn run(args: &PrepareArgs) -> Result<ExitCode> {
    let is_reused = args.out.exists();
    let summary = if let Some(shards) = &args.merge {
        merge(shards, &args.out)?
    } else {
        prepare(
            &source(args)?,
            &spec(args),
            args.seed,
            args.shard,
            &args.out,
        )?
    };
    if is_reused {
        writeln!(
            std::io::stderr(),
            "{} was there already: the source's files were not read again; remove it to prepare them anew",
            args.out.display()
        )?;
    }
    tell(&summary, args)?;
    if summary.n_rows == 0 {
        return Err(fault(Exit::BadData, "no slice could be used"));
    }
    Ok(ExitCode::SUCCESS)
}

fn source(args: &PrepareArgs) -> Result<Source> {
    match (&args.rsna, &args.jpeg, &args.folders, args.phantom) {
        (Some(folder), ..) => Source::rsna(folder),
        (_, Some(folder), ..) => Source::jpeg(folder),
        (_, _, Some(folder), _) => Source::folders(folder),
        (.., Some(n_studies)) => Ok(Source::phantom(
            n_studies,
            args.seed,
            args.slices,
            args.matrix,
            args.thin,
        )),
        _ => Err(fault(Exit::Usage, "one source is needed")),
    }
}

/// JPEG copies were normalised by their series' range before they came to us, so a cache of them says so.
fn spec(args: &PrepareArgs) -> PreprocessSpec {
    PreprocessSpec {
        normalisation: if args.series_minmax || args.jpeg.is_some() {
            Normalisation::SeriesMinmax
        } else {
            Normalisation::Window
        },
        ..PreprocessSpec::default()
    }
}

fn tell(manifest: &CacheManifest, args: &PrepareArgs) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(manifest)?)?;
        return Ok(());
    }
    writeln!(out, "{} slices in {}", manifest.n_rows, args.out.display())?;
    writeln!(out, "source: {}", manifest.source)?;
    writeln!(out, "split:  {}", manifest.split)?;
    writeln!(out, "left out: {}", manifest.left_out.len())?;
    for left_out in manifest.left_out.iter().take(SHOWN_REASONS) {
        writeln!(out, "  {}: {}", left_out.file, left_out.reason)?;
    }
    if manifest.left_out.len() > SHOWN_REASONS {
        writeln!(out, "  ... all in {}/manifest.json", args.out.display())?;
    }
    if args.shard.is_none() {
        writeln!(out, "next: trainer stats --data {}", args.out.display())?;
    }
    Ok(())
}

/// Prepares a source into `out`; a cache of the same work that is already there is left as it is.
///
/// # Errors
/// As [`run`].
pub fn prepare(
    source: &Source,
    spec: &PreprocessSpec,
    seed: u64,
    shard: Option<Shard>,
    out: &Path,
) -> Result<CacheManifest> {
    let work = Work {
        listing_digest: source.listing_digest(),
        description: source.description(),
        kind: source.kind(),
        preprocess: spec.clone(),
        seed,
        shard: shard.unwrap_or(WHOLE),
        n_units: source.units.len() as u64,
        n_listed: source.n_slices(),
    };
    if out.exists() {
        return existing(&work, out);
    }
    let mut partial = Partial::open(&work, out)?;
    let progress = Progress::new("prepare", work.n_units.div_ceil(u64::from(work.shard.n)));
    progress.skip(partial.done.len() as u64);
    let (index, n) = (u64::from(work.shard.index), u64::from(work.shard.n));
    let remaining: Vec<u64> = (0..work.n_units)
        .filter(|unit| unit % n == index)
        .skip(partial.done.len())
        .collect();
    // Small units (a phantom's study) are decoded several at a time, large ones in parallel within themselves.
    for batch in remaining.chunks(rayon::current_num_threads().max(1)) {
        let decoded: Vec<(Done, Vec<u8>)> = batch
            .par_iter()
            .map(|&unit| decode_unit(source, spec, seed, unit))
            .collect::<Result<_>>()?;
        for (done, tensors) in decoded {
            partial.append(done, &tensors)?;
            progress.add(1);
        }
    }
    partial.finish(&work, out)
}

/// A finished folder of the same work is the answer; any other is not touched.
fn existing(work: &Work, out: &Path) -> Result<CacheManifest> {
    let text = std::fs::read_to_string(out.join(SHARD_FILE)).unwrap_or_default();
    let is_same = serde_json::from_str::<Work>(&text).is_ok_and(|found| found == *work);
    if !is_same {
        return Err(fault(
            Exit::CannotWrite,
            format!(
                "{} holds something else; give another --out or remove it",
                out.display()
            ),
        ));
    }
    Ok(Cache::open(out)?.manifest().clone())
}

/// `I/N` with I below N.
fn parse_shard(text: &str) -> std::result::Result<Shard, String> {
    let parsed = text
        .split_once('/')
        .and_then(|(index, n)| Some((index.parse().ok()?, n.parse().ok()?)));
    match parsed {
        Some((index, n)) if index < n => Ok(Shard { index, n }),
        _ => Err("expected I/N with I from 0 to N-1, for example 0/4".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::partial::partial_folder;
    use super::*;

    fn bytes(folder: &Path) -> Vec<Vec<u8>> {
        ["tensors.u8", "index.csv", "manifest.json"]
            .map(|name| std::fs::read(folder.join(name)).unwrap())
            .to_vec()
    }

    #[test]
    fn shards_merge_to_the_bytes_of_one_run_though_one_was_killed() {
        let folder = tempfile::tempdir().unwrap();
        let source = Source::phantom(7, 3, 3, 64, false);
        let spec = PreprocessSpec::default();
        let whole = folder.path().join("whole");
        prepare(&source, &spec, 3, None, &whole).unwrap();
        let mut shards = Vec::new();
        for index in 0..4 {
            let out = folder.path().join(format!("shard-{index}"));
            prepare(&source, &spec, 3, Some(Shard { index, n: 4 }), &out).unwrap();
            shards.push(out);
        }
        // A killed run: half a journal line, and tensors that no line promises.
        let shard = Shard { index: 1, n: 4 };
        let killed = partial_folder(&shards[1]);
        std::fs::rename(&shards[1], &killed).unwrap();
        let journal = std::fs::read_to_string(killed.join(JOURNAL)).unwrap();
        let torn = &journal[..journal.trim_end().len() - 5];
        std::fs::write(killed.join(JOURNAL), torn).unwrap();
        prepare(&source, &spec, 3, Some(shard), &shards[1]).unwrap();
        let merged = folder.path().join("merged");
        shards.reverse();
        merge(&shards, &merged).unwrap();
        assert_eq!(bytes(&merged), bytes(&whole));
        Cache::open(&merged).unwrap().check_digests().unwrap();
    }

    #[test]
    fn merging_names_the_shard_that_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let source = Source::phantom(4, 3, 1, 64, false);
        let shards = [0, 1, 3].map(|index| {
            let out = folder.path().join(format!("shard-{index}"));
            let shard = Some(Shard { index, n: 4 });
            prepare(&source, &PreprocessSpec::default(), 3, shard, &out).unwrap();
            out
        });
        let error = merge(&shards, &folder.path().join("merged")).unwrap_err();
        assert_eq!(error.to_string(), "3 of 4 shards are given; 2/4 is missing");
    }

    #[test]
    fn a_folder_of_other_work_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("cache");
        let spec = PreprocessSpec::default();
        let first = prepare(&Source::phantom(1, 1, 2, 64, false), &spec, 1, None, &out).unwrap();
        let again = prepare(&Source::phantom(1, 1, 2, 64, false), &spec, 1, None, &out).unwrap();
        assert_eq!(first, again);
        let error =
            prepare(&Source::phantom(1, 2, 2, 64, false), &spec, 2, None, &out).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::CannotWrite);
    }

    #[test]
    fn a_second_process_is_kept_out_of_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("cache");
        std::fs::create_dir(partial_folder(&out)).unwrap();
        let first = crate::claim::claim(&partial_folder(&out)).unwrap();
        let source = Source::phantom(1, 1, 2, 64, false);
        let spec = PreprocessSpec::default();
        let error = prepare(&source, &spec, 1, None, &out).unwrap_err();
        assert!(error.to_string().contains("another process"), "{error}");
        drop(first);
        prepare(&source, &spec, 1, None, &out).unwrap();
    }

    #[test]
    fn unreadable_files_are_left_out_and_a_cache_of_nothing_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("no_pe/a.dcm", &b"nothing"[..]),
            ("pe_present/b.jpg", b"\xff\xd8\xff"),
        ] {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let source = Source::folders(folder.path()).unwrap();
        let spec = PreprocessSpec::default();
        let out = folder.path().join("cache");
        let error = prepare(&source, &spec, 0, None, &out).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::BadData);
        let text = error.to_string();
        assert!(text.contains("no_pe/a.dcm: not-dicom"), "{text}");
        assert!(!out.exists() && !partial_folder(&out).exists());
        // The same command after the files were put in place.
        let side = u32::try_from(shared::SIDE).unwrap();
        image::RgbImage::new(side, side)
            .save(folder.path().join("pe_present/b.jpg"))
            .unwrap();
        std::fs::remove_file(folder.path().join("no_pe/a.dcm")).unwrap();
        let manifest = prepare(&source, &spec, 0, None, &out).unwrap();
        assert_eq!((manifest.n_rows, manifest.left_out.len()), (1, 1));
        let reason = &manifest.left_out[0].reason;
        assert!(
            reason.starts_with("file: ") && !reason.contains("file: file"),
            "{reason}"
        );
    }
}
