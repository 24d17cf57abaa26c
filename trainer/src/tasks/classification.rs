//! `TextClassification`: one of several labels for each text.

use std::collections::{BTreeSet, HashMap};

use athanor_contract::train::{self, Metric, WeightedTerm};
use athanor_models::{self as models, Model};
use tch::{Kind, Tensor};

use super::task::{Rows, Task};
use crate::{
    TrainError,
    data::{Batch, Columns, Encoded, IGNORED, Part},
    evaluate::{
        evaluation::{Classes, Predictions, Results},
        measuring::Measuring,
    },
    network::ModelRef,
};

pub struct Classification;

impl Task for Classification {
    fn kind(&self) -> train::Task {
        train::Task::TextClassification
    }

    fn needs_labels(&self) -> bool {
        true
    }

    fn has_classes(&self) -> bool {
        true
    }

    fn teacher_is_cacheable(&self) -> bool {
        true
    }

    fn head(&self, labels: &[String]) -> Option<models::Task> {
        Some(models::Task::Classification(labels.to_vec()))
    }

    fn accepts_teacher(&self, head: &models::Task) -> bool {
        matches!(head, models::Task::Classification(_))
    }

    fn encode(&self, rows: &Rows) -> Result<Encoded, TrainError> {
        // At most 1,024 labels are found; a model that has more than 65,536 has none for the rest.
        let index: HashMap<&str, u16> = rows.labels.iter().map(String::as_str).zip(0..).collect();
        let label = |&row: &usize| index.get(rows.dataset.rows.label(row)?).copied();
        rows.with(Labels(rows.rows.iter().map(label).collect()))
    }

    fn outputs(&self, model: &Model, _batch: &Batch, last: &Tensor, train: bool) -> Tensor {
        model.outputs(last, train)
    }
}

/// Index of each row's label; `None` for a label that the model does not have (a baseline of other classes), and for
/// new texts.
#[derive(Clone, Debug)]
pub struct Labels(pub Vec<Option<u16>>);

impl Columns for Labels {
    fn select(&mut self, rows: &[usize]) {
        self.0 = rows.iter().map(|&row| self.0[row]).collect();
    }

    fn extend(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, None);
    }

    fn classes(&self) -> Option<&[Option<u16>]> {
        Some(&self.0)
    }

    fn collate(&self, part: &Part, _terms: &[WeightedTerm], pad_id: i64) -> Result<Batch, TrainError> {
        let labels: Vec<i64> = part.rows.iter().map(|&row| self.0[row].map_or(IGNORED, i64::from)).collect();
        Ok(Batch { targets: Tensor::from_slice(&labels).to_device(part.device), ..part.texts(pad_id) })
    }

    fn evaluate(
        &self,
        rows: &Encoded,
        model: ModelRef,
        measuring: &mut Measuring,
    ) -> Result<Box<dyn Results>, TrainError> {
        let model = model.encoder()?;
        let (pad_id, device) = (model.config().pad_token_id, measuring.device);
        let found = measuring.rows(&rows.lengths(), 2, |batch| {
            let texts: Vec<&[u32]> = batch.iter().map(|&row| &rows.ids[row]).collect();
            let Batch { ids, mask, .. } = Batch::of_texts(&texts, pad_id, device);
            let logits = model.forward(&ids, mask.as_ref(), false);
            let (confidences, labels) = logits.softmax(-1, Kind::Float).max_dim(-1, false);
            Ok(Vec::<f32>::try_from(Tensor::stack(&[labels.to_kind(Kind::Float), confidences], 1).reshape([-1]))?)
        })?;
        let predictions = Predictions {
            // At most 1,024 labels: exact in f32.
            labels: found.iter().step_by(2).map(|&label| label as usize).collect(),
            confidences: found.into_iter().skip(1).step_by(2).collect(),
        };
        Ok(Box::new(Classes { truth: self.0.clone(), predictions }))
    }
}

impl Results for Classes {
    fn metric(&self, metric: Metric, rows: &[usize]) -> Option<f64> {
        let pair = |&row: &usize| (self.truth[row].map(usize::from), self.predictions.labels[row]);
        let pairs: Vec<(Option<usize>, usize)> = rows.iter().map(pair).collect();
        match metric {
            Metric::Accuracy => {
                let hits = pairs.iter().filter(|(truth, predicted)| *truth == Some(*predicted)).count();
                Some(hits as f64 / pairs.len() as f64)
            }
            Metric::MacroF1 => Some(macro_f1(&pairs)),
            _ => None,
        }
    }

    fn score(&self, rows: &[usize]) -> (&'static str, f64) {
        let accuracy = if rows.is_empty() { None } else { self.metric(Metric::Accuracy, rows) };
        ("accuracy", accuracy.unwrap_or(0.0))
    }

    fn classes(&self) -> Option<&Classes> {
        Some(self)
    }
}

/// The mean of the labels' F1 scores, over the labels that occur as truth or as prediction, as scikit-learn computes
/// it.
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
    use crate::evaluate::Evaluation;

    #[test]
    fn metrics_are_those_of_scikit_learn() {
        let truth = vec![Some(0), Some(0), Some(1), Some(1), Some(2), None];
        let predictions = Predictions { labels: vec![0, 1, 1, 1, 0, 0], confidences: vec![0.5; 6] };
        let found = Evaluation { sources: vec![0, 0, 0, 1, 1, 1], results: Box::new(Classes { truth, predictions }) };
        let value = |which, sources: Option<&[usize]>| found.metric(which, sources).unwrap();
        assert_eq!(value(Metric::Accuracy, None), 0.5);
        assert_eq!(value(Metric::Accuracy, Some(&[1])), 1.0 / 3.0);
        // f1_score([0, 0, 1], [0, 1, 1], average="macro")
        assert!((value(Metric::MacroF1, Some(&[0])) - 2.0 / 3.0).abs() < 1e-12);
        // f1_score([0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 0, 0], average="macro")
        assert!((value(Metric::MacroF1, None) - (0.4 + 0.8) / 4.0).abs() < 1e-12);
        assert_eq!(found.metric(Metric::Accuracy, Some(&[2])), None);
        assert_eq!(found.metric(Metric::PearsonCorrelation, None), None);
    }
}
