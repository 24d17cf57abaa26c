//! A file that is being read: checks the rows that a parser finds and collects the mistakes of the file.

use std::{
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use athanor_contract::train::{Columns, DataFormat};

use crate::{
    DataError,
    builder::Builder,
    conversation::Conversation,
    inflate::TooMuch,
    pdf::Worker,
    rows::{Fields, Origin},
};

/// Most bytes of a row. A longer one is a mistake, such as a file without line ends, and would fill the memory.
pub(crate) const LONGEST_ROW: usize = 64 << 20;

/// A file that is being read: what its parser requires, and where the rows go.
pub(crate) struct Reading {
    uri: String,
    columns: Columns,
    needs_labels: bool,
    /// Rows of the source so far, for progress.
    count: Arc<AtomicU64>,
    builder: Builder,
    /// Invalid rows so far: all of them are reported together.
    mistakes: Vec<String>,
}

/// Mistakes of a file that are reported at once.
const MISTAKES: usize = 10;

impl Reading {
    pub fn new(uri: &str, columns: &Columns, needs_labels: bool, count: Arc<AtomicU64>, mut builder: Builder) -> Self {
        builder.begin_file(Origin::File { uri: uri.to_owned() });
        Self { uri: uri.to_owned(), columns: columns.clone(), needs_labels, count, builder, mistakes: Vec::new() }
    }

    pub fn into_builder(self) -> Builder {
        self.builder
    }

    /// The process that reads PDFs, which files share, if one has been started.
    pub fn pdf_worker(&mut self) -> &mut Option<Worker> {
        self.builder.pdf_worker()
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
        let columns = &self.columns;
        let label_of_row = fields.label.filter(|label| self.needs_labels || !label.trim().is_empty());
        for (value, name) in [
            (Some(fields.text), Some(columns.input())),
            (label_of_row, Some(columns.label.as_str())),
            (fields.pair, columns.second()),
            (fields.group, columns.group.as_deref()),
        ] {
            if let (Some(value), Some(name)) = (value, name)
                && value.trim().is_empty()
            {
                return Err(self.user_at(number, format!("field {name:?} is empty")));
            }
        }
        let conversation = match &columns.messages {
            Some(name) => Some(
                Conversation::parse(fields.text)
                    .map_err(|error| self.user_at(number, format!("field {name:?}: {error}")))?,
            ),
            None => None,
        };
        let number = u32::try_from(number).map_err(|_| self.user("more than 4294967295 rows"))?;
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut fields = Fields { label: label_of_row, ..fields };
        if let Some(Conversation { before, answer }) = &conversation {
            fields = Fields { text: before, pair: Some(answer), is_conversation: true, ..fields };
        }
        self.builder.row(number, fields);
        Ok(())
    }

    /// Continues after a row with a user error, unless there are many; [`Self::end`] reports them. Bad rows that are to be
    /// left out are only counted.
    pub fn go_on(&mut self, row: Result<(), DataError>) -> Result<(), DataError> {
        let Err(DataError::User(mistake)) = row else { return row };
        let Err(mistake) = self.builder.skip(mistake) else { return Ok(()) };
        if self.mistakes.len() + 1 == MISTAKES {
            return Err(DataError::User(mistake));
        }
        self.mistakes.push(mistake);
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

    /// Returns a user error if the specification names columns that the format does not have.
    pub fn check_without_columns(&self, format: DataFormat) -> Result<(), DataError> {
        let instead = "give rows as JSON lines, CSV, TSV or Parquet";
        if self.needs_labels {
            return Err(
                self.user(format!("the task needs labels, and files of the format {format:?} have none: {instead}"))
            );
        }
        let Columns { pair, group, messages, prompt, .. } = &self.columns;
        let named = [("pair", pair), ("group", group), ("messages", messages), ("prompt", prompt)];
        match named.into_iter().find(|(_, column)| column.is_some()) {
            Some((name, _)) => {
                Err(self.user(format!("files of the format {format:?} have no columns.{name}: {instead}")))
            }
            None => Ok(()),
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
        self.user_at(row, format!("longer than {} MiB", LONGEST_ROW >> 20))
    }

    /// The decompressor failed; the bytes are those of the store.
    pub fn damaged(&self, row: u64, error: &std::io::Error) -> DataError {
        if let Some(too_much) = error.get_ref().and_then(|error| error.downcast_ref::<TooMuch>()) {
            return self.user_at(row, too_much);
        }
        self.user_at(row, format!("the file is cut off or damaged: {error}"))
    }

    /// The bytes of a document of at most `limit` bytes.
    pub fn whole(&self, reader: &mut impl Read, limit: usize) -> Result<Vec<u8>, DataError> {
        let mut bytes = Vec::new();
        reader.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|error| self.damaged(1, &error))?;
        if bytes.len() > limit {
            return Err(self.user(format!("longer than {} MiB", limit >> 20)));
        }
        if bytes.is_empty() {
            return Err(self.user("the file is empty"));
        }
        Ok(bytes)
    }
}
