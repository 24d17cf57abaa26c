//! `failurePolicy.onNonFinite: RollBack`: back to the state of the last checkpoint, and on without the step that was
//! not finite.
//!
//! Every rank keeps that state in the host's memory, taken whenever a checkpoint falls due, so that going back needs neither the
//! store nor the other ranks: all of them see the same loss and the same gradients, and go back alike. Steps are
//! functions of seed and number, so that those taken again are the same as before, and a run that was killed in between
//! comes to the same end.

use super::checkpoint::Snapshot;

/// Times in a row, without a checkpoint in between, before the run fails.
pub(super) const MOST: u32 = 3;

/// Where a run can go back to.
pub(super) struct RollBack {
    pub to: Snapshot,
    /// Since that state was taken.
    pub times: u32,
}

impl RollBack {
    pub fn new(to: Snapshot) -> Self {
        Self { to, times: 0 }
    }

    /// The state, to be written.
    pub fn share(&self) -> Snapshot {
        self.to.share()
    }
}
