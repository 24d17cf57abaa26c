//! The tasks that a model can be trained for, one file each. A new task is a new file and one line in [`of`].

pub mod causal_language_model;
pub mod classification;
pub mod embedding;
pub mod masked_language_model;
pub mod masking;
pub mod regression;
mod task;

use athanor_contract::train;

pub use task::{Rows, Share, Task};

/// The task of a specification.
pub fn of(kind: train::Task) -> &'static dyn Task {
    match kind {
        train::Task::TextClassification => &classification::Classification,
        train::Task::TextRegression => &regression::Regression,
        train::Task::MaskedLanguageModel => &masked_language_model::MaskedLanguageModel,
        train::Task::Embedding => &embedding::Embedding,
        train::Task::CausalLanguageModel => &causal_language_model::CausalLanguageModel,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_task_is_found_by_its_kind() {
        for kind in [
            train::Task::TextClassification,
            train::Task::TextRegression,
            train::Task::MaskedLanguageModel,
            train::Task::Embedding,
            train::Task::CausalLanguageModel,
        ] {
            let task = of(kind);
            assert_eq!(task.kind(), kind);
            let head = task.head(&["a".into(), "b".into()]);
            assert_eq!(head.is_none(), task.generates(), "{kind:?}");
            assert!(head.is_none_or(|head| task.accepts_teacher(&head)), "{kind:?}");
        }
    }
}
