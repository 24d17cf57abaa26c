//! The terms of an objective, one file each: its value, what it requires, and its test against a naive reference. A new
//! term is a new file and one line in [`of`].
//!
//! Values are sums over rows in FP32. Shapes: B rows, T tokens, C units, L labels.

pub mod contrastive;
pub mod cross_entropy;
pub mod hidden_state;
pub mod masked_tokens;
pub mod mean_squared_error;
pub mod soft_label;
mod term;
#[cfg(test)]
mod tests;

use athanor_contract::train::ObjectiveTerm;

pub use term::{Models, Pass, Term};

/// The kind of a term of the specification; `None` if the term sets no kind.
pub fn of(term: &ObjectiveTerm) -> Option<Box<dyn Term>> {
    let ObjectiveTerm {
        weight: _,
        cross_entropy,
        mean_squared_error,
        soft_label,
        hidden_state,
        masked_language_model,
        contrastive,
    } = term.clone();
    let kinds: [Option<Box<dyn Term>>; 6] = [
        cross_entropy.map(|spec| Box::new(cross_entropy::CrossEntropy(spec)) as _),
        mean_squared_error.map(|_| Box::new(mean_squared_error::MeanSquaredError) as _),
        soft_label.map(|spec| Box::new(soft_label::SoftLabel(spec)) as _),
        hidden_state.map(|spec| Box::new(hidden_state::HiddenState::new(spec)) as _),
        masked_language_model.map(|_| Box::new(masked_tokens::MaskedTokens) as _),
        contrastive.map(|spec| Box::new(contrastive::Contrastive(spec)) as _),
    ];
    kinds.into_iter().flatten().next()
}
