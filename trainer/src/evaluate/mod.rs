//! What a model makes of held-out rows, and what that is worth.

mod gates;
mod metrics;

use athanor_contract::artifact::ClassReference;
use athanor_models::{Model, Packing, Task, tokenizer::TokenRows};
use athanor_torch::{Autocast, ProcessGroup};
use tch::{Device, Kind, Tensor};

pub use gates::{Others, failed_gates};
pub use metrics::{metric, report, score};

use crate::{
    TrainError,
    data::{
        Encoded,
        batches::{evaluation_batches, inputs, mix},
    },
    objectives::masking::mask_row,
};

/// Rows of one forward pass; without gradients memory is no concern, and the rows are sorted by length.
const BATCH: usize = 64;
/// Confidences that the artifact keeps as the baseline of drift detection.
const REFERENCE_CONFIDENCES: usize = 2048;
/// Texts that are compared with all pairs at once.
const COMPARED: i64 = 512;
/// Share of the tokens that a masked language model has to predict when it is measured, and the seed of their choice.
const MASKED: f64 = 0.15;
const MASK_SEED: u64 = 0x6d61_736b;

/// The winning label and its probability for each row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Predictions {
    pub labels: Vec<usize>,
    pub confidences: Vec<f32>,
}

/// What a model says of some rows, by its task.
#[derive(Clone, Debug, PartialEq)]
pub enum Evaluation {
    Classes(Predictions),
    /// A number for each row.
    Numbers(Vec<f32>),
    /// For each row the masked tokens, those predicted rightly, and the sum of their cross entropies.
    Tokens(Vec<[f32; 3]>),
    /// For each row the place of its own pair among all pairs, from 1.
    Ranks(Vec<f32>),
}

impl Evaluation {
    /// Of a classifier; nobody is right about rows without labels.
    pub fn classes(&self) -> Option<&Predictions> {
        match self {
            Self::Classes(predictions) => Some(predictions),
            _ => None,
        }
    }
}

/// Measures all rows, shared among the ranks; every rank gets all results. `beat` is called after each batch.
pub fn evaluate(
    model: &Model,
    rows: &Encoded,
    group: Option<&ProcessGroup>,
    device: Device,
    bf16: bool,
    mut beat: impl FnMut(),
) -> Result<Evaluation, TrainError> {
    let (rank, world) = group.map_or((0, 1), |group| (group.rank(), group.world()));
    let width = match model.task() {
        Task::Classification(_) => 2,
        Task::Regression => 1,
        Task::MaskedLanguageModel => 3,
        Task::Embedding => return ranks(model, rows, group, device, bf16, beat),
    };
    // A row of another rank stays zero here and is added by the sum over the ranks.
    let mut found = vec![0_f32; rows.len() * width];
    for batch in evaluation_batches(&rows.lengths(), BATCH, rank, world) {
        let values = tch::no_grad(|| -> Result<_, TrainError> {
            let _autocast = bf16.then(|| Autocast::bf16(device));
            Ok(match model.task() {
                Task::Classification(_) => {
                    let (confidences, labels) =
                        forward(model, rows, &batch, device, false).softmax(-1, Kind::Float).max_dim(-1, false);
                    Vec::<f32>::try_from(Tensor::stack(&[labels.to_kind(Kind::Float), confidences], 1).reshape([-1]))?
                }
                Task::MaskedLanguageModel => tokens(model, rows, &batch, device)?,
                _ => Vec::<f32>::try_from(forward(model, rows, &batch, device, false).reshape([-1]))?,
            })
        })?;
        for (row, values) in batch.into_iter().zip(values.chunks(width)) {
            found[row * width..][..width].copy_from_slice(values);
        }
        beat();
    }
    if let Some(group) = group {
        let all = Tensor::from_slice(&found).to_device(device);
        group.all_reduce_sum(&all)?;
        found = Vec::<f32>::try_from(all)?;
    }
    Ok(match model.task() {
        Task::Classification(_) => Evaluation::Classes(Predictions {
            // At most 1,024 labels: exact in f32.
            labels: found.iter().step_by(2).map(|&label| label as usize).collect(),
            confidences: found.into_iter().skip(1).step_by(2).collect(),
        }),
        Task::MaskedLanguageModel => Evaluation::Tokens(found.chunks(3).map(|row| [row[0], row[1], row[2]]).collect()),
        _ => Evaluation::Numbers(found),
    })
}

/// The same as a server computes: in FP32, on the CPU with packed matrices.
pub fn evaluate_as_served(
    model: &mut Model,
    rows: &Encoded,
    group: Option<&ProcessGroup>,
    device: Device,
    beat: impl FnMut(),
) -> Result<Evaluation, TrainError> {
    if device == Device::Cpu {
        model.pack(Packing::Float)?;
    }
    let found = evaluate(model, rows, group, device, false, beat);
    model.unpack();
    found
}

/// For each row masked tokens, hits and loss, in a row.
fn tokens(model: &Model, rows: &Encoded, batch: &[usize], device: Device) -> Result<Vec<f32>, TrainError> {
    let Some(mask_tokens) = &rows.mask_tokens else {
        return Err(TrainError::User("model.from: its tokenizer has no mask token, which the task needs".into()));
    };
    let masked: Vec<(Vec<u32>, Vec<usize>)> =
        batch.iter().map(|&row| mask_row(&rows.ids[row], mask_tokens, MASKED, mix(MASK_SEED, row as u64))).collect();
    let texts: Vec<&[u32]> = masked.iter().map(|(ids, _)| ids.as_slice()).collect();
    let longest = texts.iter().map(|ids| ids.len()).max().unwrap_or(0);
    let (mut places, mut labels, mut owners) = (Vec::new(), Vec::new(), Vec::new());
    for (index, (_, hidden)) in masked.iter().enumerate() {
        for &place in hidden {
            places.push((index * longest + place) as i64);
            labels.push(i64::from(rows.ids[batch[index]][place]));
            owners.push(index);
        }
    }
    let mut found = vec![0_f32; batch.len() * 3];
    if places.is_empty() {
        return Ok(found);
    }
    let (ids, mask) = inputs(&texts, model.config().pad_token_id, device);
    let hidden = model.last_hidden_state(&ids, mask.as_ref(), false);
    let chosen = hidden
        .reshape([-1, model.config().hidden_size])
        .index_select(0, &Tensor::from_slice(&places).to_device(device));
    let labels = Tensor::from_slice(&labels).to_device(device);
    let logits = model.vocabulary_logits(&chosen);
    let hits = Vec::<f32>::try_from(logits.argmax(-1, false).eq_tensor(&labels).to_kind(Kind::Float))?;
    let losses = logits.log_softmax(-1, Kind::Float).gather(1, &labels.unsqueeze(1), false).neg().squeeze_dim(1);
    let losses = Vec::<f32>::try_from(losses)?;
    for ((owner, hit), loss) in owners.into_iter().zip(hits).zip(losses) {
        found[owner * 3] += 1.0;
        found[owner * 3 + 1] += hit;
        found[owner * 3 + 2] += loss;
    }
    Ok(found)
}

/// Embeds texts and pairs, and finds the place of each text's own pair.
fn ranks(
    model: &Model,
    rows: &Encoded,
    group: Option<&ProcessGroup>,
    device: Device,
    bf16: bool,
    mut beat: impl FnMut(),
) -> Result<Evaluation, TrainError> {
    let Some(pairs) = &rows.pairs else {
        return Err(TrainError::User("data.sources[].columns.pair: an embedding is measured by pairs of texts".into()));
    };
    let mut all = |texts: &TokenRows| embed(model, texts, group, device, bf16, &mut beat);
    let (texts, pairs) = (all(&rows.ids)?, all(pairs)?);
    let mut found = Vec::with_capacity(rows.len());
    let count = rows.len() as i64;
    for begin in (0..count).step_by(COMPARED as usize) {
        let size = COMPARED.min(count - begin);
        let scores = texts.narrow(0, begin, size).matmul(&pairs.tr());
        let own = Tensor::arange_start(begin, begin + size, (Kind::Int64, device)).unsqueeze(1);
        let own = scores.gather(1, &own, false);
        let before = scores.gt_tensor(&own).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
        found.extend(Vec::<f32>::try_from(before + 1.0)?);
    }
    Ok(Evaluation::Ranks(found))
}

/// Unit vectors [texts, C] by mean pooling, shared among the ranks.
pub fn embed(
    model: &Model,
    texts: &TokenRows,
    group: Option<&ProcessGroup>,
    device: Device,
    bf16: bool,
    mut beat: impl FnMut(),
) -> Result<Tensor, TrainError> {
    let (rank, world) = group.map_or((0, 1), |group| (group.rank(), group.world()));
    let lengths: Vec<usize> = texts.lengths().collect();
    let mut all = Tensor::zeros([texts.len() as i64, model.config().hidden_size], (Kind::Float, device));
    for batch in evaluation_batches(&lengths, BATCH, rank, world) {
        tch::no_grad(|| {
            let _autocast = bf16.then(|| Autocast::bf16(device));
            let texts: Vec<&[u32]> = batch.iter().map(|&row| &texts[row]).collect();
            let (ids, mask) = inputs(&texts, model.config().pad_token_id, device);
            let last = model.last_hidden_state(&ids, mask.as_ref(), false);
            let vectors = model.embedding(&last, mask.as_ref());
            let norm = vectors.square().sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sqrt().clamp_min(1e-12);
            let places: Vec<i64> = batch.iter().map(|&row| row as i64).collect();
            let _ = all.index_copy_(0, &Tensor::from_slice(&places).to_device(device), &(vectors / norm));
        });
        beat();
    }
    if let Some(group) = group {
        group.all_reduce_sum(&all)?;
    }
    Ok(all)
}

/// Outputs [B, L] for the given rows.
pub fn forward(model: &Model, rows: &Encoded, batch: &[usize], device: Device, train: bool) -> Tensor {
    let texts: Vec<&[u32]> = batch.iter().map(|&row| &rows.ids[row]).collect();
    let (ids, mask) = inputs(&texts, model.config().pad_token_id, device);
    model.forward(&ids, mask.as_ref(), train)
}

/// What the monitor compares live traffic with; without predictions of classes it only says how many rows there were.
pub fn reference(labels: &[String], rows: &Encoded, predictions: Option<&Predictions>) -> ClassReference {
    let nothing = Predictions::default();
    let predictions = predictions.unwrap_or(&nothing);
    let mut predicted = vec![0; labels.len()];
    for &label in &predictions.labels {
        predicted[label] += 1;
    }
    let correct = std::iter::zip(&rows.labels, &predictions.labels)
        .filter(|(truth, label)| truth.map(usize::from) == Some(**label))
        .count();
    let mut sorted = predictions.confidences.clone();
    sorted.sort_by(f32::total_cmp);
    // Evenly spaced ranks keep the distribution's shape, both ends included.
    let kept = sorted.len().min(REFERENCE_CONFIDENCES);
    let confidences = (0..kept).map(|i| sorted[i * (sorted.len() - 1) / (kept.max(2) - 1)]).collect();
    ClassReference { labels: labels.to_vec(), predicted, confidences, correct: correct as u64, rows: rows.len() as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_keeps_both_ends() {
        let count = 5000;
        let rows = Encoded { labels: vec![Some(1); count], ..Encoded::blank(count) };
        let confidences = (0..count).rev().map(|i| i as f32 / count as f32).collect();
        let predictions = Predictions { labels: (0..count).map(|i| i % 2).collect(), confidences };
        let reference = reference(&["a".into(), "b".into()], &rows, Some(&predictions));
        assert_eq!((reference.correct, reference.rows, reference.predicted), (2500, 5000, vec![2500, 2500]));
        assert_eq!(reference.confidences.len(), 2048);
        assert_eq!(reference.confidences[0], 0.0);
        assert_eq!(reference.confidences[2047], 0.9998);
        assert!(reference.confidences.is_sorted());
    }
}
