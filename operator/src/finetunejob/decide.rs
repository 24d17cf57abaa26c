//! What happens next to a FineTuneJob, from what is observed and the time alone.

use std::{collections::BTreeSet, time::Duration};

use athanor_contract::train::{TrainResult, TrainSummary, exit_code};
use athanor_crds::{FineTuneJob, FineTuneJobStatus, SearchStatus, condition};
use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ContainerStateTerminated, Pod},
};
use kube::ResourceExt;

use super::{
    dereference::Observed,
    search::{self, Found, NewTrial, Outcome},
};
use crate::pods;

/// Restarts after preemptions, which do not count against the user's maxRestarts, are bounded too.
pub const MAX_PREEMPTIONS: u32 = 20;
/// Processes that lost a peer end before the peer's own end is known. So long is waited for it to tell a preemption from a crash.
const SETTLE: Duration = Duration::from_secs(3);
/// A pod of an old attempt on a node that does not answer is not waited for longer than this beyond its grace period.
const LOST_NODE: Duration = Duration::from_secs(15);
/// A trial that somebody deleted is noticed after this; one that ends, at once.
const TRIALS_SEEN: Duration = Duration::from_secs(60);
/// Why a job failed that its user has to change.
pub const USER_ERROR: &str = "UserError";
/// Label with a pod's index.
const INDEX: &str = "batch.kubernetes.io/job-completion-index";

/// Where the job stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    Suspended,
    /// Trials of the search run; the job itself comes after them.
    Searching {
        message: String,
    },
    /// Waiting for pods, or for the pods of the last attempt to go.
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
    /// Over: with this condition.
    Succeeded(TrainSummary),
    Failed {
        reason: &'static str,
        message: String,
        summary: Option<TrainSummary>,
    },
    /// It was over before.
    Over,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub phase: Phase,
    /// The attempt from now on.
    pub attempt: u32,
    /// Jobs to delete, with their UIDs.
    pub remove: Vec<(String, String)>,
    /// Create what the attempt needs.
    pub create: bool,
    /// What the attempt trains, if it is not what the specification says: the search's result.
    pub found: Option<Found>,
    /// Trials to create.
    pub trials: Vec<NewTrial>,
    /// Trials to delete, with their UIDs.
    pub remove_trials: Vec<(String, String)>,
    /// What is known of the search, if that is not in the status already.
    pub search: Option<SearchStatus>,
    /// The user's time to live has passed.
    pub expire: bool,
    pub requeue: Option<Duration>,
}

/// Name of an attempt's Job.
pub fn job_name(name: &str, attempt: u32) -> String {
    format!("{name}-{attempt}")
}

pub fn decide(observed: &Observed, now: Timestamp) -> Decision {
    let none = FineTuneJobStatus::default();
    let status = observed.job.status.as_ref().unwrap_or(&none);
    let spec = &observed.job.spec;
    let current = job_name(&observed.job.name_any(), status.attempt);
    let (ours, stale): (Vec<&Job>, Vec<&Job>) = observed.jobs.iter().partition(|job| job.name_any() == current);
    let identify = |job: &&Job| (job.name_any(), job.uid().unwrap_or_default());
    let going = |jobs: &[&Job]| {
        jobs.iter().filter(|job| job.metadata.deletion_timestamp.is_none()).map(identify).collect::<Vec<_>>()
    };
    let decision = |phase| Decision {
        phase,
        attempt: status.attempt,
        remove: going(&stale),
        create: false,
        found: None,
        trials: Vec::new(),
        remove_trials: Vec::new(),
        search: None,
        expire: false,
        requeue: None,
    };

    if is_over(status) {
        return finished(decision(Phase::Over), status, spec.ttl_seconds_after_finished, now);
    }
    let nodes = spec.train.distributed.num_nodes;
    let job = ours.first().copied();
    let pods: Vec<&Pod> = observed.pods.iter().filter(|pod| belongs_to(pod, job)).collect();
    // The result counts whatever happens at the same time: the artifact is there.
    let mut phase = verdict(job, &pods, nodes, now);
    let is_result = matches!(phase, Verdict::Phase(Phase::Succeeded(_) | Phase::Failed { .. }));
    if !is_result {
        if let (Some(limit), Some(start)) = (spec.active_deadline_seconds, &status.start_time) {
            let left = Duration::from_secs(limit.into()).saturating_sub(since(start.0, now));
            if left.is_zero() {
                let message = format!("it was not over {limit} s after its start (activeDeadlineSeconds)");
                let failed = Phase::Failed { reason: "DeadlineExceeded", message, summary: None };
                return Decision {
                    remove: going(&observed.jobs.iter().collect::<Vec<_>>()),
                    remove_trials: unfinished(&observed.trials),
                    ..decision(failed)
                };
            }
        }
        if spec.suspend {
            // Another attempt's Job has another name, so nothing has to wait for this one to be gone.
            let attempt = status.attempt + u32::from(job.is_some());
            return Decision {
                attempt,
                remove: going(&observed.jobs.iter().collect::<Vec<_>>()),
                // Each begins anew when the job goes on; those that are over count.
                remove_trials: unfinished(&observed.trials),
                ..decision(Phase::Suspended)
            };
        }
    }
    let deadline = spec.active_deadline_seconds.zip(status.start_time.as_ref()).map(|(limit, start)| {
        Duration::from_secs(limit.into()).saturating_sub(since(start.0, now)) + Duration::from_millis(100)
    });
    if let Verdict::Ended { counted, cause } = phase {
        phase = Verdict::Phase(restart(status, spec.train.failure_policy.max_restarts, counted, cause));
    }
    match phase {
        Verdict::Phase(phase) => {
            let again = matches!(phase, Phase::Restarting { .. });
            // The Job of the attempt that ended goes at once, so that its processes are gone the sooner.
            let remove = if again { going(&observed.jobs.iter().collect::<Vec<_>>()) } else { going(&stale) };
            Decision { attempt: status.attempt + u32::from(again), remove, requeue: deadline, ..decision(phase) }
        }
        Verdict::Settle(wait) => {
            Decision { requeue: Some(wait), ..decision(Phase::Pending { message: "a process lost a peer".into() }) }
        }
        Verdict::Absent => {
            let lingering: BTreeSet<String> = observed
                .pods
                .iter()
                .filter(|pod| !belongs_to(pod, job) && may_still_write(pod, now))
                .map(ResourceExt::name_any)
                .collect();
            if lingering.is_empty() {
                let message = format!("{nodes} pods were asked for");
                let begin = Decision { create: true, requeue: deadline, ..decision(Phase::Pending { message }) };
                match &spec.train.hyperparameters.search {
                    Some(search) => {
                        searched(begin, search::plan(&observed.job, search, &observed.trials), &observed.trials)
                    }
                    None => begin,
                }
            } else {
                let message = format!("waiting for {} pods of the last attempt to end", lingering.len());
                Decision { requeue: Some(Duration::from_secs(2)), ..decision(Phase::Pending { message }) }
            }
        }
        // Settled above.
        Verdict::Ended { .. } => decision(Phase::Running),
    }
}

/// A job with a search begins once that is over, with what was found.
fn searched(begin: Decision, plan: Result<search::Plan, String>, trials: &[FineTuneJob]) -> Decision {
    let failed = |reason, message| Phase::Failed { reason, message, summary: None };
    let plan = match plan {
        Ok(plan) => plan,
        Err(message) => {
            return Decision { phase: failed("SearchFailed", message), create: false, requeue: None, ..begin };
        }
    };
    let found = Decision { search: Some(plan.status), trials: plan.start, ..begin };
    match plan.outcome {
        Outcome::Chosen(best) => Decision { found: Some(*best), ..found },
        Outcome::Failed { reason, message } => Decision {
            phase: failed(reason, message),
            create: false,
            remove_trials: unfinished(trials),
            requeue: None,
            ..found
        },
        Outcome::Searching { message } => {
            let requeue = found.requeue.map_or(TRIALS_SEEN, |deadline| deadline.min(TRIALS_SEEN));
            Decision { phase: Phase::Searching { message }, create: false, requeue: Some(requeue), ..found }
        }
    }
}

/// Trials that still run, with their UIDs.
fn unfinished(trials: &[FineTuneJob]) -> Vec<(String, String)> {
    let still = trials
        .iter()
        .filter(|trial| trial.metadata.deletion_timestamp.is_none() && !trial.status.as_ref().is_some_and(is_over));
    still.map(|trial| (trial.name_any(), trial.uid().unwrap_or_default())).collect()
}

/// What an attempt's Job and pods say.
// One lives for one reconcile: its size is of no account.
#[allow(clippy::large_enum_variant)]
enum Verdict {
    Absent,
    Phase(Phase),
    /// Too early to say why it ended.
    Settle(Duration),
    Ended {
        counted: bool,
        cause: String,
    },
}

fn verdict(job: Option<&Job>, pods: &[&Pod], nodes: u32, now: Timestamp) -> Verdict {
    let mut preempted = Vec::new();
    let mut crashed = Vec::new();
    let mut first_end: Option<Timestamp> = None;
    for pod in pods {
        let name = pod.name_any();
        let Some(end) = terminated(pod) else {
            if phase(pod) == "Failed" {
                let reason = pod.status.as_ref().and_then(|status| status.reason.as_deref()).unwrap_or("Lost");
                preempted.push(format!("pod {name}: {reason}"));
            }
            continue;
        };
        let message = end.message.as_deref().unwrap_or_default().trim();
        let result = serde_json::from_str::<TrainResult>(message);
        if end.exit_code == exit_code::USER_ERROR {
            let message = match result {
                Ok(TrainResult::Failed { message }) => message,
                _ => message.to_owned(),
            };
            return Verdict::Phase(Phase::Failed { reason: USER_ERROR, message, summary: None });
        }
        if end.exit_code == exit_code::DONE {
            if index(pod) == Some(0) {
                match result {
                    Ok(TrainResult::Succeeded(summary)) => return Verdict::Phase(Phase::Succeeded(summary)),
                    Ok(TrainResult::GateFailed(summary)) => {
                        let message = summary.failed_gates.join("; ");
                        return Verdict::Phase(Phase::Failed { reason: "GateFailed", message, summary: Some(summary) });
                    }
                    _ => crashed.push(format!("pod {name} ended with code 0 but without a result")),
                }
            }
            continue;
        }
        let at = end.finished_at.as_ref().map_or(now, |time| time.0);
        first_end = Some(first_end.map_or(at, |first| first.min(at)));
        let why = describe(&name, end, result.ok());
        if end.exit_code == exit_code::LOST_PEER || is_disrupted(pod) { preempted.push(why) } else { crashed.push(why) }
    }
    if let Some(cause) = crashed.into_iter().next() {
        return Verdict::Ended { counted: true, cause };
    }
    if let Some(cause) = preempted.into_iter().next() {
        let all_ended = pods.iter().all(|pod| terminated(pod).is_some() || phase(pod) == "Failed");
        let waited = first_end.map_or(Duration::MAX, |first| since(first, now));
        return if all_ended || waited >= SETTLE {
            Verdict::Ended { counted: false, cause }
        } else {
            Verdict::Settle(SETTLE - waited)
        };
    }
    let Some(job) = job else { return Verdict::Absent };
    if job.metadata.deletion_timestamp.is_some() {
        return Verdict::Ended { counted: false, cause: format!("Job {} was deleted", job.name_any()) };
    }
    let failed =
        job.status.iter().flat_map(|status| status.conditions.iter().flatten()).find(|condition| {
            matches!(condition.type_.as_str(), "Failed" | "FailureTarget") && condition.status == "True"
        });
    if let Some(failed) = failed {
        let message = failed.message.as_deref().unwrap_or_default();
        return Verdict::Ended { counted: false, cause: format!("a pod of Job {} is gone: {message}", job.name_any()) };
    }
    let is_complete = job
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Complete" && condition.status == "True");
    if is_complete {
        let cause = format!("Job {} is complete, but the pod with its result is gone", job.name_any());
        return Verdict::Ended { counted: false, cause };
    }
    let running = pods.iter().filter(|pod| phase(pod) == "Running").count();
    if running as u32 + pods.iter().filter(|pod| phase(pod) == "Succeeded").count() as u32 >= nodes && running > 0 {
        return Verdict::Phase(Phase::Running);
    }
    if job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true) {
        return Verdict::Phase(Phase::Pending { message: "waiting for the queue to admit it".into() });
    }
    let message = pods
        .iter()
        .find_map(|pod| pods::waiting_reason(pod))
        .unwrap_or_else(|| format!("{running} of {nodes} pods run"));
    Verdict::Phase(Phase::Pending { message })
}

fn restart(status: &FineTuneJobStatus, max_restarts: u32, counted: bool, cause: String) -> Phase {
    if counted && status.restarts >= max_restarts {
        let message = format!("it failed after {} restarts (failurePolicy.maxRestarts): {cause}", status.restarts);
        return Phase::Failed { reason: "TooManyRestarts", message, summary: None };
    }
    if !counted && status.preemptions >= MAX_PREEMPTIONS {
        let message = format!("it was interrupted {} times: {cause}", status.preemptions + 1);
        return Phase::Failed { reason: "TooManyPreemptions", message, summary: None };
    }
    Phase::Restarting { counted, cause }
}

fn finished(decision: Decision, status: &FineTuneJobStatus, ttl: Option<u32>, now: Timestamp) -> Decision {
    let left = ttl
        .zip(status.completion_time.as_ref())
        .map(|(ttl, end)| Duration::from_secs(ttl.into()).saturating_sub(since(end.0, now)));
    let expire = left.is_some_and(|left| left.is_zero());
    Decision { expire, requeue: left.filter(|left| !left.is_zero()), ..decision }
}

/// Whether the summary condition has been settled.
pub fn is_over(status: &FineTuneJobStatus) -> bool {
    crate::condition::get(&status.conditions, condition::SUCCEEDED)
        .is_some_and(|condition| condition.status != "Unknown")
}

fn describe(pod: &str, end: &ContainerStateTerminated, result: Option<TrainResult>) -> String {
    let meaning = match end.exit_code {
        exit_code::LOST_PEER => "lost a peer or was asked to stop".into(),
        exit_code::HUNG => "no step ended in time (failurePolicy.hangSeconds)".into(),
        exit_code::NON_FINITE => "the loss was not finite".into(),
        _ => end.reason.clone().unwrap_or_else(|| "Error".into()),
    };
    let message = match result {
        Some(TrainResult::Failed { message }) => message,
        _ => end.message.clone().unwrap_or_default(),
    };
    format!("pod {pod} ended with code {}: {meaning} {}", end.exit_code, message.trim()).trim_end().into()
}

/// How the trainer's container ended, if it did.
pub fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    let status = pod
        .status
        .as_ref()?
        .container_statuses
        .as_ref()?
        .iter()
        .find(|status| status.name == super::build::COMPONENT)?;
    status.state.as_ref()?.terminated.as_ref()
}

/// Evicted, preempted by the scheduler, deleted, or on a node that shut down: not the trainer's doing.
fn is_disrupted(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_some()
        || conditions.into_iter().any(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True")
}

/// A process of another attempt that could still write a checkpoint.
fn may_still_write(pod: &Pod, now: Timestamp) -> bool {
    let lost = pod.metadata.deletion_timestamp.as_ref().is_some_and(|deletion| since(deletion.0, now) > LOST_NODE);
    !lost && terminated(pod).is_none() && !matches!(phase(pod), "Failed" | "Succeeded")
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

/// By UID: a FineTuneJob that was deleted and made again has Jobs of the same names.
fn belongs_to(pod: &Pod, job: Option<&Job>) -> bool {
    let uid = job.and_then(|job| job.metadata.uid.as_ref());
    uid.is_some() && pod.labels().get("batch.kubernetes.io/controller-uid") == uid
}

/// The pod's index in its Job, which is the node's rank.
pub fn index(pod: &Pod) -> Option<u32> {
    pod.labels().get(INDEX).or_else(|| pod.annotations().get(INDEX))?.parse().ok()
}

/// Time between, zero when `start` is later.
pub fn since(start: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(start)).unwrap_or_default()
}
