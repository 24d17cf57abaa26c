//! The replaying task: creates the topic, notices when Kafka is back, and sends what waits on disk.

use std::{sync::Arc, time::Duration};

use rdkafka::{
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    error::RDKafkaErrorCode,
    producer::{DeliveryFuture, Producer as _},
};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::shared::{SendError, Shared, classify};
use crate::{
    kafka::{LogContext, client_config},
    spill::{SpillError, read_segment},
};

const PARTITIONS: i32 = 3;
/// Time limit of one question to the broker.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// Between attempts while Kafka is away.
const RETRY_PAUSE: Duration = Duration::from_millis(500);
/// Time limit of one replayed event; longer than librdkafka's own message timeout.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(10);
/// Replayed events sent and not acknowledged.
const REPLAY_WINDOW: usize = 512;
/// Time limit for emptying the disk at shutdown.
const LAST_ATTEMPT: Duration = Duration::from_secs(4);
/// Looks for leftover segments even if nothing wakes the task.
const IDLE: Duration = Duration::from_secs(5);

/// Runs until `stop`, and then tries once more to empty the disk, which may go with its pod. Cancels `replayed` at its end.
pub(super) async fn run(shared: Arc<Shared>, stop: CancellationToken, replayed: CancellationToken) {
    let _end = replayed.drop_guard();
    stop.run_until_cancelled(replay(&shared)).await;
    match tokio::time::timeout(LAST_ATTEMPT, replay_all(&shared)).await {
        Ok(Ok(())) => {}
        Ok(Err(reason)) => tracing::warn!(reason, "events stay in the spill"),
        Err(_) => tracing::warn!("events stay in the spill: Kafka was too slow to take them all"),
    }
}

async fn replay(shared: &Shared) {
    let mut admin = None;
    loop {
        let result = match shared.is_up() {
            true => replay_all(shared).await,
            false => match ensure_topic(shared, &mut admin).await {
                Ok(()) => replay_all(shared).await,
                Err(reason) => Err(reason),
            },
        };
        match result {
            Ok(()) => {
                shared.set_up();
                let _ = tokio::time::timeout(IDLE, shared.spilled.notified()).await;
            }
            Err(reason) => {
                shared.set_down(&reason);
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

/// Makes sure that Kafka answers and has the topic.
async fn ensure_topic(shared: &Shared, admin: &mut Option<AdminClient<LogContext>>) -> Result<(), String> {
    shared.replace_failed_client().map_err(|error| error.to_string())?;
    let topic = &shared.config.topic;
    let admin = match admin {
        Some(admin) => admin,
        None => {
            let client = client_config(&shared.config.bootstrap_servers).create_with_context(LogContext);
            admin.insert(client.map_err(|error| error.to_string())?)
        }
    };
    let options = AdminOptions::new().request_timeout(Some(ASK_TIMEOUT)).operation_timeout(Some(ASK_TIMEOUT));
    let settings = &shared.config.topic_config;
    // The broker's clock orders the monitor's windows; a record's time by default is its sender's.
    let by_arrival = ("message.timestamp.type", "LogAppendTime");
    let own = (!settings.contains_key(by_arrival.0)).then_some(by_arrival);
    let all = settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).chain(own);
    let new_topic = all
        .fold(NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(-1)), |new, (name, value)| new.set(name, value));
    let answer = admin.create_topics([&new_topic], &options).await;
    let reason = match answer {
        Ok(results) => match results.into_iter().next() {
            Some(Ok(_)) => {
                tracing::info!(topic, partitions = PARTITIONS, "topic created");
                return Ok(());
            }
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => return Ok(()),
            Some(Err((_, code))) => format!("topic {topic} cannot be created: {code}"),
            None => format!("topic {topic} cannot be created: no answer"),
        },
        Err(error) => format!("topic {topic} cannot be created: {error}"),
    };
    // Who may not create topics may still write to one that exists.
    let (client, name) = (shared.client(), topic.clone());
    let exists = tokio::task::spawn_blocking(move || {
        let metadata = client.client().fetch_metadata(Some(&name), ASK_TIMEOUT).ok()?;
        let topic = metadata.topics().first()?;
        Some(topic.error().is_none() && !topic.partitions().is_empty())
    });
    if matches!(exists.await, Ok(Some(true))) { Ok(()) } else { Err(reason) }
}

/// Replays what is on disk now, oldest first.
async fn replay_all(shared: &Shared) -> Result<(), String> {
    let segments = shared
        .with_spill(|spill| {
            spill.rotate();
            spill.closed()
        })
        .await;
    for number in segments {
        replay_segment(shared, number).await?;
    }
    Ok(())
}

async fn replay_segment(shared: &Shared, number: u64) -> Result<(), String> {
    let segment = shared.with_spill(move |spill| read_segment(&spill.path(number))).await;
    let segment = match segment {
        Ok(segment) => segment,
        Err(error) if lacks_files(&error) => return Err(error.to_string()),
        Err(error) => {
            metrics::counter!("athanor_events_unreadable_segments_total").increment(1);
            tracing::error!(segment = number, %error, "a segment cannot be read and is set aside; the others are sent");
            shared.with_spill(move |spill| spill.set_aside(number)).await;
            return Ok(());
        }
    };
    if segment.torn {
        tracing::warn!(segment = number, "the last line was cut off by a crash and is skipped");
    }
    if !segment.damaged_lines.is_empty() {
        metrics::counter!("athanor_events_dropped_total").increment(segment.damaged_lines.len() as u64);
        tracing::error!(segment = number, lines = ?segment.damaged_lines, "damaged lines are skipped, the file is kept");
    }
    let mut replayed = 0;
    for window in segment.events.chunks(REPLAY_WINDOW) {
        let deliveries: Vec<_> = window.iter().map(|event| shared.send(event)).collect();
        for delivery in deliveries {
            match acknowledged(delivery).await {
                Ok(()) => {
                    replayed += 1;
                    metrics::counter!("athanor_events_replayed_total").increment(1);
                }
                Err(SendError::Refused(reason)) => {
                    metrics::counter!("athanor_events_dropped_total").increment(1);
                    tracing::error!(segment = number, reason, "Kafka refuses a spilled event for good");
                }
                Err(SendError::Unavailable(reason)) => return Err(reason),
            }
        }
    }
    let events = segment.events.len();
    shared.with_spill(move |spill| spill.remove(&segment)).await.map_err(|error| error.to_string())?;
    tracing::info!(segment = number, events, replayed, "spilled events are in Kafka");
    Ok(())
}

/// Whether the process or the machine has too many open files, which passes.
fn lacks_files(error: &SpillError) -> bool {
    let SpillError::Io { source, .. } = error else { return false };
    source.raw_os_error().is_some_and(|code| matches!(Errno::from_raw_os_error(code), Errno::MFILE | Errno::NFILE))
}

async fn acknowledged(delivery: Result<DeliveryFuture, SendError>) -> Result<(), SendError> {
    match tokio::time::timeout(REPLAY_TIMEOUT, delivery?).await {
        Ok(Ok(Ok(_))) => Ok(()),
        Ok(Ok(Err((error, _)))) => Err(classify(&error)),
        Ok(Err(_)) | Err(_) => Err(SendError::Unavailable("not acknowledged".into())),
    }
}
