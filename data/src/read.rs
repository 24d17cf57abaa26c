//! All sources to one dataset, row by row: what a parser finds is checked, cleaned and looked up among the rows before it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use athanor_contract::{
    artifact::sha256_hex,
    train::{CleanSpec, Columns, DataFormat, DataSpec, Source},
};
use serde::Serialize;

use crate::{
    DataError, Dataset, Progress, Rows,
    clean::{self, Cleaned, Cleaner, CleaningReport, Corpus, EXAMPLES},
    rows::{Fields, Origin, Seen},
    source::{self, Context, Hub},
};

/// What the digest covers.
#[derive(Serialize)]
struct Identity<'a> {
    source: &'a Source,
    /// sha256 of a file, of the names and digests of several, or of the rows in the offset ranges.
    content: &'a str,
}

/// Reads all sources, one after the other. Without `needs_labels` rows may have none. `report` is called as reading goes on.
///
/// # Errors
/// A malformed row is the user's error and names file, row and field; so is a source without rows.
pub async fn read(
    spec: &DataSpec,
    needs_labels: bool,
    report: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<Dataset, DataError> {
    read_with(spec, Context { needs_labels, report, hub: &Hub::from_environment() }).await
}

pub(crate) async fn read_with(spec: &DataSpec, context: Context<'_>) -> Result<Dataset, DataError> {
    let mut builder = Builder::new(spec.clean.as_ref())?;
    let mut contents = Vec::with_capacity(spec.sources.len());
    for (index, source) in spec.sources.iter().enumerate() {
        let content;
        (content, builder) = source::read(source, index, builder, context).await?;
        contents.push(content);
    }
    let identities: Vec<Identity> =
        std::iter::zip(&spec.sources, &contents).map(|(source, content)| Identity { source, content }).collect();
    let identity = match &spec.clean {
        // As it has always been: a digest names checkpoints.
        None => serde_json::to_vec(&(identities, &spec.split)),
        Some(clean) => serde_json::to_vec(&(identities, &spec.split, clean)),
    };
    let digest = sha256_hex(&identity.map_err(|error| DataError::Other(error.to_string()))?);
    let sources = spec.sources.iter().map(|source| source.name.clone()).collect();
    let (mut rows, cleaning) = builder.finish();
    let Some((clean, mut cleaning)) = spec.clean.as_ref().zip(cleaning) else {
        return Ok(Dataset { sources, rows, digest, ..Dataset::default() });
    };
    let newest_wins = |source: usize| spec.sources[source].kafka.is_some();
    let resolved = clean::resolve(&rows, clean, newest_wins, &mut cleaning, context.report)?;
    let kept = (0..rows.len()).filter(|&row| resolved.keep[row]);
    let clusters = resolved.clusters.map(|clusters| kept.map(|row| clusters.id(row) as u32).collect());
    rows.retain(|row| resolved.keep[row]);
    if rows.is_empty() {
        return Err(DataError::User(format!("data.clean removed all of the {} rows", cleaning.rows)));
    }
    Ok(Dataset { sources, rows, digest, cleaning: Some(cleaning), clusters, annotated: Vec::new() })
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

/// The rows so far, and what is needed to add more.
pub(crate) struct Builder {
    rows: Rows,
    seen: Seen,
    /// Cleans texts, and the second texts of pairs.
    cleaners: Option<(Cleaner, Cleaner)>,
    source: usize,
    rows_of_source: u64,
}

impl Builder {
    pub fn new(clean: Option<&CleanSpec>) -> Result<Self, DataError> {
        let cleaners = match clean {
            Some(clean) => Some((Cleaner::new(clean)?, Cleaner::new(clean)?)),
            None => None,
        };
        Ok(Self { rows: Rows::default(), seen: Seen::default(), cleaners, source: 0, rows_of_source: 0 })
    }

    pub fn begin_source(&mut self, index: usize) {
        self.seen.clear();
        self.source = index;
        self.rows_of_source = 0;
    }

    pub fn begin_file(&mut self, origin: Origin) {
        self.rows.begin(self.source, origin);
    }

    /// Rows that the source has given, those included that were not kept.
    pub fn rows_of_source(&self) -> u64 {
        self.rows_of_source
    }

    /// Whether a text is kept once, as it comes. Where cleaning is asked for, it decides once all rows are there.
    pub fn drops_duplicates(&self) -> bool {
        self.cleaners.is_none()
    }

    /// Takes a row that is as it should be, cleans it, and keeps it unless it has come before: a source's first label counts.
    pub fn row(&mut self, number: u32, fields: Fields) {
        self.rows_of_source += 1;
        let Some((texts, pairs)) = &mut self.cleaners else {
            match self.seen.find_or_insert(&self.rows, fields.text, fields.pair) {
                None => self.rows.push(number, fields),
                Some(row) => {
                    if let (None, Some(label)) = (self.rows.label(row), fields.label) {
                        self.rows.set_label(row, label);
                    }
                }
            }
            return;
        };
        let place = || self.rows.next_place(number);
        let Cleaned::Kept(text) = texts.clean(fields.text, place) else { return };
        let pair = match fields.pair.map(|pair| pairs.clean(pair, place)) {
            None => None,
            Some(Cleaned::Kept(pair)) => Some(pair),
            Some(Cleaned::Removed(_)) => return,
        };
        self.rows.push(number, Fields { text: &text, pair: pair.as_deref(), ..fields });
    }

    /// All rows, and what cleaning has done to texts and pairs.
    pub fn finish(self) -> (Rows, Option<CleaningReport>) {
        let cleaning = self.cleaners.map(|(texts, pairs)| {
            let mut report = texts.into_report();
            // A row is counted once, by its text; what was done to pairs adds to the steps.
            for step in pairs.into_report().steps {
                match report.steps.iter_mut().find(|known| known.step == step.step) {
                    None => report.steps.push(step),
                    Some(known) => {
                        known.changed += step.changed;
                        known.removed += step.removed;
                        known.examples.extend(step.examples);
                        known.examples.truncate(EXAMPLES);
                    }
                }
            }
            report.steps.sort_by_key(|step| step.step);
            report
        });
        (self.rows, cleaning)
    }
}

/// A file that is being read: what parsers need to know, and where their rows go.
pub(crate) struct Reading {
    uri: String,
    columns: Columns,
    needs_labels: bool,
    /// Rows of the source so far, for those who watch.
    count: Arc<AtomicU64>,
    builder: Builder,
    /// What is wrong with rows, so that a file is mended once and not row by row.
    mistakes: Vec<String>,
}

/// Mistakes of a file that are told at once.
const MISTAKES: usize = 10;

impl Reading {
    pub fn new(uri: &str, columns: &Columns, needs_labels: bool, count: Arc<AtomicU64>, mut builder: Builder) -> Self {
        builder.begin_file(Origin::File { uri: uri.to_owned() });
        Self { uri: uri.to_owned(), columns: columns.clone(), needs_labels, count, builder, mistakes: Vec::new() }
    }

    pub fn into_builder(self) -> Builder {
        self.builder
    }

    pub fn uri(&self) -> &str {
        &self.uri
    }

    pub fn columns(&self) -> &Columns {
        &self.columns
    }

    /// Whether a row without a label is a mistake.
    pub fn needs_labels(&self) -> bool {
        self.needs_labels
    }

    /// Takes a row. Its number is that of its line or page in the file, from 1.
    pub fn row(&mut self, number: u64, fields: Fields) -> Result<(), DataError> {
        let Columns { text, label, pair, group } = &self.columns;
        let label_of_row = fields.label.filter(|label| self.needs_labels || !label.trim().is_empty());
        for (value, name) in [
            (Some(fields.text), Some(text)),
            (label_of_row, Some(label)),
            (fields.pair, pair.as_ref()),
            (fields.group, group.as_ref()),
        ] {
            if let (Some(value), Some(name)) = (value, name)
                && value.trim().is_empty()
            {
                return Err(self.user_at(number, format!("field {name:?} is empty")));
            }
        }
        let number = u32::try_from(number).map_err(|_| self.user("more than 4294967295 rows"))?;
        self.count.fetch_add(1, Ordering::Relaxed);
        self.builder.row(number, Fields { label: label_of_row, ..fields });
        Ok(())
    }

    /// Goes on behind a row that is the user's error, unless there are many; [`Self::end`] tells them.
    pub fn go_on(&mut self, row: Result<(), DataError>) -> Result<(), DataError> {
        match row {
            Err(DataError::User(mistake)) if self.mistakes.len() + 1 < MISTAKES => self.mistakes.push(mistake),
            row => return row,
        }
        Ok(())
    }

    /// How the file ended, with all its mistakes.
    pub fn end(&mut self, result: Result<(), DataError>) -> Result<(), DataError> {
        if let Err(DataError::User(mistake)) = result {
            self.mistakes.push(mistake);
        } else {
            result?;
        }
        if self.mistakes.is_empty() { Ok(()) } else { Err(DataError::User(self.mistakes.join("\n"))) }
    }

    /// Refuses columns that a format without columns cannot have.
    pub fn check_without_columns(&self, format: DataFormat) -> Result<(), DataError> {
        let instead = "give rows as JSON lines, CSV, TSV or Parquet";
        if self.needs_labels {
            return Err(
                self.user(format!("the task needs labels, and files of the format {format:?} have none: {instead}"))
            );
        }
        match (&self.columns.pair, &self.columns.group) {
            (Some(_), _) => Err(self.user(format!("files of the format {format:?} have no columns.pair: {instead}"))),
            (_, Some(_)) => Err(self.user(format!("files of the format {format:?} have no columns.group: {instead}"))),
            _ => Ok(()),
        }
    }

    /// A mistake in the file.
    pub fn user(&self, message: impl std::fmt::Display) -> DataError {
        DataError::User(format!("{}: {message}", self.uri))
    }

    /// A mistake in a row of the file.
    pub fn user_at(&self, row: u64, message: impl std::fmt::Display) -> DataError {
        DataError::User(format!("{} row {row}: {message}", self.uri))
    }

    pub fn too_long(&self, row: u64) -> DataError {
        self.user_at(row, format!("longer than {} MiB", crate::format::LONGEST_ROW >> 20))
    }

    /// The decompressor refuses what it was given; the bytes came as the store has them.
    pub fn damaged(&self, row: u64, error: &std::io::Error) -> DataError {
        self.user_at(row, format!("the file is cut off or damaged: {error}"))
    }
}

#[cfg(test)]
mod tests;
