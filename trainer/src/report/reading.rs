//! Progress of reading data and of looking for near duplicates: a bar at a terminal, else a log line now and then.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use athanor_contract::train::DataSpec;
use athanor_data::{Dataset, Progress};
use athanor_store::Location;
use indicatif::{ProgressBar, ProgressStyle};

use crate::TrainError;

/// Reading that is over before this shows nothing.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two log lines.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Shows the progress of reading data.
pub struct Reading {
    terminal: bool,
    started: Instant,
    shown: Mutex<Shown>,
}

struct Shown {
    /// The bar and its template. Another kind of progress has a bar and an estimate of its own.
    bar: Option<(&'static str, ProgressBar)>,
    logged: Instant,
}

impl Reading {
    pub fn new(terminal: bool) -> Self {
        let now = Instant::now();
        Self { terminal, started: now, shown: Mutex::new(Shown { bar: None, logged: now }) }
    }

    /// Reads all sources. Rows need a label if the task needs one and no annotation gives it.
    ///
    /// # Errors
    /// A malformed row is a user error and names file, row and field; so is a source without rows.
    pub async fn read(&self, spec: &DataSpec, task_needs_labels: bool) -> Result<Dataset, TrainError> {
        let needs_labels = task_needs_labels && spec.annotate.is_none();
        let dataset = athanor_data::read(spec, needs_labels, &|progress| self.at(progress)).await;
        self.finish();
        Ok(dataset?)
    }

    /// [`Self::read`] of a job, whose machines and restarts all have the rows of the first reading: those of topics are
    /// kept below `snapshots`.
    ///
    /// # Errors
    /// As for [`Self::read`].
    pub async fn read_keeping(
        &self,
        spec: &DataSpec,
        task_needs_labels: bool,
        snapshots: &Location,
    ) -> Result<Dataset, TrainError> {
        let needs_labels = task_needs_labels && spec.annotate.is_none();
        let report = |progress: Progress<'_>| self.at(progress);
        let dataset = athanor_data::read_keeping(spec, needs_labels, snapshots, &report).await;
        self.finish();
        Ok(dataset?)
    }

    fn at(&self, progress: Progress<'_>) {
        if self.started.elapsed() < PATIENCE {
            return;
        }
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.terminal {
            if shown.logged.elapsed() > LOG_EVERY {
                shown.logged = Instant::now();
                match progress {
                    Progress::Reading { source, bytes_read, bytes_total, rows, .. } => {
                        tracing::info!(source, rows, bytes_read, bytes_total, "reading");
                    }
                    Progress::Comparing { done, total } => {
                        tracing::info!(percent = 100 * done / total.max(1), "looking for near duplicates");
                    }
                }
            }
            return;
        }
        let (template, length, position, message) = match progress {
            Progress::Reading { source, bytes_read, bytes_total, rows, .. } => (
                "{spinner} {bytes}/{total_bytes} [{bar:30}] {eta} {msg}",
                bytes_total.unwrap_or(bytes_read).max(bytes_read),
                bytes_read,
                format!("reading {source}, {rows} rows"),
            ),
            Progress::Comparing { done, total } => {
                ("{spinner} {percent} % [{bar:30}] {eta} {msg}", total, done, "looking for near duplicates".to_owned())
            }
        };
        if let Some((_, before)) = shown.bar.take_if(|(kind, _)| *kind != template) {
            before.finish_and_clear();
        }
        let (_, bar) = shown.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            (template, ProgressBar::new(0).with_style(style))
        });
        bar.set_length(length);
        bar.set_position(position);
        bar.set_message(message);
    }

    fn finish(&self) {
        if let Some((_, bar)) = self.shown.lock().unwrap_or_else(PoisonError::into_inner).bar.take() {
            bar.finish_and_clear();
        }
    }
}
