//! All sources to one dataset: reads them one after the other, resolves duplicates, and computes the digest.

use athanor_contract::{
    artifact::sha256_hex,
    train::{DataSpec, OnBadRow, Source},
};
use athanor_store::Location;
use serde::Serialize;

use crate::{
    DataError, Dataset, Progress, Rows,
    builder::Builder,
    clean::{self, Corpus, Standing},
    source::{self, Context, Hub},
};

/// What the digest covers.
#[derive(Serialize)]
struct Identity<'a> {
    source: &'a Source,
    /// sha256 of a file, of the names and digests of several, or of the rows in the offset ranges.
    content: &'a str,
}

/// Reads all sources, one after the other. Without `needs_labels` rows may have none. `report` is called as reading
/// goes on.
///
/// # Errors
/// A malformed row is the user's error and names file, row and field; so is a source without rows.
pub async fn read(
    spec: &DataSpec,
    needs_labels: bool,
    report: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Dataset, DataError> {
    read_with(spec, Context { needs_labels, report, hub: &Hub::from_environment(), snapshots: None }).await
}

/// [`read`] of a job: the rows of topics are those that an earlier reading of the same ranges kept below `snapshots`;
/// the first one keeps them there.
///
/// # Errors
/// As for [`read`]; also a store that cannot be written to.
pub async fn read_keeping(
    spec: &DataSpec,
    needs_labels: bool,
    snapshots: &Location,
    report: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Dataset, DataError> {
    let hub = Hub::from_environment();
    read_with(spec, Context { needs_labels, report, hub: &hub, snapshots: Some(snapshots) }).await
}

pub(crate) async fn read_with(spec: &DataSpec, context: Context<'_>) -> Result<Dataset, DataError> {
    let mut builder = Builder::new(spec.clean.as_ref(), spec.on_bad_row)?;
    let mut contents = Vec::with_capacity(spec.sources.len());
    for (index, source) in spec.sources.iter().enumerate() {
        let content;
        (content, builder) = source::read(source, index, builder, context).await?;
        contents.push(content);
    }
    let identities: Vec<Identity> =
        std::iter::zip(&spec.sources, &contents).map(|(source, content)| Identity { source, content }).collect();
    // These forms never change: a digest names checkpoints.
    let identity = match (&spec.clean, spec.on_bad_row) {
        (None, OnBadRow::Fail) => serde_json::to_vec(&(identities, &spec.split)),
        (Some(clean), OnBadRow::Fail) => serde_json::to_vec(&(identities, &spec.split, clean)),
        (clean, OnBadRow::Skip) => serde_json::to_vec(&(identities, &spec.split, clean, OnBadRow::Skip)),
    };
    let digest = sha256_hex(&identity.map_err(|error| DataError::Other(error.to_string()))?);
    let sources = spec.sources.iter().map(|source| source.name.clone()).collect();
    let mut held_out: Vec<_> = spec.sources.iter().map(|source| source.part).collect();
    if held_out.iter().all(Option::is_none) {
        held_out.clear();
    }
    let topics = builder.take_topics();
    let (mut rows, skipped, cleaning) = builder.finish();
    let Some((clean, mut cleaning)) = spec.clean.as_ref().zip(cleaning) else {
        return Ok(Dataset { sources, held_out, rows, digest, skipped, topics, ..Dataset::default() });
    };
    let standing = |source: usize| {
        let source = &spec.sources[source];
        Standing { newest_wins: source.kafka.is_some(), part: source.part }
    };
    let resolved = clean::resolve(&rows, clean, standing, &mut cleaning, context.report)?;
    let kept = (0..rows.len()).filter(|&row| resolved.keep[row]);
    let clusters = resolved.clusters.map(|clusters| kept.map(|row| clusters.id(row) as u32).collect());
    rows.retain(|row| resolved.keep[row]);
    if rows.is_empty() {
        return Err(DataError::User(format!("data.clean removed all of the {} rows", cleaning.rows)));
    }
    let (cleaning, annotated) = (Some(cleaning), Vec::new());
    Ok(Dataset { sources, held_out, rows, digest, skipped, topics, cleaning, clusters, annotated })
}

impl Corpus for Rows {
    fn len(&self) -> usize {
        self.len()
    }

    fn text(&self, row: usize) -> &str {
        self.text(row)
    }

    fn pair(&self, row: usize) -> Option<&str> {
        self.pair(row)
    }

    fn label(&self, row: usize) -> Option<&str> {
        self.label(row)
    }

    fn source(&self, row: usize) -> usize {
        self.source(row)
    }

    fn place(&self, row: usize) -> String {
        self.place(row)
    }
}

#[cfg(test)]
mod tests;
