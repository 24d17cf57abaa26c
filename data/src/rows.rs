//! The rows of a dataset, stored by column: about 70 bytes a row beside its text, so that ten million rows fit where ten million
//! structs of strings would not.

mod stored;

use std::{collections::BTreeSet, hash::BuildHasher};

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::strings::{Dictionary, Strings};

/// No label, or no group.
const NONE: u32 = u32::MAX;

/// What a row holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fields<'a> {
    pub text: &'a str,
    pub pair: Option<&'a str>,
    pub label: Option<&'a str>,
    pub group: Option<&'a str>,
    /// Whether text and pair are messages as JSON.
    pub is_conversation: bool,
}

/// Where rows come from that follow each other.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    File {
        uri: String,
    },
    /// Rows have an event's id instead of a number.
    Topic {
        topic: String,
        events: Strings,
    },
}

impl Origin {
    fn place(&self, number: u32) -> String {
        match self {
            Self::File { uri } => format!("{uri} row {number}"),
            Self::Topic { topic, events } => format!("topic {topic}, event {}", events.get(number as usize)),
        }
    }
}

/// Rows from one origin, up to the next run.
#[derive(Clone, Debug)]
struct Run {
    first: usize,
    source: usize,
    origin: Origin,
}

/// The rows of all sources, in the order of the specification, without exact duplicates inside a source.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    texts: Strings,
    /// Empty for a row without one; absent when no row has one.
    pairs: Option<Strings>,
    labels: Vec<u32>,
    label_names: Dictionary,
    /// Absent when no row has one.
    groups: Option<Vec<u32>>,
    /// Absent when no row is one.
    conversations: Option<Vec<bool>>,
    group_names: Dictionary,
    /// Row of the file, from 1; index of the event in its topic.
    numbers: Vec<u32>,
    runs: Vec<Run>,
}

impl Rows {
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn text(&self, row: usize) -> &str {
        self.texts.get(row)
    }

    /// The second text of a row of pairs.
    pub fn pair(&self, row: usize) -> Option<&str> {
        self.pairs.as_ref().map(|pairs| pairs.get(row)).filter(|pair| !pair.is_empty())
    }

    /// Whether the row is a conversation: its text is a JSON list of messages, its pair the assistant's next message, a
    /// JSON object.
    pub fn is_conversation(&self, row: usize) -> bool {
        self.conversations.as_ref().is_some_and(|conversations| conversations[row])
    }

    pub fn label(&self, row: usize) -> Option<&str> {
        (self.labels[row] != NONE).then(|| self.label_names.name(self.labels[row]))
    }

    /// The key that keeps rows together in the split.
    pub fn group(&self, row: usize) -> Option<&str> {
        self.group_number(row).map(|number| self.group_names.name(number))
    }

    /// Index of the row's source in the specification.
    pub fn source(&self, row: usize) -> usize {
        self.run(row).source
    }

    /// Where the row came from, for messages: a row number of the file, or an event's id.
    pub fn place(&self, row: usize) -> String {
        self.run(row).origin.place(self.numbers[row])
    }

    /// Labels a row, such as by annotation.
    pub fn set_label(&mut self, row: usize, label: &str) {
        self.labels[row] = self.label_names.number(label);
    }

    /// The labels that rows have, sorted.
    pub fn label_names(&self) -> Vec<String> {
        let mut occurs = vec![false; self.label_names.len()];
        for &label in self.labels.iter().filter(|&&label| label != NONE) {
            occurs[label as usize] = true;
        }
        let names: BTreeSet<&str> = (0..self.label_names.len())
            .filter(|&label| occurs[label])
            .map(|label| self.label_names.name(label as u32))
            .collect();
        names.into_iter().map(str::to_owned).collect()
    }

    /// Keeps the rows for whose index `keep` is true, in place.
    pub fn retain(&mut self, keep: impl Fn(usize) -> bool) {
        let before = self.len();
        let mut kept = 0;
        let mut runs = std::mem::take(&mut self.runs).into_iter().peekable();
        for row in 0..before {
            while let Some(run) = runs.next_if(|run| run.first == row) {
                self.runs.push(Run { first: kept, ..run });
            }
            if keep(row) {
                self.labels[kept] = self.labels[row];
                self.numbers[kept] = self.numbers[row];
                if let Some(groups) = &mut self.groups {
                    groups[kept] = groups[row];
                }
                if let Some(conversations) = &mut self.conversations {
                    conversations[kept] = conversations[row];
                }
                kept += 1;
            }
        }
        self.labels.truncate(kept);
        self.numbers.truncate(kept);
        if let Some(groups) = &mut self.groups {
            groups.truncate(kept);
        }
        if let Some(conversations) = &mut self.conversations {
            conversations.truncate(kept);
        }
        self.texts.retain(&keep);
        if let Some(pairs) = &mut self.pairs {
            pairs.retain(&keep);
        }
    }

    /// Says where the rows that are pushed from now on come from.
    pub(crate) fn begin(&mut self, source: usize, origin: Origin) {
        let first = self.len();
        self.runs.push(Run { first, source, origin });
    }

    /// Where a row of this number would come from that is pushed next.
    pub(crate) fn next_place(&self, number: u32) -> String {
        self.runs.last().map_or_else(String::new, |run| run.origin.place(number))
    }

    pub(crate) fn push(&mut self, number: u32, fields: Fields) {
        let row = self.len();
        self.texts.push(fields.text);
        if fields.pair.is_some() || self.pairs.is_some() {
            let pairs = self.pairs.get_or_insert_default();
            while pairs.len() < row {
                pairs.push("");
            }
            pairs.push(fields.pair.unwrap_or_default());
        }
        self.labels.push(fields.label.map_or(NONE, |label| self.label_names.number(label)));
        if fields.group.is_some() || self.groups.is_some() {
            let groups = self.groups.get_or_insert_default();
            groups.resize(row, NONE);
            groups.push(fields.group.map_or(NONE, |group| self.group_names.number(group)));
        }
        if fields.is_conversation || self.conversations.is_some() {
            let conversations = self.conversations.get_or_insert_default();
            conversations.resize(row, false);
            conversations.push(fields.is_conversation);
        }
        self.numbers.push(number);
    }

    /// A row's label as a number below [`Self::label_count`]; `None` counts as one of its own.
    pub(crate) fn label_number(&self, row: usize) -> usize {
        match self.labels[row] {
            NONE => self.label_names.len(),
            label => label as usize,
        }
    }

    /// Numbers of labels, that of no label included.
    pub(crate) fn label_count(&self) -> usize {
        self.label_names.len() + 1
    }

    pub(crate) fn has_groups(&self) -> bool {
        self.groups.is_some()
    }

    pub(crate) fn group_number(&self, row: usize) -> Option<u32> {
        self.groups.as_ref().map(|groups| groups[row]).filter(|&group| group != NONE)
    }

    pub(crate) fn group_count(&self) -> usize {
        self.group_names.len()
    }

    fn run(&self, row: usize) -> &Run {
        // The last that begins at or before the row: runs without rows begin where the next one does.
        &self.runs[self.runs.partition_point(|run| run.first <= row) - 1]
    }
}

/// Finds texts (with their pairs) that a source has already given, without storing them twice.
#[derive(Default)]
pub(crate) struct Seen {
    rows: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Seen {
    /// Forgets all rows: the next source begins.
    pub fn clear(&mut self) {
        self.rows = HashTable::new();
    }

    /// The row pushed since [`Self::clear`] that has this text and pair; else the next row to be pushed is remembered as such.
    pub fn find_or_insert(&mut self, rows: &Rows, text: &str, pair: Option<&str>) -> Option<usize> {
        let Self { rows: seen, hasher } = self;
        let same = |&row: &u32| rows.text(row as usize) == text && rows.pair(row as usize) == pair;
        let hash = |&row: &u32| hasher.hash_one((rows.text(row as usize), rows.pair(row as usize)));
        match seen.entry(hasher.hash_one((text, pair)), same, hash) {
            hashbrown::hash_table::Entry::Occupied(entry) => Some(*entry.get() as usize),
            hashbrown::hash_table::Entry::Vacant(entry) => {
                entry.insert(rows.len() as u32);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Rows {
        let mut rows = Rows::default();
        let file = |uri: &str| Origin::File { uri: uri.into() };
        rows.begin(0, file("empty.csv"));
        rows.begin(0, file("a.csv"));
        rows.push(2, Fields { text: "one", label: Some("x"), ..Fields::default() });
        rows.push(3, Fields { text: "two", pair: Some("deux"), label: Some("y"), ..Fields::default() });
        rows.begin(1, file("b.csv"));
        rows.push(1, Fields { text: "three", group: Some("g"), ..Fields::default() });
        let mut events = Strings::default();
        events.push("r/0");
        rows.begin(2, Origin::Topic { topic: "t".into(), events });
        rows.push(0, Fields { text: "four", label: Some("x"), ..Fields::default() });
        rows
    }

    #[test]
    fn columns_give_back_the_rows() {
        let mut rows = rows();
        let texts: Vec<_> = (0..rows.len()).map(|row| rows.text(row)).collect();
        assert_eq!(texts, ["one", "two", "three", "four"]);
        assert_eq!((0..4).map(|row| rows.source(row)).collect::<Vec<_>>(), [0, 0, 1, 2]);
        assert_eq!((0..4).map(|row| rows.pair(row)).collect::<Vec<_>>(), [None, Some("deux"), None, None]);
        assert_eq!((0..4).map(|row| rows.group(row)).collect::<Vec<_>>(), [None, None, Some("g"), None]);
        assert_eq!((0..4).map(|row| rows.label(row)).collect::<Vec<_>>(), [Some("x"), Some("y"), None, Some("x")]);
        let places: Vec<_> = (0..4).map(|row| rows.place(row)).collect();
        assert_eq!(places, ["a.csv row 2", "a.csv row 3", "b.csv row 1", "topic t, event r/0"]);
        rows.set_label(2, "z");
        rows.set_label(1, "x");
        assert_eq!((rows.label(2), rows.label_names()), (Some("z"), vec!["x".to_owned(), "z".to_owned()]));
    }

    #[test]
    fn kept_rows_keep_their_columns() {
        let mut rows = rows();
        rows.retain(|row| row % 2 == 1);
        assert_eq!((rows.len(), rows.text(0), rows.pair(0), rows.label(0)), (2, "two", Some("deux"), Some("y")));
        assert_eq!((rows.place(0), rows.source(0)), ("a.csv row 3".to_owned(), 0));
        assert_eq!((rows.place(1), rows.source(1), rows.text(1)), ("topic t, event r/0".to_owned(), 2, "four"));
    }

    #[test]
    fn a_text_is_seen_again_with_the_same_pair_alone() {
        let mut rows = Rows::default();
        rows.begin(0, Origin::File { uri: "f".into() });
        let mut seen = Seen::default();
        let mut push = |text: &str, pair: Option<&str>| {
            let known = seen.find_or_insert(&rows, text, pair).is_some();
            if !known {
                rows.push(1, Fields { text, pair, ..Fields::default() });
            }
            known
        };
        assert!(!push("a", None));
        assert!(!push("a", Some("b")));
        assert!(push("a", None));
        assert!(push("a", Some("b")));
        for number in 0..1000 {
            assert!(!push(&format!("{number}"), None));
        }
        assert!(push("999", None));
    }
}
