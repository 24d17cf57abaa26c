//! `CausalLanguageModel`: generates text. Rows are conversations, prompts with completions, or plain texts; the loss is
//! on what the assistant says, on the completion, or on the whole text.
//!
//! - [`rows`]: rows as tokens with their targets, and batches of them;
//! - [`generate`]: greedy answers over a cache;
//! - [`results`]: metrics of predicted tokens and of generated answers.

pub mod generate;
pub mod results;
pub mod rows;

use athanor_contract::train;
use athanor_models::{self as models, Model};
use tch::Tensor;

use super::task::{Rows, Task};
use crate::{
    TrainError,
    data::{Batch, Encoded},
};

pub struct CausalLanguageModel;

impl Task for CausalLanguageModel {
    fn kind(&self) -> train::Task {
        train::Task::CausalLanguageModel
    }

    fn generates(&self) -> bool {
        true
    }

    /// No encoder has this head.
    fn head(&self, _labels: &[String]) -> Option<models::Task> {
        None
    }

    fn accepts_teacher(&self, _head: &models::Task) -> bool {
        false
    }

    fn encode(&self, rows: &Rows) -> Result<Encoded, TrainError> {
        rows::encode(rows)
    }

    /// A decoder's outputs are its hidden states: the logits over the vocabulary are computed in parts.
    fn outputs(&self, _model: &Model, _batch: &Batch, last: &Tensor, _train: bool) -> Tensor {
        last.shallow_clone()
    }
}
