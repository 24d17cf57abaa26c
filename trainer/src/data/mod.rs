//! Rows (`athanor-data`) to token ids and batches.

pub mod batches;
mod encoded;

pub use athanor_data::{Dataset, Parts};
pub use encoded::Encoded;

use athanor_contract::train::{DataSpec, Task};

use crate::{TrainError, report::Reading};

/// Reads all sources.
///
/// # Errors
/// A malformed row is the user's error and names file, row and field; so is a source without rows.
pub async fn read(spec: &DataSpec, task: Task, reading: &Reading) -> Result<Dataset, TrainError> {
    // Rows to annotate have none yet.
    let labelled = needs_labels(task) && spec.annotate.is_none();
    let dataset = athanor_data::read(spec, labelled, &|progress| reading.at(progress)).await;
    reading.finish();
    Ok(dataset?)
}

/// Whether rows of a task have labels.
pub fn needs_labels(task: Task) -> bool {
    matches!(task, Task::TextClassification | Task::TextRegression)
}
