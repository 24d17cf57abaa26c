//! `TextRegression`: one number for each text.

use athanor_contract::train::{self, Metric, WeightedTerm};
use athanor_models::{self as models, Model};
use tch::Tensor;

use super::task::{Rows, Task};
use crate::{
    TrainError,
    data::{Batch, Columns, Dataset, Encoded, Part},
    evaluate::{evaluation::Results, measuring::Measuring},
    network::ModelRef,
};

pub struct Regression;

impl Task for Regression {
    fn kind(&self) -> train::Task {
        train::Task::TextRegression
    }

    fn needs_labels(&self) -> bool {
        true
    }

    fn labels_are_numbers(&self) -> bool {
        true
    }

    fn head(&self, _labels: &[String]) -> Option<models::Task> {
        Some(models::Task::Regression)
    }

    fn accepts_teacher(&self, head: &models::Task) -> bool {
        *head == models::Task::Regression
    }

    fn encode(&self, rows: &Rows) -> Result<Encoded, TrainError> {
        let numbers: Result<_, TrainError> = rows.rows.iter().map(|&row| number(rows.dataset, row)).collect();
        rows.with(Numbers(numbers?))
    }

    fn outputs(&self, model: &Model, _batch: &Batch, last: &Tensor, train: bool) -> Tensor {
        model.outputs(last, train)
    }
}

/// Each row's label as a number.
#[derive(Clone, Debug)]
pub struct Numbers(pub Vec<f32>);

impl Columns for Numbers {
    fn select(&mut self, rows: &[usize]) {
        self.0 = rows.iter().map(|&row| self.0[row]).collect();
    }

    /// A row without a label has no number: whatever is compared with it is not finite.
    fn extend(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, f32::NAN);
    }

    fn collate(&self, part: &Part, _terms: &[WeightedTerm], pad_id: i64) -> Result<Batch, TrainError> {
        let values: Vec<f32> = part.rows.iter().map(|&row| self.0[row]).collect();
        Ok(Batch { targets: Tensor::from_slice(&values).unsqueeze(1).to_device(part.device), ..part.texts(pad_id) })
    }

    fn evaluate(
        &self,
        rows: &Encoded,
        model: ModelRef,
        measuring: &mut Measuring,
    ) -> Result<Box<dyn Results>, TrainError> {
        let model = model.encoder()?;
        let (pad_id, device) = (model.config().pad_token_id, measuring.device);
        let found = measuring.rows(&rows.lengths(), 1, |batch| {
            let texts: Vec<&[u32]> = batch.iter().map(|&row| &rows.ids[row]).collect();
            let Batch { ids, mask, .. } = Batch::of_texts(&texts, pad_id, device);
            Ok(Vec::<f32>::try_from(model.forward(&ids, mask.as_ref(), false).reshape([-1]))?)
        })?;
        Ok(Box::new(Estimates { wanted: self.0.clone(), found }))
    }
}

/// The expected and the predicted number of each row.
#[derive(Debug)]
struct Estimates {
    wanted: Vec<f32>,
    found: Vec<f32>,
}

impl Estimates {
    fn mean_squared_error(&self, rows: &[usize]) -> f64 {
        let squares = rows.iter().map(|&row| f64::from(self.found[row] - self.wanted[row]).powi(2));
        squares.sum::<f64>() / rows.len().max(1) as f64
    }
}

impl Results for Estimates {
    fn metric(&self, metric: Metric, rows: &[usize]) -> Option<f64> {
        let of = |values: &[f32]| rows.iter().map(|&row| f64::from(values[row])).collect::<Vec<_>>();
        (metric == Metric::PearsonCorrelation).then(|| pearson(&of(&self.found), &of(&self.wanted)))
    }

    fn score(&self, rows: &[usize]) -> (&'static str, f64) {
        ("negativeMeanSquaredError", -self.mean_squared_error(rows))
    }

    fn main_metric(&self) -> Metric {
        Metric::PearsonCorrelation
    }

    fn reported(&self, rows: &[usize]) -> Option<(&'static str, f64)> {
        Some(("meanSquaredError", self.mean_squared_error(rows)))
    }
}

fn number(dataset: &Dataset, row: usize) -> Result<f32, TrainError> {
    let label = dataset.rows.label(row).unwrap_or_default();
    match label.trim().parse::<f32>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err(TrainError::User(format!(
            "{}: label {label:?} is not a number, which TextRegression needs",
            dataset.rows.place(row)
        ))),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::Evaluation;

    #[test]
    fn numbers_are_correlated_and_compared() {
        let (wanted, found) = (vec![1.0, 2.0, 3.0, 4.0], vec![2.0, 4.0, 6.0, 8.0]);
        let found = Evaluation { sources: vec![0, 0, 1, 1], results: Box::new(Estimates { wanted, found }) };
        let report = found.report(&["a".to_owned(), "b".to_owned()]);
        assert!((report["pearsonCorrelation"] - 1.0).abs() < 1e-12);
        assert_eq!(report["meanSquaredError"], (1.0 + 4.0 + 9.0 + 16.0) / 4.0);
        assert!(report.contains_key("b/pearsonCorrelation"));
        assert_eq!(found.score(), ("negativeMeanSquaredError", -7.5));
    }
}
