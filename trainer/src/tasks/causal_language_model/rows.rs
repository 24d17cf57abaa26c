//! Rows of a language model as tokens: which of them are targets, and where an answer begins.

use std::{ops::Range, sync::Arc};

use athanor_contract::train::{GenerationSpec, WeightedTerm};
use athanor_models::{
    self as models, DecoderTokenizer,
    heads::causal::LOGIT_ROWS,
    tokenizer::{TokenRows, chat::Chat},
};
use serde_json::Value;
use tch::{Device, Tensor};

use super::{
    generate,
    results::{Question, Tokens},
};
use crate::{
    TrainError,
    data::{Batch, Columns, Encoded, IGNORED, Part},
    evaluate::{evaluation::Results, measuring::Measuring},
    network::ModelRef,
    tasks::Rows,
};

/// One document: a row of the dataset.
#[derive(Clone, Debug, PartialEq)]
struct Document {
    tokens: usize,
    /// Places of the targets among the document's tokens; the first token is never one.
    targets: Vec<Range<usize>>,
}

/// What a language model keeps of each row besides its tokens.
#[derive(Clone, Debug)]
pub struct LanguageRows {
    /// The documents of each row, in the order of its tokens; several after packing.
    documents: Vec<Vec<Document>>,
    /// Absent for a plain text, and for a prompt that leaves no room for an answer.
    questions: Vec<Option<Question>>,
    generation: GenerationSpec,
    tokenizer: Arc<DecoderTokenizer>,
}

/// Tokens and targets of the rows.
///
/// # Errors
/// A conversation that the chat template refuses is a user error with its file and row; so are rows of which all are cut
/// before their first target.
pub fn encode(rows: &Rows) -> Result<Encoded, TrainError> {
    let tokenizer = rows.tokenizer.decoder()?;
    let generation = rows.generation;
    let mut columns = LanguageRows {
        documents: Vec::with_capacity(rows.rows.len()),
        questions: Vec::with_capacity(rows.rows.len()),
        generation,
        tokenizer: tokenizer.clone(),
    };
    let mut ids = TokenRows::default();
    let mut cut = 0;
    for &row in rows.rows {
        let place = || rows.dataset.rows.place(row);
        let mut read =
            read_row(rows, row, tokenizer).map_err(|error| TrainError::User(format!("{}: {error}", place())))?;
        if read.ids.len() > rows.max_length {
            read.ids.truncate(rows.max_length);
            let cut_range = |range: &Range<usize>| range.start..range.end.min(rows.max_length);
            read.targets = read.targets.iter().map(cut_range).filter(|range| !range.is_empty()).collect();
        }
        cut += usize::from(read.targets.is_empty());
        columns.documents.push(vec![Document { tokens: read.ids.len(), targets: read.targets }]);
        columns.questions.push(read.question.filter(|question| question.prompt.len() < rows.max_length));
        ids.push(&read.ids);
    }
    let count = rows.rows.len();
    if cut == count && count > 0 {
        return Err(TrainError::User(format!(
            "hyperparameters.maxSequenceLength: all {count} rows of a part are cut before their first target at {} tokens",
            rows.max_length
        )));
    }
    if cut > 0 {
        tracing::warn!(cut, count, rows.max_length, "rows are cut before their first target, and teach nothing");
    }
    let sources = rows.rows.iter().map(|&row| rows.dataset.rows.source(row) as u32).collect();
    Ok(Encoded { ids, sources, columns: Box::new(columns) })
}

/// A row before it is cut.
struct Read {
    ids: Vec<u32>,
    targets: Vec<Range<usize>>,
    question: Option<Question>,
}

fn read_row(rows: &Rows, row: usize, tokenizer: &DecoderTokenizer) -> Result<Read, String> {
    let data = &rows.dataset.rows;
    let (text, second) = (data.text(row), data.pair(row));
    let words = |error: models::LoadError| error.to_string();
    let end = || tokenizer.end_token().ok_or("the tokenizer has no token that ends a text");
    match second {
        Some(answer) if data.is_conversation(row) => read_conversation(text, answer, tokenizer),
        Some(completion) => {
            let prompt = tokenizer.encode(text, true).map_err(words)?;
            let mut ids = prompt.clone();
            ids.extend(tokenizer.encode(completion, false).map_err(words)?);
            ids.push(end()?);
            let targets = one(prompt.len().max(1)..ids.len());
            let question = Question { prompt, text: text.to_owned(), expected: completion.to_owned() };
            Ok(Read { ids, targets, question: Some(question) })
        }
        None => {
            let mut ids = tokenizer.encode(text, true).map_err(words)?;
            ids.push(end()?);
            // The first token is predicted from nothing.
            let targets = one(1..ids.len());
            Ok(Read { ids, targets, question: None })
        }
    }
}

/// A range, unless it is empty.
fn one(range: Range<usize>) -> Vec<Range<usize>> {
    Some(range).into_iter().filter(|range| !range.is_empty()).collect()
}

fn read_conversation(before: &str, answer: &str, tokenizer: &DecoderTokenizer) -> Result<Read, String> {
    let mut messages: Vec<Value> = serde_json::from_str(before).map_err(|error| error.to_string())?;
    let answer: Value = serde_json::from_str(answer).map_err(|error| error.to_string())?;
    let prompt = tokenizer.prompt(&chat(&messages)?).map_err(|error| error.to_string())?;
    let last = messages.last().map(|message| text_of(&message["content"])).unwrap_or_default();
    let expected = text_of(&answer["content"]);
    messages.push(answer);
    let conversation = tokenizer.conversation(&chat(&messages)?).map_err(|error| error.to_string())?;
    // A template may begin with the assistant's words; the first token is predicted from nothing.
    let targets = conversation.assistant.into_iter().map(|range| range.start.max(1)..range.end);
    let targets = targets.filter(|range| !range.is_empty()).collect();
    let question = (!expected.trim().is_empty()).then_some(Question { prompt, text: last, expected });
    Ok(Read { ids: conversation.ids, targets, question })
}

fn chat(messages: &[Value]) -> Result<Chat, String> {
    serde_json::from_value(serde_json::json!({"messages": messages})).map_err(|error| error.to_string())
}

/// The text of a message's content: a string, or parts with text.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

impl LanguageRows {
    fn count(&self, rows: &[usize]) -> usize {
        let documents = rows.iter().flat_map(|&row| &self.documents[row]);
        documents.flat_map(|document| &document.targets).map(Range::len).sum()
    }

    /// Some rows as sequences, and the target of each token: the next one, or [`IGNORED`].
    fn sequences(&self, ids: &TokenRows, rows: &[usize], device: Device) -> (models::Batch, Tensor) {
        let mut sequences: Vec<Vec<i64>> = Vec::new();
        let mut targets: Vec<i64> = Vec::new();
        for &row in rows {
            let mut rest = &ids[row];
            for document in &self.documents[row] {
                let (own, others) = rest.split_at(document.tokens);
                rest = others;
                let begin = targets.len();
                targets.resize(begin + own.len(), IGNORED);
                for place in document.targets.iter().cloned().flatten() {
                    targets[begin + place - 1] = i64::from(own[place]);
                }
                sequences.push(own.iter().map(|&id| i64::from(id)).collect());
            }
        }
        let slices: Vec<&[i64]> = sequences.iter().map(Vec::as_slice).collect();
        (models::Batch::new(&slices, device), Tensor::from_slice(&targets).to_device(device))
    }
}

impl Columns for LanguageRows {
    fn select(&mut self, rows: &[usize]) {
        self.documents = rows.iter().map(|&row| self.documents[row].clone()).collect();
        self.questions = rows.iter().map(|&row| self.questions[row].clone()).collect();
    }

    /// A language model has no new texts without targets.
    fn extend(&mut self, count: usize) {
        self.documents.resize(self.documents.len() + count, Vec::new());
        self.questions.resize(self.questions.len() + count, None);
    }

    /// First fit in the order of the rows, as long rows and short ones are spread in a dataset.
    fn pack(&mut self, ids: &TokenRows, max_length: usize) -> Option<Vec<Vec<usize>>> {
        let mut packs: Vec<(usize, Vec<usize>)> = Vec::new();
        // Packs before this one are full enough that few rows fit: the search stays short.
        const OPEN: usize = 64;
        for (row, tokens) in ids.lengths().enumerate() {
            let first = packs.len().saturating_sub(OPEN);
            match packs[first..].iter_mut().find(|(used, _)| used + tokens <= max_length) {
                Some((used, rows)) => {
                    *used += tokens;
                    rows.push(row);
                }
                None => packs.push((tokens, vec![row])),
            }
        }
        let packs: Vec<Vec<usize>> = packs.into_iter().map(|(_, rows)| rows).collect();
        let documents = |rows: &Vec<usize>| rows.iter().flat_map(|&row| self.documents[row].clone()).collect();
        self.documents = packs.iter().map(documents).collect();
        self.questions = vec![None; packs.len()];
        Some(packs)
    }

    fn collate(&self, part: &Part, _terms: &[WeightedTerm], _pad_id: i64) -> Result<Batch, TrainError> {
        let (sequences, targets) = self.sequences(&part.train.ids, part.rows, part.device);
        Ok(Batch {
            ids: sequences.ids.shallow_clone(),
            mask: None,
            places: None,
            targets,
            rows_per_target: part.batch.len() as f64 / self.count(part.batch).max(1) as f64,
            sequences: Some(sequences),
        })
    }

    fn evaluate(
        &self,
        rows: &Encoded,
        model: ModelRef,
        measuring: &mut Measuring,
    ) -> Result<Box<dyn Results>, TrainError> {
        let (model, device) = (model.decoder()?, measuring.device);
        let found = measuring.rows(&rows.lengths(), 3, |batch| {
            let mut found = Vec::with_capacity(batch.len() * 3);
            let (sequences, targets) = self.sequences(&rows.ids, batch, device);
            let hidden = model.forward(&sequences, None, false);
            let mut begin = 0;
            for &row in batch {
                let tokens = rows.ids[row].len() as i64;
                let (hidden, targets) = (hidden.narrow(0, begin, tokens), targets.narrow(0, begin, tokens));
                let loss = model.next_token_loss(&hidden, &targets, LOGIT_ROWS)?;
                found.extend([loss.targets as f32, loss.correct as f32, f64::try_from(&loss.sum)? as f32]);
                begin += tokens;
            }
            Ok(found)
        })?;
        let mut tokens = Tokens::new(found.chunks(3).map(|row| [row[0], row[1], row[2]]).collect());
        if measuring.generates {
            let asked: Vec<usize> = (0..rows.len()).filter(|&row| self.questions[row].is_some()).collect();
            let asked = &evenly_spaced(&asked, self.generation.samples as usize);
            let questions: Vec<&Question> = asked.iter().filter_map(|&row| self.questions[row].as_ref()).collect();
            let limits = generate::Limits {
                max_new_tokens: self.generation.max_new_tokens as usize,
                max_length: model.max_length(),
                stop_tokens: self.tokenizer.stop_tokens(),
            };
            let prompts: Vec<&[u32]> = questions.iter().map(|question| &question.prompt[..]).collect();
            let generated = generate::shared(model, &prompts, &limits, measuring)?;
            tokens.answer(asked, &questions, &generated, &self.tokenizer);
        }
        Ok(Box::new(tokens))
    }
}

/// At most `most` of the rows, at equal distances: rows are in the order of their sources, so that each source has its
/// share.
fn evenly_spaced(rows: &[usize], most: usize) -> Vec<usize> {
    let kept = rows.len().min(most);
    (0..kept).map(|place| rows[place * rows.len() / kept]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_source_has_its_share_of_the_answers() {
        let rows: Vec<usize> = (100..200).collect();
        assert_eq!(evenly_spaced(&rows, 4), [100, 125, 150, 175]);
        assert_eq!(evenly_spaced(&rows, 1000), rows);
        assert_eq!(evenly_spaced(&rows, 99).len(), 99);
        assert_eq!(evenly_spaced(&[], 4), [0_usize; 0]);
    }
}
