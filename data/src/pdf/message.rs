//! What the process that reads PDFs answers: lines of JSON. It is asked by the length of a document (eight bytes,
//! little-endian) and its bytes.

use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The process has started.
    Ready,
    /// The text of a page, from 1; pages come in order.
    Page { number: u32, text: String },
    /// A page that cannot be read, which keeps no other one from being read.
    Damaged { number: u32, problem: String },
    /// The document is through.
    End,
    /// The document cannot be read, or not to its end.
    Refused { problem: String },
}
