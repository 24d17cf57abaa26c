//! What a canary analysis needs to know of each revision, counted since this process started.
//!
//! The operator adds up the replicas' answers; it needs no Prometheus for a rollout.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use athanor_contract::serve::{LatencyHistogram, RevisionAnalysis, RouterAnalysis};

/// Counters of one revision.
pub struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    refused: AtomicU64,
    feedback_total: AtomicU64,
    feedback_correct: AtomicU64,
    latency: Vec<AtomicU64>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            feedback_total: AtomicU64::new(0),
            feedback_correct: AtomicU64::new(0),
            latency: (0..LatencyHistogram::BUCKETS).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

impl Counters {
    /// An attempt that ended with an answer after `latency`; `ok` is false for a 5xx.
    pub fn answered(&self, latency: Duration, ok: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if !ok {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
        self.latency[LatencyHistogram::bucket(latency.as_secs_f64() * 1e3)].fetch_add(1, Ordering::Relaxed);
    }

    /// An attempt that ended without a usable answer.
    pub fn failed(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// An attempt that was answered with a 4xx or a 501: the model did not run, and its latency says nothing.
    pub fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// An answer that was counted at its head and broke off afterwards.
    pub fn broken(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Feedback to an answer of this revision.
    pub fn judged(&self, correct: bool) {
        self.feedback_total.fetch_add(1, Ordering::Relaxed);
        self.feedback_correct.fetch_add(u64::from(correct), Ordering::Relaxed);
    }

    fn read(&self) -> RevisionAnalysis {
        let counts: Vec<u64> = self.latency.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        RevisionAnalysis {
            requests: self.requests.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            latency: LatencyHistogram::new(counts),
            feedback_total: self.feedback_total.load(Ordering::Relaxed),
            feedback_correct: self.feedback_correct.load(Ordering::Relaxed),
        }
    }
}

/// Counters of every revision seen so far.
#[derive(Default)]
pub struct Analysis {
    revisions: RwLock<BTreeMap<Arc<str>, Arc<Counters>>>,
}

impl Analysis {
    /// The counters of a revision, made at its first use. Names come from the configuration, never from a client.
    pub fn of(&self, revision: &Arc<str>) -> Arc<Counters> {
        if let Some(counters) = self.revisions.read().unwrap_or_else(PoisonError::into_inner).get(revision) {
            return counters.clone();
        }
        let mut revisions = self.revisions.write().unwrap_or_else(PoisonError::into_inner);
        revisions.entry(revision.clone()).or_default().clone()
    }

    pub fn read(&self) -> RouterAnalysis {
        let revisions = self.revisions.read().unwrap_or_else(PoisonError::into_inner);
        RouterAnalysis {
            revisions: revisions.iter().map(|(name, counters)| (name.to_string(), counters.read())).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_the_95th_percentile() {
        let analysis = Analysis::default();
        let counters = analysis.of(&"a".into());
        for _ in 0..94 {
            counters.answered(Duration::from_millis(10), true);
        }
        for _ in 0..6 {
            counters.answered(Duration::from_millis(200), false);
        }
        counters.failed();
        counters.refused();
        counters.broken();
        counters.judged(true);
        counters.judged(false);
        let read = &analysis.read().revisions["a"];
        assert_eq!((read.requests, read.errors, read.refused), (101, 8, 1));
        assert_eq!((read.feedback_total, read.feedback_correct), (2, 1));
        let p95 = read.latency.percentile(0.95);
        assert!((200.0..220.0).contains(&p95), "{p95}");
        for (latency, low, high) in [(0, 0.0, 0.11), (5, 5.0, 5.5), (1_000_000, 100_000.0, 1e9)] {
            let counters = Counters::default();
            counters.answered(Duration::from_millis(latency), true);
            let value = counters.read().latency.percentile(0.95);
            assert!((low..high).contains(&value), "{latency}: {value}");
        }
        assert_eq!(Counters::default().read().latency.percentile(0.95), 0.0);
    }
}
