//! What all trainings of a run share: the job's own one and those of a cross-validation.

use std::sync::Arc;

use athanor_contract::train::{GenerationSpec, TrainSpec};
use athanor_models::tokenizer::TokenRows;
use athanor_torch::ProcessGroup;
use tch::Device;

use super::{context::JobContext, prepare::Prepared, setup};
use crate::{
    TrainError,
    data::{Dataset, Encoded, TaskTokenizer, tokens},
    network::Network,
    objectives::{Objective, Teacher},
    report::Reporter,
    tasks::{self, Rows, Share, Task},
    train::Session,
};

/// What all trainings of a run share.
pub struct TrainingContext<'a> {
    pub job: JobContext<'a>,
    pub prepared: &'a Prepared,
    pub encoder: RowEncoder<'a>,
    pub bf16: bool,
}

/// Turns rows of the dataset into tokens; other than the rest of the context, threads can share it.
pub struct RowEncoder<'a> {
    pub dataset: &'a Dataset,
    pub task: &'static dyn Task,
    pub labels: Vec<String>,
    pub tokenizer: TaskTokenizer,
    /// Tokens that texts are cut to.
    pub max_length: usize,
    pub generation: GenerationSpec,
}

impl RowEncoder<'_> {
    /// The given rows, in their order.
    ///
    /// # Errors
    /// See [`Task::encode`].
    pub fn encode(&self, rows: &[usize]) -> Result<Encoded, TrainError> {
        self.encode_with(rows, None)
    }

    /// [`Self::encode`] by all processes of the machine, in the same order: an encoder's tokens are made by the first one.
    ///
    /// # Errors
    /// See [`Task::encode`].
    pub fn encode_once(&self, rows: &[usize], job: JobContext) -> Result<Encoded, TrainError> {
        let node = &job.process.node;
        let share = |encode: &dyn Fn() -> Result<TokenRows, TrainError>| {
            node.once("tokens", || job.beat(), encode, tokens::write, tokens::read)
        };
        let encoded = self.encode_with(rows, Some(&share));
        job.process.watchdog.rest();
        encoded
    }

    fn encode_with(&self, rows: &[usize], share: Option<Share>) -> Result<Encoded, TrainError> {
        let &Self { dataset, task, ref labels, ref tokenizer, max_length, generation } = self;
        task.encode(&Rows { dataset, rows, labels, tokenizer, max_length, generation, share })
    }
}

/// One training: its model, its data, and how it is watched.
pub struct Training<'s> {
    pub stage: String,
    pub model: &'s mut Network,
    pub train: &'s Encoded,
    pub teacher: Option<&'s Teacher>,
    /// Validation rows; called at the first validation.
    pub validation: &'s dyn Fn() -> Result<Arc<Encoded>, TrainError>,
    pub reporter: Option<&'s mut Reporter>,
}

impl<'a> TrainingContext<'a> {
    /// # Errors
    /// A tokenizer, configuration or data that do not fit the task are user errors.
    pub fn new(job: JobContext<'a>, prepared: &'a Prepared) -> Result<Self, TrainError> {
        let (spec, dataset, parent) = (job.spec(), &prepared.dataset, &prepared.parent);
        let (tokenizer, max_length) = setup::load_tokenizer(spec, parent)?;
        let encoder = RowEncoder {
            dataset,
            task: tasks::of(spec.model.task),
            labels: setup::choose_labels(spec, dataset, parent, prepared.teacher.as_deref())?,
            tokenizer,
            max_length,
            generation: spec.evaluate.generation,
        };
        Ok(Self { job, prepared, encoder, bf16: setup::uses_bf16(spec.hyperparameters.precision, job.device()) })
    }

    pub fn spec(&self) -> &'a TrainSpec {
        self.job.spec()
    }

    pub fn device(&self) -> Device {
        self.job.device()
    }

    pub fn group(&self) -> Option<&'a ProcessGroup> {
        self.prepared.group.as_ref()
    }

    /// The model as every training starts with it.
    pub fn load_model(&self) -> Result<Network, TrainError> {
        setup::load_model(self.spec(), &self.prepared.parent, &self.encoder.labels, self.device())
    }

    /// A training without checkpoints and curves, which the job's own one adds.
    ///
    /// # Errors
    /// See [`Objective::new`].
    pub fn session<'s>(&'s self, training: Training<'s>) -> Result<Session<'s>, TrainError> {
        let (spec, process) = (self.spec(), self.job.process);
        let Training { stage, model, train, teacher, validation, reporter } = training;
        let seed = spec.hyperparameters.seed as u64;
        let objective = Objective::new(spec.objective_terms(), spec.model.task, &*model, teacher, seed, self.device())?;
        Ok(Session {
            spec,
            stage,
            device: self.device(),
            bf16: self.bf16,
            group: self.group(),
            model,
            objective,
            teacher,
            train,
            validation: Box::new(validation),
            fingerprint: String::new(),
            restored: None,
            checkpoints: None,
            events: None,
            reporter,
            timeline: process.timeline.clone(),
            watchdog: process.watchdog.clone(),
            stop: process.stop.clone(),
            loss_log: None,
        })
    }
}
