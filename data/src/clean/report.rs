//! What cleaning did: counts of each step, and its first few rows as examples.

use serde::Serialize;

use super::step::Step;

/// Examples kept of each step.
pub const EXAMPLES: usize = 10;

/// Characters shown of a text, and how many of them before what it is about.
const EXCERPT: usize = 200;
const LEAD: usize = 40;

/// Steps that did something, in the order in which they ran.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CleaningReport {
    /// Rows that were looked at.
    pub rows: u64,
    /// Rows that stay.
    pub kept: u64,
    pub steps: Vec<StepReport>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StepReport {
    pub step: Step,
    /// Rows whose text it changed.
    pub changed: u64,
    /// Rows it removed.
    pub removed: u64,
    /// Rows it found and left as they are: with conflicting labels, or in a cluster with others.
    pub found: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<Example>,
}

/// A row that a step changed, removed or found. Where secrets are redacted, no example shows one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Example {
    /// Where the row came from.
    pub place: String,
    /// The text before the step, or a part of it. Absent where something in it was redacted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// The text after the step, or a part of it. Absent for a row that was removed or left as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<String>,
    /// Why, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a step did to a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Changed,
    Removed,
    Found,
}

impl CleaningReport {
    /// Counts a row, and keeps an example of it while there are few.
    pub(super) fn count(&mut self, step: Step, effect: Effect, example: impl FnOnce() -> Example) {
        let report = self.counted(step, effect);
        if report.examples.len() < EXAMPLES {
            report.examples.push(example());
        }
    }

    /// Counts a row without an example.
    pub(super) fn count_only(&mut self, step: Step, effect: Effect) {
        self.counted(step, effect);
    }

    fn counted(&mut self, step: Step, effect: Effect) -> &mut StepReport {
        let index = self.steps.binary_search_by_key(&step, |report| report.step).unwrap_or_else(|index| {
            self.steps.insert(index, StepReport { step, changed: 0, removed: 0, found: 0, examples: Vec::new() });
            index
        });
        let report = &mut self.steps[index];
        match effect {
            Effect::Changed => report.changed += 1,
            Effect::Removed => report.removed += 1,
            Effect::Found => report.found += 1,
        }
        report
    }

    /// Whether another example of the step would be kept.
    pub(super) fn wants(&self, step: Step) -> bool {
        self.step(step).is_none_or(|report| report.examples.len() < EXAMPLES)
    }

    /// What a step did; `None` if nothing.
    pub fn step(&self, step: Step) -> Option<&StepReport> {
        self.steps.iter().find(|report| report.step == step)
    }
}

/// A part of a text around the byte `focus`, short enough to be read; ellipses say what is left out.
pub(super) fn excerpt(text: &str, focus: usize) -> String {
    let focus = (0..=focus.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let start = text[..focus].char_indices().rev().take(LEAD).last().map_or(focus, |(at, _)| at);
    let end = text[start..].char_indices().nth(EXCERPT).map_or(text.len(), |(at, _)| start + at);
    let (before, after) = (if start > 0 { "…" } else { "" }, if end < text.len() { "…" } else { "" });
    format!("{before}{}{after}", &text[start..end])
}

/// First byte in which two texts differ.
pub(super) fn difference(one: &str, other: &str) -> usize {
    std::iter::zip(one.bytes(), other.bytes()).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_are_short_and_show_what_they_are_about() {
        assert_eq!(excerpt("short", 3), "short");
        assert_eq!(excerpt("", 9), "");
        let long = format!("{}X{}", "é".repeat(500), "y".repeat(500));
        let shown = excerpt(&long, 1000);
        assert!(shown.starts_with("…é") && shown.ends_with("y…") && shown.contains('X'), "{shown}");
        assert_eq!(shown.chars().count(), EXCERPT + 2);
        assert!(excerpt(&long, 1).starts_with('é'));
        assert_eq!(difference("abc", "abd"), 2);
    }
}
