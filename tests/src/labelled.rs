//! What a dataset of recorded events has to hold, computed from records that a consumer of this crate read: which answers
//! have a label or a correction, and the digest that a job reports for exactly these rows.
//!
//! Shares no code with the reader of the trainer, so that a mistake there is seen. The formats are those of
//! docs/events.md; two unit tests below pin both digests.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use athanor_contract::{
    artifact::sha256_hex,
    event::{FEEDBACK, GENERATION, PREDICTION},
    train::{DataSpec, ExactDuplicates, OffsetRange, OnBadRow, Source},
};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use crate::{
    cluster::wait,
    events::{Record, read_all},
};

/// An answer with the label or text that it should have been.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    /// `{request id}/{index}`.
    pub id: String,
    /// Revision that answered.
    pub revision: String,
    pub input: Input,
    pub expected: String,
    pub partition: i32,
    pub offset: i64,
}

/// What was asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Input {
    /// The text that a classifier was asked about.
    Text(String),
    /// The messages that a language model was sent, as JSON with sorted keys.
    Messages(String),
    Prompt(String),
}

impl Labelled {
    pub fn is_in(&self, ranges: &[OffsetRange]) -> bool {
        contains(ranges, self.partition, self.offset)
    }
}

fn contains(ranges: &[OffsetRange], partition: i32, offset: i64) -> bool {
    ranges.iter().any(|range| range.partition == partition && (range.begin..range.end).contains(&offset))
}

/// One range for each partition, from offset 0 to the last record.
pub fn whole(records: &[Record]) -> Vec<OffsetRange> {
    let mut ends: BTreeMap<i32, i64> = BTreeMap::new();
    for record in records {
        let end = ends.entry(record.partition).or_insert(0);
        *end = (*end).max(record.offset + 1);
    }
    ends.into_iter().map(|(partition, end)| OffsetRange { partition, begin: 0, end }).collect()
}

/// The newest label of each answer: time and id of its event, and its value.
type Newest = BTreeMap<String, (Timestamp, String, String)>;

/// Answers of the ranges with a label or a correction in the ranges, in the order of partition and offset. Of several
/// labels the newest counts, by the event's time, then by its id. A repeated delivery of an answer counts once.
///
/// # Errors
/// A record's value is not JSON or lacks a field.
pub fn labelled(records: &[Record], ranges: &[OffsetRange]) -> Result<Vec<Labelled>> {
    let mut inside: Vec<&Record> =
        records.iter().filter(|record| contains(ranges, record.partition, record.offset)).collect();
    inside.sort_by_key(|record| (record.partition, record.offset));
    // By the id of the answer: a label is for an answer of a classifier, a text for one of a language model.
    let (mut labels, mut texts) = (Newest::new(), Newest::new());
    for record in inside.iter().filter(|record| record.kind == FEEDBACK) {
        let data = parse(record)?;
        for (field, newest) in [("expectedLabel", &mut labels), ("expectedText", &mut texts)] {
            let Some(expected) = data[field].as_str() else { continue };
            let time: Timestamp = record.time.parse().with_context(|| format!("time of event {}", record.id))?;
            let this = (time, record.id.clone(), expected.to_owned());
            let known = newest.entry(answer_id(&data)?).or_insert_with(|| this.clone());
            if (&this.0, &this.1) > (&known.0, &known.1) {
                *known = this;
            }
        }
    }
    let (mut rows, mut seen) = (Vec::new(), BTreeSet::new());
    for record in inside {
        let newest = match record.kind.as_str() {
            PREDICTION => &labels,
            GENERATION => &texts,
            _ => continue,
        };
        let data = parse(record)?;
        let id = answer_id(&data)?;
        // What another adapter was asked is not trained on.
        let Some((_, _, expected)) = newest.get(&id).filter(|_| data["adapter"].is_null()) else { continue };
        if !seen.insert(id.clone()) {
            continue;
        }
        let (partition, offset, expected) = (record.partition, record.offset, expected.clone());
        let revision = data["revision"].as_str().context("an answer without a revision")?.to_owned();
        rows.push(Labelled { id, revision, input: input(&data)?, expected, partition, offset });
    }
    Ok(rows)
}

fn parse(record: &Record) -> Result<Value> {
    serde_json::from_slice(&record.value).with_context(|| format!("the value of event {}", record.id))
}

fn answer_id(data: &Value) -> Result<String> {
    let request = data["requestId"].as_str().context("an event without requestId")?;
    let index = data["index"].as_u64().context("an event without index")?;
    Ok(format!("{request}/{index}"))
}

fn input(data: &Value) -> Result<Input> {
    if let Some(text) = data["text"].as_str() {
        return Ok(Input::Text(text.to_owned()));
    }
    if let Some(prompt) = data["input"]["prompt"].as_str() {
        return Ok(Input::Prompt(prompt.to_owned()));
    }
    let mut messages = data["input"]["messages"].clone();
    ensure!(messages.is_array(), "an answer without text, prompt and messages");
    messages.sort_all_objects();
    Ok(Input::Messages(messages.to_string()))
}

/// Answers of the ranges with a label or a correction before the end of the ranges: that of a monitor or of a retraining
/// which has read the topic from its beginning. After an outage a label may come before its answer.
///
/// # Errors
/// As for [`labelled`].
pub fn labelled_by_the_end(records: &[Record], ranges: &[OffsetRange]) -> Result<Vec<Labelled>> {
    let from_beginning: Vec<OffsetRange> = ranges.iter().map(|range| OffsetRange { begin: 0, ..*range }).collect();
    let mut rows = labelled(records, &from_beginning)?;
    rows.retain(|row| row.is_in(ranges));
    Ok(rows)
}

/// Number of rows that a job with this specification has of these answers: without cleaning, and with one that drops
/// duplicates, a text is a row once.
///
/// # Errors
/// The specification has another cleaning than that of duplicates, which this crate does not compute.
pub fn expected_rows(rows: &[Labelled], data: &DataSpec) -> Result<usize> {
    let Some(clean) = &data.clean else {
        return Ok(rows.iter().map(|row| &row.input).collect::<BTreeSet<_>>().len());
    };
    let same = athanor_contract::train::CleanSpec { exact_duplicates: clean.exact_duplicates, ..Default::default() };
    ensure!(*clean == same, "a cleaning of more than duplicates");
    Ok(match clean.exact_duplicates {
        ExactDuplicates::Keep => rows.len(),
        ExactDuplicates::Drop => rows.iter().map(|row| &row.input).collect::<BTreeSet<_>>().len(),
    })
}

/// The digest of a Kafka source's content: sha256 over the fields of the rows, each preceded by its length in bytes as 64
/// bits, little endian.
pub fn content_digest(rows: &[Labelled]) -> String {
    let mut bytes = Vec::new();
    let mut add = |field: &str| {
        bytes.extend_from_slice(&(field.len() as u64).to_le_bytes());
        bytes.extend_from_slice(field.as_bytes());
    };
    let is_text = |row: &&Labelled| matches!(row.input, Input::Text(_));
    for row in rows.iter().filter(is_text).chain(rows.iter().filter(|row| !is_text(row))) {
        add(&row.id);
        match &row.input {
            Input::Text(text) => add(text),
            Input::Messages(messages) => ["messages", messages.as_str()].into_iter().for_each(&mut add),
            Input::Prompt(prompt) => ["prompt", prompt.as_str()].into_iter().for_each(&mut add),
        }
        add(&row.expected);
    }
    sha256_hex(&bytes)
}

/// The digest of a whole dataset, `dataDigest` of a job's summary. `contents` are the digests of the sources' contents.
///
/// # Errors
/// The specification cannot be written as JSON.
pub fn data_digest(data: &DataSpec, contents: &[String]) -> Result<String> {
    #[derive(Serialize)]
    struct Identity<'a> {
        source: &'a Source,
        content: &'a str,
    }
    let identities: Vec<Identity> =
        std::iter::zip(&data.sources, contents).map(|(source, content)| Identity { source, content }).collect();
    ensure!(data.on_bad_row == OnBadRow::Fail, "onBadRow changes the digest");
    let identity = match &data.clean {
        None => serde_json::to_vec(&(identities, &data.split)),
        Some(clean) => serde_json::to_vec(&(identities, &data.split, clean)),
    };
    Ok(sha256_hex(&identity?))
}

/// Compares request ids that clients know with those of recorded events of one kind, `(event id, request id)`. An event may
/// be delivered twice, with the same event id. Returns the number of events of other requests.
///
/// # Errors
/// A request has no event, or several with different ids; the message names some.
pub fn exactly_once<'a>(
    what: &str,
    known: &[String],
    events: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<usize> {
    let distinct: BTreeSet<(&str, &str)> = events.collect();
    let mut counts: BTreeMap<&str, usize> = known.iter().map(|id| (id.as_str(), 0)).collect();
    ensure!(counts.len() == known.len(), "{what}: a client knows a request id twice");
    let mut others = 0;
    for (_, request) in distinct {
        match counts.get_mut(request) {
            Some(count) => *count += 1,
            None => others += 1,
        }
    }
    let wrong: Vec<String> =
        counts.iter().filter(|(_, count)| **count != 1).map(|(id, count)| format!("{id}: {count}")).collect();
    let shown = &wrong[..wrong.len().min(5)];
    ensure!(
        wrong.is_empty(),
        "{what}: {} of {} requests are not recorded exactly once: {shown:?}",
        wrong.len(),
        counts.len()
    );
    Ok(others)
}

/// Waits until a topic has an event of kind `answer` for each of the answered requests, and feedback for each of those whose
/// feedback was accepted. Returns all records.
///
/// # Errors
/// Some are missing after half a minute, or the topic cannot be read.
pub async fn recorded(
    topic: &'static str,
    answer: &'static str,
    answered: &[String],
    accepted: &[String],
) -> Result<Vec<Record>> {
    wait("every event is in Kafka", Duration::from_secs(30), async || {
        let records = tokio::task::spawn_blocking(move || read_all(topic)).await??;
        let has_all = |kind: &'static str, known: &[String]| {
            let requests: BTreeSet<&str> = ids(&records, kind).map(|(_, request)| request).collect();
            known.iter().all(|id| requests.contains(&**id))
        };
        Ok((has_all(answer, answered) && has_all(FEEDBACK, accepted)).then_some(records))
    })
    .await
}

/// Event ids and request ids of the events of one kind.
pub fn ids<'a>(records: &'a [Record], kind: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    records.iter().filter(move |record| record.kind == kind).map(|record| (&*record.id, &*record.request_id))
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    pub fn record(partition: i32, offset: i64, kind: &str, id: &str, time: &str, data: Value) -> Record {
        Record {
            partition,
            offset,
            id: id.into(),
            kind: kind.into(),
            time: format!("2026-11-24T12:00:{time}Z"),
            trace_parent: None,
            request_id: data["requestId"].as_str().unwrap_or_default().into(),
            value: data.to_string().into_bytes(),
        }
    }

    pub fn prediction(partition: i32, offset: i64, request: &str, revision: &str, text: &str) -> Record {
        let data = json!({"requestId": request, "index": 0, "revision": revision, "text": text, "label": "a"});
        record(partition, offset, PREDICTION, &format!("{request}/0"), "00", data)
    }

    pub fn feedback(partition: i32, offset: i64, id: &str, second: &str, request: &str, label: &str) -> Record {
        let data = json!({"requestId": request, "index": 0, "expectedLabel": label});
        record(partition, offset, FEEDBACK, id, second, data)
    }

    pub fn range(partition: i32, begin: i64, end: i64) -> OffsetRange {
        OffsetRange { partition, begin, end }
    }

    fn sample() -> Vec<Record> {
        vec![
            prediction(1, 0, "q", "r1", "text q"),
            prediction(0, 3, "p", "r1", "text p"),
            prediction(0, 4, "p", "r1", "text p"),
            feedback(0, 5, "f1", "09", "p", "newest"),
            feedback(0, 6, "f2", "05", "p", "older, replayed"),
            feedback(0, 7, "f1", "09", "p", "newest"),
            feedback(1, 1, "f4", "01", "gone", "orphan"),
            prediction(1, 2, "unlabelled", "r1", "text"),
            feedback(1, 3, "f5", "01", "q", "b"),
        ]
    }

    fn shown(rows: &[Labelled]) -> Vec<(&str, &str)> {
        rows.iter().map(|row| (row.id.as_str(), row.expected.as_str())).collect()
    }

    #[test]
    fn answers_are_joined_with_their_newest_label_inside_the_ranges() {
        let records = sample();
        let all = labelled(&records, &whole(&records)).unwrap();
        assert_eq!(shown(&all), [("p/0", "newest"), ("q/0", "b")]);
        // A label behind the end of the range, an answer before its begin.
        assert_eq!(shown(&labelled(&records, &[range(0, 0, 8), range(1, 0, 3)]).unwrap()), [("p/0", "newest")]);
        assert_eq!(shown(&labelled(&records, &[range(0, 5, 8), range(1, 0, 4)]).unwrap()), [("q/0", "b")]);
    }

    #[test]
    fn a_label_before_the_begin_of_the_ranges_is_one_for_who_has_read_it() {
        let records = [feedback(0, 3, "f", "01", "p", "a"), prediction(0, 4, "p", "r1", "text")];
        let ranges = [range(0, 4, 5)];
        assert_eq!(labelled(&records, &ranges).unwrap(), []);
        assert_eq!(shown(&labelled_by_the_end(&records, &ranges).unwrap()), [("p/0", "a")]);
        assert_eq!(labelled_by_the_end(&records, &[range(0, 5, 9)]).unwrap(), []);
    }

    #[test]
    fn corrections_of_the_revision_itself_are_rows() {
        let asked = |request: &str, adapter: Value| {
            let data = json!({"requestId": request, "index": 0, "revision": "r1", "adapter": adapter,
                "input": {"messages": [{"role": "user", "content": "hello"}]}, "answer": "x"});
            record(0, 2, GENERATION, &format!("{request}/0"), "00", data)
        };
        let corrected = |request: &str| {
            let data = json!({"requestId": request, "index": 0, "expectedText": "good"});
            record(0, 3, FEEDBACK, "f", "01", data)
        };
        let rows = labelled(&[asked("a", Value::Null), corrected("a")], &[range(0, 0, 9)]).unwrap();
        assert_eq!(rows[0].input, Input::Messages(r#"[{"content":"hello","role":"user"}]"#.into()));
        assert!(labelled(&[asked("a", json!("legal")), corrected("a")], &[range(0, 0, 9)]).unwrap().is_empty());
    }

    /// The values are those of the trainer's own tests: `feedback/src/snapshot/join.rs`, `data/src/read/tests.rs`.
    #[test]
    fn digests_are_those_of_the_trainer() {
        let records = [prediction(0, 0, "p", "r1", "text"), feedback(0, 1, "f", "01", "p", "a")];
        let rows = labelled(&records, &whole(&records)).unwrap();
        assert_eq!(content_digest(&rows), "79057823a0628d18e1da80120ede750f1bd587fd3129d970f5d17127eec9b9bf");
        let data: DataSpec =
            serde_json::from_value(json!({"sources": [{"name": "s", "uri": "file:///x.csv"}]})).unwrap();
        let text = r#"[[{"source":{"name":"s","uri":"file:///x.csv","columns":{"text":"text","label":"label"}},"content":"c"}],{"validationPercent":10,"testPercent":10,"seed":0}]"#;
        assert_eq!(data_digest(&data, &["c".into()]).unwrap(), sha256_hex(text.as_bytes()));
    }

    /// Each mistake that a dataset could have leads to another digest.
    #[test]
    fn a_lost_doubled_or_changed_row_changes_the_digest() {
        let records = sample();
        let rows = labelled(&records, &whole(&records)).unwrap();
        let digest = content_digest(&rows);
        let changed = |change: &dyn Fn(&mut Vec<Labelled>)| {
            let mut rows = rows.clone();
            change(&mut rows);
            content_digest(&rows)
        };
        assert_ne!(changed(&|rows| drop(rows.pop())), digest, "lost");
        assert_ne!(changed(&|rows| rows.push(rows[0].clone())), digest, "doubled");
        assert_ne!(changed(&|rows| rows.swap(0, 1)), digest, "in another order");
        assert_ne!(changed(&|rows| rows[0].expected = "older, replayed".into()), digest, "another label");
        assert_ne!(changed(&|rows| rows[0].id = "x/0".into()), digest, "another id");
    }

    #[test]
    fn rows_are_counted_as_the_specification_says() {
        let records = [
            prediction(0, 0, "a", "r", "same"),
            prediction(0, 1, "b", "r", "same"),
            feedback(0, 2, "f1", "01", "a", "x"),
            feedback(0, 3, "f2", "01", "b", "y"),
        ];
        let rows = labelled(&records, &whole(&records)).unwrap();
        let count = |clean: Value| {
            let mut data = json!({"sources": []});
            if !clean.is_null() {
                data["clean"] = clean;
            }
            expected_rows(&rows, &serde_json::from_value(data).unwrap())
        };
        assert_eq!(count(Value::Null).unwrap(), 1);
        assert_eq!(count(json!({})).unwrap(), 1);
        assert_eq!(count(json!({"exactDuplicates": "Keep"})).unwrap(), 2);
        assert!(count(json!({"minimumLength": 3})).is_err());
    }

    #[test]
    fn a_missing_and_a_doubled_event_are_found() {
        let known: Vec<String> = ["a", "b"].map(Into::into).into();
        let check = |events: &[(&'static str, &'static str)]| exactly_once("feedback", &known, events.iter().copied());
        assert_eq!(check(&[("1", "a"), ("2", "b"), ("2", "b"), ("3", "other")]).unwrap(), 1);
        assert!(check(&[("1", "a")]).unwrap_err().to_string().ends_with(r#"["b: 0"]"#));
        assert!(check(&[("1", "a"), ("2", "b"), ("3", "b")]).unwrap_err().to_string().ends_with(r#"["b: 2"]"#));
        assert!(exactly_once("feedback", &["a".into(), "a".into()], [("1", "a")].into_iter()).is_err());
    }
}
