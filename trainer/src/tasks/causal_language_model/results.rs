//! Metrics of a language model: on predicted tokens, and on generated answers.

use std::collections::HashMap;

use athanor_contract::{artifact::TextReference, train::Metric};
use athanor_models::DecoderTokenizer;

use super::generate::{Generated, without_end};
use crate::evaluate::evaluation::{GeneratedAnswer, Results};

/// The question and the expected answer of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub prompt: Vec<u32>,
    /// Text before the answer, for the report.
    pub text: String,
    pub expected: String,
}

/// Answers that the reference keeps as the baseline of drift detection.
const REFERENCE_ANSWERS: usize = 2048;

/// The number of targets of each row, how many of them were predicted, and the sum of their cross entropies; and the
/// answers that were generated.
#[derive(Debug)]
pub struct Tokens {
    rows: Vec<[f32; 3]>,
    answers: Vec<GeneratedAnswer>,
    /// Index in `answers` by row.
    places: HashMap<usize, usize>,
}

impl Tokens {
    pub fn new(rows: Vec<[f32; 3]>) -> Self {
        Self { rows, answers: Vec::new(), places: HashMap::new() }
    }

    /// Adds the answers to the questions of some rows.
    pub fn answer(
        &mut self,
        rows: &[usize],
        questions: &[&Question],
        generated: &[Generated],
        tokenizer: &DecoderTokenizer,
    ) {
        for ((&row, question), generated) in rows.iter().zip(questions).zip(generated) {
            let text = tokenizer.decode(without_end(&generated.ids, tokenizer.stop_tokens()));
            self.places.insert(row, self.answers.len());
            self.answers.push(GeneratedAnswer {
                row,
                question: question.text.clone(),
                expected: question.expected.clone(),
                exact: text.trim() == question.expected.trim(),
                token_f1: token_f1(&text, &question.expected),
                text,
                tokens: generated.ids.len(),
                mean_log_probability: generated.log_probability / generated.ids.len().max(1) as f64,
            });
        }
    }

    fn sums(&self, rows: &[usize]) -> [f64; 3] {
        [0, 1, 2].map(|part| rows.iter().map(|&row| f64::from(self.rows[row][part])).sum())
    }

    /// The mean over the answers to some rows; `None` without answers.
    fn mean(&self, rows: &[usize], value: impl Fn(&GeneratedAnswer) -> f64) -> Option<f64> {
        let places = rows.iter().filter_map(|row| self.places.get(row));
        let values: Vec<f64> = places.map(|&place| value(&self.answers[place])).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    }
}

impl Results for Tokens {
    fn metric(&self, metric: Metric, rows: &[usize]) -> Option<f64> {
        let [count, hits, loss] = self.sums(rows);
        match metric {
            Metric::Perplexity => (count > 0.0).then(|| (loss / count).exp()),
            Metric::TokenAccuracy => (count > 0.0).then(|| hits / count),
            Metric::ExactMatch => self.mean(rows, |answer| f64::from(u8::from(answer.exact))),
            Metric::TokenF1 => self.mean(rows, |answer| answer.token_f1),
            Metric::Accuracy | Metric::MacroF1 | Metric::PearsonCorrelation => None,
        }
    }

    fn score(&self, rows: &[usize]) -> (&'static str, f64) {
        let [count, _, loss] = self.sums(rows);
        ("negativeCrossEntropy", -loss / count.max(1.0))
    }

    fn main_metric(&self) -> Metric {
        if self.answers.is_empty() { Metric::TokenAccuracy } else { Metric::TokenF1 }
    }

    fn reported(&self, rows: &[usize]) -> Option<(&'static str, f64)> {
        Some(("crossEntropy", -self.score(rows).1))
    }

    fn answers(&self) -> &[GeneratedAnswer] {
        &self.answers
    }

    fn text_reference(&self) -> Option<TextReference> {
        let spread = |values: &mut Vec<f64>| -> Vec<f64> {
            values.sort_by(f64::total_cmp);
            // Evenly spaced ranks keep the distribution's shape, both ends included.
            let kept = values.len().min(REFERENCE_ANSWERS);
            (0..kept).map(|i| values[i * (values.len() - 1) / (kept.max(2) - 1)]).collect()
        };
        let mut tokens = self.answers.iter().map(|answer| answer.tokens as f64).collect();
        let mut logarithms = self.answers.iter().map(|answer| answer.mean_log_probability).collect();
        Some(TextReference {
            answer_tokens: spread(&mut tokens).into_iter().map(|tokens| tokens as u32).collect(),
            mean_log_probabilities: spread(&mut logarithms).into_iter().map(|value| value as f32).collect(),
            correct: self.answers.iter().filter(|answer| answer.exact).count() as u64,
            rows: self.answers.len() as u64,
        })
    }
}

/// F1 score of the words that two texts have in common, as often as both have them (Rajpurkar et al. 2016): words in
/// lower case, without punctuation. Two texts without words are equal.
pub fn token_f1(answer: &str, expected: &str) -> f64 {
    let words = |text: &str| -> Vec<String> {
        let words = text.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty());
        words.map(str::to_lowercase).collect()
    };
    let (given, wanted) = (words(answer), words(expected));
    if given.is_empty() || wanted.is_empty() {
        return f64::from(u8::from(given.is_empty() && wanted.is_empty()));
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    wanted.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let mut common = 0;
    for word in &given {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    2.0 * f64::from(common) / (given.len() + wanted.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_in_common_count_as_often_as_both_have_them() {
        for (answer, expected, score) in [
            ("[Bank - ORGANIZATION]", "[bank - organization]", 1.0),
            ("Bank", "Borrower", 0.0),
            ("", "", 1.0),
            ("", "a", 0.0),
            ("a b", "a c d e", 1.0 / 3.0),
            ("a a", "a b", 0.5),
        ] {
            assert!((token_f1(answer, expected) - score).abs() < 1e-12, "{answer:?} {expected:?}");
        }
    }

    #[test]
    fn metrics_count_tokens_and_answers() {
        let mut found = Tokens::new(vec![[2.0, 1.0, 4.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]);
        assert_eq!(found.metric(Metric::Perplexity, &[0, 1, 2]), Some(1_f64.exp()));
        assert_eq!(found.metric(Metric::TokenAccuracy, &[0, 1]), Some(0.75));
        assert_eq!(found.metric(Metric::Perplexity, &[2]), None, "no targets");
        assert_eq!((found.metric(Metric::TokenF1, &[0]), found.main_metric()), (None, Metric::TokenAccuracy));
        assert_eq!(found.score(&[0]), ("negativeCrossEntropy", -2.0));
        let answer = |row, text: &str, expected: &str| GeneratedAnswer {
            row,
            question: String::new(),
            expected: expected.into(),
            exact: text == expected,
            token_f1: token_f1(text, expected),
            text: text.into(),
            tokens: row + 1,
            mean_log_probability: -0.5,
        };
        found.answers = vec![answer(0, "a", "a"), answer(2, "a b", "a c")];
        found.places = [(0, 0), (2, 1)].into();
        assert_eq!(found.metric(Metric::ExactMatch, &[0, 1, 2]), Some(0.5));
        assert_eq!(found.metric(Metric::TokenF1, &[0, 2]), Some(0.75));
        assert_eq!(found.metric(Metric::TokenF1, &[1]), None, "no answer was generated for it");
        let reference = found.text_reference().unwrap();
        assert_eq!((reference.answer_tokens, reference.correct, reference.rows), (vec![1, 3], 1, 2));
    }
}
