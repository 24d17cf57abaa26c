//! Progress of reading data and of looking for near duplicates: a bar at a terminal, else a log line now and then.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use athanor_data::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// Reading that is over before this shows nothing.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two log lines.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// What a person sees of reading.
pub struct Reading {
    terminal: bool,
    started: Instant,
    shown: Mutex<Shown>,
}

struct Shown {
    /// With its template: one of another kind begins its own, whose estimate is not that of the one before.
    bar: Option<(&'static str, ProgressBar)>,
    logged: Instant,
}

impl Reading {
    pub fn new(terminal: bool) -> Self {
        let now = Instant::now();
        Self { terminal, started: now, shown: Mutex::new(Shown { bar: None, logged: now }) }
    }

    pub fn at(&self, progress: Progress<'_>) {
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

    pub fn finish(&self) {
        if let Some((_, bar)) = self.shown.lock().unwrap_or_else(PoisonError::into_inner).bar.take() {
            bar.finish_and_clear();
        }
    }
}
