//! Results for tests: the files that the reference checks use too.

use crate::result::StudyResult;

/// Every one of the files.
pub(crate) const ALL: [&str; 4] = [
    include_str!("../../../tests/reference/results/positive.json"),
    include_str!("../../../tests/reference/results/provisional.json"),
    include_str!("../../../tests/reference/results/not-detected.json"),
    include_str!("../../../tests/reference/results/not-analysed.json"),
];

/// A complete study with an embolus on two of six slices, one of which could not be analysed.
pub(crate) fn positive() -> StudyResult {
    serde_json::from_str(ALL[0]).unwrap()
}

/// The same study a minute before.
pub(crate) fn provisional() -> StudyResult {
    serde_json::from_str(ALL[1]).unwrap()
}
