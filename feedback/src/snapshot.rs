//! Exact offset ranges of a deployment's topic as rows: what a retraining is trained on.
//!
//! The same ranges give the same rows in the same order, independent of the reader and of how Kafka interleaves its partitions.
//! Only those ranges are read, by assignment: no consumer group is joined and no offset committed.

mod join;
mod read;

use std::time::Duration;

use athanor_contract::{
    event::GenerationInput,
    train::{KafkaSource, OffsetRange},
};
use tokio_util::sync::CancellationToken;

/// How long a broker may stay silent.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A text and the label that it should have had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledRow {
    /// `{request_id}/{index}`.
    pub id: String,
    pub text: String,
    pub label: String,
}

/// A request to a language model and the text that its answer should have been.
#[derive(Clone, Debug, PartialEq)]
pub struct CorrectedAnswer {
    /// `{request_id}/{index}`.
    pub id: String,
    pub input: GenerationInput,
    pub expected: String,
}

/// The rows of some offset ranges.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Classified texts with feedback, in the order of the predictions' partitions and offsets.
    pub rows: Vec<LabelledRow>,
    /// Generated answers with a correction, in the order of the answers' partitions and offsets.
    pub corrections: Vec<CorrectedAnswer>,
    /// Distinct prediction events in the ranges.
    pub predictions: u64,
    /// Distinct generation events in the ranges.
    pub generations: u64,
    /// Distinct feedback events in the ranges.
    pub feedbacks: u64,
    /// Events dropped because an event with the same id, or an answer for the same input, came before.
    pub duplicates: u64,
    /// Feedback whose answer lies outside the ranges.
    pub orphans: u64,
    /// Records that are not events; each is logged with partition and offset.
    pub malformed: u64,
    /// Hexadecimal sha256 over the rows: equal digests mean equal rows.
    pub digest: String,
}

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("topic {topic:?} does not exist at {bootstrap_servers}")]
    TopicMissing { topic: String, bootstrap_servers: String },
    #[error("topic {topic:?} has no partition {partition}")]
    PartitionMissing { topic: String, partition: i32 },
    #[error("ranges[{index}] of topic {topic:?} is not valid: {message}")]
    Range { topic: String, index: usize, message: String },
    #[error(
        "partition {partition} of topic {topic:?} begins at offset {low} by now, but the range begins at {begin}: retention has \
         deleted events"
    )]
    Deleted { topic: String, partition: i32, begin: i64, low: i64 },
    #[error("partition {partition} of topic {topic:?} ends at offset {high}, but the range ends at {end}")]
    BeyondEnd { topic: String, partition: i32, end: i64, high: i64 },
    #[error("Kafka at {bootstrap_servers} cannot be read: {message}")]
    Unavailable { bootstrap_servers: String, message: String },
}

impl SnapshotError {
    /// Whether the source must be changed: trying again does not help.
    pub fn is_user_error(&self) -> bool {
        !matches!(self, Self::Unavailable { .. })
    }
}

/// Reads the source's ranges and joins each feedback to its answer; if there are several, the newest counts. Answers without
/// feedback are counted, but are not rows. Ratings and preferences are counted as feedback and make no row.
///
/// # Errors
/// See [`SnapshotError`]; a broker that cannot be reached is given 30 seconds.
pub async fn read_rows(source: &KafkaSource) -> Result<Snapshot, SnapshotError> {
    check(source)?;
    let source = source.clone();
    // Dropping this future, such as by a timeout of the caller, ends the reading thread.
    let abandoned = CancellationToken::new();
    let _abandon = abandoned.clone().drop_guard();
    let unavailable = source.bootstrap_servers.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let (events, malformed) = read::read(&source, TIMEOUT, &abandoned)?;
        Ok(Snapshot { malformed, ..join::join(events) })
    });
    reading.await.unwrap_or_else(|error| {
        Err(SnapshotError::Unavailable {
            bootstrap_servers: unavailable,
            message: format!("the reader ended: {error}"),
        })
    })
}

/// Finds ranges that make no sense whatever the topic holds.
fn check(source: &KafkaSource) -> Result<(), SnapshotError> {
    let overlaps = |a: &OffsetRange, b: &OffsetRange| a.partition == b.partition && a.begin < b.end && b.begin < a.end;
    for (index, range) in source.ranges.iter().enumerate() {
        let message = if range.partition < 0 || range.begin < 0 {
            format!("partition {} and begin {} must not be negative", range.partition, range.begin)
        } else if range.begin > range.end {
            format!("begin {} is after end {}", range.begin, range.end)
        } else if let Some(other) = source.ranges[..index].iter().position(|other| overlaps(other, range)) {
            format!("it overlaps ranges[{other}]")
        } else {
            continue;
        };
        return Err(SnapshotError::Range { topic: source.topic.clone(), index, message });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn senseless_ranges_are_named() {
        let range = |partition, begin, end| OffsetRange { partition, begin, end };
        let cases = [
            (vec![range(0, 5, 5), range(0, 5, 9), range(1, 5, 9)], None),
            (
                vec![range(0, 5, 9), range(0, 4, 5), range(0, 8, 10)],
                Some("ranges[2] of topic \"t\" is not valid: it overlaps ranges[0]"),
            ),
            (vec![range(0, 5, 4)], Some("ranges[0] of topic \"t\" is not valid: begin 5 is after end 4")),
            (
                vec![range(0, -1, 4)],
                Some("ranges[0] of topic \"t\" is not valid: partition 0 and begin -1 must not be negative"),
            ),
        ];
        for (ranges, expected) in cases {
            let source = KafkaSource { bootstrap_servers: "k:9092".into(), topic: "t".into(), ranges };
            assert_eq!(check(&source).map_err(|error| error.to_string()).err().as_deref(), expected);
        }
    }
}
