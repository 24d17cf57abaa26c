//! Exact offset ranges of a deployment's topic as rows: what a retraining is trained on.
//!
//! The same ranges give the same rows in the same order, independent of the reader and of how Kafka interleaves its partitions.
//! Only those ranges are read, by assignment: no consumer group is joined and no offset committed. They are read twice, first for the
//! feedback and then for the answers that it is about, so that memory is bounded by the rows that there may be.

mod error;
mod join;
mod read;
mod rows;

use std::time::Duration;

use athanor_contract::{
    process::variable,
    train::{KafkaSource, OffsetRange},
};
use tokio_util::sync::CancellationToken;

use crate::signing::SigningKeys;
pub use error::SnapshotError;
use join::{Judgements, Limits};
use read::Reader;
pub use rows::{CorrectedAnswer, LabelledRow, Snapshot};

/// How long a broker may stay silent, or may not know the topic.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the source's ranges and joins each feedback to its answer; if there are several, the newest counts. Answers without
/// feedback are counted, but are not rows. Ratings and preferences are counted as feedback and make no row. What retention has
/// deleted of a range is left out and counted.
///
/// A source that names a Secret with signing keys is read with the keys of this process' environment.
///
/// # Errors
/// See [`SnapshotError`]; a broker that cannot be reached, or does not know the topic, is given 30 seconds.
pub async fn read_rows(source: &KafkaSource) -> Result<Snapshot, SnapshotError> {
    let keys = match &source.signing_keys_secret_name {
        Some(secret) => Some(signing_keys(secret)?),
        None => None,
    };
    read_rows_signed_by(source, keys).await
}

fn signing_keys(secret: &str) -> Result<SigningKeys, SnapshotError> {
    let error = |message: String| SnapshotError::Keys { secret: secret.to_owned(), message };
    let keys = SigningKeys::from_environment().map_err(|read| error(read.to_string()))?;
    keys.ok_or_else(|| error(format!("{} is not set to a folder with its keys", variable::SIGNING_KEYS)))
}

/// [`read_rows`] with these keys; `None`: signatures are not verified.
///
/// # Errors
/// As for [`read_rows`].
pub async fn read_rows_signed_by(source: &KafkaSource, keys: Option<SigningKeys>) -> Result<Snapshot, SnapshotError> {
    check(source)?;
    let source = source.clone();
    // Dropping this future, such as by a timeout of the caller, ends the reading thread.
    let abandoned = CancellationToken::new();
    let _abandon = abandoned.clone().drop_guard();
    let unavailable = source.bootstrap_servers.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let limits = Limits {
            maximum_samples: source.maximum_samples as usize,
            maximum_caller_percent: source.maximum_caller_percent,
        };
        let reader = Reader::open(&source, keys.as_ref(), TIMEOUT, &abandoned)?;
        let mut judgements = Judgements::new(limits);
        let counts = reader.read(&mut |placed| judgements.take(placed))?;
        let mut answers = judgements.choose();
        reader.read(&mut |placed| answers.take(placed))?;
        let (malformed, unsigned, deleted) = (counts.malformed, counts.unsigned, reader.deleted);
        Ok(Snapshot { malformed, unsigned, deleted, ..answers.finish() })
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
            let source = KafkaSource::new("k:9092", "t", ranges);
            assert_eq!(check(&source).map_err(|error| error.to_string()).err().as_deref(), expected);
        }
    }
}
