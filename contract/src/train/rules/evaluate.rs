//! Rules of `evaluate`.

use super::{
    cel::{GAIN_NEEDS_BASELINE, ONE_MINIMUM},
    rule::Found,
};
use crate::train::{Metric, Task, TrainSpec};

pub(super) fn check(spec: &TrainSpec, found: &mut Found) {
    let task = spec.model.task;
    for (index, gate) in spec.evaluate.gates.iter().enumerate() {
        let field = format!("evaluate.gates[{index}]");
        check_metric(task, gate.metric, format!("{field}.metric"), found);
        let minima = [&gate.minimum, &gate.maximum, &gate.minimum_gain, &gate.minimum_of_teacher];
        found.require(minima.into_iter().flatten().count() == 1, &field, &ONE_MINIMUM);
        let has_baseline = spec.evaluate.baseline.is_some() || task == Task::CausalLanguageModel;
        let has_reference = gate.minimum_gain.is_none() || has_baseline;
        found.require(has_reference, format!("{field}.minimumGain"), &GAIN_NEEDS_BASELINE);
        if gate.minimum_of_teacher.is_some() {
            super::model::require_classifier_and_teacher(spec, format!("{field}.minimumOfTeacher"), found);
        }
        for name in gate.sources.iter().flatten() {
            if spec.data.sources.iter().all(|source| source.name != *name) {
                found.add(format!("{field}.sources"), format!("no source is named {name:?}"));
            }
        }
    }
}

/// A metric that the task does not have could only fail after the training.
pub(super) fn check_metric(task: Task, metric: Metric, field: impl Into<String>, found: &mut Found) {
    let metrics = Metric::of(task);
    if !metrics.contains(&metric) {
        let names = metrics.iter().map(|metric| format!("{metric:?}")).collect::<Vec<_>>().join(" or ");
        found.add(field, format!("the task {task:?} has no {metric:?}; use {names}"));
    }
}
