//! Publishing events without losing one that was acknowledged, and without making a request wait for Kafka.
//!
//! Events go through one bounded queue to one task. It hands them to Kafka (acks=all, idempotent); what Kafka does not acknowledge
//! within a second goes to the [`spill`](crate::spill) on disk, and while Kafka is known to be away everything goes there at once.
//! A second task creates the topic, notices when Kafka is back, and replays spilled segments in order.
//!
//! An event may reach Kafka twice (a late acknowledgement, a crash during a replay) and, after an outage, out of order with newer
//! ones: consumers drop second events of one CloudEvents id and order by the event's time.

mod dispatch;
mod error;
mod replay;
mod shared;

use std::{path::PathBuf, sync::Arc, time::Duration};

use athanor_contract::{event::Event, serve::EventsConfig};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::{signing::SharedKeys, spill::Spill};
use dispatch::{Command, Dispatcher, Pending};
use shared::Shared;

pub use error::ProducerError;

/// Events waiting for the task that sends them.
const QUEUE_EVENTS: usize = 16_384;
/// KiB of the data of all events that are not kept yet, waiting or on their way to Kafka.
const QUEUE_KIB: u32 = 64 << 10;
/// The most the spill may hold: at a kilobyte an event, a million events.
const MAX_SPILL_BYTES: u64 = 1 << 30;

/// Publishes a deployment's events. Clones share one queue; when the last is dropped, or at shutdown, what is queued is still sent
/// or spilled.
#[derive(Clone, Debug)]
pub struct Producer {
    commands: mpsc::Sender<Command>,
    /// KiB that are free.
    room: Arc<Semaphore>,
    shutdown: CancellationToken,
    /// Cancelled when everything that could be sent has been.
    replayed: CancellationToken,
}

impl Producer {
    /// Starts the two tasks on the current tokio runtime. Kafka may be away; segments a former process left in `spill_dir` are
    /// replayed. After `shutdown` no event is taken any more, and those taken are sent or spilled. `keys` sign the events.
    ///
    /// # Errors
    /// When the spill folder cannot be used or is used by another process, or the configuration is not Kafka's.
    pub fn start(
        config: EventsConfig,
        keys: Option<SharedKeys>,
        spill_dir: PathBuf,
        shutdown: CancellationToken,
    ) -> Result<Self, ProducerError> {
        let spill = Spill::open(&spill_dir, MAX_SPILL_BYTES).map_err(Arc::new)?;
        describe_metrics();
        let shared = Arc::new(Shared::new(config, keys, spill)?);
        let (commands, receiver) = mpsc::channel(QUEUE_EVENTS);
        let finished = CancellationToken::new();
        let replayed = CancellationToken::new();
        tokio::spawn(replay::run(shared.clone(), finished.clone(), replayed.clone()));
        tokio::spawn(Dispatcher::new(shared, receiver, shutdown.clone()).run(finished.clone()));
        Ok(Self { commands, room: Arc::new(Semaphore::new(QUEUE_KIB as usize)), shutdown, replayed })
    }

    /// Publishes events and waits until each is acknowledged by Kafka or on disk; within about a second even if Kafka is away.
    ///
    /// # Errors
    /// The first event's error; others of the call may have been kept.
    pub async fn publish_durable(&self, events: Vec<Event>) -> Result<(), ProducerError> {
        if self.shutdown.is_cancelled() {
            return Err(ProducerError::Closed);
        }
        let mut kept = Vec::with_capacity(events.len());
        for event in events {
            let (sender, receiver) = oneshot::channel();
            let room = self.room.clone().acquire_many_owned(size(&event)).await.map_err(|_| ProducerError::Closed)?;
            let pending = Pending { event, kept: Some(sender), room };
            self.commands.send(Command::Publish(pending)).await.map_err(|_| ProducerError::Closed)?;
            kept.push(receiver);
        }
        let mut result = Ok(());
        for receiver in kept {
            let kept = receiver.await.unwrap_or(Err(ProducerError::Closed));
            result = result.and(kept);
        }
        result
    }

    /// Queues an event and returns at once. With a full queue it is dropped and counted in `athanor_events_dropped_total`.
    pub fn publish(&self, event: Event) {
        let room = self.room.clone().try_acquire_many_owned(size(&event));
        let queued = room
            .is_ok_and(|room| self.commands.try_send(Command::Publish(Pending { event, kept: None, room })).is_ok());
        if !queued {
            metrics::counter!("athanor_events_dropped_total").increment(1);
        }
    }

    /// Waits until every event taken before this call is acknowledged or on disk, after a shutdown until all are.
    /// `false`: `limit` passed before that.
    pub async fn flush(&self, limit: Duration) -> bool {
        let flushed = async {
            let (sender, receiver) = oneshot::channel();
            let sent = !self.shutdown.is_cancelled() && self.commands.send(Command::Flush(sender)).await.is_ok();
            if !sent || receiver.await.is_err() {
                self.replayed.cancelled().await;
            }
        };
        tokio::time::timeout(limit, flushed).await.is_ok()
    }
}

/// KiB of an event's data, begun ones as whole ones. An event larger than the whole queue takes all of it.
fn size(event: &Event) -> u32 {
    struct Bytes(usize);
    impl std::io::Write for Bytes {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut bytes = Bytes(0);
    // What cannot be written is refused later, with its reason.
    let _ = serde_json::to_writer(&mut bytes, &event.data);
    u32::try_from(bytes.0 / 1024 + 1).map_or(QUEUE_KIB, |size| size.min(QUEUE_KIB))
}

fn describe_metrics() {
    metrics::describe_counter!("athanor_events_produced_total", "Events acknowledged by Kafka");
    metrics::describe_counter!("athanor_events_spilled_total", "Events written to disk because Kafka was away");
    metrics::describe_counter!("athanor_events_replayed_total", "Spilled events acknowledged by Kafka later");
    metrics::describe_counter!(
        "athanor_events_dropped_total",
        "Events lost: full queue, full or damaged spill, refused"
    );
    metrics::describe_counter!(
        "athanor_events_unreadable_segments_total",
        "Files of spilled events that could not be read and were set aside"
    );
    metrics::counter!("athanor_events_unreadable_segments_total").increment(0);
    metrics::describe_gauge!("athanor_events_spill_bytes", metrics::Unit::Bytes, "Bytes waiting on disk for Kafka");
    for name in ["produced", "spilled", "replayed", "dropped"] {
        metrics::counter!(format!("athanor_events_{name}_total")).increment(0);
    }
}

#[cfg(test)]
mod tests {
    use athanor_contract::event::{EventData, Prediction};

    use super::*;

    const MIB: usize = 1 << 20;

    fn large(id: usize) -> Event {
        let data = EventData::Prediction(Prediction {
            request_id: id.to_string(),
            index: 0,
            revision: "r1".into(),
            text: "x".repeat(MIB),
            label: "a".into(),
            confidence: 0.5,
            latency_ms: 1.0,
        });
        let (source, time) = ("/athanor/test/reviews".into(), "2026-11-24T12:00:00Z".into());
        Event { id: id.to_string(), source, time, trace_parent: None, data }
    }

    /// Without the task that sends them: what is queued stays.
    #[tokio::test]
    async fn the_queue_is_bounded_by_the_bytes_of_its_events() {
        let (commands, mut receiver) = mpsc::channel(QUEUE_EVENTS);
        let producer = Producer {
            commands,
            room: Arc::new(Semaphore::new(QUEUE_KIB as usize)),
            shutdown: CancellationToken::new(),
            replayed: CancellationToken::new(),
        };
        (0..100).for_each(|id| producer.publish(large(id)));
        let mut queued: Vec<Command> = std::iter::from_fn(|| receiver.try_recv().ok()).collect();
        let most = QUEUE_KIB as usize * 1024;
        assert!(queued.len() * MIB <= most && (queued.len() + 2) * MIB > most, "{} events", queued.len());

        let durable = tokio::spawn(async move { producer.publish_durable(vec![large(100)]).await });
        let waits = tokio::time::timeout(Duration::from_millis(200), receiver.recv()).await;
        assert!(waits.is_err(), "an event beyond the queue's bytes was taken");
        queued.pop();
        let Some(Command::Publish(pending)) = receiver.recv().await else { panic!("no event") };
        assert_eq!(pending.event.id, "100");
        pending.kept.expect("someone waits").send(Ok(())).expect("still waits");
        durable.await.expect("no panic").expect("kept");
    }

    #[test]
    fn an_event_larger_than_the_queue_takes_all_of_it() {
        let mut event = large(0);
        assert_eq!(size(&event), 1025);
        let EventData::Prediction(prediction) = &mut event.data else { panic!("a prediction") };
        prediction.text = "x".repeat(QUEUE_KIB as usize * 1024);
        assert_eq!(size(&event), QUEUE_KIB);
    }
}
