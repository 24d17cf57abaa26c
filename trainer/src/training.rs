//! The training loop of one rank. With N ranks each computes its share of every global batch, weighted by rows, so the losses are
//! those of one rank on the same batches.

mod roll_back;

use std::{collections::BTreeSet, io::Write, path::PathBuf, sync::Arc};

use athanor_contract::train::{self, DEFAULT_EPOCHS, Hyperparameters, OnNonFinite, TrainSpec};
use athanor_models::{Model, load::Weights};
use athanor_torch::{Optimizer, ProcessGroup, Reducer, Rule, Shard, add_penalty, backward, norm, scale, zero_grad};
use tch::{Device, Tensor};
use tokio_util::sync::CancellationToken;

use crate::{
    TrainError,
    checkpoint::{Best, Named, Restored, Snapshot, State, Writer},
    data::{
        Encoded,
        batches::{Batches, epoch_batches, mix, share},
    },
    evaluate,
    objectives::{Objective, Part, Teacher},
    report::{Events, History, Reporter, Step, Timeline},
    schedule::LearningRate,
    watchdog::Watchdog,
    words::Words,
};
use roll_back::RollBack;

/// Everything a run of the loop needs; the caller made and keeps it.
pub struct Session<'a> {
    pub spec: &'a TrainSpec,
    /// What progress calls this training.
    pub stage: String,
    pub device: Device,
    pub bf16: bool,
    pub group: Option<&'a ProcessGroup>,
    pub model: &'a mut Model,
    pub objective: Objective,
    pub teacher: Option<&'a Teacher>,
    pub train: &'a Encoded,
    /// Validation rows; waited for at the first validation.
    pub validation: Box<dyn Fn() -> Result<Arc<Encoded>, TrainError> + 'a>,
    pub fingerprint: String,
    pub restored: Option<Restored>,
    /// Rank 0's.
    pub checkpoints: Option<Writer>,
    /// Rank 0's.
    pub events: Option<Events>,
    pub reporter: Option<&'a mut Reporter>,
    pub timeline: Timeline,
    pub watchdog: Watchdog,
    pub stop: CancellationToken,
    pub loss_log: Option<PathBuf>,
}

/// How training ended.
pub struct Trained {
    pub steps: u64,
    pub best: Best,
    pub history: History,
    /// The last checkpoint may still be under way.
    pub checkpoints: Option<Writer>,
}

/// Steps of an epoch and of the whole run.
pub fn count_steps(rows: usize, h: &Hyperparameters) -> (u64, u64) {
    let steps_per_epoch = rows.div_ceil(h.batch_size as usize) as u64;
    let total = h.max_steps.unwrap_or_else(|| u64::from(h.epochs.unwrap_or(DEFAULT_EPOCHS)) * steps_per_epoch);
    (steps_per_epoch, total)
}

/// Trains to the end and leaves the best weights in the model.
pub fn train(session: Session) -> Result<Trained, TrainError> {
    let mut run = Loop::new(session)?;
    while run.step < run.total_steps {
        run.advance()?;
    }
    run.finish()
}

struct Loop<'a> {
    session: Session<'a>,
    rank: usize,
    world: usize,
    /// Views of the model's parameters, in the order of their names.
    parameters: Vec<Tensor>,
    /// Those of them that have gradients of their own: without the word embeddings where `words` has these.
    dense: Vec<Tensor>,
    words: Option<Words>,
    /// Those that weight decay and penalties are about.
    decayed: Vec<Tensor>,
    optimizer: Optimizer,
    /// The ranks among which the optimizer's state is dealt out, if it is.
    shards: Option<&'a ProcessGroup>,
    /// Averages gradients over the ranks, where there are several.
    reducer: Option<Reducer<'a>>,
    learning_rate: LearningRate,
    lengths: Vec<usize>,
    steps_per_epoch: u64,
    total_steps: u64,
    /// Steps taken.
    step: u64,
    /// Number and batches of the current epoch.
    epoch: Option<(u64, Batches)>,
    best: Option<(Best, Named)>,
    /// Under the policy RollBack.
    roll_back: Option<RollBack>,
    /// Steps, counted from 1, that are left out since a roll-back.
    skipped: BTreeSet<u64>,
    history: History,
    /// The last step's value of each term, without weights; a mean over the batch.
    terms: Vec<f64>,
    loss_log: Option<std::fs::File>,
}

impl<'a> Loop<'a> {
    fn new(mut session: Session<'a>) -> Result<Self, TrainError> {
        let h = &session.spec.hyperparameters;
        let (steps_per_epoch, total_steps) = count_steps(session.train.len(), h);
        session.model.set_trainable();
        let mut named = share_named(session.model.parameters());
        named.extend(share_named(session.objective.parameters()));
        let weight_decay = if h.optimizer == train::Optimizer::AdamW { h.weight_decay } else { 0.0 };
        let shards = session.group.filter(|_| session.spec.distributed.shard_optimizer);
        let table = session.model.word_embeddings().data_ptr();
        let [mut decayed, exempt] = weight_decay_groups(&named);
        // The last of its group, so that the optimizer calls the others the same with it and without it.
        decayed.sort_by_key(|tensor| tensor.data_ptr() == table);
        let mut words = None;
        if !session.spec.distributed.shard_optimizer {
            let name = format!("0.{}", decayed.len() - 1);
            words = Words::new(session.model, session.spec.model.task, h, weight_decay, session.device, name);
        }
        let mut dense = share_named(&named);
        if words.is_some() {
            decayed.pop();
            dense.retain(|(_, tensor)| tensor.data_ptr() != table);
        }
        let shared = decayed.iter().map(Tensor::shallow_clone).collect();
        let shard = shards.map_or(Shard::WHOLE, |group| Shard { rank: group.rank(), world: group.world() });
        let mut optimizer = Optimizer::new(rule(h), vec![(weight_decay, shared), (0.0, exempt)], shard)?;
        let mut best = None;
        let mut step = 0;
        let mut skipped = BTreeSet::new();
        let mut history = History::default();
        if let Some(restored) = &session.restored {
            history = restored.state.history.clone();
            let device = session.device;
            let mut weights = restored.model(device)?;
            session.model.load_parameters(&mut weights)?;
            load_named(&mut weights, session.objective.parameters())?;
            // Not on the device, which may have no room for more than a shard.
            let mut state = restored.optimizer(Device::Cpu)?;
            optimizer.load_state(|name| state.take_any(name))?;
            if let Some(words) = &mut words {
                words.load_state(|name| state.take_any(name))?;
            }
            if let (Some(found), Some(mut weights)) = (restored.state.best.clone(), restored.best(device)?) {
                best = Some((found, take_all(&mut weights, session.model.parameters())?));
            }
            step = restored.state.step;
            skipped = restored.state.skipped.clone();
            tracing::info!(step, total_steps, "resumed from a checkpoint");
        }
        if let Some(group) = session.group {
            // The folder may have changed between two ranks' downloads, and averaged gradients never bring ranks together.
            for (_, tensor) in &named {
                group.broadcast(&tensor.detach(), 0)?;
            }
        }
        let tensors = |named: Named| named.into_iter().map(|(_, tensor)| tensor).collect::<Vec<_>>();
        let (parameters, dense) = (tensors(named), tensors(dense));
        let reducer = session.group.map(|group| Reducer::new(&dense, group)).transpose()?;
        let loss_log = match &session.loss_log {
            Some(path) if session.group.is_none_or(|group| group.rank() == 0) => {
                Some(std::fs::File::options().create(true).append(true).open(path).map_err(TrainError::at(path))?)
            }
            _ => None,
        };
        if let Some(reporter) = &mut session.reporter {
            reporter.begin(&session.stage, step, total_steps);
            reporter.checkpointed(step);
        }
        let mut run = Self {
            rank: session.group.map_or(0, ProcessGroup::rank),
            world: session.group.map_or(1, ProcessGroup::world),
            learning_rate: LearningRate::new(h.learning_rate, h.warmup_ratio, total_steps, h.schedule),
            lengths: session.train.lengths(),
            parameters,
            dense,
            words,
            decayed,
            optimizer,
            shards,
            reducer,
            steps_per_epoch,
            total_steps,
            step,
            epoch: None,
            best,
            roll_back: None,
            skipped,
            history,
            terms: Vec::new(),
            loss_log,
            session,
        };
        if run.session.spec.failure_policy.on_non_finite == OnNonFinite::RollBack {
            run.roll_back = Some(RollBack::new(run.snapshot(run.own_state())));
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

    /// Forward, backward and update on a global batch; says besides whether some rank was asked to stop. `None`: rolled back.
    fn optimize(&mut self, batch: &[usize]) -> Result<Option<(Step, bool)>, TrainError> {
        let h = &self.session.spec.hyperparameters;
        let learning_rate = self.learning_rate.at(self.step);
        // Dropout's random numbers are a function of seed, step and rank: a resumed run draws the same.
        tch::manual_seed((mix(mix(h.seed as u64, self.step), self.rank as u64) >> 1) as i64);
        zero_grad(&self.dense)?;
        if let Some(words) = &mut self.words {
            words.begin(self.session.model, self.session.train, batch)?;
        }
        let mut rows = share(batch, &self.lengths, self.rank, self.world);
        // All ranks have to take part in the all-reduce: one without rows computes a row that counts nothing.
        let weight = if rows.is_empty() { 0.0 } else { 1.0 };
        if rows.is_empty() {
            rows.push(batch[0]);
        }
        let parts: Vec<&[usize]> = rows.chunks(rows.len().div_ceil(h.accumulate_steps as usize)).collect();
        let terms = self.session.objective.terms();
        // The reducer averages over ranks: each rank's part is its share of the global mean times this.
        let averaged = self.world as f64;
        // The sum of all terms with their weights, then each without, then whether this rank is to stop.
        let mut shared = vec![0.0; terms.len() + 2];
        for (index, part) in parts.iter().enumerate() {
            // Gradients are shared once, in the last backward pass.
            let mut reducer = self.reducer.as_mut().filter(|_| index + 1 == parts.len());
            if let Some(reducer) = &mut reducer {
                reducer.prepare_for_forward()?;
            }
            let Session { model, objective, teacher, train, device, bf16, group, .. } = &self.session;
            let seed = mix(h.seed as u64, self.step);
            let part = Part { train, rows: part, batch, weight, seed, group: *group, device: *device, bf16: *bf16 };
            let values = objective.values(model, *teacher, &part)?;
            // Of a term that all ranks compute whole, each differentiates its own rows and reports its share.
            let share = |index: usize| if objective.is_shared(index) { 1.0 } else { weight };
            let weighted =
                values.iter().zip(terms).enumerate().map(|(index, (value, term))| value * (term.weight * share(index)));
            let sum = weighted.reduce(|sum, value| sum + value).unwrap_or_default();
            if let Some(reducer) = &mut reducer {
                reducer.prepare_for_backward()?;
            }
            backward(&(&sum * (averaged / batch.len() as f64)))?;
            for (index, (value, term)) in values.iter().zip(terms).enumerate() {
                let copies = if objective.is_shared(index) { self.world as f64 } else { 1.0 };
                let value = f64::try_from(value)? * share(index) / copies;
                shared[0] += value * term.weight;
                shared[index + 1] += value;
            }
        }
        let rows = match &self.words {
            Some(words) => words.end(self.session.model, self.session.group, averaged)?,
            None => None,
        };
        let last = shared.len() - 1;
        shared[last] = f64::from(u8::from(self.session.stop.is_cancelled()));
        if let Some(group) = self.session.group {
            let sums = Tensor::from_slice(&shared).to_device(self.session.device);
            group.all_reduce_sum(&sums)?;
            shared = Vec::<f64>::try_from(sums)?;
        }
        let loss = shared[0] / batch.len() as f64;
        add_penalty(&self.decayed, h.l1, h.l2)?;
        let gradient_norm = self.clip(rows.as_ref(), h.clip_norm)?;
        // The gradients and the summed loss are the same on all ranks, so all of them decide alike.
        if loss.is_finite() && gradient_norm.is_finite() {
            self.optimizer.step(learning_rate)?;
            if let Some(words) = &mut self.words {
                words.step(learning_rate)?;
            }
            if let Some(group) = self.shards {
                self.optimizer.share_parameters(group)?;
            }
        } else {
            let what = if loss.is_finite() { "the gradient" } else { "the loss" };
            match self.session.spec.failure_policy.on_non_finite {
                OnNonFinite::Fail => return Err(TrainError::NonFinite { step: self.step + 1, what }),
                OnNonFinite::Skip => {
                    metrics::counter!("athanor_train_skipped_steps_total").increment(1);
                    tracing::warn!(step = self.step + 1, what, "not finite: the step is left out");
                }
                // A rank that was asked to stop says so again at the next step.
                OnNonFinite::RollBack => {
                    self.go_back(what)?;
                    return Ok(None);
                }
            }
        }
        let tokens = batch.iter().map(|&row| self.lengths[row]).sum();
        let step = Step { step: self.step + 1, loss, learning_rate, gradient_norm, samples: batch.len(), tokens };
        self.terms = shared[1..last].iter().map(|value| value / batch.len() as f64).collect();
        Ok(Some((step, shared[last] > 0.0)))
    }

    /// Global 2-norm of the gradients, those of the word embeddings' `rows` included; they are scaled down to `most` if that is
    /// above zero and below the norm. A norm that is not finite is returned and the gradients stay as they are.
    fn clip(&self, rows: Option<&Tensor>, most: f64) -> Result<f64, TrainError> {
        let mut gradients = self.optimizer.gradients()?;
        let mut squares = norm(&gradients)?.powi(2);
        if let Some(group) = self.shards {
            let sum = Tensor::from(squares).to_device(self.session.device);
            group.all_reduce_sum(&sum)?;
            squares = f64::try_from(sum)?;
        }
        // Every rank has these whole.
        let rows: Vec<Tensor> = rows.map(Tensor::grad).into_iter().collect();
        squares += norm(&rows)?.powi(2);
        let norm = squares.sqrt();
        if most > 0.0 && norm.is_finite() && norm > most {
            gradients.extend(rows);
            scale(&gradients, most / (norm + 1e-6))?;
        }
        Ok(norm)
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
        if let Some(words) = &mut self.words {
            words.catch_up()?;
        }
        let session = &mut self.session;
        let rows = (session.validation)()?;
        let watchdog = session.watchdog.clone();
        let found =
            evaluate::evaluate(session.model, &rows, session.group, session.device, session.bf16, || watchdog.beat())?;
        let (name, score) = found.score();
        // What is no number is worse than any, and a checkpoint has no word for it.
        let rank = score.max(f64::MIN);
        let is_best = self.best.as_ref().is_none_or(|(best, _)| rank > best.score);
        if is_best {
            let weights = Snapshot::copy(session.model.parameters());
            let mut metrics = found.report(&[]);
            metrics.insert(name.to_owned(), score);
            // A checkpoint is JSON, which has no word for the others.
            metrics.retain(|_, value| value.is_finite());
            self.best = Some((Best { step: self.step, score: rank, metrics }, weights));
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

    /// Starts to write a checkpoint. One that is not `needed` is left out while the one before is still being written; where the
    /// run could go back to is then this state all the same, as it is on the ranks that write nothing.
    fn checkpoint(&mut self, needed: bool) -> Result<(), TrainError> {
        let is_busy = self.session.checkpoints.as_ref().is_some_and(Writer::is_busy) && !needed;
        let left_out = self.rank_0_says(is_busy)?;
        if is_busy {
            tracing::warn!(step = self.step, "no checkpoint: the one before is still being written");
        }
        let writes = self.session.checkpoints.is_some() && !left_out;
        // The state before is freed first: two of them may not fit.
        let rolls_back = self.roll_back.take().is_some();
        let gathers = self.shards.filter(|_| !left_out);
        if !writes && !rolls_back && gathers.is_none() {
            return Ok(());
        }
        if let Some(words) = &mut self.words {
            words.catch_up()?;
        }
        self.session.watchdog.beat();
        self.roll_back = rolls_back.then(|| RollBack::new(self.snapshot(self.own_state())));
        let mut gathered = gathers.map(|group| self.optimizer.gather_state(group)).transpose()?;
        if !writes {
            return Ok(());
        }
        if let (Some(whole), Some(words)) = (&mut gathered, &self.words) {
            whole.extend(Snapshot::copy(&words.state()));
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

    /// A copy of what the optimizer keeps on this rank, while all words are up to date. Nothing changes it after the last step.
    fn own_state(&self) -> Named {
        let mut state = self.optimizer.state();
        state.extend(self.words.as_ref().map(Words::state).unwrap_or_default());
        if self.step < self.total_steps { Snapshot::copy(&state) } else { state }
    }

    /// A copy of all else that a checkpoint holds.
    fn snapshot(&self, optimizer: Named) -> Snapshot {
        let (best, weights) = self.best.as_ref().map(|(best, weights)| (best.clone(), share_named(weights))).unzip();
        let mut model = match &self.best {
            Some((best, weights)) if best.step == self.step => share_named(weights),
            _ => Snapshot::copy(self.session.model.parameters()),
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

    /// Where the optimizer's state is dealt out, all ranks take part in a checkpoint, or none: what rank 0 decides.
    fn rank_0_says(&self, answer: bool) -> Result<bool, TrainError> {
        let Some(group) = self.shards else { return Ok(answer) };
        let shared = Tensor::from_slice(&[i64::from(answer)]).to_device(self.session.device);
        group.broadcast(&shared, 0)?;
        Ok(shared.int64_value(&[0]) == 1)
    }

    fn end_early(&mut self) -> Result<(), TrainError> {
        let mut checkpoint = self.step;
        if let Some(writer) = &mut self.session.checkpoints {
            writer.finish()?;
            checkpoint = writer.newest();
        }
        Err(TrainError::Stopped { step: self.step, checkpoint })
    }

    fn finish(self) -> Result<Trained, TrainError> {
        let Some((best, weights)) = self.best else {
            return Err(TrainError::Other("the run ended without a validation".into()));
        };
        overwrite(&self.parameters, &weights)?;
        Ok(Trained { steps: self.step, best, history: self.history, checkpoints: self.session.checkpoints })
    }
}

/// Overwrites tensors, as far as there are others, with those in the same places.
fn overwrite(tensors: &[Tensor], saved: &[(String, Tensor)]) -> Result<(), TrainError> {
    tch::no_grad(|| {
        for (tensor, (_, saved)) in tensors.iter().zip(saved) {
            tensor.shallow_clone().f_copy_(saved)?;
        }
        Ok(())
    })
}

/// Overwrites tensors with those of the same names.
fn load_named(weights: &mut Weights, named: &[(String, Tensor)]) -> Result<(), TrainError> {
    tch::no_grad(|| {
        for (name, tensor) in named {
            let saved = weights.take(name, &tensor.size())?;
            tensor.shallow_clone().f_copy_(&saved)?;
        }
        Ok(())
    })
}

/// The update rule that hyperparameters ask for.
pub fn rule(h: &Hyperparameters) -> Rule {
    let (momentum, beta1, beta2, epsilon) = (h.momentum, h.beta1, h.beta2, h.epsilon);
    match h.optimizer {
        train::Optimizer::SGD => Rule::Sgd { momentum },
        train::Optimizer::Adam => Rule::Adam { beta1, beta2, epsilon },
        train::Optimizer::AdamW => Rule::AdamW { beta1, beta2, epsilon },
        train::Optimizer::RMSprop => Rule::RmsProp { alpha: beta2, momentum, epsilon },
    }
}

/// Parameters with weight decay, and those without: biases and normalisation weights.
fn weight_decay_groups(named: &[(String, Tensor)]) -> [Vec<Tensor>; 2] {
    // Biases and normalisation weights are the parameters that are no matrices.
    let (exempt, decayed): (Vec<_>, Vec<_>) = named.iter().partition(|(_, tensor)| tensor.dim() < 2);
    [decayed, exempt].map(|named| named.into_iter().map(|(_, tensor)| tensor.shallow_clone()).collect())
}

/// The same tensors once more, sharing memory.
fn share_named(named: &[(String, Tensor)]) -> Named {
    named.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// The tensors of a file in the order of `like`.
fn take_all(weights: &mut Weights, like: &[(String, Tensor)]) -> Result<Named, TrainError> {
    like.iter().map(|(name, tensor)| Ok((name.clone(), weights.take(name, &tensor.size())?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_epochs_or_are_given() {
        let h = |epochs, max_steps| Hyperparameters { epochs, max_steps, batch_size: 32, ..Hyperparameters::default() };
        assert_eq!(count_steps(100, &h(None, None)), (4, 12));
        assert_eq!(count_steps(96, &h(Some(2), None)), (3, 6));
        assert_eq!(count_steps(100, &h(None, Some(7))), (4, 7));
    }

    #[test]
    fn biases_and_norms_do_not_decay() {
        let shapes: [(&str, &[i64]); 4] = [
            ("a.weight", &[2, 2]),
            ("a.bias", &[2]),
            ("x.LayerNorm.weight", &[2]),
            ("word_embeddings.weight", &[3, 2]),
        ];
        let named: Named = shapes
            .iter()
            .map(|(name, shape)| ((*name).to_owned(), Tensor::zeros(*shape, (tch::Kind::Float, Device::Cpu))))
            .collect();
        assert_eq!(weight_decay_groups(&named).map(|tensors| tensors.len()), [2, 2]);
    }
}
