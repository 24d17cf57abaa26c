//! The bytes of a file as a stream.

use bytes::Bytes;
use futures::stream::BoxStream;

use crate::DataError;

/// Bytes that go to the parser at once.
pub(super) const CHUNK: usize = 256 << 10;

/// A file's bytes.
pub(super) struct Opened {
    /// Absent where the store does not report it.
    pub size: Option<u64>,
    pub bytes: BoxStream<'static, Result<Bytes, DataError>>,
}
