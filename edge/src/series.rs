//! Series assembly: from single slices to the studies they belong to and the one series of each that is judged.
//!
//! In: what is known of each slice, in the order of arrival. Out: studies in the order in which they first appeared. Pure. The
//! score is left to [`crate::study`].
//!
//! The rules, in this order:
//! 1. A slice that came more than once (same SOP Instance UID and frame) counts once: the first that was analysed, otherwise
//!    the first. The others are counted as duplicates.
//! 2. Slices are grouped by Series Instance UID. A group is split by the first three values of Image Type and by orientation (slices whose normals differ by
//!    more than [`SAME_ORIENTATION_DEGREES`]). A part in which positions repeat (at least [`MIN_REPEATED`] slices and more than
//!    one in ten lie within [`SAME_POSITION_MM`] of the one before) is split by Acquisition Number. Refused slices, of which none of this is known, go to the
//!    largest part. A part in which positions still repeat is not judged (bolus tracking, several phases).
//! 3. A part that covers less along z than [`Limits::min_coverage_mm`], or whose slices lie further apart than [`Limits::max_spacing_mm`]
//!    in the median, is not judged.
//! 4. Of the parts that are left, the judged one is the first by: more than half of the slices ORIGINAL\PRIMARY and AXIAL; no sharp (lung
//!    or bone) kernel; greater coverage along z in steps of [`COVERAGE_STEP_MM`]; thinner slices; more analysed slices; smaller UID.
//! 5. Within a part slices are ordered by position from feet to head; slices without one follow in order of arrival.
//!
//! None of them asks in which order slices or series came.

use std::cmp::Reverse;
use std::collections::HashMap;

use shared::uid::Uid;

use crate::wire::SliceFacts;

/// Two positions closer than this are one, in mm.
pub(crate) const SAME_POSITION_MM: f64 = 0.05;
/// Fewer repeated positions than this are an accident, not bolus tracking.
pub(crate) const MIN_REPEATED: usize = 3;
/// Normals closer than this are one orientation.
pub(crate) const SAME_ORIENTATION_DEGREES: f64 = 1.0;
/// Coverages are compared in steps of this, in mm.
pub(crate) const COVERAGE_STEP_MM: f64 = 20.0;

/// What a series must have along z to be judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Limits {
    /// Least distance between the first and the last slice, in mm.
    pub(crate) min_coverage_mm: f64,
    /// Largest median distance between neighbours, in mm.
    pub(crate) max_spacing_mm: f64,
    /// A distance between neighbours above this and above [`GAP_SPACINGS`] median distances is a gap, in mm.
    pub(crate) max_gap_mm: f64,
}

/// See [`Limits::max_gap_mm`]: a slice or two that were refused are counted on the result and are no gap.
pub(crate) const GAP_SPACINGS: f64 = 3.5;

impl Limits {
    /// Anything goes: for files that somebody chose by hand.
    pub(crate) const NONE: Self = Self {
        min_coverage_mm: 0.0,
        max_spacing_mm: f64::INFINITY,
        max_gap_mm: f64::INFINITY,
    };
}

impl Default for Limits {
    /// A chest is 250 to 300 mm high; CT pulmonary angiograms have slices of at most 5 mm.
    fn default() -> Self {
        Self {
            min_coverage_mm: 80.0,
            max_spacing_mm: 10.0,
            max_gap_mm: 15.0,
        }
    }
}

/// What is known of a slice after the network has seen it, or was spared it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SliceRecord {
    /// Study Instance UID.
    pub(crate) study_uid: Option<Uid>,
    /// Series Instance UID.
    pub(crate) series_uid: Option<Uid>,
    /// SOP Instance UID.
    pub(crate) sop_uid: Option<Uid>,
    /// Frame, from 1; `None` for an object that is one slice.
    pub(crate) frame: Option<u32>,
    /// `None` for a slice that was refused.
    pub(crate) facts: Option<SliceFacts>,
    /// `None` for a slice that was not analysed.
    pub(crate) logit: Option<f32>,
}

/// A study, assembled.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Study {
    /// Study Instance UID.
    pub(crate) study_uid: Uid,
    /// The judged series; `None` where no series could be.
    pub(crate) judged: Option<Series>,
    /// The other series, in order of rank.
    pub(crate) not_judged: Vec<NotJudged>,
    /// Slices that came more than once, beyond the first time.
    pub(crate) n_duplicates: usize,
}

/// A series, or a part of one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    /// Series Instance UID.
    pub(crate) series_uid: Option<Uid>,
    /// Its slices, feet to head.
    pub(crate) slices: Vec<SliceRecord>,
}

/// A series that is not judged.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NotJudged {
    /// The series.
    pub(crate) series: Series,
    /// Why.
    pub(crate) why: Why,
}

/// Why a series is not judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Why {
    /// None of its slices was analysed.
    #[error("nothing-analysed: none of its slices could be analysed")]
    NothingAnalysed,
    /// Positions repeat.
    #[error("repeated-positions: several slices lie at one position")]
    RepeatedPositions,
    /// It covers too little along z.
    #[error("coverage: it covers less of the patient than a chest series must")]
    Coverage,
    /// Its slices lie too far apart.
    #[error("spacing: its slices lie too far apart")]
    Spacing,
    /// Another series comes first.
    #[error("rank: another series of the study comes first by the rule")]
    Rank,
}

impl Why {
    /// Stable and machine-readable.
    pub(crate) fn code(self) -> &'static str {
        match self {
            Self::NothingAnalysed => "nothing-analysed",
            Self::RepeatedPositions => "repeated-positions",
            Self::Coverage => "coverage",
            Self::Spacing => "spacing",
            Self::Rank => "rank",
        }
    }
}

impl Series {
    /// Distance between the first and the last analysed slice, in mm; 0 where fewer than two are known.
    pub(crate) fn coverage_mm(&self) -> f64 {
        let low = self.analysed_positions().fold(f64::INFINITY, f64::min);
        let high = self.analysed_positions().fold(f64::NEG_INFINITY, f64::max);
        (high - low).max(0.0)
    }

    /// Median distance of analysed neighbours, in mm; `None` below two positions. Slices must be sorted.
    pub(crate) fn spacing_mm(&self) -> Option<f64> {
        let mut distances = self.distances();
        distances.sort_by(f64::total_cmp);
        distances.get(distances.len() / 2).copied()
    }

    /// The largest distance of analysed neighbours, in mm, where it is a gap by `limits`. Slices must be sorted.
    pub(crate) fn gap_mm(&self, limits: &Limits) -> Option<f64> {
        let usual_mm = self.spacing_mm()?;
        let largest_mm = self.distances().into_iter().fold(0.0, f64::max);
        let is_gap = largest_mm > limits.max_gap_mm && largest_mm > GAP_SPACINGS * usual_mm;
        is_gap.then_some(largest_mm)
    }

    /// Median slice thickness in mm, so that it does not depend on the order of arrival.
    pub(crate) fn thickness_mm(&self) -> Option<f64> {
        let facts = self.slices.iter().filter_map(|slice| slice.facts.as_ref());
        let mut thicknesses: Vec<f64> = facts.filter_map(|facts| facts.thickness_mm).collect();
        thicknesses.sort_by(f64::total_cmp);
        thicknesses.get(thicknesses.len() / 2).copied()
    }

    /// The kernel of most slices.
    pub(crate) fn kernel(&self) -> Option<&str> {
        let facts = self.slices.iter().filter_map(|slice| slice.facts.as_ref());
        let mut kernels: Vec<&str> = facts.filter_map(|facts| facts.kernel.as_deref()).collect();
        kernels.sort_unstable();
        kernels.get(kernels.len() / 2).copied()
    }

    /// Whether more than half of the slices are original, primary and axial.
    pub(crate) fn is_original(&self) -> bool {
        let facts = || self.slices.iter().filter_map(|slice| slice.facts.as_ref());
        let is_axial = |facts: &&SliceFacts| {
            let third = facts.image_type.split('\\').nth(2);
            facts.is_original_primary
                && third.is_none_or(|value| value == "AXIAL" || value == "VOLUME")
        };
        2 * facts().filter(is_axial).count() > facts().count()
    }

    fn distances(&self) -> Vec<f64> {
        let positions: Vec<f64> = self.analysed_positions().collect();
        let distance = |pair: &[f64]| pair[1] - pair[0];
        positions.windows(2).map(distance).collect()
    }

    /// Slices that were analysed.
    pub(crate) fn n_analysed(&self) -> usize {
        let analysed = self.slices.iter().filter(|slice| slice.logit.is_some());
        analysed.count()
    }

    fn analysed_positions(&self) -> impl Iterator<Item = f64> {
        let analysed = self.slices.iter().filter(|slice| slice.logit.is_some());
        let z_mm = analysed.filter_map(|slice| slice.facts.as_ref()?.z_mm);
        z_mm.filter(|z_mm| z_mm.is_finite())
    }

    fn positions(&self) -> impl Iterator<Item = f64> {
        let facts = self.slices.iter().filter_map(|slice| slice.facts.as_ref());
        facts.filter_map(|facts| facts.z_mm.filter(|z_mm| z_mm.is_finite()))
    }

    fn sort(&mut self) {
        // The sort is stable: slices without a position keep the order of arrival.
        self.slices.sort_by(|a, b| {
            let z = |slice: &SliceRecord| slice.facts.as_ref().and_then(|facts| facts.z_mm);
            z(a).unwrap_or(f64::INFINITY)
                .total_cmp(&z(b).unwrap_or(f64::INFINITY))
        });
    }

    /// Whether positions repeat by rule 2; slices must be sorted.
    fn has_repeated_positions(&self) -> bool {
        let positions: Vec<f64> = self.positions().collect();
        let pairs = positions.windows(2);
        let repeated = pairs.filter(|pair| pair[1] - pair[0] < SAME_POSITION_MM);
        let n_repeated = repeated.count();
        n_repeated >= MIN_REPEATED && n_repeated * 10 > positions.len()
    }

    /// Sorts first what is judged first.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "`as` saturates, and positions that large rank equal"
    )]
    fn rank(&self) -> (bool, bool, Reverse<i64>, i64, Reverse<usize>, Option<Uid>) {
        let steps = (self.coverage_mm() / COVERAGE_STEP_MM) as i64;
        let thickness_um = self
            .thickness_mm()
            .map_or(i64::MAX, |mm| (mm * 1000.0) as i64);
        (
            !self.is_original(),
            self.kernel().is_some_and(is_sharp),
            Reverse(steps),
            thickness_um,
            Reverse(self.n_analysed()),
            self.series_uid.clone(),
        )
    }
}

/// Whether a kernel is a sharp one, for lung or bone, as vendors name them: in words, Siemens (B60f, Bl57, Br64 and above 50),
/// Canon (FC30 to FC39, FC50 to FC59, FC80 and above), Philips (D, E, L, YA to YD).
fn is_sharp(kernel: &str) -> bool {
    let name = kernel
        .split('\\')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_uppercase();
    let words = ["LUNG", "BONE", "EDGE", "SHARP", "DETAIL", "ULTRA"];
    let digits: String = name
        .chars()
        .skip_while(|c| c.is_ascii_alphabetic())
        .take_while(char::is_ascii_digit)
        .collect();
    let number: u32 = digits.parse().unwrap_or(0);
    let letters = name.trim_start_matches("FC").len() + 2 == name.len();
    words.iter().any(|word| name.contains(word))
        || ["D", "E", "L", "YA", "YB", "YC", "YD"].contains(&name.as_str())
        || (letters && matches!(number, 30..=39 | 50..=59 | 80..=99))
        || (name.starts_with(['B', 'H', 'J', 'U', 'I']) && (50..=99).contains(&number))
}

/// Assembles all studies of `records`; a record without Study Instance UID belongs to none.
pub(crate) fn assemble(records: Vec<SliceRecord>, limits: &Limits) -> Vec<Study> {
    let mut order: Vec<Uid> = Vec::new();
    let mut studies: HashMap<Uid, Vec<SliceRecord>> = HashMap::new();
    for record in records {
        if let Some(study_uid) = record.study_uid.clone() {
            let slices = studies.entry(study_uid.clone()).or_default();
            if slices.is_empty() {
                order.push(study_uid);
            }
            slices.push(record);
        }
    }
    let mut take = |study_uid: Uid| {
        let slices = studies.remove(&study_uid).unwrap_or_default();
        assemble_study(study_uid, slices, limits)
    };
    order.drain(..).map(&mut take).collect()
}

/// Assembles the slices of one study.
pub(crate) fn assemble_study(study_uid: Uid, slices: Vec<SliceRecord>, limits: &Limits) -> Study {
    let n_received = slices.len();
    let slices = without_duplicates(slices);
    let n_duplicates = n_received - slices.len();
    let mut candidates: Vec<(Option<Why>, Series)> = by_series(slices)
        .into_iter()
        .flat_map(split_by_kind)
        .flat_map(split_by_acquisition)
        .map(|series| (obstacle(&series, limits), series))
        .collect();
    candidates.sort_by_cached_key(|(obstacle, series)| (obstacle.is_some(), series.rank()));
    let mut judged = None;
    let mut not_judged = Vec::new();
    for (obstacle, series) in candidates {
        match obstacle {
            None if judged.is_none() => judged = Some(series),
            obstacle => not_judged.push(NotJudged {
                series,
                why: obstacle.unwrap_or(Why::Rank),
            }),
        }
    }
    Study {
        study_uid,
        judged,
        not_judged,
        n_duplicates,
    }
}

fn without_duplicates(slices: Vec<SliceRecord>) -> Vec<SliceRecord> {
    let mut kept: Vec<SliceRecord> = Vec::new();
    let mut seen: HashMap<(Uid, Option<u32>), usize> = HashMap::new();
    for slice in slices {
        let Some(sop_uid) = slice.sop_uid.clone() else {
            kept.push(slice);
            continue;
        };
        let index = *seen.entry((sop_uid, slice.frame)).or_insert(kept.len());
        match kept.get_mut(index) {
            None => kept.push(slice),
            Some(first) if first.logit.is_none() && slice.logit.is_some() => *first = slice,
            Some(_) => {}
        }
    }
    kept
}

fn by_series(slices: Vec<SliceRecord>) -> Vec<Series> {
    let mut series: Vec<Series> = Vec::new();
    let mut index_of: HashMap<Option<Uid>, usize> = HashMap::new();
    for slice in slices {
        let series_uid = slice.series_uid.clone();
        let index = *index_of.entry(series_uid.clone()).or_insert(series.len());
        match series.get_mut(index) {
            Some(series) => series.slices.push(slice),
            None => series.push(Series {
                series_uid,
                slices: vec![slice],
            }),
        }
    }
    for series in &mut series {
        series.sort();
    }
    series
}

/// Splits a series by the first three values of Image Type and by orientation.
fn split_by_kind(series: Series) -> Vec<Series> {
    let kind = |facts: &SliceFacts| -> Vec<String> {
        let values = facts.image_type.split('\\').take(3);
        values.map(str::to_owned).collect()
    };
    let same = |a: &SliceFacts, b: &SliceFacts| {
        kind(a) == kind(b) && is_same_orientation(&a.orientation, &b.orientation)
    };
    split(series, same)
}

/// Splits a series in which positions repeat by Acquisition Number.
fn split_by_acquisition(series: Series) -> Vec<Series> {
    if !series.has_repeated_positions() {
        return vec![series];
    }
    split(series, |a, b| a.acquisition_number == b.acquisition_number)
}

/// Puts slices together that are the same by `is_same` as the first of a part; refused ones go to the largest part.
fn split(series: Series, is_same: impl Fn(&SliceFacts, &SliceFacts) -> bool) -> Vec<Series> {
    let mut parts: Vec<(SliceFacts, Series)> = Vec::new();
    let mut refused = Vec::new();
    for slice in series.slices {
        let Some(facts) = &slice.facts else {
            refused.push(slice);
            continue;
        };
        match parts.iter_mut().find(|(first, _)| is_same(first, facts)) {
            Some((_, part)) => part.slices.push(slice),
            None => {
                let part = Series {
                    series_uid: series.series_uid.clone(),
                    slices: vec![slice.clone()],
                };
                parts.push((facts.clone(), part));
            }
        }
    }
    let mut parts: Vec<Series> = parts.into_iter().map(|(_, part)| part).collect();
    match parts.iter_mut().max_by_key(|part| part.slices.len()) {
        Some(largest) => largest.slices.extend(refused),
        None => parts.push(Series {
            series_uid: series.series_uid,
            slices: refused,
        }),
    }
    parts
}

fn is_same_orientation(a: &[f64; 6], b: &[f64; 6]) -> bool {
    let normal = |[rx, ry, rz, cx, cy, cz]: [f64; 6]| {
        [ry * cz - rz * cy, rz * cx - rx * cz, rx * cy - ry * cx]
    };
    let (a, b) = (normal(*a), normal(*b));
    let cosine: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
    // Both are unit vectors by the gate; where there is no orientation at all, both are zero.
    let is_zero = |v: [f64; 3]| v.iter().all(|x| x.abs() < f64::EPSILON);
    (is_zero(a) && is_zero(b)) || cosine >= SAME_ORIENTATION_DEGREES.to_radians().cos()
}

fn obstacle(series: &Series, limits: &Limits) -> Option<Why> {
    if series.n_analysed() == 0 {
        Some(Why::NothingAnalysed)
    } else if series.has_repeated_positions() {
        Some(Why::RepeatedPositions)
    } else if series.coverage_mm() < limits.min_coverage_mm {
        Some(Why::Coverage)
    } else if series
        .spacing_mm()
        .is_some_and(|mm| mm > limits.max_spacing_mm)
    {
        Some(Why::Spacing)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(text: &str) -> Option<Uid> {
        Some(Uid::new(text).unwrap())
    }

    fn slice(series: &str, instance: u32, z_mm: f64) -> SliceRecord {
        SliceRecord {
            study_uid: uid("1.1"),
            series_uid: uid(series),
            sop_uid: uid(&format!("{series}.{instance}")),
            frame: None,
            facts: Some(SliceFacts {
                z_mm: Some(z_mm),
                thickness_mm: Some(1.0),
                is_original_primary: true,
                ..SliceFacts::default()
            }),
            logit: Some(0.0),
        }
    }

    fn series(name: &str, n_slices: u32, spacing_mm: f64) -> Vec<SliceRecord> {
        (0..n_slices)
            .map(|index| slice(name, index, f64::from(index) * spacing_mm))
            .collect()
    }

    fn refused(mut slice: SliceRecord) -> SliceRecord {
        slice.facts = None;
        slice.logit = None;
        slice
    }

    /// Judged series, its slices, and the others with reasons.
    fn outcome(records: &[SliceRecord]) -> (Option<String>, usize, Vec<(String, Why)>) {
        let studies = assemble(records.to_vec(), &Limits::NONE);
        let [study] = &studies[..] else {
            panic!("{} studies", studies.len())
        };
        let name = |series: &Series| series.series_uid.as_ref().unwrap().to_string();
        let others = study.not_judged.iter();
        (
            study.judged.as_ref().map(name),
            study
                .judged
                .as_ref()
                .map_or(0, |series| series.slices.len()),
            others
                .map(|other| (name(&other.series), other.why))
                .collect(),
        )
    }

    #[test]
    fn one_series_is_judged_whatever_the_order_of_arrival() {
        let thick = series("2.1", 10, 5.0);
        let thin = series("2.2", 45, 1.0);
        let short = series("2.3", 3, 1.0);
        let mut derived = series("2.4", 60, 1.0);
        for slice in &mut derived {
            slice.facts.as_mut().unwrap().is_original_primary = false;
        }
        let mut all = [thick, thin, short, derived].concat();
        let (judged, n_slices, mut others) = outcome(&all);
        assert_eq!((judged.as_deref(), n_slices), (Some("2.2"), 45));
        all.reverse();
        assert_eq!(outcome(&all), (judged, n_slices, others.clone()));
        others.sort_by(|a, b| a.0.cmp(&b.0));
        let names: Vec<&str> = others.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["2.1", "2.3", "2.4"]);
    }

    #[test]
    fn slices_are_ordered_from_feet_to_head() {
        let mut records = series("2.1", 5, 2.5);
        records.swap(0, 4);
        records.swap(1, 2);
        let study = assemble(records, &Limits::NONE).remove(0);
        let z: Vec<f64> = study.judged.unwrap().positions().collect();
        assert_eq!(z, [0.0, 2.5, 5.0, 7.5, 10.0]);
    }

    #[test]
    fn duplicates_count_once_and_the_analysed_one_is_kept() {
        let mut records = vec![refused(slice("2.1", 1, 0.0))];
        records.extend(series("2.1", 3, 1.0));
        records.push(refused(slice("2.1", 2, 2.0)));
        let study = assemble(records, &Limits::NONE).remove(0);
        assert_eq!(study.n_duplicates, 2);
        let judged = study.judged.unwrap();
        assert_eq!((judged.slices.len(), judged.n_analysed()), (3, 3));
    }

    #[test]
    fn refused_slices_stay_in_their_series() {
        let mut records = series("2.1", 3, 1.0);
        records.push(refused(slice("2.1", 9, 0.0)));
        let study = assemble(records, &Limits::NONE).remove(0);
        let judged = study.judged.unwrap();
        assert_eq!((judged.slices.len(), judged.n_analysed()), (4, 3));
    }

    #[test]
    fn repeated_positions_are_split_by_acquisition_or_not_judged() {
        let bolus: Vec<SliceRecord> = (0..8).map(|index| slice("2.1", index, 0.0)).collect();
        let (judged, _, others) = outcome(&bolus);
        assert_eq!(judged, None);
        assert_eq!(others, [("2.1".to_owned(), Why::RepeatedPositions)]);

        let mut phases = Vec::new();
        for phase in 0..2 {
            for mut slice in series("2.1", 10, 5.0) {
                slice.sop_uid = uid(&format!("2.1.{phase}.{}", phases.len()));
                slice.facts.as_mut().unwrap().acquisition_number = Some(phase);
                phases.push(slice);
            }
        }
        let (judged, n_slices, others) = outcome(&phases);
        assert_eq!((judged.as_deref(), n_slices), (Some("2.1"), 10));
        assert_eq!(others, [("2.1".to_owned(), Why::Rank)]);
    }

    #[test]
    fn a_study_without_an_analysed_slice_judges_nothing() {
        let records = [refused(slice("2.1", 1, 0.0))];
        let (judged, _, others) = outcome(&records);
        assert_eq!(judged, None);
        assert_eq!(others, [("2.1".to_owned(), Why::NothingAnalysed)]);
    }

    #[test]
    fn positions_that_are_not_numbers_do_no_harm() {
        let mut records = series("2.1", 3, 1.0);
        records[1].facts.as_mut().unwrap().z_mm = Some(f64::NAN);
        records[2].facts.as_mut().unwrap().z_mm = Some(f64::INFINITY);
        assert_eq!(outcome(&records).1, 3);
    }
}
