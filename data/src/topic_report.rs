//! What of a topic's offset ranges became rows, and what did not.

use std::fmt;

use athanor_feedback::Snapshot;
use serde::Serialize;

/// What the offset ranges of a source held, and what of it is no row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TopicReport {
    /// Name of the source.
    pub source: String,
    pub topic: String,
    /// Labels and corrections that are rows, before cleaning.
    pub rows: u64,
    /// Feedback events, repeated deliveries included.
    pub feedbacks: u64,
    /// Offsets that retention had deleted before they were read.
    pub deleted: u64,
    /// Rows beyond the share of one caller (maximumCallerPercent).
    pub beyond_share: u64,
    /// Labels and corrections for which there are maximumSamples newer ones.
    pub beyond_maximum: u64,
    /// Events that none of the deployment's keys signed.
    pub unsigned: u64,
    /// Labels and corrections whose answer is not in the ranges.
    pub orphans: u64,
    /// Records that are no events.
    pub malformed: u64,
}

impl TopicReport {
    pub(crate) fn new(source: &str, topic: &str, snapshot: &Snapshot) -> Self {
        let &Snapshot { feedbacks, deleted, beyond_share, beyond_maximum, unsigned, orphans, malformed, .. } = snapshot;
        let rows = (snapshot.rows.len() + snapshot.corrections.len()) as u64;
        let (source, topic) = (source.to_owned(), topic.to_owned());
        Self { source, topic, rows, feedbacks, deleted, beyond_share, beyond_maximum, unsigned, orphans, malformed }
    }
}

/// What was left out, separated by commas; empty if nothing was.
impl fmt::Display for TopicReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (self.deleted, "offsets deleted by retention"),
            (self.beyond_share, "rows beyond a caller's share"),
            (self.beyond_maximum, "rows beyond maximumSamples"),
            (self.unsigned, "events without a valid signature"),
            (self.orphans, "labels without their answer"),
            (self.malformed, "records that are no events"),
        ];
        let some: Vec<String> =
            all.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
        f.write_str(&some.join(", "))
    }
}
