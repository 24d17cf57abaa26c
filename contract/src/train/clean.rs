//! How texts are cleaned, and what happens to rows that say the same thing twice.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::rules;
use crate::Decimal;

/// Cleaning of texts, in this order: control characters, Unicode, whitespace, redaction, length, exact duplicates, conflicting
/// labels, near duplicates. Every step is off unless asked for, except that a text which occurs twice in a source is kept once.
/// The report says what each step changed and removed, with examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [rules::LENGTHS_IN_ORDER]))]
pub struct CleanSpec {
    /// Removes control characters, such as NUL, backspace and escape, which are never part of a text. Tabs and line breaks stay;
    /// `collapseWhitespace` is about them.
    pub remove_control_characters: bool,
    /// Writes each character in Unicode's composed form (NFC), so that an é from one keyboard equals an é from another.
    pub normalize_unicode: bool,
    /// Makes one space of every run of spaces, tabs and line breaks, and removes those at both ends. Not for text whose layout
    /// carries meaning, such as source code.
    pub collapse_whitespace: bool,
    /// What must not be trained on: each finding is replaced by a placeholder, such as [EMAIL]. Findings are patterns, not
    /// proofs: a rare secret may be missed, and a number that looks like a telephone's may be replaced.
    #[schemars(length(max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub redact: Vec<Redaction>,
    /// Texts with fewer characters are removed. Characters are Unicode code points, counted after the steps before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub minimum_length: Option<u32>,
    /// Texts with more characters are removed. Texts that are merely longer than the model reads need not be: they are cut to
    /// `hyperparameters.maxSequenceLength` tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub maximum_length: Option<u32>,
    /// What happens to a text that occurs more than once in a source.
    pub exact_duplicates: ExactDuplicates,
    /// What happens to a text that occurs with different labels, in whatever sources. They are counted and shown in any case.
    pub conflicting_labels: ConflictingLabels,
    /// Finds texts that differ in little, such as a date or a name. Absent: they are not looked for.
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

/// Something that is replaced by a placeholder.
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
    /// Every occurrence is a row: a text that is frequent counts as often as it occurs.
    Keep,
    /// One row stays: the first of a file, with the newest label of a topic.
    Drop,
}

/// A text that occurs with different labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConflictingLabels {
    /// Rows stay as they are (`exactDuplicates` chooses among those of one source).
    Keep,
    /// All rows of the text are removed: nobody knows which label is right.
    Drop,
    /// The job fails and names the rows, for someone to decide.
    Fail,
}

/// Near duplicates are found by MinHash and confirmed on the texts themselves. Rows that are near duplicates of each other,
/// directly or through others, form a cluster, and a cluster is never divided between training, validation and test.
/// Costs about 300 bytes of memory a row while clusters are sought.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NearDuplicates {
    /// Two texts are near duplicates if the pieces they have in common are at least this share of the pieces of both (their
    /// Jaccard similarity), between "0.5" and "1". One word changed in a text of twenty gives about 0.85.
    #[schemars(extend("x-kubernetes-validations" = [rules::FROM_HALF_TO_1]))]
    pub threshold: Decimal,
    /// The pieces that are compared, in lower case and without regard to spacing.
    pub shingles: Shingles,
    /// What happens to the rows of a cluster.
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
    /// Each run of 5 characters: for any language, and for short texts.
    Characters,
    /// Each run of 3 words: for long texts in languages that put spaces between words.
    Words,
}

/// What happens to the rows of a cluster of near duplicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NearDuplicateAction {
    /// All stay, in the same part of the split.
    Group,
    /// The first row of the cluster stays.
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
