//! What one training is given, and what it comes to.

use std::{path::PathBuf, sync::Arc};

use athanor_contract::train::{DEFAULT_EPOCHS, Hyperparameters, Metric, TrainSpec};
use athanor_torch::ProcessGroup;
use tch::Device;
use tokio_util::sync::CancellationToken;

use super::{
    checkpoint::{Best, Restored, Writer},
    watchdog::Watchdog,
};
use crate::{
    TrainError,
    data::Encoded,
    network::Network,
    objectives::{Objective, Teacher},
    report::{Events, History, Reporter, Timeline},
};

/// Everything a run of the loop needs; the caller made and keeps it.
pub struct Session<'a> {
    pub spec: &'a TrainSpec,
    /// What progress calls this training.
    pub stage: String,
    pub device: Device,
    pub bf16: bool,
    pub group: Option<&'a ProcessGroup>,
    pub model: &'a mut Network,
    pub objective: Objective,
    pub teacher: Option<&'a Teacher>,
    pub train: &'a Encoded,
    /// Returns the validation rows; called first at the first validation.
    pub validation: Box<dyn Fn() -> Result<Arc<Encoded>, TrainError> + 'a>,
    pub fingerprint: String,
    pub restored: Option<Restored>,
    /// Rank 0's.
    pub checkpoints: Option<Writer>,
    /// Rank 0's.
    pub events: Option<Events>,
    pub reporter: Option<&'a mut Reporter>,
    pub timeline: Timeline,
    pub watchdog: Watchdog,
    pub stop: CancellationToken,
    pub loss_log: Option<PathBuf>,
}

/// How training ended.
pub struct Trained {
    pub steps: u64,
    pub best: Best,
    pub history: History,
    /// The last checkpoint may still be under way.
    pub checkpoints: Option<Writer>,
}

/// Steps of an epoch and of the whole run.
pub fn count_steps(rows: usize, h: &Hyperparameters) -> (u64, u64) {
    let steps_per_epoch = rows.div_ceil(h.batch_size as usize) as u64;
    let total = h.max_steps.unwrap_or_else(|| u64::from(h.epochs.unwrap_or(DEFAULT_EPOCHS)) * steps_per_epoch);
    (steps_per_epoch, total)
}

/// Whether trials of a search are compared by generated answers, which validations then have to generate.
pub(super) fn searches_by_answers(spec: &TrainSpec) -> bool {
    let search = spec.hyperparameters.search.as_ref();
    search.is_some_and(|search| matches!(search.objective.metric, Metric::ExactMatch | Metric::TokenF1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_epochs_or_are_given() {
        let h = |epochs, max_steps| Hyperparameters { epochs, max_steps, batch_size: 32, ..Hyperparameters::default() };
        assert_eq!(count_steps(100, &h(None, None)), (4, 12));
        assert_eq!(count_steps(96, &h(Some(2), None)), (3, 6));
        assert_eq!(count_steps(100, &h(None, Some(7))), (4, 7));
    }
}
