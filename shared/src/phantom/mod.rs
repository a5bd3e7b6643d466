//! Seeded synthetic CT pulmonary angiography studies with every label of the RSNA data set.
//!
//! A seed and a study's number come in; Hounsfield units, labels, geometry and embolus positions go out, any slice by itself. The same
//! seed gives the same bits on every CPU and in every build: only integers, `f64` additions, multiplications, divisions and square roots, and
//! the `libm` crate's functions are used.
//!
//! The stages, in the order of the data: [`random`](self) numbers, the patient's `anatomy`, the `vessels` that grow in it, the `embolus` that is put
//! into them, the `render`er that paints a slice on a `canvas`, the `scanner` that blurs and stores it, and `dicom_file` that wraps it.
//!
//! No phantom is a patient: manufacturer and model name say so (see [`is_phantom`]), and so do the patient's name and number.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

mod anatomy;
mod canvas;
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
use canvas::{Canvas, Tube, mix, round_i32};
use embolus::{Embolus, Wish};
use random::{Random, scatter};
use render::{Chest, Confounder};
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
        let scanner = Scanner::new(n_slices, labels.qa_motion, &mut random);
        let ratio = if random.chance(0.43) {
            random.range(1.06, 1.6)
        } else {
            random.range(0.62, 0.94)
        };
        let anatomy = Anatomy::new(ratio, labels.qa_contrast, &mut random);
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
        add_confounders(&mut chest, &labels, &mut random);
        if finding == Finding::Positive {
            let planes: Vec<f64> = (0..n_slices)
                .map(|index| scanner.z_mm(index) / chest.anatomy.scale[2])
                .collect();
            chest.emboli = emboli(&chest, &planes, &mut random);
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
        }
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

/// Lymph nodes, plugged bronchi, mixing artefacts, and masses that grow into an artery.
fn add_confounders(chest: &mut Chest, labels: &ExamLabels, random: &mut Random) {
    let artery = chest.anatomy.densities.artery;
    let large: Vec<Tube> = chest
        .arteries
        .branches
        .iter()
        .filter(|branch| branch.region <= Region::Lobar)
        .map(|branch| branch.tube)
        .collect();
    let Some(&any) = large.first() else { return };
    let pick = |random: &mut Random| large.get(random.below(large.len())).copied().unwrap_or(any);
    for _ in 0..random.below(7) {
        // A node touches the vessel from outside.
        let tube = pick(random);
        let t = random.unit();
        let (centre, radius) = (tube.at(t), random.range(2.5, 6.5));
        let angle = random.range(0.0, core::f64::consts::TAU);
        let away = tube.radius_at(t) + radius + 0.5;
        let from = [
            centre[0] + away * libm::cos(angle),
            centre[1] + away * libm::sin(angle),
            centre[2] - 3.0,
        ];
        let to = [
            from[0] + random.range(-4.0, 4.0),
            from[1] + random.range(-4.0, 4.0),
            from[2] + random.range(3.0, 9.0),
        ];
        let hu = round_i32(random.range(25.0, 70.0));
        chest.confounders.push(Confounder {
            tube: Tube {
                from,
                to,
                radius: [radius, 0.8 * radius],
            },
            hu,
            softness_mm: 1.0,
            strength: 1.0,
            is_over_vessels: false,
        });
    }
    for _ in 0..random.below(9) {
        // Mucus in a small bronchus, or a nodule, in the lung.
        let side = if random.chance(0.5) {
            Side::Left
        } else {
            Side::Right
        };
        let Some(from) = chest.anatomy.point_in_lung(side, random) else {
            continue;
        };
        let to = mix(
            from,
            [0.55 * from[0], 8.0, 0.3 * from[2]],
            random.range(0.05, 0.25),
        );
        let radius = random.range(1.2, 3.2);
        chest.confounders.push(Confounder {
            tube: Tube {
                from,
                to,
                radius: [radius, radius],
            },
            hu: round_i32(random.range(15.0, 60.0)),
            softness_mm: 1.0,
            strength: 1.0,
            is_over_vessels: false,
        });
    }
    if random.chance(0.35) {
        // Consolidation at a base: a soft cloud.
        let side = if random.chance(0.5) {
            Side::Left
        } else {
            Side::Right
        };
        if let Some(from) = chest.anatomy.point_in_lung(side, random) {
            let radius = random.range(9.0, 24.0);
            let to = [from[0], from[1] + 10.0, from[2] + random.range(-12.0, 12.0)];
            chest.confounders.push(Confounder {
                tube: Tube {
                    from,
                    to,
                    radius: [radius, 0.7 * radius],
                },
                hu: round_i32(random.range(-350.0, 30.0)),
                softness_mm: 14.0,
                strength: random.range(0.4, 1.0),
                is_over_vessels: false,
            });
        }
    }
    let n_mixing = if labels.flow_artifact {
        3 + random.below(3)
    } else {
        0
    };
    for _ in 0..n_mixing {
        let tube = pick(random);
        let share = random.range(0.4, 0.8);
        chest.confounders.push(Confounder {
            tube: Tube {
                radius: tube.radius.map(|radius| share * radius),
                ..tube
            },
            hu: round_i32(45.0 + f64::from(artery - 45) * random.range(0.35, 0.7)),
            softness_mm: 0.8 * tube.radius[0],
            strength: 0.8,
            is_over_vessels: true,
        });
    }
    if labels.true_filling_defect_not_pe {
        // A mass that enhances and reaches through the wall.
        let tube = pick(random);
        let from = tube.at(random.unit());
        let to = [
            from[0] + random.range(-9.0, 9.0),
            from[1] + random.range(-9.0, 9.0),
            from[2] + random.range(-8.0, 8.0),
        ];
        chest.confounders.push(Confounder {
            tube: Tube {
                from,
                to,
                radius: [tube.radius[0], 1.3 * tube.radius[0]],
            },
            hu: round_i32(random.range(90.0, 125.0)),
            softness_mm: 2.0,
            strength: 1.0,
            is_over_vessels: true,
        });
    }
}

/// The emboli of a positive study: at least one, and at least one of them visible.
fn emboli(chest: &Chest, planes: &[f64], random: &mut Random) -> Vec<Embolus> {
    let (is_chronic, is_mixed) = match random.unit() {
        u if u < 0.13 => (true, false),
        u if u < 0.20 => (false, true),
        _ => (false, false),
    };
    let mut wishes = Vec::new();
    if random.chance(0.3) {
        wishes.push((
            true,
            if random.chance(0.5) {
                Side::Left
            } else {
                Side::Right
            },
        ));
    }
    for (side, probability) in [(Side::Left, 0.62), (Side::Right, 0.75)] {
        if random.chance(probability) {
            for _ in 0..1 + random.below(2) {
                wishes.push((false, side));
            }
        }
    }
    if wishes.is_empty() || (is_mixed && wishes.len() < 2) {
        wishes.push((false, Side::Right));
        wishes.push((false, Side::Left));
    }
    let mut found = Vec::new();
    for (index, (is_central, side)) in wishes.into_iter().enumerate() {
        let is_chronic = is_chronic || (is_mixed && index % 2 == 1);
        found.extend(embolus::place(
            Wish {
                is_central,
                side,
                is_chronic,
            },
            &chest.arteries,
            planes,
            random,
        ));
    }
    if found.is_empty() {
        // Few planes: anything that one of them cuts.
        for (is_central, side) in [
            (true, Side::Left),
            (false, Side::Left),
            (false, Side::Right),
        ] {
            found.extend(embolus::place(
                Wish {
                    is_central,
                    side,
                    is_chronic: false,
                },
                &chest.arteries,
                planes,
                random,
            ));
        }
    }
    found
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
}
