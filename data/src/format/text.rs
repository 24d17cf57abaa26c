//! Plain text: a row a line, without labels.

use std::io::BufRead;

use super::lines::Lines;
use crate::{DataError, reading::Reading, rows::Fields};

pub(super) fn read(reader: impl BufRead, reading: &mut Reading) -> Result<(), DataError> {
    let mut lines = Lines::new(reader);
    let mut is_empty = true;
    while let Some((number, text)) = lines.next(reading)? {
        is_empty = false;
        let row = text.and_then(|text| match text.trim() {
            // Blank in Unicode's sense, such as a no-break space alone.
            "" => Ok(()),
            _ => reading.row(number, Fields { text, ..Fields::default() }),
        });
        reading.go_on(row)?;
    }
    if is_empty { Err(reading.user("the file is empty")) } else { Ok(()) }
}
