//! Word embeddings while they train. A batch reads a few hundred of some thirty thousand rows of their table: only these have
//! gradients, travel between ranks and cost the optimizer anything, and the result is that of training the whole table.

use athanor_contract::train::{Hyperparameters, Task};
use athanor_models::{Excerpt, Model, tokenizer::TokenRows};
use athanor_torch::{EmbeddingAdam, ProcessGroup};
use tch::{Device, Kind, Tensor};

use crate::{TrainError, checkpoint::Named, data::Encoded, training};

pub struct Words {
    adam: EmbeddingAdam,
    name: String,
    table: Tensor,
    /// Where a row of the table is in the current excerpt, [V].
    places: Tensor,
    pad_token_id: i64,
    current: Option<Current>,
}

/// The rows of one step.
struct Current {
    ids: Vec<i64>,
    rows: Tensor,
}

impl Words {
    /// Absent where every row has a gradient (predicted tokens, penalties), or the rule or the device has no such update.
    /// `name` is the table's among the optimizer's parameters.
    pub fn new(
        model: &Model,
        task: Task,
        h: &Hyperparameters,
        weight_decay: f64,
        device: Device,
        name: String,
    ) -> Option<Self> {
        if device != Device::Cpu || task == Task::MaskedLanguageModel || h.l1 != 0.0 || h.l2 != 0.0 {
            return None;
        }
        let table = model.word_embeddings().detach();
        let adam = EmbeddingAdam::new(&table, training::rule(h), weight_decay)?;
        let places = Tensor::zeros([table.size()[0]], (Kind::Int64, device));
        Some(Self { adam, name, table, places, pad_token_id: model.config().pad_token_id, current: None })
    }

    /// Lets the model read the rows that a global batch needs; the same on all ranks.
    pub fn begin(&mut self, model: &mut Model, train: &Encoded, batch: &[usize]) -> Result<(), TrainError> {
        let texts = |ids: &TokenRows| batch.iter().flat_map(|&row| ids[row].iter().copied()).collect::<Vec<u32>>();
        let mut ids = texts(&train.ids);
        ids.extend(train.second_texts().map(texts).unwrap_or_default());
        ids.sort_unstable();
        ids.dedup();
        let words = ids.into_iter().map(i64::from).filter(|&id| id != self.pad_token_id);
        let ids: Vec<i64> = std::iter::once(self.pad_token_id).chain(words).collect();
        self.adam.catch_up(&ids)?;
        let index = Tensor::from_slice(&ids);
        let rows = self.table.f_index_select(0, &index)?.set_requires_grad(true);
        let order = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
        let _ = self.places.f_index_copy_(0, &index, &order)?;
        model.set_word_excerpt(Some(Excerpt { places: self.places.shallow_clone(), rows: rows.shallow_clone() }));
        self.current = Some(Current { ids, rows });
        Ok(())
    }

    /// After the backward pass: the rows, with the sum over the ranks of their gradient, divided. The model reads the table again.
    pub fn end(
        &self,
        model: &mut Model,
        group: Option<&ProcessGroup>,
        divisor: f64,
    ) -> Result<Option<Tensor>, TrainError> {
        model.set_word_excerpt(None);
        let Some(current) = &self.current else { return Ok(None) };
        let mut gradient = current.rows.grad();
        if let Some(group) = group {
            group.all_reduce_sum(&gradient)?;
        }
        if divisor != 1.0 {
            let _ = gradient.f_div_scalar_(divisor)?;
        }
        Ok(Some(current.rows.shallow_clone()))
    }

    /// One step with the gradient that the rows have by now.
    pub fn step(&mut self, learning_rate: f64) -> Result<(), TrainError> {
        let Some(Current { ids, rows }) = self.current.take() else { return Ok(()) };
        Ok(self.adam.step(&ids, &rows.grad(), learning_rate)?)
    }

    /// Brings the whole table up to date, before it is read as a whole.
    pub fn catch_up(&mut self) -> Result<(), TrainError> {
        Ok(self.adam.catch_up_all()?)
    }

    /// After [`Words::catch_up`]: the optimizer's part about the table.
    pub fn state(&self) -> Named {
        self.adam.state(&self.name)
    }

    pub fn load_state(&mut self, find: impl FnMut(&str) -> Option<Tensor>) -> Result<(), TrainError> {
        self.current = None;
        Ok(self.adam.load_state(&self.name, find)?)
    }
}
