//! Paints one slice: body wall, lungs, bones, mediastinum, heart, vessels, emboli, then what merely looks like them.

use alloc::vec::Vec;

use super::anatomy::Anatomy;
use super::canvas::{Canvas, Ellipse, Outline, Tube, narrow, round_i32};
use super::embolus::Embolus;
use super::random::{Random, scatter};
use super::vessels::{Region, Tree};

/// What lies in one patient, ready to be cut at any height.
#[derive(Clone, Debug)]
pub(super) struct Chest {
    pub(super) anatomy: Anatomy,
    pub(super) arteries: Tree,
    pub(super) veins: Tree,
    pub(super) airways: Tree,
    pub(super) emboli: Vec<Embolus>,
    pub(super) confounders: Vec<Confounder>,
    /// Strength of the streaks from dense contrast in the superior vena cava, HU.
    pub(super) streak_hu: i32,
    /// Seed of textures that are fixed in the patient.
    pub(super) texture: u64,
}

/// A structure that can be mistaken for an embolus.
#[derive(Clone, Copy, Debug)]
pub(super) struct Confounder {
    pub(super) tube: Tube,
    pub(super) hu: i32,
    pub(super) softness_mm: f64,
    pub(super) strength: f64,
    pub(super) is_over_vessels: bool,
}

impl Chest {
    /// Paints the plane `z` (model mm) onto a canvas of air.
    pub(super) fn paint(&self, canvas: &mut Canvas, z: f64) {
        let cavity = self.anatomy.cavity_at(z);
        self.wall(canvas, z, &cavity);
        self.lungs(canvas, &cavity);
        self.abdomen(canvas, z, &cavity);
        self.ribs(canvas, z, &cavity);
        self.mediastinum(canvas, z, &cavity);
        self.spine(canvas, z);
        self.heart(canvas, z);
        self.great_vessels(canvas, z);
        for confounder in self
            .confounders
            .iter()
            .filter(|confounder| !confounder.is_over_vessels)
        {
            canvas.tube(
                &confounder.tube,
                z,
                confounder.hu,
                confounder.softness_mm,
                confounder.strength,
            );
        }
        self.trees(canvas, z);
        for confounder in self
            .confounders
            .iter()
            .filter(|confounder| confounder.is_over_vessels)
        {
            canvas.tube(
                &confounder.tube,
                z,
                confounder.hu,
                confounder.softness_mm,
                confounder.strength,
            );
        }
        for embolus in &self.emboli {
            for piece in &embolus.pieces {
                canvas.tube(&piece.thrombus, z, embolus.hu, 0.0, 1.0);
            }
            for piece in &embolus.pieces {
                if let Some(open) = &piece.open {
                    canvas.tube(open, z, self.anatomy.densities.artery, 0.0, 1.0);
                }
            }
        }
        self.streaks(canvas, z);
        texture(canvas, self.texture, z);
    }

    fn wall(&self, canvas: &mut Canvas, z: f64, cavity: &Outline) {
        let anatomy = &self.anatomy;
        let d = &anatomy.densities;
        let trunk = anatomy.trunk_at(z);
        let skin = Outline {
            a: trunk.a + anatomy.fat_mm,
            b: trunk.b + 0.55 * anatomy.fat_mm,
            ..trunk
        };
        if anatomy.has_breasts {
            let h = (z + 10.0) / 62.0;
            let size = libm::sqrt((1.0 - h * h).max(0.0)) * (14.0 + anatomy.fat_mm);
            for x in [-68.0, 68.0] {
                let breast = Ellipse::upright(x, trunk.y - trunk.b + 6.0, 52.0, size);
                canvas.ellipse(&breast.grown(2.0), 25);
                canvas.ellipse(&breast, d.fat);
                canvas.ellipse(
                    &Ellipse::upright(x, breast.y - 0.3 * size, 24.0, 0.4 * size),
                    10,
                );
            }
        }
        canvas.outline(&skin.grown(2.0), |_| 25);
        canvas.outline(&skin, |_| d.fat);
        canvas.outline(&trunk, |_| d.muscle);
        // Fat between the muscles of the trunk and the ribs.
        canvas.outline(
            &Outline {
                a: cavity.a + 14.0,
                b: cavity.b + 10.5,
                ..*cavity
            },
            |_| d.fat + 25,
        );
        canvas.outline(&cavity.grown(8.0), |_| d.muscle - 8);
        for side in [-1.0, 1.0] {
            canvas.ellipse(
                &Ellipse::turned(
                    side * 34.0,
                    cavity.y + anatomy.cavity[1] + 4.0,
                    27.0,
                    15.0,
                    side * 0.15,
                ),
                d.muscle,
            );
            if z > -10.0 {
                let x = side * (anatomy.cavity[0] - 18.0 + 0.12 * z);
                let blade = Ellipse::turned(x, 62.0 - 0.15 * z, 34.0, 3.0, side * -0.75);
                canvas.ellipse(&blade.grown(8.0), d.muscle);
                canvas.ellipse(&blade, 420);
                canvas.ellipse(&blade.grown(-1.2), 180);
            }
        }
    }

    fn lungs(&self, canvas: &mut Canvas, cavity: &Outline) {
        let base = self.anatomy.densities.lung;
        // Dependent lung is denser.
        canvas.outline(cavity, |y| base + round_i32(0.45 * (y + 80.0)));
    }

    fn abdomen(&self, canvas: &mut Canvas, z: f64, cavity: &Outline) {
        let d = &self.anatomy.densities;
        for (x, top, hu) in [
            (-58.0, self.anatomy.dome_z[0], d.liver),
            (60.0, self.anatomy.dome_z[1], d.liver - 15),
        ] {
            let depth = (top - z) / 55.0;
            if depth > 0.0 {
                let s = libm::sqrt(depth);
                canvas.ellipse_within(&Ellipse::upright(x, -5.0, 70.0 * s, 75.0 * s), hu, cavity);
                if x > 0.0 && depth > 0.25 {
                    let stomach = Ellipse::turned(52.0, -22.0, 34.0 * s, 24.0 * s, 0.5);
                    canvas.ellipse_within(&stomach, 20, cavity);
                    canvas.ellipse_within(
                        &Ellipse::turned(50.0, -30.0, 22.0 * s, 12.0 * s, 0.3),
                        -950,
                        cavity,
                    );
                }
            }
        }
    }

    fn ribs(&self, canvas: &mut Canvas, z: f64, cavity: &Outline) {
        let [distance, first] = self.anatomy.ribs;
        if cavity.a < 20.0 {
            return;
        }
        for side in [-1.0, 1.0] {
            for rib in 0..12 {
                // A rib leaves the spine and falls by 75 mm on its way to the front.
                let back = first - distance * f64::from(rib) + side * 2.0;
                let fall = (back - z) / 75.0;
                if !(0.0..=1.0).contains(&fall) {
                    continue;
                }
                let angle = 1.35 - 2.6 * fall;
                let (c, s) = (libm::cos(angle), libm::sin(angle));
                let x = cavity.x + side * (cavity.a + 4.0) * c;
                let y = cavity.y + (cavity.b + 4.0) * s;
                let tangent = libm::atan2((cavity.b + 4.0) * c, -side * (cavity.a + 4.0) * s);
                let is_cartilage = fall > 0.86;
                let shape = Ellipse::turned(x, y, 15.0, 4.4, tangent);
                canvas.ellipse(&shape, if is_cartilage { 110 } else { 620 });
                canvas.ellipse(&shape.grown(-1.6), if is_cartilage { 90 } else { 210 });
            }
        }
        // Sternum.
        if z > -75.0 && z < 85.0 {
            let plate = Ellipse::upright(0.0, cavity.y - cavity.b - 3.0, 17.0 + 0.08 * z, 6.0);
            canvas.ellipse(&plate, 480);
            canvas.ellipse(&plate.grown(-1.8), 150);
        }
    }

    fn spine(&self, canvas: &mut Canvas, z: f64) {
        let y = 62.0 + 0.06 * (z + 20.0);
        let level = (z + 400.0) / 24.0;
        let is_disc = level - libm::floor(level) < 0.2;
        canvas.ellipse(
            &Ellipse::upright(0.0, y + 34.0, 24.0, 15.0),
            self.anatomy.densities.muscle,
        );
        // Arch, spinous and transverse processes.
        canvas.ellipse(&Ellipse::upright(0.0, y + 38.0, 3.6, 17.0), 430);
        for side in [-1.0, 1.0] {
            canvas.ellipse(
                &Ellipse::turned(side * 20.0, y + 24.0, 18.0, 4.2, side * 0.35),
                400,
            );
            canvas.ellipse(
                &Ellipse::turned(side * 20.0, y + 24.0, 15.0, 2.2, side * 0.35),
                180,
            );
        }
        canvas.ellipse(&Ellipse::upright(0.0, y + 22.0, 13.0, 11.0), 450);
        canvas.ellipse(&Ellipse::upright(0.0, y + 22.0, 9.5, 8.0), 25);
        let body = Ellipse::upright(0.0, y, 19.0, 15.0);
        if is_disc {
            canvas.ellipse(&body, 95);
        } else {
            canvas.ellipse(&body, 480);
            canvas.ellipse(&body.grown(-2.2), 190);
        }
    }

    fn mediastinum(&self, canvas: &mut Canvas, z: f64, cavity: &Outline) {
        let d = &self.anatomy.densities;
        let half = self.anatomy.mediastinum_at(z);
        let depth = cavity.b * 0.98;
        // Fat in the middle, narrow at the front, around the spine at the back.
        canvas.ellipse_within(
            &Ellipse::upright(4.0, -8.0, half, depth * 0.75),
            d.fat + 35,
            cavity,
        );
        canvas.ellipse_within(&Ellipse::upright(0.0, 58.0, 23.0, 42.0), d.fat + 70, cavity);
        canvas.ellipse_within(
            &Ellipse::upright(2.0, -cavity.b * 0.72, 13.0, 26.0),
            d.fat + 20,
            cavity,
        );
        // Thymic and nodal tissue, oesophagus.
        canvas.ellipse_within(
            &Ellipse::upright(2.0, 4.0, half * 0.72, depth * 0.42),
            5,
            cavity,
        );
        canvas.ellipse(&Ellipse::upright(5.0, 40.0, 9.0, 6.0), 38);
        canvas.ellipse(&Ellipse::upright(5.0, 40.0, 2.5, 1.5), -350);
    }

    fn heart(&self, canvas: &mut Canvas, z: f64) {
        let d = &self.anatomy.densities;
        let Some([x, y, a, b]) = self.anatomy.heart_at(z) else {
            return;
        };
        let turn = -0.62;
        canvas.ellipse(&Ellipse::turned(x, y, a + 5.0, b + 5.0, turn), d.fat + 15);
        let muscle = 60 + (d.left_heart - 60) / 6;
        canvas.ellipse(&Ellipse::turned(x, y, a, b, turn), muscle);
        let (c, s) = (libm::cos(turn), libm::sin(turn));
        // Along the axis (to the apex) and across it (to the left ventricle).
        let at = |along: f64, across: f64| (x + along * c - across * s, y + along * s + across * c);
        let g = self.anatomy.heart;
        let h = (z + 60.0) / (36.0 * g);
        if h.abs() < 1.0 {
            let share = libm::sqrt(1.0 - h * h);
            let ratio = self.anatomy.rv_lv_ratio;
            let inside = 2.0 * 47.0 * g - 21.0;
            let left = inside / (2.0 * (1.0 + ratio));
            let right = ratio * left;
            let (lx, ly) = at(10.0, 47.0 * g - 9.0 - left);
            let (rx, ry) = at(6.0, -47.0 * g + 3.0 + right);
            canvas.ellipse(
                &Ellipse::turned(rx, ry, 42.0 * g * share, right * share, turn - 0.12),
                d.right_heart,
            );
            canvas.ellipse(
                &Ellipse::turned(lx, ly, 40.0 * g * share, left * share, turn),
                d.left_heart,
            );
        }
        let atrium = (z + 48.0) / 32.0;
        if atrium.abs() < 1.0 {
            let share = libm::sqrt(1.0 - atrium * atrium);
            canvas.ellipse(
                &Ellipse::turned(x - 46.0, y + 10.0, 21.0 * share, 27.0 * share, 0.2),
                d.right_heart,
            );
        }
    }

    fn great_vessels(&self, canvas: &mut Canvas, z: f64) {
        let d = &self.anatomy.densities;
        let atrium = (z + 24.0) / 21.0;
        if atrium.abs() < 1.0 {
            let share = libm::sqrt(1.0 - atrium * atrium);
            canvas.ellipse(
                &Ellipse::upright(3.0, 16.0, 31.0 * share, 16.0 * share),
                d.left_heart,
            );
        }
        let tube = |from, to, r0, r1| Tube {
            from,
            to,
            radius: [r0, r1],
        };
        let aorta = [
            tube([2.0, -18.0, -32.0], [-15.0, -20.0, 0.0], 14.0, 16.0),
            tube([-15.0, -20.0, 0.0], [-14.0, -14.0, 38.0], 16.0, 15.0),
            tube([-14.0, -14.0, 38.0], [2.0, 4.0, 54.0], 15.0, 13.5),
            tube([2.0, 4.0, 54.0], [22.0, 38.0, 46.0], 13.5, 12.5),
            tube([22.0, 38.0, 46.0], [25.0, 47.0, 20.0], 12.5, 12.0),
            tube([25.0, 47.0, 20.0], [23.0, 49.0, -60.0], 12.0, 11.5),
            tube([23.0, 49.0, -60.0], [8.0, 44.0, -150.0], 11.5, 10.0),
        ];
        for part in &aorta {
            canvas.tube(
                &Tube {
                    radius: part.radius.map(|r| r + 1.2),
                    ..*part
                },
                z,
                45,
                0.0,
                1.0,
            );
        }
        for part in &aorta {
            canvas.tube(part, z, d.aorta, 0.0, 1.0);
        }
        // Branches of the arch, brachiocephalic veins, superior vena cava, azygos vein.
        for (part, hu) in [
            (
                tube([-8.0, -8.0, 52.0], [-20.0, -2.0, 110.0], 6.0, 4.5),
                d.aorta,
            ),
            (
                tube([4.0, 4.0, 54.0], [12.0, 6.0, 110.0], 4.2, 3.6),
                d.aorta,
            ),
            (
                tube([14.0, 18.0, 52.0], [24.0, 18.0, 110.0], 4.8, 4.2),
                d.aorta,
            ),
            (
                tube([-26.0, -16.0, 62.0], [-30.0, -14.0, -20.0], 8.5, 9.5),
                d.vena_cava,
            ),
            (
                tube([-26.0, -16.0, 62.0], [-38.0, -14.0, 112.0], 8.0, 6.5),
                d.vena_cava,
            ),
            (
                tube([-26.0, -18.0, 60.0], [34.0, -22.0, 80.0], 6.0, 6.0),
                45 + (d.vena_cava - 45) / 3,
            ),
            (tube([-5.0, 50.0, 28.0], [-5.0, 52.0, -140.0], 3.6, 3.0), 50),
        ] {
            canvas.tube(&part, z, hu, 0.0, 1.0);
        }
    }

    fn trees(&self, canvas: &mut Canvas, z: f64) {
        let d = &self.anatomy.densities;
        for branch in &self.airways.branches {
            let wall = Tube {
                radius: branch.tube.radius.map(|r| r + 1.3),
                ..branch.tube
            };
            canvas.tube(&wall, z, 15, 0.0, 1.0);
        }
        for branch in &self.airways.branches {
            canvas.tube(&branch.tube, z, -960, 0.0, 1.0);
        }
        for branch in &self.veins.branches {
            canvas.tube(&branch.tube, z, d.vein, 0.0, 1.0);
        }
        for branch in self.arteries.branches.iter().rev() {
            if branch.region <= Region::Lobar {
                let wall = Tube {
                    radius: branch.tube.radius.map(|r| r + 1.0),
                    ..branch.tube
                };
                canvas.tube(&wall, z, 40, 0.0, 1.0);
            }
        }
        for branch in &self.arteries.branches {
            canvas.tube(&branch.tube, z, d.artery, 0.0, 1.0);
        }
    }

    fn streaks(&self, canvas: &mut Canvas, z: f64) {
        if self.streak_hu == 0 || !(-20.0..=70.0).contains(&z) {
            return;
        }
        // Fixed for a slice, different on the next one.
        let mut random = Random::new(self.texture, 77 ^ u64::from_le_bytes(z.to_le_bytes()));
        let centre = [-28.0, -15.0, z];
        for _ in 0..14 {
            let angle = random.range(0.0, core::f64::consts::TAU);
            let reach = random.range(25.0, 75.0);
            let tip = [
                centre[0] + reach * libm::cos(angle),
                centre[1] + reach * libm::sin(angle),
                z,
            ];
            let hu = round_i32(f64::from(self.streak_hu) * random.range(-1.0, 0.8));
            canvas.add_tube(
                &Tube {
                    from: centre,
                    to: tip,
                    radius: [1.6, 0.5],
                },
                z,
                hu,
                2.0,
            );
        }
    }
}

/// Uneven tissue: smooth noise, stronger in the lung, nothing in the air outside.
fn texture(canvas: &mut Canvas, seed: u64, z: f64) {
    let side = canvas.side();
    let cell = (side / 64).max(2);
    let n = side / cell + 2;
    let layer = round_i32(z * 0.5);
    let seed = scatter(seed ^ u64::from(layer.cast_unsigned()));
    let node = |row: usize, column: usize| {
        let bits = scatter(seed ^ ((row * 4096 + column) as u64));
        (bits % 33) as i32 - 16
    };
    let mut above: Vec<i32> = (0..n).map(|column| node(0, column)).collect();
    let mut below: Vec<i32> = (0..n).map(|column| node(1, column)).collect();
    let whole = i32::try_from(cell).unwrap_or(1);
    for (row, line) in canvas.pixels_mut().chunks_exact_mut(side).enumerate() {
        if row > 0 && row.is_multiple_of(cell) {
            core::mem::swap(&mut above, &mut below);
            for (column, value) in below.iter_mut().enumerate() {
                *value = node(row / cell + 1, column);
            }
        }
        let v = i32::try_from(row % cell).unwrap_or(0);
        for (column, chunk) in line.chunks_mut(cell).enumerate() {
            let left = above[column] * (whole - v) + below[column] * v;
            let right = above[column + 1] * (whole - v) + below[column + 1] * v;
            let mut value = left * whole;
            for pixel in chunk {
                let hu = i32::from(*pixel);
                if hu > -980 {
                    let noise = value / (whole * whole);
                    *pixel = narrow(hu + if hu < -300 { 2 * noise } else { noise / 2 });
                }
                value += right - left;
            }
        }
    }
}
