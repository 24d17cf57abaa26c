//! Cleaning: what is wrong with a text alone ([`Cleaner`], row by row while they are read), and what is wrong with rows
//! together ([`resolve`]: exact duplicates, conflicting labels, near duplicates, once all rows are there).
//!
//! Cleaning a cleaned text changes nothing. Nothing is removed or changed in silence: the report counts it and shows
//! examples.

mod clusters;
mod minhash;
mod normalize;
mod redact;
mod report;
mod resolve;
mod step;

use std::borrow::Cow;

use athanor_contract::train::{CleanSpec, Redaction};

pub use clusters::{Clusters, near_duplicates};
pub use report::{CleaningReport, EXAMPLES, Example, StepReport};
pub use resolve::{Corpus, Resolved, Standing, resolve};
pub use step::Step;

use crate::error::DataError;
use redact::{Redactor, placeholder};
use report::{Effect, difference, excerpt};

/// What became of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cleaned<'t> {
    /// The row stays, with this text: the same, borrowed, if nothing was to be changed.
    Kept(Cow<'t, str>),
    Removed(Removal),
}

/// Why a row does not stay. Lengths are in characters of the cleaned text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Removal {
    #[error("{length} characters are fewer than minimumLength, {minimum}")]
    TooShort { length: usize, minimum: usize },
    #[error("{length} characters are more than maximumLength, {maximum}")]
    TooLong { length: usize, maximum: usize },
}

/// Cleans texts one by one and keeps count.
pub struct Cleaner {
    remove_control_characters: bool,
    normalize_unicode: bool,
    collapse_whitespace: bool,
    redactor: Option<Redactor>,
    minimum: usize,
    maximum: usize,
    report: CleaningReport,
}

/// What a step makes of a text; `None` if it is in order.
type Apply = fn(&str) -> Option<String>;

/// A step's change, kept until it is known what of it may be shown.
struct Change {
    step: Step,
    texts: Option<(String, String)>,
}

impl Cleaner {
    /// # Errors
    /// None that a user could cause.
    pub fn new(spec: &CleanSpec) -> Result<Self, DataError> {
        Ok(Self {
            remove_control_characters: spec.remove_control_characters,
            normalize_unicode: spec.normalize_unicode,
            collapse_whitespace: spec.collapse_whitespace,
            redactor: Redactor::new(&spec.redact)?,
            // A text that cleaning leaves empty says nothing, whatever the specification says.
            minimum: spec.minimum_length.map_or(1, |minimum| minimum as usize).max(1),
            maximum: spec.maximum_length.map_or(usize::MAX, |maximum| maximum as usize),
            report: CleaningReport::default(),
        })
    }

    /// Cleans the text of the next row. `place` says where the row came from; it is asked for examples alone.
    pub fn clean<'t>(&mut self, text: &'t str, place: impl Fn() -> String) -> Cleaned<'t> {
        self.report.rows += 1;
        let mut current = Cow::Borrowed(text);
        let mut changes = Vec::new();
        let steps: [(bool, Step, Apply); 3] = [
            (self.remove_control_characters, Step::RemoveControlCharacters, normalize::without_control_characters),
            (self.normalize_unicode, Step::NormalizeUnicode, normalize::composed),
            (self.collapse_whitespace, Step::CollapseWhitespace, normalize::collapsed_whitespace),
        ];
        for (_, step, apply) in steps.into_iter().filter(|(wanted, ..)| *wanted) {
            if let Some(after) = apply(&current) {
                let texts = self.report.wants(step).then(|| (current.clone().into_owned(), after.clone()));
                changes.push(Change { step, texts });
                current = Cow::Owned(after);
            }
        }
        let redacted = self.redactor.as_ref().and_then(|redactor| redactor.redact(&current));
        let found = redacted.map_or_else(Vec::new, |(text, found)| {
            current = Cow::Owned(text);
            found
        });
        self.report_changes(changes, &current, &found, &place);
        match self.removal(&current) {
            None => {
                self.report.kept += 1;
                Cleaned::Kept(current)
            }
            Some((step, removal)) => {
                self.report.count(step, Effect::Removed, || Example {
                    place: place(),
                    before: Some(excerpt(&current, 0)),
                    after: None,
                    reason: Some(removal.to_string()),
                });
                Cleaned::Removed(removal)
            }
        }
    }

    /// What was done so far.
    pub fn report(&self) -> &CleaningReport {
        &self.report
    }

    /// What was done, for [`resolve`] to go on with.
    pub fn into_report(self) -> CleaningReport {
        self.report
    }

    /// Counts changes. Where something was redacted, no text of an earlier step is shown: a finding may have been split
    /// there by what the step removed, so that redacting the earlier text would miss it.
    fn report_changes(
        &mut self,
        changes: Vec<Change>,
        current: &str,
        found: &[Redaction],
        place: &impl Fn() -> String,
    ) {
        let redacted = |step: Step, kind: Option<Redaction>| Example {
            place: place(),
            before: None,
            after: Some(excerpt(current, kind.and_then(|kind| current.find(placeholder(kind))).unwrap_or(0))),
            reason: (kind.is_none() && step < Step::RedactSecret).then(|| "the text before was redacted".into()),
        };
        for Change { step, texts } in changes {
            let redactor = &self.redactor;
            self.report.count(step, Effect::Changed, || match texts {
                Some((before, after)) if found.is_empty() => {
                    let shown = |text: String| redactor.as_ref().map_or(text.clone(), |redactor| redactor.shown(&text));
                    let (before, after) = (shown(before), shown(after));
                    let focus = difference(&before, &after);
                    Example {
                        place: place(),
                        before: Some(excerpt(&before, focus)),
                        after: Some(excerpt(&after, focus)),
                        reason: None,
                    }
                }
                _ => redacted(step, None),
            });
        }
        for &kind in found {
            let step = match kind {
                Redaction::Secret => Step::RedactSecret,
                Redaction::Email => Step::RedactEmail,
                Redaction::Phone => Step::RedactPhone,
            };
            self.report.count(step, Effect::Changed, || redacted(step, Some(kind)));
        }
    }

    fn removal(&self, text: &str) -> Option<(Step, Removal)> {
        // Bytes are at least the characters, so most texts need not be counted.
        if text.len() >= self.minimum.saturating_mul(4) && text.len() <= self.maximum {
            return None;
        }
        let length = text.chars().count();
        if length < self.minimum {
            Some((Step::MinimumLength, Removal::TooShort { length, minimum: self.minimum }))
        } else if length > self.maximum {
            Some((Step::MaximumLength, Removal::TooLong { length, maximum: self.maximum }))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests;
