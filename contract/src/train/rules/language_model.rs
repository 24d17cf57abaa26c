//! Rules of the task CausalLanguageModel: what it does not have, and what only it has.

use super::rule::Found;
use crate::train::{Task, TrainSpec};

pub(super) fn check(spec: &TrainSpec, found: &mut Found) {
    let generates = spec.model.task == Task::CausalLanguageModel;
    if generates {
        check_absent(spec, found);
    } else {
        if spec.adapter.is_some() {
            found.add("adapter", "requires the task CausalLanguageModel");
        }
        if spec.hyperparameters.packing {
            found.add("hyperparameters.packing", "requires the task CausalLanguageModel");
        }
    }
    for (index, source) in spec.data.sources.iter().enumerate() {
        let columns = &source.columns;
        let given = [("messages", &columns.messages), ("prompt", &columns.prompt), ("completion", &columns.completion)];
        for (name, _) in given.iter().filter(|(_, column)| column.is_some() && !generates) {
            found.add(format!("data.sources[{index}].columns.{name}"), "requires the task CausalLanguageModel");
        }
    }
}

/// What a language model does not have would be ignored.
fn check_absent(spec: &TrainSpec, found: &mut Found) {
    let given = [
        ("model.labels", spec.model.labels.is_some()),
        ("model.head", spec.model.head.is_some()),
        ("model.student", spec.model.student.is_some()),
        ("teacher", spec.teacher.is_some()),
        ("hyperparameters.dropout", spec.hyperparameters.dropout.is_some()),
        ("data.annotate", spec.data.annotate.is_some()),
        ("data.select", spec.data.select.is_some()),
        ("data.augment", spec.data.augment.is_some()),
        ("data.split.stratify", spec.data.split.stratify),
        ("compress", !spec.compress.is_empty()),
    ];
    for (field, _) in given.into_iter().filter(|(_, is_given)| *is_given) {
        found.add(field, "the task CausalLanguageModel does not support it");
    }
}
