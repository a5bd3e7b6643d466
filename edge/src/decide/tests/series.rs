//! Which series is judged, and what a gap does.

use super::*;
use crate::result::Attempt;

#[test]
fn a_few_slices_of_a_monitoring_scan_are_no_provisional_positive() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", 9.0)[..30]);
    assert_eq!(codes(&bench.result().outcome), "pending");
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "coverage");
    assert_eq!(result.attempt(), Some(Attempt::NotAttempted));
}

/// Six series as a chest CT brings them: monitoring, soft and lung kernel, thick, a projection that is refused, coronal.
fn six_series() -> Vec<Vec<Slice>> {
    let soft = series("1.1", 2.0);
    let mut lung = series("1.2", 7.0);
    lung.iter_mut()
        .for_each(|slice| slice.facts.kernel = Some("B70f".into()));
    let mut thick = series("1.3", -3.0);
    thick
        .iter_mut()
        .for_each(|slice| slice.facts.thickness_mm = Some(5.0));
    let mut monitoring = series("1.4", 8.0);
    monitoring
        .iter_mut()
        .for_each(|slice| slice.facts.z_mm = Some(40.0));
    let mut derived = series("1.5", 6.0);
    for slice in &mut derived {
        slice.facts.image_type = "DERIVED\\SECONDARY\\AXIAL".into();
        slice.facts.is_original_primary = false;
    }
    let refused = series("1.6", 0.0)
        .into_iter()
        .map(|slice| slice.refused("image-type"));
    vec![soft, lung, thick, monitoring, derived, refused.collect()]
}

/// What the order of arrival must not change.
fn verdict(result: &StudyResult) -> (Option<String>, Option<f32>, String, usize, Vec<String>) {
    let mut others: Vec<String> = result
        .not_judged
        .iter()
        .map(|other| format!("{:?} {} {}", other.series_uid, other.n_slices, other.reason))
        .collect();
    others.sort();
    (
        result.series_uid.as_ref().map(Uid::to_string),
        result.score,
        codes(&result.outcome).to_owned(),
        result.slices.len(),
        others,
    )
}

#[test]
fn six_series_in_any_order_of_arrival_give_one_verdict() {
    let all = six_series();
    let mut interleaved = Vec::new();
    for index in 0..60 {
        interleaved.extend(all.iter().map(|series| series[59 - index].clone()));
    }
    let orders = [
        all.concat(),
        all.iter().rev().flatten().cloned().collect(),
        interleaved,
    ];
    let verdicts = orders.map(|slices| {
        let mut bench = Bench::new();
        bench.receive(&slices);
        verdict(&bench.complete())
    });
    assert_eq!(verdicts[0].0.as_deref(), Some("1.1"));
    assert_eq!((verdicts[0].1, verdicts[0].4.len()), (Some(2.0), 5));
    assert_eq!(verdicts[0], verdicts[1]);
    assert_eq!(verdicts[0], verdicts[2]);
}

#[test]
fn a_better_series_that_comes_later_is_judged_in_a_revision() {
    let all = six_series();
    let mut bench = Bench::new();
    bench.receive(&all[2]);
    let first = bench.complete();
    assert_eq!((first.revision, codes(&first.outcome)), (1, "not-detected"));
    for series in [&all[4], &all[3], &all[5], &all[1], &all[0]] {
        bench.receive(series);
        bench.complete();
    }
    let last = bench.result();
    let mut at_once = Bench::new();
    at_once.receive(&all.concat());
    assert_eq!(verdict(&last), verdict(&at_once.complete()));
    assert_eq!(codes(&last.outcome), "positive");
    // Not detected, then provisionally positive with the better series, then complete.
    let revisions: Vec<u32> = bench.said().iter().map(|said| said.0).collect();
    assert_eq!(revisions, [1, 2, 3]);
}

#[test]
fn a_gap_forbids_not_detected_but_takes_no_positive_away() {
    let with_gap = |logit| {
        let slices = series("1.2", logit).into_iter().enumerate();
        let kept = slices.filter(|(index, _)| !(20..32).contains(index));
        kept.map(|(_, slice)| slice).collect::<Vec<Slice>>()
    };
    let mut bench = Bench::new();
    bench.receive(&with_gap(-1.0));
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "gap");
    let mut bench = Bench::new();
    bench.receive(&with_gap(1.0));
    assert_eq!(bench.result().remarks, [] as [String; 0], "more may come");
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "positive");
    assert!(result.remarks[0].contains("no analysed slice"));
}

#[test]
fn a_series_too_sparse_is_not_judged_and_one_at_the_limit_is() {
    for (spacing_mm, code) in [(10.0, "not-detected"), (10.5, "spacing")] {
        let mut slices = series("1.2", -1.0);
        for (index, slice) in (0_u32..).zip(&mut slices) {
            slice.facts.z_mm = Some(f64::from(index) * spacing_mm);
        }
        let mut bench = Bench::new();
        bench.receive(&slices);
        let result = bench.complete();
        assert_eq!(codes(&result.outcome), code, "{spacing_mm} mm");
    }
}
