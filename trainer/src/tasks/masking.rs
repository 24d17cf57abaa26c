//! Which tokens of a text a masked language model has to predict (Devlin et al. 2019): a function of seed, step and row
//! alone, so that every rank can count those of the whole batch.

use athanor_models::tokenizer::{MaskTokens, TokenRows};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tch::Tensor;

use crate::data::batches::mix;

/// The rows of a forward pass with some tokens hidden.
pub struct Masked {
    /// What the model reads instead.
    pub ids: Vec<Vec<u32>>,
    /// Row, place and true id of each token to predict.
    chosen: Vec<(usize, usize, u32)>,
    longest: usize,
}

impl Masked {
    /// Masks some rows of `ids`.
    pub fn new(ids: &TokenRows, rows: &[usize], tokens: &MaskTokens, probability: f64, seed: u64) -> Self {
        let mut chosen = Vec::new();
        let mut hidden = Vec::with_capacity(rows.len());
        for (index, &row) in rows.iter().enumerate() {
            let (masked, places) = mask_row(&ids[row], tokens, probability, mix(seed, row as u64));
            chosen.extend(places.into_iter().map(|place| (index, place, ids[row][place])));
            hidden.push(masked);
        }
        let longest = hidden.iter().map(Vec::len).max().unwrap_or(0);
        Self { ids: hidden, chosen, longest }
    }

    /// Tokens to predict.
    pub fn count(&self) -> usize {
        self.chosen.len()
    }

    /// Row, among those of the pass, of each token to predict.
    pub fn owners(&self) -> impl Iterator<Item = usize> {
        self.chosen.iter().map(|(row, ..)| *row)
    }

    /// Place of each token to predict among the pass's B * T tokens, [N].
    pub fn places(&self) -> Tensor {
        let flat: Vec<i64> = self.chosen.iter().map(|(row, place, _)| (row * self.longest + place) as i64).collect();
        Tensor::from_slice(&flat)
    }

    /// True ids of the tokens to predict, [N].
    pub fn labels(&self) -> Tensor {
        let labels: Vec<i64> = self.chosen.iter().map(|(_, _, id)| i64::from(*id)).collect();
        Tensor::from_slice(&labels)
    }
}

/// A text with some tokens hidden, and their places: at least one, where there is a token that is not special.
pub fn mask_row(ids: &[u32], tokens: &MaskTokens, probability: f64, seed: u64) -> (Vec<u32>, Vec<usize>) {
    let mut random = StdRng::seed_from_u64(seed);
    let usual: Vec<usize> = (0..ids.len()).filter(|&place| !tokens.special.contains(&ids[place])).collect();
    let mut places: Vec<usize> = usual.iter().copied().filter(|_| random.random_bool(probability)).collect();
    if places.is_empty() && !usual.is_empty() {
        places.push(usual[random.random_range(0..usual.len())]);
    }
    let mut masked = ids.to_vec();
    for &place in &places {
        match random.random_range(0..10) {
            0..8 => masked[place] = tokens.mask,
            8 => masked[place] = random.random_range(0..tokens.vocabulary),
            _ => {}
        }
    }
    (masked, places)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_those_of_the_paper_and_special_tokens_stay() {
        let tokens = MaskTokens { mask: 103, vocabulary: 30_000, special: [101, 102, 0].into() };
        let ids: Vec<u32> = std::iter::once(101).chain((0..50_000).map(|i| 1000 + i % 20_000)).chain([102]).collect();
        let (masked, places) = mask_row(&ids, &tokens, 0.15, 7);
        assert_eq!(mask_row(&ids, &tokens, 0.15, 7), (masked.clone(), places.clone()));
        assert_ne!(mask_row(&ids, &tokens, 0.15, 8).1, places);
        let share = |count: usize, of: usize| count as f64 / of as f64;
        assert!((share(places.len(), ids.len()) - 0.15).abs() < 0.01);
        let count = |which: &dyn Fn(usize) -> bool| places.iter().filter(|&&place| which(place)).count();
        let hidden = count(&|place| masked[place] == 103);
        let kept = count(&|place| masked[place] == ids[place]);
        assert!((share(hidden, places.len()) - 0.8).abs() < 0.02);
        assert!((share(kept, places.len()) - 0.1).abs() < 0.02);
        assert_eq!((masked[0], masked[50_001]), (101, 102));
        let changed = (0..ids.len()).filter(|&place| masked[place] != ids[place]);
        assert!(changed.into_iter().all(|place| places.contains(&place)));
        assert_eq!(mask_row(&[101, 5, 102], &tokens, 0.01, 1).1, [1], "there is always one");
        assert!(mask_row(&[101, 102], &tokens, 0.9, 1).1.is_empty());
    }
}
