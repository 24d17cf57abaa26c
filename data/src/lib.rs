//! Sources to the rows of a dataset: read in any format, cleaned, annotated, and split. The same digest gives the same
//! rows.
//!
//! Files are streamed: bytes of an object go through a decompressor into a parser, and only the rows stay, by column.
//! Leaves out tokens and tensors: those are the trainer's.

pub mod annotate;
mod builder;
pub mod clean;
mod columns;
mod conversation;
mod dataset;
mod error;
mod format;
mod inflate;
pub mod pdf;
mod progress;
mod random;
mod read;
mod reading;
mod rows;
mod source;
mod split;
mod stored;
mod strings;
mod topic_report;

pub use builder::SkippedRows;
pub use dataset::Dataset;
pub use error::DataError;
pub use progress::Progress;
pub use random::mix;
pub use read::{read, read_keeping};
pub use rows::Rows;
pub use split::{Fold, Overlap, Part, Parts, part_of};
pub use topic_report::TopicReport;
