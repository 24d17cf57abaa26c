//! What a model did on some rows, as numbers: the same for all tasks, whose own part is behind [`Results`].

use std::{collections::BTreeMap, fmt::Debug};

use athanor_contract::{artifact::TextReference, train::Metric};
use serde::Serialize;

/// What a model did on some rows, with the truth about them.
#[derive(Debug)]
pub struct Evaluation {
    /// Index of each row's source.
    pub sources: Vec<u32>,
    pub results: Box<dyn Results>,
}

/// A task's results on some rows.
pub trait Results: Debug + Send + Sync {
    /// A metric over some of the rows, of which there is at least one; `None` if the task has no such metric.
    fn metric(&self, metric: Metric, rows: &[usize]) -> Option<f64>;

    /// The value that chooses the best weights, with its name; the more the better. `rows` are all rows.
    fn score(&self, rows: &[usize]) -> (&'static str, f64);

    /// The metric of single sources and of compressed forms.
    fn main_metric(&self) -> Metric {
        Metric::Accuracy
    }

    /// A number over all `rows` that a result reports besides its metrics.
    fn reported(&self, _rows: &[usize]) -> Option<(&'static str, f64)> {
        None
    }

    /// How the measurement was limited, for the report: a name and a value.
    fn limit(&self) -> Option<(&'static str, String)> {
        None
    }

    /// The results of a classifier.
    fn classes(&self) -> Option<&Classes> {
        None
    }

    /// The answers that a language model generated, in the order of their rows.
    fn answers(&self) -> &[GeneratedAnswer] {
        &[]
    }

    /// What the monitor compares a language model's live answers with.
    fn text_reference(&self) -> Option<TextReference> {
        None
    }
}

/// What a language model answered to one row.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GeneratedAnswer {
    /// Index of the row among those that were measured.
    pub row: usize,
    /// The last message before the answer, or the prompt.
    pub question: String,
    pub expected: String,
    pub text: String,
    /// Whether the text is the expected one, white space at the ends apart.
    pub exact: bool,
    #[serde(rename = "tokenF1")]
    pub token_f1: f64,
    /// Number of tokens, the one included that ends the answer.
    pub tokens: usize,
    /// Mean natural logarithm of the tokens' probabilities.
    pub mean_log_probability: f64,
}

/// The winning label and its probability for each row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Predictions {
    pub labels: Vec<usize>,
    pub confidences: Vec<f32>,
}

/// A classifier's predictions with the rows' labels. A prediction is never right about a row without a label.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Classes {
    pub truth: Vec<Option<u16>>,
    pub predictions: Predictions,
}

/// Every metric, in the order of reports.
const METRICS: [Metric; 7] = [
    Metric::Accuracy,
    Metric::MacroF1,
    Metric::PearsonCorrelation,
    Metric::Perplexity,
    Metric::TokenAccuracy,
    Metric::ExactMatch,
    Metric::TokenF1,
];

/// A metric's name in results, such as `macroF1`.
pub fn name(metric: Metric) -> &'static str {
    match metric {
        Metric::Accuracy => "accuracy",
        Metric::MacroF1 => "macroF1",
        Metric::PearsonCorrelation => "pearsonCorrelation",
        Metric::Perplexity => "perplexity",
        Metric::TokenAccuracy => "tokenAccuracy",
        Metric::ExactMatch => "exactMatch",
        Metric::TokenF1 => "tokenF1",
    }
}

impl Evaluation {
    fn all(&self) -> Vec<usize> {
        (0..self.sources.len()).collect()
    }

    /// A metric over the rows of some sources (`None`: all). `None` if there are no such rows, or the task has no such
    /// metric.
    pub fn metric(&self, metric: Metric, sources: Option<&[usize]>) -> Option<f64> {
        let is_chosen = |row: &usize| sources.is_none_or(|sources| sources.contains(&(self.sources[*row] as usize)));
        let rows: Vec<usize> = (0..self.sources.len()).filter(is_chosen).collect();
        if rows.is_empty() { None } else { self.results.metric(metric, &rows) }
    }

    /// The value that chooses the best weights, with its name; the more the better.
    pub fn score(&self) -> (&'static str, f64) {
        self.results.score(&self.all())
    }

    /// The main metric over all rows, with its name; 0 without rows.
    pub fn main(&self) -> (&'static str, f64) {
        let metric = self.results.main_metric();
        (name(metric), self.metric(metric, None).unwrap_or(0.0))
    }

    /// The metrics that a result reports: over all rows, and the main one on each source.
    pub fn report(&self, sources: &[String]) -> BTreeMap<String, f64> {
        let mut values = BTreeMap::new();
        for metric in METRICS {
            values.extend(self.metric(metric, None).map(|value| (name(metric).to_owned(), value)));
        }
        let reported = self.results.reported(&self.all());
        values.extend(reported.map(|(name, value)| (name.to_owned(), value)));
        let main = self.results.main_metric();
        for (index, source) in sources.iter().enumerate() {
            let value = self.metric(main, Some(&[index]));
            values.extend(value.map(|value| (format!("{source}/{}", name(main)), value)));
        }
        values
    }

    /// The results of a classifier.
    pub fn classes(&self) -> Option<&Classes> {
        self.results.classes()
    }
}
