//! The producer without a cluster: no broker at all, and librdkafka's own in-process broker that goes down and comes back.

mod common;

use std::time::{Duration, Instant};

use athanor_contract::serve::EventsConfig;
use athanor_feedback::{Producer, ProducerError, read_rows};
use common::{eventually, feedback, prediction, segments, whole_topic};
use rdkafka::mocking::MockCluster;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn without_kafka_events_are_on_disk_within_seconds() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = EventsConfig::new("127.0.0.1:1", "events");
    let shutdown = CancellationToken::new();
    let producer =
        Producer::start(config.clone(), None, dir.path().into(), shutdown.clone()).expect("starts without Kafka");
    let busy = Producer::start(config, None, dir.path().into(), shutdown.clone());
    assert!(matches!(busy, Err(ProducerError::Spill(_))), "{busy:?}");

    let started = Instant::now();
    producer.publish_durable(vec![prediction("p", 0), prediction("p", 1)]).await.expect("kept");
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let started = Instant::now();
    producer.publish_durable(vec![feedback("f", "p", 0, "positive")]).await.expect("kept");
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "known to be away, so not waited for again: {:?}",
        started.elapsed()
    );
    producer.publish(prediction("q", 0));
    assert!(producer.flush(Duration::from_secs(5)).await);
    assert!(segments(dir.path()) > 0);

    shutdown.cancel();
    assert!(producer.flush(Duration::from_secs(5)).await);
    assert!(matches!(producer.publish_durable(vec![prediction("r", 0)]).await, Err(ProducerError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_delays_events_and_loses_none() {
    let cluster = MockCluster::new(1).expect("librdkafka's broker");
    cluster.create_topic("events", 3, 1).expect("a topic");
    let config = EventsConfig::new(cluster.bootstrap_servers(), "events");
    let dir = tempfile::tempdir().expect("a folder");
    let shutdown = CancellationToken::new();
    let producer = Producer::start(config.clone(), None, dir.path().into(), shutdown.clone()).expect("starts");

    producer.publish_durable((0..20).map(|at| prediction(&format!("before-{at}"), 0)).collect()).await.expect("kept");
    eventually("all events in Kafka", || segments(dir.path()) == 0).await;

    cluster.broker_down(1).expect("down");
    producer.publish_durable((0..20).map(|at| prediction(&format!("during-{at}"), 0)).collect()).await.expect("kept");
    assert!(segments(dir.path()) > 0, "nothing was spilled");
    cluster.broker_up(1).expect("up");
    let times = ["before", "during"];
    let labels = times.into_iter().flat_map(|time| {
        (0..20).map(move |at| feedback(&format!("f-{time}-{at}"), &format!("{time}-{at}"), 0, "positive"))
    });
    producer.publish_durable(labels.collect()).await.expect("kept");
    eventually("all segments replayed", || segments(dir.path()) == 0).await;

    shutdown.cancel();
    assert!(producer.flush(Duration::from_secs(5)).await);
    let snapshot = read_rows(&whole_topic(&config)).await.expect("readable");
    // A replay may have brought some of them twice.
    assert!(snapshot.predictions >= 40 && snapshot.feedbacks >= 40, "{snapshot:?}");
    assert_eq!((snapshot.rows.len(), snapshot.orphans, snapshot.malformed), (40, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_segment_that_cannot_be_read_the_rest_is_sent() {
    let dir = tempfile::tempdir().expect("a folder");
    let shutdown = CancellationToken::new();
    let away = EventsConfig::new("127.0.0.1:1", "events");
    let producer = Producer::start(away, None, dir.path().into(), shutdown.clone()).expect("starts without Kafka");
    producer.publish_durable((0..20).map(|at| prediction(&format!("p{at}"), 0)).collect()).await.expect("kept");
    shutdown.cancel();
    assert!(producer.flush(Duration::from_secs(20)).await);
    drop(producer);
    let written = segments(dir.path());
    assert!(written > 0, "nothing was spilled");
    // Older than all others, and a folder, which cannot be read even by root.
    for number in (0..written).rev() {
        let name = |number: usize| dir.path().join(format!("segment-{number:020}.jsonl"));
        std::fs::rename(name(number), name(number + 1)).expect("renamed");
    }
    std::fs::create_dir(dir.path().join(format!("segment-{:020}.jsonl", 0))).expect("a folder");

    let cluster = MockCluster::new(1).expect("librdkafka's broker");
    cluster.create_topic("events", 3, 1).expect("a topic");
    let config = EventsConfig::new(cluster.bootstrap_servers(), "events");
    let shutdown = CancellationToken::new();
    let mut starting = Err(ProducerError::Closed);
    // The tasks of the first one give the folder back when they end.
    for _ in 0..100 {
        starting = Producer::start(config.clone(), None, dir.path().into(), shutdown.clone());
        if starting.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let producer = starting.expect("starts");
    eventually("all other segments replayed", || segments(dir.path()) == 0).await;
    let aside = std::fs::read_dir(dir.path()).expect("a folder").filter_map(Result::ok);
    let aside = aside.filter(|entry| entry.file_name().to_string_lossy().ends_with(".unreadable")).count();
    assert_eq!(aside, 1);
    producer.publish_durable(vec![prediction("after", 0)]).await.expect("kept");
    eventually("what comes later in Kafka", || segments(dir.path()) == 0).await;
    shutdown.cancel();
    assert!(producer.flush(Duration::from_secs(5)).await);
    let snapshot = read_rows(&whole_topic(&config)).await.expect("readable");
    assert!(snapshot.predictions >= 21 && snapshot.malformed == 0, "{snapshot:?}");
}
