//! How often an attempt that ended without a result is followed by another.

use std::time::Duration;

use athanor_crds::FineTuneJobStatus;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::time;

/// Most preemptions in a row without progress. Preemptions do not count against `failurePolicy.maxRestarts`.
pub const MAX_PREEMPTIONS: u32 = 20;
/// Pause before the attempt after the second preemption without progress. It doubles with each further one.
const PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

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
    if !counted && fruitless(status) > MAX_PREEMPTIONS {
        let message = format!("interrupted {} times without progress: {cause}", fruitless(status));
        return Restart::Exhausted { reason: "TooManyPreemptions", message };
    }
    Restart::Again
}

/// Preemptions in a row without progress, with the one that happened now. Steps may be lost that no checkpoint has, so
/// progress is a step that no attempt before had done.
fn fruitless(status: &FineTuneJobStatus) -> u32 {
    let step = status.progress.as_ref().map_or(0, |progress| progress.step);
    if step > status.preempted_at_step { 1 } else { status.fruitless_preemptions.saturating_add(1) }
}

/// Counts a preemption.
pub fn count_preemption(status: &mut FineTuneJobStatus, now: Timestamp) {
    status.fruitless_preemptions = fruitless(status);
    status.preemptions = status.preemptions.saturating_add(1);
    status.preempted_at = Some(Time(now));
    let step = status.progress.as_ref().map_or(0, |progress| progress.step);
    status.preempted_at_step = status.preempted_at_step.max(step);
}

/// Returns the time until the next attempt may begin: one that is refused by every node would use up its preemptions
/// within seconds.
pub fn pause_left(status: &FineTuneJobStatus, now: Timestamp) -> Duration {
    let (Some(preempted), Some(doublings)) = (&status.preempted_at, status.fruitless_preemptions.checked_sub(2)) else {
        return Duration::ZERO;
    };
    time::left(PAUSE.saturating_mul(1 << doublings.min(16)).min(LONGEST_PAUSE), preempted.0, now)
}

#[cfg(test)]
mod tests {
    use athanor_crds::Progress;

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
            let status =
                FineTuneJobStatus { restarts, fruitless_preemptions: preemptions, ..FineTuneJobStatus::default() };
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

    #[test]
    fn progress_forgives_preemptions_and_the_others_are_spaced() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let mut status = FineTuneJobStatus::default();
        let mut preempt = |step, now| {
            status.progress = Some(Progress { step, ..Progress::default() });
            count_preemption(&mut status, at(now));
            (status.fruitless_preemptions, pause_left(&status, at(now)).as_secs())
        };
        // A week on spot nodes: each attempt gets further than all before.
        for attempt in 1..100 {
            assert_eq!(preempt(10 * attempt, 1_000), (1, 0));
        }
        // Going on from a checkpoint and dying before the furthest step is no progress.
        assert_eq!(preempt(985, 2_000), (2, 10));
        assert_eq!(preempt(990, 2_100), (3, 20));
        assert_eq!(preempt(991, 2_200), (1, 0));
        let pauses: Vec<u64> = (0..8).map(|_| preempt(991, 3_000).1).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 300, 300, 300]);
        assert_eq!((status.preemptions, pause_left(&status, at(3_299)).as_secs()), (110, 1));
        assert_eq!(pause_left(&status, at(3_300)), Duration::ZERO);
    }
}
