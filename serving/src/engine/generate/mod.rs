//! The generating engine: one thread owns the model and computes, in every step, tokens of all sequences that fit.
//!
//! - [`blocks`] and [`scheduler`] decide, without clock, thread or model, which tokens a step computes and where they
//!   are stored;
//! - [`sampling`] chooses tokens from logits, `draw` for several sequences at a time;
//! - [`sequence`] holds one answer in progress;
//! - [`speculate`] proposes tokens that may come next and decides how many of them a step checks;
//! - [`constraint`] restricts the tokens of an answer, such as to JSON of a schema;
//! - [`adapters`] keeps the model's adapters loaded as long as they are used;
//! - [`wait`] estimates how long a new request waits, by which it is accepted or refused;
//! - [`request`] is what a client and the thread exchange; `worker` is the thread.
//!
//! An answer does not depend on the other requests in its batch, as far as the backend's logits do not.
//!
//! Every choice of a request has a channel with room for its longest answer. So a slow reader never delays another
//! request, and what it leaves unread is bounded by `max_tokens`. A dropped receiver ends the sequence before the next
//! step and frees its blocks.

pub mod adapters;
pub mod blocks;
pub mod constraint;
mod draw;
mod meters;
pub mod request;
pub mod sampling;
pub mod scheduler;
pub mod sequence;
pub mod speculate;
pub mod wait;
mod worker;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use self::{
    adapters::Adapter,
    request::{Choice, Event, Finished, GenerateError, GenerateRequest},
};
use self::{
    adapters::Usage,
    meters::Meters,
    request::{Item, Message, Place, Progress},
    sampling::{Invalid, MOST_ALTERNATIVES},
    scheduler::StepLimits,
    wait::Queue,
};
use super::backend::{AdapterId, AdapterWeights, GenerateBackend, GenerateLimits};

/// Bounds of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Largest number of sequences that wait to be admitted.
    pub queue: usize,
    /// Longest expected wait of a sequence.
    pub wait: Duration,
    pub step: StepLimits,
}

/// What the engine does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Number of sequences that wait to be admitted, those whose prompts are being tokenised included.
    pub waiting: usize,
    pub running: usize,
    pub used_blocks: usize,
}

/// Places in the queue for the sequences of one request, taken by [`Engine::reserve`].
pub struct Places(Vec<Place>);

/// A handle to the engine's thread, which ends when the last handle is dropped and all answers are complete.
#[derive(Clone)]
pub struct Engine {
    // Unbounded, but an item needs places first, so it holds at most `capacity` sequences.
    sender: mpsc::UnboundedSender<Message>,
    places: Arc<Semaphore>,
    capacity: usize,
    wait: Duration,
    limits: GenerateLimits,
    progress: Arc<Progress>,
    stopped: CancellationToken,
    model: Arc<str>,
    /// Number of adapters so far, of which the identities are made.
    adapters: Arc<AtomicU64>,
}

impl Engine {
    /// Starts the thread.
    ///
    /// `model`: the name that its metrics have.
    pub fn start(backend: impl GenerateBackend, limits: EngineLimits, model: &str) -> std::io::Result<Self> {
        let capacity = limits.queue.clamp(1, Semaphore::MAX_PERMITS);
        let (sender, receiver) = mpsc::unbounded_channel();
        let stopped = CancellationToken::new();
        let progress = Arc::<Progress>::default();
        let mut sizes = backend.limits();
        sizes.block_size = sizes.block_size.max(1);
        let meters = (Meters::new(model), Usage::new(model, limits.step.sequences.max(1)));
        let worker = worker::Worker::new(backend, receiver, sizes, limits.step, progress.clone(), meters);
        // Dropped with the thread, also when it panics.
        let alive = stopped.clone().drop_guard();
        metrics::gauge!("athanor_server_wait_limit_seconds").set(limits.wait.as_secs_f64());
        thread::Builder::new().name("generate".into()).spawn(move || {
            let _alive = alive;
            worker.run();
        })?;
        let places = Arc::new(Semaphore::new(capacity));
        let (model, adapters) = (model.into(), Arc::default());
        Ok(Self { sender, places, capacity, wait: limits.wait, limits: sizes, progress, stopped, model, adapters })
    }

    /// Loads an adapter between two steps; requests name it by the returned handle.
    ///
    /// # Errors
    /// [`GenerateError::Adapter`] if the adapter does not fit the model.
    pub async fn load_adapter(&self, name: &str, weights: AdapterWeights) -> Result<Adapter, GenerateError> {
        let id = AdapterId(self.adapters.fetch_add(1, Ordering::Relaxed));
        // Weak, so that adapters do not keep the thread alive. Without the thread there is no model to unload from.
        let thread = self.sender.downgrade();
        let adapter = Adapter::new(id, name, move |id| {
            if let Some(thread) = thread.upgrade() {
                let _ = thread.send(Message::Unload(id));
            }
        });
        let (reply, loaded) = oneshot::channel();
        self.sender.send(Message::Load { id, weights, reply }).map_err(|_| GenerateError::Stopped)?;
        let loaded = loaded.await.map_err(|_| GenerateError::Stopped)?;
        loaded.map_err(|error| GenerateError::Adapter(error.0))?;
        Ok(adapter)
    }

    /// Name of the model.
    pub fn model(&self) -> &Arc<str> {
        &self.model
    }

    /// Largest number of tokens of prompt and answer together.
    pub fn max_length(&self) -> usize {
        self.limits.max_length.min(self.limits.blocks * self.limits.block_size)
    }

    /// Number of tokens in the vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.limits.vocabulary
    }

    /// Takes places for `sequences` sequences, or fails at once if the queue has fewer or the expected wait is too long.
    /// Callers reserve before they tokenise, so that a request that is refused costs nothing. While nothing waits only
    /// the number of places counts.
    pub fn reserve(&self, sequences: usize) -> Result<Places, GenerateError> {
        let queue = self.queue();
        let (expected, retry_after) = (queue.expected_wait(), queue.retry_after());
        if expected > self.wait {
            let (expected, limit) = (expected.as_secs_f64(), self.wait.as_secs_f64());
            return Err(GenerateError::LongWait { expected, limit, retry_after });
        }
        let full = GenerateError::QueueFull { capacity: self.capacity, retry_after };
        let count = u32::try_from(sequences).map_err(|_| full.clone())?;
        let mut permits = self.places.clone().try_acquire_many_owned(count).map_err(|_| full)?;
        Ok(Places((0..sequences).filter_map(|_| permits.split(1)).map(Place::new).collect()))
    }

    /// Queues a request, which takes one of the places for each choice. Returns one channel for each choice, or an error
    /// at once if the request can never be served or there are too few places.
    pub fn submit(&self, places: &mut Places, request: GenerateRequest) -> Result<Vec<Choice>, GenerateError> {
        self.check(&request)?;
        let first = places.0.len().checked_sub(request.choices);
        let first = first.ok_or(GenerateError::QueueFull { capacity: self.capacity, retry_after: 1 })?;
        let mut choices = Vec::with_capacity(request.choices);
        let mut replies = Vec::with_capacity(request.choices);
        for place in places.0.drain(first..) {
            let (sender, receiver) = mpsc::channel(request.stopping.max_tokens + 3);
            choices.push(receiver);
            replies.push((sender, place));
        }
        let item = Item { request, since: Instant::now(), replies };
        self.sender.send(Message::Request(Box::new(item))).map_err(|_| GenerateError::Stopped)?;
        Ok(choices)
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), GenerateError> {
        let vocabulary = self.limits.vocabulary;
        if request.prompt.is_empty() {
            return Err(GenerateError::EmptyPrompt);
        }
        if let Some(token) = request.prompt.iter().find(|&&token| token as usize >= vocabulary) {
            let message = format!("token {token}; the vocabulary has {vocabulary} tokens");
            return Err(Invalid::new("prompt", message).into());
        }
        if request.choices == 0 {
            return Err(Invalid::new("n", "0 is less than 1").into());
        }
        let (prompt, max_tokens) = (request.prompt.len(), request.stopping.max_tokens);
        if max_tokens == 0 && request.prompt_logprobs.is_none() {
            return Err(Invalid::new("max_tokens", "0 is less than 1").into());
        }
        request.sampling.check(vocabulary)?;
        if request.prompt_logprobs.is_some_and(|count| count > MOST_ALTERNATIVES) {
            return Err(Invalid::new("logprobs", format!("more than {MOST_ALTERNATIVES}")).into());
        }
        let limit = self.max_length();
        if prompt.saturating_add(max_tokens) > limit {
            return Err(GenerateError::TooLong { prompt, max_tokens, limit });
        }
        Ok(())
    }

    fn waiting(&self) -> usize {
        self.capacity - self.places.available_permits()
    }

    /// What a request finds that arrives now.
    fn queue(&self) -> Queue {
        Queue {
            waiting: self.waiting(),
            free: self.progress.free.load(Ordering::Relaxed),
            interval: f64::from_bits(self.progress.interval.load(Ordering::Relaxed)),
        }
    }

    pub fn load(&self) -> Load {
        Load {
            waiting: self.waiting(),
            running: self.progress.running.load(Ordering::Relaxed),
            used_blocks: self.progress.used_blocks.load(Ordering::Relaxed),
        }
    }

    /// Resolves when the thread has ended, which it does only by a fault while handles exist.
    pub async fn stopped(&self) {
        self.stopped.cancelled().await;
    }
}

#[cfg(test)]
mod tests;
