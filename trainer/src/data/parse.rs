//! Files of rows: JSON lines, CSV and TSV. A malformed row is the user's error and names file, row and field.

use athanor_contract::train::Columns;
use serde_json::Value;

use super::Row;
use crate::TrainError;

/// Parses a file by the ending of its name. Rows are counted from 1 as lines of the file, a header included.
pub fn parse(uri: &str, bytes: &[u8], columns: &Columns) -> Result<Vec<Row>, TrainError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
        TrainError::User(format!("{uri} row {line}: not UTF-8 (byte {} of the file)", error.valid_up_to()))
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(TrainError::User(format!("{uri}: the file is empty")));
    }
    let path = uri.split(['?', '#']).next().unwrap_or(uri);
    match path.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase()).as_deref() {
        Some("jsonl") => json_lines(uri, text, columns),
        Some("csv") => separated(uri, text, columns, b','),
        Some("tsv") => separated(uri, text, columns, b'\t'),
        _ => Err(TrainError::User(format!(
            "{uri}: the format follows the name, which has to end in .jsonl, .csv or .tsv"
        ))),
    }
}

fn json_lines(uri: &str, text: &str, columns: &Columns) -> Result<Vec<Row>, TrainError> {
    let mut rows = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{uri} row {}", index + 1);
        let value: Value =
            serde_json::from_str(line).map_err(|error| TrainError::User(format!("{place}: not JSON: {error}")))?;
        let Value::Object(object) = value else {
            return Err(TrainError::User(format!("{place}: not a JSON object")));
        };
        let field = |name: &str| match object.get(name) {
            Some(Value::String(text)) => Ok(text.clone()),
            // Classes are often numbers or booleans.
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
            Some(_) => Err(TrainError::User(format!("{place}: field {name:?} is not text"))),
            None => Err(TrainError::User(format!("{place}: field {name:?} is missing"))),
        };
        rows.push(row(place.clone(), field(&columns.text)?, field(&columns.label)?, columns)?);
    }
    Ok(rows)
}

fn separated(uri: &str, text: &str, columns: &Columns, delimiter: u8) -> Result<Vec<Row>, TrainError> {
    // A tab cannot be quoted by convention, and texts are full of quotes.
    let mut reader =
        csv::ReaderBuilder::new().delimiter(delimiter).quoting(delimiter == b',').from_reader(text.as_bytes());
    let refused = |error: csv::Error| {
        let line = error.position().map_or(1, csv::Position::line);
        TrainError::User(format!("{uri} row {line}: {error}"))
    };
    let header = reader.headers().map_err(refused)?.clone();
    let column = |name: &str| {
        header.iter().position(|title| title.trim() == name).ok_or_else(|| {
            let titles = header.iter().collect::<Vec<_>>().join(", ");
            TrainError::User(format!("{uri} row 1: no column is named {name:?}, the header has: {titles}"))
        })
    };
    let (text_column, label_column) = (column(&columns.text)?, column(&columns.label)?);
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(refused)?;
        let place = format!("{uri} row {}", record.position().map_or(0, csv::Position::line));
        let field = |index: usize| record.get(index).unwrap_or_default().to_owned();
        rows.push(row(place, field(text_column), field(label_column), columns)?);
    }
    Ok(rows)
}

fn row(place: String, text: String, label: String, columns: &Columns) -> Result<Row, TrainError> {
    for (value, name) in [(&text, &columns.text), (&label, &columns.label)] {
        if value.trim().is_empty() {
            return Err(TrainError::User(format!("{place}: field {name:?} is empty")));
        }
    }
    Ok(Row { text, label, place })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(name: &str, content: &[u8]) -> Result<Vec<(String, String)>, String> {
        parse(name, content, &Columns::default())
            .map(|rows| rows.into_iter().map(|row| (row.text, row.label)).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_three_formats_give_the_same_rows() {
        let expected = Ok(vec![("it's \"fine\"".to_owned(), "1".to_owned()), ("b".to_owned(), "0".to_owned())]);
        for (name, content) in [
            (
                "x.jsonl",
                "{\"text\": \"it's \\\"fine\\\"\", \"label\": 1}\n\n{\"label\": \"0\", \"text\": \"b\", \"more\": []}\n",
            ),
            ("x.csv", "\u{feff}label,text\n1,\"it's \"\"fine\"\"\"\n0,b\n"),
            ("s3://b/x.TSV", "text\tlabel\nit's \"fine\"\t1\nb\t0"),
        ] {
            assert_eq!(texts(name, content.as_bytes()), expected, "{name}");
        }
    }

    #[test]
    fn errors_name_file_row_and_field() {
        let cases: [(&str, &[u8], &str); 10] = [
            (
                "x.jsonl",
                b"{\"text\": \"a\", \"label\": \"b\"}\n{\"text\": \"a\"}",
                "x.jsonl row 2: field \"label\" is missing",
            ),
            ("x.jsonl", b"{\"text\": [], \"label\": \"b\"}", "x.jsonl row 1: field \"text\" is not text"),
            ("x.jsonl", b"\n[1]", "x.jsonl row 2: not a JSON object"),
            ("x.jsonl", b"{", "x.jsonl row 1: not JSON"),
            ("x.jsonl", b"{}\n\xff", "x.jsonl row 2: not UTF-8"),
            ("x.csv", b"text,class\na,b\n", "x.csv row 1: no column is named \"label\", the header has: text, class"),
            ("x.csv", b"text,label\na,b\n ,b\n", "x.csv row 3: field \"text\" is empty"),
            ("x.csv", b"text,label\na,b,c\n", "x.csv row 2: "),
            ("x.csv", b"\n", "x.csv: the file is empty"),
            ("x.parquet", b"PAR1", "has to end in .jsonl, .csv or .tsv"),
        ];
        for (name, content, part) in cases {
            let error = texts(name, content).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
