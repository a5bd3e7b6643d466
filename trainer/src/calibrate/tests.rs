use super::*;

#[test]
fn range_grows_by_doubling_and_keeps_every_count() {
    let mut histogram = Histogram::default();
    histogram.add(&[0.0, 0.1, 0.2]);
    histogram.add(&[100.0, -3.0]);
    assert_eq!(histogram.count(), 5);
    assert_eq!(histogram.bins.iter().sum::<u64>() + histogram.zeros, 5);
    assert_eq!(
        histogram.ranges()[&Method::MinMax],
        Range {
            low: -3.0,
            high: 100.0
        }
    );
}

#[test]
fn merging_in_any_order_gives_the_same_counts() {
    let parts: [&[f32]; 3] = [&[0.5, 0.25], &[], &[7.0, -1.0, 0.0]];
    let of = |order: [usize; 3]| {
        let mut whole = Histogram::default();
        for part in order {
            let mut histogram = Histogram::default();
            histogram.add(parts[part]);
            whole.merge(histogram);
        }
        (whole.bins.clone(), whole.zeros, whole.ranges())
    };
    assert_eq!(of([0, 1, 2]), of([2, 1, 0]));
}

#[test]
fn one_outlier_is_clipped_by_every_method_but_min_max() {
    let mut histogram = Histogram::default();
    let bulk: Vec<f32> = (0..1_000_000)
        .map(|index| (index % 1000) as f32 / 1000.0)
        .collect();
    histogram.add(&bulk);
    histogram.add(&[40.0]);
    let ranges = histogram.ranges();
    assert_eq!(
        ranges[&Method::MinMax],
        Range {
            low: 0.0,
            high: 40.0
        }
    );
    // The squared error of clipping at c, (40 - c)^2 + 10^6 (c / 255)^2 / 12, is least at c = 17.5.
    for method in [Method::Percentile, Method::Mse, Method::Entropy] {
        assert!(
            ranges[&method].high < 18.0,
            "{method:?} {:?}",
            ranges[&method]
        );
        assert!(
            ranges[&method].high > 0.5,
            "{method:?} {:?}",
            ranges[&method]
        );
    }
}

#[test]
fn tensor_of_zeros_has_an_empty_range() {
    let mut histogram = Histogram::default();
    histogram.add(&[0.0; 8]);
    for range in histogram.ranges().values() {
        assert_eq!(
            *range,
            Range {
                low: 0.0,
                high: 0.0
            }
        );
    }
}
