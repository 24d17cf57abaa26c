//! The process that reads PDFs: it answers at the socket that is its standard input until that is closed.

use std::{
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    os::{fd::AsFd, unix::net::UnixStream},
    panic::{AssertUnwindSafe, catch_unwind},
    process::exit,
};

use pdf_extract::{Document, PlainTextOutput, output_doc_page};

use super::{
    limits::{self, Bounds, be_expendable},
    message::Answer,
    worker::{ARGUMENT, allow_start},
};
use crate::reading::LONGEST_ROW;

/// Stack of the thread that reads: pages nest forms, and page trees their nodes.
const STACK: usize = 16 << 20;

/// Reads PDFs for another process and ends, if this process was started for that. A program that reads PDFs calls this
/// first in `main`: without it, no process can be started that reads them.
pub fn serve_if_asked() {
    match std::env::args_os().nth(1) {
        Some(argument) if argument == ARGUMENT => exit(serve()),
        _ => allow_start(),
    }
}

/// Serves until the other process has closed the socket; the exit code.
pub(super) fn serve() -> i32 {
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(answer_all);
    match thread.map(std::thread::JoinHandle::join) {
        Ok(Ok(Ok(()))) => 0,
        _ => 1,
    }
}

fn answer_all() -> io::Result<()> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut from = BufReader::new(socket.try_clone()?);
    let mut to = BufWriter::new(socket);
    be_expendable()?;
    send(&mut to, &Answer::Ready)?;
    while !from.fill_buf()?.is_empty() {
        let mut length = [0; 8];
        from.read_exact(&mut length)?;
        let size = usize::try_from(u64::from_le_bytes(length)).map_err(io::Error::other)?;
        let bounds = Bounds::set(size)?;
        let mut bytes = vec![0; size];
        from.read_exact(&mut bytes)?;
        let last = match read(bytes, &bounds, &mut to)? {
            Ok(()) => Answer::End,
            Err(problem) => Answer::Refused { problem },
        };
        send(&mut to, &last)?;
    }
    Ok(())
}

fn send(to: &mut impl Write, answer: &Answer) -> io::Result<()> {
    serde_json::to_writer(&mut *to, answer)?;
    to.write_all(b"\n")?;
    to.flush()
}

/// Answers with the pages of a document, or says why it cannot be read.
fn read(bytes: Vec<u8>, bounds: &Bounds, to: &mut impl Write) -> io::Result<Result<(), String>> {
    let size = bytes.len();
    let document = match catch_unwind(|| load(&bytes)) {
        Ok(Ok(document)) => document,
        Ok(Err(problem)) => return Ok(Err(problem)),
        Err(_) => return Ok(Err("it is damaged".into())),
    };
    drop(bytes);
    let too_large = || Ok(Err(format!("it takes more than {} MiB of memory", limits::memory(size) >> 20)));
    if bounds.exceeded()? {
        return too_large();
    }
    for &number in document.get_pages().keys() {
        let text = text(&document, number);
        if bounds.exceeded()? {
            return too_large();
        }
        let answer = match text {
            Ok(text) if text.len() > LONGEST_ROW => {
                Answer::Damaged { number, problem: format!("longer than {} MiB", LONGEST_ROW >> 20) }
            }
            Ok(text) => Answer::Page { number, text },
            Err(problem) => Answer::Damaged { number, problem },
        };
        send(to, &answer)?;
    }
    Ok(Ok(()))
}

fn load(bytes: &[u8]) -> Result<Document, String> {
    let mut document = Document::load_mem(bytes).map_err(|error| error.to_string())?;
    if document.is_encrypted() {
        // A document that anybody may open has an empty password.
        document.decrypt("").map_err(|_| "encrypted with a password".to_owned())?;
    }
    Ok(document)
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
