//! The folder under construction, and the journal that lets a killed run be resumed.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use shared::TENSOR_BYTES;

use super::{JOURNAL, SHARD_FILE, SHOWN_REASONS, WHOLE, Work};
use crate::cache::{
    CacheManifest, FORMAT_VERSION, LeftOut, TENSORS, make_folder, write_atomically,
};
use crate::claim::claim;
use crate::exit::{Exit, fault};
use crate::index::{self, Row};
use crate::split::PERCENT_TRAIN_VAL;

/// What became of a unit: one line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Done {
    pub(super) unit: u64,
    pub(super) digest: String,
    pub(super) rows: Vec<Row>,
    pub(super) left_out: Vec<LeftOut>,
}

/// The folder under construction.
pub(super) struct Partial {
    pub(super) folder: PathBuf,
    pub(super) tensors: File,
    pub(super) journal: File,
    pub(super) hasher: blake3::Hasher,
    pub(super) done: Vec<Done>,
    /// Keeps a second process out: a job array may start one of its jobs twice.
    _claim: File,
}

pub(super) fn partial_folder(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

impl Partial {
    pub(super) fn open(work: &Work, out: &Path) -> Result<Self> {
        let folder = partial_folder(out);
        let context = || format!("writing {}", folder.display());
        make_folder(&folder)?;
        let claim = claim(&folder)?;
        let header = serde_json::to_string(work)?;
        let done = read_journal(&folder.join(JOURNAL), &header)?;
        let n_rows: u64 = done.iter().map(|done| done.rows.len() as u64).sum();
        let mut options = OpenOptions::new();
        options.create(true).read(true).write(true).truncate(false);
        let mut tensors = options.open(folder.join(TENSORS)).with_context(context)?;
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
            _claim: claim,
        })
    }

    /// Tensors first, synced, then the line that promises them.
    pub(super) fn append(&mut self, done: Done, tensors: &[u8]) -> Result<()> {
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

    /// Nothing stays, so that the same command reads the files again.
    fn nothing(self) -> anyhow::Error {
        let mut text = "no slice could be used".to_owned();
        let left_out = self.done.iter().flat_map(|done| &done.left_out);
        for left_out in left_out.take(SHOWN_REASONS) {
            text.push_str(&format!("\n  {}: {}", left_out.file, left_out.reason));
        }
        match std::fs::remove_dir_all(&self.folder) {
            Ok(()) => fault(Exit::BadData, text),
            Err(error) => fault(
                Exit::CannotWrite,
                format!("{text}\nremoving {}: {error}", self.folder.display()),
            ),
        }
    }

    pub(super) fn finish(self, work: &Work, out: &Path) -> Result<CacheManifest> {
        let rows: Vec<Row> = self
            .done
            .iter()
            .flat_map(|done| &done.rows)
            .cloned()
            .collect();
        if rows.is_empty() && work.shard == WHOLE {
            return Err(self.nothing());
        }
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
pub(super) fn read_journal(path: &Path, header: &str) -> Result<Vec<Done>> {
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
