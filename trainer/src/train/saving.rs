//! What the loop keeps of a run: best weights, checkpoints, and the state that a resumed run goes on from.

use std::{collections::HashMap, time::Duration};

use tch::{Device, Tensor};

use super::{
    checkpoint::{Snapshot, State, Writer},
    named::{self, Named},
    roll_back::{self, RollBack},
    state::Loop,
    update,
};
use crate::{TrainError, report::Events};

/// Longest wait for an upload between two signs of life.
const BEAT: Duration = Duration::from_secs(1);

impl Loop<'_> {
    /// Goes on from the restored checkpoint, if there is one, whose weights the parameters have already.
    pub(super) fn resume(&mut self) -> Result<(), TrainError> {
        let Some(restored) = &self.session.restored else { return Ok(()) };
        // Not on the device, which may have no room for more than a shard.
        let mut state = restored.optimizer(Device::Cpu)?;
        self.update.load(&mut |name| state.take_any(name))?;
        self.best = restored.state.best.clone();
        if self.rank == 0
            && let Some(mut weights) = restored.best(Device::Cpu)?
        {
            let like = update::trainable_of_model(self.session.model);
            self.best_weights = Some(named::take_all(&mut weights, &like)?);
        }
        self.step = restored.state.step;
        self.skipped = restored.state.skipped.clone();
        self.history = restored.state.history.clone();
        tracing::info!(step = self.step, total_steps = self.total_steps, "resumed from a checkpoint");
        Ok(())
    }

    /// Starts to write a checkpoint. One that is not `needed` is left out while the one before is still being written;
    /// where the run could go back to is then this state all the same, as it is on the ranks that write nothing.
    pub(super) fn checkpoint(&mut self, needed: bool) -> Result<(), TrainError> {
        if needed {
            self.wait_for_writer()?;
        }
        let is_busy = self.session.checkpoints.as_ref().is_some_and(Writer::is_busy);
        if is_busy {
            tracing::warn!(step = self.step, "no checkpoint: the one before is still being written");
        }
        // Where the optimizer's state is sharded, all ranks take part in a checkpoint, or none.
        let left_out = self.update.rank_0_says(is_busy)?;
        let writes = self.session.checkpoints.is_some() && !left_out;
        // The state before is freed first: two of them may not fit.
        let rolls_back = self.roll_back.take().is_some();
        let gathers = self.update.is_sharded() && !left_out;
        if !writes && !rolls_back && !gathers {
            return Ok(());
        }
        self.update.catch_up()?;
        self.session.watchdog.beat();
        self.roll_back = if rolls_back { Some(RollBack::new(self.snapshot(self.own_state()?)?)) } else { None };
        let gathered = if gathers { Some(self.update.gather()?) } else { None };
        if !writes {
            return Ok(());
        }
        let snapshot = match (gathered, &self.roll_back) {
            (Some(whole), _) => self.snapshot(whole)?,
            (None, Some(roll_back)) => roll_back.share(),
            (None, None) => self.snapshot(self.own_state()?)?,
        };
        match &mut self.session.checkpoints {
            Some(writer) => writer.save(snapshot, self.session.events.as_ref().and_then(Events::upload)),
            None => Ok(()),
        }
    }

    /// Waits until rank 0 has written the checkpoint before. The upload may be slow: all ranks wait together and beat,
    /// so that no watchdog takes it for a hang.
    fn wait_for_writer(&mut self) -> Result<(), TrainError> {
        loop {
            let is_busy = match &mut self.session.checkpoints {
                Some(writer) => !writer.wait(BEAT)?,
                None => false,
            };
            self.session.watchdog.beat();
            if !self.update.rank_0_says(is_busy)? {
                return Ok(());
            }
        }
    }

    /// A copy of what the optimizer keeps on this rank, after [`update::Update::catch_up`]. Nothing changes it after
    /// the last step.
    pub(super) fn own_state(&self) -> Result<Named, TrainError> {
        let state = self.update.state();
        if self.step < self.total_steps { named::copy_to_host(&state) } else { Ok(state) }
    }

    /// A copy of everything else that a checkpoint holds.
    pub(super) fn snapshot(&self, optimizer: Named) -> Result<Snapshot, TrainError> {
        let mut model = match (&self.best, &self.best_weights) {
            (Some(best), Some(weights)) if best.step == self.step => named::share(weights),
            _ => named::copy_to_host(&update::trainable_of_model(self.session.model))?,
        };
        model.extend(named::copy_to_host(self.session.objective.parameters())?);
        Ok(Snapshot {
            state: State {
                step: self.step,
                fingerprint: self.session.fingerprint.clone(),
                best: self.best.clone(),
                skipped: self.skipped.clone(),
                history: self.history.clone(),
            },
            model,
            optimizer,
            best: self.best_weights.as_deref().map(named::share),
        })
    }

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
        if *times == roll_back::MOST {
            return Err(TrainError::RolledBackInVain { step, what, times: roll_back::MOST, checkpoint });
        }
        *times += 1;
        named::overwrite(&self.trainable, &to.model)?;
        let saved: HashMap<&str, &Tensor> = to.optimizer.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        self.update.load(&mut |name| saved.get(name).map(|tensor| tensor.shallow_clone()))?;
        self.best = to.state.best.clone();
        self.best_weights = to.best.as_deref().map(named::share);
        self.history = to.state.history.clone();
        self.step = checkpoint;
        self.skipped.insert(step);
        metrics::counter!("athanor_train_roll_backs_total").increment(1);
        tracing::warn!(step, what, checkpoint, times = *times, "not finite: rolled back, the step will be left out");
        Ok(())
    }
}
