//! The cache folder: every slice's tensor, ready for training.
//!
//! `tensors.u8` is raw u8 `[N, 3, 256, 256]` and mapped, not read; `index.csv` says what each row is ([`crate::index`]);
//! `manifest.json` says how it was made. A folder is complete when its `manifest.json` is there: it is written last, and
//! each file is written under another name, synced and then renamed.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};
use shared::TENSOR_BYTES;
use shared::manifest::DataKind;
use shared::spec::PreprocessSpec;

use crate::checkpoint;
use crate::exit::{Exit, fault};
use crate::index::{self, Part, Row};

/// The format version that this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;
/// The file of the tensors.
pub const TENSORS: &str = "tensors.u8";

/// `manifest.json` of a cache folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheManifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// How each slice became its tensor.
    pub preprocess: PreprocessSpec,
    /// Kind of data.
    pub kind: DataKind,
    /// The source in words, for example the command that made it.
    pub source: String,
    /// BLAKE3 over all source files in order, hexadecimal.
    pub source_digest: String,
    /// How the parts were made, for example `study, seed 1, 64 / 16 / 20 %`.
    pub split: String,
    /// Rows of the index and tensors.
    pub n_rows: u64,
    /// BLAKE3 of `tensors.u8`, hexadecimal.
    pub tensors_digest: String,
    /// BLAKE3 of `index.csv`, hexadecimal.
    pub index_digest: String,
    /// What was found but is not in the cache, and why.
    pub left_out: Vec<LeftOut>,
}

/// What every version of `manifest.json` has.
#[derive(Deserialize)]
struct Versioned {
    format_version: u32,
}

/// A source file that is not in the cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeftOut {
    /// The file, relative to the source's folder.
    pub file: String,
    /// Why.
    pub reason: String,
}

/// An opened cache.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    manifest: CacheManifest,
    rows: Vec<Row>,
    tensors: Option<Mmap>,
}

impl Cache {
    /// Opens the cache in `folder`. Sizes and the index's digest are checked, the tensors' is not ([`Self::check_digests`]).
    ///
    /// # Errors
    /// A folder that is no complete cache, one of another format version, files whose sizes do not agree, an index that was changed.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("manifest.json");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "{} is no complete cache; make one with `trainer prepare`",
                folder.display()
            )
        })?;
        let context = || format!("reading {}", path.display());
        // The version first: another one may have other fields.
        let Versioned { format_version } = serde_json::from_str(&text).with_context(context)?;
        ensure!(
            format_version == FORMAT_VERSION,
            "{} has format version {format_version}, this build reads version {FORMAT_VERSION}; prepare the cache anew",
            path.display()
        );
        let manifest: CacheManifest = serde_json::from_str(&text).with_context(context)?;
        check_digest(folder, "index.csv", &manifest.index_digest)?;
        let rows = index::read_csv(&folder.join("index.csv"))?;
        let path = folder.join(TENSORS);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let (length, needed) = (
            file.metadata()?.len(),
            rows.len() as u64 * TENSOR_BYTES as u64,
        );
        ensure!(
            manifest.n_rows == rows.len() as u64 && length == needed,
            "{}: the manifest says {} rows, the index has {}, the tensors have {length} bytes of its {needed}; prepare the cache anew",
            folder.display(),
            manifest.n_rows,
            rows.len()
        );
        let tensors = if rows.is_empty() {
            None
        } else {
            Some(map(&file)?)
        };
        Ok(Self {
            folder: folder.to_owned(),
            manifest,
            rows,
            tensors,
        })
    }

    /// The folder it was opened from.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// How it was made.
    #[must_use]
    pub fn manifest(&self) -> &CacheManifest {
        &self.manifest
    }

    /// Number of slices.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// What is known of each slice.
    #[must_use]
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The rows of `part`, as indices, in order.
    #[must_use]
    pub fn part(&self, part: Part) -> Vec<usize> {
        (0..self.rows.len())
            .filter(|row| self.rows[*row].part == part)
            .collect()
    }

    /// The tensor of `row`: u8 `[3, 256, 256]`.
    ///
    /// # Panics
    /// When `row` is not below [`Self::n_rows`].
    #[must_use]
    pub fn tensor(&self, row: usize) -> &[u8] {
        assert!(row < self.rows.len(), "row {row} of {}", self.rows.len());
        self.tensors.as_ref().map_or(&[], |tensors| {
            &tensors[row * TENSOR_BYTES..(row + 1) * TENSOR_BYTES]
        })
    }

    /// BLAKE3 over the digests of tensors and index, hexadecimal: the identity of the data.
    #[must_use]
    pub fn digest(&self) -> String {
        let both = [
            self.manifest.tensors_digest.as_bytes(),
            self.manifest.index_digest.as_bytes(),
        ]
        .concat();
        blake3::hash(&both).to_hex().to_string()
    }

    /// Holds the slices to the preprocessing that a model wants.
    ///
    /// # Errors
    /// They were prepared in another way.
    pub fn check_preprocess(&self, wanted: &PreprocessSpec) -> Result<()> {
        let found = &self.manifest.preprocess;
        ensure!(
            wanted == found,
            "the model wants {wanted:?}, the cache was made with {found:?}"
        );
        Ok(())
    }

    /// Reads everything once and compares it with the manifest.
    ///
    /// # Errors
    /// A file whose digest is another one.
    pub fn check_digests(&self) -> Result<()> {
        for (name, expected) in [
            (TENSORS, &self.manifest.tensors_digest),
            ("index.csv", &self.manifest.index_digest),
        ] {
            check_digest(&self.folder, name, expected)?;
        }
        Ok(())
    }
}

fn check_digest(folder: &Path, name: &str, expected: &str) -> Result<()> {
    let found = file_digest(&folder.join(name))?;
    ensure!(
        found == expected,
        "{}/{name} is damaged: its digest is {found}, the manifest says {expected}; prepare the cache anew",
        folder.display()
    );
    Ok(())
}

/// Refuses a cache as the folder for something else, whose `manifest.json` would take the place of the cache's.
///
/// # Errors
/// `folder` is a cache.
pub fn refuse_as_output(folder: &Path) -> Result<()> {
    if folder.join(TENSORS).exists() {
        return Err(fault(
            Exit::CannotWrite,
            format!(
                "{} is a cache, which nothing else is written into; give another --out",
                folder.display()
            ),
        ));
    }
    Ok(())
}

/// BLAKE3 of a file, hexadecimal.
///
/// # Errors
/// A file that cannot be read.
pub fn file_digest(path: &Path) -> Result<String> {
    let mut reader =
        BufReader::new(File::open(path).with_context(|| format!("opening {}", path.display()))?);
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n_bytes = reader
            .read(&mut buffer)
            .with_context(|| format!("reading {}", path.display()))?;
        if n_bytes == 0 {
            return Ok(hasher.finalize().to_hex().to_string());
        }
        hasher.update(&buffer[..n_bytes]);
    }
}

/// [`checkpoint::write_atomically`], its error naming the file.
///
/// # Errors
/// Whatever the file system answers; the exit code is that of what cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    checkpoint::write_atomically(path, bytes).map_err(|error| {
        let message = format!("writing {}: {error}", path.display());
        fault(Exit::CannotWrite, message)
    })
}

/// Makes a folder for output, and those above it.
///
/// # Errors
/// As [`write_atomically`].
pub fn make_folder(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| {
        let message = format!("making {}: {error}", folder.display());
        fault(Exit::CannotWrite, message)
    })
}

#[allow(
    unsafe_code,
    reason = "a mapping is the one way to train on data larger than memory"
)]
fn map(file: &File) -> Result<Mmap> {
    // SAFETY: the file belongs to a complete cache, which nothing in this project changes again; if somebody else
    // truncates it meanwhile, the process ends with SIGBUS, which is what must happen to a training run on changed data.
    Ok(unsafe { Mmap::map(file) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_manifest_is_no_cache() {
        let folder = tempfile::tempdir().unwrap();
        let message = format!("{:#}", Cache::open(folder.path()).unwrap_err());
        assert!(message.contains("trainer prepare"), "{message}");
    }

    #[test]
    fn atomic_write_replaces_the_file_and_leaves_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_atomically(&path, b"old").unwrap();
        write_atomically(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_cache_of_another_version_is_told_by_its_number() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(
            folder.path().join("manifest.json"),
            r#"{"format_version": 0, "of": "before"}"#,
        )
        .unwrap();
        let message = format!("{:#}", Cache::open(folder.path()).unwrap_err());
        assert!(
            message.contains("format version 0, this build reads version 1; prepare"),
            "{message}"
        );
    }

    #[test]
    fn a_cache_is_no_folder_for_anything_else() {
        let folder = tempfile::tempdir().unwrap();
        refuse_as_output(folder.path()).unwrap();
        refuse_as_output(&folder.path().join("none")).unwrap();
        std::fs::write(folder.path().join(TENSORS), []).unwrap();
        let error = refuse_as_output(folder.path()).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::CannotWrite);
    }

    #[test]
    fn what_cannot_be_written_has_its_own_exit_code() {
        for error in [
            write_atomically(Path::new("/proc/none/a"), b"a").unwrap_err(),
            make_folder(Path::new("/proc/none/a")).unwrap_err(),
        ] {
            assert_eq!(crate::exit::code_of(&error), Exit::CannotWrite, "{error}");
            assert!(error.to_string().contains("/proc/none/a"), "{error}");
        }
    }

    #[test]
    fn slices_prepared_in_another_way_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let source = crate::source::Source::phantom(1, 1, 2, 64, false);
        let masked = PreprocessSpec {
            body_mask: true,
            ..PreprocessSpec::default()
        };
        let out = folder.path().join("cache");
        crate::prepare::prepare(&source, &masked, 1, None, &out).unwrap();
        let cache = Cache::open(&out).unwrap();
        cache.check_preprocess(&masked).unwrap();
        let error = cache.check_preprocess(&PreprocessSpec::default());
        assert!(error.unwrap_err().to_string().contains("body_mask: true"));
    }

    #[test]
    fn a_changed_index_is_refused_and_changed_tensors_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("cache");
        let source = crate::source::Source::phantom(1, 1, 2, 64, false);
        crate::prepare::prepare(&source, &PreprocessSpec::default(), 1, None, &out).unwrap();
        Cache::open(&out).unwrap().check_digests().unwrap();
        let flip = |name: &str| {
            let path = out.join(name);
            let mut bytes = std::fs::read(&path).unwrap();
            let last = bytes.len() - 2;
            bytes[last] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        };
        flip("tensors.u8");
        let error = Cache::open(&out).unwrap().check_digests().unwrap_err();
        assert!(
            error.to_string().contains("tensors.u8 is damaged"),
            "{error}"
        );
        flip("index.csv");
        let error = Cache::open(&out).unwrap_err();
        assert!(
            error.to_string().contains("index.csv is damaged"),
            "{error}"
        );
    }
}
