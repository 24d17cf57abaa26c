//! Predictions on held-out rows, and what they are worth.

mod gates;

use std::collections::{BTreeMap, BTreeSet};

use athanor_contract::{artifact::Reference, train::Metric};
use athanor_models::{BertForSequenceClassification, tokenizer::pad};
use athanor_torch::{Autocast, ProcessGroup};
use tch::{Kind, Reduction, Tensor};

pub use gates::failed_gates;

use crate::{
    TrainError,
    data::{Encoded, batches::evaluation_batches},
};

/// Rows of one forward pass; without gradients memory is no concern, and the rows are sorted by length.
const BATCH: usize = 64;
/// Confidences that the artifact keeps as the baseline of drift detection.
const REFERENCE_CONFIDENCES: usize = 2048;

/// The winning label and its probability for each row.
#[derive(Clone, Debug, PartialEq)]
pub struct Predictions {
    pub labels: Vec<usize>,
    pub confidences: Vec<f32>,
}

/// Predicts all rows, shared among the ranks; every rank gets all results. `beat` is called after each batch.
pub fn predict(
    model: &BertForSequenceClassification,
    rows: &Encoded,
    group: Option<&ProcessGroup>,
    device: tch::Device,
    bf16: bool,
    mut beat: impl FnMut(),
) -> Result<Predictions, TrainError> {
    let (rank, world) = group.map_or((0, 1), |group| (group.rank(), group.world()));
    // A row of another rank stays zero here and is added by the sum over the ranks.
    let mut found = vec![0_f32; rows.len() * 2];
    for batch in evaluation_batches(&rows.lengths(), BATCH, rank, world) {
        let (confidences, labels) = tch::no_grad(|| -> Result<_, TrainError> {
            let _autocast = bf16.then(|| Autocast::bf16(device));
            let logits = forward(model, rows, &batch, device, false);
            let (confidences, labels) = logits.softmax(-1, Kind::Float).max_dim(-1, false);
            Ok((Vec::<f32>::try_from(confidences)?, Vec::<i64>::try_from(labels)?))
        })?;
        for ((row, confidence), label) in batch.into_iter().zip(confidences).zip(labels) {
            found[row * 2] = label as f32;
            found[row * 2 + 1] = confidence;
        }
        beat();
    }
    if let Some(group) = group {
        let all = Tensor::from_slice(&found).to_device(device);
        group.all_reduce_sum(&all)?;
        found = Vec::<f32>::try_from(all)?;
    }
    Ok(Predictions {
        // At most 1,024 labels: exact in f32.
        labels: found.iter().step_by(2).map(|&label| label as usize).collect(),
        confidences: found.into_iter().skip(1).step_by(2).collect(),
    })
}

/// The summed cross entropy of some rows in training, a scalar in FP32. Rows whose label the model does not know count nothing.
pub fn cross_entropy(
    model: &BertForSequenceClassification,
    train: &Encoded,
    rows: &[usize],
    device: tch::Device,
    bf16: bool,
) -> Tensor {
    let _autocast = bf16.then(|| Autocast::bf16(device));
    let logits = forward(model, train, rows, device, true);
    let labels: Vec<i64> = rows.iter().map(|&row| train.labels[row].map_or(-100, |label| label as i64)).collect();
    let labels = Tensor::from_slice(&labels).to_device(device);
    logits.to_kind(Kind::Float).cross_entropy_loss::<Tensor>(&labels, None, Reduction::Sum, -100, 0.0)
}

/// Logits [B, L] of the given rows.
pub fn forward(
    model: &BertForSequenceClassification,
    rows: &Encoded,
    batch: &[usize],
    device: tch::Device,
    train: bool,
) -> Tensor {
    let texts: Vec<&[u32]> = batch.iter().map(|&row| rows.ids[row].as_slice()).collect();
    let padded = texts.iter().any(|ids| ids.len() != texts[0].len());
    let (ids, mask) = pad(&texts, model.config().pad_token_id);
    // Without padding attention needs no mask and takes the faster kernel.
    let mask = padded.then(|| mask.to_device(device));
    model.forward(&ids.to_device(device), mask.as_ref(), train)
}

/// A metric over the rows of some sources (`None`: all). `None` if there are no such rows.
pub fn metric(metric: Metric, rows: &Encoded, predictions: &Predictions, sources: Option<&[usize]>) -> Option<f64> {
    let pairs: Vec<(Option<usize>, usize)> = (0..rows.len())
        .filter(|&row| sources.is_none_or(|sources| sources.contains(&rows.sources[row])))
        .map(|row| (rows.labels[row], predictions.labels[row]))
        .collect();
    if pairs.is_empty() {
        return None;
    }
    Some(match metric {
        Metric::Accuracy => {
            pairs.iter().filter(|(truth, predicted)| *truth == Some(*predicted)).count() as f64 / pairs.len() as f64
        }
        Metric::MacroF1 => macro_f1(&pairs),
    })
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

/// The metrics that a result reports: over all rows, and the accuracy on each source.
pub fn report(rows: &Encoded, predictions: &Predictions, sources: &[String]) -> BTreeMap<String, f64> {
    let mut values = BTreeMap::new();
    for (name, which) in [("accuracy", Metric::Accuracy), ("macroF1", Metric::MacroF1)] {
        values.extend(metric(which, rows, predictions, None).map(|value| (name.to_owned(), value)));
    }
    for (index, source) in sources.iter().enumerate() {
        let value = metric(Metric::Accuracy, rows, predictions, Some(&[index]));
        values.extend(value.map(|value| (format!("{source}/accuracy"), value)));
    }
    values
}

/// What the monitor compares live traffic with.
pub fn reference(labels: &[String], rows: &Encoded, predictions: &Predictions) -> Reference {
    let mut predicted = vec![0; labels.len()];
    for &label in &predictions.labels {
        predicted[label] += 1;
    }
    let correct =
        std::iter::zip(&rows.labels, &predictions.labels).filter(|(truth, label)| **truth == Some(**label)).count();
    let mut sorted = predictions.confidences.clone();
    sorted.sort_by(f32::total_cmp);
    // Evenly spaced ranks keep the distribution's shape, both ends included.
    let kept = sorted.len().min(REFERENCE_CONFIDENCES);
    let confidences = (0..kept).map(|i| sorted[i * (sorted.len() - 1) / (kept - 1).max(1)]).collect();
    Reference { labels: labels.to_vec(), predicted, confidences, correct: correct as u64, rows: rows.len() as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_those_of_scikit_learn() {
        let rows = Encoded {
            ids: vec![vec![]; 6],
            labels: vec![Some(0), Some(0), Some(1), Some(1), Some(2), None],
            sources: vec![0, 0, 0, 1, 1, 1],
        };
        let predictions = Predictions { labels: vec![0, 1, 1, 1, 0, 0], confidences: vec![0.5; 6] };
        let value = |which, sources: Option<&[usize]>| metric(which, &rows, &predictions, sources).unwrap();
        assert_eq!(value(Metric::Accuracy, None), 0.5);
        assert_eq!(value(Metric::Accuracy, Some(&[1])), 1.0 / 3.0);
        // f1_score([0, 0, 1], [0, 1, 1], average="macro")
        assert!((value(Metric::MacroF1, Some(&[0])) - 2.0 / 3.0).abs() < 1e-12);
        // f1_score([0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 0, 0], average="macro")
        assert!((value(Metric::MacroF1, None) - (0.4 + 0.8) / 4.0).abs() < 1e-12);
        assert_eq!(metric(Metric::Accuracy, &rows, &predictions, Some(&[2])), None);
    }

    #[test]
    fn the_reference_keeps_both_ends() {
        let count = 5000;
        let rows = Encoded { ids: vec![vec![]; count], labels: vec![Some(1); count], sources: vec![0; count] };
        let confidences = (0..count).rev().map(|i| i as f32 / count as f32).collect();
        let predictions = Predictions { labels: (0..count).map(|i| i % 2).collect(), confidences };
        let reference = reference(&["a".into(), "b".into()], &rows, &predictions);
        assert_eq!((reference.correct, reference.rows, reference.predicted), (2500, 5000, vec![2500, 2500]));
        assert_eq!(reference.confidences.len(), 2048);
        assert_eq!(reference.confidences[0], 0.0);
        assert_eq!(reference.confidences[2047], 0.9998);
        assert!(reference.confidences.is_sorted());
    }
}
