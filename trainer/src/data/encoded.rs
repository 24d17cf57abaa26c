//! Rows as token ids, with what their task wants of them.

use std::collections::HashMap;

use athanor_contract::train::Task;
use athanor_models::{
    Tokenizer,
    tokenizer::{MaskTokens, TokenRows},
};

use super::Dataset;
use crate::TrainError;

/// Rows of one part of the dataset, in order.
#[derive(Debug, Default)]
pub struct Encoded {
    pub ids: TokenRows,
    /// Second texts, for embeddings.
    pub pairs: Option<TokenRows>,
    /// Index of the label; `None` for a label the model does not know (a baseline of other classes), and for other tasks.
    pub labels: Vec<Option<u16>>,
    /// The label as a number, for regression; empty for other tasks.
    pub values: Vec<f32>,
    /// Index of the source.
    pub sources: Vec<u32>,
    /// Of the tokenizer, for masked language models.
    pub mask_tokens: Option<MaskTokens>,
}

impl Encoded {
    /// `labels` are those of the model, empty for tasks without.
    ///
    /// # Errors
    /// A regression's label that is no number is the user's to mend.
    pub fn new(
        dataset: &Dataset,
        part: &[usize],
        task: Task,
        labels: &[String],
        tokenizer: &Tokenizer,
        max_length: usize,
    ) -> Result<Self, TrainError> {
        // At most 1,024 labels are found; a model that knows 65,536 has none for the rest.
        let index: HashMap<&str, u16> = labels.iter().map(String::as_str).zip(0..).collect();
        let rows = &dataset.rows;
        let values = match task {
            Task::TextRegression => part.iter().map(|&row| number(dataset, row)).collect::<Result<_, _>>()?,
            _ => Vec::new(),
        };
        let pairs = match task {
            Task::Embedding => {
                let pairs = part.iter().map(|&row| pair(dataset, row)).collect::<Result<Vec<_>, _>>()?;
                Some(tokenizer.encode_rows(pairs, max_length)?)
            }
            _ => None,
        };
        Ok(Self {
            ids: tokenizer.encode_rows(part.iter().map(|&row| rows.text(row)), max_length)?,
            pairs,
            labels: part.iter().map(|&row| index.get(rows.label(row)?).copied()).collect(),
            values,
            sources: part.iter().map(|&row| rows.source(row) as u32).collect(),
            mask_tokens: tokenizer.mask_tokens().filter(|_| task == Task::MaskedLanguageModel),
        })
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Tokens of each row, of its pair too.
    pub fn lengths(&self) -> Vec<usize> {
        match &self.pairs {
            None => self.ids.lengths().collect(),
            Some(pairs) => self.ids.lengths().zip(pairs.lengths()).map(|(text, pair)| text + pair).collect(),
        }
    }

    /// Only these rows, in this order.
    pub fn select(&mut self, rows: &[usize]) {
        self.ids = self.ids.select(rows);
        self.pairs = self.pairs.take().map(|pairs| pairs.select(rows));
        self.labels = rows.iter().map(|&row| self.labels[row]).collect();
        self.values = rows.iter().filter_map(|&row| self.values.get(row).copied()).collect();
        self.sources = rows.iter().map(|&row| self.sources[row]).collect();
    }

    /// More rows of a classification that nobody labelled, each with the index of its source.
    pub fn extend(&mut self, ids: &TokenRows, sources: impl IntoIterator<Item = u32>) {
        ids.iter().for_each(|ids| self.ids.push(ids));
        self.labels.resize(self.ids.len(), None);
        self.sources.extend(sources);
    }

    /// Rows without tokens and labels.
    #[cfg(test)]
    pub fn blank(count: usize) -> Self {
        Self {
            ids: (0..count).map(|_| []).collect(),
            labels: vec![None; count],
            sources: vec![0; count],
            ..Self::default()
        }
    }
}

fn number(dataset: &Dataset, row: usize) -> Result<f32, TrainError> {
    let label = dataset.rows.label(row).unwrap_or_default();
    match label.trim().parse::<f32>() {
        Ok(value) if value.is_finite() => Ok(value),
        _ => Err(TrainError::User(format!(
            "{}: label {label:?} is not a number, which TextRegression needs",
            dataset.rows.place(row)
        ))),
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
