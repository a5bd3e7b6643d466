//! `trainer prepare --merge`: from shards to the bytes of one run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::partial::{Partial, read_journal};
use super::{JOURNAL, SHARD_FILE, Shard, WHOLE, Work, existing};
use crate::cache::{Cache, CacheManifest};
use crate::progress::Progress;

/// Puts shards together: the bytes of one run over the whole source.
pub(super) fn merge(shards: &[PathBuf], out: &Path) -> Result<CacheManifest> {
    let mut pieces = Vec::new();
    for folder in shards {
        let text = std::fs::read_to_string(folder.join(SHARD_FILE))
            .with_context(|| format!("{} is no finished shard", folder.display()))?;
        let work: Work = serde_json::from_str(&text)?;
        let done = read_journal(&folder.join(JOURNAL), &serde_json::to_string(&work)?)?;
        pieces.push((work, done, Cache::open(folder)?));
    }
    pieces.sort_by_key(|(work, ..)| work.shard.index);
    let Some((first, ..)) = pieces.first() else {
        bail!("no shard was given");
    };
    let n = first.shard.n;
    let is_given = |index: &u32| pieces.iter().any(|(work, ..)| work.shard.index == *index);
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
            "shard {}/{} is of another source or other settings than shard 0/{n}",
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
