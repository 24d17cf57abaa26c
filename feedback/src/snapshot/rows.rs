//! What a snapshot holds.

use athanor_contract::event::GenerationInput;
use serde::{Deserialize, Serialize};

/// A text and the label that it should have had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelledRow {
    /// `{request_id}/{index}`.
    pub id: String,
    pub text: String,
    pub label: String,
}

/// A request to a language model and the text that its answer should have been.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CorrectedAnswer {
    /// `{request_id}/{index}`.
    pub id: String,
    pub input: GenerationInput,
    pub expected: String,
}

/// The rows of some offset ranges.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Classified texts with feedback, in the order of the predictions' partitions and offsets.
    pub rows: Vec<LabelledRow>,
    /// Generated answers with a correction, in the order of the answers' partitions and offsets.
    pub corrections: Vec<CorrectedAnswer>,
    /// Prediction events in the ranges, repeated deliveries included.
    pub predictions: u64,
    /// Generation events in the ranges, repeated deliveries included.
    pub generations: u64,
    /// Feedback events in the ranges, repeated deliveries included.
    pub feedbacks: u64,
    /// Repeated feedback, and repeated answers among those of the rows.
    pub duplicates: u64,
    /// Chosen labels and corrections whose answer is not in the ranges.
    pub orphans: u64,
    /// Records that are not events; each is logged with partition and offset.
    pub malformed: u64,
    /// Events that none of the deployment's keys signed; they are left out.
    pub unsigned: u64,
    /// Labels and corrections left out because there are newer ones, as many as there may be rows.
    pub beyond_maximum: u64,
    /// Offsets at the beginnings of the ranges that retention has deleted.
    pub deleted: u64,
    /// Rows left out because one caller gave more feedback than its share.
    pub beyond_share: u64,
    /// Hexadecimal sha256 over the rows: equal digests mean equal rows.
    pub digest: String,
}
