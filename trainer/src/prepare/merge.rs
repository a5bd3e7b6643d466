//! `trainer prepare --merge`: from shards to the bytes of one run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::partial::{Done, Partial, read_journal};
use super::{JOURNAL, SHARD_FILE, Shard, WHOLE, Work, existing};
use crate::cache::{Cache, CacheManifest};
use crate::progress::Progress;

/// A finished shard: its work, what became of each of its units, its slices.
struct Piece {
    work: Work,
    done: Vec<Done>,
    cache: Cache,
}

impl Piece {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(SHARD_FILE);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{} is no finished shard", folder.display()))?;
        let work: Work =
            serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
        let done = read_journal(&folder.join(JOURNAL), &serde_json::to_string(&work)?)?;
        let cache = Cache::open(folder)?;
        let n_rows: usize = done.iter().map(|done| done.rows.len()).sum();
        ensure!(
            n_rows == cache.n_rows(),
            "{}: its journal has {n_rows} rows, its index {}; prepare the shard anew",
            folder.display(),
            cache.n_rows()
        );
        Ok(Self { work, done, cache })
    }
}

/// Puts shards together: the bytes of one run over the whole source.
pub(super) fn merge(shards: &[PathBuf], out: &Path) -> Result<CacheManifest> {
    let pieces = shards.iter().map(|folder| Piece::open(folder));
    let mut pieces: Vec<Piece> = pieces.collect::<Result<_>>()?;
    pieces.sort_by_key(|piece| piece.work.shard.index);
    let work = whole(&pieces)?;
    if out.exists() {
        return existing(&work, out);
    }
    let mut partial = Partial::open(&work, out)?;
    let progress = Progress::new("merge", work.n_units);
    progress.skip(partial.done.len() as u64);
    let (mut next_row, mut next_unit) = (vec![0; pieces.len()], vec![0; pieces.len()]);
    for unit in 0..work.n_units {
        let number = usize::try_from(unit % pieces.len() as u64)?;
        let piece = &pieces[number];
        let done = piece
            .done
            .get(next_unit[number])
            .filter(|done| done.unit == unit)
            .with_context(|| format!("shard {number}/{} has no unit {unit}", pieces.len()))?;
        let rows = next_row[number]..next_row[number] + done.rows.len();
        next_row[number] = rows.end;
        next_unit[number] += 1;
        if unit >= partial.done.len() as u64 {
            let tensors: Vec<u8> = rows
                .flat_map(|row| piece.cache.tensor(row))
                .copied()
                .collect();
            partial.append(done.clone(), &tensors)?;
            progress.add(1);
        }
    }
    partial.finish(&work, out)
}

/// The work that the pieces, in order of their shards, make together.
fn whole(pieces: &[Piece]) -> Result<Work> {
    let first = &pieces.first().context("no shard was given")?.work;
    let n = first.shard.n;
    let is_given = |index: &u32| pieces.iter().any(|piece| piece.work.shard.index == *index);
    if let Some(index) = (0..n).find(|index| !is_given(index)) {
        bail!(
            "{} of {n} shards are given; {index}/{n} is missing",
            pieces.len()
        );
    }
    ensure!(
        pieces.len() == usize::try_from(n)?,
        "{} shards are given, of which there are {n}",
        pieces.len()
    );
    for (index, piece) in (0..n).zip(pieces) {
        let expected = Work {
            shard: Shard { index, n },
            ..first.clone()
        };
        ensure!(
            piece.work == expected,
            "shard {}/{} is of another source or other settings than shard 0/{n}",
            piece.work.shard.index,
            piece.work.shard.n
        );
    }
    Ok(Work {
        shard: WHOLE,
        ..first.clone()
    })
}
