//! How often an attempt that ended without a result is followed by another.

use athanor_crds::FineTuneJobStatus;

/// Most restarts after preemptions, which do not count against `failurePolicy.maxRestarts`.
pub const MAX_PREEMPTIONS: u32 = 20;

/// What follows an attempt that ended without a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restart {
    /// The next attempt.
    Again,
    /// The job fails: its restarts are used up.
    Exhausted { reason: &'static str, message: String },
}

/// Decides what follows. `counted`: the run failed by itself; otherwise the cluster interrupted it.
pub fn restart(status: &FineTuneJobStatus, max_restarts: u32, counted: bool, cause: &str) -> Restart {
    if counted && status.restarts >= max_restarts {
        let message = format!("failed after {} restarts (failurePolicy.maxRestarts): {cause}", status.restarts);
        return Restart::Exhausted { reason: "TooManyRestarts", message };
    }
    if !counted && status.preemptions >= MAX_PREEMPTIONS {
        let message = format!("interrupted {} times: {cause}", status.preemptions + 1);
        return Restart::Exhausted { reason: "TooManyPreemptions", message };
    }
    Restart::Again
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_and_preemptions_are_bounded_separately() {
        for (restarts, preemptions, counted, expected) in [
            (2, MAX_PREEMPTIONS, true, None),
            (3, 0, true, Some("TooManyRestarts")),
            (3, 0, false, None),
            (0, MAX_PREEMPTIONS - 1, false, None),
            (0, MAX_PREEMPTIONS, false, Some("TooManyPreemptions")),
        ] {
            let status = FineTuneJobStatus { restarts, preemptions, ..FineTuneJobStatus::default() };
            let reason = match restart(&status, 3, counted, "the node was shut down") {
                Restart::Again => None,
                Restart::Exhausted { reason, message } => {
                    assert!(message.ends_with(": the node was shut down"), "{message}");
                    Some(reason)
                }
            };
            assert_eq!(reason, expected, "{restarts} restarts, {preemptions} preemptions, counted: {counted}");
        }
    }
}
