//! PDF: a row a page that has text. Pictures of text have none: those need optical character recognition before.

use std::{
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
};

use pdf_extract::{Document, PlainTextOutput, output_doc_page};

use crate::{DataError, reading::Reading, rows::Fields};

/// A document is in memory whole, with what the reader makes of it.
const LARGEST: usize = 512 << 20;

pub(super) fn read(reader: &mut impl Read, reading: &mut Reading) -> Result<(), DataError> {
    let bytes = reading.whole(reader, LARGEST)?;
    // Some bytes may come before the header, says ISO 32000.
    if !bytes[..bytes.len().min(1024)].windows(5).any(|window| window == b"%PDF-") {
        return Err(reading.user("not a PDF"));
    }
    let mut document =
        Document::load_mem(&bytes).map_err(|error| reading.user(format!("not readable as PDF: {error}")))?;
    drop(bytes);
    if document.is_encrypted() {
        // A document that anybody may open has an empty password.
        document.decrypt("").map_err(|_| reading.user("encrypted with a password"))?;
    }
    let pages = document.get_pages();
    let mut is_empty = true;
    for &page in pages.keys() {
        let row = match text(&document, page) {
            Ok(text) if text.trim().is_empty() => continue,
            Ok(text) => reading.row(page.into(), Fields { text: text.trim(), ..Fields::default() }),
            Err(problem) => Err(reading.user_at(page.into(), format!("the page is not readable: {problem}"))),
        };
        is_empty = false;
        reading.go_on(row)?;
    }
    if is_empty {
        let pages = pages.len();
        return Err(reading
            .user(format!("no text on its {pages} pages: pictures of text need optical character recognition first")));
    }
    Ok(())
}

/// The text of a page, from 1. The library panics at some damaged pages.
fn text(document: &Document, page: u32) -> Result<String, String> {
    let mut text = String::new();
    let mut output = PlainTextOutput::new(&mut text);
    match catch_unwind(AssertUnwindSafe(|| output_doc_page(document, &mut output, page))) {
        Ok(Ok(())) => Ok(text),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("it is damaged".to_owned()),
    }
}
