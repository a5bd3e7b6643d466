//! One patient's chest: sizes, densities and landmarks, drawn once per study.
//!
//! The model's origin lies in the midline at the height of the fork of the pulmonary trunk. z runs from about -130 mm (base of the
//! lungs) to 110 mm (apex). Sizes are those of an average adult; the study's scale turns them into the patient's.

use super::canvas::{Outline, Point};
use super::random::Random;
use super::vessels::Side;

/// Nearly a full turn, in radians: the range of a random phase.
const PHASE: f64 = 628.0 / 100.0;

/// Densities in HU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Densities {
    pub(super) artery: i32,
    pub(super) vein: i32,
    pub(super) aorta: i32,
    pub(super) vena_cava: i32,
    pub(super) right_heart: i32,
    pub(super) left_heart: i32,
    pub(super) muscle: i32,
    pub(super) fat: i32,
    pub(super) lung: i32,
    pub(super) liver: i32,
}

/// One patient's chest.
#[derive(Clone, Debug)]
pub(super) struct Anatomy {
    /// Patient millimetres per model millimetre.
    pub(super) scale: [f64; 3],
    /// Where the model's origin lies in the patient's coordinates, mm.
    pub(super) offset_mm: [f64; 2],
    /// Sideways warp of the body: shear, amplitude in mm, phase.
    pub(super) sway: [f64; 3],
    /// Half width and half depth of the chest cavity.
    pub(super) cavity: [f64; 2],
    pub(super) cavity_power: f64,
    pub(super) fat_mm: f64,
    pub(super) muscle_mm: f64,
    pub(super) has_breasts: bool,
    /// Scale of the pulmonary arteries' radii.
    pub(super) artery_width: f64,
    /// Right to left ventricular diameter.
    pub(super) rv_lv_ratio: f64,
    /// Size of the heart, about 1.
    pub(super) heart: f64,
    /// Height of the right and the left dome of the diaphragm.
    pub(super) dome_z: [f64; 2],
    /// Width of the mediastinum, about 1.
    pub(super) mediastinum: f64,
    /// Distance of the ribs along z and the height of the first one.
    pub(super) ribs: [f64; 2],
    pub(super) densities: Densities,
    /// Phases for waves of the outlines.
    pub(super) phases: [f64; 4],
}

impl Anatomy {
    /// A random patient. `poor_contrast` lowers the arteries' density.
    pub(super) fn new(rv_lv_ratio: f64, poor_contrast: bool, random: &mut Random) -> Self {
        let size = random.range(0.90, 1.10);
        let artery = if poor_contrast {
            random.range(150.0, 215.0)
        } else {
            random.range(300.0, 450.0)
        };
        // Early timing leaves the left heart empty, late timing fills everything alike.
        let timing = random.unit();
        let systemic = if timing < 0.2 {
            random.range(0.3, 0.55)
        } else {
            random.range(0.55, 1.05)
        };
        let left = 45.0 + (artery - 45.0) * systemic;
        let whole = super::canvas::round_i32;
        let densities = Densities {
            artery: whole(artery),
            vein: whole(
                45.0 + (artery - 45.0) * (systemic * random.range(0.85, 1.1)).clamp(0.25, 1.05),
            ),
            aorta: whole(45.0 + (left - 45.0) * random.range(0.75, 1.0)),
            vena_cava: whole(artery * random.range(0.8, 2.4)),
            right_heart: whole(artery * random.range(0.85, 1.05)),
            left_heart: whole(left),
            muscle: whole(random.range(48.0, 62.0)),
            fat: whole(random.range(-112.0, -95.0)),
            lung: whole(random.range(-875.0, -800.0)),
            liver: whole(random.range(55.0, 95.0)),
        };
        Self {
            scale: [
                size * random.range(0.94, 1.06),
                size * random.range(0.92, 1.08),
                size * random.range(0.95, 1.05),
            ],
            offset_mm: [random.range(-4.0, 4.0), random.range(-5.0, 5.0)],
            sway: [
                random.range(-0.06, 0.06),
                random.range(0.0, 2.5),
                random.range(0.0, PHASE),
            ],
            cavity: [random.range(120.0, 134.0), random.range(80.0, 94.0)],
            cavity_power: random.range(2.1, 2.5),
            fat_mm: random.range(6.0, 30.0),
            muscle_mm: random.range(8.0, 16.0),
            has_breasts: random.chance(0.5),
            artery_width: random.range(1.1, 1.35),
            rv_lv_ratio,
            heart: random.range(0.92, 1.12),
            dome_z: [random.range(-72.0, -50.0), random.range(-82.0, -60.0)],
            mediastinum: random.range(0.9, 1.15),
            ribs: [random.range(22.0, 27.0), random.range(90.0, 104.0)],
            densities,
            phases: [
                random.range(0.0, PHASE),
                random.range(0.0, PHASE),
                random.range(0.0, PHASE),
                random.range(0.0, PHASE),
            ],
        }
    }

    /// A landmark, moved at random by up to `spread` mm along each axis.
    pub(super) fn near(&self, point: Point, spread: f64, random: &mut Random) -> Point {
        point.map(|value| value + random.range(-spread, spread))
    }

    /// Width of the rib cage with its muscles at the fork of the pulmonary trunk, in the patient's mm.
    pub(super) fn width_mm(&self) -> f64 {
        2.0 * self.scale[0] * self.trunk_at(0.0).a
    }

    /// The chest cavity at height `z`; its `a` is 0 above the apex.
    pub(super) fn cavity_at(&self, z: f64) -> Outline {
        let rise = ((z - 15.0) / 98.0).max(0.0);
        let share = if rise >= 1.0 {
            0.0
        } else {
            libm::pow(1.0 - libm::pow(rise, 2.4), 1.0 / 2.4)
        };
        // Below, the cage widens a little.
        let flare = 1.0 + 0.04 * ((-z) / 100.0).clamp(-0.5, 1.0);
        Outline {
            x: 0.0,
            y: 4.0 + 8.0 * rise,
            a: self.cavity[0] * share * flare,
            b: self.cavity[1] * (0.25 + 0.75 * share) * flare,
            power: self.cavity_power,
            wave: [1.2, 0.06, self.phases[0] + 0.02 * z],
        }
    }

    /// The inner border of the muscles of the trunk, outside the ribs.
    pub(super) fn trunk_at(&self, z: f64) -> Outline {
        let rise = ((z - 20.0) / 100.0).clamp(0.0, 1.2);
        let width = self.cavity[0] + 10.0 + 6.0 * rise - 14.0 * rise * rise;
        Outline {
            x: 0.0,
            y: 6.0 + 6.0 * rise,
            a: width + self.muscle_mm,
            b: self.cavity[1] + 9.0 + self.muscle_mm * 0.6 - 12.0 * rise * rise,
            power: 2.35,
            wave: [1.5, 0.05, self.phases[1] + 0.01 * z],
        }
    }

    /// Height of the diaphragm over the point, on its side.
    pub(super) fn diaphragm(&self, x: f64, y: f64) -> f64 {
        let (middle, top) = if x < 0.0 {
            (-58.0, self.dome_z[0])
        } else {
            (60.0, self.dome_z[1])
        };
        let u = (x - middle) / 70.0;
        let v = (y + 5.0) / 75.0;
        top - 55.0 * (u * u + v * v).min(1.6)
    }

    /// Half width of the mediastinum at the height `z`.
    pub(super) fn mediastinum_at(&self, z: f64) -> f64 {
        let base = if z > 40.0 {
            34.0 - 0.08 * (z - 40.0)
        } else {
            34.0 + 0.05 * (40.0 - z)
        };
        self.mediastinum * base
    }

    /// Centre and half axes of the heart in the plane `z`, or nothing outside it: [x, y, a, b].
    pub(super) fn heart_at(&self, z: f64) -> Option<[f64; 4]> {
        let h = (z + 52.0) / 44.0;
        if h.abs() >= 1.0 {
            return None;
        }
        let share = libm::sqrt(1.0 - h * h);
        let tilt = 8.0 * -h;
        Some([
            14.0 + tilt,
            -22.0 + 0.3 * tilt,
            61.0 * share * self.heart,
            45.0 * share * self.heart,
        ])
    }

    /// A point inside the air of a lung; none where fifty throws missed.
    pub(super) fn point_in_lung(&self, side: Side, random: &mut Random) -> Option<Point> {
        for _ in 0..50 {
            let x = random.range(30.0, 125.0);
            let x = if side == Side::Left { x } else { -x };
            let point = [x, random.range(-78.0, 88.0), random.range(-105.0, 104.0)];
            if self.is_lung(point) {
                return Some(point);
            }
        }
        None
    }

    fn is_lung(&self, [x, y, z]: Point) -> bool {
        let cavity = self.cavity_at(z).grown(-5.0);
        let Some([left, right]) = cavity.chord(y) else {
            return false;
        };
        let in_heart = self.heart_at(z).is_some_and(|[hx, hy, a, b]| {
            let (u, v) = ((x - hx) / (a + 5.0), (y - hy) / (b + 5.0));
            u * u + v * v < 1.0
        });
        x > left
            && x < right
            && !in_heart
            && x.abs() > 0.8 * self.mediastinum_at(z)
            && z > self.diaphragm(x, y) + 3.0
    }
}
