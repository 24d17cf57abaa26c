//! Each text's own pair among all pairs of the batch (van den Oord et al. 2018, Henderson et al. 2017).

use athanor_contract::train::ContrastiveTerm;
use athanor_torch::ProcessGroup;
use tch::{Kind, Tensor};

use super::{
    cross_entropy::cross_entropy,
    term::{Pass, Term},
};
use crate::{
    TrainError,
    data::{Part, batches::inputs},
};

pub struct Contrastive(pub ContrastiveTerm);

impl Term for Contrastive {
    fn is_shared(&self) -> bool {
        true
    }

    /// Over the pairs of all ranks, of which each rank differentiates its own.
    fn value(&self, pass: &Pass) -> Result<Tensor, TrainError> {
        let model = pass.model.encoder()?;
        let Part { train, rows, device, group, .. } = pass.part;
        let Some(pairs) = train.second_texts() else {
            return Err(TrainError::User("data.sources[].columns.pair: contrastive terms need pairs of texts".into()));
        };
        let texts: Vec<&[u32]> = rows.iter().map(|&row| &pairs[row]).collect();
        let (ids, mask) = inputs(&texts, model.config().pad_token_id, *device);
        let last = model.last_hidden_state(&ids, mask.as_ref(), true);
        let positives = model.embedding(&last, mask.as_ref());
        let (anchors, positives) = match group {
            Some(group) if group.world() > 1 => {
                (gather(pass.outputs, pass.part, group)?, gather(&positives, pass.part, group)?)
            }
            _ => (pass.outputs.shallow_clone(), positives),
        };
        Ok(contrastive(&anchors, &positives, self.0.temperature))
    }
}

/// Cross entropy of each text's own pair among all pairs, by cosines over a temperature. Both [B, C]; row i of one
/// belongs to row i of the other.
pub fn contrastive(anchors: &Tensor, pairs: &Tensor, temperature: f64) -> Tensor {
    let unit = |x: &Tensor| {
        let x = x.to_kind(Kind::Float);
        let norm = x.square().sum_dim_intlist([-1_i64].as_slice(), true, Kind::Float).sqrt().clamp_min(1e-12);
        x / norm
    };
    let scores = unit(anchors).matmul(&unit(pairs).tr()) / temperature;
    let own = Tensor::arange(anchors.size()[0], (Kind::Int64, anchors.device()));
    cross_entropy(&scores, &own, 0.0)
}

/// The rows [B, C] of all ranks in the order of the batch; gradients flow to this rank's own.
fn gather(own: &Tensor, part: &Part, group: &ProcessGroup) -> Result<Tensor, TrainError> {
    let Part { rows, batch, weight, .. } = part;
    let place_of: std::collections::HashMap<usize, i64> = batch.iter().copied().zip(0..).collect();
    let places: Vec<i64> = rows.iter().filter_map(|row| place_of.get(row).copied()).collect();
    let places = Tensor::from_slice(&places).to_device(own.device());
    let empty = Tensor::zeros([batch.len() as i64, own.size()[1]], (Kind::Float, own.device()));
    let spread = empty.index_add(0, &places, &(own.to_kind(Kind::Float) * *weight));
    let all = spread.detach().copy();
    group.all_reduce_sum(&all)?;
    // The others' rows are constants; this rank's have the value they had, and their gradient.
    Ok(&all - spread.detach() + spread)
}
