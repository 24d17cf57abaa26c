//! Statistics of drift, pure: the population stability index, the two-sample Kolmogorov-Smirnov test, and sequential detectors of a
//! share that falls or recovers.

use std::f64::consts::PI;

/// Added to every count, so that a label nobody saw does not make the index infinite (Jeffreys' prior).
const PSI_SMOOTHING: f64 = 0.5;

/// Population stability index of two label distributions given as counts in the same order: the sum of `(q - p) ln(q / p)` over the
/// smoothed shares. 0 for equal shares; by custom 0.1 is a small and 0.2 a large shift. `None` if the lengths differ or a side is empty.
pub fn population_stability_index(reference: &[u64], current: &[u64]) -> Option<f64> {
    let (reference_sum, current_sum) = (reference.iter().sum::<u64>(), current.iter().sum::<u64>());
    if reference.len() != current.len() || reference_sum == 0 || current_sum == 0 {
        return None;
    }
    let smoothed_sum = |sum: u64| sum as f64 + PSI_SMOOTHING * reference.len() as f64;
    let terms = reference.iter().zip(current).map(|(reference, current)| {
        let p = (*reference as f64 + PSI_SMOOTHING) / smoothed_sum(reference_sum);
        let q = (*current as f64 + PSI_SMOOTHING) / smoothed_sum(current_sum);
        (q - p) * (q / p).ln()
    });
    Some(terms.sum())
}

/// Result of a two-sample Kolmogorov-Smirnov test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KolmogorovSmirnov {
    /// Largest distance of the two empirical distribution functions, 0 to 1.
    pub statistic: f64,
    /// Two-sided, asymptotic with Stephens' (1970) correction for small samples.
    pub p_value: f64,
}

/// Tests whether two samples come from one distribution. `None` if one is empty. Values that are not finite are left out.
pub fn kolmogorov_smirnov(left: &[f32], right: &[f32]) -> Option<KolmogorovSmirnov> {
    let sorted = |values: &[f32]| {
        let mut values: Vec<f32> = values.iter().copied().filter(|value| value.is_finite()).collect();
        values.sort_by(f32::total_cmp);
        values
    };
    let (left, right) = (sorted(left), sorted(right));
    if left.is_empty() || right.is_empty() {
        return None;
    }
    let (n, m) = (left.len() as f64, right.len() as f64);
    let (mut i, mut j, mut statistic) = (0, 0, 0.0_f64);
    while i < left.len() && j < right.len() {
        // Equal values step together: the functions are compared after a value, not inside it.
        let value = left[i].min(right[j]);
        while i < left.len() && left[i] <= value {
            i += 1;
        }
        while j < right.len() && right[j] <= value {
            j += 1;
        }
        statistic = statistic.max((i as f64 / n - j as f64 / m).abs());
    }
    let root = (n * m / (n + m)).sqrt();
    let p_value = kolmogorov_survival((root + 0.12 + 0.11 / root) * statistic);
    Some(KolmogorovSmirnov { statistic, p_value })
}

/// Probability that Kolmogorov's distribution exceeds `x`.
fn kolmogorov_survival(x: f64) -> f64 {
    if x <= 0.0 {
        return 1.0;
    }
    // Two series of the same function, each used where it converges in a few terms.
    let survival = if x < 1.0 {
        let terms = (1..=6).map(|k| (-((2 * k - 1) as f64).powi(2) * PI * PI / (8.0 * x * x)).exp());
        1.0 - (2.0 * PI).sqrt() / x * terms.sum::<f64>()
    } else {
        2.0 * (1..=6)
            .map(|k| (if k % 2 == 1 { 1.0 } else { -1.0 }) * (-2.0 * f64::from(k * k) * x * x).exp())
            .sum::<f64>()
    };
    survival.clamp(0.0, 1.0)
}

/// Probability with which a reference sample is further from its distribution than the tests of windows allow for.
const REFERENCE_ERROR: f64 = 0.01;

/// p-value of the hypothesis that a window's labels have the distribution of which the reference is a sample.
///
/// It is valid in a finite sample and, but for one in a hundred references, for any number of windows that are compared with
/// one reference: each label's share may be anywhere in the interval that the reference leaves for it. Chernoff's bound, with a
/// union over the labels. Counts are in the same order; `None` if the lengths differ or a side is empty.
pub fn labels_p_value(reference: &[u64], current: &[u64]) -> Option<f64> {
    let (reference_sum, current_sum) = (reference.iter().sum::<u64>() as f64, current.iter().sum::<u64>() as f64);
    if reference.len() != current.len() || reference_sum == 0.0 || current_sum == 0.0 {
        return None;
    }
    let sides = 2.0 * reference.len() as f64;
    let slack = (sides / REFERENCE_ERROR).ln() / reference_sum;
    let distances = reference.iter().zip(current).map(|(reference, current)| {
        let (low, high) = interval(*reference as f64 / reference_sum, slack);
        let share = *current as f64 / current_sum;
        divergence(share, share.clamp(low, high))
    });
    let distance = distances.fold(0.0, f64::max);
    Some((sides * (-current_sum * distance).exp()).min(1.0))
}

/// Shares whose divergence from an observed one is at most `slack`.
fn interval(observed: f64, slack: f64) -> (f64, f64) {
    let bound = |mut inside: f64, mut outside: f64| {
        for _ in 0..60 {
            let middle = f64::midpoint(inside, outside);
            if divergence(observed, middle) <= slack { inside = middle } else { outside = middle }
        }
        outside
    };
    (bound(observed, 0.0), bound(observed, 1.0))
}

/// Kullback-Leibler divergence of two coins.
fn divergence(observed: f64, share: f64) -> f64 {
    let term = |observed: f64, share: f64| if observed == 0.0 { 0.0 } else { observed * (observed / share).ln() };
    term(observed, share) + term(1.0 - observed, 1.0 - share)
}

/// p-value of the hypothesis that a window's confidences have the distribution of which the reference is a sample; valid as
/// [`labels_p_value`] is. Inequality of Dvoretzky, Kiefer and Wolfowitz with Massart's constant (1990), for both samples.
pub fn confidences_p_value(reference: &[f32], current: &[f32]) -> Option<f64> {
    let test = kolmogorov_smirnov(reference, current)?;
    let of_reference = ((2.0 / REFERENCE_ERROR).ln() / (2.0 * reference.len() as f64)).sqrt();
    let distance = (test.statistic - of_reference).max(0.0);
    Some((2.0 * (-2.0 * current.len() as f64 * distance * distance).exp()).min(1.0))
}

/// Collects p-values of windows, and raises an alarm that is false once in `average_run_length` windows at most, on average: the
/// Shiryaev-Roberts statistic of the e-values `1 / (2 sqrt p)` (V. Vovk and R. Wang, E-values, 2021).
#[derive(Clone, Debug, PartialEq)]
pub struct WindowDetector {
    value: f64,
    average_run_length: f64,
}

impl WindowDetector {
    pub fn new(average_run_length: f64) -> Self {
        Self { value: 0.0, average_run_length }
    }

    /// Takes the p-value of one window.
    pub fn observe(&mut self, p_value: f64) {
        self.value = (self.value + 1.0) * 0.5 / p_value.max(f64::MIN_POSITIVE).sqrt();
    }

    pub fn has_moved(&self) -> bool {
        self.value >= self.average_run_length
    }

    /// Forgets all windows.
    pub fn restart(&mut self) {
        self.value = 0.0;
    }
}

/// A lower bound of a share of which `good` of `all` were seen, with 99 % confidence (Wilson, 1927). 0 without any.
pub fn lower_bound(good: u64, all: u64) -> f64 {
    if all == 0 {
        return 0.0;
    }
    let (all, share) = (all as f64, good as f64 / all as f64);
    let square = CONFIDENCE * CONFIDENCE;
    let centre = share + square / (2.0 * all);
    let margin = CONFIDENCE * (share * (1.0 - share) / all + square / (4.0 * all * all)).sqrt();
    ((centre - margin) / (1.0 + square / all)).clamp(0.0, 1.0)
}

/// Quantile of the standard normal distribution at 99 %.
const CONFIDENCE: f64 = 2.326_347_874;
/// Shares are kept this far from 1, where one bad answer would decide alone.
const MARGIN: f64 = 0.005;
/// A share below this cannot fall by anything that matters.
const LEAST_FLOOR: f64 = 0.01;
/// The falls that are looked for, in multiples of the loss.
const FALLS: [f64; 5] = [0.5, 1.0, 2.0, 4.0, 8.0];

/// The Shiryaev-Roberts statistic of a sequence of answers: `R <- (R + 1) L`, where L is the ratio of an answer's probability under
/// an alternative to that under the null hypothesis.
///
/// While the null hypothesis holds, R less the number of answers is a supermartingale. So the mean number of answers until R
/// reaches a bound is at least the bound, whatever else is true of the sequence. (A. N. Shiryaev, 1963; J. Shin, A. Ramdas and A.
/// Rinaldo, E-detectors, 2023.)
#[derive(Clone, Copy, Debug, PartialEq)]
struct ShiryaevRoberts {
    good: f64,
    bad: f64,
    value: f64,
}

impl ShiryaevRoberts {
    /// The null hypothesis is that the share of good answers is `null` or beyond it, seen from `alternative`.
    fn new(null: f64, alternative: f64) -> Self {
        Self { good: alternative / null, bad: (1.0 - alternative) / (1.0 - null), value: 0.0 }
    }

    fn observe(&mut self, good: bool) {
        self.value = (self.value + 1.0) * if good { self.good } else { self.bad };
    }
}

/// Detects that a share of good answers has fallen below a floor, at any time and by one of several amounts.
///
/// As long as each answer is good with at least the floor's probability, the mean number of answers before an alarm is at least
/// `average_run_length`: the mean of the statistics of several alternatives has the property of each of them.
#[derive(Clone, Debug, PartialEq)]
pub struct FallDetector {
    alternatives: Vec<ShiryaevRoberts>,
    average_run_length: f64,
}

impl FallDetector {
    /// `loss`: the fall that shall be found soonest. With a floor near 0 there is no alarm.
    pub fn new(floor: f64, loss: f64, average_run_length: f64) -> Self {
        let floor = floor.min(1.0 - MARGIN);
        let lower = |fall: f64| (floor - fall * loss.max(MARGIN)).max(floor / 10.0);
        let alternatives = match floor < LEAST_FLOOR {
            true => Vec::new(),
            false => FALLS.iter().map(|fall| ShiryaevRoberts::new(floor, lower(*fall))).collect(),
        };
        Self { alternatives, average_run_length }
    }

    /// Takes one answer.
    pub fn observe(&mut self, good: bool) {
        self.alternatives.iter_mut().for_each(|statistic| statistic.observe(good));
    }

    /// Whether the share has fallen.
    pub fn has_fallen(&self) -> bool {
        let sum: f64 = self.alternatives.iter().map(|statistic| statistic.value).sum();
        sum >= self.average_run_length * FALLS.len() as f64
    }

    /// Forgets all answers.
    pub fn restart(&mut self) {
        self.alternatives.iter_mut().for_each(|statistic| statistic.value = 0.0);
    }
}

/// Detects that a share that had fallen is at its floor again.
///
/// As long as each answer is good with at most the probability `floor - loss`, the mean number of answers until it is
/// reported to have recovered is at least [`RECOVERY_RUN_LENGTH`].
#[derive(Clone, Debug, PartialEq)]
pub struct RecoveryDetector(ShiryaevRoberts);

/// Mean number of answers, at least, before a share that is still low is reported to have recovered.
pub const RECOVERY_RUN_LENGTH: f64 = 10_000.0;

impl RecoveryDetector {
    pub fn new(floor: f64, loss: f64) -> Self {
        let floor = floor.clamp(LEAST_FLOOR, 1.0 - MARGIN);
        Self(ShiryaevRoberts::new((floor - loss.max(MARGIN)).max(floor / 10.0), floor))
    }

    /// Takes one answer.
    pub fn observe(&mut self, good: bool) {
        self.0.observe(good);
    }

    pub fn has_recovered(&self) -> bool {
        self.0.value >= RECOVERY_RUN_LENGTH
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    fn close(left: f64, right: f64, tolerance: f64) -> bool {
        (left - right).abs() <= tolerance
    }

    #[test]
    fn psi_is_what_numpy_computes() {
        // The formula above in Python, in double precision.
        let cases = [
            (vec![80, 15, 5], vec![50, 30, 20], Some(0.4322853916079571)),
            (vec![10, 0], vec![0, 10], Some(5.535495341315315)),
            (vec![3, 1], vec![3, 1], Some(0.0)),
            (vec![3, 1], vec![3], None),
            (vec![3, 1], vec![0, 0], None),
        ];
        for (reference, current, expected) in cases {
            match (population_stability_index(&reference, &current), expected) {
                (Some(found), Some(expected)) => assert!(close(found, expected, 1e-12), "{found} != {expected}"),
                (found, expected) => assert_eq!(found, expected),
            }
        }
    }

    #[test]
    fn kolmogorov_survival_is_scipys() {
        // scipy.stats.kstwobign.sf
        let cases = [
            (0.3, 0.9999906941986655),
            (0.5, 0.9639452436648751),
            (0.8, 0.5441424115741981),
            (1.0, 0.26999967167735456),
            (1.36, 0.049485876755377876),
            (2.0, 0.0006709252557796953),
        ];
        for (x, expected) in cases {
            assert!(close(kolmogorov_survival(x), expected, 1e-12), "at {x}: {}", kolmogorov_survival(x));
        }
    }

    #[test]
    fn ks_is_near_scipys_exact_test() {
        let left: Vec<f32> = (0..100).map(|i| (i * 37 % 101) as f32 / 101.0).collect();
        let right: Vec<f32> = (0..150).map(|i| ((i * 53 % 151) as f32 / 151.0).powf(1.5)).collect();
        let test = kolmogorov_smirnov(&left, &right).expect("samples");
        // scipy.stats.ks_2samp(left, right, method="exact"): statistic 0.15333, p 0.11077.
        assert!(close(test.statistic, 0.15333333333333332, 1e-6), "{test:?}");
        assert!(close(test.p_value, 0.11077, 0.005), "{test:?}");
        let ties = kolmogorov_smirnov(&[0.5, 0.5, 0.9], &[0.5, 0.9, 0.9]).expect("samples");
        assert!(close(ties.statistic, 1.0 / 3.0, 1e-12), "{ties:?}");
        assert_eq!(kolmogorov_smirnov(&[], &[0.5]), None);
    }

    /// Counts of three labels, and confidences, drawn with these shares and this power.
    fn draw(shares: [f64; 2], power: f32, rows: usize, random: &mut StdRng) -> (Vec<u64>, Vec<f32>) {
        let mut counts = vec![0; 3];
        let confidences = (0..rows).map(|_| {
            let place: f64 = random.random();
            counts[usize::from(place > shares[0]) + usize::from(place > shares[0] + shares[1])] += 1;
            1.0 - 0.5 * random.random::<f32>().powf(power)
        });
        let confidences = confidences.collect();
        (counts, confidences)
    }

    #[test]
    fn windows_like_their_reference_raise_no_alarm_and_others_soon_do() {
        let mut random = StdRng::seed_from_u64(20);
        let mut alarms = 0;
        for _ in 0..40 {
            // Two hundred windows of 500 with one reference of 900: a reference that is far off would be noticed.
            let (labels, confidences) = draw([0.6, 0.3], 2.0, 900, &mut random);
            let mut detector = WindowDetector::new(200.0);
            for _ in 0..200 {
                let (of_labels, of_confidences) = draw([0.6, 0.3], 2.0, 500, &mut random);
                let p = labels_p_value(&labels, &of_labels).unwrap();
                detector.observe(p.max(confidences_p_value(&confidences, &of_confidences).unwrap()));
                if detector.has_moved() {
                    alarms += 1;
                    detector.restart();
                }
            }
        }
        // One in 200 windows is allowed: 40 of the 8,000.
        assert!(alarms <= 40, "{alarms} false alarms");
        let (labels, confidences) = draw([0.6, 0.3], 2.0, 900, &mut random);
        for (shares, power, most) in [([0.3, 0.6], 0.7, 1), ([0.45, 0.4], 1.0, 6)] {
            let mut detector = WindowDetector::new(7_300.0);
            let needed = (1..=most).find(|_| {
                let (of_labels, of_confidences) = draw(shares, power, 500, &mut random);
                let p = labels_p_value(&labels, &of_labels).unwrap();
                detector.observe(p.max(confidences_p_value(&confidences, &of_confidences).unwrap()));
                detector.has_moved()
            });
            assert!(needed.is_some(), "{shares:?} is not found in {most} windows");
        }
        assert_eq!(labels_p_value(&[1, 2], &[1]), None);
        assert_eq!(labels_p_value(&[0, 0], &[1, 1]), None);
        assert_eq!(labels_p_value(&[50, 50], &[50, 50]), Some(1.0));
    }

    #[test]
    fn lower_bounds_are_wilsons() {
        // The score equation, share - p = z sqrt(p (1 - p) / all), solved by bisection in Python.
        for (good, all, expected) in [(180, 200, 0.839_639), (900, 1000, 0.875_732), (100, 100, 0.948_66), (0, 50, 0.0)]
        {
            assert!(close(lower_bound(good, all), expected, 1e-5), "{good} of {all}: {}", lower_bound(good, all));
        }
        assert_eq!(lower_bound(0, 0), 0.0);
    }

    /// The number of answers until an alarm; `None` if there is none within `most`.
    fn run_length(detector: &mut FallDetector, share: f64, most: u64, random: &mut StdRng) -> Option<u64> {
        detector.restart();
        (1..=most).find(|_| {
            detector.observe(random.random_bool(share));
            detector.has_fallen()
        })
    }

    #[test]
    fn false_alarms_are_as_rare_as_stated() {
        // Runs end at ten times the stated length, which can only make the mean smaller. The mean of 400 runs has a standard
        // error of about a twentieth.
        let mut random = StdRng::seed_from_u64(17);
        for (floor, loss) in [(0.9, 0.05), (0.7, 0.02), (0.98, 0.01), (0.5, 0.2)] {
            let mut detector = FallDetector::new(floor, loss, 2_000.0);
            let runs = (0..400).map(|_| run_length(&mut detector, floor, 20_000, &mut random).unwrap_or(20_000));
            let mean = runs.sum::<u64>() as f64 / 400.0;
            assert!(mean > 2_000.0 * 0.85, "floor {floor}, loss {loss}: an alarm after {mean} answers");
        }
    }

    #[test]
    fn falls_are_found_soon_and_larger_ones_sooner() {
        let mut random = StdRng::seed_from_u64(18);
        let mut detector = FallDetector::new(0.88, 0.05, 3_650_000.0);
        // The most answers that nine of ten runs need.
        for (share, most) in [(0.83, 2_600), (0.78, 750), (0.68, 220), (0.48, 75), (0.05, 25)] {
            let late = (0..200).filter(|_| run_length(&mut detector, share, most, &mut random).is_none()).count();
            assert!(late <= 20, "{late} of 200 runs at {share} took more than {most} answers");
        }
        assert_eq!(run_length(&mut detector, 0.88, 50_000, &mut random), None);
    }

    #[test]
    fn what_cannot_fall_gives_no_alarm_and_one_bad_answer_is_none() {
        let mut nothing = FallDetector::new(0.0, 0.05, 1_000.0);
        (0..100_000).for_each(|_| nothing.observe(false));
        assert!(!nothing.has_fallen());
        let mut perfect = FallDetector::new(1.0, 0.05, 1_000.0);
        perfect.observe(false);
        assert!(!perfect.has_fallen());
    }

    #[test]
    fn a_recovery_is_found_and_a_low_share_is_none() {
        let mut random = StdRng::seed_from_u64(19);
        let mut answers_until = |share: f64, most: u64| {
            let mut detector = RecoveryDetector::new(0.88, 0.05);
            (1..=most).find(|_| {
                detector.observe(random.random_bool(share));
                detector.has_recovered()
            })
        };
        let recovered: Vec<_> = (0..50).map(|_| answers_until(0.9, 3_000)).collect();
        assert!(recovered.iter().flatten().count() >= 45, "{recovered:?}");
        let low = (0..50).filter(|_| answers_until(0.75, 3_000).is_some()).count();
        assert!(low <= 2, "{low} of 50 low shares were reported as recovered");
    }

    fn sample() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(0.0f32..1.0, 1..80)
    }

    proptest! {
        #[test]
        fn psi_is_symmetric_and_not_negative(counts in prop::collection::vec((0u64..1000, 0u64..1000), 1..8)) {
            let (left, right): (Vec<_>, Vec<_>) = counts.into_iter().unzip();
            if let Some(index) = population_stability_index(&left, &right) {
                prop_assert!(index >= -1e-12);
                let other = population_stability_index(&right, &left).expect("the same sides");
                prop_assert!(close(index, other, 1e-9));
            }
        }

        #[test]
        fn ks_is_symmetric_and_bounded(left in sample(), right in sample()) {
            let test = kolmogorov_smirnov(&left, &right).expect("samples");
            prop_assert_eq!(Some(test), kolmogorov_smirnov(&right, &left));
            prop_assert!((0.0..=1.0).contains(&test.statistic) && (0.0..=1.0).contains(&test.p_value));
            let same = kolmogorov_smirnov(&left, &left).expect("samples");
            prop_assert_eq!((same.statistic, same.p_value), (0.0, 1.0));
        }
    }
}
