//! Cleaning of texts and treatment of duplicates.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
use crate::Decimal;

/// Cleaning of texts, in this order: control characters, Unicode, whitespace, redaction, length, exact duplicates,
/// conflicting labels, near duplicates. Each step is off by default, except that a text which occurs twice in a source
/// is kept once. The report says what each step changed and removed, with examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [rules::LENGTHS_IN_ORDER]))]
pub struct CleanSpec {
    /// Whether control characters, such as NUL, backspace and escape, are removed. Tabs and line breaks stay; see
    /// collapseWhitespace.
    pub remove_control_characters: bool,
    /// Whether texts are normalised to Unicode's composed form (NFC), so that the two encodings of é become equal.
    pub normalize_unicode: bool,
    /// Whether each run of spaces, tabs and line breaks becomes one space, and those at both ends are removed.
    /// Unsuitable for text whose layout has a meaning, such as source code.
    pub collapse_whitespace: bool,
    /// Kinds of personal data and secrets that are replaced by a placeholder, such as [EMAIL]. They are found by
    /// patterns: a rare secret may be missed, and a number that resembles a telephone number may be replaced.
    #[schemars(length(max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub redact: Vec<Redaction>,
    /// Least number of characters (Unicode code points) after the preceding steps; shorter texts are removed. Absent:
    /// no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub minimum_length: Option<u32>,
    /// Largest number of characters; longer texts are removed. Texts that are too long for the model need not be
    /// removed: they are cut to hyperparameters.maxSequenceLength tokens. Absent: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub maximum_length: Option<u32>,
    /// Treatment of a text that occurs more than once in a source.
    pub exact_duplicates: ExactDuplicates,
    /// Treatment of a text that occurs with different labels, in the same or in different sources. The report counts
    /// and shows them in any case.
    pub conflicting_labels: ConflictingLabels,
    /// Search for texts that differ only slightly, such as in a date or a name. Absent: no search.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub near_duplicates: Option<NearDuplicates>,
}

impl Default for CleanSpec {
    fn default() -> Self {
        Self {
            remove_control_characters: false,
            normalize_unicode: false,
            collapse_whitespace: false,
            redact: Vec::new(),
            minimum_length: None,
            maximum_length: None,
            exact_duplicates: ExactDuplicates::Drop,
            conflicting_labels: ConflictingLabels::Keep,
            near_duplicates: None,
        }
    }
}

/// Kind of text that is replaced by a placeholder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Redaction {
    /// E-mail addresses become [EMAIL].
    Email,
    /// Telephone numbers with a country code, or in a usual national form, become [PHONE].
    Phone,
    /// API keys, access tokens, passwords after their name, private keys and JSON Web Tokens become [SECRET].
    Secret,
}

/// A text that occurs more than once in a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ExactDuplicates {
    /// Every occurrence is a row, so a frequent text counts as often as it occurs.
    Keep,
    /// One row is kept: the first one of a file, or of a topic the one with the newest label.
    Drop,
}

/// A text that occurs with different labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConflictingLabels {
    /// All rows are kept (exactDuplicates decides among those of one source).
    Keep,
    /// All rows of the text are removed, since the right label is unknown.
    Drop,
    /// The job fails, and the message names the rows.
    Fail,
}

/// Near duplicates are found by MinHash and confirmed on the texts themselves. Rows that are near duplicates of each
/// other, directly or through others, form a cluster; a cluster is never divided between training, validation and test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NearDuplicates {
    /// Least Jaccard similarity, "0.5" to "1", of the shingles of two near duplicates. One changed word in a text of
    /// twenty words gives about 0.85.
    #[schemars(extend("x-kubernetes-validations" = [rules::FROM_HALF_TO_1]))]
    pub threshold: Decimal,
    /// Pieces of the texts that are compared, in lower case and regardless of spacing.
    pub shingles: Shingles,
    /// Treatment of the rows of a cluster.
    pub action: NearDuplicateAction,
}

impl Default for NearDuplicates {
    fn default() -> Self {
        Self {
            threshold: Decimal::new(0.8).expect("a finite constant"),
            shingles: Shingles::Characters,
            action: NearDuplicateAction::Group,
        }
    }
}

/// Pieces of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Shingles {
    /// Runs of 5 characters: for any language and for short texts.
    Characters,
    /// Runs of 3 words: for long texts in languages that separate words by spaces.
    Words,
}

/// What happens to the rows of a cluster of near duplicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NearDuplicateAction {
    /// All rows are kept, in the same part of the split.
    Group,
    /// The first row of the cluster is kept.
    Drop,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_and_empty_are_the_default_and_come_back() {
        let spec: CleanSpec = serde_json::from_str("{}").unwrap();
        assert_eq!(spec, CleanSpec::default());
        let spec: CleanSpec =
            serde_json::from_str(r#"{"redact": ["Email"], "nearDuplicates": {}, "minimumLength": 3}"#).unwrap();
        let near = spec.near_duplicates.unwrap();
        assert_eq!((near.threshold.to_string().as_str(), near.action), ("0.8", NearDuplicateAction::Group));
        assert_eq!(spec.exact_duplicates, ExactDuplicates::Drop);
        assert_eq!(serde_json::from_str::<CleanSpec>(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
    }
}
