//! Sources to the three parts of a dataset. The same digest gives the same rows in the same order, on every rank.

pub mod batches;
mod parse;
mod split;

use std::collections::{BTreeSet, HashMap};

use athanor_contract::{
    artifact::sha256_hex,
    train::{DataSpec, RowCounts, Source},
};
use athanor_models::Tokenizer;
use serde::Serialize;

pub use split::{Part, part_of};

use crate::TrainError;

/// A labelled text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub text: String,
    pub label: String,
    /// Where it came from, for messages: a row number of the file, or an event's id.
    pub place: String,
}

/// The rows of all sources, in the order of the specification, without exact duplicates inside a source.
#[derive(Debug)]
pub struct Dataset {
    /// Source names; rows point into them.
    pub sources: Vec<String>,
    /// Rows with the index of their source.
    pub rows: Vec<(usize, Row)>,
    /// Hexadecimal sha256 over sources, their content or offset ranges, split and seed.
    pub digest: String,
}

/// What the digest covers.
#[derive(Serialize)]
struct Identity<'a> {
    source: &'a Source,
    /// sha256 of a file, or of the rows in the offset ranges.
    content: &'a str,
}

/// Reads all sources at once.
///
/// # Errors
/// A malformed row is the user's error and names file, row and field; so is a source without rows.
pub async fn read(spec: &DataSpec) -> Result<Dataset, TrainError> {
    let loaded = futures::future::try_join_all(spec.sources.iter().map(read_source)).await?;
    let identities: Vec<Identity> =
        std::iter::zip(&spec.sources, &loaded).map(|(source, (content, _))| Identity { source, content }).collect();
    let digest = sha256_hex(&serde_json::to_vec(&(identities, &spec.split)).map_err(TrainError::other)?);
    let mut rows = Vec::new();
    for (index, (_, source_rows)) in loaded.into_iter().enumerate() {
        let newest_wins = spec.sources[index].kafka.is_some();
        rows.extend(without_duplicates(source_rows, newest_wins).into_iter().map(|row| (index, row)));
    }
    let sources = spec.sources.iter().map(|source| source.name.clone()).collect();
    Ok(Dataset { sources, rows, digest })
}

/// The content's digest and the rows of one source.
async fn read_source(source: &Source) -> Result<(String, Vec<Row>), TrainError> {
    let name = &source.name;
    let (digest, rows): (String, Vec<Row>) = if let Some(kafka) = &source.kafka {
        let snapshot = athanor_feedback::read_rows(kafka).await?;
        let rows = snapshot
            .rows
            .into_iter()
            .map(|row| Row {
                text: row.text,
                label: row.label,
                place: format!("topic {}, event {}", kafka.topic, row.id),
            })
            .collect();
        (snapshot.digest, rows)
    } else if let Some(uri) = &source.uri {
        let bytes = athanor_store::open(uri)?.read().await?;
        (sha256_hex(&bytes), parse::parse(uri, &bytes, &source.columns)?)
    } else {
        return Err(TrainError::User(format!("source {name}: set exactly one of uri and kafka")));
    };
    if rows.is_empty() {
        let from = match &source.kafka {
            Some(kafka) => format!("the offset ranges of topic {}", kafka.topic),
            None => source.uri.clone().unwrap_or_default(),
        };
        return Err(TrainError::User(format!("source {name}: no labelled rows in {from}")));
    }
    Ok((digest, rows))
}

/// Keeps each text once, at its first place. A file's first label counts; a newest feedback's last.
fn without_duplicates(rows: Vec<Row>, newest_wins: bool) -> Vec<Row> {
    let mut kept: Vec<Row> = Vec::with_capacity(rows.len());
    let mut places: HashMap<String, usize> = HashMap::with_capacity(rows.len());
    for row in rows {
        match places.get(&row.text) {
            Some(&place) if newest_wins => kept[place] = row,
            Some(_) => {}
            None => {
                places.insert(row.text.clone(), kept.len());
                kept.push(row);
            }
        }
    }
    kept
}

impl Dataset {
    /// Class names in the order of the outputs: the ones asked for; or those of the parent, if it is a classifier that knows
    /// every label of the data; or the data's own, sorted.
    pub fn choose_labels(
        &self,
        wanted: Option<&[String]>,
        parent: Option<&[String]>,
    ) -> Result<Vec<String>, TrainError> {
        let found: BTreeSet<&str> = self.rows.iter().map(|(_, row)| row.label.as_str()).collect();
        if let Some(wanted) = wanted {
            if let Some((_, row)) = self.rows.iter().find(|(_, row)| !wanted.contains(&row.label)) {
                return Err(TrainError::User(format!(
                    "{}: label {:?} is not one of model.labels ({})",
                    row.place,
                    row.label,
                    wanted.join(", ")
                )));
            }
            return Ok(wanted.to_vec());
        }
        if let Some(parent) = parent
            && parent.len() > 1
            && found.iter().all(|label| parent.iter().any(|known| known == label))
        {
            return Ok(parent.to_vec());
        }
        match found.len() {
            1 => Err(TrainError::User(format!(
                "all rows have the label {:?}: a classifier needs two",
                found.first().unwrap_or(&"")
            ))),
            2..=1024 => Ok(found.into_iter().map(str::to_owned).collect()),
            many => Err(TrainError::User(format!(
                "the rows have {many} different labels, at most 1024 are possible: does data.sources[].columns.label name the right column?"
            ))),
        }
    }

    /// The rows of each part, indices into `rows`.
    pub fn split(&self, spec: &DataSpec) -> Result<Parts, TrainError> {
        let mut parts = Parts::default();
        for (index, (_, row)) in self.rows.iter().enumerate() {
            match part_of(&row.text, &spec.split) {
                Part::Train => &mut parts.train,
                Part::Validation => &mut parts.validation,
                Part::Test => &mut parts.test,
            }
            .push(index);
        }
        for (name, part) in [("training", &parts.train), ("validation", &parts.validation), ("test", &parts.test)] {
            if part.is_empty() {
                return Err(TrainError::User(format!(
                    "none of the {} rows falls into the {name} part: give more rows, or another data.split",
                    self.rows.len()
                )));
            }
        }
        Ok(parts)
    }
}

/// Row indices of each part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    pub train: Vec<usize>,
    pub validation: Vec<usize>,
    pub test: Vec<usize>,
}

impl Parts {
    pub fn counts(&self) -> RowCounts {
        RowCounts {
            train: self.train.len() as u64,
            validation: self.validation.len() as u64,
            test: self.test.len() as u64,
        }
    }
}

/// Rows as token ids.
#[derive(Debug, Default)]
pub struct Encoded {
    pub ids: Vec<Vec<u32>>,
    /// Index of the label; `None` for a label the model does not know (a baseline of other classes).
    pub labels: Vec<Option<usize>>,
    /// Index of the source.
    pub sources: Vec<usize>,
}

impl Encoded {
    pub fn new(
        dataset: &Dataset,
        part: &[usize],
        labels: &[String],
        tokenizer: &Tokenizer,
        max_length: usize,
    ) -> Result<Self, TrainError> {
        let index: HashMap<&str, usize> = labels.iter().enumerate().map(|(i, label)| (label.as_str(), i)).collect();
        let texts: Vec<String> = part.iter().map(|&row| dataset.rows[row].1.text.clone()).collect();
        Ok(Self {
            ids: tokenizer.encode_batch(&texts, max_length)?,
            labels: part.iter().map(|&row| index.get(dataset.rows[row].1.label.as_str()).copied()).collect(),
            sources: part.iter().map(|&row| dataset.rows[row].0).collect(),
        })
    }

    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Tokens of each row.
    pub fn lengths(&self) -> Vec<usize> {
        self.ids.iter().map(Vec::len).collect()
    }
}

#[cfg(test)]
mod tests {
    use athanor_contract::train::{Columns, SplitSpec};

    use super::*;

    fn row(text: &str, label: &str) -> Row {
        Row { text: text.into(), label: label.into(), place: "f row 1".into() }
    }

    #[test]
    fn a_text_is_kept_once() {
        let rows = || vec![row("a", "x"), row("b", "x"), row("a", "y")];
        assert_eq!(without_duplicates(rows(), false), [row("a", "x"), row("b", "x")]);
        assert_eq!(without_duplicates(rows(), true), [row("a", "y"), row("b", "x")]);
    }

    #[test]
    fn labels_are_given_inherited_or_found() {
        let dataset = |labels: &[&str]| Dataset {
            sources: vec!["s".into()],
            rows: labels.iter().map(|label| (0, row("t", label))).collect(),
            digest: String::new(),
        };
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let both = dataset(&["pos", "neg"]);
        assert_eq!(both.choose_labels(None, None).unwrap(), ["neg", "pos"]);
        assert_eq!(both.choose_labels(Some(&names(&["pos", "neg"])), None).unwrap(), ["pos", "neg"]);
        assert_eq!(both.choose_labels(None, Some(&names(&["pos", "neg", "mid"]))).unwrap(), ["pos", "neg", "mid"]);
        assert_eq!(both.choose_labels(None, Some(&names(&["x", "y"]))).unwrap(), ["neg", "pos"]);
        let unknown = both.choose_labels(Some(&names(&["pos", "mid"])), None).unwrap_err().to_string();
        assert!(unknown.contains("f row 1") && unknown.contains("\"neg\""), "{unknown}");
        assert!(dataset(&["pos"]).choose_labels(None, None).is_err());
    }

    #[tokio::test]
    async fn the_digest_follows_content_and_split() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("rows.jsonl");
        let mut spec = DataSpec {
            sources: vec![Source {
                name: "rows".into(),
                uri: Some(format!("file://{}", file.display())),
                kafka: None,
                columns: Columns::default(),
            }],
            split: SplitSpec::default(),
        };
        std::fs::write(&file, "{\"text\": \"a\", \"label\": \"x\"}\n").unwrap();
        let first = read(&spec).await.unwrap();
        assert_eq!(first.rows.len(), 1);
        assert_eq!(read(&spec).await.unwrap().digest, first.digest);
        spec.split.seed = 1;
        assert_ne!(read(&spec).await.unwrap().digest, first.digest);
        spec.split.seed = 0;
        std::fs::write(&file, "{\"text\": \"b\", \"label\": \"x\"}\n").unwrap();
        assert_ne!(read(&spec).await.unwrap().digest, first.digest);
        spec.sources[0].uri = Some(format!("file://{}", folder.path().join("rows.csv").display()));
        std::fs::write(folder.path().join("rows.csv"), "text,label\n").unwrap();
        let error = read(&spec).await.unwrap_err().to_string();
        assert!(error.contains("source rows: no labelled rows in file:///") && error.ends_with("rows.csv"), "{error}");
    }
}
