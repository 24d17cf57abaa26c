//! What a canary analysis needs to know of each revision, counted since this process started.
//!
//! The operator adds up the replicas' answers; it needs no Prometheus for a rollout. Requests are counted, not attempts: a
//! [`Tally`] puts the attempts of one request together.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use athanor_contract::serve::{LatencyHistogram, RevisionAnalysis, RouterAnalysis};

/// What one request was to a revision that took part in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// It was answered after `latency`.
    Answered { latency: Duration, answer: Answer },
    /// No server of the revision answered: the request was lost, reached none, or ran out of time.
    Missing,
    /// The last server that was asked said that it cannot answer at the moment (502, 503, 504).
    Unavailable,
    /// The servers have too much to do (429).
    Busy,
    /// The servers refuse the request (another 4xx, 501): the model did not run.
    Rejected,
}

/// What an answer was worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Good,
    /// A 5xx.
    Failed,
    /// A 5xx because the model's output was not finite.
    NotFinite,
}

impl Outcome {
    /// Value of the label `outcome`.
    fn label(self) -> &'static str {
        match self {
            Self::Answered { answer: Answer::Good, .. } => "answered",
            Self::Answered { answer: Answer::Failed, .. } => "failed",
            Self::Answered { answer: Answer::NotFinite, .. } => "non_finite",
            Self::Missing => "missing",
            Self::Unavailable => "unavailable",
            Self::Busy => "busy",
            Self::Rejected => "rejected",
        }
    }

    /// The outcome of the higher rank counts of two at one revision: an answer makes up for what was lost on the way to
    /// it, and a refusal does not excuse a failure.
    fn rank(self) -> u8 {
        match self {
            Self::Busy | Self::Rejected => 0,
            Self::Missing | Self::Unavailable => 1,
            Self::Answered { .. } => 2,
        }
    }
}

/// The outcomes of one request, one for each revision that took part. They are counted when it is dropped, so also those
/// of a request whose client left.
pub struct Tally<'a> {
    /// Absent: the request is not counted.
    analysis: Option<&'a Analysis>,
    outcomes: Vec<(Arc<str>, Outcome)>,
}

impl<'a> Tally<'a> {
    pub fn new(analysis: Option<&'a Analysis>) -> Self {
        Self { analysis, outcomes: Vec::new() }
    }

    /// Adds the outcome of an attempt.
    pub fn add(&mut self, revision: &Arc<str>, outcome: Outcome) {
        match self.outcomes.iter_mut().find(|(name, _)| name == revision) {
            Some((_, before)) if before.rank() > outcome.rank() => {}
            Some((_, before)) => *before = outcome,
            None => self.outcomes.push((revision.clone(), outcome)),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        let Some(analysis) = self.analysis else { return };
        for (revision, outcome) in &self.outcomes {
            analysis.of(revision).count(*outcome);
            let (revision, outcome) = (revision.to_string(), outcome.label());
            metrics::counter!("athanor_router_outcomes_total", "revision" => revision, "outcome" => outcome)
                .increment(1);
        }
    }
}

/// Counters of one revision.
pub struct Counters {
    requests: AtomicU64,
    errors: AtomicU64,
    busy: AtomicU64,
    rejected: AtomicU64,
    missing: AtomicU64,
    non_finite: AtomicU64,
    feedback_total: AtomicU64,
    feedback_correct: AtomicU64,
    latency: Vec<AtomicU64>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            missing: AtomicU64::new(0),
            non_finite: AtomicU64::new(0),
            feedback_total: AtomicU64::new(0),
            feedback_correct: AtomicU64::new(0),
            latency: (0..LatencyHistogram::BUCKETS).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

impl Counters {
    fn count(&self, outcome: Outcome) {
        let one = |counters: &[&AtomicU64]| {
            for counter in counters {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        };
        match outcome {
            Outcome::Answered { latency, answer } => {
                match answer {
                    Answer::Good => one(&[&self.requests]),
                    Answer::Failed => one(&[&self.requests, &self.errors]),
                    Answer::NotFinite => one(&[&self.requests, &self.errors, &self.non_finite]),
                }
                one(&[&self.latency[LatencyHistogram::bucket(latency.as_secs_f64() * 1e3)]]);
            }
            Outcome::Missing => one(&[&self.requests, &self.errors, &self.missing]),
            Outcome::Unavailable => one(&[&self.requests, &self.errors]),
            Outcome::Busy => one(&[&self.busy]),
            Outcome::Rejected => one(&[&self.rejected]),
        }
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
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (busy, rejected) = (of(&self.busy), of(&self.rejected));
        RevisionAnalysis {
            requests: of(&self.requests),
            errors: of(&self.errors),
            refused: busy + rejected,
            busy,
            rejected,
            missing: of(&self.missing),
            non_finite: of(&self.non_finite),
            latency: LatencyHistogram::new(self.latency.iter().map(of).collect()),
            feedback_total: of(&self.feedback_total),
            feedback_correct: of(&self.feedback_correct),
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

    fn answered(milliseconds: u64, answer: Answer) -> Outcome {
        Outcome::Answered { latency: Duration::from_millis(milliseconds), answer }
    }

    #[test]
    fn counts_and_the_95th_percentile() {
        let analysis = Analysis::default();
        let counters = analysis.of(&"a".into());
        for _ in 0..94 {
            counters.count(answered(10, Answer::Good));
        }
        for _ in 0..5 {
            counters.count(answered(200, Answer::Failed));
        }
        counters.count(answered(200, Answer::NotFinite));
        counters.count(Outcome::Missing);
        counters.count(Outcome::Unavailable);
        counters.count(Outcome::Busy);
        counters.count(Outcome::Rejected);
        counters.count(Outcome::Rejected);
        counters.broken();
        counters.judged(true);
        counters.judged(false);
        let read = &analysis.read().revisions["a"];
        assert_eq!((read.requests, read.errors, read.refused), (102, 9, 3));
        assert_eq!((read.busy, read.rejected, read.missing, read.non_finite), (1, 2, 1, 1));
        assert_eq!((read.feedback_total, read.feedback_correct), (2, 1));
        let p95 = read.latency.percentile(0.95);
        assert!((200.0..220.0).contains(&p95), "{p95}");
        for (latency, low, high) in [(0, 0.0, 0.11), (5, 5.0, 5.5), (1_000_000, 100_000.0, 1e9)] {
            let counters = Counters::default();
            counters.count(answered(latency, Answer::Good));
            let value = counters.read().latency.percentile(0.95);
            assert!((low..high).contains(&value), "{latency}: {value}");
        }
        assert_eq!(Counters::default().read().latency.percentile(0.95), 0.0);
    }

    /// (requests, errors, busy, rejected, missing, non-finite) of the revisions "new" and "old" after one request.
    fn after(attempts: &[(&str, Outcome)]) -> [(u64, u64, u64, u64, u64, u64); 2] {
        let analysis = Analysis::default();
        let mut tally = Tally::new(Some(&analysis));
        for (revision, outcome) in attempts {
            tally.add(&(*revision).into(), *outcome);
        }
        assert!(analysis.read().revisions.is_empty(), "nothing is counted before the end");
        drop(tally);
        ["new", "old"].map(|name| {
            let counts = analysis.read().revisions.get(name).cloned().unwrap_or_default();
            assert_eq!(counts.refused, counts.busy + counts.rejected);
            (counts.requests, counts.errors, counts.busy, counts.rejected, counts.missing, counts.non_finite)
        })
    }

    #[test]
    fn a_request_counts_once_for_each_revision_that_took_part() {
        use Outcome::{Busy, Missing, Rejected, Unavailable};
        let good = answered(5, Answer::Good);
        let none = (0, 0, 0, 0, 0, 0);
        for (attempts, new, old) in [
            (vec![("new", good)], (1, 0, 0, 0, 0, 0), none),
            // Lost on one pod, answered by another one of the same revision.
            (vec![("new", Missing), ("new", good)], (1, 0, 0, 0, 0, 0), none),
            (vec![("new", Missing), ("new", answered(5, Answer::Failed))], (1, 1, 0, 0, 0, 0), none),
            (vec![("new", Missing), ("new", answered(5, Answer::NotFinite))], (1, 1, 0, 0, 0, 1), none),
            // Lost by the candidate however often, answered by the champion.
            (vec![("new", Missing), ("new", Missing), ("old", good)], (1, 1, 0, 0, 1, 0), (1, 0, 0, 0, 0, 0)),
            (vec![("new", Unavailable), ("new", Missing)], (1, 1, 0, 0, 1, 0), none),
            (vec![("new", Missing), ("old", Missing)], (1, 1, 0, 0, 1, 0), (1, 1, 0, 0, 1, 0)),
            // Refusals.
            (vec![("new", Busy), ("new", Busy), ("old", good)], (0, 0, 1, 0, 0, 0), (1, 0, 0, 0, 0, 0)),
            (vec![("new", Busy), ("new", good)], (1, 0, 0, 0, 0, 0), none),
            (vec![("new", Busy), ("new", Missing)], (1, 1, 0, 0, 1, 0), none),
            (vec![("new", Missing), ("new", Rejected)], (1, 1, 0, 0, 1, 0), none),
            (vec![("new", Rejected), ("old", Rejected)], (0, 0, 0, 1, 0, 0), (0, 0, 0, 1, 0, 0)),
        ] {
            assert_eq!(after(&attempts), [new, old], "{attempts:?}");
        }
        let mut uncounted = Tally::new(None);
        uncounted.add(&"new".into(), Missing);
        assert!(!uncounted.is_empty());
    }
}
