//! How soon a change of a status is written: a busy object must not cost a request for every number that changes.

use std::time::Duration;

/// Longest time for which a change is held back, and shortest time between two writes of progress.
pub const PACE: Duration = Duration::from_secs(5);

/// The most urgent part of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// What the object does, or its result. Written at once.
    Stage,
    /// Steps, metrics and times of a stage. Written [`PACE`] after the last write.
    Progress,
    /// Messages of conditions only, such as the number of pods that run. Written if they still differ [`PACE`] after
    /// the first difference.
    Message,
}
