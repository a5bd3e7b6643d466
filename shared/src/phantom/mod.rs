//! Seeded synthetic CT pulmonary angiography studies with every label of the RSNA data set.
//!
//! A seed and a study's number come in; Hounsfield units, labels, geometry and embolus positions go out, any slice by itself. The same
//! seed gives the same bits on every CPU and in every build: only integers, `f64` additions, multiplications, divisions and square roots, and
//! the `libm` crate's functions are used.
//!
//! The stages, in the order of the data: [`random`](self) numbers, the patient's `anatomy`, the `vessels` that grow in it, the `embolus` that is put
//! into them, the `confounder`s beside it, the `render`er that paints a slice on a `canvas`, the `scanner` that blurs and stores it, and `dicom_file` that wraps it.
//!
//! No phantom is a patient: manufacturer and model name say so (see [`is_phantom`]), and so do the patient's name and number.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

mod anatomy;
mod canvas;
mod confounder;
#[cfg(feature = "std")]
mod dicom_file;
mod embolus;
mod labels;
mod random;
mod render;
#[cfg(feature = "std")]
mod rle;
mod scanner;
mod vessels;

#[cfg(feature = "std")]
pub use dicom_file::{DicomFileError, TRANSFER_SYNTAXES, dicom_file, multi_frame_file};
pub use labels::{ExamLabels, Finding};
pub use scanner::Storage;

use crate::hounsfield::Rescale;
use crate::stored::{ByteOrder, PixelFormat, PixelPadding, SlicePixels};
use anatomy::Anatomy;
use canvas::{Canvas, round_i32};
use embolus::Embolus;
use random::{Random, scatter};
use render::Chest;
use scanner::Scanner;
use vessels::{Region, Side};

/// Manufacturer (0008,0070) of every phantom.
pub const MANUFACTURER: &str = "PE-Edge phantom";
/// ManufacturerModelName (0008,1090) of every phantom.
pub const MODEL_NAME: &str = "Synthetic chest 1";

/// Whether a Manufacturer (0008,0070) is that of a phantom. Trailing spaces and NULs do not count.
#[must_use]
pub fn is_phantom(manufacturer: &str) -> bool {
    manufacturer.trim_end_matches([' ', '\0']) == MANUFACTURER
}

/// Which of a study's unique identifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UidRole {
    /// StudyInstanceUID.
    Study,
    /// SeriesInstanceUID.
    Series,
    /// SOPInstanceUID of a slice, by its index.
    Slice(u32),
    /// SOPInstanceUID of the multi-frame object.
    MultiFrame,
    /// FrameOfReferenceUID.
    FrameOfReference,
}

/// One slice as the scanner shows it.
#[derive(Clone, Debug, PartialEq)]
pub struct PhantomSlice {
    /// Hounsfield units, `[matrix, matrix]`, rows from front to back, columns from the patient's right to the left.
    pub hu: Vec<i16>,
    /// Whether an embolus is visible.
    pub pe_present: bool,
    /// Centres of the visible emboli in patient coordinates (x to the left, y to the back, z to the head), mm.
    pub emboli_mm: Vec<[f64; 3]>,
    /// ImagePositionPatient: the centre of the first pixel, mm.
    pub position_mm: [f64; 3],
    /// PixelSpacing: distance of rows, distance of columns, mm.
    pub pixel_spacing_mm: [f64; 2],
    /// HU of the padding outside a round field of view, where the scanner pads.
    pub padding_hu: Option<i16>,
}

impl PhantomSlice {
    /// The HU as 16-bit signed little-endian bytes, for [`PhantomSlice::pixels`].
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.hu.iter().flat_map(|hu| hu.to_le_bytes()).collect()
    }

    /// What the preprocessing takes, over the bytes of [`PhantomSlice::bytes`].
    #[must_use]
    pub fn pixels<'a>(&self, bytes: &'a [u8]) -> SlicePixels<'a> {
        let side = self.hu.len().isqrt();
        SlicePixels {
            rows: side,
            columns: side,
            format: PixelFormat {
                bits_allocated: 16,
                bits_stored: 16,
                high_bit: 15,
                is_signed: true,
                byte_order: ByteOrder::LittleEndian,
            },
            padding: self.padding_hu.map(|value| PixelPadding {
                value: i32::from(value),
                range_limit: None,
            }),
            rescale: Rescale {
                slope: 1.0,
                intercept: 0.0,
            },
            bytes,
        }
    }
}

/// Everything about a study but its pixels.
#[derive(Clone, Debug)]
pub struct StudyPlan {
    seed: u64,
    study_index: u32,
    n_slices: u32,
    matrix: u16,
    labels: ExamLabels,
    chest: Chest,
    scanner: Scanner,
    key: u64,
    /// 1 for the study of [`StudyPlan::without_emboli`], otherwise 0.
    visit: u8,
}

/// Smallest and largest matrix of a phantom.
const MATRIX: [u16; 2] = [64, 1024];
/// Largest number of slices of a study.
const MOST_SLICES: u32 = 4096;

impl StudyPlan {
    /// The study `study_index` of `seed`: about a third show an embolus and one in twenty-five is indeterminate, at random.
    ///
    /// `n_slices` is clamped to 1..=4096, `matrix` (rows and columns) to 64..=1024.
    #[must_use]
    pub fn new(seed: u64, study_index: u32, n_slices: u32, matrix: u16) -> Self {
        let mut random = Random::new(seed, u64::from(study_index) << 8);
        let finding = match random.unit() {
            u if u < 0.34 => Finding::Positive,
            u if u < 0.38 => Finding::Indeterminate,
            _ => Finding::Negative,
        };
        Self::with_finding(seed, study_index, n_slices, matrix, finding)
    }

    /// As [`StudyPlan::new`], with the finding asked for.
    #[must_use]
    pub fn with_finding(
        seed: u64,
        study_index: u32,
        n_slices: u32,
        matrix: u16,
        finding: Finding,
    ) -> Self {
        let n_slices = n_slices.clamp(1, MOST_SLICES);
        let key = scatter(seed ^ scatter(u64::from(study_index) + 0x51_7C_C1));
        let mut random = Random::new(key, 1);
        let mut labels = quality(finding, &mut random);
        let ratio = if random.chance(0.43) {
            random.range(1.06, 1.6)
        } else {
            random.range(0.62, 0.94)
        };
        let anatomy = Anatomy::new(ratio, labels.qa_contrast, &mut random);
        let scanner = Scanner::new(n_slices, labels.qa_motion, anatomy.width_mm(), &mut random);
        let arteries = vessels::arteries(&anatomy, &mut random);
        let veins = vessels::veins(&anatomy, &mut random);
        let airways = vessels::airways(&anatomy, &mut random);
        let streaks = anatomy.densities.vena_cava > 500 && random.chance(0.7);
        let mut chest = Chest {
            streak_hu: if streaks {
                round_i32(random.range(40.0, 130.0))
            } else {
                0
            },
            texture: random.bits(),
            confounders: Vec::new(),
            emboli: Vec::new(),
            anatomy,
            arteries,
            veins,
            airways,
        };
        confounder::add(&mut chest, &labels, &mut random);
        if finding == Finding::Positive {
            let planes: Vec<f64> = (0..n_slices)
                .map(|index| scanner.z_mm(index) / chest.anatomy.scale[2])
                .collect();
            chest.emboli = embolus::emboli(&chest.arteries, &planes, &mut random);
            label_emboli(&mut labels, &chest, &planes);
        }
        Self {
            seed,
            study_index,
            n_slices,
            matrix: matrix.clamp(MATRIX[0], MATRIX[1]),
            labels,
            chest,
            scanner,
            key,
            visit: 0,
        }
    }

    /// The same patient in the same scanner on a day without an embolus: a negative study that differs from this one in nothing else.
    #[must_use]
    pub fn without_emboli(&self) -> Self {
        let negative = Finding::Negative;
        let mut plan = Self::with_finding(
            self.seed,
            self.study_index,
            self.n_slices,
            self.matrix,
            negative,
        );
        plan.visit = 1;
        plan
    }

    /// The labels of the exam.
    #[must_use]
    pub const fn labels(&self) -> &ExamLabels {
        &self.labels
    }

    /// Number of slices.
    #[must_use]
    pub const fn n_slices(&self) -> u32 {
        self.n_slices
    }

    /// Rows and columns of each slice.
    #[must_use]
    pub const fn matrix(&self) -> u16 {
        self.matrix
    }

    /// The seed and the number within it from which the study was made.
    #[must_use]
    pub const fn origin(&self) -> (u64, u32) {
        (self.seed, self.study_index)
    }

    /// How the study's scanner stores its values.
    #[must_use]
    pub const fn storage(&self) -> Storage {
        self.scanner.storage
    }

    /// A unique identifier of the form `2.25.<number>` (PS3.5 B.2), derived from the seed, the study's number and the role.
    #[must_use]
    pub fn uid(&self, role: UidRole) -> String {
        let (kind, index) = match role {
            UidRole::Study => (1, 0),
            UidRole::Series => (2, 0),
            UidRole::Slice(index) => (3, index),
            UidRole::MultiFrame => (4, 0),
            UidRole::FrameOfReference => (5, 0),
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"PE-Edge phantom uid");
        for part in [
            self.seed,
            u64::from(self.study_index),
            u64::from(self.n_slices),
            u64::from(self.matrix),
            u64::from(self.visit),
            kind,
            u64::from(index),
        ] {
            hasher.update(&part.to_le_bytes());
        }
        let digest = *hasher.finalize().as_bytes();
        let (word, _) = digest
            .split_first_chunk::<16>()
            .map_or(([0; 16], &[][..]), |(word, rest)| (*word, rest));
        format!("2.25.{}", u128::from_le_bytes(word))
    }

    /// Height of a slice in patient coordinates, mm. Slice 0 is the lowest.
    #[must_use]
    pub fn z_mm(&self, slice_index: u32) -> f64 {
        self.scanner.z_mm(slice_index)
    }

    /// Whether an embolus is visible on the slice: [`PhantomSlice::pe_present`] without painting it.
    #[must_use]
    pub fn pe_present(&self, slice_index: u32) -> bool {
        !self.emboli_mm(slice_index).is_empty()
    }

    /// Centres of the emboli visible on the slice: [`PhantomSlice::emboli_mm`] without painting it.
    #[must_use]
    pub fn emboli_mm(&self, slice_index: u32) -> Vec<[f64; 3]> {
        let anatomy = &self.chest.anatomy;
        let z_mm = self.z_mm(slice_index);
        let z = z_mm / anatomy.scale[2];
        let to_patient = |[x, y, _]: [f64; 3]| {
            let x_mm = (x + self.sway(y, z)) * anatomy.scale[0] + anatomy.offset_mm[0];
            [x_mm, y * anatomy.scale[1] + anatomy.offset_mm[1], z_mm]
        };
        let centres = self
            .chest
            .emboli
            .iter()
            .filter_map(|embolus| embolus.centre_in(z));
        centres.map(to_patient).collect()
    }

    /// Paints one slice. Indices past the end repeat the last slice.
    #[must_use]
    pub fn slice(&self, slice_index: u32) -> PhantomSlice {
        let slice_index = slice_index.min(self.n_slices - 1);
        let anatomy = &self.chest.anatomy;
        let side = usize::from(self.matrix);
        let spacing_mm = self.scanner.field_of_view_mm / side as f64;
        let z_mm = self.z_mm(slice_index);
        let z = z_mm / anatomy.scale[2];
        let first = |axis: usize| {
            self.scanner.centre_mm[axis] - 0.5 * self.scanner.field_of_view_mm + 0.5 * spacing_mm
        };
        let position_mm = [first(0), first(1), z_mm];
        let y_first = (position_mm[1] - anatomy.offset_mm[1]) / anatomy.scale[1];
        let pixel = [spacing_mm / anatomy.scale[0], spacing_mm / anatomy.scale[1]];
        let x_of_row = |row: usize| {
            let y = y_first + pixel[1] * row as f64;
            (position_mm[0] - anatomy.offset_mm[0]) / anatomy.scale[0] - self.sway(y, z)
        };
        let mut canvas = Canvas::new(
            side,
            -1000,
            pixel,
            y_first,
            (0..side).map(x_of_row).collect(),
        );
        self.table(&mut canvas, z);
        self.chest.paint(&mut canvas, z);
        let mut hu = canvas.into_hu();
        self.scanner
            .expose(&mut hu, side, scatter(self.key ^ u64::from(slice_index)));
        let emboli_mm = self.emboli_mm(slice_index);
        PhantomSlice {
            hu,
            pe_present: !emboli_mm.is_empty(),
            emboli_mm,
            position_mm,
            pixel_spacing_mm: [spacing_mm; 2],
            padding_hu: self.scanner.padding_hu,
        }
    }

    /// Sideways displacement of the body at the height `y` of the model, mm.
    fn sway(&self, y: f64, z: f64) -> f64 {
        let [shear, amplitude, phase] = self.chest.anatomy.sway;
        shear * y + amplitude * libm::sin(0.025 * y + phase + 0.01 * z)
    }

    fn table(&self, canvas: &mut Canvas, z: f64) {
        let anatomy = &self.chest.anatomy;
        let trunk = anatomy.trunk_at(z);
        let back = trunk.y + trunk.b + 0.55 * anatomy.fat_mm + self.scanner.table_y_mm;
        canvas.band(back, back + 1.6, 230.0, -120);
        canvas.band(back + 1.6, back + 14.0, 225.0, -940);
        canvas.band(back + 14.0, back + 15.8, 215.0, -60);
    }
}

/// Quality labels and the negative or indeterminate label; a positive study's others follow from its emboli.
fn quality(finding: Finding, random: &mut Random) -> ExamLabels {
    let is_indeterminate = finding == Finding::Indeterminate;
    let by_motion = random.chance(0.5);
    let mut labels = ExamLabels {
        negative_exam_for_pe: finding == Finding::Negative,
        indeterminate: is_indeterminate,
        qa_motion: random.chance(0.04),
        qa_contrast: random.chance(0.05),
        flow_artifact: random.chance(0.12),
        true_filling_defect_not_pe: random.chance(0.02),
        ..ExamLabels::default()
    };
    if is_indeterminate {
        labels.qa_motion |= by_motion;
        labels.qa_contrast |= !by_motion;
        labels.true_filling_defect_not_pe = false;
    }
    labels
}

/// Labels what at least one plane shows. Where no plane shows anything (a study of very few slices off the arteries) the exam is negative.
fn label_emboli(labels: &mut ExamLabels, chest: &Chest, planes: &[f64]) {
    let visible = |embolus: &&Embolus| planes.iter().any(|&z| embolus.centre_in(z).is_some());
    let (mut acute, mut chronic) = (false, false);
    for embolus in chest.emboli.iter().filter(visible) {
        acute |= !embolus.is_chronic;
        chronic |= embolus.is_chronic;
        match (embolus.region, embolus.side) {
            (Region::Central, _) => labels.central_pe = true,
            (_, Side::Left) => labels.leftsided_pe = true,
            (_, Side::Right) => labels.rightsided_pe = true,
        }
    }
    if !acute && !chronic {
        labels.negative_exam_for_pe = true;
        return;
    }
    labels.chronic_pe = chronic && !acute;
    labels.acute_and_chronic_pe = chronic && acute;
    labels.rv_lv_ratio_gte_1 = chest.anatomy.rv_lv_ratio >= 1.0;
    labels.rv_lv_ratio_lt_1 = !labels.rv_lv_ratio_gte_1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_obey_the_rules_and_every_label_occurs() {
        let mut seen = [false; 13];
        for study_index in 0..300 {
            let plan = StudyPlan::new(11, study_index, 40, 64);
            let positives = (0..40).filter(|&index| plan.pe_present(index)).count();
            assert!(
                plan.labels().is_consistent(positives > 0),
                "study {study_index}: {:?}",
                plan.labels()
            );
            for (seen, (_, value)) in seen.iter_mut().zip(plan.labels().columns()) {
                *seen |= value;
            }
        }
        assert_eq!(seen, [true; 13]);
    }

    /// Digest of a slice's pixels and emboli.
    fn digest(study_index: u32, slice_index: u32, matrix: u16) -> String {
        let slice = StudyPlan::new(2026, study_index, 24, matrix).slice(slice_index);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&slice.bytes());
        for value in slice.emboli_mm.iter().flatten() {
            hasher.update(&value.to_le_bytes());
        }
        String::from(&hasher.finalize().to_hex().as_str()[..16])
    }

    #[test]
    fn slices_are_the_same_bits_everywhere() {
        let digests = [
            digest(0, 12, 64),
            digest(1, 9, 256),
            digest(2, 15, 256),
            digest(3, 4, 256),
            digest(4, 20, 512),
        ];
        let expected = [
            "bae0ce58a3d89774",
            "87a431d9cbba5795",
            "3159d60fc6cb3c61",
            "6f7259d055c25df4",
            "5af8b7a013284f8a",
        ];
        assert_eq!(digests, expected);
    }

    #[test]
    fn a_finding_asked_for_is_given_and_fills_at_most_three_slices_in_ten() {
        for study_index in 0..40 {
            let count = |finding| {
                let plan = StudyPlan::with_finding(3, study_index, 24, 64, finding);
                let n_positive = (0..24).filter(|&index| plan.pe_present(index)).count();
                assert!(plan.labels().is_consistent(n_positive > 0));
                n_positive
            };
            // One embolus alone may be longer.
            assert!(
                (1..=12).contains(&count(Finding::Positive)),
                "study {study_index}"
            );
            assert_eq!(count(Finding::Negative), 0);
            assert_eq!(count(Finding::Indeterminate), 0);
        }
    }

    #[test]
    fn an_embolus_lies_inside_the_picture() {
        let plan = StudyPlan::with_finding(3, 1, 24, 64, Finding::Positive);
        for slice in (0..24).map(|index| plan.slice(index)) {
            assert_eq!(slice.pe_present, !slice.emboli_mm.is_empty());
            for [x, y, z] in slice.emboli_mm {
                let column = (x - slice.position_mm[0]) / slice.pixel_spacing_mm[1];
                let row = (y - slice.position_mm[1]) / slice.pixel_spacing_mm[0];
                assert!((8.0..56.0).contains(&column) && (8.0..56.0).contains(&row));
                assert!((z - slice.position_mm[2]).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn identifiers_are_valid_and_differ() {
        let plan = StudyPlan::new(1, 2, 5, 64);
        let roles = [
            UidRole::Study,
            UidRole::Series,
            UidRole::Slice(0),
            UidRole::Slice(1),
            UidRole::MultiFrame,
            UidRole::FrameOfReference,
        ];
        let uids: alloc::collections::BTreeSet<String> =
            roles.iter().map(|&role| plan.uid(role)).collect();
        assert_eq!(uids.len(), roles.len());
        for uid in uids {
            assert!(crate::uid::Uid::new(&uid).is_ok());
        }
    }
}
