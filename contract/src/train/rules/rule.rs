//! A rule that the API server knows, a rule that is broken, and the list of the broken ones.

use std::{borrow::Cow, fmt};

use serde::Serialize;

/// A rule that the API server checks as well: an entry of `x-kubernetes-validations`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// CEL expression, true if the rule holds.
    pub rule: Cow<'static, str>,
    /// What is wrong if it does not hold.
    pub message: Cow<'static, str>,
}

impl Rule {
    pub(super) const fn new(rule: &'static str, message: &'static str) -> Self {
        Self { rule: Cow::Borrowed(rule), message: Cow::Borrowed(message) }
    }
}

/// A rule that a specification breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Path of the field below `spec`, such as `data.sources[0].uri`.
    pub field: String,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Mistakes found so far.
#[derive(Default)]
pub(super) struct Found(pub(super) Vec<Mistake>);

impl Found {
    pub(super) fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Mistake { field: field.into(), message: message.into() });
    }

    /// Adds a rule's message unless the rule holds.
    pub(super) fn require(&mut self, holds: bool, field: impl Into<String>, rule: &Rule) {
        if !holds {
            self.add(field, rule.message.clone());
        }
    }
}
