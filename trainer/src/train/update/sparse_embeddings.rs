//! The embedding table's update on the CPU. A batch reads a few hundred of some thirty thousand rows: only these get
//! gradients, travel between ranks and cost the optimizer anything. The result is that of updating the whole table.
//!
//! It is a decorator of the update of all other parameters: without this file, and its lines in [`super::build`], the
//! table is one of these parameters and the results are the same.

use athanor_contract::train::{Task, TrainSpec};
use athanor_models::{EmbeddingRows, tokenizer::TokenRows};
use athanor_torch::{EmbeddingAdam, ProcessGroup, norm, scale};
use tch::{Device, Kind, Tensor};

use super::step::{Update, rule, weight_decay};
use crate::{
    TrainError,
    data::Encoded,
    network::Network,
    train::named::{self, Named},
};

/// The table and its optimizer.
pub struct SparseEmbeddings {
    adam: EmbeddingAdam,
    /// The table's name among the parameters.
    name: String,
    table: Tensor,
    /// Where a row of the table is among the current step's rows, [V].
    places: Tensor,
    pad_token_id: i64,
    current: Option<Rows>,
}

/// The rows of one step, in the order of `ids`.
struct Rows {
    ids: Vec<i64>,
    values: Tensor,
}

impl SparseEmbeddings {
    /// Takes the table out of the parameters. Returns `None` and takes nothing where every row has a gradient
    /// (predicted tokens, penalties), where the state is sharded, where the table does not train, and for rules and
    /// devices without such an update.
    pub fn split_off(
        parameters: &mut Named,
        network: &Network,
        spec: &TrainSpec,
        device: Device,
    ) -> Result<Option<Self>, TrainError> {
        // A decoder's output head may be the table, and reads every row.
        let Network::Encoder(model) = network else { return Ok(None) };
        let h = &spec.hyperparameters;
        let every_row = spec.model.task == Task::MaskedLanguageModel || h.l1 != 0.0 || h.l2 != 0.0;
        if device != Device::Cpu || every_row || spec.distributed.shard_optimizer {
            return Ok(None);
        }
        let table = model.word_embeddings().detach();
        let place = parameters.iter().position(|(_, tensor)| tensor.data_ptr() == table.data_ptr());
        let (Some(place), Some(adam)) = (place, EmbeddingAdam::new(&table, rule(h), weight_decay(h))) else {
            return Ok(None);
        };
        let (name, _) = parameters.remove(place);
        let places = Tensor::f_zeros([table.size()[0]], (Kind::Int64, device))?;
        Ok(Some(Self { adam, name, table, places, pad_token_id: model.config().pad_token_id, current: None }))
    }

    /// The update of the table and, by `others`, of all other parameters.
    pub fn around<'a>(self, others: Box<dyn Update + 'a>, group: Option<&'a ProcessGroup>) -> WithSparseEmbeddings<'a> {
        WithSparseEmbeddings { others, embeddings: self, group }
    }

    /// Lets the model read the rows that the global batch needs; they are the same on all ranks.
    fn begin(&mut self, network: &mut Network, train: &Encoded, batch: &[usize]) -> Result<(), TrainError> {
        let texts = |ids: &TokenRows| batch.iter().flat_map(|&row| ids[row].iter().copied()).collect::<Vec<u32>>();
        let mut ids = texts(&train.ids);
        ids.extend(train.second_texts().map(texts).unwrap_or_default());
        ids.sort_unstable();
        ids.dedup();
        let words = ids.into_iter().map(i64::from).filter(|&id| id != self.pad_token_id);
        let ids: Vec<i64> = std::iter::once(self.pad_token_id).chain(words).collect();
        self.adam.catch_up(&ids)?;
        let index = Tensor::from_slice(&ids);
        let values = self.table.f_index_select(0, &index)?.set_requires_grad(true);
        let order = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
        let _ = self.places.f_index_copy_(0, &index, &order)?;
        if let Network::Encoder(model) = network {
            let rows = EmbeddingRows { places: self.places.shallow_clone(), rows: values.shallow_clone() };
            model.set_word_rows(Some(rows));
        }
        self.current = Some(Rows { ids, values });
        Ok(())
    }

    /// The gradient of the current rows.
    fn gradients(&self) -> Vec<Tensor> {
        self.current.iter().map(|rows| rows.values.grad()).collect()
    }
}

/// [`SparseEmbeddings`] around the update of all other parameters.
pub struct WithSparseEmbeddings<'a> {
    others: Box<dyn Update + 'a>,
    embeddings: SparseEmbeddings,
    group: Option<&'a ProcessGroup>,
}

impl Update for WithSparseEmbeddings<'_> {
    fn begin(&mut self, network: &mut Network, train: &Encoded, batch: &[usize]) -> Result<(), TrainError> {
        self.others.begin(network, train, batch)?;
        self.embeddings.begin(network, train, batch)
    }

    fn backward(&mut self, loss: &Tensor, is_last: bool) -> Result<(), TrainError> {
        self.others.backward(loss, is_last)
    }

    /// The model reads the whole table again. Every rank has the rows' gradients whole: they count once.
    fn gradient_squares(&mut self, network: &mut Network) -> Result<f64, TrainError> {
        if let Network::Encoder(model) = network {
            model.set_word_rows(None);
        }
        let gradients = self.embeddings.gradients();
        if let Some(group) = self.group {
            for gradient in &gradients {
                group.all_reduce_sum(gradient)?;
                // Each rank's share was multiplied by the number of ranks, as the reducer needs it.
                let _ = gradient.shallow_clone().f_div_scalar_(group.world() as f64)?;
            }
        }
        Ok(self.others.gradient_squares(network)? + norm(&gradients)?.powi(2))
    }

    fn scale_gradients(&mut self, factor: f64) -> Result<(), TrainError> {
        scale(&self.embeddings.gradients(), factor)?;
        self.others.scale_gradients(factor)
    }

    fn apply(&mut self, learning_rate: f64) -> Result<(), TrainError> {
        self.others.apply(learning_rate)?;
        let Some(Rows { ids, values }) = self.embeddings.current.take() else { return Ok(()) };
        Ok(self.embeddings.adam.step(&ids, &values.grad(), learning_rate)?)
    }

    fn catch_up(&mut self) -> Result<(), TrainError> {
        self.others.catch_up()?;
        Ok(self.embeddings.adam.catch_up_all()?)
    }

    fn state(&self) -> Named {
        let mut state = self.others.state();
        state.extend(self.embeddings.adam.state(&self.embeddings.name));
        state
    }

    fn is_sharded(&self) -> bool {
        self.others.is_sharded()
    }

    fn gather(&self) -> Result<Named, TrainError> {
        let mut state = self.others.gather()?;
        if self.group.is_none_or(|group| group.rank() == 0) {
            state.extend(named::copy_to_host(&self.embeddings.adam.state(&self.embeddings.name))?);
        }
        Ok(state)
    }

    fn load(&mut self, find: &mut dyn FnMut(&str) -> Option<Tensor>) -> Result<(), TrainError> {
        self.embeddings.current = None;
        self.others.load(find)?;
        Ok(self.embeddings.adam.load_state(&self.embeddings.name, find)?)
    }

    fn sum(&self, numbers: &Tensor) -> Result<(), TrainError> {
        self.others.sum(numbers)
    }

    fn rank_0_says(&self, answer: bool) -> Result<bool, TrainError> {
        self.others.rank_0_says(answer)
    }
}
