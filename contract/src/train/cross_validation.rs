//! Cross-validation: how far a score can be trusted.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Before the job's own training, one training for each fold: on the training rows without the fold, with the best weights chosen by
/// the validation rows, and measured on the fold. Test rows take no part. The summary's metrics have `crossValidation/` in front:
/// the mean over the folds, and its standard deviation under `/deviation`.
///
/// In a search each trial is judged by its mean over the folds, also with ASHA, whose budgets are then those of each fold's training;
/// the job itself cross-validates what was found once more. A job that was interrupted goes on with the first fold that is not
/// done: within a fold there are no checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CrossValidationSpec {
    /// Parts that the training rows are dealt into, each held out once: as many more trainings. Groups, near duplicates and
    /// data.split.stratify count as they do for the split.
    #[schemars(range(min = 2, max = 20))]
    pub folds: u32,
}
