//! Rows as token ids, with what their task wants of them.

use std::collections::HashMap;

use athanor_contract::train::Task;
use athanor_models::{Tokenizer, tokenizer::MaskTokens};

use super::Dataset;
use crate::TrainError;

/// Rows of one part of the dataset, in order.
#[derive(Debug, Default)]
pub struct Encoded {
    pub ids: Vec<Vec<u32>>,
    /// Second texts, for embeddings.
    pub pairs: Option<Vec<Vec<u32>>>,
    /// Index of the label; `None` for a label the model does not know (a baseline of other classes), and for other tasks.
    pub labels: Vec<Option<usize>>,
    /// The label as a number, for regression; 0 for other tasks.
    pub values: Vec<f32>,
    /// Index of the source.
    pub sources: Vec<usize>,
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
        let index: HashMap<&str, usize> = labels.iter().enumerate().map(|(i, label)| (label.as_str(), i)).collect();
        let rows = &dataset.rows;
        let values = match task {
            Task::TextRegression => part.iter().map(|&row| number(dataset, row)).collect::<Result<_, _>>()?,
            _ => vec![0.0; part.len()],
        };
        let texts: Vec<&str> = part.iter().map(|&row| rows.text(row)).collect();
        let pairs = match task {
            Task::Embedding => {
                let pairs = part.iter().map(|&row| pair(dataset, row)).collect::<Result<Vec<_>, _>>()?;
                Some(tokenizer.encode_batch(&pairs, max_length)?)
            }
            _ => None,
        };
        Ok(Self {
            ids: tokenizer.encode_batch(&texts, max_length)?,
            pairs,
            labels: part.iter().map(|&row| index.get(rows.label(row)?).copied()).collect(),
            values,
            sources: part.iter().map(|&row| rows.source(row)).collect(),
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
            None => self.ids.iter().map(Vec::len).collect(),
            Some(pairs) => self.ids.iter().zip(pairs).map(|(ids, pair)| ids.len() + pair.len()).collect(),
        }
    }

    /// Only these rows, in this order.
    pub fn select(&mut self, rows: &[usize]) {
        self.ids = rows.iter().map(|&row| std::mem::take(&mut self.ids[row])).collect();
        self.pairs =
            self.pairs.take().map(|mut pairs| rows.iter().map(|&row| std::mem::take(&mut pairs[row])).collect());
        self.labels = rows.iter().map(|&row| self.labels[row]).collect();
        self.values = rows.iter().map(|&row| self.values[row]).collect();
        self.sources = rows.iter().map(|&row| self.sources[row]).collect();
    }

    /// Rows without tokens and labels.
    #[cfg(test)]
    pub fn blank(count: usize) -> Self {
        Self {
            ids: vec![Vec::new(); count],
            labels: vec![None; count],
            values: vec![0.0; count],
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
