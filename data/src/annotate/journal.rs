//! What was answered, one JSON object a line, written as soon as it is known: a run that is killed pays for no answer twice.
//!
//! Lines are only ever appended. A last line that was torn stays where it is and is skipped, now and later.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions, TryLockError},
    io::{BufRead, BufReader, Write},
    path::Path,
};

use athanor_contract::artifact::sha256_hex;
use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// Answers between two calls of fsync: what a machine (not a process) that dies may take along.
const SYNC_EVERY: u32 = 64;

/// One answer that was paid for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Entry {
    /// sha256 of model, prompt, labels and text.
    pub key: String,
    /// Which of the row's samples.
    pub sample: u32,
    /// The label, or none if the answer was not one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The answer that was not a label, or its start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    pub input_tokens: u64,
    pub output_tokens: u64,
}

/// Names a question in the journal: another model, prompt or set of labels is another question.
pub(super) fn key(model: &str, prompt: &str, labels: &[String], text: &str) -> Result<String, DataError> {
    let identity =
        serde_json::to_vec(&(model, prompt, labels, text)).map_err(|error| DataError::Other(error.to_string()))?;
    Ok(sha256_hex(&identity))
}

/// The file, open for appending by one process alone.
pub(super) struct Journal {
    file: File,
    unsynced: u32,
}

impl Journal {
    /// Opens or creates the file and gives the entries whose key is wanted, by key, in the order in which they were written.
    pub(super) fn open(
        path: &Path,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(Self, HashMap<String, Vec<Entry>>), DataError> {
        let failed = |error: std::io::Error| DataError::Other(format!("journal {}: {error}", path.display()));
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(DataError::Other(format!("journal {}: another process annotates with it", path.display())));
            }
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let mut entries: HashMap<String, Vec<Entry>> = HashMap::new();
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        let (mut number, mut whole) = (0_u64, true);
        while reader.read_until(b'\n', &mut line).map_err(failed)? > 0 {
            number += 1;
            whole = line.ends_with(b"\n");
            match serde_json::from_slice::<Entry>(&line) {
                Ok(entry) if wanted(&entry.key) => entries.entry(entry.key.clone()).or_default().push(entry),
                Ok(_) => {}
                Err(_) if line.trim_ascii().is_empty() => {}
                Err(error) => {
                    tracing::warn!(journal = %path.display(), line = number, %error, "a line of the journal is skipped");
                }
            }
            line.clear();
        }
        let mut journal = Self { file, unsynced: 0 };
        if !whole {
            journal.file.write_all(b"\n").map_err(failed)?;
        }
        Ok((journal, entries))
    }

    pub(super) fn append(&mut self, entry: &Entry) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.unsynced += 1;
        if self.unsynced >= SYNC_EVERY { self.sync() } else { Ok(()) }
    }

    pub(super) fn sync(&mut self) -> std::io::Result<()> {
        self.unsynced = 0;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str) -> Entry {
        Entry { key: key.into(), sample: 0, label: Some("x".into()), answer: None, input_tokens: 1, output_tokens: 2 }
    }

    #[test]
    fn a_torn_line_costs_its_own_answer_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/journal.jsonl");
        let (mut journal, entries) = Journal::open(&path, |_| true).unwrap();
        assert!(entries.is_empty());
        journal.append(&entry("a")).unwrap();
        journal.append(&entry("b")).unwrap();
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for torn in [&b"{\"key\": \"c\", \"sam"[..], b"\xff\0\0", b"{}"] {
            std::fs::write(&path, [&whole, torn].concat()).unwrap();
            let (mut journal, entries) = Journal::open(&path, |_| true).unwrap();
            assert_eq!(entries.len(), 2);
            journal.append(&entry("d")).unwrap();
            drop(journal);
            let (_, entries) = Journal::open(&path, |key| key != "a").unwrap();
            assert_eq!((entries.len(), &entries["d"]), (2, &vec![entry("d")]));
        }
        // Whole, but for its line break.
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(Journal::open(&path, |_| true).unwrap().1.len(), 2);
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn one_process_writes_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let first = Journal::open(&path, |_| true).unwrap();
        let error = Journal::open(&path, |_| true).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("another process annotates"), "{error}");
        drop(first);
        assert!(Journal::open(&path, |_| true).is_ok());
    }

    #[test]
    fn keys_tell_questions_apart() {
        let labels = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let one = key("m", "p", &labels(&["a", "b"]), "t").unwrap();
        assert_eq!(one, key("m", "p", &labels(&["a", "b"]), "t").unwrap());
        for other in [
            key("n", "p", &labels(&["a", "b"]), "t"),
            key("m", "q", &labels(&["a", "b"]), "t"),
            key("m", "p", &labels(&["ab"]), "t"),
            key("m", "p", &labels(&["a", "b"]), "u"),
            key("mp", "", &labels(&["a", "b"]), "t"),
        ] {
            assert_ne!(one, other.unwrap());
        }
    }
}
