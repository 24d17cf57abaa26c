//! What a classifier did on the test rows: confusion, calibration and mistakes.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{data::Dataset, evaluate::Classes};

/// Bins of confidence.
const BINS: usize = 10;
/// Mistakes that are shown, and characters of each text.
const MISTAKES: usize = 20;
const EXCERPT: usize = 240;

/// What a classifier did on the test rows.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClassReport {
    /// Rows by true and predicted label, where there are any.
    pub confusion: Vec<Confusion>,
    pub calibration: Calibration,
    /// The most confident ones first.
    pub mistakes: Vec<Mistake>,
}

impl ClassReport {
    /// `part` are the test rows' places in the dataset.
    pub fn new(labels: &[String], dataset: &Dataset, part: &[usize], found: &Classes) -> Self {
        Self {
            confusion: confusion(labels, found),
            calibration: calibration(labels.len(), found),
            mistakes: mistakes(labels, dataset, part, found),
        }
    }
}

#[derive(Debug, PartialEq, Serialize)]
pub struct Confusion {
    pub label: String,
    pub predicted: String,
    pub rows: usize,
}

/// How far confidences can be taken at their word (Guo et al. 2017, <https://arxiv.org/abs/1706.04599>).
#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Calibration {
    /// Mean distance of accuracy and confidence over the bins, weighted by their rows.
    pub expected_error: f64,
    pub bins: Vec<Bin>,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bin {
    pub lower: f64,
    pub upper: f64,
    pub rows: usize,
    pub confidence: f64,
    pub accuracy: f64,
}

#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Mistake {
    pub text: String,
    pub place: String,
    pub label: String,
    pub predicted: String,
    pub confidence: f64,
}

fn confusion(labels: &[String], found: &Classes) -> Vec<Confusion> {
    let mut cells: BTreeMap<(usize, usize), usize> = BTreeMap::new();
    for (label, &predicted) in std::iter::zip(&found.truth, &found.predictions.labels) {
        if let Some(label) = *label {
            *cells.entry((usize::from(label), predicted)).or_default() += 1;
        }
    }
    let cell = |((label, predicted), rows): ((usize, usize), usize)| Confusion {
        label: labels[label].clone(),
        predicted: labels[predicted].clone(),
        rows,
    };
    cells.into_iter().map(cell).collect()
}

fn calibration(labels: usize, found: &Classes) -> Calibration {
    // A winning probability is never below one over the number of labels.
    let lowest = 1.0 / labels.max(1) as f64;
    let width = (1.0 - lowest) / BINS as f64;
    let mut bins = vec![(0_usize, 0_usize, 0.0_f64); BINS];
    let Classes { truth, predictions } = found;
    for ((label, predicted), confidence) in truth.iter().zip(&predictions.labels).zip(&predictions.confidences) {
        let confidence = f64::from(*confidence);
        let index = (((confidence - lowest) / width.max(1e-9)) as usize).min(BINS - 1);
        let (count, right, sum) = &mut bins[index];
        *count += 1;
        *right += usize::from(label.map(usize::from) == Some(*predicted));
        *sum += confidence;
    }
    let bins: Vec<Bin> = (0..)
        .zip(bins)
        .filter(|(_, (count, ..))| *count > 0)
        .map(|(index, (count, right, sum))| Bin {
            lower: lowest + width * f64::from(index),
            upper: lowest + width * f64::from(index + 1),
            rows: count,
            confidence: sum / count as f64,
            accuracy: right as f64 / count as f64,
        })
        .collect();
    let error = |bin: &Bin| (bin.accuracy - bin.confidence).abs() * bin.rows as f64;
    Calibration { expected_error: bins.iter().map(error).sum::<f64>() / truth.len().max(1) as f64, bins }
}

/// The wrong answers the model was surest of: wrong labels in the data are often among them.
fn mistakes(labels: &[String], dataset: &Dataset, part: &[usize], found: &Classes) -> Vec<Mistake> {
    let Classes { truth, predictions } = found;
    let mut wrong: Vec<usize> =
        (0..truth.len()).filter(|&row| truth[row].map(usize::from) != Some(predictions.labels[row])).collect();
    wrong.sort_by(|&a, &b| predictions.confidences[b].total_cmp(&predictions.confidences[a]));
    let mistake = |row: usize| {
        let (rows, at) = (&dataset.rows, part[row]);
        let text = rows.text(at);
        let cut = text.chars().count() > EXCERPT;
        Mistake {
            text: text.chars().take(EXCERPT).chain(cut.then_some('…')).collect(),
            place: rows.place(at),
            label: rows.label(at).unwrap_or_default().to_owned(),
            predicted: labels[predictions.labels[row]].clone(),
            confidence: f64::from(predictions.confidences[row]),
        }
    };
    wrong.into_iter().take(MISTAKES).map(mistake).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::Predictions;

    #[test]
    fn calibration_is_the_weighted_distance() {
        let truth = vec![Some(0), Some(0), Some(0), Some(1)];
        let predictions = Predictions { labels: vec![0, 0, 1, 1], confidences: vec![0.5, 0.54, 0.97, 1.0] };
        let found = calibration(2, &Classes { truth, predictions });
        assert_eq!(found.bins.len(), 2);
        assert_eq!((found.bins[0].rows, found.bins[0].accuracy), (2, 1.0));
        assert_eq!((found.bins[1].rows, found.bins[1].accuracy), (2, 0.5));
        // (|1 - 0.52| * 2 + |0.5 - 0.985| * 2) / 4
        assert!((found.expected_error - 0.4825).abs() < 1e-6, "{}", found.expected_error);
    }
}
