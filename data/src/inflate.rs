//! Bounds what a compressed file becomes.

use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

/// Bytes to which any file may inflate.
const FREE: u64 = 1 << 30;
/// Above these, as a multiple of the compressed bytes read so far. Text shrinks to a tenth, repetitive logs to a
/// hundredth; files that are made to fill memory or disk reach a thousand (gzip) and more (Zstandard).
const RATIO: u64 = 200;

/// A file that inflates to more than it may.
#[derive(Debug, thiserror::Error)]
#[error("the file inflates to more than {} GiB and more than {RATIO} times its size", FREE >> 30)]
pub(crate) struct TooMuch;

/// Counts the bytes that go into a decompressor.
pub(crate) struct Counted<R> {
    reader: R,
    read: Rc<Cell<u64>>,
}

impl<R> Counted<R> {
    /// Also returns the count.
    pub fn new(reader: R) -> (Self, Rc<Cell<u64>>) {
        let read = Rc::<Cell<u64>>::default();
        (Self { reader, read: read.clone() }, read)
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}

/// Gives what comes out of a decompressor as long as it is not too much for what went in.
pub(crate) struct Inflated<R> {
    reader: R,
    compressed: Rc<Cell<u64>>,
    read: u64,
}

impl<R> Inflated<R> {
    /// `compressed` is the count of bytes that the decompressor has read.
    pub fn new(reader: R, compressed: Rc<Cell<u64>>) -> Self {
        Self { reader, compressed, read: 0 }
    }
}

impl<R: Read> Read for Inflated<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.read += read as u64;
        if self.read > FREE && self.read > RATIO * self.compressed.get() {
            return Err(io::Error::other(TooMuch));
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads to the end, and how many bytes came.
    fn drain(mut reader: impl Read) -> (u64, Option<io::Error>) {
        let (mut all, mut buffer) = (0, vec![0; 1 << 20]);
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return (all, None),
                Ok(read) => all += read as u64,
                Err(error) => return (all, Some(error)),
            }
        }
    }

    #[test]
    fn a_file_inflates_freely_up_to_a_bound_and_then_by_its_size() {
        let much = FREE + (1 << 22);
        let inflated = |compressed: u64| {
            let count = Rc::new(Cell::new(compressed));
            drain(Inflated::new(io::repeat(b'a').take(much), count))
        };
        assert_eq!(inflated(much / RATIO + 1).0, much);
        let (read, error) = inflated(1000);
        assert!((FREE - (1 << 20)..=FREE).contains(&read), "{read}");
        assert!(error.unwrap().get_ref().unwrap().is::<TooMuch>());
        let (mut counted, count) = Counted::new(&b"12345"[..]);
        assert_eq!((counted.read(&mut [0; 3]).unwrap(), count.get()), (3, 3));
        assert_eq!((counted.read(&mut [0; 3]).unwrap(), count.get()), (2, 5));
    }
}
