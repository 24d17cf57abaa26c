//! What a task is to the trainer: one trait that every `model.task` implements in a file of its own.

use athanor_contract::train::{self, GenerationSpec};
use athanor_models::{self as models, Model, tokenizer::TokenRows};
use tch::Tensor;

use crate::{
    TrainError,
    data::{Batch, Columns, Dataset, Encoded, TaskTokenizer},
};

/// Makes tokens, or takes those that another process has made of the same texts.
pub type Share<'a> = &'a dyn Fn(&dyn Fn() -> Result<TokenRows, TrainError>) -> Result<TokenRows, TrainError>;

/// Rows to encode, and what encoding them requires.
pub struct Rows<'a> {
    pub dataset: &'a Dataset,
    /// Rows of the dataset, in the order of the result.
    pub rows: &'a [usize],
    /// Class names in the order of the outputs; empty for tasks without classes.
    pub labels: &'a [String],
    pub tokenizer: &'a TaskTokenizer,
    /// Tokens that texts are cut to.
    pub max_length: usize,
    /// How a language model's answers are generated when the rows are measured.
    pub generation: GenerationSpec,
    /// Shares an encoder's tokens among the processes of a machine, which then all encode the same rows; absent: each
    /// process makes its own.
    pub share: Option<Share<'a>>,
}

impl Rows<'_> {
    /// The rows' texts as an encoder reads them, with the columns of the task.
    ///
    /// # Errors
    /// A text that the tokenizer cannot read.
    pub fn with(&self, columns: impl Columns + 'static) -> Result<Encoded, TrainError> {
        Ok(Encoded {
            columns: Box::new(columns),
            ids: self.tokens(|| self.rows.iter().map(|&row| self.dataset.rows.text(row)))?,
            sources: self.rows.iter().map(|&row| self.dataset.rows.source(row) as u32).collect(),
        })
    }

    /// Some text of each row as an encoder reads it.
    ///
    /// # Errors
    /// A text that the tokenizer cannot read.
    pub fn tokens<'t, I: Iterator<Item = &'t str>>(&self, texts: impl Fn() -> I) -> Result<TokenRows, TrainError> {
        let encode = || Ok(self.tokenizer.encoder()?.encode_rows(texts(), self.max_length)?);
        match self.share {
            Some(share) => share(&encode),
            None => encode(),
        }
    }
}

/// One `model.task`. What depends on rows is behind the [`Columns`] that the task encodes: batches, and the evaluation.
pub trait Task: Send + Sync {
    fn kind(&self) -> train::Task;

    /// Whether each row of the data needs a label.
    fn needs_labels(&self) -> bool {
        false
    }

    /// Whether a label is one of several classes, which the model's outputs follow.
    fn has_classes(&self) -> bool {
        false
    }

    /// Whether `meanSquaredError` compares the outputs with the rows' labels; else it compares them with the teacher's
    /// outputs.
    fn labels_are_numbers(&self) -> bool {
        false
    }

    /// Whether the outputs are vectors, as wide as the hidden states.
    fn outputs_are_vectors(&self) -> bool {
        false
    }

    /// Whether the outputs read the last hidden states of all tokens, whatever the model's head reads.
    fn reads_every_token(&self) -> bool {
        false
    }

    /// Whether the outputs are over the vocabulary, so that a teacher needs the student's.
    fn outputs_are_tokens(&self) -> bool {
        false
    }

    /// Whether a teacher's outputs for a row are the same at each step, so that they can be kept.
    fn teacher_is_cacheable(&self) -> bool {
        false
    }

    /// Whether the model is a decoder that generates text.
    fn generates(&self) -> bool {
        false
    }

    /// The head of an encoder for the task; `None` if the task is a decoder's.
    fn head(&self, labels: &[String]) -> Option<models::Task>;

    /// Whether a model with this head can teach the task.
    fn accepts_teacher(&self, head: &models::Task) -> bool;

    /// The rows as tokens, with what the task keeps of each row besides them.
    ///
    /// # Errors
    /// Rows without what the task requires are user errors.
    fn encode(&self, rows: &Rows) -> Result<Encoded, TrainError>;

    /// What the task predicts from the last hidden states of an encoder: one row for each row or target of the batch.
    fn outputs(&self, model: &Model, batch: &Batch, last: &Tensor, train: bool) -> Tensor;
}
