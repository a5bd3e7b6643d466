//! What lies in the folder at the start: every whole record found again, what is torn cut, sequences that go on.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use super::segment::{Check, Name, Segment};
use super::{Place, SpoolError};

/// What was found.
pub(super) struct Recovered {
    pub(super) index: BTreeMap<u64, Place>,
    pub(super) next_sequence: u64,
    pub(super) next_object: u64,
    /// A segment without a record, whose number is the next sequence.
    pub(super) empty: Option<Segment>,
}

/// Reads the folder.
pub(super) fn recover(folder: &Path) -> Result<Recovered, SpoolError> {
    let mut names: Vec<Name> = std::fs::read_dir(folder)?
        .filter_map(|entry| Name::parse(entry.ok()?.file_name().to_str()?))
        .collect();
    names.sort_unstable();
    let last_segment = names
        .iter()
        .copied()
        .rfind(|name| matches!(name, Name::Segment(_)));
    let mut recovered = Recovered {
        index: BTreeMap::new(),
        next_sequence: 1,
        next_object: 1,
        empty: None,
    };
    for name in names {
        let path = name.path(folder);
        let unreadable = |error: io::Error| {
            let advice = "move it away to start without the objects in it";
            let text = format!("{}: {error}; {advice}", path.display());
            io::Error::new(error.kind(), text)
        };
        let segment = Segment::open(path.as_path().into()).map_err(unreadable)?;
        let is_last = Some(name) == last_segment;
        let check = if is_last {
            Check::Objects
        } else {
            Check::Blocks
        };
        let found = segment.recover(check).map_err(unreadable)?;
        match name {
            Name::Segment(number) => {
                recovered.next_sequence = recovered.next_sequence.max(number);
            }
            Name::Object(number) => recovered.next_object = recovered.next_object.max(number + 1),
        }
        if found.is_empty() {
            match name {
                Name::Segment(_) if is_last => recovered.empty = Some(segment),
                Name::Segment(_) | Name::Object(_) => segment.remove(),
            }
            continue;
        }
        for one in found {
            let sequence = one.record.header.sequence;
            recovered.next_sequence = recovered.next_sequence.max(sequence + 1);
            let place = Place::new(Arc::clone(&segment.path), one.offset, &one.record);
            recovered.index.insert(sequence, place);
        }
    }
    // Its name must be the next sequence; objects with files of their own may have gone beyond it.
    if let Some(segment) = recovered.empty.take() {
        if *segment.path == Name::Segment(recovered.next_sequence).path(folder) {
            recovered.empty = Some(segment);
        } else {
            segment.remove();
        }
    }
    Ok(recovered)
}
