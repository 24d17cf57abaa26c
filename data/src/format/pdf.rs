//! PDF: a row a page that has text. Pictures of text have none: those need optical character recognition before.

use std::io::Read;

use crate::{
    DataError,
    pdf::{Answer, Worker},
    reading::Reading,
    rows::Fields,
};

/// A document is in memory whole, with what the reader makes of it.
const LARGEST: usize = 512 << 20;

pub(super) fn read(reader: &mut impl Read, reading: &mut Reading) -> Result<(), DataError> {
    let bytes = reading.whole(reader, LARGEST)?;
    // Some bytes may come before the header, says ISO 32000.
    if !bytes[..bytes.len().min(1024)].windows(5).any(|window| window == b"%PDF-") {
        return Err(reading.user("not a PDF"));
    }
    let mut worker = match reading.pdf_worker().take() {
        Some(worker) => worker,
        None => Worker::start()?,
    };
    let pages = read_pages(&bytes, &mut worker, reading)?;
    // A process whose document is not through is of no more use.
    *reading.pdf_worker() = Some(worker);
    match pages {
        Pages { all, with_text: 0 } => Err(reading
            .user(format!("no text on its {all} pages: pictures of text need optical character recognition first"))),
        _ => Ok(()),
    }
}

/// Pages of a document.
#[derive(Default)]
struct Pages {
    all: u64,
    /// Those that are damaged included.
    with_text: u64,
}

fn read_pages(bytes: &[u8], worker: &mut Worker, reading: &mut Reading) -> Result<Pages, DataError> {
    let mut pages = Pages::default();
    let refused = |problem: String, reading: &Reading| reading.user(format!("not readable as PDF: {problem}"));
    worker.send(bytes).map_err(|reason| refused(reason, reading))?;
    loop {
        let row = match worker.answer() {
            Ok(Answer::Page { text, .. }) if text.trim().is_empty() => {
                pages.all += 1;
                continue;
            }
            Ok(Answer::Page { number, text }) => {
                reading.row(number.into(), Fields { text: text.trim(), ..Fields::default() })
            }
            Ok(Answer::Damaged { number, problem }) => {
                Err(reading.user_at(number.into(), format!("the page is not readable: {problem}")))
            }
            Ok(Answer::End) => return Ok(pages),
            Ok(Answer::Refused { problem }) | Err(problem) if pages.all == 0 => return Err(refused(problem, reading)),
            Ok(Answer::Refused { problem }) | Err(problem) => {
                return Err(reading.user(format!("not readable as PDF from page {} on: {problem}", pages.all + 1)));
            }
            Ok(Answer::Ready) => return Err(DataError::Other(format!("{}: no answer of its reader", reading.uri()))),
        };
        pages.all += 1;
        pages.with_text += 1;
        reading.go_on(row)?;
    }
}
