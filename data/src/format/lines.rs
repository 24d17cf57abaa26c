//! Lines of a stream of UTF-8, one at a time.

use std::io::{BufRead, Read};

use crate::{
    DataError,
    reading::{LONGEST_ROW, Reading},
};

/// A line's number from 1 and its text, or why it has none.
type Line<'a> = (u64, Result<&'a str, DataError>);

pub(super) struct Lines<R> {
    reader: R,
    line: Vec<u8>,
    /// Number of the last line that was read, from 1.
    number: u64,
    /// Offset at which the next line begins.
    offset: u64,
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R) -> Self {
        Self { reader, line: Vec::new(), number: 0, offset: 0 }
    }

    /// The next line that is not blank, without its end; `None` at the end of the file.
    pub fn next(&mut self, reading: &Reading) -> Result<Option<Line<'_>>, DataError> {
        loop {
            self.line.clear();
            self.number += 1;
            let read = (&mut self.reader)
                .take(LONGEST_ROW as u64 + 1)
                .read_until(b'\n', &mut self.line)
                .map_err(|error| reading.damaged(self.number, &error))?;
            if read == 0 {
                return Ok(None);
            }
            if read > LONGEST_ROW {
                return Err(reading.too_long(self.number));
            }
            if self.number == 1 && self.line.starts_with("\u{feff}".as_bytes()) {
                self.line.drain(..3);
                self.offset += 3;
            }
            if !self.line.trim_ascii().is_empty() {
                break;
            }
            self.offset += self.line.len() as u64;
        }
        let begin = self.offset;
        self.offset += self.line.len() as u64;
        let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let text = std::str::from_utf8(line).map_err(|error| {
            reading.user_at(self.number, format!("not UTF-8 (byte {} of the file)", begin + error.valid_up_to() as u64))
        });
        Ok(Some((self.number, text)))
    }
}
