//! The tasks that a model can be trained for, one file each. A new task is a new file and one line in [`of`].

pub mod classification;
pub mod embedding;
pub mod masked_language_model;
pub mod masking;
pub mod regression;
mod task;

use athanor_contract::train;

pub use task::{Rows, Task};

use crate::{TrainError, data::Encoded};

/// The task of a specification.
pub fn of(kind: train::Task) -> &'static dyn Task {
    match kind {
        train::Task::TextClassification => &classification::Classification,
        train::Task::TextRegression => &regression::Regression,
        train::Task::MaskedLanguageModel => &masked_language_model::MaskedLanguageModel,
        train::Task::Embedding => &embedding::Embedding,
    }
}

/// The rows as tokens, with the columns of the task.
///
/// # Errors
/// Rows without what the task requires are user errors.
pub fn encode(task: &dyn Task, rows: &Rows) -> Result<Encoded, TrainError> {
    let (dataset, tokenizer) = (rows.dataset, rows.tokenizer);
    let texts = rows.rows.iter().map(|&row| dataset.rows.text(row));
    Ok(Encoded {
        columns: task.encode(rows)?,
        ids: tokenizer.encode_rows(texts, rows.max_length)?,
        sources: rows.rows.iter().map(|&row| dataset.rows.source(row) as u32).collect(),
    })
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
        ] {
            let task = of(kind);
            assert_eq!(task.kind(), kind);
            assert!(task.accepts_teacher(&task.head(&["a".into(), "b".into()])), "{kind:?}");
        }
    }
}
