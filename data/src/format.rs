//! Files to rows: the format and compression that a name implies, and one parser for each format. Parsers read a stream and
//! keep one row at a time. A malformed row is the user's error and names file, row and field.

mod html;
mod json_lines;
mod lines;
mod parquet;
mod pdf;
mod separated;
mod text;

use std::io::{BufReader, Read};

use athanor_contract::train::DataFormat;

use crate::{
    DataError,
    inflate::{Counted, Inflated},
    reading::Reading,
};

/// Endings that name a format.
const ENDINGS: [(&str, DataFormat); 10] = [
    ("jsonl", DataFormat::JsonLines),
    ("ndjson", DataFormat::JsonLines),
    ("csv", DataFormat::Csv),
    ("tsv", DataFormat::Tsv),
    ("parquet", DataFormat::Parquet),
    ("txt", DataFormat::Text),
    ("text", DataFormat::Text),
    ("pdf", DataFormat::Pdf),
    ("html", DataFormat::Html),
    ("htm", DataFormat::Html),
];

/// Compression around a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstandard,
}

/// Format and compression by the ending of a name, unless the format is `given`.
pub(crate) fn of_name(uri: &str, given: Option<DataFormat>) -> Result<(DataFormat, Compression), DataError> {
    let path = uri.split(['?', '#']).next().unwrap_or(uri);
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    let (name, compression) = match name.rsplit_once('.') {
        Some((name, "gz")) => (name, Compression::Gzip),
        Some((name, "zst")) => (name, Compression::Zstandard),
        _ => (name.as_str(), Compression::None),
    };
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    let of_ending = || ENDINGS.iter().find(|(known, _)| *known == ending).map(|&(_, format)| format);
    match given.or_else(of_ending) {
        Some(format) => Ok((format, compression)),
        None => Err(DataError::User(format!(
            "{uri}: unknown format: the name has to end in .jsonl, .csv, .tsv, .parquet, .txt, .pdf or \
             .html, each also with .gz or .zst behind it; or set the source's format"
        ))),
    }
}

/// Reads all rows of a file.
///
/// # Errors
/// The first mistakes of the file.
pub(crate) fn parse(
    format: DataFormat,
    compression: Compression,
    bytes: impl Read + Send,
    reading: &mut Reading,
) -> Result<(), DataError> {
    let result = parse_compressed(format, compression, bytes, reading);
    reading.end(result)
}

fn parse_compressed(
    format: DataFormat,
    compression: Compression,
    bytes: impl Read + Send,
    reading: &mut Reading,
) -> Result<(), DataError> {
    const BUFFER: usize = 256 << 10;
    match compression {
        Compression::None => parse_plain(format, BufReader::with_capacity(BUFFER, bytes), reading),
        Compression::Gzip => {
            let (bytes, count) = Counted::new(bytes);
            let reader = Inflated::new(flate2::read::MultiGzDecoder::new(bytes), count);
            parse_plain(format, BufReader::with_capacity(BUFFER, reader), reading)
        }
        Compression::Zstandard => {
            let (bytes, count) = Counted::new(bytes);
            let reader = zstd::Decoder::new(bytes).map_err(|error| reading.damaged(1, &error))?;
            parse_plain(format, BufReader::with_capacity(BUFFER, Inflated::new(reader, count)), reading)
        }
    }
}

fn parse_plain(format: DataFormat, mut reader: BufReader<impl Read>, reading: &mut Reading) -> Result<(), DataError> {
    if matches!(format, DataFormat::Text | DataFormat::Pdf | DataFormat::Html) {
        reading.check_without_columns(format)?;
    }
    match format {
        DataFormat::JsonLines => json_lines::read(reader, reading),
        DataFormat::Csv => separated::read(reader, reading, b','),
        DataFormat::Tsv => separated::read(reader, reading, b'\t'),
        DataFormat::Parquet => parquet::read(reader, reading),
        DataFormat::Text => text::read(reader, reading),
        DataFormat::Pdf => pdf::read(&mut reader, reading),
        DataFormat::Html => html::read(&mut reader, reading),
    }
}

#[cfg(test)]
mod tests;
