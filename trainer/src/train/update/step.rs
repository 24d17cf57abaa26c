//! The calls of an optimizer step, and what all updates share.

use athanor_contract::train::{self, Hyperparameters};
use athanor_torch::Rule;
use tch::Tensor;

use crate::{
    TrainError,
    data::Encoded,
    network::Network,
    objectives::Objective,
    train::named::{self, Named},
};

/// Changes the trainable parameters by their gradients. All ranks make the same calls in the same order.
pub trait Update {
    /// Starts a step on `batch`, the global batch's rows of `train`.
    fn begin(&mut self, model: &mut Network, train: &Encoded, batch: &[usize]) -> Result<(), TrainError>;

    /// Backward pass of this rank's share of the loss, divided by the units of the global batch. Gradients of several
    /// parts add up.
    fn backward(&mut self, loss: &Tensor, is_last: bool) -> Result<(), TrainError>;

    /// Ends the backward passes: adds the penalty's gradient and returns the sum of the squares of all gradients on all
    /// ranks.
    fn gradient_squares(&mut self, model: &mut Network) -> Result<f64, TrainError>;

    /// Multiplies all gradients.
    fn scale_gradients(&mut self, factor: f64) -> Result<(), TrainError>;

    /// Ends the backward passes. Returns the 2-norm of all gradients before they are scaled down to `clip_norm`, which
    /// happens if `clip_norm` is above zero and below the norm. If the norm is not finite, the gradients stay as they
    /// are.
    fn finish(&mut self, model: &mut Network, clip_norm: f64) -> Result<f64, TrainError> {
        let norm = self.gradient_squares(model)?.sqrt();
        if clip_norm > 0.0 && norm.is_finite() && norm > clip_norm {
            self.scale_gradients(clip_norm / (norm + 1e-6))?;
        }
        Ok(norm)
    }

    /// Changes the parameters by their gradients.
    fn apply(&mut self, learning_rate: f64) -> Result<(), TrainError>;

    /// Brings all parameters and the state up to date, before they are read as a whole (validation, checkpoint).
    fn catch_up(&mut self) -> Result<(), TrainError>;

    /// The optimizer state that this rank keeps, by parameter, sharing memory; up to date after [`Update::catch_up`].
    fn state(&self) -> Named;

    /// Whether ranks keep parts of the state, so that a checkpoint needs [`Update::gather`].
    fn is_sharded(&self) -> bool;

    /// A copy of the whole state in the host's memory on rank 0, with the names and shapes of an update without shards;
    /// nothing on the other ranks. All ranks have to call it, after [`Update::catch_up`].
    fn gather(&self) -> Result<Named, TrainError>;

    /// Overwrites the state with what [`Update::state`] or [`Update::gather`] returned.
    fn load(&mut self, find: &mut dyn FnMut(&str) -> Option<Tensor>) -> Result<(), TrainError>;

    /// Sums the numbers of a tensor on the device over the ranks, in place.
    fn sum(&self, numbers: &Tensor) -> Result<(), TrainError>;

    /// The answer of rank 0.
    fn rank_0_says(&self, answer: bool) -> Result<bool, TrainError>;
}

/// The parameters that training changes, by name: those of the model that require gradients, then the objective's own.
/// Optimizer, ranks and checkpoints see no others.
pub fn trainable(model: &Network, objective: &Objective) -> Named {
    let mut named = trainable_of_model(model);
    named.extend(named::share(objective.parameters()));
    named
}

/// The model's parameters that require gradients.
pub fn trainable_of_model(model: &Network) -> Named {
    named::share(model.parameters()).into_iter().filter(|(_, tensor)| tensor.requires_grad()).collect()
}

/// What is not finite in a step, if anything: the parameters must not change then. The loss is summed over the ranks
/// and the norm is that of all their gradients, so all ranks decide alike.
pub fn not_finite(loss: f64, gradient_norm: f64) -> Option<&'static str> {
    match (loss.is_finite(), gradient_norm.is_finite()) {
        (false, _) => Some("the loss"),
        (true, false) => Some("the gradient"),
        (true, true) => None,
    }
}

/// The update rule that hyperparameters ask for.
pub fn rule(h: &Hyperparameters) -> Rule {
    let (momentum, beta1, beta2, epsilon) = (h.momentum, h.beta1, h.beta2, h.epsilon);
    match h.optimizer {
        train::Optimizer::SGD => Rule::Sgd { momentum },
        train::Optimizer::Adam => Rule::Adam { beta1, beta2, epsilon },
        train::Optimizer::AdamW => Rule::AdamW { beta1, beta2, epsilon },
        train::Optimizer::RMSprop => Rule::RmsProp { alpha: beta2, momentum, epsilon },
    }
}

/// Weight decay of the parameters that decay: AdamW's; the other optimizers have L2 instead.
pub fn weight_decay(h: &Hyperparameters) -> f64 {
    if h.optimizer == train::Optimizer::AdamW { h.weight_decay } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_not_applied_if_its_loss_or_its_gradient_is_not_finite() {
        for (loss, norm, expected) in [
            (0.7, 1.0, None),
            (f64::NAN, 1.0, Some("the loss")),
            (f64::INFINITY, f64::NAN, Some("the loss")),
            (0.7, f64::INFINITY, Some("the gradient")),
            (0.7, f64::NAN, Some("the gradient")),
        ] {
            assert_eq!(not_finite(loss, norm), expected, "{loss} {norm}");
        }
    }
}
