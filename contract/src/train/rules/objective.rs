//! Rules of `objective` and `teacher`.

use super::rule::Found;
use crate::train::{self, Task, TeacherOutputs, TrainSpec};

/// Kinds of terms that a task can minimise.
fn kinds_of(task: Task) -> &'static [&'static str] {
    match task {
        Task::TextClassification => &["crossEntropy", "meanSquaredError", "softLabel", "hiddenState"],
        Task::TextRegression => &["meanSquaredError", "hiddenState"],
        Task::MaskedLanguageModel => &["maskedLanguageModel", "softLabel", "hiddenState"],
        Task::Embedding => &["contrastive", "meanSquaredError", "hiddenState"],
        Task::CausalLanguageModel => &["nextToken"],
    }
}

pub(super) fn check(spec: &TrainSpec, found: &mut Found) {
    let task = spec.model.task;
    for (index, entry) in spec.objective.terms.iter().enumerate() {
        let field = format!("objective.terms[{index}]");
        let Some(term) = entry.parse() else {
            found.add(field, train::exactly_one_kind().message);
            continue;
        };
        let field = format!("{field}.{}", term.name());
        let kinds = kinds_of(task);
        if !kinds.contains(&term.name()) {
            found.add(&field, format!("the task {task:?} does not have this term; use {}", kinds.join(", ")));
        }
        if term.term.needs_teacher(task) && spec.teacher.is_none() {
            found.add(field, "requires a teacher");
        }
    }
    check_teacher(spec, found);
}

/// A teacher that nothing uses would be fetched for nothing, and outputs that are not by row cannot be cached.
fn check_teacher(spec: &TrainSpec, found: &mut Found) {
    let Some(teacher) = &spec.teacher else { return };
    if !spec.learns_from_teacher() && !spec.data.teacher_annotates() {
        let names: Vec<&str> = spec.objective_terms().iter().map(|term| term.name()).collect();
        found.add(
            "teacher",
            format!(
                "nothing uses it: no term of objective.terms ({}) needs a teacher, and neither data.select nor \
                 data.annotate.teacher is set",
                names.join(", ")
            ),
        );
    }
    let is_by_row = spec.model.task == Task::TextClassification && !spec.objective.compares_hidden_states();
    if teacher.outputs == Some(TeacherOutputs::Cached) && !is_by_row {
        found.add("teacher.outputs", "Cached requires the task TextClassification without hiddenState terms");
    }
}
