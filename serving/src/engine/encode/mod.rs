//! The engine: one thread owns the model; requests wait in a bounded queue and share batches as they come.
//!
//! It maps token ids to logits. Tokenizers, labels and wire types sit above it ([`crate::service`]), devices and weights below
//! ([`EncodeBackend`]). While a batch runs, others queue; the next batches are planned from all that waits, so the batch size follows the
//! load and a lone request never waits for company.

pub mod batch;

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use athanor_contract::serve::ServeLimits;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use batch::BatchLimits;

use super::backend::{BackendError, EncodeBackend};

/// Batches planned at once: more lets lengths sort better, fewer lets newcomers join sooner.
const BATCHES_PER_PLAN: usize = 4;

#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// Try again a little later.
    #[error("the queue is full: {capacity} inputs wait")]
    QueueFull { capacity: usize },
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The thread has ended; the process should too.
    #[error("the engine has stopped")]
    Stopped,
}

/// What became of one input.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// `[labels]`
    pub logits: Vec<f32>,
    /// Time spent waiting for a batch.
    pub queued: Duration,
    /// Time the batch took.
    pub computed: Duration,
    /// Inputs in that batch.
    pub batch_inputs: usize,
}

struct Item {
    ids: Vec<u32>,
    since: Instant,
    reply: oneshot::Sender<Result<Output, EngineError>>,
    place: Option<Place>,
}

/// A place in the queue, given back when a batch takes the input or its request goes away.
struct Place(#[expect(dead_code, reason = "held, never read")] OwnedSemaphorePermit);

impl Place {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        metrics::gauge!("athanor_server_queue_inputs").increment(1.0);
        Self(permit)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::gauge!("athanor_server_queue_inputs").decrement(1.0);
    }
}

/// Places in the queue for the inputs of one request, taken by [`Engine::reserve`].
pub struct Places(Vec<Place>);

/// A handle to the engine's thread, which ends when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    // Unbounded, but an item needs a place first, so it holds at most `capacity` of them.
    sender: mpsc::UnboundedSender<Item>,
    places: Arc<Semaphore>,
    capacity: usize,
    stopped: CancellationToken,
}

impl Engine {
    /// Starts the thread.
    pub fn start(backend: impl EncodeBackend, limits: &ServeLimits) -> std::io::Result<Self> {
        let capacity = limits.queue_inputs.max(limits.max_inputs);
        let (sender, receiver) = mpsc::unbounded_channel();
        let stopped = CancellationToken::new();
        let batch = BatchLimits {
            inputs: limits.max_batch_inputs.max(1),
            tokens: limits.max_batch_tokens,
            call_cost: backend.call_cost(),
        };
        // Dropped with the thread, also when it panics.
        let alive = stopped.clone().drop_guard();
        thread::Builder::new().name("engine".into()).spawn(move || {
            let _alive = alive;
            work(backend, receiver, batch);
        })?;
        Ok(Self { sender, places: Arc::new(Semaphore::new(capacity)), capacity, stopped })
    }

    /// Takes places for `inputs` inputs, or fails at once if the queue has fewer. Callers reserve before they tokenise, so that a
    /// request that is refused costs nothing.
    pub fn reserve(&self, inputs: usize) -> Result<Places, EngineError> {
        let full = |_| EngineError::QueueFull { capacity: self.capacity };
        let count = u32::try_from(inputs).unwrap_or(u32::MAX);
        let mut permits = self.places.clone().try_acquire_many_owned(count).map_err(full)?;
        Ok(Places((0..inputs).filter_map(|_| permits.split(1)).map(Place::new).collect()))
    }

    /// Runs the inputs of one request, one row for each of its `places`, in order; they may be spread over batches and share them
    /// with other requests. A dropped future gives up its inputs that no batch has taken yet.
    pub async fn run(&self, places: Places, rows: Vec<Vec<u32>>) -> Result<Vec<Output>, EngineError> {
        let since = Instant::now();
        let mut replies = Vec::with_capacity(rows.len());
        let mut places = places.0.into_iter();
        for ids in rows {
            let (reply, receiver) = oneshot::channel();
            let place = places.next();
            self.sender.send(Item { ids, since, reply, place }).map_err(|_| EngineError::Stopped)?;
            replies.push(receiver);
        }
        let mut outputs = Vec::with_capacity(replies.len());
        for reply in replies {
            outputs.push(reply.await.map_err(|_| EngineError::Stopped)??);
        }
        Ok(outputs)
    }

    /// Inputs that wait for a batch.
    pub fn waiting(&self) -> usize {
        self.capacity - self.places.available_permits()
    }

    /// Resolves when the thread has ended, which it does only by a fault while handles exist.
    pub async fn stopped(&self) {
        self.stopped.cancelled().await;
    }
}

fn work(mut backend: impl EncodeBackend, mut receiver: mpsc::UnboundedReceiver<Item>, limits: BatchLimits) {
    let most = limits.inputs * BATCHES_PER_PLAN;
    while let Some(first) = receiver.blocking_recv() {
        let mut waiting = vec![first];
        while waiting.len() < most
            && let Ok(item) = receiver.try_recv()
        {
            waiting.push(item);
        }
        // Nobody reads the answer of a request that went away.
        waiting.retain(|item| !item.reply.is_closed());
        let lengths: Vec<usize> = waiting.iter().map(|item| item.ids.len()).collect();
        let mut waiting: Vec<Option<Item>> = waiting.into_iter().map(Some).collect();
        for indices in batch::plan(&lengths, limits) {
            let items: Vec<Item> = indices.into_iter().filter_map(|index| waiting[index].take()).collect();
            run_batch(&mut backend, items);
        }
    }
}

fn run_batch(backend: &mut impl EncodeBackend, mut items: Vec<Item>) {
    let started = Instant::now();
    for item in &mut items {
        item.place.take();
    }
    let queued = items.iter().map(|item| started.saturating_duration_since(item.since));
    queued.for_each(|queued| metrics::histogram!("athanor_server_queue_seconds").record(queued.as_secs_f64()));
    let rows: Vec<&[u32]> = items.iter().map(|item| item.ids.as_slice()).collect();
    let tokens: usize = rows.iter().map(|row| row.len()).sum();
    metrics::histogram!("athanor_server_batch_inputs").record(rows.len() as f64);
    metrics::counter!("athanor_server_tokens_total", "kind" => "prompt").increment(tokens as u64);
    let logits = backend.forward(&rows).and_then(|logits| match logits.len() == rows.len() {
        true => Ok(logits),
        false => Err(BackendError(format!("{} rows of logits for {} inputs", logits.len(), rows.len()))),
    });
    let computed = started.elapsed();
    metrics::histogram!("athanor_server_batch_seconds").record(computed.as_secs_f64());
    let batch_inputs = items.len();
    let mut logits = match logits {
        Ok(logits) => logits.into_iter().map(Ok).collect::<Vec<_>>(),
        Err(error) => {
            tracing::error!(%error, inputs = batch_inputs, "a batch failed");
            vec![Err(error); batch_inputs]
        }
    }
    .into_iter();
    for item in items {
        let answer = match logits.next() {
            Some(Ok(row)) => Ok(Output {
                logits: row,
                queued: started.saturating_duration_since(item.since),
                computed,
                batch_inputs,
            }),
            Some(Err(error)) => Err(EngineError::Backend(error)),
            None => Err(EngineError::Stopped),
        };
        // The request may have gone away meanwhile.
        let _ = item.reply.send(answer);
    }
}

#[cfg(test)]
mod tests;
