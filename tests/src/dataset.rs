//! What a job says that it trained on, against the events of its ranges.

use anyhow::{Context, Result, ensure};
use athanor_contract::{artifact::sha256_hex, train::OffsetRange};
use athanor_crds::FineTuneJob;
use serde_json::Value;

use crate::{
    events::Record,
    labelled::{Labelled, content_digest, data_digest, expected_rows, labelled},
    storage,
};

/// Compares a job that succeeded with the events that its ranges hold: the rows of the Kafka source in its report, and the
/// digest over ids, texts and labels of all rows. Returns the labelled answers.
///
/// # Errors
/// They differ.
pub async fn check(job: &FineTuneJob, records: &[Record]) -> Result<Vec<Labelled>> {
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let data = &job.spec.train.data;
    let summary = job.status.as_ref().and_then(|status| status.summary.as_ref()).context("the job has no summary")?;
    let source = data.sources.iter().find(|source| source.kafka.is_some()).context("no Kafka source")?;
    let kafka = source.kafka.as_ref().context("no Kafka source")?;
    let rows = labelled(records, &kafka.ranges)?;
    let has_limit = kafka.maximum_caller_percent < 100 || rows.len() > kafka.maximum_samples as usize;
    ensure!(!has_limit, "{name}: a limit of rows that this check does not compute");

    let expected = expected_rows(&rows, data)?;
    let report: Value = serde_json::from_slice(&read(&format!("{}/report.json", summary.artifact)).await?)?;
    let reported = reported_rows(&report, &source.name)?;
    ensure!(
        reported == expected as u64,
        "{name}: the report has {reported} rows of {}, the topic {expected} in {:?}",
        source.name,
        shown(&kafka.ranges)
    );

    let mut contents = Vec::with_capacity(data.sources.len());
    for source in &data.sources {
        contents.push(match &source.uri {
            Some(uri) => sha256_hex(&read(uri).await?),
            None => content_digest(&rows),
        });
    }
    let digest = data_digest(data, &contents)?;
    ensure!(
        digest == summary.data_digest,
        "{name}: its data have the digest {}, the events of its ranges {digest}",
        summary.data_digest
    );
    Ok(rows)
}

/// Rows of a source in all parts of a report.
fn reported_rows(report: &Value, source: &str) -> Result<u64> {
    let mut sources = report["sources"].as_array().context("the report has no sources")?.iter();
    let found = sources.find(|found| found["name"] == source);
    let found = found.with_context(|| format!("the report has no source {source}"))?;
    let part = |part: &str| found[part].as_u64().with_context(|| format!("source {source}: no {part}"));
    Ok(part("train")? + part("validation")? + part("test")?)
}

fn shown(ranges: &[OffsetRange]) -> String {
    let range = |range: &OffsetRange| format!("{}: {}-{}", range.partition, range.begin, range.end);
    ranges.iter().map(range).collect::<Vec<_>>().join(", ")
}

/// An object of the cluster's bucket by its address.
async fn read(uri: &str) -> Result<Vec<u8>> {
    let key = uri.strip_prefix(&format!("s3://{}/", storage::BUCKET)).context("the object is elsewhere")?;
    storage::get(&storage::bucket()?, key).await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_of_all_parts_count() {
        let source = |name: &str, train: u64| json!({"name": name, "train": train, "validation": 2, "test": 3});
        let report = json!({"sources": [source("amazon", 100), source("feedback", 10)]});
        assert_eq!(reported_rows(&report, "feedback").unwrap(), 15);
        assert!(reported_rows(&report, "other").is_err());
    }
}
