//! What happens next to a FineTuneJob: a function of what was read and of the time. Each rule is in [`super::policy`].

use std::time::Duration;

use athanor_contract::train::TrainSummary;
use athanor_crds::{FineTuneJob, SearchStatus};
use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::ResourceExt;

use super::{
    attempt::{self, Attempt},
    dereference::Observed,
    policy::{
        deadline::Deadline,
        restart::{self, Restart},
        search::{self, NewTrial, Outcome, SearchResult},
        suspend, ttl,
    },
    validate::ValidatedJob,
};
use crate::cluster::Identity;

/// Longest wait before the pods of an earlier attempt are looked at again.
const PODS_SEEN: Duration = Duration::from_secs(2);
/// Longest wait before the trials of a search are looked at again; their ends are watched.
const TRIALS_SEEN: Duration = Duration::from_secs(60);

/// State of the job.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    Suspended,
    /// Trials of the search run; the job's own training follows them.
    Searching {
        message: String,
    },
    /// The attempt waits for its pods, or for the pods of the last attempt to end.
    Pending {
        message: String,
    },
    /// All pods run.
    Running,
    /// The attempt ended and another follows.
    Restarting {
        counted: bool,
        cause: String,
    },
    Succeeded(TrainSummary),
    Failed {
        reason: &'static str,
        message: String,
        summary: Option<TrainSummary>,
    },
    /// It had succeeded or failed before.
    Over,
}

/// What the cluster and the status should become.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub phase: Phase,
    /// Number of the attempt from now on.
    pub attempt: u32,
    /// Kubernetes Jobs to delete.
    pub remove: Vec<Identity>,
    /// Whether to create the children of the attempt.
    pub create: bool,
    /// Result of the search, which the attempt trains with instead of the values of the specification.
    pub search_result: Option<SearchResult>,
    /// Trials to create.
    pub trials: Vec<NewTrial>,
    /// Trials to delete.
    pub remove_trials: Vec<Identity>,
    /// State of the search, if it changed.
    pub search: Option<SearchStatus>,
    /// Whether to delete the FineTuneJob: its time to live has passed.
    pub expire: bool,
    pub requeue: Option<Duration>,
}

impl Decision {
    /// A decision that changes nothing in the cluster.
    pub fn new(phase: Phase, attempt: u32) -> Self {
        Self {
            phase,
            attempt,
            remove: Vec::new(),
            create: false,
            search_result: None,
            trials: Vec::new(),
            remove_trials: Vec::new(),
            search: None,
            expire: false,
            requeue: None,
        }
    }

    /// Returns whether nothing is left to do once the status is written: whatever follows has an event, or a time, of
    /// its own. The end of an attempt has not: its Kubernetes Job is deleted by the reconcile after the status.
    pub fn is_settled(&self) -> bool {
        matches!(self.phase, Phase::Pending { .. } | Phase::Running)
    }
}

/// Wait for the deployment that the job belongs to.
const AWAITED: Duration = Duration::from_secs(10);

/// Decides what happens next.
///
/// A decision that ends an attempt only raises its number. The Kubernetes Job of the earlier attempt is deleted by the
/// next reconcile, after the status is written: an operator that is killed in between does not lose the count.
pub fn decide(job: &ValidatedJob, observed: &Observed, now: Timestamp) -> Decision {
    let mut status = observed.job.status.clone().unwrap_or_default();
    if let Some(report) = &observed.report {
        // The status shows a step some seconds later.
        let progress = status.progress.get_or_insert_default();
        (progress.step, progress.checkpoint_step) = (report.step, report.checkpoint_step);
    }
    let batch_jobs = BatchJobs::new(&job.name, status.attempt, observed);
    let same = |phase| Decision { remove: batch_jobs.earlier(), ..Decision::new(phase, status.attempt) };
    if attempt::is_over(&status) {
        let left = ttl::left(job.spec.ttl_seconds_after_finished, status.completion_time.as_ref(), now);
        let is_due = left.is_some_and(|left| left.is_zero());
        // A retraining that is deleted before its deployment looked would be done again.
        let requeue = if is_due { observed.is_awaited.then_some(AWAITED) } else { left };
        return Decision { expire: is_due && !observed.is_awaited, requeue, ..same(Phase::Over) };
    }
    let deadline = Deadline::new(job.spec.active_deadline_seconds, status.start_time.as_ref(), now);
    let state = attempt::read(batch_jobs.current, &batch_jobs.pods(observed), job.nodes, now);
    // A result counts even if the deadline passes or the user suspends at the same time: the artifact is written.
    if !state.is_result() {
        if let Some(passed) = deadline.filter(|deadline| deadline.has_passed()) {
            let phase = Phase::Failed { reason: "DeadlineExceeded", message: passed.message(), summary: None };
            let remove_trials = search::unfinished(&observed.trials);
            return Decision { remove: batch_jobs.all(), remove_trials, ..same(phase) };
        }
        if job.spec.suspend {
            let attempt = suspend::next_attempt(status.attempt, batch_jobs.current.is_some());
            // A trial that is stopped starts again when the job goes on; the result of one that is over counts.
            let remove_trials = search::unfinished(&observed.trials);
            return Decision { attempt, remove_trials, ..same(Phase::Suspended) };
        }
    }
    let requeue = deadline.map(Deadline::wait);
    match state {
        Attempt::Absent => begin(job, observed, now, Decision { requeue, ..same(Phase::Running) }),
        Attempt::Waiting { message } => Decision { requeue, ..same(Phase::Pending { message }) },
        Attempt::Running => Decision { requeue, ..same(Phase::Running) },
        Attempt::Settling { wait } => {
            let message = "a process lost a peer; waiting for the cause".into();
            Decision { requeue: Some(wait), ..same(Phase::Pending { message }) }
        }
        Attempt::Succeeded(summary) => same(Phase::Succeeded(summary)),
        Attempt::Failed { reason, message, summary } => same(Phase::Failed { reason, message, summary }),
        Attempt::Ended { fault, cause } => {
            let counted = restart::is_counted(fault, &status);
            match restart::restart(&status, job.spec.train.failure_policy.max_restarts, counted, &cause) {
                Restart::Again => {
                    Decision { attempt: status.attempt + 1, requeue, ..same(Phase::Restarting { counted, cause }) }
                }
                Restart::Exhausted { reason, message } => same(Phase::Failed { reason, message, summary: None }),
            }
        }
    }
}

/// Decides how an attempt without a Kubernetes Job begins: after the pods of earlier attempts, and after the search.
/// `next` has what does not depend on that.
fn begin(job: &ValidatedJob, observed: &Observed, now: Timestamp, next: Decision) -> Decision {
    let lingering = observed.pods.iter().filter(|pod| attempt::may_still_write(pod, now)).count();
    if lingering > 0 {
        let message = format!("waiting for {lingering} pods of the last attempt to end");
        return Decision { phase: Phase::Pending { message }, requeue: Some(PODS_SEEN), ..next };
    }
    let status = observed.job.status.clone().unwrap_or_default();
    let pause = restart::pause_left(&status, now);
    if !pause.is_zero() {
        let message = format!(
            "waiting {} s for the next attempt: {} preemptions without progress",
            pause.as_secs() + 1,
            status.fruitless_preemptions
        );
        return Decision { phase: Phase::Pending { message }, requeue: Some(pause), ..next };
    }
    let message = format!("0 of {} pods are running", job.nodes);
    let next = Decision { phase: Phase::Pending { message }, create: true, ..next };
    match &job.spec.train.hyperparameters.search {
        None => next,
        Some(spec) => after_search(next, search::decide(&observed.job, spec, &observed.trials), &observed.trials),
    }
}

/// Decides how a job with a search goes on: with trials, or with its own attempt once the search has a result.
fn after_search(
    next: Decision,
    search: Result<search::Decision, String>,
    trials: &[std::sync::Arc<FineTuneJob>],
) -> Decision {
    let failed = |reason, message| Phase::Failed { reason, message, summary: None };
    let search = match search {
        Ok(search) => search,
        Err(message) => {
            return Decision { phase: failed("SearchFailed", message), create: false, requeue: None, ..next };
        }
    };
    let next = Decision { search: Some(search.status), trials: search.start, ..next };
    match search.outcome {
        Outcome::Chosen(result) => Decision { search_result: Some(*result), ..next },
        Outcome::Failed { reason, message } => Decision {
            phase: failed(reason, message),
            create: false,
            remove_trials: search::unfinished(trials),
            requeue: None,
            ..next
        },
        Outcome::Searching { message } => {
            let requeue = next.requeue.map_or(TRIALS_SEEN, |deadline| deadline.min(TRIALS_SEEN));
            Decision { phase: Phase::Searching { message }, create: false, requeue: Some(requeue), ..next }
        }
    }
}

/// Kubernetes Jobs of a FineTuneJob.
struct BatchJobs<'a> {
    /// The one of the current attempt.
    current: Option<&'a Job>,
    /// Those of earlier attempts.
    earlier: Vec<&'a Job>,
}

impl<'a> BatchJobs<'a> {
    fn new(job: &str, attempt: u32, observed: &'a Observed) -> Self {
        let name = attempt::batch_job_name(job, attempt);
        let (current, earlier): (Vec<&Job>, Vec<&Job>) =
            observed.batch_jobs.iter().map(AsRef::as_ref).partition(|batch_job| batch_job.name_any() == name);
        Self { current: current.first().copied(), earlier }
    }

    fn pods<'b>(&self, observed: &'b Observed) -> Vec<&'b Pod> {
        observed.pods.iter().map(AsRef::as_ref).filter(|pod| attempt::belongs_to(pod, self.current)).collect()
    }

    /// Jobs of earlier attempts that are not being deleted yet.
    fn earlier(&self) -> Vec<Identity> {
        present(self.earlier.iter().copied())
    }

    /// Jobs of all attempts that are not being deleted yet.
    fn all(&self) -> Vec<Identity> {
        present(self.current.into_iter().chain(self.earlier.iter().copied()))
    }
}

fn present<'a>(batch_jobs: impl Iterator<Item = &'a Job>) -> Vec<Identity> {
    let present = batch_jobs.filter(|batch_job| batch_job.metadata.deletion_timestamp.is_none());
    present.map(Identity::from_object).collect()
}
