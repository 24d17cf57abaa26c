//! E-mail addresses, telephone numbers and secrets, found by patterns and replaced by placeholders.
//!
//! Patterns prefer a number too many to an address too few, but leave dates, versions, amounts and plain identifiers alone. Names,
//! postal addresses and card numbers are not looked for.

use std::ops::Range;

use athanor_contract::train::Redaction;
use regex::Regex;

use crate::error::DataError;

/// Local part, at, domain: letters of any script.
const EMAIL: &str = r"[\w.%+\-]+@(?:[\w\-]+\.)+\p{L}{2,}";

/// +49 30 1234567, +1 (555) 234-5678, 0033 1 23 45 67 89.
const INTERNATIONAL_PHONE: &str = r"(?x-u)
    (?:\+|\b00)[1-9][0-9]{0,2}
    (?:[\x20./\-]{0,2}(?:\([0-9]{1,4}\)|[0-9]{1,4})){2,6}";

/// (555) 234-5678, 1-555-234-5678, 555.234.5678.
const NORTH_AMERICAN_PHONE: &str = r"(?x-u)
    (?:\b1[\x20.\-])?(?:\([2-9][0-9]{2}\)\x20?|\b[2-9][0-9]{2}[\x20.\-])
    [2-9][0-9]{2}[\x20.\-][0-9]{4}\b";

/// 030 1234567, (0171) 123 45 67, 01 23 45 67 89: a zero in front of the area, then at least one separator.
const NATIONAL_PHONE: &str = r"(?x-u)
    (?:\(0[1-9][0-9]{0,4}\)|\b0[1-9][0-9]{0,4})[\x20./\-]{1,3}
    [0-9]{2,8}(?:[\x20.\-]?[0-9]{2,4}){0,4}\b";

/// A private key in PEM or PGP armour; one that is cut off reaches to the end of the text.
const PRIVATE_KEY: &str = r"(?xs-u)
    -----BEGIN\x20[A-Z0-9\x20]{0,40}PRIVATE\x20KEY(?:\x20BLOCK)?-----
    (?u:.*?)
    (?:-----END\x20[A-Z0-9\x20]{0,40}PRIVATE\x20KEY(?:\x20BLOCK)?-----|\z)";

/// Tokens that tell what they are: AWS, GitHub, GitLab, Slack, Stripe, Google, Hugging Face, npm, PyPI, SendGrid,
/// JSON Web Tokens (RFC 7519, signed or encrypted).
const TOKEN: &str = r"(?x-u)\b(?:
    (?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b
  | gh[pousr]_[A-Za-z0-9]{30,}
  | github_pat_[A-Za-z0-9_]{22,}
  | glpat-[A-Za-z0-9_\-]{20,}
  | xox[abeoprs]-[A-Za-z0-9\-]{10,}
  | (?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{10,}
  | whsec_[A-Za-z0-9]{20,}
  | AIza[A-Za-z0-9_\-]{35}
  | hf_[A-Za-z0-9]{30,}
  | npm_[A-Za-z0-9]{36}
  | pypi-[A-Za-z0-9_\-]{50,}
  | SG\.[A-Za-z0-9_\-]{16,}\.[A-Za-z0-9_\-]{16,}
  | eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-.]*
)";

/// Tokens of OpenAI and kin; words may look like them, so one must have a digit.
const SK_TOKEN: &str = r"(?-u)\bsk-[A-Za-z0-9_\-]{20,}";

/// What follows `Bearer` or `Basic` in an Authorization header.
const AUTHORIZATION: &str = r"(?i-u)\b(?:bearer|basic)\x20+([A-Z0-9._~+/=\-]{16,})";

/// user:password in a URL.
const URL_PASSWORD: &str = r"(?-u)\b[A-Za-z][A-Za-z0-9+.\-]*://([\w.~%!$&'()*+,;=\-]*:[\w.~%!$&'()*+,;=:\-]+)@";

/// A value after a name that says it is secret: password=..., "api_key": "...", clientSecret: ...
const NAMED_SECRET: &str = r#"(?xi-u)\b[a-z0-9_.\-]*
    (?:api[_\-\x20]?key|access[_\-\x20]?key(?:[_\-\x20]?id)?|secret(?:[_\-\x20]?(?:access[_\-\x20]?)?key)?
      |private[_\-\x20]?key|account[_\-\x20]?key|token|passwo?r?d|passwd|pwd|passphrase)
    ["']?\s*[:=]>?\s*["']?
    ([A-Z0-9+/=_~.!@\#$%^&*\-]{8,})"#;

/// One pattern and what makes a match of it a finding.
struct Rule {
    kind: Redaction,
    pattern: Regex,
    /// Whether these bytes of the text are a finding.
    accept: fn(&str, Range<usize>) -> bool,
}

/// Replaces findings. Secrets come first, because a password may look like an address.
pub(super) struct Redactor {
    rules: Vec<Rule>,
}

impl Redactor {
    /// `None` if nothing is to be looked for.
    pub(super) fn new(kinds: &[Redaction]) -> Result<Option<Self>, DataError> {
        type Accept = fn(&str, Range<usize>) -> bool;
        let all: [(Redaction, &str, Accept); 10] = [
            (Redaction::Secret, PRIVATE_KEY, |_, _| true),
            (Redaction::Secret, TOKEN, |_, _| true),
            (Redaction::Secret, SK_TOKEN, |text, found| has_digit(&text[found])),
            (Redaction::Secret, URL_PASSWORD, |_, _| true),
            (Redaction::Secret, AUTHORIZATION, |text, found| has_digit(&text[found])),
            (Redaction::Secret, NAMED_SECRET, |text, found| {
                has_digit(&text[found.clone()]) && text[found].contains(|c: char| c.is_ascii_alphabetic())
            }),
            (Redaction::Email, EMAIL, |_, _| true),
            (Redaction::Phone, INTERNATIONAL_PHONE, |text, found| {
                digits(&text[found.clone()]) >= 8 && stands_alone(text, found)
            }),
            (Redaction::Phone, NORTH_AMERICAN_PHONE, stands_alone),
            (Redaction::Phone, NATIONAL_PHONE, |text, found| {
                let number = &text[found.clone()];
                (9..=13).contains(&digits(number)) && !starts_with_date(number) && stands_alone(text, found)
            }),
        ];
        let rules = all
            .into_iter()
            .filter(|(kind, ..)| kinds.contains(kind))
            .map(|(kind, pattern, accept)| {
                let pattern = Regex::new(pattern).map_err(|error| DataError::Other(error.to_string()))?;
                Ok(Rule { kind, pattern, accept })
            })
            .collect::<Result<Vec<_>, DataError>>()?;
        Ok((!rules.is_empty()).then_some(Self { rules }))
    }

    /// The text with placeholders and the kinds that were found; `None` if nothing was. A placeholder may set free what was part of
    /// a larger finding, so the rules run until none finds anything: what was redacted once stays as it is.
    pub(super) fn redact(&self, text: &str) -> Option<(String, Vec<Redaction>)> {
        let mut redacted: Option<String> = None;
        let mut kinds = Vec::new();
        loop {
            let mut found = false;
            for rule in &self.rules {
                if let Some(text) = rule.replace(redacted.as_deref().unwrap_or(text)) {
                    redacted = Some(text);
                    found = true;
                    if !kinds.contains(&rule.kind) {
                        kinds.push(rule.kind);
                    }
                }
            }
            if !found {
                return redacted.map(|text| (text, kinds));
            }
        }
    }

    /// The text as it may be shown.
    pub(super) fn shown(&self, text: &str) -> String {
        self.redact(text).map_or_else(|| text.to_owned(), |(redacted, _)| redacted)
    }
}

impl Rule {
    /// A finding is the pattern's first group, or all of the match.
    fn replace(&self, text: &str) -> Option<String> {
        if !self.pattern.is_match(text) {
            return None;
        }
        let mut replaced = String::new();
        let mut copied = 0;
        let mut at = 0;
        while let Some(captures) = self.pattern.captures_at(text, at) {
            let Some(whole) = captures.get(0) else { break };
            let finding = captures.get(1).unwrap_or(whole).range();
            if (self.accept)(text, finding.clone()) {
                replaced.push_str(&text[copied..finding.start]);
                replaced.push_str(placeholder(self.kind));
                copied = finding.end;
                at = finding.end;
            } else if self.kind == Redaction::Secret {
                // What is refused has no digit or no letter, so a shorter match with the same end has none either.
                at = whole.end();
            } else {
                at = whole.start() + text[whole.start()..].chars().next().map_or(1, char::len_utf8);
            }
        }
        if copied == 0 {
            return None;
        }
        replaced.push_str(&text[copied..]);
        Some(replaced)
    }
}

pub(super) fn placeholder(kind: Redaction) -> &'static str {
    match kind {
        Redaction::Email => "[EMAIL]",
        Redaction::Phone => "[PHONE]",
        Redaction::Secret => "[SECRET]",
    }
}

fn has_digit(text: &str) -> bool {
    text.contains(|c: char| c.is_ascii_digit())
}

fn digits(text: &str) -> usize {
    text.bytes().filter(u8::is_ascii_digit).count()
}

/// Neither letter nor digit touches it: it is not a piece of an identifier.
fn stands_alone(text: &str, found: Range<usize>) -> bool {
    let touches = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    !touches(text[..found.start].chars().next_back()) && !touches(text[found.end..].chars().next())
}

/// 05.11.2024, 05/11/2024 or 05-11-2024 in front: day, month and a year of this century or the last.
fn starts_with_date(number: &str) -> bool {
    let parts: Vec<&str> = number.split(|c: char| !c.is_ascii_digit()).take(3).collect();
    matches!(parts[..], [day, month, year]
        if day.len() == 2 && month.len() == 2 && year.len() == 4 && (year.starts_with("19") || year.starts_with("20")))
}

#[cfg(test)]
#[path = "redact_tests.rs"]
mod tests;
