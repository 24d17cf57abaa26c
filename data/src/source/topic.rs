//! Offset ranges of a topic to rows, what of the ranges is no row, and the copy of both that a later reading finds.
//!
//! The copy lies next to the checkpoints. Every machine of a job and every restart trains on the rows of the first
//! reading, even if retention has deleted some of them since: checkpoints of a run belong to the digest of its rows.

use std::collections::HashMap;

use athanor_contract::{artifact::sha256_hex, event::GenerationInput, train::KafkaSource};
use athanor_feedback::{CorrectedAnswer, LabelledRow, Snapshot, SnapshotError};
use athanor_store::{Location, StoreError};

use crate::{
    DataError, Progress,
    builder::Builder,
    conversation::Conversation,
    progress::Report,
    rows::{Fields, Origin},
    strings::Strings,
    topic_report::TopicReport,
};

/// Level of the copy's compression.
const ZSTD_LEVEL: i32 = 3;

/// Adds the rows of a topic, each text at its first place with its newest label or answer. Returns their digest and, in
/// parentheses, what was left out. `snapshots`: where they are kept for the next reading of the same ranges.
pub(super) async fn read(
    name: &str,
    kafka: &KafkaSource,
    builder: &mut Builder,
    snapshots: Option<&Location>,
    report: Report<'_>,
) -> Result<(String, String), DataError> {
    let from_kafka = async || athanor_feedback::read_rows(kafka).await;
    let snapshot = match snapshots {
        Some(snapshots) => kept(snapshots, kafka, from_kafka).await?,
        None => from_kafka().await?,
    };
    let held = TopicReport::new(name, &kafka.topic, &snapshot);
    let left_out = held.to_string();
    if !left_out.is_empty() {
        tracing::warn!(source = name, topic = kafka.topic, "left out of the offset ranges: {left_out}");
    }
    builder.add_topic(held);
    let digest = snapshot.digest.clone();
    let read = add(snapshot, &kafka.topic, builder);
    let file = &kafka.topic;
    report(Progress::Reading { source: name, file, bytes_read: 0, bytes_total: None, rows: read });
    Ok((digest, if left_out.is_empty() { left_out } else { format!(" (left out: {left_out})") }))
}

/// The snapshot that an earlier reading of this source kept; else that of `read`, which is kept.
async fn kept(
    snapshots: &Location,
    kafka: &KafkaSource,
    read: impl AsyncFnOnce() -> Result<Snapshot, SnapshotError>,
) -> Result<Snapshot, DataError> {
    let source = serde_json::to_vec(kafka).map_err(|error| DataError::Other(error.to_string()))?;
    let place = snapshots.child(&format!("kafka-{}.json.zst", &sha256_hex(&source)[..16]));
    if let Some(snapshot) = load(&place).await? {
        return Ok(snapshot);
    }
    let snapshot = read().await?;
    let packing = move || -> std::io::Result<_> {
        let mut to = zstd::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
        to.include_checksum(true)?;
        serde_json::to_writer(&mut to, &snapshot)?;
        Ok((to.finish()?, snapshot))
    };
    let packed = tokio::task::spawn_blocking(packing).await.map_err(|error| DataError::Other(error.to_string()))?;
    let (bytes, snapshot) = packed.map_err(|error| DataError::Other(format!("{}: {error}", place.uri)))?;
    if place.write_new(bytes.into()).await? {
        return Ok(snapshot);
    }
    // Another machine of the job was first: all train on its rows.
    load(&place).await?.ok_or_else(|| DataError::Other(format!("{}: deleted while it was read", place.uri)))
}

async fn load(place: &Location) -> Result<Option<Snapshot>, DataError> {
    let bytes = match place.read().await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let unpacking =
        move || -> std::io::Result<Snapshot> { Ok(serde_json::from_slice(&zstd::decode_all(&bytes[..])?)?) };
    let unpacked = tokio::task::spawn_blocking(unpacking).await.map_err(|error| DataError::Other(error.to_string()))?;
    let damaged = |error| {
        let uri = &place.uri;
        DataError::Other(format!("{uri}: the kept rows are damaged ({error}); without the file Kafka is read again"))
    };
    let snapshot = unpacked.map_err(damaged)?;
    tracing::info!(uri = place.uri, digest = snapshot.digest, "the rows are those of the job's first reading");
    Ok(Some(snapshot))
}

/// Adds the rows of a snapshot and returns their number.
fn add(snapshot: Snapshot, topic: &str, builder: &mut Builder) -> u64 {
    let labelled = snapshot.rows.into_iter().map(TopicRow::labelled);
    let rows: Vec<TopicRow> = labelled.chain(snapshot.corrections.into_iter().map(TopicRow::corrected)).collect();
    let read = rows.len() as u64;
    let rows = if builder.drops_duplicates() { newest_of_each_text(rows) } else { rows };
    let mut events = Strings::default();
    rows.iter().for_each(|row| events.push(&row.id));
    builder.begin_file(Origin::Topic { topic: topic.to_owned(), events });
    for (number, row) in (0..).zip(&rows) {
        let fields = Fields {
            text: &row.text,
            label: row.label.as_deref(),
            pair: row.answer.as_deref(),
            is_conversation: row.is_conversation,
            ..Fields::default()
        };
        builder.row(number, fields);
    }
    read
}

/// A recorded request with its feedback.
#[derive(Debug, PartialEq, Eq)]
struct TopicRow {
    id: String,
    text: String,
    /// The label that a classified text should have had.
    label: Option<String>,
    /// The answer that a language model should have given.
    answer: Option<String>,
    is_conversation: bool,
}

impl TopicRow {
    fn labelled(row: LabelledRow) -> Self {
        Self { id: row.id, text: row.text, label: Some(row.label), answer: None, is_conversation: false }
    }

    fn corrected(row: CorrectedAnswer) -> Self {
        let (text, answer, is_conversation) = match row.input {
            GenerationInput::Prompt(prompt) => (prompt, row.expected, false),
            GenerationInput::Messages(messages) => {
                let Conversation { before, answer } = Conversation::corrected(&messages, &row.expected);
                (before, answer, true)
            }
        };
        Self { id: row.id, text, label: None, answer: Some(answer), is_conversation }
    }
}

fn newest_of_each_text(rows: Vec<TopicRow>) -> Vec<TopicRow> {
    let mut kept: Vec<TopicRow> = Vec::with_capacity(rows.len());
    let mut places: HashMap<(String, bool), usize> = HashMap::with_capacity(rows.len());
    for row in rows {
        match places.get(&(row.text.clone(), row.is_conversation)) {
            Some(&place) => kept[place] = row,
            None => {
                places.insert((row.text.clone(), row.is_conversation), kept.len());
                kept.push(row);
            }
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use athanor_contract::train::{OffsetRange, OnBadRow};

    use super::*;

    #[test]
    fn the_newest_label_of_a_topic_counts() {
        let row = |id: &str, text: &str, label: &str| {
            TopicRow::labelled(LabelledRow { id: id.into(), text: text.into(), label: label.into() })
        };
        let rows = vec![row("1/0", "a", "x"), row("2/0", "b", "x"), row("3/0", "a", "y")];
        assert_eq!(newest_of_each_text(rows), [row("3/0", "a", "y"), row("2/0", "b", "x")]);
    }

    #[test]
    fn corrected_answers_are_rows_with_the_expected_text() {
        let corrected = |id: &str, input, expected: &str| {
            TopicRow::corrected(CorrectedAnswer { id: id.into(), input, expected: expected.into() })
        };
        let messages = || GenerationInput::Messages(vec![serde_json::json!({"role": "user", "content": "q"})]);
        let prompt = || GenerationInput::Prompt("[{\"content\":\"q\",\"role\":\"user\"}]".into());
        let rows = vec![
            corrected("1/0", messages(), "old"),
            corrected("2/0", prompt(), "p"),
            corrected("3/0", messages(), "new"),
        ];
        let kept = newest_of_each_text(rows);
        let texts: Vec<_> = kept.iter().map(|row| (row.is_conversation, row.answer.as_deref().unwrap())).collect();
        assert_eq!(
            texts,
            [(true, "{\"content\":\"new\",\"role\":\"assistant\"}"), (false, "p")],
            "a prompt is no conversation"
        );
        assert_eq!(kept[0].text, kept[1].text);
    }

    fn source(end: i64) -> KafkaSource {
        KafkaSource::new("127.0.0.1:1", "events", vec![OffsetRange { partition: 0, begin: 0, end }])
    }

    /// As retention leaves it: the digest is that of the rows.
    fn snapshot(ids: &[&str]) -> Snapshot {
        let row = |id: &&str| LabelledRow { id: (*id).into(), text: format!("text {id}"), label: "x".into() };
        let message = serde_json::json!({"role": "user", "z": 0.1, "a": [1, null]});
        let input = GenerationInput::Messages(vec![message]);
        let corrections = vec![CorrectedAnswer { id: "c/0".into(), input, expected: "yes".into() }];
        let (rows, digest) = (ids.iter().map(row).collect(), ids.concat());
        Snapshot { rows, corrections, digest, deleted: 7, orphans: 2, ..Snapshot::default() }
    }

    #[tokio::test]
    async fn a_later_reading_has_the_rows_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let place = athanor_store::open(&format!("file://{}", folder.path().display())).unwrap();
        let first = kept(&place, &source(9), async || Ok(snapshot(&["1/0", "2/0"]))).await.unwrap();
        assert_eq!(first, snapshot(&["1/0", "2/0"]));
        let again = kept(&place, &source(9), async || panic!("Kafka is not read again")).await.unwrap();
        assert_eq!(again, first);
        let other = kept(&place, &source(8), async || Ok(snapshot(&["2/0"]))).await.unwrap();
        assert_eq!(other, snapshot(&["2/0"]), "other ranges are another source");
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let path = file.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        }
        let error = kept(&place, &source(9), async || panic!("not read")).await.unwrap_err();
        assert!(matches!(&error, DataError::Other(message) if message.contains("damaged")), "{error}");
    }

    /// Both find no copy and read; retention deletes a row between them.
    #[tokio::test]
    async fn machines_that_read_at_the_same_time_have_the_same_rows() {
        let folder = tempfile::tempdir().unwrap();
        let place = athanor_store::open(&format!("file://{}", folder.path().display())).unwrap();
        let both = tokio::sync::Barrier::new(2);
        let reads = Cell::new(0);
        let machine = async |ids: &[&str]| {
            let read = async || {
                reads.set(reads.get() + 1);
                both.wait().await;
                Ok(snapshot(ids))
            };
            kept(&place, &source(9), read).await.unwrap()
        };
        let (one, other) = tokio::join!(machine(&["1/0", "2/0"]), machine(&["2/0"]));
        assert_eq!(reads.get(), 2);
        assert_eq!(one, other);
    }

    #[test]
    fn what_is_no_row_is_counted_by_cause() {
        let snapshot = Snapshot { beyond_share: 3, unsigned: 1, malformed: 4, feedbacks: 20, ..snapshot(&["1/0"]) };
        let report = TopicReport::new("feedback", "events", &snapshot);
        let expected = "7 offsets deleted by retention, 3 rows beyond a caller's share, 1 events without a valid signature, \
                        2 labels without their answer, 4 records that are no events";
        assert_eq!(report.to_string(), expected);
        assert_eq!((report.rows, report.feedbacks, report.beyond_maximum), (2, 20, 0));
        assert_eq!(TopicReport::default().to_string(), "");
    }

    #[tokio::test]
    async fn what_was_left_out_is_part_of_the_dataset() {
        let folder = tempfile::tempdir().unwrap();
        let place = athanor_store::open(&format!("file://{}", folder.path().display())).unwrap();
        kept(&place, &source(9), async || Ok(snapshot(&["1/0", "2/0"]))).await.unwrap();
        let mut builder = Builder::new(None, OnBadRow::Fail).unwrap();
        let (digest, left_out) = read("feedback", &source(9), &mut builder, Some(&place), &|_| {}).await.unwrap();
        assert_eq!(digest, "1/02/0");
        assert_eq!(left_out, " (left out: 7 offsets deleted by retention, 2 labels without their answer)");
        let topics = builder.take_topics();
        assert_eq!(topics, [TopicReport::new("feedback", "events", &snapshot(&["1/0", "2/0"]))]);
    }
}
