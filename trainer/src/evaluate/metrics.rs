//! Numbers from what a model said of some rows.

use std::collections::{BTreeMap, BTreeSet};

use athanor_contract::train::Metric;

use super::{Evaluation, Predictions};
use crate::data::Encoded;

/// A metric over the rows of some sources (`None`: all). `None` if there are no such rows, or the metric is not of this task.
pub fn metric(metric: Metric, rows: &Encoded, found: &Evaluation, sources: Option<&[usize]>) -> Option<f64> {
    let chosen: Vec<usize> = (0..rows.len())
        .filter(|&row| sources.is_none_or(|sources| sources.contains(&(rows.sources[row] as usize))))
        .collect();
    if chosen.is_empty() {
        return None;
    }
    match (metric, found) {
        (Metric::Accuracy, Evaluation::Classes(predictions)) => {
            let pairs = pairs(rows, predictions, &chosen);
            let hits = pairs.iter().filter(|(truth, predicted)| *truth == Some(*predicted)).count();
            Some(hits as f64 / pairs.len() as f64)
        }
        (Metric::MacroF1, Evaluation::Classes(predictions)) => Some(macro_f1(&pairs(rows, predictions, &chosen))),
        (Metric::Accuracy, Evaluation::Tokens(tokens)) => {
            let [count, hits, _] = sums(tokens, &chosen);
            (count > 0.0).then(|| hits / count)
        }
        (Metric::Accuracy, Evaluation::Ranks(ranks)) => {
            Some(chosen.iter().filter(|&&row| ranks[row] <= 1.0).count() as f64 / chosen.len() as f64)
        }
        (Metric::PearsonCorrelation, Evaluation::Numbers(numbers)) => {
            let found = chosen.iter().map(|&row| f64::from(numbers[row]));
            let wanted = chosen.iter().map(|&row| f64::from(rows.values[row]));
            Some(pearson(&found.collect::<Vec<_>>(), &wanted.collect::<Vec<_>>()))
        }
        _ => None,
    }
}

/// What chooses the best weights, the more the better, with its name.
pub fn score(rows: &Encoded, found: &Evaluation) -> (&'static str, f64) {
    let all: Vec<usize> = (0..rows.len()).collect();
    match found {
        Evaluation::Classes(_) => ("accuracy", metric(Metric::Accuracy, rows, found, None).unwrap_or(0.0)),
        Evaluation::Numbers(numbers) => ("negativeMeanSquaredError", -mean_squared_error(rows, numbers, &all)),
        Evaluation::Tokens(tokens) => {
            let [count, _, loss] = sums(tokens, &all);
            ("negativeCrossEntropy", -loss / count.max(1.0))
        }
        Evaluation::Ranks(ranks) => ("meanReciprocalRank", reciprocal(ranks, &all)),
    }
}

/// The metrics that a result reports: over all rows, and the main one on each source.
pub fn report(rows: &Encoded, found: &Evaluation, sources: &[String]) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    let all: Vec<usize> = (0..rows.len()).collect();
    let mut add = |name: &str, value: Option<f64>| values.extend(value.map(|value| (name.to_owned(), value)));
    add("accuracy", metric(Metric::Accuracy, rows, found, None));
    add("macroF1", metric(Metric::MacroF1, rows, found, None));
    add("pearsonCorrelation", metric(Metric::PearsonCorrelation, rows, found, None));
    match found {
        Evaluation::Classes(_) => {}
        Evaluation::Numbers(numbers) => add("meanSquaredError", Some(mean_squared_error(rows, numbers, &all))),
        Evaluation::Tokens(_) => add("crossEntropy", Some(-score(rows, found).1)),
        Evaluation::Ranks(ranks) => add("meanReciprocalRank", Some(reciprocal(ranks, &all))),
    }
    let main = match found {
        Evaluation::Numbers(_) => (Metric::PearsonCorrelation, "pearsonCorrelation"),
        _ => (Metric::Accuracy, "accuracy"),
    };
    for (index, source) in sources.iter().enumerate() {
        add(&format!("{source}/{}", main.1), metric(main.0, rows, found, Some(&[index])));
    }
    values
}

/// Truth and prediction of some rows.
fn pairs(rows: &Encoded, predictions: &Predictions, chosen: &[usize]) -> Vec<(Option<usize>, usize)> {
    chosen.iter().map(|&row| (rows.labels[row].map(usize::from), predictions.labels[row])).collect()
}

fn sums(tokens: &[[f32; 3]], chosen: &[usize]) -> [f64; 3] {
    [0, 1, 2].map(|part| chosen.iter().map(|&row| f64::from(tokens[row][part])).sum())
}

fn reciprocal(ranks: &[f32], chosen: &[usize]) -> f64 {
    chosen.iter().map(|&row| 1.0 / f64::from(ranks[row])).sum::<f64>() / chosen.len().max(1) as f64
}

fn mean_squared_error(rows: &Encoded, numbers: &[f32], chosen: &[usize]) -> f64 {
    let squares = chosen.iter().map(|&row| f64::from(numbers[row] - rows.values[row]).powi(2));
    squares.sum::<f64>() / chosen.len().max(1) as f64
}

/// Pearson's correlation; 0 where one side does not vary.
fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        ab += (a - mean_a) * (b - mean_b);
        aa += (a - mean_a).powi(2);
        bb += (b - mean_b).powi(2);
    }
    if aa > 0.0 && bb > 0.0 { ab / (aa * bb).sqrt() } else { 0.0 }
}

/// The mean of the labels' F1 scores, over the labels that occur as truth or as prediction, as scikit-learn has it.
fn macro_f1(pairs: &[(Option<usize>, usize)]) -> f64 {
    let labels: BTreeSet<Option<usize>> =
        pairs.iter().flat_map(|&(truth, predicted)| [truth, Some(predicted)]).collect();
    let total: f64 = labels
        .iter()
        .map(|label| {
            let hits = pairs.iter().filter(|(truth, predicted)| truth == label && Some(*predicted) == *label).count();
            let misses =
                pairs.iter().filter(|(truth, predicted)| (truth == label) != (Some(*predicted) == *label)).count();
            2.0 * hits as f64 / (2 * hits + misses) as f64
        })
        .sum();
    total / labels.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_those_of_scikit_learn() {
        let rows = Encoded {
            labels: vec![Some(0), Some(0), Some(1), Some(1), Some(2), None],
            sources: vec![0, 0, 0, 1, 1, 1],
            ..Encoded::blank(6)
        };
        let predictions =
            Evaluation::Classes(Predictions { labels: vec![0, 1, 1, 1, 0, 0], confidences: vec![0.5; 6] });
        let value = |which, sources: Option<&[usize]>| metric(which, &rows, &predictions, sources).unwrap();
        assert_eq!(value(Metric::Accuracy, None), 0.5);
        assert_eq!(value(Metric::Accuracy, Some(&[1])), 1.0 / 3.0);
        // f1_score([0, 0, 1], [0, 1, 1], average="macro")
        assert!((value(Metric::MacroF1, Some(&[0])) - 2.0 / 3.0).abs() < 1e-12);
        // f1_score([0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 0, 0], average="macro")
        assert!((value(Metric::MacroF1, None) - (0.4 + 0.8) / 4.0).abs() < 1e-12);
        assert_eq!(metric(Metric::Accuracy, &rows, &predictions, Some(&[2])), None);
        assert_eq!(metric(Metric::PearsonCorrelation, &rows, &predictions, None), None);
    }

    #[test]
    fn other_tasks_have_their_own() {
        let rows = Encoded { values: vec![1.0, 2.0, 3.0, 4.0], sources: vec![0, 0, 1, 1], ..Encoded::blank(4) };
        let numbers = Evaluation::Numbers(vec![2.0, 4.0, 6.0, 8.0]);
        let names = ["a".to_owned(), "b".to_owned()];
        let found = report(&rows, &numbers, &names);
        assert!((found["pearsonCorrelation"] - 1.0).abs() < 1e-12);
        assert_eq!(found["meanSquaredError"], (1.0 + 4.0 + 9.0 + 16.0) / 4.0);
        assert!(found.contains_key("b/pearsonCorrelation"));
        assert_eq!(score(&rows, &numbers), ("negativeMeanSquaredError", -7.5));

        let tokens = Evaluation::Tokens(vec![[2.0, 1.0, 3.0], [2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [4.0, 1.0, 4.0]]);
        let found = report(&rows, &tokens, &names);
        assert_eq!((found["accuracy"], found["crossEntropy"], found["a/accuracy"]), (0.5, 1.0, 0.75));

        let ranks = Evaluation::Ranks(vec![1.0, 2.0, 1.0, 4.0]);
        let found = report(&rows, &ranks, &names);
        assert_eq!((found["accuracy"], found["meanReciprocalRank"]), (0.5, 2.75 / 4.0));
    }
}
