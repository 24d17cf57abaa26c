//! How often an attempt that ended without a result is followed by another.

use std::time::Duration;

use athanor_crds::FineTuneJobStatus;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::{finetunejob::attempt::Fault, time};

/// Most preemptions in a row without a further checkpoint. Preemptions do not count against `failurePolicy.maxRestarts`.
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

/// Returns whether the end of an attempt counts against `failurePolicy.maxRestarts`.
///
/// A lost peer without a visible cause is a preemption only as long as the run makes progress: it counts before the first
/// step, and if no further checkpoint was written since the last interruption. A fault of one node that the others never
/// report would otherwise be repeated as often as preemptions are.
pub fn is_counted(fault: Fault, status: &FineTuneJobStatus) -> bool {
    match fault {
        Fault::Run => true,
        Fault::Infrastructure => false,
        Fault::Unknown => {
            let has_stepped = status.progress.as_ref().is_some_and(|progress| progress.step > 0);
            !has_stepped || (status.preempted_at.is_some() && !has_advanced(status))
        }
    }
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

/// Step of the newest checkpoint that was reported.
fn checkpoint(status: &FineTuneJobStatus) -> u64 {
    status.progress.as_ref().map_or(0, |progress| progress.checkpoint_step)
}

/// Whether a checkpoint was written that goes beyond those before the last preemption. Steps that no checkpoint has are
/// lost, however many there were.
fn has_advanced(status: &FineTuneJobStatus) -> bool {
    checkpoint(status) > status.preempted_at_step
}

/// Preemptions in a row without progress, with the one that happened now.
fn fruitless(status: &FineTuneJobStatus) -> u32 {
    if has_advanced(status) { 1 } else { status.fruitless_preemptions.saturating_add(1) }
}

/// Counts a preemption.
pub fn count_preemption(status: &mut FineTuneJobStatus, now: Timestamp) {
    status.fruitless_preemptions = fruitless(status);
    status.preemptions = status.preemptions.saturating_add(1);
    status.preempted_at = Some(Time(now));
    status.preempted_at_step = status.preempted_at_step.max(checkpoint(status));
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
    fn a_lost_peer_without_a_cause_counts_unless_the_run_makes_progress() {
        let with = |step, checkpoint_step, preempted_at_step: Option<u64>| FineTuneJobStatus {
            progress: Some(Progress { step, checkpoint_step, ..Progress::default() }),
            preempted_at: preempted_at_step.map(|_| Time(Timestamp::UNIX_EPOCH)),
            preempted_at_step: preempted_at_step.unwrap_or(0),
            ..FineTuneJobStatus::default()
        };
        for (case, status, expected) in [
            ("no report", FineTuneJobStatus::default(), true),
            ("before the first step", with(0, 0, None), true),
            ("the first time, before a checkpoint", with(57, 0, None), false),
            ("the first time", with(57, 50, None), false),
            ("a second time at the same step", with(57, 50, Some(50)), true),
            ("a second time before the same checkpoint", with(64, 50, Some(50)), true),
            ("a second time before any checkpoint", with(30, 0, Some(0)), true),
            ("after a further checkpoint", with(103, 100, Some(50)), false),
        ] {
            assert_eq!(is_counted(Fault::Unknown, &status), expected, "{case}");
            assert!(is_counted(Fault::Run, &status) && !is_counted(Fault::Infrastructure, &status), "{case}");
        }
    }

    #[test]
    fn progress_forgives_preemptions_and_the_others_are_spaced() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let mut status = FineTuneJobStatus::default();
        let mut preempt = |checkpoint_step, now| {
            // Each attempt does more steps than any before.
            let step = 10_000 + u64::from(status.preemptions);
            status.progress = Some(Progress { step, checkpoint_step, ..Progress::default() });
            count_preemption(&mut status, at(now));
            (status.fruitless_preemptions, pause_left(&status, at(now)).as_secs())
        };
        // A week on spot nodes: each attempt writes a further checkpoint.
        for attempt in 1..100 {
            assert_eq!(preempt(10 * attempt, 1_000), (1, 0));
        }
        // Going on from a checkpoint and dying before the next one is no progress.
        assert_eq!(preempt(985, 2_000), (2, 10));
        assert_eq!(preempt(990, 2_100), (3, 20));
        assert_eq!(preempt(991, 2_200), (1, 0));
        let pauses: Vec<u64> = (0..8).map(|_| preempt(991, 3_000).1).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 300, 300, 300]);
        assert_eq!((status.preemptions, pause_left(&status, at(3_299)).as_secs()), (110, 1));
        assert_eq!(pause_left(&status, at(3_300)), Duration::ZERO);
    }
}
