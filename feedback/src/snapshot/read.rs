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
    kafka::{LogContext, consumer_config, is_unknown_topic},
};

/// One question to the broker, or one wait for records.
const STEP: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(250);

/// Returns the events in no particular order, and the number of records that are none. `timeout` is for the broker's silence, not
/// for the whole.
pub(super) fn read(
    source: &KafkaSource,
    timeout: Duration,
    abandoned: &CancellationToken,
) -> Result<(Vec<Placed>, u64), SnapshotError> {
    let unavailable =
        |message: String| SnapshotError::Unavailable { bootstrap_servers: source.bootstrap_servers.clone(), message };
    let consumer: BaseConsumer<LogContext> = consumer_config(&source.bootstrap_servers, "athanor-snapshot")
        // Offsets that retention deletes while we read are an error, not a reason to go on elsewhere.
        .set("auto.offset.reset", "error")
        .create_with_context(LogContext)
        .map_err(|error| unavailable(error.to_string()))?;
    let reader = Reader { source, consumer, timeout, abandoned };
    reader.check_partitions()?;
    let mut remaining = BTreeMap::new();
    for range in source.ranges.iter().filter(|range| range.begin < range.end) {
        reader.check_range(range)?;
        let whole = remaining.entry(range.partition).or_insert((range.begin, range.end));
        *whole = (whole.0.min(range.begin), whole.1.max(range.end));
    }
    reader.consume(remaining)
}

struct Reader<'a> {
    source: &'a KafkaSource,
    consumer: BaseConsumer<LogContext>,
    timeout: Duration,
    abandoned: &'a CancellationToken,
}

impl Reader<'_> {
    fn unavailable(&self, message: impl Into<String>) -> SnapshotError {
        SnapshotError::Unavailable { bootstrap_servers: self.source.bootstrap_servers.clone(), message: message.into() }
    }

    fn missing(&self) -> SnapshotError {
        SnapshotError::TopicMissing {
            topic: self.source.topic.clone(),
            bootstrap_servers: self.source.bootstrap_servers.clone(),
        }
    }

    /// Asks until there is an answer, or `timeout` is over.
    fn ask<T>(&self, mut question: impl FnMut() -> Result<T, KafkaError>) -> Result<T, SnapshotError> {
        let started = Instant::now();
        loop {
            match question() {
                Ok(answer) => return Ok(answer),
                Err(error) if error.rdkafka_error_code().is_some_and(is_unknown_topic) => return Err(self.missing()),
                Err(error) if started.elapsed() >= self.timeout || self.abandoned.is_cancelled() => {
                    return Err(self.unavailable(error.to_string()));
                }
                Err(error) => {
                    tracing::warn!(%error, topic = self.source.topic, "Kafka does not answer, asking again");
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

    fn check_range(&self, range: &OffsetRange) -> Result<(), SnapshotError> {
        let OffsetRange { partition, begin, end } = *range;
        let topic = self.source.topic.clone();
        let (low, high) = self.ask(|| self.consumer.fetch_watermarks(&topic, partition, STEP))?;
        if begin < low {
            Err(SnapshotError::Deleted { topic, partition, begin, low })
        } else if end > high {
            Err(SnapshotError::BeyondEnd { topic, partition, end, high })
        } else {
            Ok(())
        }
    }

    /// Consumes each partition from its first begin to its last end; records between ranges are left out.
    fn consume(&self, mut remaining: BTreeMap<i32, (i64, i64)>) -> Result<(Vec<Placed>, u64), SnapshotError> {
        let topic = &self.source.topic;
        let mut assignment = TopicPartitionList::new();
        for (partition, (begin, _)) in &remaining {
            assignment
                .add_partition_offset(topic, *partition, Offset::Offset(*begin))
                .map_err(|error| self.unavailable(error.to_string()))?;
        }
        self.consumer.assign(&assignment).map_err(|error| self.unavailable(error.to_string()))?;
        let (mut events, mut malformed) = (Vec::new(), 0);
        let (mut heard, mut last_error) = (Instant::now(), "no answer".to_owned());
        while !remaining.is_empty() {
            if self.abandoned.is_cancelled() || heard.elapsed() >= self.timeout {
                return Err(self.unavailable(last_error));
            }
            match self.consumer.poll(POLL) {
                None => {}
                Some(Ok(message)) => {
                    heard = Instant::now();
                    let (partition, offset) = (message.partition(), message.offset());
                    let Some((_, end)) = remaining.get(&partition) else { continue };
                    let end = *end;
                    if self.source.ranges.iter().any(|range| contains(range, partition, offset)) {
                        match cloudevents::decode(&message) {
                            Ok(event) => events.push(Placed { partition, offset, event }),
                            Err(error) => {
                                malformed += 1;
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
                    Some(code) if is_unknown_topic(code) => return Err(self.missing()),
                    Some(RDKafkaErrorCode::OffsetOutOfRange | RDKafkaErrorCode::AutoOffsetReset) => {
                        self.source.ranges.iter().try_for_each(|range| self.check_range(range))?;
                        return Err(self.unavailable(error.to_string()));
                    }
                    _ => last_error = error.to_string(),
                },
            }
        }
        Ok((events, malformed))
    }
}

fn contains(range: &OffsetRange, partition: i32, offset: i64) -> bool {
    range.partition == partition && (range.begin..range.end).contains(&offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_that_is_away_is_not_the_users_error() {
        let ranges = vec![OffsetRange { partition: 0, begin: 0, end: 1 }];
        let source = KafkaSource { bootstrap_servers: "127.0.0.1:1".into(), topic: "events".into(), ranges };
        let error = read(&source, Duration::from_millis(10), &CancellationToken::new()).expect_err("no broker");
        assert!(!error.is_user_error() && error.to_string().contains("127.0.0.1:1"), "{error}");
    }
}
