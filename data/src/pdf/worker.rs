//! The process that reads PDFs, as the one that starts it has it.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::process::Signal;

use super::{limits, message::Answer};
use crate::DataError;

/// First argument of the process.
pub(super) const ARGUMENT: &str = "read-pdf-pages";

/// Whether this program attends to [`ARGUMENT`]; another one would do whatever it does.
static ATTENDS: AtomicBool = AtomicBool::new(false);

pub(super) fn allow_start() {
    ATTENDS.store(true, Ordering::Relaxed);
}

/// A process that reads one document at a time. It ends with this value.
pub(crate) struct Worker {
    child: Child,
    to: UnixStream,
    from: BufReader<UnixStream>,
    /// Size of the document that is being read.
    size: usize,
}

impl Worker {
    /// # Errors
    /// A system that starts no process, and a program that does not call `serve_if_asked`.
    pub fn start() -> Result<Self, DataError> {
        let failed = |error: &dyn std::fmt::Display| {
            DataError::Other(format!("no process to read PDFs could be started: {error}"))
        };
        let (own, its) = UnixStream::pair().map_err(|error| failed(&error))?;
        let mut command =
            command().ok_or_else(|| failed(&"this program does not call athanor_data::pdf::serve_if_asked"))?;
        // Damaged files make the reader print.
        command.stdin(OwnedFd::from(its)).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| failed(&error))?;
        // The command has the other end too: without it the socket is closed when the process ends.
        drop(command);
        let to = own.try_clone().map_err(|error| failed(&error))?;
        let mut worker = Self { child, to, from: BufReader::new(own), size: 0 };
        match worker.answer() {
            Ok(Answer::Ready) => Ok(worker),
            Ok(_) => Err(failed(&"it answers something else")),
            Err(reason) => Err(failed(&reason)),
        }
    }

    /// Hands over a document, of which all pages of the one before were asked for. The error is why the process ended.
    pub fn send(&mut self, document: &[u8]) -> Result<(), String> {
        self.size = document.len();
        let length = (document.len() as u64).to_le_bytes();
        let sent = self.to.write_all(&length).and_then(|()| self.to.write_all(document));
        sent.map_err(|_| self.end())
    }

    /// The next answer. The error is why the process ended.
    pub fn answer(&mut self) -> Result<Answer, String> {
        let mut line = String::new();
        match self.from.read_line(&mut line) {
            Ok(length) if length > 0 => serde_json::from_str(&line).map_err(|_| self.end()),
            _ => Err(self.end()),
        }
    }

    /// Why the process, which no longer answers, has ended.
    fn end(&mut self) -> String {
        let _ = self.to.shutdown(std::net::Shutdown::Both);
        self.child.wait().map_or_else(|error: io::Error| error.to_string(), |status| explain(status, self.size))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may be in the middle of a document.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What ended the process that read a document of this size.
fn explain(status: ExitStatus, size: usize) -> String {
    let is = |signal: Signal| status.signal() == Some(signal.as_raw());
    let memory = limits::memory(size) >> 20;
    if is(Signal::XCPU) {
        format!("it takes more than {} s of processor time", limits::seconds(size))
    } else if is(Signal::ABORT) || is(Signal::SEGV) || is(Signal::BUS) {
        format!("its objects are nested too deeply, or it takes more than {memory} MiB of memory")
    } else if is(Signal::KILL) {
        "its reader was killed, such as for want of memory".to_owned()
    } else {
        format!("its reader ended with {status}")
    }
}

#[cfg(not(test))]
fn command() -> Option<Command> {
    if !ATTENDS.load(Ordering::Relaxed) {
        return None;
    }
    // The program itself, even if its file was replaced.
    let mut command = Command::new("/proc/self/exe");
    command.arg(ARGUMENT);
    Some(command)
}

/// The test program has the test harness's `main`: of its tests, [`tests::reads_for_another_process`] alone is run.
#[cfg(test)]
fn command() -> Option<Command> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["--exact", "pdf::worker::tests::reads_for_another_process", "--nocapture"]).env(tests::SERVE, "1");
    Some(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pdf::child::serve;

    /// Set in a process that a test starts as its reader.
    pub(super) const SERVE: &str = "TEST_READS_PDFS";

    /// As a test, starts a reader and is refused what is no document; as that reader, serves.
    #[test]
    fn reads_for_another_process() {
        if std::env::var_os(SERVE).is_some() {
            std::process::exit(serve());
        }
        let mut worker = Worker::start().unwrap();
        for _ in 0..2 {
            worker.send(b"%PDF-1.4\nand no more").unwrap();
            assert!(matches!(worker.answer().unwrap(), Answer::Refused { .. }));
        }
    }

    #[test]
    fn a_reader_that_ends_says_why() {
        for (signal, part) in [
            (Signal::XCPU, "it takes more than 14 s of processor time"),
            (Signal::ABORT, "its objects are nested too deeply, or it takes more than 516 MiB of memory"),
            (Signal::KILL, "its reader was killed, such as for want of memory"),
        ] {
            assert_eq!(explain(ExitStatus::from_raw(signal.as_raw()), 1 << 20), part);
        }
        let mut worker = Worker::start().unwrap();
        worker.child.kill().unwrap();
        worker.child.wait().unwrap();
        let reason = worker.send(b"%PDF-").and_then(|()| worker.answer().map(drop)).unwrap_err();
        assert_eq!(reason, "its reader was killed, such as for want of memory");
    }
}
