//! The slice being painted: Hounsfield units on a square grid, with the few shapes from which the chest is built.
//!
//! Shapes are given in the model's millimetres (x to the patient's left, y to the back). Each row has its own origin, so that a
//! smooth sideways warp of the whole body costs nothing. Edges are blended by the covered share of a pixel; vertical edges of
//! filled shapes are smoothed later by the scanner's point spread.

use alloc::vec;
use alloc::vec::Vec;

/// A point or a direction in the model: x to the left, y to the back, z to the head, in millimetres.
pub(super) type Point = [f64; 3];

/// An ellipse in the plane of the slice, turned by an angle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ellipse {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Half axis that lies along x before turning, in mm.
    pub(super) a: f64,
    /// Half axis that lies along y before turning, in mm.
    pub(super) b: f64,
    /// Cosine and sine of the turn.
    pub(super) turn: [f64; 2],
}

impl Ellipse {
    pub(super) const fn upright(x: f64, y: f64, a: f64, b: f64) -> Self {
        Self {
            x,
            y,
            a,
            b,
            turn: [1.0, 0.0],
        }
    }

    pub(super) fn turned(x: f64, y: f64, a: f64, b: f64, radians: f64) -> Self {
        Self {
            x,
            y,
            a,
            b,
            turn: [libm::cos(radians), libm::sin(radians)],
        }
    }

    pub(super) fn grown(self, mm: f64) -> Self {
        Self {
            a: self.a + mm,
            b: self.b + mm,
            ..self
        }
    }

    /// The chord at `y`: from, to.
    fn chord(&self, y: f64) -> Option<[f64; 2]> {
        if self.a <= 0.1 || self.b <= 0.1 {
            return None;
        }
        let [c, s] = self.turn;
        let v = y - self.y;
        let (ia, ib) = (1.0 / (self.a * self.a), 1.0 / (self.b * self.b));
        // u = dx*c + v*s, w = -dx*s + v*c; u^2/a^2 + w^2/b^2 = 1
        let p = c * c * ia + s * s * ib;
        let q = v * c * s * (ia - ib);
        let r = v * v * (s * s * ia + c * c * ib) - 1.0;
        let d = q * q - p * r;
        if d <= 0.0 {
            return None;
        }
        let root = libm::sqrt(d);
        Some([self.x + (-q - root) / p, self.x + (-q + root) / p])
    }

    fn half_height(&self) -> f64 {
        let [c, s] = self.turn;
        libm::sqrt(self.a * self.a * s * s + self.b * self.b * c * c)
    }
}

/// A tapered tube with round ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tube {
    pub(super) from: Point,
    pub(super) to: Point,
    /// Radius at `from` and at `to`, in mm.
    pub(super) radius: [f64; 2],
}

impl Tube {
    /// Whether the tube's axis comes closer to the plane `z` than `share` of its larger radius.
    pub(super) fn touches(&self, z: f64, share: f64) -> bool {
        let reach = share * self.radius[0].max(self.radius[1]);
        let low = self.from[2].min(self.to[2]);
        let high = self.from[2].max(self.to[2]);
        z >= low - reach && z <= high + reach
    }

    pub(super) fn length(&self) -> f64 {
        length(subtract(self.to, self.from))
    }

    /// The axis at `t` in 0..=1.
    pub(super) fn at(&self, t: f64) -> Point {
        mix(self.from, self.to, t)
    }

    pub(super) fn radius_at(&self, t: f64) -> f64 {
        self.radius[0] + (self.radius[1] - self.radius[0]) * t
    }
}

pub(super) fn subtract(a: Point, b: Point) -> Point {
    [a[0] - b[0], a[1] - b[1], a[2] - b[2]]
}

pub(super) fn mix(a: Point, b: Point, t: f64) -> Point {
    [
        a[0] + (b[0] - a[0]) * t,
        a[1] + (b[1] - a[1]) * t,
        a[2] + (b[2] - a[2]) * t,
    ]
}

pub(super) fn length(a: Point) -> f64 {
    libm::sqrt(a[0] * a[0] + a[1] * a[1] + a[2] * a[2])
}

/// The nearest whole number, saturating.
pub(super) fn round_i32(value: f64) -> i32 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "float to integer casts saturate"
    )]
    let whole = libm::floor(value + 0.5) as i32;
    whole
}

/// The slice being painted.
#[derive(Clone, Debug)]
pub(super) struct Canvas {
    side: usize,
    hu: Vec<i16>,
    /// Model x of the centre of column 0, for each row.
    x_first: Vec<f64>,
    /// Model y of the centre of row 0.
    y_first: f64,
    /// Size of a pixel in the model, x and y.
    pixel: [f64; 2],
}

impl Canvas {
    /// A canvas of `side * side` pixels, all `hu`. `pixel` is the size of a pixel in mm of the model.
    pub(super) fn new(
        side: usize,
        hu: i16,
        pixel: [f64; 2],
        y_first: f64,
        x_first: Vec<f64>,
    ) -> Self {
        Self {
            side,
            hu: vec![hu; side * side],
            x_first,
            y_first,
            pixel,
        }
    }

    pub(super) const fn side(&self) -> usize {
        self.side
    }

    pub(super) fn into_hu(self) -> Vec<i16> {
        self.hu
    }

    /// Rows whose centres lie in `[low, high]` mm, widened by one.
    fn rows(&self, low: f64, high: f64) -> core::ops::Range<usize> {
        let first = round_i32((low - self.y_first) / self.pixel[1])
            .saturating_sub(1)
            .max(0);
        let last = round_i32((high - self.y_first) / self.pixel[1])
            .saturating_add(2)
            .max(0);
        let first = usize::try_from(first).unwrap_or(0).min(self.side);
        first..usize::try_from(last).unwrap_or(0).clamp(first, self.side)
    }

    fn y(&self, row: usize) -> f64 {
        self.y_first + self.pixel[1] * row as f64
    }

    /// Fills `[from, to]` mm of one row with a linear ramp of HU, blending the end pixels.
    pub(super) fn span(&mut self, row: usize, from: f64, to: f64, hu: i32) {
        let last = self.side as f64 - 0.5;
        let from = ((from - self.x_first[row]) / self.pixel[0]).clamp(-0.5, last);
        let to = ((to - self.x_first[row]) / self.pixel[0]).clamp(-0.5, last);
        if to <= from {
            return;
        }
        let (first, end) = (round_i32(from), round_i32(to));
        let line = &mut self.hu[row * self.side..(row + 1) * self.side];
        let (Ok(first_column), Ok(end_column)) = (usize::try_from(first), usize::try_from(end))
        else {
            return;
        };
        let end_column = end_column.min(line.len() - 1);
        if first_column >= end_column {
            blend(&mut line[end_column], hu, round_i32((to - from) * 256.0));
            return;
        }
        blend(
            &mut line[first_column],
            hu,
            round_i32((f64::from(first) + 0.5 - from) * 256.0),
        );
        blend(
            &mut line[end_column],
            hu,
            round_i32((to - f64::from(end) + 0.5) * 256.0),
        );
        line[first_column + 1..end_column].fill(narrow(hu));
    }

    /// Fills an ellipse.
    pub(super) fn ellipse(&mut self, ellipse: &Ellipse, hu: i32) {
        self.ellipse_within(ellipse, hu, &Outline::EVERYWHERE);
    }

    /// Fills the part of an ellipse that lies inside an outline.
    pub(super) fn ellipse_within(&mut self, ellipse: &Ellipse, hu: i32, clip: &Outline) {
        let half = ellipse.half_height();
        for row in self.rows(ellipse.y - half, ellipse.y + half) {
            let y = self.y(row);
            if let (Some([from, to]), Some([left, right])) = (ellipse.chord(y), clip.chord(y)) {
                self.span(row, from.max(left), to.min(right), hu);
            }
        }
    }

    /// Fills an outline; `hu` gives the value for each y.
    pub(super) fn outline(&mut self, outline: &Outline, hu: impl Fn(f64) -> i32) {
        for row in self.rows(outline.y - outline.b, outline.y + outline.b) {
            let y = self.y(row);
            if let Some([from, to]) = outline.chord(y) {
                self.span(row, from, to, hu(y));
            }
        }
    }

    /// Fills where the plane `z` cuts the tube. `softness` is the width of its edge in mm (at least a pixel is used),
    /// `strength` the opacity in 0..=1.
    pub(super) fn tube(&mut self, tube: &Tube, z: f64, hu: i32, softness: f64, strength: f64) {
        self.over_tube(tube, z, softness, |pixel, cover| {
            blend(pixel, hu, round_i32(cover * strength * 256.0))
        });
    }

    /// Adds `hu` where the plane `z` cuts the tube.
    pub(super) fn add_tube(&mut self, tube: &Tube, z: f64, hu: i32, softness: f64) {
        self.over_tube(tube, z, softness, |pixel, cover| {
            *pixel = narrow(i32::from(*pixel) + round_i32(f64::from(hu) * cover));
        });
    }

    /// Visits every pixel that the tube covers in the plane `z`, with the covered share.
    fn over_tube(
        &mut self,
        tube: &Tube,
        z: f64,
        softness: f64,
        mut visit: impl FnMut(&mut i16, f64),
    ) {
        let edge = softness.max(0.5 * (self.pixel[0] + self.pixel[1]));
        let largest = tube.radius[0].max(tube.radius[1]) + 0.5 * edge;
        if !tube.touches(
            z,
            1.0 + 0.5 * edge / tube.radius[0].max(tube.radius[1]).max(0.1),
        ) {
            return;
        }
        let axis = subtract(tube.to, tube.from);
        let squared = (axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2]).max(1e-9);
        // The stretch of the axis that is near enough to the plane bounds the pixels to visit.
        let (t0, t1) = if axis[2].abs() > 1e-6 {
            let p = (z - largest - tube.from[2]) / axis[2];
            let q = (z + largest - tube.from[2]) / axis[2];
            (p.min(q).clamp(0.0, 1.0), p.max(q).clamp(0.0, 1.0))
        } else {
            (0.0, 1.0)
        };
        let (p, q) = (tube.at(t0), tube.at(t1));
        let (left, right) = (p[0].min(q[0]) - largest, p[0].max(q[0]) + largest);
        let dz = z - tube.from[2];
        let inverse_edge = 1.0 / edge;
        for row in self.rows(p[1].min(q[1]) - largest, p[1].max(q[1]) + largest) {
            let dy = self.y(row) - tube.from[1];
            let x_first = self.x_first[row];
            let first = round_i32((left - x_first) / self.pixel[0]).max(0);
            let end = round_i32((right - x_first) / self.pixel[0])
                .saturating_add(1)
                .max(0);
            let first = usize::try_from(first).unwrap_or(0).min(self.side);
            let end = usize::try_from(end).unwrap_or(0).clamp(first, self.side);
            let line = &mut self.hu[row * self.side + first..row * self.side + end];
            let mut dx = x_first + self.pixel[0] * first as f64 - tube.from[0];
            for pixel in line {
                let t = ((dx * axis[0] + dy * axis[1] + dz * axis[2]) / squared).clamp(0.0, 1.0);
                let (ex, ey, ez) = (dx - t * axis[0], dy - t * axis[1], dz - t * axis[2]);
                let distance = ex * ex + ey * ey + ez * ez;
                let radius = tube.radius_at(t);
                let reach = radius + 0.5 * edge;
                if distance < reach * reach {
                    let cover =
                        ((radius - libm::sqrt(distance)) * inverse_edge + 0.5).clamp(0.0, 1.0);
                    visit(pixel, cover);
                }
                dx += self.pixel[0];
            }
        }
    }

    /// Fills a rectangle around x = 0: from the y `top` to `bottom`, `half` mm to both sides.
    pub(super) fn band(&mut self, top: f64, bottom: f64, half: f64, hu: i32) {
        for row in self.rows(top, bottom) {
            let y = self.y(row);
            if y >= top - 0.5 * self.pixel[1] && y <= bottom + 0.5 * self.pixel[1] {
                self.span(row, -half, half, hu);
            }
        }
    }

    /// All pixels, `[row, column]`.
    pub(super) fn pixels_mut(&mut self) -> &mut [i16] {
        &mut self.hu
    }
}

/// A superellipse |x/a|^p + |y/b|^p = 1, upright, with a wavy side: the body's and the chest cavity's outline.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outline {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) a: f64,
    pub(super) b: f64,
    pub(super) power: f64,
    /// Amplitude in mm, wave number in 1/mm and phase of a wave on the left and on the right side.
    pub(super) wave: [f64; 3],
}

impl Outline {
    pub(super) const EVERYWHERE: Self = Self {
        x: 0.0,
        y: 0.0,
        a: 0.0,
        b: 0.0,
        power: 0.0,
        wave: [0.0; 3],
    };

    pub(super) fn grown(self, mm: f64) -> Self {
        Self {
            a: self.a + mm,
            b: self.b + mm,
            ..self
        }
    }

    /// The chord at `y`: from, to.
    pub(super) fn chord(&self, y: f64) -> Option<[f64; 2]> {
        if self.power <= 0.0 {
            return Some([-1e6, 1e6]);
        }
        let v = ((y - self.y) / self.b).abs();
        if v >= 1.0 || self.a <= 0.1 {
            return None;
        }
        let half = self.a * libm::pow(1.0 - libm::pow(v, self.power), 1.0 / self.power);
        let [amplitude, number, phase] = self.wave;
        let shift = amplitude * (1.0 - v);
        let left = half + shift * libm::sin(number * y + phase);
        let right = half + shift * libm::sin(number * y + 1.7 * phase + 1.0);
        Some([self.x - left, self.x + right])
    }
}

/// Moves a pixel towards `hu` by `share`/256.
fn blend(pixel: &mut i16, hu: i32, share: i32) {
    let old = i32::from(*pixel);
    *pixel = narrow(old + (((hu - old) * share.clamp(0, 256)) >> 8));
}

/// Saturates to 16 bits.
pub(super) fn narrow(hu: i32) -> i16 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "clamped to the range of i16"
    )]
    let hu = hu.clamp(-32_768, 32_767) as i16;
    hu
}
