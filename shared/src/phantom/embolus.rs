//! Emboli: filling defects placed in the arterial tree.
//!
//! An acute embolus lies inside the lumen and leaves a rim of contrast; a large one fills it. A chronic one sticks to the wall, so
//! that the open lumen is narrow and eccentric. Each is a chain of tubes that follows the artery.

use alloc::vec::Vec;

use super::canvas::{Point, Tube, mix};
use super::random::Random;
use super::vessels::{Region, Side, Tree};

/// One stretch of an embolus.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) thrombus: Tube,
    /// What stays open beside a chronic embolus; painted after the thrombus.
    pub(super) open: Option<Tube>,
}

/// One embolus.
#[derive(Clone, Debug)]
pub(super) struct Embolus {
    pub(super) pieces: Vec<Piece>,
    pub(super) region: Region,
    pub(super) side: Side,
    pub(super) is_chronic: bool,
    pub(super) hu: i32,
}

/// A stretch counts as visible where the plane comes nearer to its axis than this share of its radius.
const VISIBLE_SHARE: f64 = 0.7;

impl Embolus {
    /// Middle of the part that the plane `z` shows, or nothing where it shows nothing.
    pub(super) fn centre_in(&self, z: f64) -> Option<Point> {
        let (mut sum, mut weight) = ([0.0; 2], 0.0);
        for piece in &self.pieces {
            let tube = &piece.thrombus;
            if !tube.touches(z, VISIBLE_SHARE) {
                continue;
            }
            let dz = tube.to[2] - tube.from[2];
            let t = if dz.abs() > 0.5 {
                ((z - tube.from[2]) / dz).clamp(0.0, 1.0)
            } else {
                0.5
            };
            let (point, radius) = (tube.at(t), tube.radius_at(t));
            sum[0] += radius * point[0];
            sum[1] += radius * point[1];
            weight += radius;
        }
        (weight > 0.0).then(|| [sum[0] / weight, sum[1] / weight, z])
    }
}

/// The emboli of a positive study: at least one, and at least one of them visible.
pub(super) fn emboli(arteries: &Tree, planes: &[f64], random: &mut Random) -> Vec<Embolus> {
    let (is_chronic, is_mixed) = match random.unit() {
        u if u < 0.13 => (true, false),
        u if u < 0.20 => (false, true),
        _ => (false, false),
    };
    let mut wishes = Vec::new();
    if random.chance(0.65) {
        wishes.push((
            true,
            if random.chance(0.5) {
                Side::Left
            } else {
                Side::Right
            },
        ));
    }
    for (side, probability) in [(Side::Left, 0.5), (Side::Right, 0.6)] {
        if random.chance(probability) {
            wishes.push((false, side));
        }
    }
    if wishes.is_empty() || (is_mixed && wishes.len() < 2) {
        wishes.push((false, Side::Right));
        wishes.push((false, Side::Left));
    }
    let turn = random.below(wishes.len());
    wishes.rotate_left(turn);
    let mut found = Vec::new();
    for (index, (is_central, side)) in wishes.into_iter().enumerate() {
        let is_chronic = is_chronic || (is_mixed && index % 2 == 1);
        found.extend(place(
            Wish {
                is_central,
                side,
                is_chronic,
            },
            arteries,
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
            found.extend(place(
                Wish {
                    is_central,
                    side,
                    is_chronic: false,
                },
                arteries,
                planes,
                random,
            ));
        }
    }
    // No study is full of emboli: at most three slices in ten show one.
    while found.len() > 1 && n_visible(&found, planes) * 10 > planes.len() * 3 {
        found.pop();
    }
    found
}

/// On how many planes at least one of the emboli is visible.
fn n_visible(emboli: &[Embolus], planes: &[f64]) -> usize {
    let shows = |&&z: &&f64| emboli.iter().any(|embolus| embolus.centre_in(z).is_some());
    planes.iter().filter(shows).count()
}

/// What is asked of an embolus.
#[derive(Clone, Copy, Debug)]
struct Wish {
    is_central: bool,
    side: Side,
    is_chronic: bool,
}

/// An embolus as wished that at least one of the planes `z` shows; nothing where a few throws missed.
fn place(wish: Wish, arteries: &Tree, planes: &[f64], random: &mut Random) -> Option<Embolus> {
    let fits = |index: &usize| {
        let branch = &arteries.branches[*index];
        let place = if wish.is_central {
            branch.region == Region::Central
        } else {
            branch.side == wish.side && branch.region == Region::Lobar
        };
        place && planes.iter().any(|&z| branch.tube.touches(z, 0.5))
    };
    let candidates: Vec<usize> = (0..arteries.branches.len()).filter(fits).collect();
    for _ in 0..12 {
        let start = *candidates.get(random.below(candidates.len()))?;
        let embolus = follow(start, wish, arteries, random);
        if planes.iter().any(|&z| embolus.centre_in(z).is_some()) {
            return Some(embolus);
        }
    }
    None
}

/// The embolus that begins in the branch `start` and follows the widest way down.
fn follow(start: usize, wish: Wish, arteries: &Tree, random: &mut Random) -> Embolus {
    let first = arteries.branches[start];
    let wanted = match first.region {
        Region::Central => random.range(35.0, 65.0),
        // Emboli begin in lobar arteries or above; see [`place`].
        _ => random.range(20.0, 40.0),
    };
    // A chronic one lines the wall; an acute one fills the lumen, or leaves the rim of contrast that makes the picture of a mint with a hole.
    let fill = if wish.is_chronic {
        1.0
    } else if random.chance(0.15) {
        0.95
    } else {
        random.range(0.5, 0.75)
    };
    let direction = {
        let angle = random.range(0.0, core::f64::consts::TAU);
        [libm::cos(angle), libm::sin(angle), 0.0]
    };
    let hu = if wish.is_chronic {
        random.range(55.0, 85.0)
    } else {
        random.range(35.0, 75.0)
    };
    let mut embolus = Embolus {
        pieces: Vec::new(),
        region: first.region,
        side: first.side,
        is_chronic: wish.is_chronic,
        hu: super::canvas::round_i32(hu),
    };
    let (mut index, mut left) = (Some(start), wanted);
    let mut begin = random.range(0.0, 0.5);
    while let Some(branch_index) = index.filter(|_| left > 0.5) {
        let tube = arteries.branches[branch_index].tube;
        let length = tube.length();
        let end = (begin + left / length.max(0.1)).min(1.0);
        left -= (end - begin) * length;
        let is_last = left <= 0.5;
        push_pieces(
            &mut embolus,
            &tube,
            [begin, end],
            fill,
            direction,
            is_last,
            random,
        );
        index = arteries.widest_child(branch_index);
        begin = 0.0;
    }
    embolus
}

/// Cuts `[begin, end]` of a tube into stretches of uneven width.
fn push_pieces(
    embolus: &mut Embolus,
    tube: &Tube,
    [begin, end]: [f64; 2],
    fill: f64,
    direction: Point,
    is_last: bool,
    random: &mut Random,
) {
    let n = 1 + super::canvas::round_i32((end - begin) * tube.length() / 7.0).clamp(0, 9);
    let mut width = random.range(0.9, 1.0);
    for step in 0..n {
        let t0 = begin + (end - begin) * f64::from(step) / f64::from(n);
        let t1 = begin + (end - begin) * f64::from(step + 1) / f64::from(n);
        let next = if is_last && step + 1 == n {
            0.5
        } else {
            random.range(0.8, 1.0)
        };
        let (r0, r1) = (tube.radius_at(t0), tube.radius_at(t1));
        let (from, to) = (tube.at(t0), tube.at(t1));
        embolus.pieces.push(if embolus.is_chronic {
            let open = 0.62;
            let shift = |point: Point, radius: f64| {
                let aside = [point[0] + direction[0], point[1] + direction[1], point[2]];
                mix(point, aside, (1.0 - open) * radius)
            };
            Piece {
                thrombus: Tube {
                    from,
                    to,
                    radius: [r0, r1],
                },
                open: Some(Tube {
                    from: shift(from, r0),
                    to: shift(to, r1),
                    radius: [open * r0, open * r1],
                }),
            }
        } else {
            // A little off the axis, but inside the lumen.
            let aside = |point: Point, radius: f64, share: f64| {
                let away = 0.6 * (1.0 - fill * share) * radius;
                [
                    point[0] + away * direction[0],
                    point[1] + away * direction[1],
                    point[2],
                ]
            };
            let radius = [fill * width * r0, fill * next * r1];
            Piece {
                thrombus: Tube {
                    from: aside(from, r0, width),
                    to: aside(to, r1, next),
                    radius,
                },
                open: None,
            }
        });
        width = next;
    }
}
