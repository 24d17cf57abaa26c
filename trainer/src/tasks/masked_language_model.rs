//! `MaskedLanguageModel`: the tokens that were masked.

use athanor_contract::train::{self, MaskedLanguageModelTerm, Metric, ObjectiveTerm, WeightedTerm};
use athanor_models::{self as models, Model, tokenizer::MaskTokens};
use tch::{Kind, Tensor};

use super::{
    masking::Masked,
    task::{Rows, Task},
};
use crate::{
    TrainError,
    data::{Batch, Columns, Encoded, Part},
    evaluate::{evaluation::Results, measuring::Measuring},
    network::ModelRef,
};

/// Share of the tokens that the model has to predict when it is measured, and the seed of their choice.
const MASKED: f64 = 0.15;
const MASK_SEED: u64 = 0x6d61_736b;

pub struct MaskedLanguageModel;

impl Task for MaskedLanguageModel {
    fn kind(&self) -> train::Task {
        train::Task::MaskedLanguageModel
    }

    fn outputs_are_tokens(&self) -> bool {
        true
    }

    fn head(&self, _labels: &[String]) -> Option<models::Task> {
        Some(models::Task::MaskedLanguageModel)
    }

    fn accepts_teacher(&self, head: &models::Task) -> bool {
        *head == models::Task::MaskedLanguageModel
    }

    fn encode(&self, rows: &Rows) -> Result<Encoded, TrainError> {
        rows.with(Maskable(rows.tokenizer.encoder()?.mask_tokens()))
    }

    /// Logits over the vocabulary of the masked tokens, [N, V].
    fn outputs(&self, model: &Model, batch: &Batch, last: &Tensor, _train: bool) -> Tensor {
        let tokens = last.reshape([-1, last.size()[2]]);
        let masked = batch.places.as_ref().map_or(tokens.shallow_clone(), |places| tokens.index_select(0, places));
        model.vocabulary_logits(&masked)
    }
}

/// The tokens that masking requires; absent where the tokenizer has no mask token.
#[derive(Clone, Debug)]
pub struct Maskable(pub Option<MaskTokens>);

impl Maskable {
    fn tokens(&self) -> Result<&MaskTokens, TrainError> {
        self.0
            .as_ref()
            .ok_or_else(|| TrainError::User("model.from: its tokenizer has no mask token, which the task needs".into()))
    }
}

impl Columns for Maskable {
    fn select(&mut self, _rows: &[usize]) {}

    fn extend(&mut self, _count: usize) {}

    fn collate(&self, part: &Part, terms: &[WeightedTerm], pad_id: i64) -> Result<Batch, TrainError> {
        let probability = terms.iter().find_map(|term| match term.term {
            ObjectiveTerm::MaskedLanguageModel(term) => Some(term.probability),
            _ => None,
        });
        let probability = probability.unwrap_or_else(|| MaskedLanguageModelTerm::default().probability);
        let masked = |rows: &[usize]| -> Result<Masked, TrainError> {
            Ok(Masked::new(&part.train.ids, rows, self.tokens()?, probability, part.seed))
        };
        let own = masked(part.rows)?;
        let targets = match part.rows.len() == part.batch.len() {
            true => own.count(),
            // Every rank counts the whole batch: masks follow from seed, step and row.
            false => masked(part.batch)?.count(),
        };
        let texts: Vec<&[u32]> = own.ids.iter().map(Vec::as_slice).collect();
        Ok(Batch {
            places: Some(own.places().to_device(part.device)),
            targets: own.labels().to_device(part.device),
            rows_per_target: part.batch.len() as f64 / targets.max(1) as f64,
            ..Batch::of_texts(&texts, pad_id, part.device)
        })
    }

    fn evaluate(
        &self,
        rows: &Encoded,
        model: ModelRef,
        measuring: &mut Measuring,
    ) -> Result<Box<dyn Results>, TrainError> {
        let model = model.encoder()?;
        let (pad_id, device, tokens) = (model.config().pad_token_id, measuring.device, self.tokens()?);
        let found = measuring.rows(&rows.lengths(), 3, |batch| {
            let masked = Masked::new(&rows.ids, batch, tokens, MASKED, MASK_SEED);
            let mut found = vec![0_f32; batch.len() * 3];
            if masked.count() == 0 {
                return Ok(found);
            }
            let texts: Vec<&[u32]> = masked.ids.iter().map(Vec::as_slice).collect();
            let inputs =
                Batch { places: Some(masked.places().to_device(device)), ..Batch::of_texts(&texts, pad_id, device) };
            let last = model.last_hidden_state(&inputs.ids, inputs.mask.as_ref(), false);
            let logits = MaskedLanguageModel.outputs(model, &inputs, &last, false);
            let labels = masked.labels().to_device(device);
            let hits = Vec::<f32>::try_from(logits.argmax(-1, false).eq_tensor(&labels).to_kind(Kind::Float))?;
            let losses = logits.log_softmax(-1, Kind::Float).gather(1, &labels.unsqueeze(1), false).neg();
            let losses = Vec::<f32>::try_from(losses.squeeze_dim(1))?;
            for ((owner, hit), loss) in masked.owners().zip(hits).zip(losses) {
                found[owner * 3] += 1.0;
                found[owner * 3 + 1] += hit;
                found[owner * 3 + 2] += loss;
            }
            Ok(found)
        })?;
        Ok(Box::new(Tokens(found.chunks(3).map(|row| [row[0], row[1], row[2]]).collect())))
    }
}

/// The number of masked tokens of each row, how many were predicted correctly, and the sum of their cross entropies.
#[derive(Debug)]
struct Tokens(Vec<[f32; 3]>);

impl Tokens {
    fn sums(&self, rows: &[usize]) -> [f64; 3] {
        [0, 1, 2].map(|part| rows.iter().map(|&row| f64::from(self.0[row][part])).sum())
    }
}

impl Results for Tokens {
    fn metric(&self, metric: Metric, rows: &[usize]) -> Option<f64> {
        let [count, hits, _] = self.sums(rows);
        (metric == Metric::Accuracy && count > 0.0).then(|| hits / count)
    }

    fn score(&self, rows: &[usize]) -> (&'static str, f64) {
        let [count, _, loss] = self.sums(rows);
        ("negativeCrossEntropy", -loss / count.max(1.0))
    }

    fn reported(&self, rows: &[usize]) -> Option<(&'static str, f64)> {
        Some(("crossEntropy", -self.score(rows).1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluate::Evaluation;

    #[test]
    fn tokens_count_and_not_rows() {
        let tokens = Tokens(vec![[2.0, 1.0, 3.0], [2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [4.0, 1.0, 4.0]]);
        let found = Evaluation { sources: vec![0, 0, 1, 1], results: Box::new(tokens) };
        let report = found.report(&["a".to_owned(), "b".to_owned()]);
        assert_eq!((report["accuracy"], report["crossEntropy"], report["a/accuracy"]), (0.5, 1.0, 0.75));
    }
}
