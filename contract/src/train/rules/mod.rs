//! Rules between fields of a specification that need neither files nor a network.
//!
//! [`mistakes`] checks them all: the operator reports the result in a condition before any pod runs, the trainer before
//! it reads data. The API server refuses some of them earlier, by a CEL expression: each such [`Rule`] is a constant
//! next to the Rust rule that it mirrors and has the same message. `tests/rules.json` has examples for both;
//! `tests/rules.rs` of this crate and the admission test against a real API server read it. Bounds of single fields
//! (ranges, lengths, patterns) are in the schema and not repeated here; rules of a search's parameters are checked by
//! the `search` crate, which parses them.

mod compress;
mod data;
mod evaluate;
mod hyperparameters;
mod language_model;
mod model;
mod objective;

use std::borrow::Cow;
use std::fmt;

use serde::Serialize;

use super::TrainSpec;

pub use compress::{PRUNE_OR_QUANTIZE, SPARSITY_OR_TWO_OF_FOUR};
pub use data::{
    BEGIN_BEFORE_END, COST_NEEDS_PRICES, ENDPOINT_OR_TEACHER, FROM_0_TO_1, FROM_0_TO_2, FROM_HALF_TO_1,
    LENGTHS_IN_ORDER, MESSAGES_OR_PROMPT, PROMPT_AND_COMPLETION, SPLIT_LEAVES_ROWS, URI_OR_KAFKA,
};
pub use evaluate::{GAIN_NEEDS_BASELINE, ONE_MINIMUM};
pub use hyperparameters::{
    ASHA_ALONE, CHOICES_ARE_NAMES, EPOCHS_OR_STEPS, LOG_ABOVE_ZERO, MIN_BELOW_MAX, RANGE_VALUES_OR_CHOICES,
    STEP_ABOVE_ZERO, STEP_IS_LINEAR, STEPS_OR_EPOCHS,
};
pub use model::{HEADS_DIVIDE_SIZE, KEEP_LAYERS_OR_FRESH};
pub use objective::exactly_one_kind;

/// A rule that the API server checks as well: an entry of `x-kubernetes-validations`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// CEL expression, true if the rule holds.
    pub rule: Cow<'static, str>,
    /// What is wrong if it does not hold.
    pub message: Cow<'static, str>,
}

impl Rule {
    const fn new(rule: &'static str, message: &'static str) -> Self {
        Self { rule: Cow::Borrowed(rule), message: Cow::Borrowed(message) }
    }
}

/// A rule that a specification breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Path of the field below `spec`, such as `data.sources[0].uri`.
    pub field: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// The rules that a specification breaks.
pub fn mistakes(spec: &TrainSpec) -> Vec<Mistake> {
    let mut found = Found::default();
    model::check(spec, &mut found);
    objective::check(spec, &mut found);
    data::check(spec, &mut found);
    hyperparameters::check(spec, &mut found);
    evaluate::check(spec, &mut found);
    compress::check(spec, &mut found);
    language_model::check(spec, &mut found);
    found.0
}

/// Mistakes found so far.
#[derive(Default)]
struct Found(Vec<Mistake>);

impl Found {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Mistake { field: field.into(), message: message.into() });
    }

    /// Adds a rule's message unless the rule holds.
    fn require(&mut self, holds: bool, field: impl Into<String>, rule: &Rule) {
        if !holds {
            self.add(field, rule.message.clone());
        }
    }
}
