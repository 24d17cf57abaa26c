//! `failurePolicy.onNonFinite: RollBack`: back to the state of the last checkpoint, and on without the step that was
//! not finite.
//!
//! Every rank keeps that state in memory, taken whenever a checkpoint falls due, so that going back needs neither the
//! store nor the other ranks: all of them see the same loss and the same gradients, and go back alike. Steps are
//! functions of seed and number, so that those taken again are the same as before, and a run that was killed in between
//! comes to the same end.

use std::collections::HashMap;

use tch::Tensor;

use super::{Loop, checkpoint::Snapshot, saving::overwrite, share_named};
use crate::TrainError;

/// Times in a row, without a checkpoint in between, before the run fails.
const MOST: u32 = 3;

/// Where a run can go back to.
pub(super) struct RollBack {
    to: Snapshot,
    /// Since that state was taken.
    times: u32,
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

impl Loop<'_> {
    /// Restores the last checkpoint's state. The current step, of which `what` is not finite, is left out when its turn
    /// comes again.
    ///
    /// # Errors
    /// The fourth time without a new checkpoint.
    pub(super) fn go_back(&mut self, what: &'static str) -> Result<(), TrainError> {
        let step = self.step + 1;
        let Some(RollBack { to, times }) = &mut self.roll_back else {
            return Err(TrainError::Other("there is no state to go back to".into()));
        };
        let checkpoint = to.state.step;
        if *times == MOST {
            return Err(TrainError::RolledBackInVain { step, what, times: MOST, checkpoint });
        }
        *times += 1;
        overwrite(&self.trainable, &to.model)?;
        let saved: HashMap<&str, &Tensor> = to.optimizer.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        self.update.load(&mut |name| saved.get(name).map(|tensor| tensor.shallow_clone()))?;
        self.best = to.state.best.clone().zip(to.best.as_ref().map(|weights| share_named(weights)));
        self.history = to.state.history.clone();
        self.step = checkpoint;
        self.skipped.insert(step);
        metrics::counter!("athanor_train_roll_backs_total").increment(1);
        tracing::warn!(step, what, checkpoint, times = *times, "not finite: rolled back, the step will be left out");
        Ok(())
    }
}
