use super::*;
use proptest::prelude::*;

const SHAPE: Shape = Shape {
    slot_ms: 1_000,
    keep_slots: 50,
    late_slots: 2,
};

fn cpu(cores: f64) -> Usage {
    Usage {
        cpu_cores: cores,
        ..Usage::default()
    }
}

fn value(series: &Series, slot: i64) -> Option<f64> {
    series.get(slot).map(|u| u.cpu_cores)
}

#[test]
fn an_interval_is_spread_over_its_slots() {
    let mut s = Series::new(SHAPE);
    // 10.4 to 12.4: most of slot 10, all of 11, less than half of 12.
    assert_eq!(
        s.add(UnixMs(12_400), 2_000, cpu(0.5)),
        Added {
            merged_ms: 2_000,
            too_late_ms: 0
        }
    );
    assert_eq!([10, 11, 12].map(|i| value(&s, i)), [Some(0.5), Some(0.5), None]);
    s.add(UnixMs(13_400), 1_000, cpu(1.0));
    let mixed = value(&s, 12).unwrap();
    assert!((mixed - (0.4 * 0.5 + 0.6)).abs() < 1e-9, "{mixed}");
}

#[test]
fn a_slot_is_a_mean_however_often_it_is_told() {
    let mut s = Series::new(SHAPE);
    for _ in 0..5 {
        s.add(UnixMs(11_000), 1_000, cpu(0.7));
    }
    assert!((value(&s, 10).unwrap() - 0.7).abs() < 1e-9);
}

#[test]
fn late_samples_are_merged_until_their_slot_is_closed() {
    let mut s = Series::new(SHAPE);
    s.add(UnixMs(11_000), 1_000, cpu(0.1));
    s.add(UnixMs(14_000), 1_000, cpu(0.4));
    assert_eq!(value(&s, 11), None, "a gap is a gap");
    assert_eq!(s.add(UnixMs(12_000), 1_000, cpu(0.2)).merged_ms, 1_000);
    assert_eq!(value(&s, 11), Some(0.2));
    s.add(UnixMs(20_000), 1_000, cpu(0.9));
    let late = s.add(UnixMs(13_000), 1_000, cpu(9.0));
    assert_eq!(
        late,
        Added {
            merged_ms: 0,
            too_late_ms: 1_000
        }
    );
    assert_eq!(value(&s, 12), None);
    let window: Vec<_> = s
        .window(13, 10)
        .into_iter()
        .map(|u| u.map(|u| (u.cpu_cores * 10.0).round()))
        .collect();
    assert_eq!(window, [Some(1.0), Some(2.0), None, Some(4.0)]);
    assert_eq!(s.newest_before(19), Some(13));
    assert_eq!(s.closed_since(11).map(|(slot, _)| slot).collect::<Vec<_>>(), [11, 13]);
}

/// An agent that samples once a minute, slots of a second.
#[test]
fn an_interval_longer_than_the_late_window_keeps_its_first_slots() {
    let mut s = Series::new(SHAPE);
    s.add(UnixMs(20_000), 10_000, cpu(0.5));
    assert!((10..20).all(|slot| value(&s, slot) == Some(0.5)));
}

#[test]
fn nonsense_is_not_merged() {
    let mut s = Series::new(SHAPE);
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        assert_eq!(s.add(UnixMs(5_000), 1_000, cpu(bad)), Added::default());
    }
    assert_eq!(s.add(UnixMs(5_000), 0, cpu(1.0)), Added::default());
    assert_eq!(s.newest_before(i64::MAX), None);
    assert!(s.window(100, 10).is_empty());
}

#[test]
fn times_at_the_ends_of_the_scale_break_nothing() {
    let mut s = Series::new(SHAPE);
    for t in [0, i64::MAX, i64::MIN, -1, i64::MAX - 1, 17] {
        s.add(UnixMs(t), u64::MAX, cpu(0.5));
        s.window(i64::MAX, usize::MAX);
        s.window(i64::MIN, 3);
        s.newest_before(i64::MIN);
    }
}

proptest! {
    /// Whatever comes in: memory is bounded, no slot exceeds what was told, and all time is accounted for.
    #[test]
    fn bounded_and_never_inflated(samples in prop::collection::vec((0i64..400_000, 1u64..20_000, 0.0f64..4.0), 1..80)) {
        let mut s = Series::new(SHAPE);
        for (t, interval, cores) in &samples {
            let added = s.add(UnixMs(*t), *interval, cpu(*cores));
            prop_assert_eq!(added.merged_ms + added.too_late_ms, *interval);
            prop_assert!(s.closed.len() <= SHAPE.keep_slots);
            prop_assert!(s.open.len() <= SHAPE.late_slots + 1);
        }
        let most = samples.iter().map(|x| x.2).fold(0.0, f64::max);
        let window = s.window(400, 1_000);
        prop_assert!(window.first().is_none_or(|v| v.is_some()));
        prop_assert!(window.iter().flatten().all(|u| u.cpu_cores <= most + 1e-6));
    }

    /// Samples in order, of any interval, add up to the same total when read back slot by slot.
    #[test]
    fn nothing_is_lost_in_order(intervals in prop::collection::vec(1u64..3_000, 1..30)) {
        let mut s = Series::new(SHAPE);
        let mut t = 7_777;
        let mut told = 0;
        for interval in intervals {
            t += interval as i64;
            told += interval;
            let added = s.add(UnixMs(t), interval, cpu(1.0));
            prop_assert_eq!(added.too_late_ms, 0);
        }
        let slots = s.window(SHAPE.slot_of(UnixMs(t)), 1_000).into_iter().flatten().count() as u64;
        prop_assert!(slots * 1_000 + 1_000 >= told.min(50_000));
    }
}

#[test]
fn a_disturbed_slot_is_shown_and_not_learnt() {
    let mut s = Series::new(SHAPE);
    for (slot, cores) in [(10, 0.25), (11, 0.5), (12, 0.875), (13, 0.8)] {
        s.add(UnixMs((slot + 1) * 1_000), 1_000, cpu(cores));
    }
    // A copy that began in slot 11 ends after a shorter one.
    [12, 12, 13, 11].into_iter().for_each(|slot| s.disturb(slot));
    assert_eq!(value(&s, 12), Some(0.875), "measured is measured");
    assert_eq!(s.newest_before(20), Some(13));
    assert_eq!(s.newest_undisturbed(20), Some(10));
    s.add(UnixMs(15_000), 1_000, cpu(0.375));
    let demand: Vec<Option<f64>> = s.demand(14, 10).iter().map(|u| u.map(|u| u.cpu_cores)).collect();
    assert_eq!(demand, [Some(0.25), None, None, None, Some(0.375)]);
}

#[test]
fn disturbances_are_kept_as_long_as_their_slots() {
    let mut s = Series::new(SHAPE);
    let kept = SHAPE.keep_slots + SHAPE.late_slots + 1;
    // Of a host of which nothing is measured.
    (0..5_000).for_each(|slot| s.disturb(slot));
    assert!(s.disturbed.len() <= kept);
    for slot in 5_000..5_500 {
        s.add(UnixMs((slot + 1) * 1_000), 1_000, cpu(0.5));
        s.disturb(slot);
    }
    assert_eq!(s.disturbed.len(), kept, "all that are kept, and no others");
    s.disturb(4_000);
    assert!(!s.is_disturbed(4_000));
    assert!(s.demand(5_499, 1_000).iter().all(Option::is_none));
}
