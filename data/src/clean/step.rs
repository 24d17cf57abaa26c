//! The steps of cleaning by name.

use serde::Serialize;

/// The steps of cleaning, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Step {
    RemoveControlCharacters,
    NormalizeUnicode,
    CollapseWhitespace,
    RedactSecret,
    RedactEmail,
    RedactPhone,
    MinimumLength,
    MaximumLength,
    ExactDuplicates,
    ConflictingLabels,
    NearDuplicates,
}
