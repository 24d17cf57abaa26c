//! Bytes from a task that receives them to a thread that parses them, a few chunks ahead.

use std::io::{self, Read};

use tokio::sync::mpsc;

/// Chunks that wait.
const AHEAD: usize = 8;

pub(super) fn pipe() -> (mpsc::Sender<Vec<u8>>, Pipe) {
    let (sender, receiver) = mpsc::channel(AHEAD);
    (sender, Pipe { receiver, chunk: Vec::new(), read: 0 })
}

/// The reading end; the end of the file is when the sender is gone.
pub(super) struct Pipe {
    receiver: mpsc::Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    /// Bytes of the chunk that were read.
    read: usize,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.read == self.chunk.len() {
            match self.receiver.blocking_recv() {
                Some(chunk) => (self.chunk, self.read) = (chunk, 0),
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.chunk.len() - self.read);
        buffer[..count].copy_from_slice(&self.chunk[self.read..self.read + count]);
        self.read += count;
        Ok(count)
    }
}
