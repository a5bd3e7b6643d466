//! What is said of a study, and when.

use shared::phantom::MANUFACTURER;

use super::*;
use crate::result::Attempt;

#[test]
fn not_detected_is_said_only_after_the_quiet_time_and_counts_its_slices() {
    let mut bench = Bench::new();
    let mut slices = series("1.2", -1.0);
    slices[7] = slices[7].clone().refused("pixel-bytes");
    bench.receive(&slices);
    let growing = bench.result();
    assert_eq!(
        (growing.state, codes(&growing.outcome)),
        (State::Receiving, "pending")
    );
    assert!(bench.said().is_empty());
    let result = bench.complete();
    assert_eq!(
        (result.state, codes(&result.outcome)),
        (State::Complete, "not-detected")
    );
    assert_eq!(result.words(), "not detected on 59 of 60 slices");
    assert_eq!(result.attempt(), Some(Attempt::PartiallySucceeded));
    assert_eq!(bench.said(), [(1, State::Complete, Outcome::NotDetected)]);
}

#[test]
fn a_positive_is_said_at_once_and_again_when_complete() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", 1.0));
    assert_eq!(bench.result().state, State::Provisional);
    bench.complete();
    assert_eq!(
        bench.said(),
        [
            (1, State::Provisional, Outcome::Positive),
            (2, State::Complete, Outcome::Positive)
        ]
    );
    // Nothing new, nothing said.
    bench.complete();
    assert_eq!(bench.said().len(), 2);
}

#[test]
fn the_same_slices_again_need_no_inference_and_say_nothing_new() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    let first = bench.complete();
    bench.receive(&series("1.2", -1.0));
    assert_eq!(bench.result().outcome, Outcome::NotDetected);
    let second = bench.complete();
    assert_eq!(bench.n_inferences(), 60);
    assert_eq!(bench.said().len(), 1);
    assert_eq!((first.revision, second.revision), (1, 1));
    assert_eq!(second.slices.len(), 60);
}

#[test]
fn other_pixels_under_the_same_uid_are_analysed_anew_and_flagged() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    bench.complete();
    let mut changed = series("1.2", 5.0);
    changed.iter_mut().for_each(|slice| slice.pixels = 1);
    bench.receive(&changed[..3]);
    let result = bench.complete();
    assert_eq!(bench.n_inferences(), 63);
    assert_eq!(codes(&result.outcome), "positive");
    assert_eq!(result.remarks.len(), 1);
    assert!(
        result.remarks[0].starts_with("3 slices came again"),
        "{:?}",
        result.remarks
    );
}

#[test]
fn a_bad_copy_does_not_take_a_good_answer_away() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    bench.receive(&[Slice::new("1.2", 3, 0.0).refused("truncated")]);
    let result = bench.complete();
    assert_eq!(result.words(), "not detected on 60 of 60 slices");
    assert!(result.remarks[0].starts_with("1 slice came again in a form"));
}

#[test]
fn corrected_demographics_are_a_revision_without_inference() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", -1.0));
    bench.complete();
    let mut corrected = series("1.2", -1.0);
    corrected.iter_mut().for_each(|slice| slice.patient = "P2");
    bench.receive(&corrected);
    let result = bench.complete();
    assert_eq!(bench.n_inferences(), 60);
    assert_eq!(
        (result.revision, codes(&result.outcome)),
        (2, "not-detected")
    );
    assert_eq!(result.patient.elements[0].value, b"P2");
    let statements = bench.store().statements(&study_uid()).unwrap();
    assert_eq!(statements[0].superseded_by, Some(2));
    assert_eq!(bench.said().len(), 2);
}

#[test]
fn two_patients_in_one_study_are_held_and_nothing_is_sent() {
    let mut bench = Bench::new();
    let mut slices = series("1.2", 9.0);
    slices[0].patient = "P2";
    bench.receive(&slices);
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "identity-conflict");
    assert!(bench.said().is_empty());
    // The sender corrects the one slice.
    bench.receive(&series("1.2", 9.0)[..1]);
    let result = bench.complete();
    assert_eq!((result.revision, codes(&result.outcome)), (3, "positive"));
    assert_eq!(bench.said().last().unwrap().0, 3);
    assert_eq!(bench.n_inferences(), 60);
}

#[test]
fn a_contradiction_after_a_provisional_positive_sends_nothing_and_is_remarked() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", 9.0));
    assert_eq!(bench.said(), [(1, State::Provisional, Outcome::Positive)]);
    let mut other = Slice::new("1.2", 60, 9.0);
    other.patient = "P2";
    bench.receive(&[other]);
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "identity-conflict");
    assert_eq!(bench.said().len(), 1);
    assert!(
        result.remarks[0].contains("sent before the contradiction"),
        "{:?}",
        result.remarks
    );
}

#[test]
fn a_demonstration_model_says_nothing_about_patients() {
    for (manufacturer, n_said) in [("Scanner Ltd", 0), (MANUFACTURER, 2)] {
        let mut bench = Bench::new();
        bench.is_demonstration = true;
        let mut slices = series("1.2", 9.0);
        slices
            .iter_mut()
            .for_each(|slice| slice.manufacturer = manufacturer);
        bench.receive(&slices);
        let result = bench.complete();
        assert_eq!(codes(&result.outcome), "positive");
        assert_eq!(result.is_phantom, n_said > 0);
        assert_eq!(bench.said().len(), n_said);
    }
}

#[test]
fn every_study_with_a_ct_object_has_a_result_and_no_other() {
    let mut bench = Bench::new();
    let mut report = Slice::new("1.8", 1, 0.0).refused("sop-class");
    report.class = DOSE_REPORT;
    bench.receive(&[report]);
    assert_eq!(bench.store().study(&study_uid()).unwrap(), None);
    bench.receive(&[Slice::new("1.2", 1, 0.0).refused("worker")]);
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "worker");
    assert_eq!(result.attempt(), Some(Attempt::Failed));
    assert_eq!((result.n_other_objects, result.slices.len()), (1, 1));
    assert_eq!(bench.said().len(), 1);
}

#[test]
fn without_a_sound_model_slices_have_the_reason_and_are_analysed_again_later() {
    let mut bench = Bench::new();
    bench.absent = Some(Reason::new("self-test", "other bits"));
    bench.receive(&series("1.2", 1.0));
    let result = bench.complete();
    assert_eq!(codes(&result.outcome), "self-test");
    assert_eq!(result.slices.len(), 60);
    assert_eq!(
        bench.store().again().unwrap(),
        (1..=60).collect::<Vec<u64>>()
    );
}

#[test]
fn answers_of_another_model_do_not_count_and_are_asked_for_again() {
    let mut bench = Bench::new();
    bench.receive(&series("1.2", 9.0));
    assert_eq!(bench.result().state, State::Provisional);
    bench.model = "d2";
    bench.receive(&series("1.2", -1.0)[..1]);
    let asked: Vec<u64> = std::iter::from_fn(|| bench.again.next()).collect();
    assert_eq!(asked, (1..=60).collect::<Vec<u64>>());
    assert_eq!(bench.store().again().unwrap(), asked);
    let result = bench.complete();
    assert_eq!((result.slices.len(), result.n_analysed()), (60, 1));
    assert_eq!(codes(&result.outcome), "coverage");
}

#[test]
fn an_object_that_names_no_study_is_remarked_on_the_study_among_which_it_came() {
    let mut bench = Bench::new();
    let mut slices = series("1.2", -1.0);
    slices[30].sop = "not a uid".into();
    bench.receive(&slices);
    let result = bench.complete();
    assert_eq!(result.words(), "not detected on 59 of 59 slices");
    assert!(
        result.remarks[0].contains("of no study that can be read"),
        "{:?}",
        result.remarks
    );
}
