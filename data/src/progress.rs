//! How far the work on rows has come. What a person sees of it, a bar or a log line, is the caller's.

/// A moment of that work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// One source is being read.
    Reading {
        /// Name of the source.
        source: &'a str,
        /// The file that is being read, or the topic.
        file: &'a str,
        /// Bytes of the source read so far, as they are stored: compressed ones count as such.
        bytes_read: u64,
        /// Bytes of all files of the source, where that is known.
        bytes_total: Option<u64>,
        /// Rows of the source read so far, before cleaning and duplicates.
        rows: u64,
    },
    /// All rows are there, and near duplicates are being looked for.
    Comparing {
        /// Texts that were hashed or compared; each is a few times.
        done: u64,
        /// How often that will be.
        total: u64,
    },
}

/// Takes progress; it is called about every 256 KiB or some thousand texts, from several threads, and must not block.
pub(crate) type Report<'a> = &'a (dyn Fn(Progress<'_>) + Sync);
