//! The training loop of one rank. With N ranks each computes its share of every global batch, so the losses are those
//! of one rank on the same batches, dropout apart.
//!
//! - [`update`]: the optimizer step, on one rank or many; [`schedule`]: its learning rate;
//! - `saving`: what the run keeps (best weights, checkpoints) and how it goes on from it; [`checkpoint`]: the files;
//!   `roll_back`;
//! - [`watchdog`]: ends a process in which nothing moves any more.

pub mod checkpoint;
pub mod named;
mod roll_back;
mod saving;
pub mod schedule;
mod session;
mod state;
pub mod update;
pub mod watchdog;

use std::{collections::BTreeSet, io::Write};

use athanor_contract::train::OnNonFinite;
use athanor_torch::ProcessGroup;
use tch::{Device, Kind, Tensor};

use self::{checkpoint::Best, roll_back::RollBack, schedule::LearningRate, session::searches_by_answers, state::Loop};
use crate::{
    TrainError,
    data::batches::{epoch_batches, mix, share},
    evaluate::{self, How},
    objectives::Part,
    report::{History, Step},
};
pub use session::{Session, Trained, count_steps};

/// Trains to the end and leaves the best weights in the model.
pub fn train(session: Session) -> Result<Trained, TrainError> {
    let mut run = Loop::new(session)?;
    while run.step < run.total_steps {
        run.advance()?;
    }
    run.finish()
}

/// What the passes of a step add up to, on this rank or, after [`update::Update::sum`], on all. The sums stay on the
/// device, because reading a number waits for all work that the device has.
struct DeviceSums {
    /// [2 + terms] in FP64, in the order of the fields of [`Sums`].
    numbers: Tensor,
}

/// [`DeviceSums`] after they were read.
struct Sums {
    /// The weighted sum of all terms.
    loss: f64,
    /// Number of ranks that were asked to stop.
    stops: f64,
    /// Each term without its weight.
    terms: Vec<f64>,
}

impl DeviceSums {
    fn new(terms: usize, stop: bool, device: Device) -> Result<Self, TrainError> {
        let numbers = Tensor::f_zeros([2 + terms as i64], (Kind::Double, device))?;
        let _ = numbers.f_get(1)?.f_fill_(f64::from(u8::from(stop)))?;
        Ok(Self { numbers })
    }

    /// Adds `share / copies` of the value of a term.
    fn add(&self, index: usize, value: &Tensor, weight: f64, share: f64, copies: f64) -> Result<(), TrainError> {
        let value = value.detach().f_to_kind(Kind::Double)?.f_mul_scalar(share)?.f_div_scalar(copies)?;
        let _ = self.numbers.f_get(0)?.f_add_(&value.f_mul_scalar(weight)?)?;
        let _ = self.numbers.f_get(2 + index as i64)?.f_add_(&value)?;
        Ok(())
    }

    fn read(&self) -> Result<Sums, TrainError> {
        let mut numbers = Vec::<f64>::try_from(&self.numbers)?;
        Ok(Sums { loss: numbers[0], stops: numbers[1], terms: numbers.split_off(2) })
    }
}

impl<'a> Loop<'a> {
    fn new(session: Session<'a>) -> Result<Self, TrainError> {
        let spec = session.spec;
        let h = &spec.hyperparameters;
        let (steps_per_epoch, total_steps) = count_steps(session.train.len(), h);
        session.model.set_trainable();
        let trainable = update::trainable(session.model, &session.objective);
        if let Some(restored) = &session.restored {
            // Not on the device, which would hold the weights twice.
            named::load(&mut restored.model(Device::Cpu)?, &trainable)?;
        }
        if let Some(group) = session.group {
            // The folder may have changed between two ranks' downloads, and averaged gradients never bring ranks
            // together.
            for (_, tensor) in &trainable {
                group.broadcast(&tensor.detach(), 0)?;
            }
        }
        let update = update::new(session.model, &session.objective, spec, session.device, session.group)?;
        let loss_log = match &session.loss_log {
            Some(path) if session.group.is_none_or(|group| group.rank() == 0) => {
                Some(std::fs::File::options().create(true).append(true).open(path).map_err(TrainError::at(path))?)
            }
            _ => None,
        };
        let mut run = Self {
            rank: session.group.map_or(0, ProcessGroup::rank),
            world: session.group.map_or(1, ProcessGroup::world),
            trainable,
            update,
            learning_rate: LearningRate::new(h.learning_rate, h.warmup_ratio, total_steps, h.schedule),
            lengths: session.train.lengths(),
            steps_per_epoch,
            total_steps,
            step: 0,
            epoch: None,
            best: None,
            best_weights: None,
            roll_back: None,
            skipped: BTreeSet::new(),
            history: History::default(),
            terms: Vec::new(),
            loss_log,
            session,
        };
        run.resume()?;
        if let Some(reporter) = &mut run.session.reporter {
            reporter.begin(&run.session.stage, run.step, total_steps);
            reporter.checkpointed(run.step);
        }
        if spec.failure_policy.on_non_finite == OnNonFinite::RollBack {
            run.roll_back = Some(RollBack::new(run.snapshot(run.own_state()?)?));
        }
        Ok(run)
    }

    /// One optimizer step and what falls due after it; or, if the step was not finite, a roll-back.
    fn advance(&mut self) -> Result<(), TrainError> {
        self.session.watchdog.beat();
        let epoch = self.step / self.steps_per_epoch;
        if self.epoch.as_ref().is_none_or(|(current, _)| *current != epoch) {
            let h = &self.session.spec.hyperparameters;
            self.epoch = Some((epoch, epoch_batches(&self.lengths, h.batch_size as usize, h.seed as u64, epoch)));
        }
        let mut stop = false;
        if self.skipped.contains(&(self.step + 1)) {
            tracing::warn!(step = self.step + 1, "the step is left out since a roll-back");
            self.step += 1;
        } else {
            let place = (self.step % self.steps_per_epoch) as usize;
            let batch = self.epoch.as_ref().map(|(_, batches)| batches.get(place)).unwrap_or_default();
            let Some((outcome, stops)) = self.optimize(&batch)? else { return Ok(()) };
            stop = stops;
            self.step += 1;
            self.session.timeline.mark("firstStep");
            self.report(outcome)?;
        }

        let epoch_ends = self.step.is_multiple_of(self.steps_per_epoch) || self.step == self.total_steps;
        let step = self.step;
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        if epoch_ends || due(self.session.spec.evaluate.every_steps) {
            self.validate()?;
        }
        if epoch_ends || stop || due(self.session.spec.checkpoint.every_steps) {
            self.checkpoint(epoch_ends || stop)?;
        }
        if stop { self.end_early() } else { Ok(()) }
    }

    /// Forward and backward passes and the update on a global batch. Returns the step and whether a rank was asked to
    /// stop; `None` if the run was rolled back.
    fn optimize(&mut self, batch: &[usize]) -> Result<Option<(Step, bool)>, TrainError> {
        let spec = self.session.spec;
        let h = &spec.hyperparameters;
        let learning_rate = self.learning_rate.at(self.step);
        // Dropout's random numbers are a function of seed, step and rank: a resumed run draws the same.
        tch::manual_seed((mix(mix(h.seed as u64, self.step), self.rank as u64) >> 1) as i64);
        // Terms are sums over rows: the loss is their mean over the rows of the global batch.
        let units = batch.len() as f64;
        self.update.begin(self.session.model, self.session.train, batch)?;
        let sums = self.passes(batch, units)?;
        self.update.sum(&sums.numbers)?;
        let gradient_norm = self.update.finish(self.session.model, h.clip_norm)?;
        // The norm has waited for the device: the sums are there.
        let sums = sums.read()?;
        let loss = sums.loss / units;
        match (update::not_finite(loss, gradient_norm), spec.failure_policy.on_non_finite) {
            (None, _) => self.update.apply(learning_rate)?,
            (Some(what), OnNonFinite::Fail) => return Err(TrainError::NonFinite { step: self.step + 1, what }),
            (Some(what), OnNonFinite::Skip) => {
                metrics::counter!("athanor_train_skipped_steps_total").increment(1);
                tracing::warn!(step = self.step + 1, what, "not finite: the step is left out");
            }
            // A rank that was asked to stop reports it again at the next step.
            (Some(what), OnNonFinite::RollBack) => {
                self.go_back(what)?;
                return Ok(None);
            }
        }
        let tokens = batch.iter().map(|&row| self.lengths[row]).sum();
        let step = Step { step: self.step + 1, loss, learning_rate, gradient_norm, samples: batch.len(), tokens };
        self.terms = sums.terms.iter().map(|value| value / units).collect();
        Ok(Some((step, sums.stops > 0.0)))
    }

    /// Forward and backward passes of this rank's rows of a global batch, part by part.
    fn passes(&mut self, batch: &[usize], units: f64) -> Result<DeviceSums, TrainError> {
        let h = &self.session.spec.hyperparameters;
        let mut rows = share(batch, &self.lengths, self.rank, self.world);
        // All ranks have to take part in collectives: one without rows computes a row that counts nothing.
        let weight = if rows.is_empty() { 0.0 } else { 1.0 };
        if rows.is_empty() {
            rows.push(batch[0]);
        }
        let parts: Vec<&[usize]> = rows.chunks(rows.len().div_ceil(h.accumulate_steps as usize)).collect();
        let Session { model, objective, teacher, train, device, bf16, group, stop, .. } = &self.session;
        let terms = objective.terms();
        let sums = DeviceSums::new(terms.len(), stop.is_cancelled(), *device)?;
        for (index, part) in parts.iter().enumerate() {
            let seed = mix(h.seed as u64, self.step);
            let part = Part { train, rows: part, batch, weight, seed, group: *group, device: *device, bf16: *bf16 };
            let values = objective.values(&**model, *teacher, &part)?;
            // Of a term that all ranks compute whole, each differentiates its own rows and reports its share.
            let share = |index: usize| if objective.is_shared(index) { 1.0 } else { weight };
            let weighted =
                values.iter().zip(terms).enumerate().map(|(index, (value, term))| value * (term.weight * share(index)));
            let sum = weighted.reduce(|sum, value| sum + value).unwrap_or_default();
            self.update.backward(&(&sum * (1.0 / units)), index + 1 == parts.len())?;
            for (index, (value, term)) in values.iter().zip(terms).enumerate() {
                let copies = if objective.is_shared(index) { self.world as f64 } else { 1.0 };
                sums.add(index, value, term.weight, share(index), copies)?;
            }
        }
        Ok(sums)
    }

    fn report(&mut self, step: Step) -> Result<(), TrainError> {
        self.history.step(&step);
        if let Some(events) = &mut self.session.events {
            events.step(&step);
        }
        if let Some(log) = &mut self.loss_log {
            let terms: serde_json::Map<String, serde_json::Value> =
                std::iter::zip(self.session.objective.terms(), &self.terms)
                    .map(|(term, value)| (term.name().to_owned(), (*value).into()))
                    .collect();
            let line = serde_json::json!({
                "step": step.step, "loss": step.loss, "gradientNorm": step.gradient_norm, "terms": terms
            });
            writeln!(log, "{line}").map_err(TrainError::other)?;
        }
        if let Some(writer) = &mut self.session.checkpoints {
            writer.poll()?;
            if let Some(reporter) = &mut self.session.reporter {
                reporter.checkpointed(writer.newest());
            }
        }
        if let Some(reporter) = &mut self.session.reporter {
            reporter.step(step);
        }
        Ok(())
    }

    /// Measures the validation rows and keeps the weights if they are the best so far.
    fn validate(&mut self) -> Result<(), TrainError> {
        self.update.catch_up()?;
        let session = &mut self.session;
        let rows = (session.validation)()?;
        let watchdog = session.watchdog.clone();
        let how = How {
            group: session.group,
            device: session.device,
            bf16: session.bf16,
            generates: searches_by_answers(session.spec),
        };
        let found = evaluate::evaluate(&*session.model, &rows, how, || watchdog.beat())?;
        let (name, score) = found.score();
        // A score that is not a number is worse than any, and JSON, which checkpoints are in, cannot hold it.
        let rank = score.max(f64::MIN);
        let is_best = self.best.as_ref().is_none_or(|best| rank > best.score);
        if is_best {
            if self.rank == 0 {
                // The weights before are freed first.
                self.best_weights = None;
                self.best_weights = Some(named::copy_to_host(&update::trainable_of_model(session.model))?);
            }
            let mut metrics = found.report(&[]);
            metrics.insert(name.to_owned(), score);
            metrics.retain(|_, value| value.is_finite());
            self.best = Some(Best { step: self.step, score: rank, metrics });
        }
        let epoch = self.step as f64 / self.steps_per_epoch as f64;
        self.history.validated(self.step, epoch, name, score);
        if let Some(events) = &mut session.events {
            events.validated(self.step, (name, score));
        }
        if let Some(reporter) = &mut session.reporter {
            reporter.validated(self.step, epoch, (name, score), is_best);
        }
        Ok(())
    }

    fn end_early(&mut self) -> Result<(), TrainError> {
        let mut checkpoint = self.step;
        if let Some(writer) = &mut self.session.checkpoints {
            // The upload has the time limits of the store; no step has to end meanwhile.
            self.session.watchdog.rest();
            writer.finish()?;
            checkpoint = writer.newest();
        }
        Err(TrainError::Stopped { step: self.step, checkpoint })
    }

    /// Puts the best weights, which rank 0 has, into the model of every rank.
    fn finish(self) -> Result<Trained, TrainError> {
        let Some(best) = self.best else {
            return Err(TrainError::Other("the run ended without a validation".into()));
        };
        if let Some(weights) = &self.best_weights {
            named::overwrite(&self.trainable, weights)?;
        }
        if let Some(group) = self.session.group {
            let model = update::trainable_of_model(self.session.model);
            let weights: Vec<Tensor> = model.iter().map(|(_, tensor)| tensor.detach()).collect();
            group.broadcast_all(&weights, 0)?;
        }
        Ok(Trained { steps: self.step, best, history: self.history, checkpoints: self.session.checkpoints })
    }
}
