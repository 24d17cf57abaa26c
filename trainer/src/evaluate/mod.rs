//! What a model does on held-out rows, and what that is worth.

pub mod evaluation;
mod gates;
pub mod measuring;

use athanor_contract::artifact::{ClassReference, Reference};
use athanor_models::{Model, Packing, tokenizer::TokenRows};
use athanor_torch::ProcessGroup;
use tch::{Device, Tensor};

pub use evaluation::{Classes, Evaluation, GeneratedAnswer, Predictions};
pub use gates::{HeldOut, Others, failed_gates};

use self::measuring::Measuring;
use crate::{
    TrainError,
    data::Encoded,
    network::{ModelRef, Network},
};

/// Confidences that the artifact keeps as the baseline of drift detection.
const REFERENCE_CONFIDENCES: usize = 2048;
/// Share of its teacher's accuracy below which a student gets a warning.
pub const SHARE_OF_TEACHER: f64 = 0.95;

/// How rows are measured.
#[derive(Clone, Copy)]
pub struct How<'a> {
    pub group: Option<&'a ProcessGroup>,
    pub device: Device,
    pub bf16: bool,
    /// Whether a language model generates answers, which takes longer than all the rest.
    pub generates: bool,
}

/// Measures all rows, shared among the ranks; every rank gets all results. `beat` is called after each batch.
pub fn evaluate<'m>(
    model: impl Into<ModelRef<'m>>,
    rows: &Encoded,
    how: How,
    mut beat: impl FnMut(),
) -> Result<Evaluation, TrainError> {
    let How { group, device, bf16, generates } = how;
    let mut measuring = Measuring { group, device, bf16, generates, beat: &mut beat };
    let results = rows.columns.evaluate(rows, model.into(), &mut measuring)?;
    Ok(Evaluation { sources: rows.sources.clone(), results })
}

/// The same as a server computes: in FP32, an encoder on the CPU with packed matrices. A language model generates
/// answers.
pub fn evaluate_as_served(
    network: &mut Network,
    rows: &Encoded,
    group: Option<&ProcessGroup>,
    device: Device,
    beat: impl FnMut(),
) -> Result<Evaluation, TrainError> {
    let how = How { group, device, bf16: false, generates: true };
    let Network::Encoder(model) = network else { return evaluate(&*network, rows, how, beat) };
    if device == Device::Cpu {
        model.pack(Packing::Float)?;
    }
    let found = evaluate(&**model, rows, how, beat);
    model.unpack();
    found
}

/// Unit vectors [texts, C] by mean pooling, shared among the ranks.
pub fn embed(
    model: &Model,
    texts: &TokenRows,
    group: Option<&ProcessGroup>,
    device: Device,
    bf16: bool,
    mut beat: impl FnMut(),
) -> Result<Tensor, TrainError> {
    Measuring { group, device, bf16, generates: false, beat: &mut beat }.embed(model, texts)
}

/// What the monitor compares live traffic with; for tasks without classes or answers only the number of rows.
pub fn reference(labels: &[String], rows: usize, found: &Evaluation) -> Reference {
    match found.results.text_reference() {
        Some(reference) => Reference::Text(reference),
        None => Reference::Classes(class_reference(labels, rows, found.classes())),
    }
}

fn class_reference(labels: &[String], rows: usize, classes: Option<&Classes>) -> ClassReference {
    let nothing = Classes::default();
    let Classes { truth, predictions } = classes.unwrap_or(&nothing);
    let mut predicted = vec![0; labels.len()];
    for &label in &predictions.labels {
        predicted[label] += 1;
    }
    let correct =
        truth.iter().zip(&predictions.labels).filter(|(truth, label)| truth.map(usize::from) == Some(**label)).count();
    let mut sorted = predictions.confidences.clone();
    sorted.sort_by(f32::total_cmp);
    // Evenly spaced ranks keep the distribution's shape, both ends included.
    let kept = sorted.len().min(REFERENCE_CONFIDENCES);
    let confidences = (0..kept).map(|i| sorted[i * (sorted.len() - 1) / (kept.max(2) - 1)]).collect();
    ClassReference { labels: labels.to_vec(), predicted, confidences, correct: correct as u64, rows: rows as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_keeps_both_ends() {
        let count = 5000;
        let confidences = (0..count).rev().map(|i| i as f32 / count as f32).collect();
        let predictions = Predictions { labels: (0..count).map(|i| i % 2).collect(), confidences };
        let classes = Classes { truth: vec![Some(1); count], predictions };
        let reference = class_reference(&["a".into(), "b".into()], count, Some(&classes));
        assert_eq!((reference.correct, reference.rows, reference.predicted), (2500, 5000, vec![2500, 2500]));
        assert_eq!(reference.confidences.len(), 2048);
        assert_eq!(reference.confidences[0], 0.0);
        assert_eq!(reference.confidences[2047], 0.9998);
        assert!(reference.confidences.is_sorted());
    }
}
