//! Rows as token ids, with the columns that their task adds; and what one forward pass reads of them.

use std::fmt::Debug;

use athanor_contract::train::WeightedTerm;
use athanor_models::{self as models, tokenizer::TokenRows};
use athanor_torch::ProcessGroup;
use tch::{Device, Tensor};

use super::batches::inputs;
use crate::{
    TrainError,
    evaluate::{evaluation::Results, measuring::Measuring},
    network::ModelRef,
};

/// Marks a label that counts nothing, as in libtorch.
pub const IGNORED: i64 = -100;

/// Rows of one part of the dataset, in order.
#[derive(Debug)]
pub struct Encoded {
    pub ids: TokenRows,
    /// Index of each row's source.
    pub sources: Vec<u32>,
    pub columns: Box<dyn Columns>,
}

/// What a task keeps of each row besides its text.
pub trait Columns: Debug + Send + Sync {
    /// Keeps these rows alone, in this order.
    fn select(&mut self, rows: &[usize]);

    /// Adds rows without a label.
    fn extend(&mut self, count: usize);

    /// Index of each row's label; `None` for a row without a label that the model has. Absent for tasks without
    /// classes.
    fn classes(&self) -> Option<&[Option<u16>]> {
        None
    }

    /// The second text of each row, for tasks over pairs.
    fn second_texts(&self) -> Option<&TokenRows> {
        None
    }

    /// Packs several rows into one, each of at most `max_length` tokens, and returns the rows of each pack; `None` for
    /// tasks that do not pack. `ids` are the rows' tokens.
    fn pack(&mut self, _ids: &TokenRows, _max_length: usize) -> Option<Vec<Vec<usize>>> {
        None
    }

    /// The tensors of one forward pass. `terms` are those of the objective.
    ///
    /// # Errors
    /// A tokenizer or data without what the task requires are user errors.
    fn collate(&self, part: &Part, terms: &[WeightedTerm], pad_id: i64) -> Result<Batch, TrainError>;

    /// Measures a model on all `rows`, of which these are the columns; the ranks share the work and all get the
    /// results.
    ///
    /// # Errors
    /// See [`Columns::collate`].
    fn evaluate(
        &self,
        rows: &Encoded,
        model: ModelRef,
        measuring: &mut Measuring,
    ) -> Result<Box<dyn Results>, TrainError>;
}

/// Rows of one forward pass, and the global batch that they are a part of.
pub struct Part<'a> {
    pub train: &'a Encoded,
    pub rows: &'a [usize],
    /// Rows of the whole optimizer step, over all ranks.
    pub batch: &'a [usize],
    /// 0 for a rank without rows of its own, which computes one that counts nothing.
    pub weight: f64,
    /// Seed of this step; the same on all ranks.
    pub seed: u64,
    pub group: Option<&'a ProcessGroup>,
    pub device: Device,
    pub bf16: bool,
}

/// What one forward pass reads, and what it should predict.
pub struct Batch {
    /// [B, T]; of a decoder all tokens of all sequences, [N].
    pub ids: Tensor,
    /// [B, T], 1 where a token is; absent where nothing is padding.
    pub mask: Option<Tensor>,
    /// Places of the predicted tokens among the batch's B * T tokens, [N], if the task predicts tokens.
    pub places: Option<Tensor>,
    /// True values in the order of the outputs: labels [B] or [N] (i64), numbers [B, 1]; empty where the task has none.
    pub targets: Tensor,
    /// Rows of the global batch for each of its targets. A sum over targets times this, divided by the rows of the
    /// global batch, is the mean over targets. 1 where each row is one target.
    pub rows_per_target: f64,
    /// A decoder's sequences.
    pub sequences: Option<models::Batch>,
}

impl Batch {
    /// Texts without anything to predict. An absent mask means that nothing is padding.
    pub fn of_texts(texts: &[&[u32]], pad_id: i64, device: Device) -> Self {
        let (ids, mask) = inputs(texts, pad_id, device);
        Self { ids, mask, places: None, targets: Tensor::new(), rows_per_target: 1.0, sequences: None }
    }
}

impl Part<'_> {
    /// The texts of the rows, without anything to predict.
    pub fn texts(&self, pad_id: i64) -> Batch {
        let texts: Vec<&[u32]> = self.rows.iter().map(|&row| &self.train.ids[row]).collect();
        Batch::of_texts(&texts, pad_id, self.device)
    }
}

impl Encoded {
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    pub fn second_texts(&self) -> Option<&TokenRows> {
        self.columns.second_texts()
    }

    /// Index of each row's label; `None` for rows without one, and for all rows of tasks without classes.
    pub fn classes(&self) -> Vec<Option<usize>> {
        match self.columns.classes() {
            Some(classes) => classes.iter().map(|class| class.map(usize::from)).collect(),
            None => vec![None; self.len()],
        }
    }

    /// Tokens of each row, its second text included.
    pub fn lengths(&self) -> Vec<usize> {
        match self.second_texts() {
            None => self.ids.lengths().collect(),
            Some(second) => self.ids.lengths().zip(second.lengths()).map(|(text, second)| text + second).collect(),
        }
    }

    /// Keeps these rows alone, in this order.
    pub fn select(&mut self, rows: &[usize]) {
        self.ids = self.ids.select(rows);
        self.columns.select(rows);
        self.sources = rows.iter().map(|&row| self.sources[row]).collect();
    }

    /// Packs several rows into one of at most `max_length` tokens, if the task can; a pack is of its first row's source.
    pub fn pack(&mut self, max_length: usize) {
        let Some(packs) = self.columns.pack(&self.ids, max_length) else { return };
        let tokens =
            |rows: &Vec<usize>| rows.iter().flat_map(|&row| self.ids[row].iter().copied()).collect::<Vec<u32>>();
        let ids = packs.iter().map(tokens).collect();
        self.sources = packs.iter().map(|rows| self.sources[rows[0]]).collect();
        self.ids = ids;
    }

    /// Adds rows without a label, each with the index of its source.
    pub fn extend(&mut self, ids: &TokenRows, sources: impl IntoIterator<Item = u32>) {
        ids.iter().for_each(|ids| self.ids.push(ids));
        self.columns.extend(ids.len());
        self.sources.extend(sources);
    }
}
