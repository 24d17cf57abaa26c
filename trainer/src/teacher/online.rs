//! A trained model that is asked about rows: at each step, or about all of them at once.

use std::path::Path;

use athanor_contract::train;
use athanor_models::{self as models, EncoderConfig, Model, Tokenizer, tokenizer::TokenRows};
use athanor_torch::{Autocast, ProcessGroup};
use tch::{Device, Kind, Tensor};

use super::tokens::{Side, check_same, vocabulary};
use crate::{
    TrainError,
    data::{
        Batch, Part,
        batches::{evaluation_batches, inputs},
    },
    tasks::{self, Task},
};

/// Rows of one forward pass; without gradients memory is no concern, and the rows are sorted by length.
const BATCH: usize = 64;

/// A teacher that answers at each step.
pub struct Online {
    task: &'static dyn Task,
    model: Model,
    tokenizer: Tokenizer,
    /// The teacher's output for each of the student's labels; absent: the same order.
    columns: Option<Tensor>,
    /// The training rows in the teacher's tokens; absent: both read the same tokens.
    ids: Option<TokenRows>,
    /// The student's tokenizer, where the hidden states of tokens are compared and the vocabularies differ.
    compared: Option<Tokenizer>,
    max_length: usize,
}

/// A teacher's answer for some rows.
pub struct Answer {
    /// What the task predicts, in the student's order: [B, L], of predicted tokens [N, V], vectors [B, C].
    pub outputs: Tensor,
    /// Hidden states [B, T, C] of the first layer's input and each layer's output; empty where they were not asked for.
    pub states: Vec<Tensor>,
}

/// The student and its task, which the teacher has to fit.
pub struct Student<'a> {
    pub task: train::Task,
    /// Empty for tasks without labels.
    pub labels: &'a [String],
    /// The folder with its tokenizer.
    pub folder: &'a Path,
    /// Whether hidden states are compared, token by token.
    pub by_token: bool,
    pub max_length: usize,
}

impl Online {
    /// Reads the teacher's folder.
    ///
    /// # Errors
    /// A teacher for another task, with other labels, or with another vocabulary where it predicts tokens is a user
    /// error.
    pub fn load(folder: &Path, student: &Student, device: Device) -> Result<Self, TrainError> {
        let refused = |message: String| TrainError::User(format!("teacher.from: {message}"));
        let model = Model::load_trained(folder, device)?;
        let task = tasks::of(student.task);
        if !task.accepts_teacher(model.task()) {
            return Err(refused(format!("the teacher is {}, the task is {:?}", in_words(model.task()), student.task)));
        }
        let columns = match model.task() {
            models::Task::Classification(labels) if task.has_classes() => {
                columns(labels, student.labels).map_err(refused)?
            }
            _ => None,
        };
        let same_tokens = vocabulary(folder)? == vocabulary(student.folder)?;
        if !same_tokens && task.outputs_are_tokens() {
            return Err(refused(
                "the teacher's vocabulary is not the student's, so that its tokens are no labels".into(),
            ));
        }
        let (own, wanted) = (model.config().vocab_size, EncoderConfig::load(student.folder)?.vocab_size);
        if task.outputs_are_tokens() && own != wanted {
            return Err(refused(format!(
                "the teacher's vocabulary has {own} tokens, the student's has {wanted} (vocab_size in config.json)"
            )));
        }
        let max_length = student.max_length.min(model.config().max_length());
        if (same_tokens || student.by_token) && max_length < student.max_length {
            return Err(refused(format!(
                "the teacher reads at most {max_length} tokens: set hyperparameters.maxSequenceLength to that"
            )));
        }
        let ids = if same_tokens { None } else { Some(TokenRows::default()) };
        let compared = (student.by_token && !same_tokens).then(|| Tokenizer::load(student.folder)).transpose()?;
        Ok(Self { task, model, tokenizer: Tokenizer::load(folder)?, columns, ids, compared, max_length })
    }

    /// Checks that both models split every row into the same tokens, if hidden states are compared. `rows` are the
    /// training rows in the student's tokens, `place` names the origin of one.
    ///
    /// # Errors
    /// See [`check_same`].
    pub fn check_tokens(&self, rows: &TokenRows, place: impl Fn(usize) -> String) -> Result<(), TrainError> {
        let (Some(tokenizer), Some(own)) = (&self.compared, &self.ids) else { return Ok(()) };
        check_same(&Side { tokenizer, rows }, &Side { tokenizer: &self.tokenizer, rows: own }, place)
    }

    /// Tokenizes the training rows, where the student's tokens are of no use.
    pub fn read_rows<'t>(&mut self, texts: impl IntoIterator<Item = &'t str>) -> Result<(), TrainError> {
        if let Some(ids) = &mut self.ids {
            *ids = self.tokenizer.encode_rows(texts, self.max_length)?;
        }
        Ok(())
    }

    /// Words of the teacher's vocabulary, each with its row in the word embeddings.
    pub fn words(&self) -> Vec<(String, u32)> {
        self.tokenizer.words()
    }

    /// More texts behind the training rows.
    pub fn add_rows<'t>(&mut self, texts: impl IntoIterator<Item = &'t str>) -> Result<(), TrainError> {
        if let Some(ids) = &mut self.ids {
            self.tokenizer.encode_rows(texts, self.max_length)?.iter().for_each(|row| ids.push(row));
        }
        Ok(())
    }

    /// Goes on with these of the training rows alone.
    pub fn keep_rows(&mut self, rows: &[usize]) {
        if let Some(ids) = &mut self.ids {
            *ids = ids.select(rows);
        }
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    pub fn config(&self) -> &EncoderConfig {
        self.model.config()
    }

    /// Outputs of each answer.
    pub fn outputs(&self) -> usize {
        match self.model.task() {
            models::Task::Classification(labels) => labels.len(),
            _ => 1,
        }
    }

    fn in_order(&self, logits: Tensor) -> Tensor {
        match &self.columns {
            Some(columns) => logits.index_select(1, columns),
            None => logits,
        }
    }

    /// The answer for the rows of a part, which the student reads as `batch`; `every` asks for the hidden states of all
    /// layers.
    pub fn answer(&self, part: &Part, batch: &Batch, every: bool) -> Answer {
        tch::no_grad(|| {
            let own = self.ids.as_ref().map(|own| {
                let texts: Vec<&[u32]> = part.rows.iter().map(|&row| &own[row]).collect();
                Batch::of_texts(&texts, self.model.config().pad_token_id, part.device)
            });
            let batch = own.as_ref().unwrap_or(batch);
            let (ids, mask) = (&batch.ids, batch.mask.as_ref());
            let states = match every || self.task.reads_every_token() {
                true => self.model.hidden_states(ids, mask, false, every),
                false => vec![self.model.head_states(ids, mask, false)],
            };
            let last = &states[states.len() - 1];
            let outputs = self.in_order(self.task.outputs(&self.model, batch, last, false));
            Answer { outputs, states }
        })
    }

    /// The rows that the teacher is asked about, in its own tokens. `student_ids` are the rows in the student's tokens.
    pub fn asked<'r>(&'r self, student_ids: &'r TokenRows) -> &'r TokenRows {
        self.ids.as_ref().unwrap_or(student_ids)
    }

    /// Logits of all training rows, [rows, L] in FP32, each rank computing its part. `student_ids` are the rows in the
    /// student's tokens; `beat` is called after each batch with the rows done.
    pub fn all_logits(
        &self,
        student_ids: &TokenRows,
        group: Option<&ProcessGroup>,
        device: Device,
        bf16: bool,
        mut beat: impl FnMut(usize),
    ) -> Result<Tensor, TrainError> {
        let rows = self.asked(student_ids);
        let lengths: Vec<usize> = rows.lengths().collect();
        let (rank, world) = group.map_or((0, 1), |group| (group.rank(), group.world()));
        let all = Tensor::zeros([rows.len() as i64, self.outputs() as i64], (Kind::Float, device));
        let mut done = 0;
        for batch in evaluation_batches(&lengths, BATCH, rank, world) {
            tch::no_grad(|| {
                let _autocast = bf16.then(|| Autocast::bf16(device));
                let texts: Vec<&[u32]> = batch.iter().map(|&row| &rows[row]).collect();
                let (ids, mask) = inputs(&texts, self.model.config().pad_token_id, device);
                let logits = self.in_order(self.model.forward(&ids, mask.as_ref(), false));
                let places: Vec<i64> = batch.iter().map(|&row| row as i64).collect();
                let places = Tensor::from_slice(&places).to_device(device);
                let _ = all.shallow_clone().index_copy_(0, &places, &logits);
            });
            done += batch.len() * world;
            beat(done.min(rows.len()));
        }
        if let Some(group) = group {
            group.all_reduce_sum(&all)?;
        }
        Ok(all)
    }
}

/// The teacher's output for each of the student's labels; `None`: they are in the same order.
fn columns(teacher: &[String], student: &[String]) -> Result<Option<Tensor>, String> {
    if teacher == student {
        return Ok(None);
    }
    let places: Option<Vec<i64>> =
        student.iter().map(|label| teacher.iter().position(|other| other == label).map(|place| place as i64)).collect();
    match places {
        Some(places) if teacher.len() == student.len() => Ok(Some(Tensor::from_slice(&places))),
        _ => Err(format!("the teacher's labels are {}, the student's {}", teacher.join(", "), student.join(", "))),
    }
}

fn in_words(task: &models::Task) -> &'static str {
    match task {
        models::Task::Classification(_) => "a classifier",
        models::Task::Regression => "a regression model",
        models::Task::MaskedLanguageModel => "a masked language model",
        models::Task::Embedding => "an encoder without a trained head",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_matched_by_name() {
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert!(columns(&names(&["a", "b"]), &names(&["a", "b"])).unwrap().is_none());
        let order = columns(&names(&["a", "b", "c"]), &names(&["c", "a", "b"])).unwrap().unwrap();
        assert_eq!(Vec::<i64>::try_from(order).unwrap(), [2, 0, 1]);
        for other in [names(&["a", "x"]), names(&["a"]), names(&["a", "b", "c"])] {
            assert!(columns(&names(&["a", "b"]), &other).unwrap_err().contains("the teacher's labels are a, b"));
        }
    }
}
