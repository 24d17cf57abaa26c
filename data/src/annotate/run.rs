//! The state that questions under way share: the journal, what was spent, and whether to go on.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use athanor_contract::train::EndpointAnnotator;
use tokio_util::sync::CancellationToken;

use super::{
    AnnotationReport,
    endpoint::{Answer, Endpoint, Failure},
    journal::{Entry, Journal},
    prompt::{Prompt, parse_answer},
};
use crate::error::DataError;

/// Answers to one question that may be no label before the row is left without one.
const ATTEMPTS: u32 = 2;
/// Bytes of a token, for endpoints that do not count them: fewer than tokens have, so that the bound on cost holds.
pub(super) const BYTES_PER_TOKEN: u64 = 3;
const UNUSABLE: &str = "the answer is none of the labels";
const COST_REACHED: &str = "not asked: maximumCost is spent";

/// A text and the rows that have it.
pub(super) struct Question<'t> {
    pub key: String,
    pub text: &'t str,
    /// Positions in the texts that were given.
    pub rows: Vec<usize>,
    pub samples: Vec<Outcome>,
}

/// What became of one sample of a question.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    /// To be asked, after so many answers that were no label.
    Open {
        unusable: u32,
    },
    Label(usize),
    Failed {
        reason: String,
        detail: String,
    },
}

impl Outcome {
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Open { .. })
    }

    pub(super) fn label(&self) -> Option<usize> {
        if let Self::Label(label) = self { Some(*label) } else { None }
    }

    pub(super) fn failure(&self) -> Option<(&str, &str)> {
        if let Self::Failed { reason, detail } = self { Some((reason, detail)) } else { None }
    }

    fn failed(reason: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Failed { reason: reason.into(), detail: detail.into() }
    }
}

/// Tokens so far.
#[derive(Clone, Copy, Debug, Default)]
struct Tokens {
    input: u64,
    output: u64,
    estimated: bool,
}

pub(super) struct Run<'a> {
    endpoint: Endpoint,
    prompt: Prompt<'a>,
    labels: &'a [String],
    /// Prices of one token of prompt and answer.
    prices: Option<(f64, f64)>,
    maximum_cost: f64,
    journal: Mutex<Journal>,
    tokens: Mutex<Tokens>,
    answers: AtomicU64,
    retries: AtomicU64,
    /// Questions in a row that failed for good, and how many of them say that the endpoint is gone.
    failed: AtomicU32,
    patience: u32,
    stop: CancellationToken,
    error: Mutex<Option<DataError>>,
}

/// The state behind a lock; each critical section leaves it whole, so a panic elsewhere does not matter.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Run<'a> {
    pub(super) fn new(
        endpoint: Endpoint,
        prompt: Prompt<'a>,
        spec: &EndpointAnnotator,
        labels: &'a [String],
        journal: Journal,
    ) -> Self {
        let price = |price: Option<athanor_contract::Decimal>| price.map(|price| price.get() / 1e6);
        Self {
            endpoint,
            prompt,
            labels,
            prices: price(spec.input_token_price).zip(price(spec.output_token_price)),
            maximum_cost: spec.maximum_cost.map_or(f64::INFINITY, |cost| cost.get()),
            journal: Mutex::new(journal),
            tokens: Mutex::default(),
            answers: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            failed: AtomicU32::new(0),
            patience: spec.concurrency.saturating_mul(2).max(16),
            stop: CancellationToken::new(),
            error: Mutex::new(None),
        }
    }

    /// Fills the samples from the journal's entries and gives how many are open.
    pub(super) fn resume(&self, question: &mut Question, entries: &[Entry], samples: u32) -> usize {
        let mut tokens = lock(&self.tokens);
        for entry in entries {
            tokens.input += entry.input_tokens;
            tokens.output += entry.output_tokens;
        }
        question.samples = (0..samples.max(1))
            .map(|sample| {
                let mut unusable = 0;
                let mut last = "";
                for entry in entries.iter().filter(|entry| entry.sample == sample) {
                    match entry.label.as_ref().and_then(|label| self.labels.iter().position(|known| known == label)) {
                        Some(label) => return Outcome::Label(label),
                        None => (unusable, last) = (unusable + 1, entry.answer.as_deref().unwrap_or_default()),
                    }
                }
                if unusable >= ATTEMPTS { Outcome::failed(UNUSABLE, last) } else { Outcome::Open { unusable } }
            })
            .collect();
        question.samples.iter().filter(|outcome| outcome.is_open()).count()
    }

    /// Asks for one sample.
    pub(super) async fn ask(&self, question: &Question<'_>, sample: usize) -> Outcome {
        let Outcome::Open { mut unusable } = question.samples[sample] else { return question.samples[sample].clone() };
        let prompt = match self.prompt.render(question.text) {
            Ok(prompt) => prompt,
            Err(error) => return self.give_up(error),
        };
        loop {
            if self.cost().is_some_and(|cost| cost >= self.maximum_cost) {
                return Outcome::failed(COST_REACHED, "");
            }
            let retried = || {
                self.retries.fetch_add(1, Ordering::Relaxed);
            };
            let answer = match self.endpoint.ask(&prompt, &self.stop, retried).await {
                Ok(answer) => answer,
                Err(failure) => return self.failed(failure),
            };
            self.failed.store(0, Ordering::Relaxed);
            let label = parse_answer(&answer.content, self.labels);
            let shown = self.endpoint.shown(&answer.content);
            if let Err(error) = self.record(question, sample, &prompt, &answer, label, &shown) {
                return self.give_up(DataError::Other(format!("the journal cannot be written: {error}")));
            }
            if let Some(label) = label {
                return Outcome::Label(label);
            }
            unusable += 1;
            if unusable >= ATTEMPTS {
                return Outcome::failed(UNUSABLE, shown);
            }
        }
    }

    /// Spent so far, in the currency of the prices.
    pub(super) fn cost(&self) -> Option<f64> {
        let tokens = *lock(&self.tokens);
        self.prices.map(|(input, output)| tokens.input as f64 * input + tokens.output as f64 * output)
    }

    /// The report's counts, or why the run ended early.
    pub(super) fn finish(&self) -> Result<AnnotationReport, DataError> {
        let synced = lock(&self.journal).sync();
        if let Some(error) = lock(&self.error).take() {
            return Err(error);
        }
        synced.map_err(|error| DataError::Other(format!("the journal cannot be written: {error}")))?;
        let tokens = *lock(&self.tokens);
        let cost = self.cost();
        Ok(AnnotationReport {
            answers: self.answers.load(Ordering::Relaxed),
            retries: self.retries.load(Ordering::Relaxed),
            input_tokens: tokens.input,
            output_tokens: tokens.output,
            tokens_estimated: tokens.estimated,
            cost,
            maximum_cost_reached: cost.is_some_and(|cost| cost >= self.maximum_cost),
            ..AnnotationReport::default()
        })
    }

    fn record(
        &self,
        question: &Question,
        sample: usize,
        prompt: &str,
        answer: &Answer,
        label: Option<usize>,
        shown: &str,
    ) -> std::io::Result<()> {
        let estimate = |text: &str| (text.len() as u64).div_ceil(BYTES_PER_TOKEN);
        let (input, output) = answer.usage.unwrap_or_else(|| (estimate(prompt), estimate(&answer.content)));
        self.answers.fetch_add(1, Ordering::Relaxed);
        {
            let mut tokens = lock(&self.tokens);
            tokens.input += input;
            tokens.output += output;
            tokens.estimated |= answer.usage.is_none();
        }
        lock(&self.journal).append(&Entry {
            key: question.key.clone(),
            sample: sample as u32,
            label: label.map(|label| self.labels[label].clone()),
            answer: label.is_none().then(|| shown.to_owned()),
            input_tokens: input,
            output_tokens: output,
        })
    }

    fn failed(&self, failure: Failure) -> Outcome {
        match failure {
            Failure::Stopped => Outcome::failed("not asked: annotation was stopped", ""),
            Failure::Refused(message) => self.give_up(DataError::User(message)),
            Failure::Question { reason } => Outcome::failed(reason, ""),
            Failure::Transient { reason, detail, .. } => {
                if self.failed.fetch_add(1, Ordering::Relaxed) + 1 >= self.patience {
                    let (patience, detail) = (self.patience, if detail.is_empty() { "" } else { &detail });
                    return self.give_up(DataError::Other(format!(
                        "the last {patience} questions to data.annotate.endpoint all failed, the last with: {reason}: {detail}"
                    )));
                }
                Outcome::failed(reason, detail)
            }
        }
    }

    /// Stops asking; the first reason counts.
    fn give_up(&self, error: DataError) -> Outcome {
        let outcome = Outcome::failed("not asked: annotation was stopped", "");
        lock(&self.error).get_or_insert(error);
        self.stop.cancel();
        outcome
    }
}
