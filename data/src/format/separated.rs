//! Values separated by commas or tabs, with a header.

use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

use csv::{ErrorKind, Position, StringRecord};

use crate::{
    DataError,
    reading::{LONGEST_ROW, Reading},
    rows::Fields,
};

pub(super) fn read(reader: impl Read, reading: &mut Reading, delimiter: u8) -> Result<(), DataError> {
    let since_row = Rc::new(Cell::new(0));
    // A tab cannot be quoted by convention, and texts are full of quotes.
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .quoting(delimiter == b',')
        .from_reader(Limited { reader, since_row: since_row.clone() });
    let mut header = StringRecord::new();
    let mut record = StringRecord::new();
    // Place of the last row that was read.
    let mut line = 1;
    match reader.headers() {
        Ok(titles) => header.clone_from(titles),
        Err(error) => return Err(refused(&error, line, &header, reading)),
    }
    since_row.set(0);
    let mut more = reader.read_record(&mut record).map_err(|error| refused(&error, line, &header, reading))?;
    if !more && header.iter().all(|title| title.trim().is_empty()) {
        return Err(reading.user("the file is empty"));
    }
    let position = |name: &str| header.iter().position(|title| title.trim() == name);
    let column = |name: &str| {
        position(name).ok_or_else(|| {
            let titles = header.iter().collect::<Vec<_>>().join(", ");
            reading.user_at(1, format!("no column is named {name:?}, the header has: {titles}"))
        })
    };
    let columns = reading.columns();
    let text = column(columns.input())?;
    let label = if reading.needs_labels() { Some(column(&columns.label)?) } else { position(&columns.label) };
    let pair = columns.second().map(column).transpose()?;
    let group = columns.group.as_deref().map(column).transpose()?;
    while more {
        line = record.position().map_or(0, Position::line);
        let field = |index: Option<usize>| index.map(|index| record.get(index).unwrap_or_default());
        let fields = Fields {
            text: record.get(text).unwrap_or_default(),
            label: field(label),
            pair: field(pair),
            group: field(group),
            ..Fields::default()
        };
        let row = reading.row(line, fields);
        reading.go_on(row)?;
        since_row.set(0);
        more = reader.read_record(&mut record).map_err(|error| refused(&error, line, &header, reading))?;
    }
    Ok(())
}

fn refused(error: &csv::Error, line_before: u64, header: &StringRecord, reading: &Reading) -> DataError {
    let line = error.position().map_or(line_before, Position::line);
    match error.kind() {
        ErrorKind::Io(inner) if inner.get_ref().is_some_and(|inner| inner.is::<TooLong>()) => reading.too_long(line),
        ErrorKind::Io(inner) => reading.damaged(line, inner),
        ErrorKind::Utf8 { err, .. } => match header.get(err.field()) {
            Some(name) => reading.user_at(line, format!("field {name:?} is not UTF-8")),
            None => reading.user_at(line, "not UTF-8"),
        },
        _ => reading.user_at(line, error.to_string()),
    }
}

/// Ends a row that has become too long: a quote that is never closed would take in the rest of the file.
struct Limited<R> {
    reader: R,
    /// Bytes read since the last row was complete.
    since_row: Rc<Cell<usize>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.since_row.set(self.since_row.get() + read);
        if self.since_row.get() > LONGEST_ROW {
            return Err(io::Error::other(TooLong));
        }
        Ok(read)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a row is too long")]
struct TooLong;
