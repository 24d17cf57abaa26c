//! Replacement of parts of recorded texts, by regular expressions (crate `regex`). Operator and router use the same
//! code, so a pattern that the operator accepts is one that the router can run.

use regex::{Regex, RegexBuilder};

/// What stands in place of each match.
pub const REDACTED: &str = "[redacted]";
/// Most bytes of a compiled pattern.
const MOST_BYTES: usize = 1 << 20;

/// Compiled patterns, in the order in which they are applied.
#[derive(Clone, Debug, Default)]
pub struct Redaction(Vec<Regex>);

/// A pattern that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("redact[{index}]: {message}")]
pub struct InvalidPattern {
    pub index: usize,
    pub message: String,
}

impl Redaction {
    /// Compiles patterns.
    ///
    /// # Errors
    /// The first pattern that is not a regular expression, is too large, or matches the empty text.
    pub fn compile(patterns: &[String]) -> Result<Self, InvalidPattern> {
        let compiled = patterns.iter().enumerate().map(|(index, pattern)| {
            let regex = RegexBuilder::new(pattern)
                .size_limit(MOST_BYTES)
                .build()
                .map_err(|error| InvalidPattern { index, message: error.to_string() })?;
            if regex.is_match("") {
                let message = format!("{pattern:?} matches the empty text, and so between any two characters");
                return Err(InvalidPattern { index, message });
            }
            Ok(regex)
        });
        compiled.collect::<Result<_, _>>().map(Self)
    }

    /// Replaces every match of every pattern by [`REDACTED`].
    pub fn apply(&self, text: &mut String) {
        for pattern in &self.0 {
            if let std::borrow::Cow::Owned(replaced) = pattern.replace_all(text, REDACTED) {
                *text = replaced;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_are_replaced_and_bad_patterns_are_named() {
        let compile =
            |patterns: &[&str]| Redaction::compile(&patterns.iter().map(|&p| p.to_owned()).collect::<Vec<_>>());
        let redaction = compile(&[r"\d{4,}", "(?i)alice"]).unwrap();
        let mut text = "Alice's number is 123456, not 12; ALICE".to_owned();
        redaction.apply(&mut text);
        assert_eq!(text, "[redacted]'s number is [redacted], not 12; [redacted]");
        for (patterns, expected) in [
            (&["a", "("][..], "redact[1]: regex parse error"),
            (&["a*"], "redact[0]: \"a*\" matches the empty text"),
            (&[r"\pL{1000}{1000}"], "redact[0]: Compiled regex exceeds size limit"),
        ] {
            let message = compile(patterns).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }
}
