//! A trained model whose answers are learned from: computed at each step, or once for all rows and kept.

use std::path::Path;

use athanor_contract::{artifact::sha256_hex, train};
use athanor_models::{
    EncoderConfig, Model, Task, Tokenizer, load,
    tokenizer::{SameTokens, TokenRows},
};
use athanor_store::{Location, StoreError};
use athanor_torch::{Autocast, ProcessGroup};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

use super::{Part, masking::Masked};
use crate::{
    TrainError,
    data::batches::{evaluation_batches, inputs},
};

/// Cached answers take at most this many numbers; more of them are computed at each step.
pub const MOST_CACHED: usize = 1 << 26;
/// Rows of one forward pass; without gradients memory is no concern, and the rows are sorted by length.
const BATCH: usize = 64;
/// Name of the answers in their file.
const LOGITS: &str = "logits";

/// Answers for the training rows.
pub enum Teacher {
    /// Logits of all rows, [rows, L], in the student's order of labels.
    Cached(Tensor),
    Online(Box<Online>),
}

/// A teacher that answers at each step.
pub struct Online {
    model: Model,
    tokenizer: Tokenizer,
    /// The teacher's output for each of the student's labels; absent: the same order.
    columns: Option<Tensor>,
    /// The training rows in the teacher's tokens; absent: both read the same tokens.
    ids: Option<TokenRows>,
    /// The student's tokenizer, where the hidden states of tokens are compared though the vocabularies differ.
    compared: Option<Tokenizer>,
    max_length: usize,
}

/// What a teacher says of some rows.
pub struct Answer {
    /// [B, L], or of masked tokens [N, V]; empty for tasks without logits.
    pub logits: Tensor,
    /// Hidden states [B, T, C] of the first layer's input and each layer's output; empty where they were not asked for.
    pub states: Vec<Tensor>,
    embedding: Option<Tensor>,
}

impl Answer {
    /// [B, C].
    pub fn embedding(&self) -> Tensor {
        self.embedding.as_ref().map(Tensor::shallow_clone).unwrap_or_default()
    }
}

/// What a student must fit.
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
    /// A teacher for another task, of other labels, or of another vocabulary where it predicts tokens is the user's to mend.
    pub fn load(folder: &Path, student: &Student, device: Device) -> Result<Self, TrainError> {
        let refused = |message: String| TrainError::User(format!("teacher.from: {message}"));
        let model = Model::load_trained(folder, device)?;
        let fits = matches!(
            (student.task, model.task()),
            (train::Task::TextClassification, Task::Classification(_))
                | (train::Task::TextRegression, Task::Regression)
                | (train::Task::MaskedLanguageModel, Task::MaskedLanguageModel)
                | (train::Task::Embedding, _)
        );
        if !fits {
            return Err(refused(format!("the teacher is {}, the task is {:?}", in_words(model.task()), student.task)));
        }
        let columns = match model.task() {
            Task::Classification(labels) if student.task == train::Task::TextClassification => {
                columns(labels, student.labels).map_err(refused)?
            }
            _ => None,
        };
        let same_tokens = vocabulary(folder)? == vocabulary(student.folder)?;
        if !same_tokens && student.task == train::Task::MaskedLanguageModel {
            return Err(refused("its vocabulary is not the student's, so that its tokens are no labels for it".into()));
        }
        let (own, wanted) = (model.config().vocab_size, EncoderConfig::load(student.folder)?.vocab_size);
        if student.task == train::Task::MaskedLanguageModel && own != wanted {
            return Err(refused(format!(
                "it tells {own} tokens apart, the student {wanted} (vocab_size in config.json), though their words are the same"
            )));
        }
        let max_length = student.max_length.min(model.config().max_length());
        if (same_tokens || student.by_token) && max_length < student.max_length {
            return Err(refused(format!(
                "it reads at most {max_length} tokens: set hyperparameters.maxSequenceLength to that"
            )));
        }
        let ids = if same_tokens { None } else { Some(TokenRows::default()) };
        let compared = (student.by_token && !same_tokens).then(|| Tokenizer::load(student.folder)).transpose()?;
        Ok(Self { model, tokenizer: Tokenizer::load(folder)?, columns, ids, compared, max_length })
    }

    /// Where hidden states are compared, both must cut every row into the same tokens. `rows` are the training rows in the student's
    /// tokens, `place` says where one came from.
    ///
    /// # Errors
    /// A row that is cut otherwise is the user's to mend, with another teacher or objective.
    pub fn check_tokens(&self, rows: &TokenRows, place: impl Fn(usize) -> String) -> Result<(), TrainError> {
        let (Some(tokenizer), Some(own)) = (&self.compared, &self.ids) else { return Ok(()) };
        let same = SameTokens::new(tokenizer, &self.tokenizer);
        for (row, (students, teachers)) in rows.iter().zip(own.iter()).enumerate() {
            let Some(at) = same.first_difference(students, teachers) else { continue };
            let token = |ids: &[u32], tokenizer: &Tokenizer| match ids.get(at) {
                Some(&id) => format!("{:?}", tokenizer.token(id)),
                None => "no more".to_owned(),
            };
            let (students, teachers) = (token(students, tokenizer), token(teachers, &self.tokenizer));
            return Err(TrainError::User(format!(
                "teacher.from: hiddenState compares the tokens of each text one by one, but of {} the student's token {} is \
                 {students}, the teacher's {teachers}",
                place(row),
                at + 1,
            )));
        }
        Ok(())
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

    /// The training rows in the teacher's tokens, where they are not the student's.
    pub fn own_rows(&self) -> Option<&TokenRows> {
        self.ids.as_ref()
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
            Task::Classification(labels) => labels.len(),
            _ => 1,
        }
    }

    fn in_order(&self, logits: Tensor) -> Tensor {
        match &self.columns {
            Some(columns) => logits.index_select(1, columns),
            None => logits,
        }
    }

    fn answer(&self, part: &Part, ids: &Tensor, mask: Option<&Tensor>, every: bool, masked: Option<&Masked>) -> Answer {
        tch::no_grad(|| {
            let own = self.ids.as_ref().map(|own| {
                let texts: Vec<&[u32]> = part.rows.iter().map(|&row| &own[row]).collect();
                inputs(&texts, self.model.config().pad_token_id, part.device)
            });
            let (ids, mask) = match &own {
                Some((ids, mask)) => (ids, mask.as_ref()),
                None => (ids, mask),
            };
            let states = if every || part.train.pairs.is_some() {
                self.model.hidden_states(ids, mask, false, every)
            } else {
                vec![self.model.head_states(ids, mask, false)]
            };
            let last = &states[states.len() - 1];
            let (mut logits, mut embedding) = (Tensor::new(), None);
            match (self.model.task(), masked) {
                (Task::MaskedLanguageModel, Some(masked)) => {
                    logits = self.model.vocabulary_logits(&masked.tokens(last))
                }
                (Task::Classification(_) | Task::Regression, None) => {
                    logits = self.in_order(self.model.outputs(last, false));
                }
                _ => {}
            }
            if part.train.pairs.is_some() {
                embedding = Some(self.model.embedding(last, mask));
            }
            Answer { logits, states, embedding }
        })
    }

    /// Logits of all training rows, [rows, L] in FP32, each rank computing its part. `student_ids` are the rows in the student's
    /// tokens; `beat` is called after each batch with the rows done.
    pub fn all_logits(
        &self,
        student_ids: &TokenRows,
        group: Option<&ProcessGroup>,
        device: Device,
        bf16: bool,
        mut beat: impl FnMut(usize),
    ) -> Result<Tensor, TrainError> {
        let rows = self.own_rows().unwrap_or(student_ids);
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

impl Teacher {
    /// Shape of the teacher that answers at each step.
    pub fn config(&self) -> Option<&EncoderConfig> {
        match self {
            Self::Cached(_) => None,
            Self::Online(online) => Some(online.config()),
        }
    }

    /// The answer for the rows of a part, which the student reads as `ids` and `mask`.
    pub fn answer(
        &self,
        part: &Part,
        ids: &Tensor,
        mask: Option<&Tensor>,
        every: bool,
        masked: Option<&Masked>,
    ) -> Answer {
        match self {
            Self::Online(online) => online.answer(part, ids, mask, every, masked),
            Self::Cached(logits) => {
                let rows: Vec<i64> = part.rows.iter().map(|&row| row as i64).collect();
                let rows = Tensor::from_slice(&rows).to_device(part.device);
                Answer { logits: logits.index_select(0, &rows), states: Vec::new(), embedding: None }
            }
        }
    }
}

/// Where answers are kept: beside the outputs of all jobs of a folder, named by all that they follow from.
pub fn cached_at(output: &Location, teacher: &Path, identity: &impl serde::Serialize) -> Result<Location, TrainError> {
    let mut parts = Vec::new();
    for name in [load::WEIGHTS, "tokenizer.json", "config.json"] {
        let path = teacher.join(name);
        parts.push(sha256_hex(&std::fs::read(&path).map_err(TrainError::at(&path))?));
    }
    let digest = sha256_hex(&serde_json::to_vec(&(parts, identity)).map_err(TrainError::other)?);
    Ok(output.child(&format!("teacher-outputs/{}.safetensors", &digest[..32])))
}

/// Answers [rows, outputs] that were kept, if every rank finds them: a rank that computes them waits for the others' sums.
pub fn read_kept(
    place: &Location,
    [rows, outputs]: [usize; 2],
    runtime: &Handle,
    group: Option<&ProcessGroup>,
    device: Device,
    work: &Path,
) -> Result<Option<Tensor>, TrainError> {
    let kept = runtime.block_on(read_cached(place, rows, outputs, work))?;
    let found = Tensor::from_slice(&[i64::from(kept.is_some())]).to_device(device);
    if let Some(group) = group {
        group.all_reduce_sum(&found)?;
    }
    let by_all = found.int64_value(&[0]) == group.map_or(1, ProcessGroup::world) as i64;
    let kept = kept.filter(|_| by_all);
    if kept.is_some() {
        tracing::info!(uri = place.uri, "the teacher's answers were kept from another run");
    }
    Ok(kept)
}

/// Answers that were kept, if they are whole.
async fn read_cached(from: &Location, rows: usize, outputs: usize, work: &Path) -> Result<Option<Tensor>, TrainError> {
    let bytes = match from.read().await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let file = work.join("teacher-outputs.safetensors");
    tokio::fs::write(&file, &bytes).await.map_err(TrainError::at(&file))?;
    let shape = [rows as i64, outputs as i64];
    match load::Weights::load(&file, Device::Cpu).and_then(|mut weights| weights.take(LOGITS, &shape)) {
        Ok(logits) => Ok(Some(logits)),
        Err(error) => {
            tracing::warn!(%error, uri = from.uri, "the teacher's kept answers cannot be used: they are computed again");
            Ok(None)
        }
    }
}

/// Keeps answers for later runs.
pub async fn write_cached(to: &Location, logits: &Tensor, work: &Path) -> Result<(), TrainError> {
    let file = work.join("teacher-outputs.safetensors");
    // A local disk's trouble is not the user's error.
    load::save(&file, &[(LOGITS.to_owned(), logits.shallow_clone())]).map_err(TrainError::other)?;
    let bytes = tokio::fs::read(&file).await.map_err(TrainError::at(&file))?;
    to.write(bytes.into()).await?;
    Ok(())
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

fn in_words(task: &Task) -> &'static str {
    match task {
        Task::Classification(_) => "a classifier",
        Task::Regression => "a model of numbers",
        Task::MaskedLanguageModel => "a masked language model",
        Task::Embedding => "an encoder without a trained head",
    }
}

/// The vocabulary part of a folder's tokenizer, for comparison.
fn vocabulary(folder: &Path) -> Result<String, TrainError> {
    let path = folder.join("tokenizer.json");
    let bytes = std::fs::read(&path).map_err(|error| TrainError::User(format!("{}: {error}", path.display())))?;
    let whole: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|error| TrainError::User(format!("{}: not JSON: {error}", path.display())))?;
    Ok(sha256_hex(whole["model"]["vocab"].to_string().as_bytes()))
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
