//! What a client and the engine's thread exchange.

use std::{
    sync::atomic::{AtomicU64, AtomicUsize},
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{
    adapters::Adapter,
    constraint::{Constraint, ConstraintError},
    sampling::{Invalid, LogitsError, Logprobs, Sampled, Sampling},
    sequence::{FinishReason, Stopping},
};
use crate::engine::backend::{AdapterId, AdapterWeights, BackendError};

/// One prompt with one or more answers.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    pub prompt: Vec<u32>,
    /// Number of answers. Answer `i` is drawn with the seed plus `i`.
    pub choices: usize,
    pub sampling: Sampling,
    pub stopping: Stopping,
    /// What the answers must follow; each has its own copy. Absent: anything.
    pub constraint: Option<Box<dyn Constraint>>,
    /// Number of most probable tokens to report with the log-probability of each prompt token; absent: none is reported.
    /// Such a prompt is computed for each choice, without the prefix cache. Only with it may `max_tokens` be 0.
    pub prompt_logprobs: Option<usize>,
    /// Absent: the model's own weights.
    pub adapter: Option<Adapter>,
}

/// The events of one answer. The last one is `Event::Finished` or an error; a channel that closes without either means
/// that the engine has stopped ([`GenerateError::Stopped`]).
pub type Choice = mpsc::Receiver<Result<Event, GenerateError>>;

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The first event: the sequence runs, and the prefix cache had this many tokens of its prompt.
    Admitted {
        cached_tokens: usize,
    },
    /// Log-probabilities of the prompt's tokens behind the first one, once, before the first token.
    Prompt(Vec<Logprobs>),
    Token(Sampled),
    Finished(Finished),
}

/// The end of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    pub reason: FinishReason,
    /// Number of prompt tokens that the prefix cache had.
    pub cached_tokens: usize,
    /// Time from the request to its admission.
    pub queued: Duration,
    /// Time from the admission to the end.
    pub computed: Duration,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum GenerateError {
    /// The client can try again after `retry_after` seconds.
    #[error("the queue is full: at most {capacity} sequences wait")]
    QueueFull { capacity: usize, retry_after: u64 },
    /// A sequence would wait longer than the engine lets it. The client can try again after `retry_after` seconds.
    #[error("the queue is full: the expected wait is {expected:.1} s; at most {limit} s")]
    LongWait { expected: f64, limit: f64, retry_after: u64 },
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("{prompt} tokens of prompt and {max_tokens} of answer exceed the context of {limit} tokens")]
    TooLong { prompt: usize, max_tokens: usize, limit: usize },
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(transparent)]
    Logits(#[from] LogitsError),
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    #[error("the model failed: {0}")]
    Backend(String),
    #[error("the adapter cannot be used: {0}")]
    Adapter(String),
    #[error("the answer was not complete after {seconds} s")]
    TimedOut { seconds: u64 },
    /// The thread has ended; the process should end as well.
    #[error("the engine has stopped")]
    Stopped,
}

impl GenerateError {
    /// Seconds after which the client should try again, if the engine has too much to do.
    pub fn retry_after(&self) -> Option<u64> {
        match self {
            Self::QueueFull { retry_after, .. } | Self::LongWait { retry_after, .. } => Some(*retry_after),
            _ => None,
        }
    }
}

impl From<BackendError> for GenerateError {
    fn from(error: BackendError) -> Self {
        Self::Backend(error.0)
    }
}

/// What the thread publishes about itself.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) running: AtomicUsize,
    pub(super) used_blocks: AtomicUsize,
    /// How many more sequences can run at once; 0 while sequences wait for room.
    pub(super) free: AtomicUsize,
    /// Bits of the mean time between two admissions, an `f64` in seconds.
    pub(super) interval: AtomicU64,
}

/// A place in the queue, given back when the sequence is admitted or its request goes away.
pub(super) struct Place(#[expect(dead_code, reason = "held, never read")] OwnedSemaphorePermit);

impl Place {
    pub(super) fn new(permit: OwnedSemaphorePermit) -> Self {
        metrics::gauge!("athanor_server_queue_inputs").increment(1.0);
        Self(permit)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::gauge!("athanor_server_queue_inputs").decrement(1.0);
    }
}

/// What the thread is sent.
pub(super) enum Message {
    Request(Box<Item>),
    /// Loads an adapter and reports whether the model took it.
    Load {
        id: AdapterId,
        weights: AdapterWeights,
        reply: oneshot::Sender<Result<(), BackendError>>,
    },
    Unload(AdapterId),
}

/// A request on its way to the thread: one reply and one place for each choice.
pub(super) struct Item {
    pub(super) request: GenerateRequest,
    pub(super) since: Instant,
    pub(super) replies: Vec<(mpsc::Sender<Result<Event, GenerateError>>, Place)>,
}
