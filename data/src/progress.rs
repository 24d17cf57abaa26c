//! How far reading has come. What a person sees of it, a bar or a log line, is the caller's.

/// A moment in the reading of one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Name of the source.
    pub source: &'a str,
    /// The file that is being read, or the topic.
    pub file: &'a str,
    /// Bytes of the source read so far, as they are stored: compressed ones count as such.
    pub bytes_read: u64,
    /// Bytes of all files of the source, where that is known.
    pub bytes_total: Option<u64>,
    /// Rows of the source read so far, before cleaning and duplicates.
    pub rows: u64,
}

/// Takes progress; it is called about every 256 KiB and must not block.
pub(crate) type Report<'a> = &'a (dyn Fn(Progress<'_>) + Sync);
