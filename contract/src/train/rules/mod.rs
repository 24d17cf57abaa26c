//! Rules between fields of a specification that need neither files nor a network.
//!
//! [`mistakes`] checks them all: the operator reports the result in a condition before any pod runs, the trainer before
//! it reads data. The API server refuses some of them earlier, by a CEL expression: each such [`Rule`] is a constant
//! in `cel.rs`, to which the Rust rule that it mirrors refers for its message. `tests/rules.json` has examples for both;
//! `tests/rules.rs` of this crate and the admission test against a real API server read it. Bounds of single fields
//! (ranges, lengths, patterns) are in the schema and not repeated here; rules of a search's parameters are checked by
//! the `search` crate, which parses them.

mod cel;
mod compress;
mod data;
mod evaluate;
mod hyperparameters;
mod language_model;
mod model;
mod objective;
mod rule;

use super::TrainSpec;
use rule::Found;

pub use cel::{
    ASHA_ALONE, BEGIN_BEFORE_END, CHOICES_ARE_NAMES, COST_NEEDS_PRICES, ENDPOINT_OR_TEACHER, EPOCHS_OR_STEPS,
    FROM_0_TO_1, FROM_0_TO_2, FROM_HALF_TO_1, GAIN_NEEDS_BASELINE, HEADS_DIVIDE_SIZE, KEEP_LAYERS_OR_FRESH,
    LENGTHS_IN_ORDER, LOG_ABOVE_ZERO, MESSAGES_OR_PROMPT, MIN_BELOW_MAX, ONE_MINIMUM, ONE_SOURCE_WITHOUT_PART,
    PROMPT_AND_COMPLETION, PRUNE_OR_QUANTIZE, RANGE_VALUES_OR_CHOICES, SPARSITY_OR_TWO_OF_FOUR, SPLIT_LEAVES_ROWS,
    STEP_ABOVE_ZERO, STEP_IS_LINEAR, STEPS_OR_EPOCHS, URI_OR_KAFKA,
};
pub use rule::{Mistake, Rule};

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
