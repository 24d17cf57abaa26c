//! What a snapshot holds.

use athanor_contract::event::GenerationInput;

/// A text and the label that it should have had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledRow {
    /// `{request_id}/{index}`.
    pub id: String,
    pub text: String,
    pub label: String,
}

/// A request to a language model and the text that its answer should have been.
#[derive(Clone, Debug, PartialEq)]
pub struct CorrectedAnswer {
    /// `{request_id}/{index}`.
    pub id: String,
    pub input: GenerationInput,
    pub expected: String,
}

/// The rows of some offset ranges.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    /// Classified texts with feedback, in the order of the predictions' partitions and offsets.
    pub rows: Vec<LabelledRow>,
    /// Generated answers with a correction, in the order of the answers' partitions and offsets.
    pub corrections: Vec<CorrectedAnswer>,
    /// Distinct prediction events in the ranges.
    pub predictions: u64,
    /// Distinct generation events in the ranges.
    pub generations: u64,
    /// Distinct feedback events in the ranges.
    pub feedbacks: u64,
    /// Events dropped because an event with the same id, or an answer for the same input, came before.
    pub duplicates: u64,
    /// Feedback whose answer lies outside the ranges.
    pub orphans: u64,
    /// Records that are not events; each is logged with partition and offset.
    pub malformed: u64,
    /// Hexadecimal sha256 over the rows: equal digests mean equal rows.
    pub digest: String,
}
