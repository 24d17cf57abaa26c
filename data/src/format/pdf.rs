//! PDF: a row a page that has text. Pictures of text have none: those need optical character recognition before.

use std::io::Read;

use crate::{DataError, reading::Reading, rows::Fields};

/// A document is in memory whole, with what the reader makes of it.
const LARGEST: usize = 512 << 20;

pub(super) fn read(reader: &mut impl Read, reading: &mut Reading) -> Result<(), DataError> {
    let bytes = reading.whole(reader, LARGEST)?;
    // Some bytes may come before the header, says ISO 32000.
    if !bytes[..bytes.len().min(1024)].windows(5).any(|window| window == b"%PDF-") {
        return Err(reading.user("not a PDF"));
    }
    let pages = pdf_extract::extract_text_from_mem_by_pages(&bytes)
        .map_err(|error| reading.user(format!("not readable as PDF: {error}")))?;
    let mut rows = 0;
    for (page, text) in (1..).zip(&pages) {
        let text = text.trim();
        if !text.is_empty() {
            reading.row(page, Fields { text, ..Fields::default() })?;
            rows += 1;
        }
    }
    if rows == 0 {
        return Err(reading.user(format!(
            "no text on its {} pages: pictures of text need optical character recognition first",
            pages.len()
        )));
    }
    Ok(())
}
