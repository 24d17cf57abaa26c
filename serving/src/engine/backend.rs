//! What an engine requires of a model on a device.

use std::{fmt, ops, sync::Arc, time::Instant};

/// A model that reads each input once.
pub trait EncodeBackend: Send + 'static {
    /// Logits `[batch, labels]` of token ids `[batch, differing lengths]`; the backend pads if it has to.
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError>;

    /// Fixed cost of a call, expressed as the number of tokens that take as long. `None`: inputs are not padded, so one call
    /// costs less than two whatever the lengths.
    fn call_cost(&self) -> Option<usize> {
        Some(16)
    }
}

/// The model could not answer a batch.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the model failed: {0}")]
pub struct BackendError(pub String);

/// A model that continues texts over a paged cache of keys and values.
///
/// The cache consists of `blocks` blocks of `block_size` positions. The engine owns the block tables; the backend owns
/// the tensors.
pub trait GenerateBackend: Send + 'static {
    fn limits(&self) -> GenerateLimits;

    /// Runs one step over all rows. Keys and values of every row are written before any row reads them. Returns one
    /// entry per row, in order.
    ///
    /// An error fails every request of the step; the engine continues with the others.
    fn step(&mut self, rows: &[Row<'_>]) -> Result<Vec<RowOutput>, BackendError>;

    /// Whether a row may want the logits of several tokens, so that the engine checks proposed tokens. Such logits must be
    /// the same, to the last bit, as if each token were computed in a step of its own: otherwise answers would depend on
    /// what is proposed.
    fn checks_proposals(&self) -> bool {
        false
    }

    /// The clock that times steps, from which the engine learns what rows cost.
    fn now(&self) -> Instant {
        Instant::now()
    }

    /// Takes an adapter, which rows name by `id` from now on. Called between steps.
    ///
    /// # Errors
    /// The adapter does not fit the model, or the model takes no adapters.
    fn load_adapter(&mut self, _id: AdapterId, _adapter: AdapterWeights) -> Result<(), BackendError> {
        Err(BackendError("this model takes no adapters".into()))
    }

    /// Drops an adapter, which no later row names. An unknown one is ignored.
    fn unload_adapter(&mut self, _id: AdapterId) {}
}

/// Identity of an adapter within an engine. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u64);

/// A low-rank adapter (LoRA): what is added to the products of some linear layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterWeights {
    pub modules: Vec<LowRank>,
}

/// The update of one linear layer, `scale * (x A^T) B^T`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LowRank {
    /// Name of the layer in the model, such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    pub rank: usize,
    /// A, [rank, inputs].
    pub a: Vec<f32>,
    /// B, [outputs, rank].
    pub b: Vec<f32>,
    pub scale: f32,
}

/// Sizes of a generating model and of its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerateLimits {
    /// Number of blocks in the cache.
    pub blocks: usize,
    /// Number of positions in a block.
    pub block_size: usize,
    /// Largest number of tokens of a sequence, prompt and answer together.
    pub max_length: usize,
    /// Number of entries in a row of logits.
    pub vocabulary: usize,
}

/// Consecutive tokens of one sequence that a step computes.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    pub tokens: &'a [u32],
    /// Position of the first token.
    pub start: usize,
    /// Block table of the sequence: position `p` is stored in block `blocks[p / block_size]`. It covers at least
    /// `start + tokens.len()` positions.
    pub blocks: &'a [u32],
    /// Number of last tokens whose logits are wanted. More than one only of a backend that checks proposals, in a row
    /// without targets.
    pub logits: usize,
    /// Tokens whose log-probabilities are wanted: `targets[i]` stands behind `tokens[i]`. Empty for most rows.
    pub targets: &'a [u32],
    /// Number of most probable tokens to report in the place of each target.
    pub top: usize,
    /// Adapter of the sequence. Absent: the model's own weights.
    pub adapter: Option<AdapterId>,
}

/// What a step returns for a row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowOutput {
    /// Logits `[vocabulary]` of each of the row's last tokens that wants them, in order.
    pub logits: Vec<Logits>,
    /// Log-probabilities of the row's targets, in order. A long prompt has many targets, so a backend computes these
    /// without the logits of all of them at once.
    pub targets: Vec<Logprobs>,
}

/// Logits of a row, within a buffer that the rows of a step share: a copy of each would take longer than a draw.
#[derive(Clone, Default)]
pub struct Logits {
    all: Arc<Vec<f32>>,
    range: ops::Range<usize>,
}

impl Logits {
    /// The rows of `all`, `[rows, vocabulary]`. The buffer can be written again when all of them are dropped.
    pub fn rows(all: &Arc<Vec<f32>>, vocabulary: usize) -> impl Iterator<Item = Self> {
        let vocabulary = vocabulary.max(1);
        let starts = (0..all.len() / vocabulary).map(move |row| row * vocabulary);
        starts.map(move |start| Self { all: all.clone(), range: start..start + vocabulary })
    }
}

impl From<Vec<f32>> for Logits {
    fn from(logits: Vec<f32>) -> Self {
        Self { range: 0..logits.len(), all: logits.into() }
    }
}

impl ops::Deref for Logits {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.all[self.range.clone()]
    }
}

impl PartialEq for Logits {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Logits {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(formatter)
    }
}

/// Log-probabilities of the model's own distribution, before bias, penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// That of the token that stands there.
    pub chosen: f32,
    /// The most probable tokens, the most probable first.
    pub top: Vec<(u32, f32)>,
}
