//! The rows of a dataset while they are read: each is cleaned and compared with the rows before it.

use athanor_contract::train::{CleanSpec, OnBadRow};
use serde::Serialize;

use crate::{
    DataError, Rows,
    clean::{Cleaned, Cleaner, CleaningReport, EXAMPLES},
    pdf::Worker,
    rows::{Fields, Origin, Seen},
    topic_report::TopicReport,
};

/// The rows so far, and the state that adding more of them requires.
pub(crate) struct Builder {
    rows: Rows,
    seen: Seen,
    /// Cleans texts, and the second texts of pairs.
    cleaners: Option<(Cleaner, Cleaner)>,
    source: usize,
    rows_of_source: u64,
    on_bad_row: OnBadRow,
    skipped: SkippedRows,
    topics: Vec<TopicReport>,
    pdf_worker: Option<Worker>,
}

/// Rows that could not be read and were left out, as `data.onBadRow` allows.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct SkippedRows {
    pub rows: u64,
    /// What was wrong with the first of them: file, row and field.
    pub examples: Vec<String>,
}

impl SkippedRows {
    const EXAMPLES: usize = 10;

    fn add(&mut self, mistake: String) {
        self.rows += 1;
        if self.examples.len() < Self::EXAMPLES {
            self.examples.push(mistake);
        }
    }
}

impl Builder {
    pub fn new(clean: Option<&CleanSpec>, on_bad_row: OnBadRow) -> Result<Self, DataError> {
        let cleaners = match clean {
            Some(clean) => Some((Cleaner::new(clean)?, Cleaner::new(clean)?)),
            None => None,
        };
        Ok(Self {
            rows: Rows::default(),
            seen: Seen::default(),
            cleaners,
            source: 0,
            rows_of_source: 0,
            on_bad_row,
            skipped: SkippedRows::default(),
            topics: Vec::new(),
            pdf_worker: None,
        })
    }

    pub fn begin_source(&mut self, index: usize) {
        self.seen.clear();
        self.source = index;
        self.rows_of_source = 0;
    }

    pub fn begin_file(&mut self, origin: Origin) {
        self.rows.begin(self.source, origin);
    }

    /// Rows that the source has given, those included that were not kept.
    pub fn rows_of_source(&self) -> u64 {
        self.rows_of_source
    }

    /// Takes note of a row that cannot be read, if such rows are to be left out; else gives the mistake back.
    pub fn skip(&mut self, mistake: String) -> Result<(), String> {
        match self.on_bad_row {
            OnBadRow::Fail => Err(mistake),
            OnBadRow::Skip => {
                self.skipped.add(mistake);
                Ok(())
            }
        }
    }

    /// The process that reads PDFs, if one has been started; it ends with the reading.
    pub fn pdf_worker(&mut self) -> &mut Option<Worker> {
        &mut self.pdf_worker
    }

    /// Rows that were left out so far.
    pub fn skipped(&self) -> &SkippedRows {
        &self.skipped
    }

    /// Takes note of what a topic held.
    pub fn add_topic(&mut self, report: TopicReport) {
        self.topics.push(report);
    }

    /// What the topics held, in the order of their sources.
    pub fn take_topics(&mut self) -> Vec<TopicReport> {
        std::mem::take(&mut self.topics)
    }

    /// Whether each text is kept once while it is read. With cleaning, duplicates are resolved when all rows are there.
    pub fn drops_duplicates(&self) -> bool {
        self.cleaners.is_none()
    }

    /// Cleans a valid row and keeps it unless the source has had it before; a source's first label counts.
    pub fn row(&mut self, number: u32, fields: Fields) {
        self.rows_of_source += 1;
        let Some((texts, pairs)) = &mut self.cleaners else {
            match self.seen.find_or_insert(&self.rows, fields.text, fields.pair) {
                None => self.rows.push(number, fields),
                Some(row) => {
                    if let (None, Some(label)) = (self.rows.label(row), fields.label) {
                        self.rows.set_label(row, label);
                    }
                }
            }
            return;
        };
        let place = || self.rows.next_place(number);
        let Cleaned::Kept(text) = texts.clean(fields.text, place) else { return };
        let pair = match fields.pair.map(|pair| pairs.clean(pair, place)) {
            None => None,
            Some(Cleaned::Kept(pair)) => Some(pair),
            Some(Cleaned::Removed(_)) => return,
        };
        self.rows.push(number, Fields { text: &text, pair: pair.as_deref(), ..fields });
    }

    /// All rows, those that were left out, and what cleaning has done to texts and pairs.
    pub fn finish(self) -> (Rows, SkippedRows, Option<CleaningReport>) {
        let cleaning = self.cleaners.map(|(texts, pairs)| {
            let mut report = texts.into_report();
            // A row is counted once, by its text; what was done to pairs adds to the steps.
            for step in pairs.into_report().steps {
                match report.steps.iter_mut().find(|known| known.step == step.step) {
                    None => report.steps.push(step),
                    Some(known) => {
                        known.changed += step.changed;
                        known.removed += step.removed;
                        known.examples.extend(step.examples);
                        known.examples.truncate(EXAMPLES);
                    }
                }
            }
            report.steps.sort_by_key(|step| step.step);
            report
        });
        (self.rows, self.skipped, cleaning)
    }
}
