//! Rules of `hyperparameters`. Those of a search's parameters and budgets are checked in the `search` crate, with the
//! messages here.

use super::{cel::EPOCHS_OR_STEPS, evaluate::check_metric, rule::Found};
use crate::train::{Task, TrainSpec};

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
