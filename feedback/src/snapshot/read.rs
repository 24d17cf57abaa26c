//! Reading exact offset ranges from Kafka. Blocks; runs on a thread for blocking work.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use athanor_contract::train::{KafkaSource, OffsetRange};
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
};
use tokio_util::sync::CancellationToken;

use super::{SnapshotError, join::Placed};
use crate::{
    cloudevents,
    cloudevents::MalformedEvent,
    kafka::{LogContext, consumer_config, is_unknown_topic},
    signing::SigningKeys,
};

/// One question to the broker, or one wait for records.
const STEP: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(250);

/// Records of the ranges that are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Records that are no events.
    pub malformed: u64,
    /// Events that no key signed.
    pub unsigned: u64,
}

/// Reads the ranges of a source, as often as is wanted.
pub(super) struct Reader<'a> {
    source: &'a KafkaSource,
    keys: Option<&'a SigningKeys>,
    consumer: BaseConsumer<LogContext>,
    /// Longest silence of the broker, and how long it may not know the topic.
    timeout: Duration,
    abandoned: &'a CancellationToken,
    /// What is there of the ranges.
    ranges: Vec<OffsetRange>,
    /// Offsets of the ranges that are not there any more.
    pub deleted: u64,
}

impl<'a> Reader<'a> {
    /// Connects, and checks the ranges.
    ///
    /// # Errors
    /// The broker does not answer or does not know the topic until `timeout` is over, or a range is not in the topic.
    pub fn open(
        source: &'a KafkaSource,
        keys: Option<&'a SigningKeys>,
        timeout: Duration,
        abandoned: &'a CancellationToken,
    ) -> Result<Self, SnapshotError> {
        let unavailable = |error: KafkaError| SnapshotError::Unavailable {
            bootstrap_servers: source.bootstrap_servers.clone(),
            message: error.to_string(),
        };
        let consumer: BaseConsumer<LogContext> = consumer_config(&source.bootstrap_servers, "athanor-snapshot")
            // Offsets that retention deletes while we read are an error, not a reason to go on elsewhere.
            .set("auto.offset.reset", "error")
            .create_with_context(LogContext)
            .map_err(unavailable)?;
        let mut reader = Self { source, keys, consumer, timeout, abandoned, ranges: Vec::new(), deleted: 0 };
        reader.check_partitions()?;
        for range in source.ranges.iter().filter(|range| range.begin < range.end) {
            let there = reader.what_is_there(range)?;
            if there.begin > range.begin {
                tracing::warn!(
                    topic = source.topic,
                    partition = range.partition,
                    begin = range.begin,
                    first = there.begin,
                    "retention has deleted the beginning of a range; the rest is read"
                );
                reader.deleted += there.begin.abs_diff(range.begin);
            }
            reader.ranges.push(there);
        }
        reader.ranges.retain(|range| range.begin < range.end);
        Ok(reader)
    }

    fn unavailable(&self, message: impl Into<String>) -> SnapshotError {
        SnapshotError::Unavailable { bootstrap_servers: self.source.bootstrap_servers.clone(), message: message.into() }
    }

    /// The error of a broker that gave no answer, or this one, until `timeout` was over.
    fn gave_up(&self, error: &KafkaError) -> SnapshotError {
        if error.rdkafka_error_code().is_some_and(is_unknown_topic) {
            SnapshotError::TopicMissing {
                topic: self.source.topic.clone(),
                bootstrap_servers: self.source.bootstrap_servers.clone(),
            }
        } else {
            self.unavailable(error.to_string())
        }
    }

    /// Asks until there is an answer, or `timeout` is over. A broker that has just started may not know a topic yet.
    fn ask<T>(&self, mut question: impl FnMut() -> Result<T, KafkaError>) -> Result<T, SnapshotError> {
        let started = Instant::now();
        loop {
            match question() {
                Ok(answer) => return Ok(answer),
                Err(error) if started.elapsed() >= self.timeout || self.abandoned.is_cancelled() => {
                    return Err(self.gave_up(&error));
                }
                Err(error) => {
                    tracing::warn!(%error, topic = self.source.topic, "Kafka has no answer, asking again");
                    std::thread::sleep(POLL);
                }
            }
        }
    }

    fn check_partitions(&self) -> Result<(), SnapshotError> {
        let topic = &self.source.topic;
        let partitions = self.ask(|| {
            let metadata = self.consumer.fetch_metadata(Some(topic), STEP)?;
            let answer = metadata.topics().iter().find(|found| found.name() == topic);
            let answer = answer.ok_or(KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition))?;
            if let Some(error) = answer.error() {
                return Err(KafkaError::MetadataFetch(error.into()));
            }
            Ok(answer.partitions().iter().map(|partition| partition.id()).collect::<Vec<_>>())
        })?;
        match self.source.ranges.iter().find(|range| !partitions.contains(&range.partition)) {
            Some(range) => Err(SnapshotError::PartitionMissing { topic: topic.clone(), partition: range.partition }),
            None => Ok(()),
        }
    }

    /// The part of a range that retention has left.
    fn what_is_there(&self, range: &OffsetRange) -> Result<OffsetRange, SnapshotError> {
        let OffsetRange { partition, begin, end } = *range;
        let topic = self.source.topic.clone();
        let (low, high) = self.ask(|| self.consumer.fetch_watermarks(&topic, partition, STEP))?;
        if end > high {
            return Err(SnapshotError::BeyondEnd { topic, partition, end, high });
        }
        Ok(OffsetRange { partition, begin: begin.max(low).min(end), end })
    }

    /// Hands each event of the ranges to `take`, those of one partition in their order.
    ///
    /// # Errors
    /// The broker is silent for too long, or deletes what is being read.
    pub fn read(&self, take: &mut dyn FnMut(Placed)) -> Result<Counts, SnapshotError> {
        let mut remaining = BTreeMap::new();
        for range in &self.ranges {
            let whole = remaining.entry(range.partition).or_insert((range.begin, range.end));
            *whole = (whole.0.min(range.begin), whole.1.max(range.end));
        }
        self.consume(remaining, take)
    }

    /// Consumes each partition from its first begin to its last end; records between ranges are left out.
    fn consume(
        &self,
        mut remaining: BTreeMap<i32, (i64, i64)>,
        take: &mut dyn FnMut(Placed),
    ) -> Result<Counts, SnapshotError> {
        let topic = &self.source.topic;
        let mut assignment = TopicPartitionList::new();
        for (partition, (begin, _)) in &remaining {
            assignment
                .add_partition_offset(topic, *partition, Offset::Offset(*begin))
                .map_err(|error| self.unavailable(error.to_string()))?;
        }
        self.consumer.assign(&assignment).map_err(|error| self.unavailable(error.to_string()))?;
        let mut counts = Counts::default();
        let (mut heard, mut last_error) = (Instant::now(), None);
        while !remaining.is_empty() {
            if self.abandoned.is_cancelled() || heard.elapsed() >= self.timeout {
                return Err(last_error.map_or_else(|| self.unavailable("no answer"), |error| self.gave_up(&error)));
            }
            match self.consumer.poll(POLL) {
                None => {}
                Some(Ok(message)) => {
                    (heard, last_error) = (Instant::now(), None);
                    let (partition, offset) = (message.partition(), message.offset());
                    let Some((_, end)) = remaining.get(&partition) else { continue };
                    let end = *end;
                    if self.ranges.iter().any(|range| contains(range, partition, offset)) {
                        match cloudevents::decode(&message, self.keys) {
                            Ok(event) => take(Placed { partition, offset, event }),
                            Err(error @ (MalformedEvent::Unsigned | MalformedEvent::Signature)) => {
                                counts.unsigned += 1;
                                tracing::warn!(topic, partition, offset, %error, "an event is left out");
                            }
                            Err(error) => {
                                counts.malformed += 1;
                                tracing::warn!(topic, partition, offset, %error, "a record is no event and is skipped");
                            }
                        }
                    }
                    if offset + 1 >= end {
                        remaining.remove(&partition);
                    }
                }
                // The end was checked to lie inside the partition: what is missing before it are transaction markers or compacted.
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    heard = Instant::now();
                    remaining.remove(&partition);
                }
                Some(Err(error)) => match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset) => {
                        return Err(self.unavailable(format!("retention has deleted what was being read: {error}")));
                    }
                    _ => last_error = Some(error),
                },
            }
        }
        Ok(counts)
    }
}

fn contains(range: &OffsetRange, partition: i32, offset: i64) -> bool {
    range.partition == partition && (range.begin..range.end).contains(&offset)
}

#[cfg(test)]
mod tests {
    use rdkafka::{
        mocking::MockCluster,
        producer::{BaseProducer, BaseRecord, Producer},
        types::RDKafkaRespErr,
    };

    use super::*;
    use crate::kafka::client_config;

    const UNKNOWN: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
    const KNOWN: RDKafkaRespErr = RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR;

    #[test]
    fn a_topic_that_is_unknown_for_a_moment_is_read() {
        let cluster = MockCluster::new(1).expect("librdkafka's broker");
        cluster.create_topic("events", 1, 1).expect("a topic");
        let producer: BaseProducer = client_config(&cluster.bootstrap_servers()).create().expect("a producer");
        producer
            .send(BaseRecord::<(), str>::to("events").payload("no event"))
            .map_err(|(error, _)| error)
            .expect("sent");
        producer.flush(Duration::from_secs(20)).expect("in the topic");
        cluster.topic_error("events", UNKNOWN).expect("unknown");
        let ranges = vec![OffsetRange { partition: 0, begin: 0, end: 1 }];
        let source = KafkaSource::new(cluster.bootstrap_servers(), "events", ranges);
        let read = |timeout: Duration| {
            let abandoned = CancellationToken::new();
            Reader::open(&source, None, timeout, &abandoned)?.read(&mut |_| ())
        };
        let (started, limit) = (Instant::now(), Duration::from_secs(1));
        let error = read(limit).expect_err("no topic");
        assert!(matches!(&error, SnapshotError::TopicMissing { .. }) && started.elapsed() >= limit, "{error}");
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| read(Duration::from_secs(60)));
            std::thread::sleep(limit);
            assert!(!reading.is_finished(), "an unknown topic is an error at once");
            cluster.topic_error("events", KNOWN).expect("known");
            let counts = reading.join().expect("no panic").expect("read");
            assert_eq!(counts, Counts { malformed: 1, unsigned: 0 });
        });
    }

    #[test]
    fn a_broker_that_is_away_is_not_the_users_error() {
        let ranges = vec![OffsetRange { partition: 0, begin: 0, end: 1 }];
        let source = KafkaSource::new("127.0.0.1:1", "events", ranges);
        let error =
            Reader::open(&source, None, Duration::from_millis(10), &CancellationToken::new()).err().expect("no broker");
        assert!(!error.is_user_error() && error.to_string().contains("127.0.0.1:1"), "{error}");
    }
}
