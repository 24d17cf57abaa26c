//! The terms of an objective, one file each: its value, what it requires, and its test against a naive reference. A new
//! term is a new file and one line in [`of`].
//!
//! Values are sums over rows in FP32. Shapes: B rows, T tokens, C units, L labels.

pub mod contrastive;
pub mod cross_entropy;
pub mod hidden_state;
pub mod masked_tokens;
pub mod mean_squared_error;
pub mod next_token;
pub mod soft_label;
mod term;
#[cfg(test)]
mod tests;

use athanor_contract::train::ObjectiveTerm;

pub use term::{Models, Pass, Term};

/// The implementation of a term of the specification.
pub fn of(term: &ObjectiveTerm) -> Box<dyn Term> {
    match term {
        ObjectiveTerm::CrossEntropy(spec) => Box::new(cross_entropy::CrossEntropy(*spec)),
        ObjectiveTerm::MeanSquaredError => Box::new(mean_squared_error::MeanSquaredError),
        ObjectiveTerm::SoftLabel(spec) => Box::new(soft_label::SoftLabel(*spec)),
        ObjectiveTerm::HiddenState(spec) => Box::new(hidden_state::HiddenState::new(spec.clone())),
        ObjectiveTerm::MaskedLanguageModel(_) => Box::new(masked_tokens::MaskedTokens),
        ObjectiveTerm::Contrastive(spec) => Box::new(contrastive::Contrastive(*spec)),
        ObjectiveTerm::NextToken => Box::new(next_token::NextToken),
    }
}
