//! Events and offsets for the tests with a broker.

use std::time::{Duration, Instant};

use athanor_contract::{
    event::{Event, EventData, Feedback, Judgement, Prediction},
    serve::EventsConfig,
    train::{KafkaSource, OffsetRange},
};
use athanor_feedback::kafka::{LogContext, consumer_config};
use rdkafka::consumer::{BaseConsumer, Consumer};

const TIME: &str = "2026-11-24T12:00:00Z";

pub fn prediction(request: &str, index: u32) -> Event {
    event(
        format!("{request}/{index}"),
        EventData::Prediction(Prediction {
            request_id: request.into(),
            index,
            revision: "r1".into(),
            text: format!("text of {request}/{index}"),
            label: "negative".into(),
            confidence: 0.75,
            latency_ms: 2.0,
        }),
    )
}

pub fn feedback(id: &str, request: &str, index: u32, label: &str) -> Event {
    let (request_id, judgement) = (request.into(), Judgement::ExpectedLabel(label.into()));
    event(id.into(), EventData::Feedback(Feedback { request_id, index, judgement, comment: None, caller: None }))
}

fn event(id: String, data: EventData) -> Event {
    Event { id, source: "/athanor/test/reviews".into(), time: TIME.into(), trace_parent: None, data }
}

/// Everything that is in the topic now.
pub fn whole_topic(config: &EventsConfig) -> KafkaSource {
    let EventsConfig { bootstrap_servers, topic, .. } = config.clone();
    let consumer: BaseConsumer<LogContext> =
        consumer_config(&bootstrap_servers, "athanor-test").create_with_context(LogContext).expect("a consumer");
    let wait = Duration::from_secs(10);
    let metadata = consumer.fetch_metadata(Some(&topic), wait).expect("a broker");
    let partitions = metadata.topics()[0].partitions().iter().map(|partition| partition.id());
    let ranges = partitions
        .map(|partition| {
            let (begin, end) = consumer.fetch_watermarks(&topic, partition, wait).expect("a broker");
            OffsetRange { partition, begin, end }
        })
        .collect();
    KafkaSource::new(bootstrap_servers, topic, ranges)
}

/// Waits until `condition` holds.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(60), "still not: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Segments in a spill folder.
pub fn segments(dir: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(dir).expect("a folder");
    entries
        .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with(".jsonl")))
        .count()
}
