//! The sending task: from the queue to Kafka, or to the spill with one fsync for all that wait.

use std::{sync::Arc, time::Duration};

use athanor_contract::event::Event;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    ProducerError,
    shared::{KafkaState, SendError, Shared, classify},
};

/// How long Kafka may take to acknowledge an event before it goes to disk.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(1);
/// Events handed to Kafka and not acknowledged.
const MAX_IN_FLIGHT: usize = 8_192;
/// Events of one fsync.
const MAX_GROUP: usize = 1_024;

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all commands are events, and a box would be an allocation each")]
pub(super) enum Command {
    Publish(Pending),
    /// Answered when all events before it are kept.
    Flush(oneshot::Sender<()>),
}

/// An event and who waits for it.
#[derive(Debug)]
pub(super) struct Pending {
    pub event: Event,
    pub kept: Option<oneshot::Sender<Result<(), ProducerError>>>,
    /// Its part of the queue, given back when it is kept or lost.
    pub room: OwnedSemaphorePermit,
}

impl Pending {
    fn settle(self, result: Result<(), ProducerError>) {
        if let Err(error) = &result {
            metrics::counter!("athanor_events_dropped_total").increment(1);
            tracing::error!(id = self.event.id, %error, "an event is lost");
        }
        if let Some(kept) = self.kept {
            // A caller that went away no longer wants to know.
            let _ = kept.send(result);
        }
    }
}

type Delivery = (Pending, Result<(), SendError>);

pub(super) struct Dispatcher {
    shared: Arc<Shared>,
    receiver: mpsc::Receiver<Command>,
    shutdown: CancellationToken,
    in_flight: FuturesUnordered<BoxFuture<'static, Delivery>>,
    /// Events that go to disk next.
    unwritten: Vec<Pending>,
    flushes: Vec<oneshot::Sender<()>>,
}

impl Dispatcher {
    pub fn new(shared: Arc<Shared>, receiver: mpsc::Receiver<Command>, shutdown: CancellationToken) -> Self {
        let (in_flight, unwritten, flushes) = Default::default();
        Self { shared, receiver, shutdown, in_flight, unwritten, flushes }
    }

    /// Ends when the queue is closed and everything in it is kept; then cancels `finished`.
    pub async fn run(mut self, finished: CancellationToken) {
        let _finished = finished.drop_guard();
        // The first events wait a moment for Kafka rather than all going to disk.
        let mut state = self.shared.state();
        let known = state.wait_for(|state| *state != KafkaState::Unknown);
        if !matches!(tokio::time::timeout(ACKNOWLEDGE_TIMEOUT, known).await, Ok(Ok(_))) {
            self.shared.set_down("no answer yet");
        }
        let (mut closing, mut ended, mut commands) = (false, false, Vec::new());
        loop {
            self.write().await;
            if self.in_flight.is_empty() {
                for flush in self.flushes.drain(..) {
                    let _ = flush.send(());
                }
                if ended {
                    return;
                }
            }
            // During a flush nothing new is taken: it ends after a timeout at most.
            let takes = !ended && self.flushes.is_empty() && self.in_flight.len() < MAX_IN_FLIGHT;
            tokio::select! {
                Some(delivery) = self.in_flight.next() => self.delivered(delivery),
                count = self.receiver.recv_many(&mut commands, MAX_GROUP), if takes => ended = count == 0,
                () = self.shutdown.cancelled(), if !closing => {
                    closing = true;
                    self.receiver.close();
                }
            }
            for command in commands.drain(..) {
                match command {
                    Command::Publish(pending) => self.send(pending),
                    Command::Flush(flush) => self.flushes.push(flush),
                }
            }
            while let Some(Some(delivery)) = self.in_flight.next().now_or_never() {
                self.delivered(delivery);
            }
        }
    }

    fn send(&mut self, pending: Pending) {
        if !self.shared.is_up() {
            self.unwritten.push(pending);
            return;
        }
        match self.shared.send(&pending.event) {
            Ok(delivery) => self.in_flight.push(
                async move {
                    let result = match tokio::time::timeout(ACKNOWLEDGE_TIMEOUT, delivery).await {
                        Ok(Ok(Ok(_))) => Ok(()),
                        Ok(Ok(Err((error, _)))) => Err(classify(&error)),
                        Ok(Err(_)) => Err(SendError::Unavailable("the client was replaced".into())),
                        Err(_) => Err(SendError::Unavailable("not acknowledged within a second".into())),
                    };
                    (pending, result)
                }
                .boxed(),
            ),
            Err(error) => self.delivered((pending, Err(error))),
        }
    }

    fn delivered(&mut self, (pending, result): Delivery) {
        match result {
            Ok(()) => {
                metrics::counter!("athanor_events_produced_total").increment(1);
                pending.settle(Ok(()));
            }
            Err(SendError::Refused(reason)) => {
                let id = pending.event.id.clone();
                pending.settle(Err(ProducerError::Rejected { id, reason }));
            }
            Err(SendError::Unavailable(reason)) => {
                self.shared.set_down(&reason);
                self.unwritten.push(pending);
            }
        }
    }

    /// Writes what goes to disk, as one group.
    async fn write(&mut self) {
        if self.unwritten.is_empty() {
            return;
        }
        let (events, waiting): (Vec<_>, Vec<_>) =
            self.unwritten.drain(..).map(|it| (it.event, (it.kept, it.room))).unzip();
        let (events, result) = self.shared.append(events).await;
        if result.is_ok() {
            metrics::counter!("athanor_events_spilled_total").increment(events.len() as u64);
        }
        let result = result.map_err(Arc::new);
        for (event, (kept, room)) in events.into_iter().zip(waiting) {
            Pending { event, kept, room }.settle(result.clone().map_err(ProducerError::Spill));
        }
        self.shared.spilled.notify_one();
    }
}
