//! What the loop keeps of a run: best weights, checkpoints, and the state that a resumed run goes on from.

use std::time::Duration;

use tch::{Device, Tensor};

use super::{
    Loop, Named,
    checkpoint::{Snapshot, State, Writer},
    roll_back::RollBack,
    share_named, update,
};
use crate::{TrainError, report::Events};
use athanor_models::load::Weights;

/// Longest wait for an upload between two signs of life.
const BEAT: Duration = Duration::from_secs(1);

impl Loop<'_> {
    /// Goes on from the restored checkpoint, if there is one, whose weights the parameters have already.
    pub(super) fn resume(&mut self) -> Result<(), TrainError> {
        let Some(restored) = &self.session.restored else { return Ok(()) };
        // Not on the device, which may have no room for more than a shard.
        let mut state = restored.optimizer(Device::Cpu)?;
        self.update.load(&mut |name| state.take_any(name))?;
        if let (Some(best), Some(mut weights)) = (restored.state.best.clone(), restored.best(self.session.device)?) {
            let like = update::trainable_of_model(self.session.model);
            self.best = Some((best, take_all(&mut weights, &like)?));
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
        self.roll_back = rolls_back.then(|| RollBack::new(self.snapshot(self.own_state())));
        let gathered = if gathers { Some(self.update.gather()?) } else { None };
        if !writes {
            return Ok(());
        }
        let snapshot = match (gathered, &self.roll_back) {
            (Some(whole), _) => self.snapshot(whole),
            (None, Some(roll_back)) => roll_back.share(),
            (None, None) => self.snapshot(self.own_state()),
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
    pub(super) fn own_state(&self) -> Named {
        let state = self.update.state();
        if self.step < self.total_steps { Snapshot::copy(&state) } else { state }
    }

    /// A copy of everything else that a checkpoint holds.
    pub(super) fn snapshot(&self, optimizer: Named) -> Snapshot {
        let (best, weights) = self.best.as_ref().map(|(best, weights)| (best.clone(), share_named(weights))).unzip();
        let mut model = match &self.best {
            Some((best, weights)) if best.step == self.step => share_named(weights),
            _ => Snapshot::copy(&update::trainable_of_model(self.session.model)),
        };
        model.extend(Snapshot::copy(self.session.objective.parameters()));
        Snapshot {
            state: State {
                step: self.step,
                fingerprint: self.session.fingerprint.clone(),
                best,
                skipped: self.skipped.clone(),
                history: self.history.clone(),
            },
            model,
            optimizer,
            best: weights,
        }
    }
}

/// Overwrites tensors, as far as there are others, with those in the same places.
pub(super) fn overwrite(named: &[(String, Tensor)], saved: &[(String, Tensor)]) -> Result<(), TrainError> {
    tch::no_grad(|| {
        for ((_, tensor), (_, saved)) in named.iter().zip(saved) {
            tensor.shallow_clone().f_copy_(saved)?;
        }
        Ok(())
    })
}

/// Overwrites tensors with those of the same names.
pub(super) fn load_named(weights: &mut Weights, named: &[(String, Tensor)]) -> Result<(), TrainError> {
    tch::no_grad(|| {
        for (name, tensor) in named {
            let saved = weights.take(name, &tensor.size())?;
            tensor.shallow_clone().f_copy_(&saved)?;
        }
        Ok(())
    })
}

/// The tensors of a file in the order of `like`.
fn take_all(weights: &mut Weights, like: &[(String, Tensor)]) -> Result<Named, TrainError> {
    like.iter().map(|(name, tensor)| Ok((name.clone(), weights.take(name, &tensor.size())?))).collect()
}
