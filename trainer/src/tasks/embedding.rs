//! `Embedding`: one vector for each text, by mean pooling, trained and measured by pairs of texts.

use std::collections::HashMap;

use athanor_contract::train::{self, Metric, WeightedTerm};
use athanor_models::{self as models, Model, tokenizer::TokenRows};
use tch::{Kind, Tensor};

use super::task::{Rows, Task};
use crate::{
    TrainError,
    data::{Batch, Columns, Dataset, Encoded, Part},
    evaluate::{evaluation::Results, measuring::Measuring},
    network::ModelRef,
};

/// Texts that are compared with all candidates at once.
const COMPARED: usize = 512;
/// Most second texts that a text's own one is ranked among; of more rows they are evenly spread.
const CANDIDATES: usize = 100_000;
/// Cosines that differ by no more than this are equal: rounding of unit vectors in FP32 is about a tenth of it.
const EQUAL: f64 = 1e-6;

pub struct Embedding;

impl Task for Embedding {
    fn kind(&self) -> train::Task {
        train::Task::Embedding
    }

    fn outputs_are_vectors(&self) -> bool {
        true
    }

    fn reads_every_token(&self) -> bool {
        true
    }

    fn head(&self, _labels: &[String]) -> Option<models::Task> {
        Some(models::Task::Embedding)
    }

    /// Any encoder has vectors, whatever its head is for.
    fn accepts_teacher(&self, _head: &models::Task) -> bool {
        true
    }

    fn encode(&self, rows: &Rows) -> Result<Encoded, TrainError> {
        let second: Result<Vec<&str>, TrainError> = rows.rows.iter().map(|&row| pair(rows.dataset, row)).collect();
        let second = second?;
        let second = rows.tokens(|| second.iter().copied())?;
        rows.with(SecondTexts(second))
    }

    fn outputs(&self, model: &Model, batch: &Batch, last: &Tensor, _train: bool) -> Tensor {
        model.embedding(last, batch.mask.as_ref())
    }
}

/// The second text of each row.
#[derive(Debug)]
pub struct SecondTexts(pub TokenRows);

impl Columns for SecondTexts {
    fn select(&mut self, rows: &[usize]) {
        self.0 = self.0.select(rows);
    }

    fn extend(&mut self, count: usize) {
        (0..count).for_each(|_| self.0.push(&[]));
    }

    fn second_texts(&self) -> Option<&TokenRows> {
        Some(&self.0)
    }

    fn collate(&self, part: &Part, _terms: &[WeightedTerm], pad_id: i64) -> Result<Batch, TrainError> {
        Ok(part.texts(pad_id))
    }

    /// Blocks of rows are dealt to the ranks.
    fn evaluate(
        &self,
        rows: &Encoded,
        model: ModelRef,
        measuring: &mut Measuring,
    ) -> Result<Box<dyn Results>, TrainError> {
        let model = model.encoder()?;
        let (texts, second) = (measuring.embed(model, &rows.ids)?, measuring.embed(model, &self.0)?);
        let same = same_texts(&self.0);
        let candidates = candidates(rows.len(), CANDIDATES);
        let mut found = vec![0_f32; rows.len()];
        let (rank, world) = (measuring.rank(), measuring.world());
        for begin in (0..rows.len()).step_by(COMPARED).skip(rank).step_by(world) {
            let block = begin..rows.len().min(begin + COMPARED);
            let places = ranks(&texts, &second, &same, block.clone(), &candidates)?;
            found[block].copy_from_slice(&places);
            (measuring.beat)();
        }
        let ranks = measuring.sum(found)?;
        Ok(Box::new(Ranks { ranks, candidates: candidates.len() }))
    }
}

fn pair(dataset: &Dataset, row: usize) -> Result<&str, TrainError> {
    dataset.rows.pair(row).ok_or_else(|| {
        TrainError::User(format!(
            "{}: there is no second text; data.sources[].columns.pair names its column, which Embedding needs",
            dataset.rows.place(row)
        ))
    })
}

/// The first row with the same second text, for each row.
fn same_texts(second: &TokenRows) -> Vec<i64> {
    let mut first: HashMap<&[u32], i64> = HashMap::new();
    (0..).zip(second.iter()).map(|(row, ids)| *first.entry(ids).or_insert(row)).collect()
}

/// Rows whose second texts are candidates: all, or `most` of them, evenly spread.
fn candidates(rows: usize, most: usize) -> Vec<i64> {
    let count = rows.min(most);
    (0..count).map(|index| (index * rows / count) as i64).collect()
}

/// The rank of the own second text of each row of `block` among the candidates, from 1, by cosine. `texts` and `second`
/// [rows, C] are unit vectors, `same` [rows] is equal where second texts are the same: those are no competitors. Of
/// equal cosines half are ahead, so that vectors which have collapsed to one point rank in the middle; a row whose own
/// cosine is not finite ranks last.
fn ranks(
    texts: &Tensor,
    second: &Tensor,
    same: &[i64],
    block: std::ops::Range<usize>,
    candidates: &[i64],
) -> Result<Vec<f32>, TrainError> {
    let device = texts.device();
    let (begin, size) = (block.start as i64, block.len() as i64);
    let texts = texts.narrow(0, begin, size);
    let own = (&texts * second.narrow(0, begin, size)).sum_dim_intlist([1_i64].as_slice(), true, Kind::Float);
    let chosen = Tensor::from_slice(candidates).to_device(device);
    let same = Tensor::from_slice(same).to_device(device);
    let competes = same.index_select(0, &chosen).unsqueeze(0).ne_tensor(&same.narrow(0, begin, size).unsqueeze(1));
    let ahead = texts.matmul(&second.index_select(0, &chosen).tr()) - &own;
    let count = |which: Tensor| (which.logical_and(&competes)).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
    let (greater, equal) = (count(ahead.gt(EQUAL)), count(ahead.abs().le(EQUAL)));
    let last = Tensor::full_like(&greater, candidates.len() as f64 + 1.0);
    let ranks = (greater + equal / 2.0 + 1.0).where_self(&own.squeeze_dim(1).isfinite(), &last);
    Ok(Vec::<f32>::try_from(ranks)?)
}

/// The rank of each row's own second text among the candidates, from 1.
#[derive(Debug)]
struct Ranks {
    ranks: Vec<f32>,
    candidates: usize,
}

impl Ranks {
    fn reciprocal(&self, rows: &[usize]) -> f64 {
        rows.iter().map(|&row| 1.0 / f64::from(self.ranks[row])).sum::<f64>() / rows.len().max(1) as f64
    }
}

impl Results for Ranks {
    fn metric(&self, metric: Metric, rows: &[usize]) -> Option<f64> {
        let hits = || rows.iter().filter(|&&row| self.ranks[row] <= 1.0).count();
        (metric == Metric::Accuracy).then(|| hits() as f64 / rows.len() as f64)
    }

    fn score(&self, rows: &[usize]) -> (&'static str, f64) {
        ("meanReciprocalRank", self.reciprocal(rows))
    }

    fn reported(&self, rows: &[usize]) -> Option<(&'static str, f64)> {
        Some(("meanReciprocalRank", self.reciprocal(rows)))
    }

    fn limit(&self) -> Option<(&'static str, String)> {
        (self.candidates < self.ranks.len()).then(|| ("rankedAmong", self.candidates.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::evaluate::Evaluation;

    fn unit(rows: &[[f32; 2]]) -> Tensor {
        let x = Tensor::from_slice(&rows.concat()).view([-1, 2]);
        let norm = x.square().sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sqrt();
        x / norm.clamp_min(1e-12)
    }

    fn ranked(texts: &Tensor, second: &Tensor, same: &[i64]) -> Vec<f32> {
        let all: Vec<i64> = (0..same.len() as i64).collect();
        ranks(texts, second, same, 0..same.len(), &all).unwrap()
    }

    #[test]
    fn nearer_texts_are_ahead_and_ties_are_halved() {
        let x = unit(&[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]);
        assert_eq!(ranked(&x, &x, &[0, 1, 2]), [1.0, 1.0, 1.0]);
        // The first text's own second text is the farthest but one.
        let second = unit(&[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]);
        assert_eq!(ranked(&x, &second, &[0, 1, 2]), [3.0, 3.0, 1.0]);
        // All vectors are the same: the own text is in the middle of all, and no hit.
        let collapsed = unit(&[[1.0, 2.0]; 5]);
        assert_eq!(ranked(&collapsed, &collapsed, &[0, 1, 2, 3, 4]), [3.0; 5]);
        let noise = &collapsed + Tensor::from_slice(&[0.0_f32, 6e-8, -6e-8, 0.0, 6e-8]).unsqueeze(1);
        assert_eq!(ranked(&noise, &noise, &[0, 1, 2, 3, 4]), [3.0; 5], "rounding decides nothing");
    }

    #[test]
    fn the_same_second_text_is_no_competitor() {
        let x = unit(&[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]);
        let second = unit(&[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]);
        assert_eq!(ranked(&x, &second, &[0, 0, 2]), [1.0, 1.0, 1.0]);
        assert_eq!(ranked(&x, &second, &[0, 1, 2]), [1.5, 1.5, 1.0]);
        let rows: TokenRows = [[7_u32, 8].as_slice(), &[9], &[7, 8]].into_iter().collect();
        assert_eq!(same_texts(&rows), [0, 1, 0]);
    }

    #[test]
    fn vectors_that_are_not_finite_rank_last() {
        let x = Tensor::full([4, 2], f64::NAN, (Kind::Float, Device::Cpu));
        let found = ranked(&x, &x, &[0, 1, 2, 3]);
        assert_eq!(found, [5.0; 4]);
        let results = Ranks { ranks: found, candidates: 4 };
        assert_eq!(results.metric(Metric::Accuracy, &[0, 1, 2, 3]), Some(0.0));
        assert_eq!(results.score(&[0, 1, 2, 3]), ("meanReciprocalRank", 0.2));
        // One broken vector is behind the others, and spoils none of them.
        let some = unit(&[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]);
        let _ = some.get(1).fill_(f64::NAN);
        assert_eq!(ranked(&some, &some, &[0, 1, 2]), [1.0, 4.0, 1.0]);
    }

    #[test]
    fn candidates_are_limited_and_the_limit_is_reported() {
        assert_eq!(candidates(4, 9), [0, 1, 2, 3]);
        assert_eq!(candidates(10, 4), [0, 2, 5, 7]);
        assert!(candidates(0, 4).is_empty());
        let x = unit(&[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]);
        assert_eq!(ranks(&x, &x, &[0, 1, 2], 1..3, &[0]).unwrap(), [1.0, 1.0], "the own text is always ranked");
        let limited = Ranks { ranks: vec![1.0; 3], candidates: 1 };
        assert_eq!(limited.limit(), Some(("rankedAmong", "1".to_owned())));
        assert_eq!(Ranks { candidates: 3, ..limited }.limit(), None);
    }

    #[test]
    fn ranks_are_hits_and_reciprocals() {
        let results = Ranks { ranks: vec![1.0, 2.0, 1.0, 4.0], candidates: 4 };
        let found = Evaluation { sources: vec![0, 0, 1, 1], results: Box::new(results) };
        let report = found.report(&["a".to_owned(), "b".to_owned()]);
        assert_eq!((report["accuracy"], report["meanReciprocalRank"]), (0.5, 2.75 / 4.0));
    }
}
