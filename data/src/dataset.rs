//! A dataset, and which labels its rows have.

use std::collections::BTreeSet;

use athanor_contract::train::HeldOutPart;

use crate::{DataError, Rows, builder::SkippedRows, clean::CleaningReport, topic_report::TopicReport};

/// The rows of all sources.
#[derive(Debug, Default)]
pub struct Dataset {
    /// Source names; rows point into them.
    pub sources: Vec<String>,
    /// The part that each source is, if any; empty if none is one.
    pub held_out: Vec<Option<HeldOutPart>>,
    pub rows: Rows,
    /// Hexadecimal sha256 over sources, their content or offset ranges, cleaning, split and seed.
    pub digest: String,
    /// Rows that could not be read.
    pub skipped: SkippedRows,
    /// What the topics among the sources held, and what of it is no row.
    pub topics: Vec<TopicReport>,
    /// What cleaning did, if it was asked for.
    pub cleaning: Option<CleaningReport>,
    /// Number of each row's cluster of near duplicates, if they were sought: the split keeps a cluster together.
    pub clusters: Option<Vec<u32>>,
    /// Whether a model gave the row its label, for each row; empty if none did.
    pub annotated: Vec<bool>,
}

impl Dataset {
    /// The part that the row's source is.
    pub fn part_of_source(&self, row: usize) -> Option<HeldOutPart> {
        self.held_out.get(self.rows.source(row)).copied().flatten()
    }

    /// The labels, in the order of the model's outputs: those asked for, else the parent's if they cover the rows, else those
    /// found, sorted.
    ///
    /// # Errors
    /// A row whose label is not among those asked for, a row without a label, or data with one label alone, is the user's error.
    pub fn choose_labels(
        &self,
        wanted: Option<&[String]>,
        parent: Option<&[String]>,
    ) -> Result<Vec<String>, DataError> {
        if let Some(row) = (0..self.rows.len()).find(|&row| self.rows.label(row).is_none()) {
            return Err(DataError::User(format!("{}: the row has no label", self.rows.place(row))));
        }
        let found = self.rows.label_names();
        if let Some(wanted) = wanted {
            let unknown: BTreeSet<&String> = found.iter().filter(|label| !wanted.contains(label)).collect();
            let is_unknown =
                |row: usize| self.rows.label(row).is_some_and(|label| unknown.iter().any(|name| *name == label));
            if !unknown.is_empty()
                && let Some(row) = (0..self.rows.len()).find(|&row| is_unknown(row))
            {
                return Err(DataError::User(format!(
                    "{}: label {:?} is not one of model.labels ({})",
                    self.rows.place(row),
                    self.rows.label(row).unwrap_or_default(),
                    wanted.join(", ")
                )));
            }
            return Ok(wanted.to_vec());
        }
        if let Some(parent) = parent
            && parent.len() > 1
            && found.iter().all(|label| parent.contains(label))
        {
            return Ok(parent.to_vec());
        }
        match found.len() {
            0 | 1 => Err(DataError::User(format!(
                "all rows have the label {:?}: a classifier needs two",
                found.first().map_or("", String::as_str)
            ))),
            2..=1024 => Ok(found),
            many => Err(DataError::User(format!(
                "the rows have {many} different labels, at most 1024 are possible: does data.sources[].columns.label name the right column?"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::{Fields, Origin};

    #[test]
    fn labels_are_given_inherited_or_found() {
        let dataset = |labels: &[&str]| {
            let mut rows = Rows::default();
            rows.begin(0, Origin::File { uri: "f".into() });
            for (index, label) in labels.iter().enumerate() {
                let label = Some(*label).filter(|label| !label.is_empty());
                rows.push(index as u32 + 1, Fields { text: "t", label, ..Fields::default() });
            }
            Dataset { sources: vec!["s".into()], rows, ..Dataset::default() }
        };
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let both = dataset(&["pos", "neg"]);
        assert_eq!(both.choose_labels(None, None).unwrap(), ["neg", "pos"]);
        assert_eq!(both.choose_labels(Some(&names(&["pos", "neg"])), None).unwrap(), ["pos", "neg"]);
        assert_eq!(both.choose_labels(None, Some(&names(&["pos", "neg", "mid"]))).unwrap(), ["pos", "neg", "mid"]);
        assert_eq!(both.choose_labels(None, Some(&names(&["x", "y"]))).unwrap(), ["neg", "pos"]);
        let unknown = both.choose_labels(Some(&names(&["pos", "mid"])), None).unwrap_err().to_string();
        assert_eq!(unknown, "f row 2: label \"neg\" is not one of model.labels (pos, mid)");
        let one = dataset(&["pos"]).choose_labels(None, None).unwrap_err().to_string();
        assert_eq!(one, "all rows have the label \"pos\": a classifier needs two");
        let none = dataset(&["pos", ""]).choose_labels(None, None).unwrap_err().to_string();
        assert_eq!(none, "f row 2: the row has no label");
        let many: Vec<String> = (0..1025).map(|number| number.to_string()).collect();
        let many = dataset(&many.iter().map(String::as_str).collect::<Vec<_>>()).choose_labels(None, None);
        assert!(many.unwrap_err().to_string().starts_with("the rows have 1025 different labels, at most 1024"));
    }
}
