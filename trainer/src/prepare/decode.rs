//! One unit of a source: its slices as rows and tensors.

use anyhow::{Context, Result, bail};
use rayon::prelude::*;
use shared::TENSOR_BYTES;
use shared::phantom::{StudyPlan, UidRole};
use shared::preprocess::{Preprocessor, SeriesRange};
use shared::spec::{Normalisation, PreprocessSpec};
use shared::uid::Uid;

use super::files::{dicom_series, jpeg_series, loose_files, read_files};
use super::partial::Done;
use crate::index::{Part, Row};
use crate::source::{
    HELD_OUT_KEPT, Labels, Listed, NEGATIVES_KEPT, Origin, Source, Unit, identifier,
};
use crate::split::{self, SplitBy};

/// A decoded slice before it has its place.
pub(super) struct Decoded {
    pub(super) study: Option<Uid>,
    pub(super) series: Option<Uid>,
    pub(super) sop: Uid,
    pub(super) pe_present: bool,
    pub(super) z_mm: Option<f64>,
    pub(super) spacing_mm: Option<f64>,
    pub(super) manufacturer: Option<String>,
    pub(super) tensor: Vec<u8>,
}

/// What is known of a unit's study beside its slices.
pub(super) struct Exam {
    study: Option<Uid>,
    series: Option<Uid>,
    labels: Option<Labels>,
    is_stack: bool,
    /// The part, where it does not follow from the split.
    part: Option<Part>,
}

pub(super) fn decode_unit(
    source: &Source,
    spec: &PreprocessSpec,
    seed: u64,
    unit_number: u64,
) -> Result<(Done, Vec<u8>)> {
    let unit = &source.units[usize::try_from(unit_number)?];
    let mut hasher = blake3::Hasher::new();
    let mut left_out = unit.left_out.clone();
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
            let slices = dicom_series(unit, read, spec, &mut left_out)?;
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
            let slices = loose_files(unit, read, spec, &mut left_out)?;
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
pub(super) fn row(exam: &Exam, slice: Decoded, seed: u64) -> Row {
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

pub(super) fn exam_of(unit: &Unit) -> Exam {
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
pub(super) fn phantom_studies(
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
pub(super) fn painted(
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
pub(super) fn is_one_in(n: u64, identifier: &str) -> bool {
    let digest = blake3::hash(identifier.as_bytes());
    let word = digest.as_bytes().iter().take(8);
    word.fold(0_u64, |word, &byte| (word << 8) | u64::from(byte)) % n == 0
}

/// Tensors of the slices of one series, in order.
pub(super) fn tensors_of(
    slices: &[shared::stored::SlicePixels<'_>],
    spec: &PreprocessSpec,
) -> Result<Vec<Result<Vec<u8>>>> {
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
                    (None, Normalisation::SeriesMinmax) => {
                        preprocessor.series_range(slice, None)?;
                        bail!("the series has no pixel that is not padding");
                    }
                    (_, Normalisation::Window) => preprocessor.tensor(slice, &mut tensor)?,
                }
                Ok(tensor)
            },
        )
        .collect())
}
