//! What merely looks like an embolus: lymph nodes, plugged bronchi, nodules, consolidation, mixing contrast, masses.

use alloc::vec::Vec;

use super::canvas::{Tube, mix, round_i32};
use super::labels::ExamLabels;
use super::random::Random;
use super::render::{Chest, Confounder};
use super::vessels::{Region, Side};

/// Lymph nodes, plugged bronchi, mixing artefacts, and masses that grow into an artery.
pub(super) fn add(chest: &mut Chest, labels: &ExamLabels, random: &mut Random) {
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
