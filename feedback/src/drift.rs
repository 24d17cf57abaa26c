//! Statistics of drift, pure: the population stability index, the two-sample Kolmogorov-Smirnov test, and Wald's sequential test.

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

/// What a sequential test says so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The reference accuracy holds.
    Stable,
    /// The accuracy has fallen by the loss.
    Drifted,
    /// More labels are needed.
    Continue,
}

/// Wald's sequential probability ratio test on labelled answers: H0, the accuracy is the reference's, against H1, it is lower by
/// `loss`, each wrong with probability 1 %. (A. Wald, Sequential Tests of Statistical Hypotheses, 1945.)
#[derive(Clone, Debug, PartialEq)]
pub struct SequentialTest {
    right_step: f64,
    wrong_step: f64,
    log_ratio: f64,
}

/// Probability of each error.
const ERROR: f64 = 0.01;
/// Accuracies are kept this far from 0 and 1, where one surprising answer would decide alone.
const MARGIN: f64 = 0.005;

impl SequentialTest {
    pub fn new(reference_accuracy: f64, loss: f64) -> Self {
        let h0 = reference_accuracy.clamp(2.0 * MARGIN, 1.0 - MARGIN);
        let h1 = (h0 - loss.max(MARGIN)).max(MARGIN);
        Self { right_step: (h1 / h0).ln(), wrong_step: ((1.0 - h1) / (1.0 - h0)).ln(), log_ratio: 0.0 }
    }

    /// Takes one labelled answer.
    pub fn observe(&mut self, correct: bool) {
        self.log_ratio += if correct { self.right_step } else { self.wrong_step };
    }

    pub fn decision(&self) -> Decision {
        let bound = ((1.0 - ERROR) / ERROR).ln();
        match self.log_ratio {
            ratio if ratio >= bound => Decision::Drifted,
            ratio if ratio <= -bound => Decision::Stable,
            _ => Decision::Continue,
        }
    }

    /// Begins anew, as after a decision for H0 in traffic that goes on.
    pub fn restart(&mut self) {
        self.log_ratio = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    #[test]
    fn the_sequential_test_decides_at_walds_bounds() {
        // H0 0.9 against H1 0.85: a wrong answer adds ln(0.15/0.1) = 0.405465, a right one ln(0.85/0.9) = -0.057158,
        // the bounds are -+ln(0.99/0.01) = 4.595120: 12 wrong answers or 81 right ones in a row.
        for (correct, needed, decision) in [(false, 12, Decision::Drifted), (true, 81, Decision::Stable)] {
            let mut test = SequentialTest::new(0.9, 0.05);
            for _ in 0..needed - 1 {
                test.observe(correct);
                assert_eq!(test.decision(), Decision::Continue);
            }
            test.observe(correct);
            assert_eq!(test.decision(), decision);
            test.restart();
            assert_eq!(test.decision(), Decision::Continue);
        }
    }

    #[test]
    fn a_perfect_reference_is_not_disproved_by_one_answer() {
        let mut test = SequentialTest::new(1.0, 0.05);
        test.observe(false);
        assert_eq!(test.decision(), Decision::Continue);
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
