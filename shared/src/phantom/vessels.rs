//! The pulmonary arteries, the pulmonary veins and the airways as trees of tapered tubes.
//!
//! A tree's central part follows landmarks of the anatomy; its periphery grows towards targets that are scattered in the lung:
//! a branch runs towards the middle of its targets, then splits them between two children. Radii follow Murray's law.

use alloc::vec::Vec;

use super::anatomy::Anatomy;
use super::canvas::{Point, Tube, mix, subtract};
use super::random::Random;

/// How central a branch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Region {
    /// Trunk and main pulmonary arteries.
    Central,
    /// Interlobar and lobar arteries.
    Lobar,
    /// Segmental arteries.
    Segmental,
    /// Anything finer.
    Subsegmental,
}

/// The side of the patient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Left,
    Right,
}

/// One tube of a tree.
#[derive(Clone, Copy, Debug)]
pub(super) struct Branch {
    pub(super) tube: Tube,
    /// Index of the branch that this one continues.
    pub(super) parent: Option<usize>,
    pub(super) region: Region,
    pub(super) side: Side,
}

/// Branches, each after its parent.
#[derive(Clone, Debug, Default)]
pub(super) struct Tree {
    pub(super) branches: Vec<Branch>,
}

impl Tree {
    fn push(&mut self, branch: Branch) -> usize {
        self.branches.push(branch);
        self.branches.len() - 1
    }

    /// A chain of tubes along points, each with its radius. Returns the last branch's index.
    fn path(
        &mut self,
        points: &[(Point, f64)],
        parent: Option<usize>,
        region: Region,
        side: Side,
    ) -> Option<usize> {
        let mut last = parent;
        for pair in points.windows(2) {
            let tube = Tube {
                from: pair[0].0,
                to: pair[1].0,
                radius: [pair[0].1, pair[1].1],
            };
            last = Some(self.push(Branch {
                tube,
                parent: last,
                region,
                side,
            }));
        }
        last
    }

    /// The widest child of a branch.
    pub(super) fn widest_child(&self, index: usize) -> Option<usize> {
        let children = self
            .branches
            .iter()
            .enumerate()
            .skip(index + 1)
            .filter(|(_, branch)| branch.parent == Some(index));
        children
            .max_by(|a, b| a.1.tube.radius[0].total_cmp(&b.1.tube.radius[0]))
            .map(|(child, _)| child)
    }
}

/// Smallest radius that is still drawn, in mm.
const FINEST_MM: f64 = 0.55;

/// The arteries of a chest.
pub(super) fn arteries(anatomy: &Anatomy, random: &mut Random) -> Tree {
    let mut tree = Tree::default();
    let mut near = |x: f64, y: f64, z: f64| anatomy.near([x, y, z], 2.5, random);
    let w = anatomy.artery_width;
    let outflow = near(20.0, -40.0, -30.0);
    let trunk = near(17.0, -27.0, -5.0);
    let fork = near(10.0, -8.0, 12.0);
    let left_main = near(32.0, 5.0, 19.0);
    let left_hilum = near(46.0, 18.0, 12.0);
    let left_low = near(47.0, 25.0, -14.0);
    let left_base = near(48.0, 33.0, -52.0);
    let left_up = near(50.0, -4.0, 40.0);
    let right_main = near(-12.0, 0.0, 10.0);
    let right_hilum = near(-36.0, 6.0, 5.0);
    let right_low = near(-47.0, 15.0, -14.0);
    let right_base = near(-48.0, 29.0, -54.0);
    let right_up = near(-49.0, -2.0, 40.0);
    let stem = tree.path(
        &[(outflow, 13.0 * w), (trunk, 13.5 * w), (fork, 13.0 * w)],
        None,
        Region::Central,
        Side::Left,
    );
    let left = tree.path(
        &[
            (fork, 11.5 * w),
            (left_main, 10.5 * w),
            (left_hilum, 9.5 * w),
        ],
        stem,
        Region::Central,
        Side::Left,
    );
    let left_inter = tree.path(
        &[(left_hilum, 8.6 * w), (left_low, 7.4 * w)],
        left,
        Region::Lobar,
        Side::Left,
    );
    let left_lower = tree.path(
        &[(left_low, 7.0 * w), (left_base, 5.6 * w)],
        left_inter,
        Region::Lobar,
        Side::Left,
    );
    let left_upper = tree.path(
        &[(left_main, 6.5 * w), (left_up, 5.2 * w)],
        left,
        Region::Lobar,
        Side::Left,
    );
    let right = tree.path(
        &[
            (fork, 11.5 * w),
            (right_main, 11.0 * w),
            (right_hilum, 10.0 * w),
        ],
        stem,
        Region::Central,
        Side::Right,
    );
    let right_inter = tree.path(
        &[(right_hilum, 8.8 * w), (right_low, 7.6 * w)],
        right,
        Region::Lobar,
        Side::Right,
    );
    let right_lower = tree.path(
        &[(right_low, 7.2 * w), (right_base, 5.8 * w)],
        right_inter,
        Region::Lobar,
        Side::Right,
    );
    let right_upper = tree.path(
        &[(right_hilum, 6.8 * w), (right_up, 5.4 * w)],
        right,
        Region::Lobar,
        Side::Right,
    );
    let lobes = [
        (left_upper, Side::Left, Lobe::Upper),
        (left_inter, Side::Left, Lobe::Middle),
        (left_lower, Side::Left, Lobe::Lower),
        (right_upper, Side::Right, Lobe::Upper),
        (right_inter, Side::Right, Lobe::Middle),
        (right_lower, Side::Right, Lobe::Lower),
    ];
    grow_lobes(&mut tree, &lobes, anatomy, random);
    tree
}

/// The pulmonary veins, which end in the left atrium.
pub(super) fn veins(anatomy: &Anatomy, random: &mut Random) -> Tree {
    let mut tree = Tree::default();
    let mut near = |x: f64, y: f64, z: f64| anatomy.near([x, y, z], 2.5, random);
    let roots = [
        (
            near(22.0, 8.0, -12.0),
            near(44.0, -10.0, 6.0),
            Side::Left,
            Lobe::Upper,
        ),
        (
            near(22.0, 20.0, -28.0),
            near(42.0, 38.0, -36.0),
            Side::Left,
            Lobe::Lower,
        ),
        (
            near(-16.0, 6.0, -12.0),
            near(-42.0, -8.0, 2.0),
            Side::Right,
            Lobe::Upper,
        ),
        (
            near(-16.0, 20.0, -28.0),
            near(-40.0, 36.0, -38.0),
            Side::Right,
            Lobe::Lower,
        ),
        (
            near(-18.0, 6.0, -18.0),
            near(-46.0, -14.0, -22.0),
            Side::Right,
            Lobe::Middle,
        ),
        (
            near(22.0, 6.0, -16.0),
            near(48.0, -16.0, -18.0),
            Side::Left,
            Lobe::Middle,
        ),
    ];
    let mut lobes = Vec::new();
    for (atrium, hilum, side, lobe) in roots {
        let width = if lobe == Lobe::Middle { 4.0 } else { 6.2 };
        lobes.push((
            tree.path(
                &[(atrium, width), (hilum, 0.85 * width)],
                None,
                Region::Lobar,
                side,
            ),
            side,
            lobe,
        ));
    }
    grow_lobes(&mut tree, &lobes, anatomy, random);
    tree
}

/// Trachea, main and lobar bronchi (radius of the lumen).
pub(super) fn airways(anatomy: &Anatomy, random: &mut Random) -> Tree {
    let mut tree = Tree::default();
    let mut near = |x: f64, y: f64, z: f64| anatomy.near([x, y, z], 1.5, random);
    let top = near(0.0, 14.0, 140.0);
    let middle = near(-1.0, 18.0, 75.0);
    let carina = near(-2.0, 22.0, 34.0);
    let trachea = tree.path(
        &[(top, 8.5), (middle, 8.5), (carina, 8.8)],
        None,
        Region::Central,
        Side::Right,
    );
    let right = near(-27.0, 22.0, 14.0);
    let left = near(32.0, 24.0, 2.0);
    let right_low = near(-36.0, 26.0, -18.0);
    let left_low = near(38.0, 33.0, -20.0);
    let r = tree.path(
        &[(carina, 7.2), (right, 6.4)],
        trachea,
        Region::Central,
        Side::Right,
    );
    let l = tree.path(
        &[(carina, 6.6), (left, 5.8)],
        trachea,
        Region::Central,
        Side::Left,
    );
    let _ = tree.path(
        &[
            (right, 5.4),
            (right_low, 4.4),
            (near(-40.0, 34.0, -42.0), 3.4),
        ],
        r,
        Region::Lobar,
        Side::Right,
    );
    let _ = tree.path(
        &[(left, 5.0), (left_low, 4.2), (near(41.0, 40.0, -42.0), 3.3)],
        l,
        Region::Lobar,
        Side::Left,
    );
    let _ = tree.path(
        &[
            (near(-22.0, 22.0, 20.0), 4.2),
            (near(-42.0, 12.0, 30.0), 3.2),
        ],
        r,
        Region::Lobar,
        Side::Right,
    );
    let _ = tree.path(
        &[(near(30.0, 22.0, 4.0), 4.0), (near(44.0, 8.0, 18.0), 3.0)],
        l,
        Region::Lobar,
        Side::Left,
    );
    tree
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lobe {
    Upper,
    Middle,
    Lower,
}

fn lobe_of(point: Point) -> Lobe {
    if point[2] > 14.0 - 0.15 * point[1] {
        Lobe::Upper
    } else if point[1] < -8.0 {
        Lobe::Middle
    } else {
        Lobe::Lower
    }
}

/// Number of targets in each lung.
const TARGETS: usize = 150;

fn grow_lobes(
    tree: &mut Tree,
    lobes: &[(Option<usize>, Side, Lobe)],
    anatomy: &Anatomy,
    random: &mut Random,
) {
    for side in [Side::Left, Side::Right] {
        let mut targets = Vec::with_capacity(TARGETS);
        for _ in 0..TARGETS {
            if let Some(point) = anatomy.point_in_lung(side, random) {
                targets.push(point);
            }
        }
        for &(root, lobe_side, lobe) in lobes {
            let Some(root) = root.filter(|_| lobe_side == side) else {
                continue;
            };
            let mut own: Vec<Point> = targets
                .iter()
                .copied()
                .filter(|&point| lobe_of(point) == lobe)
                .collect();
            let tip = tree.branches[root].tube;
            // A lobe's vessels leave its root in two or three stems.
            let stems = if lobe == Lobe::Middle { 0.62 } else { 0.95 };
            grow(
                tree,
                root,
                tip.to,
                stems * tip.radius[1],
                &mut own,
                side,
                random,
            );
        }
    }
}

/// Grows a subtree from `start` to all `targets`.
fn grow(
    tree: &mut Tree,
    parent: usize,
    start: Point,
    radius: f64,
    targets: &mut [Point],
    side: Side,
    random: &mut Random,
) {
    let n = targets.len();
    if n == 0 || radius < FINEST_MM {
        return;
    }
    let region = if radius > 1.9 {
        Region::Segmental
    } else {
        Region::Subsegmental
    };
    let mut middle = [0.0; 3];
    for target in targets.iter() {
        for axis in 0..3 {
            middle[axis] += target[axis] / n as f64;
        }
    }
    let share = if n == 1 {
        1.0
    } else {
        random.range(0.38, 0.52)
    };
    let end = mix(start, middle, share);
    let bend = Tube {
        from: start,
        to: end,
        radius: [radius, radius],
    }
    .length()
        * 0.12;
    let mut knee = mix(start, end, 0.5);
    for value in &mut knee {
        *value += random.range(-bend, bend);
    }
    let tip = if n == 1 { FINEST_MM } else { 0.93 * radius };
    let last = tree.path(
        &[(start, radius), (knee, 0.5 * (radius + tip)), (end, tip)],
        Some(parent),
        region,
        side,
    );
    let (Some(last), true) = (last, n > 1) else {
        return;
    };
    let (mut low, mut high) = (targets[0], targets[0]);
    for target in targets.iter() {
        for axis in 0..3 {
            low[axis] = low[axis].min(target[axis]);
            high[axis] = high[axis].max(target[axis]);
        }
    }
    let extent = subtract(high, low);
    let axis = if extent[0] >= extent[1] && extent[0] >= extent[2] {
        0
    } else if extent[1] >= extent[2] {
        1
    } else {
        2
    };
    targets.sort_unstable_by(|a, b| a[axis].total_cmp(&b[axis]));
    let cut = (n / 2 + random.below(1 + n / 4)).clamp(1, n - 1);
    let (first, second) = targets.split_at_mut(cut);
    for part in [first, second] {
        let share = libm::pow(part.len() as f64 / n as f64, 1.0 / 2.8);
        grow(
            tree,
            last,
            end,
            (tip * share).min(0.9 * tip),
            part,
            side,
            random,
        );
    }
}
