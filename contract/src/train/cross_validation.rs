//! Cross-validation: how much a score varies.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Before the job's own training there is one training for each fold: on the training rows without the fold, with the
/// best weights chosen by the validation rows, evaluated on the fold. Test rows are not used. The summary's metrics
/// have the prefix `crossValidation/`: the mean over the folds, and with the suffix `/deviation` their standard
/// deviation.
///
/// A search compares its trials by their means over the folds, also with ASHA, whose budgets are then those of each
/// fold's training; the job itself repeats the cross-validation with the values that were found. An interrupted job
/// continues with the first unfinished fold; there are no checkpoints within a fold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CrossValidationSpec {
    /// Number of parts into which the training rows are divided; each is held out once, in a training of its own.
    /// Groups, near duplicates and data.split.stratify are respected as in the split.
    #[schemars(range(min = 2, max = 20))]
    pub folds: u32,
}
