//! The data of `make demo-chat`: sentences of credit agreements and the parties and places that they name, as text.
//!
//! The first model sees sentences that name no one or persons only (`HOME`); the traffic then turns to sentences that name
//! organizations and places (`AWAY`). Which part a sentence belongs to depends on the sentence alone, so no sentence is in
//! two parts.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::paths;

/// What the model is asked to do; the source's own prompt asks for a chain of thought.
pub const SYSTEM: &str = "List the entities as [NAME - TYPE].";
/// The answer for a sentence that names no one.
pub const NONE: &str = "No entities found";
/// Longer sentences are left out, in characters: they would take most of the demo's time.
const LONGEST: usize = 250;

/// A sentence and the answer that is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentence {
    pub text: String,
    pub answer: String,
}

impl Sentence {
    /// The messages of a request.
    pub fn messages(&self) -> Value {
        json!([{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}])
    }

    /// The messages of a training row.
    pub fn conversation(&self) -> Value {
        json!([
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": self.text},
            {"role": "assistant", "content": self.answer},
        ])
    }

    /// Whether it names an organization or a place.
    fn is_away(&self) -> bool {
        self.answer.contains("ORGANIZATION") || self.answer.contains("LOCATION")
    }
}

/// Which kind of sentences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// No entities, or persons only.
    Home,
    /// Organizations or places.
    Away,
}

/// What a sentence is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Only ever used to measure: never uploaded, never sent with feedback.
    Exam,
    /// Home: uploaded as training rows. Away: sent as traffic with corrections.
    Rest,
}

/// 30 % of the sentences are for the exam.
fn part(text: &str) -> Part {
    let digest = Sha256::digest(text.trim().to_lowercase().as_bytes());
    let percent = u64::from_be_bytes(digest[..8].try_into().expect("eight bytes")) % 100;
    if percent < 30 { Part::Exam } else { Part::Rest }
}

#[derive(Deserialize)]
struct Sample {
    input: Vec<Message>,
    ideal: String,
}

#[derive(Deserialize)]
struct Message {
    content: String,
}

/// Every sentence of one part, in the order of the agreements.
pub fn all(wanted: Part) -> Result<Vec<Sentence>> {
    let path = paths::data().join("finance/samples.jsonl");
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("{} (scripts/fetch finance brings it)", path.display()))?;
    let mut found = Vec::new();
    for (row, line) in text.lines().enumerate() {
        let sample: Sample =
            serde_json::from_str(line).with_context(|| format!("{} row {}", path.display(), row + 1))?;
        let text = sample.input.last().context("a sample without messages")?.content.trim().to_owned();
        let sentence = Sentence { text, answer: sample.ideal.trim().to_owned() };
        if part(&sentence.text) == wanted && sentence.text.chars().count() <= LONGEST {
            found.push(sentence);
        }
    }
    ensure!(!found.is_empty(), "{} has no rows for {wanted:?}", path.display());
    Ok(found)
}

/// Sentences of one part in a fixed shuffled order, at most `most`. Of the home domain at most a quarter name no one:
/// with more of them the shortest way to a low loss is to answer that there are none.
pub fn sentences(domain: Domain, wanted: Part, most: usize) -> Result<Vec<Sentence>> {
    let mut found = all(wanted)?;
    found.retain(|sentence| sentence.is_away() == (domain == Domain::Away));
    found.sort_by_cached_key(|sentence| Sha256::digest(format!("order {}", sentence.text)).to_vec());
    found.dedup_by(|a, b| a.text == b.text);
    let mut empty = 0;
    found.retain(|sentence| {
        empty += usize::from(sentence.answer == NONE);
        sentence.answer != NONE || empty <= most / 4
    });
    found.truncate(most);
    ensure!(!found.is_empty(), "no sentences for {domain:?} {wanted:?}");
    Ok(found)
}

/// Rows with the column `messages`, as JSON lines.
pub fn json_lines(sentences: &[Sentence]) -> String {
    sentences.iter().map(|sentence| format!("{}\n", json!({"messages": sentence.conversation()}))).collect()
}

/// F1 score of the words that two answers have in common, as the metric TokenF1 counts them.
pub fn token_f1(answer: &str, expected: &str) -> f64 {
    let words = |text: &str| -> Vec<String> {
        text.split(|letter: char| !letter.is_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_lowercase)
            .collect()
    };
    let (given, mut wanted) = (words(answer), words(expected));
    if given.is_empty() || wanted.is_empty() {
        return f64::from(u8::from(given.is_empty() && wanted.is_empty()));
    }
    let all = given.len() + wanted.len();
    let mut common = 0;
    for word in given {
        if let Some(at) = wanted.iter().position(|other| *other == word) {
            wanted.swap_remove(at);
            common += 1;
        }
    }
    2.0 * f64::from(common) / all as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_is_in_one_part_whatever_its_case_or_spaces() {
        assert_eq!(part("The Bank. "), part(" the bank."));
        let exam = (0..4000).filter(|n| part(&format!("sentence {n}")) == Part::Exam).count();
        assert!((exam as f64 / 4000.0 - 0.3).abs() < 0.03, "{exam}");
    }

    #[test]
    fn words_in_common_count_as_often_as_both_have_them() {
        assert_eq!(token_f1("[Bank - ORGANIZATION]", "[bank - organization]"), 1.0);
        assert_eq!(token_f1("Bank", "Borrower"), 0.0);
        assert_eq!(token_f1("", ""), 1.0);
        assert_eq!(token_f1("", "a"), 0.0);
        // One word in common, two given and four expected.
        assert!((token_f1("a b", "a c d e") - 1.0 / 3.0).abs() < 1e-12);
        assert!((token_f1("a a", "a b") - 0.5).abs() < 1e-12);
    }

    #[test]
    fn a_row_is_a_conversation() {
        let sentence = Sentence { text: "Bank".into(), answer: "[Bank - ORGANIZATION]".into() };
        let row: Value = serde_json::from_str(&json_lines(std::slice::from_ref(&sentence))).unwrap();
        assert_eq!(row["messages"][2]["content"], "[Bank - ORGANIZATION]");
        assert_eq!(row["messages"].as_array().unwrap()[..2], *sentence.messages().as_array().unwrap());
    }
}
