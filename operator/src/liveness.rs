//! Whether the loops of this process make progress. `/healthz` fails if one does not, and the kubelet restarts the
//! container.
//!
//! Each loop beats on every turn, whatever the result of the turn: an API server that does not answer, or an object that
//! cannot be reconciled, is no reason for a restart. A controller's turn is a reconcile that ended, and its stream also
//! carries a heartbeat, so it beats without any object. A process that waits for the Lease has no controllers, and only
//! the loop of its election is looked at.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Longest time without a beat. A reconcile ends within a minute (see [`crate::reconciler`]), and a controller that is
/// busy beats with each of them.
pub const LIMIT: Duration = Duration::from_secs(180);

/// The last beats by loop. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Liveness(Arc<Mutex<BTreeMap<&'static str, Instant>>>);

/// A loop that makes no progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stalled {
    pub name: &'static str,
    pub silent: Duration,
}

impl Liveness {
    /// Records that a loop has made a turn. Its time limit begins with its first beat.
    pub fn beat(&self, name: &'static str, now: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name, now);
    }

    /// Returns the loop that has been silent for longest, if that is longer than [`LIMIT`].
    pub fn stalled(&self, now: Instant) -> Option<Stalled> {
        let beats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let silent = beats.iter().map(|(&name, &last)| Stalled { name, silent: now.saturating_duration_since(last) });
        silent.max_by_key(|one| one.silent).filter(|one| one.silent > LIMIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_was_silent_for_too_long_is_named() {
        let liveness = Liveness::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(liveness.stalled(after(10_000)), None, "no loop has begun");
        liveness.beat("a", start);
        liveness.beat("b", after(100));
        assert_eq!(liveness.stalled(after(180)), None);
        let stalled = liveness.stalled(after(281));
        assert_eq!(stalled, Some(Stalled { name: "a", silent: Duration::from_secs(281) }), "the longest silence");
        liveness.beat("a", after(281));
        assert_eq!(liveness.stalled(after(281)).map(|one| one.name), Some("b"));
        liveness.clone().beat("b", after(282));
        assert_eq!(liveness.stalled(after(300)), None);
    }
}
