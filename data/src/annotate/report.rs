//! What annotation gave, and what it cost.

use std::collections::BTreeMap;

use serde::Serialize;

/// Examples kept of each reason.
const EXAMPLES: usize = 10;
/// Characters shown of a text.
const EXCERPT: usize = 200;

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AnnotationReport {
    pub model: String,
    /// Rows that were to be labelled.
    pub rows: u64,
    /// Rows that got a label.
    pub labelled: u64,
    /// Rows whose answers were all in the journal of an earlier run.
    pub resumed: u64,
    /// Rows without a label, by reason.
    pub failures: Vec<FailureReport>,
    /// Answers of this run.
    pub answers: u64,
    /// Requests of this run that were repeated.
    pub retries: u64,
    /// Tokens of prompts and of answers, those in the journal included.
    pub input_tokens: u64,
    pub output_tokens: u64,
    /// Whether some tokens are reckoned from the length of the texts, because the endpoint did not tell.
    pub tokens_estimated: bool,
    /// Cost in the currency of the prices; absent without prices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// Whether `maximumCost` ended it.
    pub maximum_cost_reached: bool,
    /// Share of the rows with two or more samples whose samples differ; absent without such rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disagreement: Option<f64>,
    pub seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureReport {
    pub reason: String,
    pub rows: u64,
    pub examples: Vec<FailureExample>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FailureExample {
    /// Where the row came from, such as `reviews.csv row 3`.
    pub place: String,
    pub text: String,
    /// What the endpoint said, where it said something.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// Gathers rows without a label.
#[derive(Default)]
pub(super) struct Failures(BTreeMap<String, (u64, Vec<FailureExample>)>);

impl Failures {
    pub(super) fn count(&mut self, reason: &str, detail: &str, place: impl FnOnce() -> String, text: &str) {
        let (rows, examples) = self.0.entry(reason.to_owned()).or_default();
        *rows += 1;
        if examples.len() < EXAMPLES {
            let text = text.chars().take(EXCERPT).collect();
            examples.push(FailureExample { place: place(), text, detail: detail.to_owned() });
        }
    }

    /// The most frequent first.
    pub(super) fn into_reports(self) -> Vec<FailureReport> {
        let mut reports: Vec<_> =
            self.0.into_iter().map(|(reason, (rows, examples))| FailureReport { reason, rows, examples }).collect();
        reports.sort_by_key(|report| std::cmp::Reverse(report.rows));
        reports
    }
}
