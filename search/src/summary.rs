//! Means and spreads of metrics over folds or repetitions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// How a metric spreads over folds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spread {
    pub mean: f64,
    /// Standard deviation of the sample (n - 1); 0 for a single value.
    pub deviation: f64,
    /// Values it is about.
    pub count: usize,
}

/// Mean and sample standard deviation of the values that are finite; `None` if there are none.
pub fn mean_and_deviation(values: &[f64]) -> Option<(f64, f64)> {
    let spread = spread(values.iter().copied())?;
    Some((spread.mean, spread.deviation))
}

fn spread(values: impl Iterator<Item = f64>) -> Option<Spread> {
    let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    if values.is_empty() {
        return None;
    }
    let count = values.len();
    let mean = values.iter().sum::<f64>() / count as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = if count > 1 { (squares / (count - 1) as f64).sqrt() } else { 0.0 };
    Some(Spread { mean, deviation, count })
}

/// Each metric over the folds that have it. A metric that no fold has as a finite number is left out.
pub fn aggregate_folds(folds: &[BTreeMap<String, f64>]) -> BTreeMap<String, Spread> {
    let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (name, value) in folds.iter().flatten() {
        values.entry(name).or_default().push(*value);
    }
    values.into_iter().filter_map(|(name, values)| Some((name.to_owned(), spread(values.into_iter())?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_deviations_are_those_of_a_textbook() {
        assert_eq!(mean_and_deviation(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]), Some((5.0, (32.0_f64 / 7.0).sqrt())));
        assert_eq!(mean_and_deviation(&[0.75]), Some((0.75, 0.0)));
        assert_eq!(mean_and_deviation(&[0.5, f64::NAN]), Some((0.5, 0.0)), "a fold that diverged says nothing");
        assert_eq!(mean_and_deviation(&[]), None);
    }

    #[test]
    fn folds_are_aggregated_metric_by_metric() {
        let fold = |pairs: &[(&str, f64)]| pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let folds: Vec<BTreeMap<String, f64>> =
            vec![fold(&[("accuracy", 0.8), ("reviews/accuracy", 0.7)]), fold(&[("accuracy", 0.9), ("f", f64::NAN)])];
        let spreads = aggregate_folds(&folds);
        assert_eq!(spreads.keys().collect::<Vec<_>>(), ["accuracy", "reviews/accuracy"]);
        let accuracy = spreads["accuracy"];
        assert!((accuracy.mean - 0.85).abs() < 1e-12 && (accuracy.deviation - 0.005_f64.sqrt()).abs() < 1e-12);
        assert_eq!((accuracy.count, spreads["reviews/accuracy"].count), (2, 1));
    }
}
