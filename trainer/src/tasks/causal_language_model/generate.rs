//! Greedy answers of a decoder to many prompts, over a cache of keys and values.

use athanor_models::{Batch, CachedRow, CausalLanguageModel, KvCache};
use tch::{Device, Kind};

use crate::{TrainError, evaluate::measuring::Measuring};

/// Prompts that are answered at the same time.
const TOGETHER: usize = 16;

/// Where an answer ends.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    pub max_new_tokens: usize,
    /// Tokens of prompt and answer together that the model reads.
    pub max_length: usize,
    /// Tokens that end an answer; they are a part of it.
    pub stop_tokens: &'a [u32],
}

/// An answer as tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generated {
    pub ids: Vec<u32>,
    /// Sum of the natural logarithms of the tokens' probabilities.
    pub log_probability: f64,
}

/// The answers to all prompts; the ranks share the work and all get every answer.
///
/// # Errors
/// libtorch has no memory for the cache.
pub fn shared(
    model: &CausalLanguageModel,
    prompts: &[&[u32]],
    limits: &Limits,
    measuring: &mut Measuring,
) -> Result<Vec<Generated>, TrainError> {
    // Prompts of like length are answered together.
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&prompt| std::cmp::Reverse(prompts[prompt].len()));
    // The number of tokens of each prompt, the logarithm, and the tokens. Ids are exact in FP32 below 2^24.
    let width = limits.max_new_tokens + 2;
    let mut found = vec![0_f32; prompts.len() * width];
    let (rank, world, device) = (measuring.rank(), measuring.world(), measuring.device);
    for together in order.chunks(TOGETHER).skip(rank).step_by(world) {
        let some: Vec<&[u32]> = together.iter().map(|&prompt| prompts[prompt]).collect();
        let answers = tch::no_grad(|| greedy(model, &some, limits, device, &mut *measuring.beat))?;
        for (&prompt, answer) in together.iter().zip(answers) {
            let place = &mut found[prompt * width..][..width];
            place[0] = answer.ids.len() as f32;
            place[1] = answer.log_probability as f32;
            place[2..].iter_mut().zip(&answer.ids).for_each(|(place, &id)| *place = id as f32);
        }
    }
    let found = measuring.sum(found)?;
    let answer = |place: &[f32]| Generated {
        ids: place[2..][..place[0] as usize].iter().map(|&id| id as u32).collect(),
        log_probability: f64::from(place[1]),
    };
    Ok(found.chunks(width).map(answer).collect())
}

/// The most probable next token, again and again, for each prompt until it ends.
fn greedy(
    model: &CausalLanguageModel,
    prompts: &[&[u32]],
    limits: &Limits,
    device: Device,
    beat: &mut dyn FnMut(),
) -> Result<Vec<Generated>, TrainError> {
    let room: Vec<usize> = prompts
        .iter()
        .map(|prompt| limits.max_new_tokens.min(limits.max_length.saturating_sub(prompt.len())))
        .collect();
    // Each row has slots of its own, one behind the other.
    let mut slots: Vec<Vec<i64>> = Vec::with_capacity(prompts.len());
    let mut used = 0;
    for (prompt, room) in prompts.iter().zip(&room) {
        let end = used + (prompt.len() + room) as i64;
        slots.push((used..end).collect());
        used = end;
    }
    let kind = model.parameters().first().map_or(Kind::Float, |(_, tensor)| tensor.kind());
    let mut cache = KvCache::new(model.cache_shape(), used, kind, device);
    let mut sequences: Vec<Vec<i64>> =
        prompts.iter().map(|prompt| prompt.iter().map(|&id| i64::from(id)).collect()).collect();
    let mut stored = vec![0; prompts.len()];
    let mut answers = vec![Generated::default(); prompts.len()];
    let mut open: Vec<usize> = (0..prompts.len()).filter(|&row| room[row] > 0 && !prompts[row].is_empty()).collect();
    while !open.is_empty() {
        let rows: Vec<CachedRow> = open
            .iter()
            .map(|&row| CachedRow { new: &sequences[row][stored[row]..], slots: &slots[row][..sequences[row].len()] })
            .collect();
        let batch = Batch::cached(&rows, device);
        let hidden = model.forward(&batch, Some(&mut cache), false);
        let logits = model.logits(&hidden.index_select(0, &batch.last_rows()));
        let (best, ids) = logits.log_softmax(-1, Kind::Float).max_dim(-1, false);
        let (best, ids) = (Vec::<f32>::try_from(best)?, Vec::<i64>::try_from(ids.to_device(Device::Cpu))?);
        for ((&row, best), id) in open.iter().zip(best).zip(ids) {
            stored[row] = sequences[row].len();
            sequences[row].push(id);
            answers[row].ids.push(id as u32);
            answers[row].log_probability += f64::from(best);
        }
        let has_ended = |row: usize| {
            let ids = &answers[row].ids;
            ids.len() >= room[row] || ids.last().is_some_and(|id| limits.stop_tokens.contains(id))
        };
        open.retain(|&row| !has_ended(row));
        beat();
    }
    Ok(answers)
}

/// The tokens of an answer without those that end it.
pub fn without_end<'i>(ids: &'i [u32], stop_tokens: &[u32]) -> &'i [u32] {
    match ids.split_last() {
        Some((last, rest)) if stop_tokens.contains(last) => rest,
        _ => ids,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_that_ends_an_answer_is_no_part_of_its_text() {
        assert_eq!(without_end(&[5, 6, 2], &[1, 2]), [5, 6]);
        assert_eq!(without_end(&[5, 6], &[1, 2]), [5, 6]);
        assert_eq!(without_end(&[], &[1]), [0_u32; 0]);
    }
}
