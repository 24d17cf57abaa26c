//! With a real Kafka at `ATHANOR_TEST_KAFKA` (host:port).

mod common;

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use athanor_contract::{
    serve::EventsConfig,
    train::{KafkaSource, OffsetRange},
};
use athanor_feedback::{Producer, SnapshotError, kafka::client_config, read_rows};
use common::{eventually, feedback, prediction, segments, whole_topic};
use rdkafka::{
    Offset, Timestamp, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    producer::{FutureProducer, FutureRecord},
};
use tokio_util::sync::CancellationToken;

/// A topic of its own for each test.
fn config() -> EventsConfig {
    let bootstrap_servers = std::env::var("ATHANOR_TEST_KAFKA").expect("ATHANOR_TEST_KAFKA=host:port");
    EventsConfig::new(bootstrap_servers, format!("athanor-test-{}", uuid::Uuid::now_v7()))
}

fn start(config: &EventsConfig, dir: &tempfile::TempDir) -> (Producer, CancellationToken) {
    let shutdown = CancellationToken::new();
    let producer = Producer::start(config.clone(), None, dir.path().into(), shutdown.clone()).expect("starts");
    (producer, shutdown)
}

fn source(config: &EventsConfig, partition: i32, begin: i64, end: i64) -> KafkaSource {
    let EventsConfig { bootstrap_servers, topic, .. } = config.clone();
    KafkaSource::new(bootstrap_servers, topic, vec![OffsetRange { partition, begin, end }])
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the demo's Kafka: make test"]
async fn a_snapshot_is_what_was_published() {
    let (config, dir) = (config(), tempfile::tempdir().expect("a folder"));
    let (producer, _shutdown) = start(&config, &dir);
    let mut events: Vec<_> = (0..30).map(|at| prediction(&format!("p{at}"), at % 2)).collect();
    events.extend((0..10).map(|at| feedback(&format!("f{at}"), &format!("p{at}"), at % 2, "positive")));
    events.push(feedback("newest", "p0", 0, "neutral"));
    events.push(feedback("orphan", "gone", 0, "positive"));
    // Replays may bring an event twice.
    events.extend([events[0].clone(), events[30].clone()]);
    producer.publish_durable(events).await.expect("kept");
    eventually("all events in Kafka", || segments(dir.path()) == 0).await;
    let raw: FutureProducer = client_config(&config.bootstrap_servers).create().expect("a producer");
    let record = FutureRecord::to(&config.topic).key("p0").payload("not an event");
    let sent = raw.send(record, Duration::from_secs(10)).await.expect("sent");
    assert!(matches!(sent.timestamp, Timestamp::LogAppendTime(_)), "a topic without the broker's time: {sent:?}");

    let whole = whole_topic(&config);
    assert_eq!(whole.ranges.len(), 3);
    let snapshot = read_rows(&whole).await.expect("readable");
    assert!(snapshot.predictions >= 31 && snapshot.feedbacks >= 13, "repeated ones are counted: {snapshot:?}");
    assert_eq!(snapshot.rows.len(), 10);
    assert_eq!((snapshot.orphans, snapshot.malformed), (1, 1));
    assert!(snapshot.duplicates >= 1, "{snapshot:?}");
    let first = snapshot.rows.iter().find(|row| row.id == "p0/0").expect("a row");
    assert_eq!((first.text.as_str(), first.label.as_str()), ("text of p0/0", "neutral"));
    assert_eq!(read_rows(&whole).await.expect("readable"), snapshot);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the demo's Kafka: make test"]
async fn ranges_that_cannot_be_read_are_the_users_error() {
    let (config, dir) = (config(), tempfile::tempdir().expect("a folder"));
    let missing = read_rows(&source(&config, 0, 0, 1)).await.expect_err("no topic yet");
    assert!(matches!(&missing, SnapshotError::TopicMissing { .. }) && missing.is_user_error(), "{missing}");

    let (producer, _shutdown) = start(&config, &dir);
    producer.publish_durable((0..20).map(|at| prediction(&format!("p{at}"), 0)).collect()).await.expect("kept");
    eventually("all events in Kafka", || segments(dir.path()) == 0).await;
    let range = whole_topic(&config).ranges.into_iter().max_by_key(|range| range.end).expect("partitions");
    let OffsetRange { partition, end, .. } = range;
    assert!(end >= 2);

    let empty = read_rows(&source(&config, partition, 1, 1)).await.expect("an empty range is fine");
    assert_eq!((empty.rows.len(), empty.predictions), (0, 0));
    let part = read_rows(&source(&config, partition, 1, 2)).await.expect("readable");
    assert_eq!(part.predictions, 1);
    for (wrong, expected) in [
        (source(&config, 7, 0, 1), "has no partition 7".to_owned()),
        (source(&config, partition, 0, end + 1), format!("ends at offset {end}, but the range ends at {}", end + 1)),
    ] {
        let error = read_rows(&wrong).await.expect_err("not in the topic");
        assert!(error.is_user_error() && error.to_string().contains(&expected), "{error}");
    }

    let admin: AdminClient<DefaultClientContext> = client_config(&config.bootstrap_servers).create().expect("a client");
    let mut before = TopicPartitionList::new();
    before.add_partition_offset(&config.topic, partition, Offset::Offset(1)).expect("an offset");
    admin.delete_records(&before, &AdminOptions::new()).await.expect("deleted");
    let rest = read_rows(&source(&config, partition, 0, end)).await.expect("what retention left is read");
    assert_eq!((rest.deleted, rest.predictions), (1, end as u64 - 1));
}

/// Set in a process that keeps events in this folder until it is killed.
const CHILD_FOLDER: &str = "ATHANOR_TEST_CHILD_FOLDER";

/// Starts this program again as a process that keeps 50 predictions in `folder` and confirms them; kills it with SIGKILL then.
fn kill_after_confirming(test: &str, folder: &std::path::Path) {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "--nocapture", test])
        .env(CHILD_FOLDER, folder)
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let confirmed = lines.map_while(Result::ok).any(|line| line.contains("confirmed"));
    child.kill().expect("killed");
    child.wait().expect("ended");
    assert!(confirmed, "the process ended before it had confirmed the events");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the demo's Kafka: make test"]
async fn events_confirmed_by_a_process_that_was_killed_are_sent_by_the_next() {
    if let Ok(folder) = std::env::var(CHILD_FOLDER) {
        let unreachable = EventsConfig::new("127.0.0.1:1", "events");
        let producer = Producer::start(unreachable, None, folder.into(), CancellationToken::new()).expect("starts");
        producer.publish_durable((0..50).map(|at| prediction(&format!("p{at}"), 0)).collect()).await.expect("kept");
        println!("confirmed");
        return std::future::pending().await;
    }
    let (config, dir) = (config(), tempfile::tempdir().expect("a folder"));
    let folder = dir.path().to_owned();
    let test = "events_confirmed_by_a_process_that_was_killed_are_sent_by_the_next";
    tokio::task::spawn_blocking(move || kill_after_confirming(test, &folder)).await.expect("a killed process");
    assert!(segments(dir.path()) > 0);

    let (producer, _shutdown) = start(&config, &dir);
    let labels = (0..50).map(|at| feedback(&format!("f{at}"), &format!("p{at}"), 0, "positive"));
    producer.publish_durable(labels.collect()).await.expect("kept");
    eventually("all segments replayed", || segments(dir.path()) == 0).await;
    let snapshot = read_rows(&whole_topic(&config)).await.expect("readable");
    assert_eq!((snapshot.rows.len(), snapshot.orphans), (50, 0));
}
