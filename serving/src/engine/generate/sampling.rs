//! From logits to a token.
//!
//! The order is: bias, penalties, constraint, temperature, `min_p`, `top_k`, `top_p`, draw. The draw depends on the seed
//! and on the token's position alone, so a request with a seed gives the same text alone, in a batch and after a
//! preemption.

use std::{borrow::Cow, collections::HashMap};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::constraint::TokenSet;
pub use crate::engine::backend::Logprobs;

/// Largest number of most probable tokens that are reported with a token.
pub const MOST_ALTERNATIVES: usize = 20;

/// How tokens are chosen. The field names are those of the OpenAI API.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 chooses the most probable token.
    pub temperature: f32,
    /// Number of most probable tokens to draw from; 0: all. Among equal logits the lower token id comes first.
    pub top_k: usize,
    /// Draws from the smallest set of most probable tokens whose probabilities sum to at least this, after `top_k`.
    pub top_p: f32,
    /// Leaves out tokens less probable than this share of the most probable one.
    pub min_p: f32,
    /// Divides positive logits, multiplies negative logits of tokens in prompt or answer (Hugging Face's definition);
    /// 1: none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the answer.
    pub presence_penalty: f32,
    /// Subtracted from the logits once for each occurrence in the answer.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    /// Number of most probable tokens to report with each token; absent: no log-probabilities.
    pub logprobs: Option<usize>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// A field of a request that is out of range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct Invalid {
    pub field: &'static str,
    pub message: String,
}

impl Invalid {
    pub(super) fn new(field: &'static str, message: impl Into<String>) -> Self {
        Self { field, message: message.into() }
    }
}

impl Sampling {
    /// Checks every range; `vocabulary` bounds the token ids.
    pub fn check(&self, vocabulary: usize) -> Result<(), Invalid> {
        let within = |field, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Invalid::new(field, format!("{value} is not between {low} and {high}")))
        };
        let positive = |field, value: f32| match value > 0.0 {
            true => Ok(()),
            false => Err(Invalid::new(field, format!("{value} is not greater than 0"))),
        };
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        positive("top_p", self.top_p)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.0, 100.0)?;
        positive("repetition_penalty", self.repetition_penalty)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        for &(token, bias) in &self.logit_bias {
            within("logit_bias", bias, -100.0, 100.0)?;
            if token as usize >= vocabulary {
                return Err(Invalid::new(
                    "logit_bias",
                    format!("token {token}; the vocabulary has {vocabulary} tokens"),
                ));
            }
        }
        if self.logprobs.is_some_and(|count| count > MOST_ALTERNATIVES) {
            return Err(Invalid::new("top_logprobs", "more than 20"));
        }
        Ok(())
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub token: u32,
    pub logprobs: Option<Logprobs>,
}

/// What the next token depends on besides the logits.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    pub prompt: &'a [u32],
    pub answer: &'a [u32],
    /// Tokens that must not come next: end tokens before the minimum length.
    pub forbidden: &'a [u32],
    /// Tokens that may come next; absent: all.
    pub allowed: Option<&'a TokenSet>,
}

/// The logits cannot be sampled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogitsError {
    #[error("the model returned {found} logits instead of {wanted}")]
    Length { found: usize, wanted: usize },
    #[error("the model returned a logit that is not finite, at token {token}")]
    NotFinite { token: usize },
    #[error("every token is forbidden")]
    NothingLeft,
}

/// Chooses the next token from `logits` `[vocabulary]`.
pub fn sample(
    logits: &[f32],
    vocabulary: usize,
    sampling: &Sampling,
    context: Context<'_>,
) -> Result<Sampled, LogitsError> {
    if logits.len() != vocabulary {
        return Err(LogitsError::Length { found: logits.len(), wanted: vocabulary });
    }
    let (mut highest, is_finite) = survey(logits);
    if !is_finite {
        let token = logits.iter().position(|logit| !logit.is_finite()).unwrap_or(0);
        return Err(LogitsError::NotFinite { token });
    }
    let scores = scores(logits, sampling, context);
    if let Cow::Owned(scores) = &scores {
        (highest, _) = survey(scores);
    }
    if highest == f32::NEG_INFINITY {
        return Err(LogitsError::NothingLeft);
    }
    let token = match sampling.temperature > 0.0 {
        true => draw(&scores, highest, sampling, context.prompt.len() + context.answer.len()),
        false => scores.iter().position(|&score| score == highest).unwrap_or(0),
    };
    let logprobs = sampling.logprobs.map(|count| logprobs(logits, token, count));
    Ok(Sampled { token: token as u32, logprobs })
}

/// The highest score, and whether all are finite. Several numbers at a time, which a fold over single ones is not.
fn survey(scores: &[f32]) -> (f32, bool) {
    const LANES: usize = 16;
    let (mut highest, mut nothing) = ([f32::NEG_INFINITY; LANES], [0.0_f32; LANES]);
    let parts = scores.chunks_exact(LANES);
    let rest = parts.remainder();
    for part in parts {
        for lane in 0..LANES {
            highest[lane] = if part[lane] > highest[lane] { part[lane] } else { highest[lane] };
            // NaN for what is not finite.
            nothing[lane] += part[lane] * 0.0;
        }
    }
    let higher = |most: f32, one: f32| if one > most { one } else { most };
    let highest = highest.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, higher);
    (highest, nothing.iter().all(|&nothing| nothing == 0.0) && rest.iter().all(|score| score.is_finite()))
}

/// Logits after bias and penalties; tokens that must not come next are minus infinity.
fn scores<'a>(logits: &'a [f32], sampling: &Sampling, context: Context<'_>) -> Cow<'a, [f32]> {
    if is_plain(sampling) && context.forbidden.is_empty() && context.allowed.is_none() {
        return logits.into();
    }
    let mut scores = logits.to_vec();
    let position = |token: u32| Some(token as usize).filter(|&index| index < logits.len());
    for &(token, bias) in &sampling.logit_bias {
        if let Some(index) = position(token) {
            scores[index] += bias;
        }
    }
    let mut counts: HashMap<u32, u32> = HashMap::new();
    if sampling.repetition_penalty != 1.0 || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0 {
        context.answer.iter().for_each(|&token| *counts.entry(token).or_default() += 1);
    }
    if sampling.repetition_penalty != 1.0 {
        let mut seen = counts.clone();
        context.prompt.iter().for_each(|&token| {
            seen.entry(token).or_default();
        });
        for index in seen.into_keys().filter_map(position) {
            let score = &mut scores[index];
            *score = match *score > 0.0 {
                true => *score / sampling.repetition_penalty,
                false => *score * sampling.repetition_penalty,
            };
        }
    }
    for (token, count) in counts {
        if let Some(index) = position(token) {
            scores[index] -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
        }
    }
    for index in context.forbidden.iter().copied().filter_map(position) {
        scores[index] = f32::NEG_INFINITY;
    }
    if let Some(allowed) = context.allowed {
        let others = scores.iter_mut().enumerate().filter(|(index, _)| !allowed.contains(*index));
        others.for_each(|(_, score)| *score = f32::NEG_INFINITY);
    }
    scores.into()
}

/// Whether nothing is added to the logits.
fn is_plain(sampling: &Sampling) -> bool {
    let penalties = [sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1.0];
    sampling.logit_bias.is_empty() && penalties.iter().all(|&penalty| penalty == 0.0)
}

/// Number of scores whose weights are summed together.
const PART: usize = 64;

/// The weights of a part of the scores, relative to the highest, which has weight 1: a sum cannot overflow, and `min_p` is a
/// comparison. Zeros behind the last.
fn weigh(part: &[f32], highest: f32, inverse: f32) -> [f32; PART] {
    let mut weights = [0.0; PART];
    std::iter::zip(&mut weights, part).for_each(|(weight, score)| *weight = exponential((score - highest) * inverse));
    weights
}

/// The sum of a part's weights. It is at least as large as each of them.
fn sum(weights: &[f32; PART]) -> f64 {
    let mut lanes = [0.0_f32; 8];
    for weights in weights.chunks_exact(8) {
        std::iter::zip(&mut lanes, weights).for_each(|(lane, weight)| *lane += weight);
    }
    lanes.iter().copied().map(f64::from).sum()
}

/// Draws from the softmax of the scores over the temperature, cut by `min_p`, `top_k` and `top_p`. `highest` is the
/// highest score.
fn draw(scores: &[f32], highest: f32, sampling: &Sampling, position: usize) -> usize {
    // Finite also for the smallest temperature, since infinity times 0 is no weight.
    let inverse = (1.0 / sampling.temperature).min(f32::MAX);
    let number = uniform(sampling.seed, position);
    let part = |index: usize| weigh(&scores[index * PART..scores.len().min((index + 1) * PART)], highest, inverse);
    let sums: Vec<f64> = (0..scores.len().div_ceil(PART)).map(|index| sum(&part(index))).collect();
    if sampling.top_k == 0 && sampling.top_p == 1.0 && sampling.min_p == 0.0 {
        return pick(&sums, part, number);
    }
    let sum: f64 = sums.iter().sum();
    // With `top_p` alone, all tokens that are lighter than this together weigh less than what it leaves out.
    let is_alone = sampling.top_k == 0 && sampling.min_p == 0.0;
    let light = (1.0 - f64::from(sampling.top_p)) * sum / scores.len() as f64;
    let least = if is_alone { light } else { f64::from(sampling.min_p) };
    let order = |a: &(usize, f64), b: &(usize, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut kept = heaviest(&sums, part, least, sampling.top_k, order);
    if sampling.top_p < 1.0 {
        let whole = match is_alone {
            true => sum,
            false => kept.iter().map(|(_, weight)| weight).sum::<f64>(),
        };
        if let Some(last) = last_of(kept.clone(), f64::from(sampling.top_p) * whole, order) {
            kept.retain(|one| order(one, &last).is_le());
        }
    }
    // Sorted by id, so that the draw does not depend on how the set was found; without `top_k` it is already.
    kept.sort_unstable_by_key(|&(index, _)| index);
    let sum: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let mut left = number * sum;
    for &(index, weight) in &kept {
        left -= weight;
        if left < 0.0 {
            return index;
        }
    }
    // Rounding may leave a remainder after the last.
    kept.last().map_or(0, |&(index, _)| index)
}

/// The tokens that weigh at least `least` and more than nothing, and of them the first `count` in the order; all if it is 0.
/// `part(i)` are the weights whose sum is `sums[i]`.
fn heaviest(
    sums: &[f64],
    part: impl Fn(usize) -> [f32; PART],
    mut least: f64,
    count: usize,
    order: impl Fn(&(usize, f64), &(usize, f64)) -> std::cmp::Ordering + Copy,
) -> Vec<(usize, f64)> {
    let mut kept: Vec<(usize, f64)> = Vec::new();
    for index in (0..sums.len()).filter(|&index| sums[index] > 0.0) {
        // A part that weighs less than the lightest token that is kept has none.
        if sums[index] < least {
            continue;
        }
        let weights = part(index).map(f64::from).into_iter().enumerate();
        let heavy = weights.filter(|(_, weight)| *weight > 0.0 && *weight >= least);
        kept.extend(heavy.map(|(place, weight)| (index * PART + place, weight)));
        if count > 0 && kept.len() > 2 * count + PART {
            kept.select_nth_unstable_by(count - 1, order);
            kept.truncate(count);
            least = least.max(kept[count - 1].1);
        }
    }
    if (1..kept.len()).contains(&count) {
        kept.select_nth_unstable_by(count - 1, order);
        kept.truncate(count);
    }
    kept
}

/// The last of the first tokens in the order that weigh `enough` together; none if all weigh less. Halves what is left until
/// few are, since sorting all takes longer than all the rest.
fn last_of(
    mut kept: Vec<(usize, f64)>,
    enough: f64,
    order: impl Fn(&(usize, f64), &(usize, f64)) -> std::cmp::Ordering + Copy,
) -> Option<(usize, f64)> {
    const FEW: usize = 64;
    let (mut left, mut sum) = (kept.as_mut_slice(), 0.0);
    let mut last = None;
    while left.len() > FEW {
        let middle = left.len() / 2;
        let (first, one, _) = left.select_nth_unstable_by(middle, order);
        let heavier = first.iter().map(|(_, weight)| weight).sum::<f64>() + one.1;
        if sum + heavier >= enough {
            last = Some(*one);
            left = &mut left[..middle];
        } else {
            sum += heavier;
            left = &mut left[middle + 1..];
        }
    }
    left.sort_unstable_by(order);
    let found = left.iter().find(|(_, weight)| {
        sum += weight;
        sum >= enough
    });
    found.copied().or(last)
}

/// The index at which the running sum of the weights passes `number` of the whole, 0 <= number < 1. `part(i)` are the
/// weights whose sum is `sums[i]`.
fn pick(sums: &[f64], part: impl Fn(usize) -> [f32; PART], number: f64) -> usize {
    let mut left = number * sums.iter().sum::<f64>();
    let last = sums.iter().rposition(|&sum| sum > 0.0).unwrap_or(0);
    // Rounding may leave a remainder after the last.
    let found = sums[..last].iter().position(|&sum| {
        let is_here = left < sum;
        left -= if is_here { 0.0 } else { sum };
        is_here
    });
    let index = found.unwrap_or(last);
    let mut chosen = 0;
    for (place, &weight) in part(index).iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        chosen = place;
        left -= f64::from(weight);
        if left < 0.0 {
            break;
        }
    }
    index * PART + chosen
}

/// e^x for x <= 0 with a relative error below 2^-21; 0 for x below -87. Arithmetic that the compiler does for several
/// numbers at a time, which `f32::exp` is not.
fn exponential(x: f32) -> f32 {
    let clamped = if x > -87.0 { x } else { -87.0 };
    // 1.5 * 2^23: adding it rounds to a whole number, which the low bits then hold.
    let shifted = clamped * std::f32::consts::LOG2_E + 12_582_912.0;
    let whole = shifted - 12_582_912.0;
    let r = (clamped - whole * 0.693_359_4) - whole * -2.121_944_4e-4;
    let p = r * 1.987_569_1e-4 + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    let scaled = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits().wrapping_sub(0x4b40_0000) << 23));
    if x > -87.0 { scaled } else { 0.0 }
}

/// A number in [0, 1) that depends on the arguments alone.
fn uniform(seed: u64, position: usize) -> f64 {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(position as u64);
    generator.random()
}

/// Log-probability of a token and of the `count` most probable ones by `logits` `[vocabulary]`.
pub fn logprobs(logits: &[f32], token: usize, count: usize) -> Logprobs {
    let (highest, _) = survey(logits);
    let sum: f64 = logits.chunks(PART).map(|part| sum(&weigh(part, highest, 1.0))).sum();
    let logprob = |index: usize| (f64::from(logits[index] - highest) - sum.ln()) as f32;
    let mut indices: Vec<usize> = (0..logits.len()).collect();
    let order = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if (1..indices.len()).contains(&count) {
        indices.select_nth_unstable_by(count - 1, order);
    }
    indices.truncate(count);
    indices.sort_unstable_by(order);
    let top = indices.into_iter().map(|index| (index as u32, logprob(index))).collect();
    Logprobs { chosen: logprob(token), top }
}

#[cfg(test)]
#[path = "sampling_tests.rs"]
mod tests;
