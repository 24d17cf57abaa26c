//! What can be said of rows only once all are there: texts that occur twice, texts with different labels, near
//! duplicates.
//!
//! Exact duplicates and conflicts take 16 bytes a row while they are sought, near duplicates 37 and up to 448 MiB
//! beside them.

use std::borrow::Cow;

use athanor_contract::train::{CleanSpec, ConflictingLabels, ExactDuplicates, HeldOutPart, NearDuplicateAction};

use super::{
    CleaningReport, Clusters, Example, Step,
    clusters::near_duplicates,
    minhash::hash,
    report::{EXAMPLES, Effect, excerpt},
};
use crate::{error::DataError, progress::Report, random::mix};

/// Cleaned rows by index, at most `u32::MAX` of them.
pub trait Corpus: Sync {
    fn len(&self) -> usize;
    fn text(&self, row: usize) -> &str;
    /// The second text of a row of pairs.
    fn pair(&self, row: usize) -> Option<&str>;
    /// `None` for a row without a label, which conflicts with none.
    fn label(&self, row: usize) -> Option<&str>;
    /// Index of the row's source.
    fn source(&self, row: usize) -> usize;
    /// Where the row came from, for messages.
    fn place(&self, row: usize) -> String;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How the rows of a source stand to each other and to those of other sources.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Whether of equal rows the last one stays: those of a topic, whose order is time.
    pub newest_wins: bool,
    /// The part that all its rows belong to.
    pub part: Option<HeldOutPart>,
}

/// Which rows stay, and which of them belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Whether each row stays.
    pub keep: Vec<bool>,
    /// Clusters of near duplicates, over all rows (one that does not stay is alone in its cluster): a split must not
    /// divide them. `None` if near duplicates were not looked for, or dropped.
    pub clusters: Option<Clusters>,
}

/// Applies `exactDuplicates`, `conflictingLabels` and `nearDuplicates`, in this order. Of a text that occurs more than
/// once in a source the first row with a label stays, or the last. Conflicts are between rows of the same part. Of near
/// duplicates the first row stays; one of a test source, then one of a validation source comes before others, so that
/// dropping near duplicates takes nothing from them that training rows keep.
///
/// # Errors
/// The user's, for conflicting labels under `Fail`.
pub fn resolve(
    corpus: &impl Corpus,
    spec: &CleanSpec,
    standing: impl Fn(usize) -> Standing,
    report: &mut CleaningReport,
    progress: Report,
) -> Result<Resolved, DataError> {
    let mut keep = vec![true; corpus.len()];
    report.rows = report.rows.max(corpus.len() as u64);
    let part = |row: u32| standing(corpus.source(row as usize)).part;
    let newest_wins = |source: usize| standing(source).newest_wins;
    equal_texts(corpus, |rows| {
        let mut rows = rows.to_vec();
        rows.sort_by_key(|&row| part(row));
        for rows in rows.chunk_by(|&a, &b| part(a) == part(b)).filter(|rows| rows.len() > 1) {
            let conflict = count_conflict(corpus, spec, rows, report);
            if conflict && spec.conflicting_labels == ConflictingLabels::Drop {
                rows.iter().for_each(|&row| keep[row as usize] = false);
            } else if spec.exact_duplicates == ExactDuplicates::Drop {
                drop_duplicates(corpus, rows, newest_wins, &mut keep, report);
            }
        }
    });
    if spec.conflicting_labels == ConflictingLabels::Fail
        && let Some(conflicts) = report.step(Step::ConflictingLabels)
    {
        return Err(refused(conflicts.found, &conflicts.examples));
    }
    let mut clusters = None;
    if let Some(near) = &spec.near_duplicates {
        // An empty text is near nothing.
        let text = |row: usize| if keep[row] { joined(corpus, row) } else { Cow::Borrowed("") };
        let found = near_duplicates(near, keep.len(), text, progress);
        match near.action {
            NearDuplicateAction::Group => count_clusters(corpus, &found, report),
            NearDuplicateAction::Drop => drop_clusters(corpus, &found, part, &mut keep, report),
        }
        clusters = (near.action == NearDuplicateAction::Group).then_some(found);
    }
    report.kept = keep.iter().filter(|&&stays| stays).count() as u64;
    Ok(Resolved { keep, clusters })
}

/// A row's text, with its pair.
fn joined<'a>(corpus: &'a impl Corpus, row: usize) -> Cow<'a, str> {
    match corpus.pair(row) {
        None => Cow::Borrowed(corpus.text(row)),
        Some(pair) => Cow::Owned(format!("{}\n{pair}", corpus.text(row))),
    }
}

/// Calls `visit` with the rows of each text that occurs more than once, in ascending order.
fn equal_texts(corpus: &impl Corpus, mut visit: impl FnMut(&[u32])) {
    let content = |row: u32| (corpus.text(row as usize), corpus.pair(row as usize));
    let mut order: Vec<(u64, u32)> = (0..corpus.len() as u32)
        .map(|row| {
            let (text, pair) = content(row);
            (mix(hash(text.as_bytes()) ^ pair.map_or(0, |pair| hash(pair.as_bytes()).rotate_left(1))), row)
        })
        .collect();
    order.sort_unstable();
    let mut rows = Vec::new();
    for same in order.chunk_by(|a, b| a.0 == b.0).filter(|same| same.len() > 1) {
        rows.clear();
        rows.extend(same.iter().map(|&(_, row)| row));
        if rows.iter().any(|&row| content(row) != content(rows[0])) {
            // Different texts of one hash.
            rows.sort_by(|&a, &b| content(a).cmp(&content(b)));
        }
        for equal in rows.chunk_by(|&a, &b| content(a) == content(b)).filter(|equal| equal.len() > 1) {
            visit(equal);
        }
    }
}

/// Whether rows of one text have different labels; they are counted and shown if so.
fn count_conflict(corpus: &impl Corpus, spec: &CleanSpec, rows: &[u32], report: &mut CleaningReport) -> bool {
    let labelled = || rows.iter().filter_map(|&row| Some((row as usize, corpus.label(row as usize)?)));
    let Some((_, first)) = labelled().next() else { return false };
    let Some((other_row, other)) = labelled().find(|(_, label)| *label != first) else { return false };
    let effect = if spec.conflicting_labels == ConflictingLabels::Drop { Effect::Removed } else { Effect::Found };
    for (position, &row) in rows.iter().enumerate() {
        let row = row as usize;
        // One example a text: the first row, and the first that contradicts it.
        if position > 0 {
            report.count_only(Step::ConflictingLabels, effect);
            continue;
        }
        report.count(Step::ConflictingLabels, effect, || Example {
            place: corpus.place(row),
            before: Some(excerpt(corpus.text(row), 0)),
            after: None,
            reason: Some(format!("label {first:?}, and {other:?} at {}", corpus.place(other_row))),
        });
    }
    true
}

fn refused(rows: u64, examples: &[Example]) -> DataError {
    let mut message =
        format!("{rows} rows have texts that also occur with another label (clean.conflictingLabels is Fail):");
    for example in examples.iter().take(EXAMPLES) {
        let text = example.before.as_deref().unwrap_or_default();
        let reason = example.reason.as_deref().unwrap_or_default();
        message.push_str(&format!("\n  {}: {text:?} has {reason}", example.place));
    }
    DataError::User(message)
}

/// Keeps one row of each source.
fn drop_duplicates(
    corpus: &impl Corpus,
    rows: &[u32],
    newest_wins: impl Fn(usize) -> bool,
    keep: &mut [bool],
    report: &mut CleaningReport,
) {
    let mut by_source: Vec<(usize, usize)> =
        rows.iter().map(|&row| (corpus.source(row as usize), row as usize)).collect();
    by_source.sort_unstable();
    for same in by_source.chunk_by(|a, b| a.0 == b.0).filter(|same| same.len() > 1) {
        let labelled = |(_, row): &&(usize, usize)| corpus.label(*row).is_some();
        let chosen = if newest_wins(same[0].0) {
            same.iter().rev().find(labelled).unwrap_or(&same[same.len() - 1]).1
        } else {
            same.iter().find(labelled).unwrap_or(&same[0]).1
        };
        for &(_, row) in same.iter().filter(|(_, row)| *row != chosen) {
            keep[row] = false;
            report.count(Step::ExactDuplicates, Effect::Removed, || Example {
                place: corpus.place(row),
                before: Some(excerpt(corpus.text(row), 0)),
                after: None,
                reason: Some(format!("the same text is at {}", corpus.place(chosen))),
            });
        }
    }
}

/// Counts the rows of clusters but the first of each.
fn count_clusters(corpus: &impl Corpus, clusters: &Clusters, report: &mut CleaningReport) {
    for row in (0..clusters.len()).filter(|&row| !clusters.is_first(row)) {
        count_near(corpus, row, clusters.id(row), Effect::Found, report);
    }
}

/// Drops all rows of a cluster but the first of its highest part.
fn drop_clusters(
    corpus: &impl Corpus,
    clusters: &Clusters,
    part: impl Fn(u32) -> Option<HeldOutPart>,
    keep: &mut [bool],
    report: &mut CleaningReport,
) {
    let mut stays: Vec<u32> = (0..clusters.len() as u32).collect();
    for row in (0..clusters.len()).filter(|&row| !clusters.is_first(row)) {
        let chosen = &mut stays[clusters.id(row)];
        if part(row as u32) > part(*chosen) {
            *chosen = row as u32;
        }
    }
    for row in 0..clusters.len() {
        let chosen = stays[clusters.id(row)] as usize;
        if chosen != row {
            keep[row] = false;
            count_near(corpus, row, chosen, Effect::Removed, report);
        }
    }
}

fn count_near(corpus: &impl Corpus, row: usize, other: usize, effect: Effect, report: &mut CleaningReport) {
    report.count(Step::NearDuplicates, effect, || Example {
        place: corpus.place(row),
        before: Some(excerpt(corpus.text(row), 0)),
        after: None,
        reason: Some(format!("in one cluster with {}: {}", corpus.place(other), excerpt(corpus.text(other), 0))),
    });
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
