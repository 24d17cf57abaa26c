//! Apache Parquet: top-level columns of text, numbers or booleans. The file is laid down on disk first, since its index
//! is at its end; of it, a batch of rows is in memory at a time.

use std::{
    fs::File,
    io::{self, Read, Seek},
};

use parquet::{
    basic::{ConvertedType, LogicalType, Type},
    column::reader::{ColumnReader, ColumnReaderImpl},
    data_type::{ByteArray, DataType},
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
    schema::types::ColumnDescriptor,
};
use serde_json::{Number, Value};

use crate::{
    DataError,
    reading::{LONGEST_ROW, Reading},
    rows::Fields,
};

/// Rows of a batch.
const BATCH: usize = 1024;
/// Bytes of the largest file that is copied, however much room there is.
const LARGEST_COPY: u64 = 64 << 30;

pub(super) fn read(mut reader: impl Read, reading: &mut Reading) -> Result<(), DataError> {
    let on_disk =
        |error: io::Error| DataError::Other(format!("{}: no room for a copy on disk: {error}", reading.uri()));
    let mut file = tempfile::tempfile().map_err(on_disk)?;
    let disk = rustix::fs::fstatvfs(&file).map_err(|error| on_disk(error.into()))?;
    let room = Room::of_disk(disk.f_bavail.saturating_mul(disk.f_frsize));
    copy(&mut reader, &mut file, room, reading)?;
    file.rewind().map_err(on_disk)?;
    let file = SerializedFileReader::new(file)
        .map_err(|error| reading.user(format!("not a Parquet file: {}", words(&error))))?;
    let columns = Columns::find(&file, reading)?;
    let mut number = 0;
    for group in 0..file.num_row_groups() {
        number = read_group(&file, group, &columns, number, reading)?;
    }
    Ok(())
}

/// What a copy may take of the disk.
#[derive(Clone, Copy)]
struct Room {
    bytes: u64,
    /// Whether the disk is the reason.
    is_of_disk: bool,
}

impl Room {
    /// Half of what is `free`, since others write there too, up to [`LARGEST_COPY`].
    fn of_disk(free: u64) -> Self {
        Self { bytes: (free / 2).min(LARGEST_COPY), is_of_disk: free / 2 < LARGEST_COPY }
    }

    fn refuse(self, reading: &Reading) -> DataError {
        let gib = self.bytes as f64 / f64::from(1 << 30);
        if self.is_of_disk {
            let disk = std::env::temp_dir();
            let of = format!("half of what is free in {} (TMPDIR)", disk.display());
            DataError::Other(format!(
                "{}: the Parquet file is larger than {gib:.2} GiB, {of}, where it is copied to: give it a larger disk or \
                 divide the file",
                reading.uri()
            ))
        } else {
            reading.user(format!("the Parquet file is larger than {gib:.0} GiB: divide it into several"))
        }
    }
}

/// Copies, and distinguishes a stream that cannot be read (damaged) from a disk that cannot be written.
fn copy(reader: &mut impl Read, file: &mut File, room: Room, reading: &Reading) -> Result<(), DataError> {
    let (mut buffer, mut left) = (vec![0; 256 << 10], room.bytes);
    loop {
        let read = reader.read(&mut buffer).map_err(|error| reading.damaged(1, &error))?;
        if read == 0 {
            return Ok(());
        }
        left = left.checked_sub(read as u64).ok_or_else(|| room.refuse(reading))?;
        io::Write::write_all(file, &buffer[..read])
            .map_err(|error| DataError::Other(format!("{}: no room for a copy on disk: {error}", reading.uri())))?;
    }
}

/// Indices of the columns that are read.
struct Columns {
    text: usize,
    label: Option<usize>,
    pair: Option<usize>,
    group: Option<usize>,
}

impl Columns {
    fn find(file: &SerializedFileReader<File>, reading: &Reading) -> Result<Self, DataError> {
        let schema = file.metadata().file_metadata().schema_descr();
        let column = |name: &str, required: bool| -> Result<Option<usize>, DataError> {
            let Some(field) = schema.root_schema().get_fields().iter().find(|field| field.name() == name) else {
                if !required {
                    return Ok(None);
                }
                let names: Vec<&str> = schema.root_schema().get_fields().iter().map(|field| field.name()).collect();
                return Err(reading.user(format!("no column is named {name:?}, the file has: {}", names.join(", "))));
            };
            let leaf = |column: &&usize| schema.column(**column).path().parts() == [name];
            let found = (0..schema.num_columns()).collect::<Vec<_>>().iter().find(leaf).copied();
            match found {
                Some(column) if field.is_primitive() && is_scalar(&schema.column(column)) => Ok(Some(column)),
                _ if !required => Ok(None),
                _ => Err(reading.user(format!("column {name:?} is not text"))),
            }
        };
        let required = |name: &str| column(name, true);
        let names = reading.columns();
        let text = column(names.input(), true)?.unwrap_or_default();
        Ok(Self {
            text,
            label: column(&names.label, reading.needs_labels())?,
            pair: names.second().and_then(|name| required(name).transpose()).transpose()?,
            group: names.group.as_deref().and_then(|name| required(name).transpose()).transpose()?,
        })
    }
}

/// Text, an integer, a floating-point number or a boolean, once a row.
fn is_scalar(column: &ColumnDescriptor) -> bool {
    column.max_rep_level() == 0
        && match column.physical_type() {
            Type::BOOLEAN | Type::FLOAT | Type::DOUBLE => true,
            Type::BYTE_ARRAY => !matches!(column.converted_type(), ConvertedType::DECIMAL | ConvertedType::BSON),
            Type::INT32 | Type::INT64 => {
                matches!(column.logical_type_ref(), None | Some(LogicalType::Integer(_)))
                    && !matches!(
                        column.converted_type(),
                        ConvertedType::DECIMAL
                            | ConvertedType::DATE
                            | ConvertedType::TIME_MILLIS
                            | ConvertedType::TIME_MICROS
                            | ConvertedType::TIMESTAMP_MILLIS
                            | ConvertedType::TIMESTAMP_MICROS
                    )
            }
            Type::INT96 | Type::FIXED_LEN_BYTE_ARRAY => false,
        }
}

/// Reads a row group whose first row is the one after `number`, and returns the number of its last.
fn read_group(
    file: &SerializedFileReader<File>,
    group: usize,
    columns: &Columns,
    mut number: u64,
    reading: &mut Reading,
) -> Result<u64, DataError> {
    let refused = |reading: &Reading, number: u64, error: &ParquetError| {
        reading.user_at(number + 1, format!("damaged Parquet: {}", words(error)))
    };
    let reader = file.get_row_group(group).map_err(|error| refused(reading, number, &error))?;
    let open = |column: Option<usize>| column.map(|column| Column::open(&*reader, column)).transpose();
    let opened = (|| {
        Ok((Column::open(&*reader, columns.text)?, open(columns.label)?, open(columns.pair)?, open(columns.group)?))
    })();
    let (mut text, mut label, mut pair, mut key) = opened.map_err(|error| refused(reading, number, &error))?;
    let mut left = reader.metadata().num_rows().max(0) as usize;
    while left > 0 {
        let wanted = left.min(BATCH);
        let mut cells = |column: &mut Column| column.read(wanted).map_err(|error| refused(reading, number, &error));
        let texts = cells(&mut text)?;
        let labels = label.as_mut().map(&mut cells).transpose()?;
        let pairs = pair.as_mut().map(&mut cells).transpose()?;
        let keys = key.as_mut().map(&mut cells).transpose()?;
        for row in 0..wanted {
            number += 1;
            let mut read_row = || {
                let names = reading.columns();
                let cell = |cells: &Option<Vec<Option<Cell>>>| -> Option<Cell> { cells.as_ref()?.get(row)?.clone() };
                let value = |cell: Option<Cell>, name: &str, required: bool| match cell {
                    Some(cell) => reading_text(cell, name, number, reading).map(Some),
                    None if required => Err(reading.user_at(number, format!("field {name:?} is missing"))),
                    None => Ok(None),
                };
                let text = value(texts.get(row).cloned().flatten(), names.input(), true)?.unwrap_or_default();
                let label = value(cell(&labels), &names.label, reading.needs_labels())?;
                let pair = names.second().map(|name| value(cell(&pairs), name, true)).transpose()?.flatten();
                let key = names.group.as_deref().map(|name| value(cell(&keys), name, true)).transpose()?.flatten();
                let (label, pair, group) = (label.as_deref(), pair.as_deref(), key.as_deref());
                reading.row(number, Fields { text: &text, label, pair, group, ..Fields::default() })
            };
            let row = read_row();
            reading.go_on(row)?;
        }
        left -= wanted;
    }
    Ok(number)
}

/// A value as it lies in the file, or a number as text.
#[derive(Clone)]
enum Cell {
    Bytes(ByteArray),
    Text(String),
}

fn reading_text(cell: Cell, name: &str, number: u64, reading: &Reading) -> Result<String, DataError> {
    match cell {
        Cell::Text(text) => Ok(text),
        Cell::Bytes(bytes) if bytes.len() > LONGEST_ROW => Err(reading.too_long(number)),
        Cell::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(reading.user_at(number, format!("field {name:?} is not UTF-8"))),
        },
    }
}

/// One column of a row group.
struct Column {
    reader: ColumnReader,
    /// Level of a value that is there; 0 where every value is.
    level: i16,
    is_unsigned: bool,
}

impl Column {
    fn open(group: &dyn parquet::file::reader::RowGroupReader, column: usize) -> Result<Self, ParquetError> {
        let description = group.metadata().column(column).column_descr();
        let unsigned = matches!(description.logical_type_ref(), Some(LogicalType::Integer(integer)) if !integer.is_signed)
            || matches!(
                description.converted_type(),
                ConvertedType::UINT_8 | ConvertedType::UINT_16 | ConvertedType::UINT_32 | ConvertedType::UINT_64
            );
        Ok(Self { reader: group.get_column_reader(column)?, level: description.max_def_level(), is_unsigned: unsigned })
    }

    /// The next `count` values; `None` for null.
    fn read(&mut self, count: usize) -> Result<Vec<Option<Cell>>, ParquetError> {
        let (level, unsigned) = (self.level, self.is_unsigned);
        let float = |value: f64| {
            Cell::Text(Number::from_f64(value).map_or(value.to_string(), |number| Value::Number(number).to_string()))
        };
        match &mut self.reader {
            ColumnReader::ByteArrayColumnReader(reader) => cells(reader, count, level, Cell::Bytes),
            ColumnReader::BoolColumnReader(reader) => {
                cells(reader, count, level, |value| Cell::Text(value.to_string()))
            }
            ColumnReader::Int32ColumnReader(reader) => cells(reader, count, level, |value| {
                Cell::Text(if unsigned { value.cast_unsigned().to_string() } else { value.to_string() })
            }),
            ColumnReader::Int64ColumnReader(reader) => cells(reader, count, level, |value| {
                Cell::Text(if unsigned { value.cast_unsigned().to_string() } else { value.to_string() })
            }),
            ColumnReader::FloatColumnReader(reader) => cells(reader, count, level, |value| float(f64::from(value))),
            ColumnReader::DoubleColumnReader(reader) => cells(reader, count, level, float),
            _ => Err(ParquetError::General("a column of another type than the schema says".into())),
        }
    }
}

fn cells<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    count: usize,
    level: i16,
    cell: impl Fn(T::T) -> Cell,
) -> Result<Vec<Option<Cell>>, ParquetError> {
    let (mut levels, mut values) = (Vec::new(), Vec::new());
    while values.len().max(levels.len()) < count {
        let left = count - values.len().max(levels.len());
        let (records, _, _) = reader.read_records(left, (level > 0).then_some(&mut levels), None, &mut values)?;
        if records == 0 {
            return Err(ParquetError::EOF("a column has fewer values than the file has rows".into()));
        }
    }
    let mut values = values.into_iter();
    if level == 0 {
        return Ok(values.map(|value| Some(cell(value))).collect());
    }
    Ok(levels.into_iter().map(|found| if found == level { values.next().map(&cell) } else { None }).collect())
}

/// The library's message without its kind in front.
fn words(error: &ParquetError) -> String {
    let text = error.to_string();
    text.split_once("rror: ").map_or(text.as_str(), |(_, text)| text).to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use athanor_contract::train::{Columns as Names, OnBadRow};

    use super::*;
    use crate::builder::Builder;

    #[test]
    fn a_copy_takes_no_more_than_its_room() {
        let builder = Builder::new(None, OnBadRow::Fail).unwrap();
        let reading = Reading::new("s3://b/a.parquet", &Names::default(), true, Arc::default(), builder);
        let copied = |room: Room, bytes: u64| {
            let mut file = tempfile::tempfile().unwrap();
            copy(&mut io::repeat(7).take(bytes), &mut file, room, &reading)
        };
        let small = Room::of_disk(2 << 20);
        assert!(copied(small, 1 << 20).is_ok());
        let error = copied(small, (1 << 20) + 1).unwrap_err();
        let DataError::Other(message) = &error else { panic!("the disk is not the user's error: {error}") };
        assert!(
            message.starts_with("s3://b/a.parquet: the Parquet file is larger than 0.00 GiB, half of what is free in"),
            "{message}"
        );
        let large = Room::of_disk(u64::MAX);
        assert_eq!(large.bytes, LARGEST_COPY);
        let error = large.refuse(&reading);
        let DataError::User(message) = &error else { panic!("the file is the user's: {error}") };
        assert!(message.ends_with("the Parquet file is larger than 64 GiB: divide it into several"), "{message}");
    }
}
