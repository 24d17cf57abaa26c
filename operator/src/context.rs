//! What the reconciles of both kinds share.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kube::{Client, runtime::controller::Action};

use crate::{
    cluster::Cluster, lease::Leadership, liveness::Liveness, memory::Memory, progress::Reports, settings::Settings,
    stores::Stores,
};

/// Longest pause between two attempts to reconcile an object.
const LONGEST: Duration = Duration::from_secs(300);

/// Shared by the reconciles of both kinds.
pub struct Context {
    client: Client,
    pub settings: Settings,
    pub stores: Stores,
    pub memory: Memory,
    pub reports: Arc<Reports>,
    /// Client for pods.
    pub http: reqwest::Client,
    /// Which the loops of this process beat.
    pub liveness: Liveness,
    leadership: Leadership,
    failures: Mutex<HashMap<String, u32>>,
}

impl Context {
    pub fn new(
        client: Client,
        settings: Settings,
        stores: Stores,
        reports: Arc<Reports>,
        http: reqwest::Client,
        leadership: Leadership,
    ) -> Self {
        let (memory, liveness, failures) = Default::default();
        Self { client, settings, stores, memory, reports, http, liveness, leadership, failures }
    }

    /// Returns the writer for the object with this key.
    pub fn cluster<'a>(&'a self, key: &'a str) -> Cluster<'a> {
        Cluster::new(&self.client, &self.stores, &self.memory, &self.leadership, key)
    }

    /// Records a success: the next failure waits as short as a first one.
    pub fn succeeded(&self, key: &str) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Records a failure. Returns when to try again: after 1 s, 2 s, 4 s, up to 300 s.
    pub fn backoff(&self, key: String) -> Action {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(key).or_default();
        let wait = delay(*count);
        *count = count.saturating_add(1);
        Action::requeue(wait)
    }

    /// Forgets an object that is gone.
    pub fn forget(&self, key: &str) {
        self.succeeded(key);
        self.memory.forget(key);
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
