//! Rules of `model`.

use std::collections::BTreeSet;

use super::{
    cel::{HEADS_DIVIDE_SIZE, KEEP_LAYERS_OR_FRESH},
    rule::Found,
};
use crate::train::{Task, TrainSpec};

pub(super) fn check(spec: &TrainSpec, found: &mut Found) {
    if let Some(labels) = &spec.model.labels {
        let mut seen = BTreeSet::new();
        for label in labels.iter().filter(|label| !seen.insert(*label)) {
            found.add("model.labels", format!("{label:?} appears more than once"));
        }
    }
    if let Some(student) = &spec.model.student {
        let holds = student.keep_layers.is_some() != student.fresh.is_some();
        found.require(holds, "model.student", &KEEP_LAYERS_OR_FRESH);
        if let Some(fresh) = &student.fresh {
            // The schema refuses 0 heads.
            let holds = fresh.attention_heads == 0 || fresh.hidden_size.is_multiple_of(fresh.attention_heads);
            found.require(holds, "model.student.fresh", &HEADS_DIVIDE_SIZE);
        }
    }
}

/// For options that compare a classifier's probabilities with the teacher's.
pub(super) fn require_classifier_and_teacher(spec: &TrainSpec, field: impl Into<String>, found: &mut Found) {
    if spec.model.task != Task::TextClassification {
        found.add(field, "requires the task TextClassification");
    } else if spec.teacher.is_none() {
        found.add(field, "requires a teacher");
    }
}
