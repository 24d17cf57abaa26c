//! Forward passes over held-out rows: shared among the ranks, without gradients, with a beat after each batch.

use athanor_models::{Model, tokenizer::TokenRows};
use athanor_torch::{Autocast, ProcessGroup};
use tch::{Device, Kind, Tensor};

use crate::{
    TrainError,
    data::batches::{evaluation_batches, inputs},
};

/// Rows of one forward pass; without gradients memory is no concern, and the rows are sorted by length.
const BATCH: usize = 64;

/// How rows are measured.
pub struct Measuring<'a> {
    pub group: Option<&'a ProcessGroup>,
    pub device: Device,
    pub bf16: bool,
    /// Whether answers are generated, which takes longer than all the rest.
    pub generates: bool,
    /// Called after each batch.
    pub beat: &'a mut dyn FnMut(),
}

impl Measuring<'_> {
    pub fn rank(&self) -> usize {
        self.group.map_or(0, ProcessGroup::rank)
    }

    pub fn world(&self) -> usize {
        self.group.map_or(1, ProcessGroup::world)
    }

    /// `width` numbers for each row, computed batch by batch from the rows' numbers; every rank gets all of them.
    pub fn rows(
        &mut self,
        lengths: &[usize],
        width: usize,
        compute: impl Fn(&[usize]) -> Result<Vec<f32>, TrainError>,
    ) -> Result<Vec<f32>, TrainError> {
        // A row of another rank stays zero here and is added by the sum over the ranks.
        let mut found = vec![0_f32; lengths.len() * width];
        for batch in evaluation_batches(lengths, BATCH, self.rank(), self.world()) {
            let values = tch::no_grad(|| {
                let _autocast = self.bf16.then(|| Autocast::bf16(self.device));
                compute(&batch)
            })?;
            for (row, values) in batch.into_iter().zip(values.chunks(width)) {
                found[row * width..][..width].copy_from_slice(values);
            }
            (self.beat)();
        }
        self.sum(found)
    }

    /// The sum over the ranks.
    pub fn sum(&self, values: Vec<f32>) -> Result<Vec<f32>, TrainError> {
        let Some(group) = self.group else { return Ok(values) };
        let all = Tensor::from_slice(&values).to_device(self.device);
        group.all_reduce_sum(&all)?;
        Ok(Vec::<f32>::try_from(all)?)
    }

    /// Unit vectors [texts, C] by mean pooling; every rank gets all of them.
    pub fn embed(&mut self, model: &Model, texts: &TokenRows) -> Result<Tensor, TrainError> {
        let lengths: Vec<usize> = texts.lengths().collect();
        let mut all = Tensor::zeros([texts.len() as i64, model.config().hidden_size], (Kind::Float, self.device));
        for batch in evaluation_batches(&lengths, BATCH, self.rank(), self.world()) {
            tch::no_grad(|| {
                let _autocast = self.bf16.then(|| Autocast::bf16(self.device));
                let texts: Vec<&[u32]> = batch.iter().map(|&row| &texts[row]).collect();
                let (ids, mask) = inputs(&texts, model.config().pad_token_id, self.device);
                let last = model.last_hidden_state(&ids, mask.as_ref(), false);
                let vectors = model.embedding(&last, mask.as_ref());
                let squares = vectors.square().sum_dim_intlist([1_i64].as_slice(), true, Kind::Float);
                let places: Vec<i64> = batch.iter().map(|&row| row as i64).collect();
                let places = Tensor::from_slice(&places).to_device(self.device);
                let _ = all.index_copy_(0, &places, &(vectors / squares.sqrt().clamp_min(1e-12)));
            });
            (self.beat)();
        }
        if let Some(group) = self.group {
            group.all_reduce_sum(&all)?;
        }
        Ok(all)
    }
}
