//! What every reconcile shares, and how errors of a reconcile are counted and repeated.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use kube::{Client, runtime::controller::Action};

use crate::{cluster::ClusterError, progress::Reports, settings::Settings};

/// Longest wait between two attempts at an object that fails.
const LONGEST: Duration = Duration::from_secs(300);

/// A reconcile that failed; it is repeated, later each time.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error("reading {what}: {source}")]
    Read { what: &'static str, source: Box<kube::Error> },
    #[error(transparent)]
    Write(#[from] ClusterError),
    #[error("the object has no {0}")]
    Incomplete(&'static str),
}

impl ReconcileError {
    /// For `map_err`.
    pub fn read(what: &'static str) -> impl Fn(kube::Error) -> Self {
        move |source| Self::Read { what, source: Box::new(source) }
    }
}

/// Shared by the reconciles of both kinds.
pub struct Context {
    pub client: Client,
    pub settings: Settings,
    pub reports: Arc<Reports>,
    pub http: reqwest::Client,
    failures: Mutex<HashMap<String, u32>>,
}

impl Context {
    pub fn new(client: Client, settings: Settings, reports: Arc<Reports>, http: reqwest::Client) -> Self {
        Self { client, settings, reports, http, failures: Mutex::default() }
    }

    /// Counts one reconcile and its time.
    pub fn finished(&self, kind: &'static str, key: &str, started: Instant, result: &Result<Action, ReconcileError>) {
        let label = if result.is_ok() { "ok" } else { "error" };
        metrics::counter!("athanor_operator_reconciles_total", "kind" => kind, "result" => label).increment(1);
        metrics::histogram!("athanor_operator_reconcile_seconds", "kind" => kind)
            .record(started.elapsed().as_secs_f64());
        if result.is_ok() {
            self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        }
    }

    /// When to try again after a failure: 1 s, 2 s, 4 s, up to 300 s.
    pub fn backoff(&self, key: String) -> Action {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(key).or_default();
        let wait = delay(*count);
        *count = count.saturating_add(1);
        Action::requeue(wait)
    }
}

fn delay(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.min(9)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_five_minutes() {
        let seconds: Vec<u64> = [0, 1, 2, 8, 9, 40].into_iter().map(|count| delay(count).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 256, 300, 300]);
    }
}
