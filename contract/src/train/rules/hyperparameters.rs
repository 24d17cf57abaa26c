//! Rules of `hyperparameters`. Those of a search's parameters and budgets are checked in the `search` crate, with the
//! messages here.

use super::{Found, Rule, evaluate::check_metric};
use crate::train::{Task, TrainSpec};

pub const EPOCHS_OR_STEPS: Rule =
    Rule::new("!(has(self.epochs) && has(self.maxSteps))", "set epochs or maxSteps, not both");

pub const ASHA_ALONE: Rule =
    Rule::new("!has(self.asha) || self.algorithm == 'ASHA'", "asha requires the algorithm ASHA");

pub const RANGE_VALUES_OR_CHOICES: Rule = Rule::new(
    "[has(self.range), has(self.values), has(self.choices)].filter(given, given).size() == 1",
    "set exactly one of range, values and choices",
);

pub const CHOICES_ARE_NAMES: Rule = Rule::new(
    "has(self.choices) == (self.name in ['optimizer', 'schedule', 'precision'])",
    "choices is for optimizer, schedule and precision; range and values are for numbers",
);

pub const MIN_BELOW_MAX: Rule = Rule::new("self.min < self.max", "min must be below max");

pub const LOG_ABOVE_ZERO: Rule =
    Rule::new("self.scale != 'Log' || self.min > 0.0", "the Log scale requires min above 0");

pub const STEP_IS_LINEAR: Rule = Rule::new("self.scale != 'Log' || !has(self.step)", "step requires the Linear scale");

pub const STEP_ABOVE_ZERO: Rule = Rule::new("!has(self.step) || self.step > 0.0", "step must be above 0");

pub const STEPS_OR_EPOCHS: Rule =
    Rule::new("!(has(self.minimumSteps) && has(self.minimumEpochs))", "set minimumSteps or minimumEpochs, not both");

pub(super) fn check(spec: &TrainSpec, found: &mut Found) {
    let h = &spec.hyperparameters;
    found.require(!(h.epochs.is_some() && h.max_steps.is_some()), "hyperparameters", &EPOCHS_OR_STEPS);
    if h.accumulate_steps > 1 && spec.model.task == Task::Embedding {
        found.add(
            "hyperparameters.accumulateSteps",
            "must be 1 for contrastive terms, which compare all pairs of a batch",
        );
    }
    if let Some(search) = &h.search {
        check_metric(spec.model.task, search.objective.metric, "hyperparameters.search.objective.metric", found);
    }
}
