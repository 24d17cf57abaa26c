//! Cross entropy between the outputs and the labels.

use athanor_contract::train::CrossEntropyTerm;
use tch::{Kind, Reduction, Tensor};

use super::term::{Pass, Term};
use crate::{TrainError, data::IGNORED};

pub struct CrossEntropy(pub CrossEntropyTerm);

impl Term for CrossEntropy {
    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError> {
        Ok(cross_entropy(pass.outputs, &pass.batch.targets, self.0.label_smoothing))
    }
}

/// `-log p(label)`, with `label_smoothing` of the probability spread over all labels (Szegedy et al. 2016). `logits`
/// [B, L], `labels` [B] (i64, [`IGNORED`] counts nothing).
pub fn cross_entropy(logits: &Tensor, labels: &Tensor, label_smoothing: f64) -> Tensor {
    logits.to_kind(Kind::Float).cross_entropy_loss::<Tensor>(labels, None, Reduction::Sum, IGNORED, label_smoothing)
}
