//! `trainer prepare`: from a source to a cache folder.
//!
//! Units ([`crate::source`]) are decoded in parallel and written in order into `OUT.partial`: their tensors to `tensors.u8`, then a line
//! to `journal.jsonl`, each synced. A killed run is resumed at the first unit without a line. When all is done, index and manifest are
//! written and the folder is renamed to `OUT`: a folder of that name is whole. The same source gives the same bytes, whether in one run, in several,
//! or in shards (`--shard I/N`, unit number modulo N) that `--merge` puts together.
//!
//! A slice that cannot be used is left out with its reason and counted; the whole list is in the manifest.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use shared::phantom::{StudyPlan, UidRole};
use shared::preprocess::{Preprocessor, SeriesRange};
use shared::spec::{Normalisation, PreprocessSpec};
use shared::stored::PixelError;
use shared::uid::Uid;
use shared::{CHANNELS, SIDE, TENSOR_BYTES, dicom};

use crate::cache::{Cache, CacheManifest, FORMAT_VERSION, LeftOut, write_atomically};
use crate::exit::{Exit, fault};
use crate::index::{self, Part, Row};
use crate::progress::Progress;
use crate::source::{
    HELD_OUT_KEPT, Labels, Listed, NEGATIVES_KEPT, Origin, Source, Unit, identifier,
};
use crate::split::{self, PERCENT_TRAIN_VAL, SplitBy};

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 512 << 20;
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
    #[arg(long, value_name = "I/N", value_parser = parse_shard)]
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

/// What became of a unit: one line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Done {
    unit: u64,
    digest: String,
    rows: Vec<Row>,
    left_out: Vec<LeftOut>,
}

/// Runs the command.
///
/// # Errors
/// A source that cannot be listed, an output folder that holds something else, a disk that refuses.
pub fn run(args: &PrepareArgs) -> Result<ExitCode> {
    let summary = if let Some(shards) = &args.merge {
        ensure!(args.shard.is_none(), "--merge takes no --shard");
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
    writeln!(out, "next: trainer stats --data {}", args.out.display())?;
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

/// The folder under construction.
struct Partial {
    folder: PathBuf,
    tensors: File,
    journal: File,
    hasher: blake3::Hasher,
    done: Vec<Done>,
}

fn partial_folder(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

impl Partial {
    fn open(work: &Work, out: &Path) -> Result<Self> {
        let folder = partial_folder(out);
        let context = || format!("writing {}", folder.display());
        std::fs::create_dir_all(&folder).with_context(context)?;
        let header = serde_json::to_string(work)?;
        let done = read_journal(&folder.join(JOURNAL), &header)?;
        let n_rows: u64 = done.iter().map(|done| done.rows.len() as u64).sum();
        let mut options = OpenOptions::new();
        options.create(true).read(true).write(true).truncate(false);
        let mut tensors = options
            .open(folder.join("tensors.u8"))
            .with_context(context)?;
        let n_bytes = n_rows * TENSOR_BYTES as u64;
        let is_short = tensors.metadata()?.len() < n_bytes;
        ensure!(
            !is_short,
            "{} lost tensors that its journal promises; remove it",
            folder.display()
        );
        tensors.set_len(n_bytes).with_context(context)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n_read = tensors.read(&mut buffer)?;
            if n_read == 0 {
                break;
            }
            hasher.update(&buffer[..n_read]);
        }
        tensors.seek(SeekFrom::End(0))?;
        // The journal is written anew, so that a torn last line does not stay.
        let mut text = header + "\n";
        for done in &done {
            text.push_str(&serde_json::to_string(done)?);
            text.push('\n');
        }
        write_atomically(&folder.join(JOURNAL), text.as_bytes())?;
        let journal = OpenOptions::new()
            .append(true)
            .open(folder.join(JOURNAL))
            .with_context(context)?;
        Ok(Self {
            folder,
            tensors,
            journal,
            hasher,
            done,
        })
    }

    /// Tensors first, synced, then the line that promises them.
    fn append(&mut self, done: Done, tensors: &[u8]) -> Result<()> {
        let context = || format!("writing {}", self.folder.display());
        self.tensors.write_all(tensors).with_context(context)?;
        self.tensors.sync_data().with_context(context)?;
        self.hasher.update(tensors);
        let line = serde_json::to_string(&done)? + "\n";
        self.journal
            .write_all(line.as_bytes())
            .with_context(context)?;
        self.journal.sync_data().with_context(context)?;
        self.done.push(done);
        Ok(())
    }

    fn finish(self, work: &Work, out: &Path) -> Result<CacheManifest> {
        let rows: Vec<Row> = self
            .done
            .iter()
            .flat_map(|done| &done.rows)
            .cloned()
            .collect();
        let index = index::to_csv(&rows)?;
        let mut sources = blake3::Hasher::new();
        for done in &self.done {
            sources.update(done.digest.as_bytes());
        }
        let (train, val) = PERCENT_TRAIN_VAL;
        let manifest = CacheManifest {
            format_version: FORMAT_VERSION,
            preprocess: work.preprocess.clone(),
            kind: work.kind,
            source: work.description.clone(),
            source_digest: sources.finalize().to_hex().to_string(),
            split: format!(
                "by study, seed {}, {train} / {val} / {} %",
                work.seed,
                100 - train - val
            ),
            n_rows: rows.len() as u64,
            tensors_digest: self.hasher.finalize().to_hex().to_string(),
            index_digest: blake3::hash(&index).to_hex().to_string(),
            left_out: self
                .done
                .iter()
                .flat_map(|done| &done.left_out)
                .cloned()
                .collect(),
        };
        self.tensors.sync_all()?;
        write_atomically(&self.folder.join("index.csv"), &index)?;
        let shard = serde_json::to_string_pretty(work)?;
        write_atomically(&self.folder.join(SHARD_FILE), shard.as_bytes())?;
        let text = serde_json::to_string_pretty(&manifest)?;
        write_atomically(&self.folder.join("manifest.json"), text.as_bytes())?;
        if work.shard == WHOLE {
            std::fs::remove_file(self.folder.join(JOURNAL))?;
        }
        std::fs::rename(&self.folder, out)
            .with_context(|| format!("renaming to {}", out.display()))?;
        Ok(manifest)
    }
}

/// The units that a journal promises, up to the first line that is torn; none where it belongs to other work.
fn read_journal(path: &Path, header: &str) -> Result<Vec<Done>> {
    let Ok(file) = File::open(path) else {
        return Ok(Vec::new());
    };
    let mut lines = BufReader::new(file).lines();
    match lines.next() {
        None => return Ok(Vec::new()),
        Some(line) if line.as_ref().is_ok_and(|line| line == header) => {}
        Some(_) => {
            return Err(fault(
                Exit::CannotWrite,
                format!(
                    "{} belongs to other work; remove its folder",
                    path.display()
                ),
            ));
        }
    }
    Ok(lines
        .map_while(|line| serde_json::from_str(&line.ok()?).ok())
        .collect())
}

/// Puts shards together: the bytes of one run over the whole source.
fn merge(shards: &[PathBuf], out: &Path) -> Result<CacheManifest> {
    let mut pieces = Vec::new();
    for folder in shards {
        let text = std::fs::read_to_string(folder.join(SHARD_FILE))
            .with_context(|| format!("{} is no finished shard", folder.display()))?;
        let work: Work = serde_json::from_str(&text)?;
        let done = read_journal(&folder.join(JOURNAL), &serde_json::to_string(&work)?)?;
        pieces.push((work, done, Cache::open(folder)?));
    }
    pieces.sort_by_key(|(work, ..)| work.shard.index);
    let n = u32::try_from(pieces.len())?;
    let Some((first, ..)) = pieces.first() else {
        bail!("no shard was given");
    };
    let work = Work {
        shard: WHOLE,
        ..first.clone()
    };
    for (index, (piece, ..)) in pieces.iter().enumerate() {
        let expected = Work {
            shard: Shard {
                index: u32::try_from(index)?,
                n,
            },
            ..work.clone()
        };
        ensure!(
            *piece == expected,
            "{} shards are given; shard {}/{} of the same source is not shard {index}/{n}",
            n,
            piece.shard.index,
            piece.shard.n
        );
    }
    if out.exists() {
        return existing(&work, out);
    }
    let mut partial = Partial::open(&work, out)?;
    let progress = Progress::new("merge", work.n_units);
    progress.skip(partial.done.len() as u64);
    let mut next_row = vec![0; pieces.len()];
    let mut next_unit = vec![0; pieces.len()];
    for unit in 0..work.n_units {
        let piece = usize::try_from(unit % u64::from(n))?;
        let (_, done, cache) = &pieces[piece];
        let done = done
            .get(next_unit[piece])
            .filter(|done| done.unit == unit)
            .with_context(|| format!("shard {piece}/{n} has no unit {unit}"))?;
        let rows = next_row[piece]..next_row[piece] + done.rows.len();
        next_row[piece] = rows.end;
        next_unit[piece] += 1;
        ensure!(rows.end <= cache.n_rows(), "shard {piece}/{n} is too short");
        if unit >= partial.done.len() as u64 {
            let tensors: Vec<u8> = rows.flat_map(|row| cache.tensor(row)).copied().collect();
            partial.append(done.clone(), &tensors)?;
            progress.add(1);
        }
    }
    partial.finish(&work, out)
}

/// A decoded slice before it has its place.
struct Decoded {
    study: Option<Uid>,
    series: Option<Uid>,
    sop: Uid,
    pe_present: bool,
    z_mm: Option<f64>,
    spacing_mm: Option<f64>,
    manufacturer: Option<String>,
    tensor: Vec<u8>,
}

/// What is known of a unit's study beside its slices.
struct Exam {
    study: Option<Uid>,
    series: Option<Uid>,
    labels: Option<Labels>,
    is_stack: bool,
    /// The part, where it does not follow from the split.
    part: Option<Part>,
}

fn decode_unit(
    source: &Source,
    spec: &PreprocessSpec,
    seed: u64,
    unit_number: u64,
) -> Result<(Done, Vec<u8>)> {
    let unit = &source.units[usize::try_from(unit_number)?];
    let mut hasher = blake3::Hasher::new();
    let mut left_out = Vec::new();
    let exams = match &source.origin {
        Origin::Phantom {
            seed: phantom_seed,
            n_slices,
            matrix,
            is_thin,
        } => {
            let number = u32::try_from(unit_number)?;
            let plan = StudyPlan::new(*phantom_seed, number, *n_slices, *matrix);
            hasher
                .update(&phantom_seed.to_le_bytes())
                .update(&number.to_le_bytes());
            phantom_studies(&plan, spec, is_thin.then_some(seed))?
        }
        Origin::Rsna(folder) => {
            let folder = folder.join(&*unit.study).join(&*unit.series);
            let path_of = |slice: &Listed| folder.join(format!("{}.dcm", slice.name));
            let read = read_files(unit, path_of, &mut hasher);
            let slices = dicom_series(read, spec, &mut left_out)?;
            vec![(exam_of(unit), slices)]
        }
        Origin::Jpeg(folder) => {
            let folder = folder.join(&*unit.study).join(&*unit.series);
            let slices = jpeg_series(unit, &folder, &mut hasher, &mut left_out);
            vec![(exam_of(unit), slices)]
        }
        Origin::Folders(folder) => {
            let path_of = |slice: &Listed| folder.join(&*slice.name);
            let read = read_files(unit, path_of, &mut hasher);
            let slices = loose_files(read, spec, &mut left_out)?;
            vec![(exam_of(unit), slices)]
        }
    };
    let mut rows = Vec::new();
    let mut tensors = Vec::new();
    for (exam, mut slices) in exams {
        if exam.is_stack {
            let z = |slice: &Decoded| slice.z_mm.unwrap_or(f64::NEG_INFINITY);
            slices.sort_by(|a, b| z(a).total_cmp(&z(b)).then_with(|| a.sop.cmp(&b.sop)));
        }
        for slice in slices {
            tensors.extend_from_slice(&slice.tensor);
            rows.push(row(&exam, slice, seed));
        }
    }
    let done = Done {
        unit: unit_number,
        digest: hasher.finalize().to_hex().to_string(),
        rows,
        left_out,
    };
    Ok((done, tensors))
}

/// The row of a slice.
fn row(exam: &Exam, slice: Decoded, seed: u64) -> Row {
    let study_uid = exam.study.clone().or(slice.study);
    let study_uid = study_uid.unwrap_or_else(|| slice.sop.clone());
    let series_uid = exam.series.clone().or(slice.series);
    let part = exam.part.unwrap_or_else(|| {
        split::part(SplitBy::Study, seed, study_uid.as_str(), slice.sop.as_str())
    });
    Row {
        series_uid: series_uid.unwrap_or_else(|| slice.sop.clone()),
        part,
        study_uid,
        sop_uid: slice.sop,
        pe_present: slice.pe_present,
        exam_labels: exam.labels,
        z_mm: slice.z_mm,
        manufacturer: slice.manufacturer,
        spacing_mm: slice.spacing_mm,
    }
}

fn exam_of(unit: &Unit) -> Exam {
    let named = |text: &str| (!text.is_empty()).then(|| identifier(text));
    Exam {
        study: named(&unit.study),
        series: named(&unit.series),
        labels: unit.labels,
        is_stack: !unit.series.is_empty(),
        part: None,
    }
}

/// A study's slices; of a thin source, whose split has the seed `thin`, those that [`Origin::Phantom`] says, and for a training study with emboli
/// the same slices without them.
fn phantom_studies(
    plan: &StudyPlan,
    spec: &PreprocessSpec,
    thin: Option<u64>,
) -> Result<Vec<(Exam, Vec<Decoded>)>> {
    let study = plan.uid(UidRole::Study);
    let all = 0..plan.n_slices();
    let Some(part) = thin.map(|seed| split::part(SplitBy::Study, seed, &study, "")) else {
        return Ok(vec![painted(plan, all, None, spec)?]);
    };
    if part != Part::Train {
        let end = if is_one_in(HELD_OUT_KEPT, &study) {
            plan.n_slices()
        } else {
            0
        };
        return Ok(vec![painted(plan, 0..end, None, spec)?]);
    }
    let (with, without): (Vec<u32>, Vec<u32>) = all.partition(|&index| plan.pe_present(index));
    let is_kept = |index: &u32| is_one_in(NEGATIVES_KEPT, &plan.uid(UidRole::Slice(*index)));
    let kept = without
        .into_iter()
        .filter(is_kept)
        .chain(with.iter().copied());
    let mut exams = vec![painted(plan, kept, None, spec)?];
    if !with.is_empty() {
        exams.push(painted(&plan.without_emboli(), with, Some(part), spec)?);
    }
    Ok(exams)
}

/// Paints slices of a study.
fn painted(
    plan: &StudyPlan,
    indices: impl IntoIterator<Item = u32>,
    part: Option<Part>,
    spec: &PreprocessSpec,
) -> Result<(Exam, Vec<Decoded>)> {
    let exam = Exam {
        study: Some(identifier(&plan.uid(UidRole::Study))),
        series: Some(identifier(&plan.uid(UidRole::Series))),
        labels: Some(plan.labels().columns().map(|(_, value)| value)),
        is_stack: true,
        part,
    };
    let indices: Vec<u32> = indices.into_iter().collect();
    let painted: Vec<_> = indices
        .into_par_iter()
        .map(|index| {
            let slice = plan.slice(index);
            let bytes = slice.bytes();
            (index, slice, bytes)
        })
        .collect();
    let views: Vec<_> = painted
        .iter()
        .map(|(_, slice, bytes)| slice.pixels(bytes))
        .collect();
    let tensors = tensors_of(&views, spec)?;
    let mut slices = Vec::new();
    for ((index, slice, _), tensor) in painted.iter().zip(tensors) {
        slices.push(Decoded {
            study: None,
            series: None,
            sop: identifier(&plan.uid(UidRole::Slice(*index))),
            pe_present: slice.pe_present,
            z_mm: Some(plan.z_mm(*index)),
            spacing_mm: Some(slice.pixel_spacing_mm[0]),
            manufacturer: Some(shared::phantom::MANUFACTURER.to_owned()),
            tensor: tensor.context("a phantom slice")?,
        });
    }
    Ok((exam, slices))
}

/// One identifier in `n`, by a hash.
fn is_one_in(n: u64, identifier: &str) -> bool {
    let digest = blake3::hash(identifier.as_bytes());
    let word = digest.as_bytes().iter().take(8);
    word.fold(0_u64, |word, &byte| (word << 8) | u64::from(byte)) % n == 0
}

/// Tensors of the slices of one series, in order.
fn tensors_of(
    slices: &[shared::stored::SlicePixels<'_>],
    spec: &PreprocessSpec,
) -> Result<Vec<std::result::Result<Vec<u8>, PixelError>>> {
    let preprocessor = Preprocessor::new(spec)?;
    let mut range: Option<SeriesRange> = None;
    if spec.normalisation == Normalisation::SeriesMinmax {
        for slice in slices {
            // A slice that cannot be ranged cannot be preprocessed either: its reason comes below.
            range = preprocessor.series_range(slice, range).unwrap_or(range);
        }
    }
    Ok(slices
        .par_iter()
        .map_init(
            || preprocessor.clone(),
            |preprocessor, slice| {
                let mut tensor = vec![0; TENSOR_BYTES];
                match (&range, spec.normalisation) {
                    (Some(range), Normalisation::SeriesMinmax) => {
                        preprocessor.tensor_in_series(slice, range, &mut tensor)?;
                    }
                    (None, Normalisation::SeriesMinmax) => {}
                    (_, Normalisation::Window) => preprocessor.tensor(slice, &mut tensor)?,
                }
                Ok(tensor)
            },
        )
        .collect())
}

/// A file's bytes or the reason why there are none, with its listing.
type ReadFile<'a> = (&'a Listed, std::result::Result<Vec<u8>, LeftOut>);

fn read_files<'a>(
    unit: &'a Unit,
    path_of: impl Fn(&Listed) -> PathBuf + Sync,
    hasher: &mut blake3::Hasher,
) -> Vec<ReadFile<'a>> {
    let read: Vec<ReadFile<'_>> = unit
        .slices
        .par_iter()
        .map(|slice| {
            let bytes = read_bounded(&path_of(slice));
            let bytes = bytes.map_err(|error| left_out(unit, slice, "file", &error.to_string()));
            (slice, bytes)
        })
        .collect();
    for (_, bytes) in &read {
        hash_of(bytes.as_deref().unwrap_or_default(), hasher);
    }
    read
}

fn hash_of(bytes: &[u8], hasher: &mut blake3::Hasher) {
    hasher.update(blake3::hash(bytes).as_bytes());
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    if length > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!(
            "the file has {length} bytes, allowed {MAX_FILE_BYTES}"
        )));
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn left_out(unit: &Unit, slice: &Listed, code: &str, reason: &str) -> LeftOut {
    let mut file = String::new();
    for part in [&unit.study, &unit.series] {
        if !part.is_empty() {
            file.push_str(part);
            file.push('/');
        }
    }
    LeftOut {
        file: file + &slice.name,
        reason: format!("{code}: {reason}"),
    }
}

fn dicom_series(
    read: Vec<ReadFile<'_>>,
    spec: &PreprocessSpec,
    left: &mut Vec<LeftOut>,
) -> Result<Vec<Decoded>> {
    type Opened = std::result::Result<(dicom::Slice, dicom::Identity), (String, String)>;
    let opened: Vec<(&Listed, Opened)> = read
        .into_par_iter()
        .map(|(slice, bytes)| {
            let opened = bytes
                .map_err(|left_out| ("file".to_owned(), left_out.reason))
                .and_then(|bytes| {
                    let object = dicom::read(&bytes)
                        .map_err(|error| (error.code().to_owned(), error.to_string()))?;
                    let frame = object
                        .frame(0)
                        .map_err(|error| (error.code().to_owned(), error.to_string()))?;
                    Ok((frame, object.identity().clone()))
                });
            (slice, opened)
        })
        .collect();
    let mut good = Vec::new();
    for (slice, opened) in opened {
        match opened {
            Ok((frame, identity)) => good.push((slice, frame, identity)),
            Err((code, reason)) => left.push(LeftOut {
                file: slice.name.to_string(),
                reason: format!("{code}: {reason}"),
            }),
        }
    }
    let views: Vec<_> = good.iter().map(|(_, frame, _)| frame.pixels()).collect();
    let tensors = tensors_of(&views, spec)?;
    let mut slices = Vec::new();
    for ((slice, frame, identity), tensor) in good.iter().zip(tensors) {
        match tensor {
            Ok(tensor) => slices.push(Decoded {
                study: identity.study_uid.clone(),
                series: identity.series_uid.clone(),
                sop: identity
                    .sop_uid
                    .clone()
                    .unwrap_or_else(|| identifier(&slice.name)),
                pe_present: slice.pe_present,
                z_mm: frame.attributes.z_mm,
                spacing_mm: frame.attributes.pixel_spacing_mm.map(|spacing| spacing[0]),
                manufacturer: None,
                tensor,
            }),
            Err(error) => left.push(LeftOut {
                file: slice.name.to_string(),
                reason: format!("pixels: {error}"),
            }),
        }
    }
    Ok(slices)
}

/// `NNNN_<SOP>.jpg` of a series; NNNN is the rank by rising z, which stands for z.
fn jpeg_series(
    unit: &Unit,
    folder: &Path,
    hasher: &mut blake3::Hasher,
    left: &mut Vec<LeftOut>,
) -> Vec<Decoded> {
    let mut ranks: std::collections::HashMap<String, (f64, PathBuf)> = Default::default();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        if let Some((rank, sop)) = stem.and_then(|stem| stem.split_once('_'))
            && let Ok(rank) = rank.parse::<u32>()
        {
            ranks.insert(sop.to_owned(), (f64::from(rank), path));
        }
    }
    let read = read_files(
        unit,
        |slice| {
            let found = ranks.get(&*slice.name);
            found.map_or_else(|| folder.join(&*slice.name), |(_, path)| path.clone())
        },
        hasher,
    );
    let decoded: Vec<_> = read
        .into_par_iter()
        .map(|(slice, bytes)| {
            let tensor = bytes.and_then(|bytes| {
                picture_tensor(&bytes)
                    .map_err(|reason| left_out(unit, slice, "picture", &format!("{reason:#}")))
            });
            (slice, tensor)
        })
        .collect();
    let mut ranked = Vec::new();
    for (slice, tensor) in decoded {
        match tensor {
            Ok(tensor) => {
                let rank = ranks.get(&*slice.name).map_or(0.0, |(rank, _)| *rank);
                ranked.push((rank, picture(slice, tensor)));
            }
            Err(reason) => left.push(reason),
        }
    }
    ranked.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    ranked
        .into_iter()
        .map(|(rank, slice)| Decoded {
            z_mm: Some(rank),
            ..slice
        })
        .collect()
}

fn picture(slice: &Listed, tensor: Vec<u8>) -> Decoded {
    Decoded {
        study: None,
        series: None,
        sop: identifier(&slice.name),
        pe_present: slice.pe_present,
        z_mm: None,
        spacing_mm: None,
        manufacturer: None,
        tensor,
    }
}

/// Files that know nothing of each other: pictures, or DICOM, which brings its own identity.
fn loose_files(
    read: Vec<ReadFile<'_>>,
    spec: &PreprocessSpec,
    left: &mut Vec<LeftOut>,
) -> Result<Vec<Decoded>> {
    let mut slices = Vec::new();
    for (slice, bytes) in read {
        let is_picture = bytes
            .as_deref()
            .is_ok_and(|bytes| image::guess_format(bytes).is_ok());
        match bytes {
            Ok(bytes) if is_picture => match picture_tensor(&bytes) {
                Ok(tensor) => slices.push(picture(slice, tensor)),
                Err(reason) => left.push(LeftOut {
                    file: slice.name.to_string(),
                    reason: format!("picture: {reason:#}"),
                }),
            },
            bytes => slices.extend(dicom_series(vec![(slice, bytes)], spec, left)?),
        }
    }
    Ok(slices)
}

/// The tensor of a 256x256 RGB picture whose channels are the three windows.
fn picture_tensor(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut reader = image::ImageReader::new(std::io::Cursor::new(bytes)).with_guessed_format()?;
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(4096);
    limits.max_image_height = Some(4096);
    limits.max_alloc = Some(256 << 20);
    reader.limits(limits);
    let picture = reader.decode()?;
    let found = (picture.width(), picture.height());
    let side = u32::try_from(SIDE)?;
    ensure!(
        found == (side, side),
        "the picture is {} x {}, expected {SIDE} x {SIDE}",
        found.0,
        found.1
    );
    let rgb = picture.to_rgb8();
    let mut tensor = vec![0; TENSOR_BYTES];
    for (index, pixel) in rgb.as_raw().chunks_exact(CHANNELS).enumerate() {
        for (channel, value) in pixel.iter().enumerate() {
            tensor[channel * SIDE * SIDE + index] = *value;
        }
    }
    Ok(tensor)
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
    fn unreadable_files_are_left_out_with_their_reason() {
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
        let manifest = prepare(&source, &spec, 0, None, &out).unwrap();
        assert_eq!((manifest.n_rows, manifest.left_out.len()), (0, 2));
        assert!(manifest.left_out[0].reason.starts_with("not-dicom"));
        assert!(manifest.left_out[1].reason.starts_with("picture"));
    }
}
