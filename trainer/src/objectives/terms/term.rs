//! What a term is to the objective, and what it reads.

use athanor_models::EncoderConfig;
use tch::{Device, Tensor};

use crate::{
    TrainError,
    data::{Batch, Part},
    network::ModelRef,
    tasks::Task,
    teacher::Answer,
};

/// One kind of term.
pub trait Term {
    /// Whether the term compares hidden states of every layer, token by token.
    fn needs_states(&self) -> bool {
        false
    }

    /// Whether the value is the same on all ranks, instead of this rank's part of a sum.
    fn is_shared(&self) -> bool {
        false
    }

    /// Checks the term against the models and creates its parameters.
    ///
    /// # Errors
    /// What the user has to change, without the field's name.
    fn prepare(&mut self, _models: &Models) -> Result<(), String> {
        Ok(())
    }

    /// Parameters that are trained next to the model's, by name.
    fn parameters(&self) -> &[(String, Tensor)] {
        &[]
    }

    /// The value without its weight: a sum over the part's rows, with gradients.
    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError>;
}

/// The models that a term applies to.
pub struct Models<'a> {
    /// Place of the term in the objective.
    pub index: usize,
    pub task: &'a dyn Task,
    /// Absent for a decoder.
    pub student: Option<&'a EncoderConfig>,
    /// Absent without a teacher, and where its answers are cached.
    pub teacher: Option<&'a EncoderConfig>,
    pub seed: u64,
    pub device: Device,
}

/// One forward pass of the student.
pub struct Pass<'a> {
    pub task: &'a dyn Task,
    pub model: ModelRef<'a>,
    pub part: &'a Part<'a>,
    pub batch: &'a Batch,
    /// Hidden states [B, T, C] of the first layer's input and each layer's output, or of the last layer alone; of a
    /// decoder those [N, C] of the last layer.
    pub states: &'a [Tensor],
    /// What the task predicts: logits [B, L] or [tokens, V], numbers [B, 1], vectors [B, C]; a decoder's hidden states.
    pub outputs: &'a Tensor,
    pub answer: Option<&'a Answer>,
}

impl Pass<'_> {
    /// The teacher's answer for the rows of the pass.
    pub fn answer(&self) -> Result<&Answer, TrainError> {
        self.answer.ok_or_else(|| TrainError::Other("there is no teacher".into()))
    }
}
