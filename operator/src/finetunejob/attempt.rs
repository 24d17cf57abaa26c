//! What the Kubernetes Job of an attempt and its pods report: names, exit codes, termination messages.
//!
//! The result of a run is the termination message of the pod with index 0, so it outlives an operator that was away.
//! Everything here is a function of objects that were read; what follows from it is decided in [`super::decide`].

use std::time::Duration;

use athanor_contract::train::{TrainResult, TrainSummary, exit_code};
use athanor_crds::{FineTuneJobStatus, condition as types};
use jiff::Timestamp;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ContainerStateTerminated, Pod},
};
use kube::ResourceExt;

use super::policy::queue;
use crate::{condition, pods, time::since};

/// Name of the component and of the trainer's container.
pub const COMPONENT: &str = "trainer";
/// Reason of a failure that only the user can correct.
pub const USER_ERROR: &str = "UserError";
/// Pods that lost a peer end before the peer's own end is visible. The cause is settled after this time.
const SETTLE: Duration = Duration::from_secs(3);
/// Longest wait for a pod of an earlier attempt beyond its grace period: its node does not answer.
const LOST_NODE: Duration = Duration::from_secs(15);
/// Label of a pod with its index in an Indexed Job.
const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// Label of a pod with the UID of its Job.
const CONTROLLER_UID: &str = "batch.kubernetes.io/controller-uid";

/// Returns the name of the Kubernetes Job of an attempt.
pub fn batch_job_name(job: &str, attempt: u32) -> String {
    format!("{job}-{attempt}")
}

/// Returns whether the FineTuneJob has succeeded or failed.
pub fn is_over(status: &FineTuneJobStatus) -> bool {
    condition::get(&status.conditions, types::SUCCEEDED).is_some_and(|condition| condition.status != "Unknown")
}

/// State of one attempt.
#[derive(Clone, Debug, PartialEq)]
pub enum Attempt {
    /// There is no Kubernetes Job.
    Absent,
    /// Pods are missing, or wait for nodes or images.
    Waiting { message: String },
    /// All pods run.
    Running,
    /// Pods have ended, and the cause is not clear yet.
    Settling { wait: Duration },
    /// It ended without a result.
    Ended { fault: Fault, cause: String },
    /// The artifact is written.
    Succeeded(TrainSummary),
    /// It ended with a result that no restart can change.
    Failed { reason: &'static str, message: String, summary: Option<TrainSummary> },
}

/// Whose fault the end of an attempt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A process crashed, hung, or failed together with all others.
    Run,
    /// Pods were evicted, preempted, stopped or deleted.
    Infrastructure,
    /// Processes lost a peer, and nothing shows why: the peer's node may be gone, or the network or the driver of the
    /// one that reports it may be broken.
    Unknown,
}

impl Attempt {
    /// Returns whether this is the outcome of the whole FineTuneJob.
    pub fn is_result(&self) -> bool {
        matches!(self, Self::Succeeded(_) | Self::Failed { .. })
    }
}

/// Reads the state of an attempt from its Kubernetes Job and that Job's pods. `nodes` is the number of pods that it
/// needs.
pub fn read(batch_job: Option<&Job>, pods: &[&Pod], nodes: u32, now: Timestamp) -> Attempt {
    let ends = match read_ends(pods, now) {
        Ok(ends) => ends,
        Err(result) => return *result,
    };
    if let Some(cause) = first(&ends.crashed) {
        return Attempt::Ended { fault: Fault::Run, cause };
    }
    let all_ended = pods.iter().all(|pod| terminated(pod).is_some() || phase(pod) == "Failed");
    let disrupted = first(&ends.disrupted).map(|cause| (Fault::Infrastructure, cause));
    let Some((fault, cause)) = disrupted.or_else(|| first(&ends.lost_peer).map(|cause| (Fault::Unknown, cause))) else {
        return match batch_job {
            None => Attempt::Absent,
            Some(batch_job) => lost_pods(batch_job).unwrap_or_else(|| progress(batch_job, pods, nodes)),
        };
    };
    // All pods are there and each blames another one: the fault is in the network between them, or in its driver.
    if ends.lost_peer.len() >= nodes as usize {
        return Attempt::Ended { fault: Fault::Run, cause };
    }
    let waited = ends.first.map_or(Duration::MAX, |first| since(first, now));
    if all_ended || waited >= SETTLE {
        Attempt::Ended { fault, cause }
    } else {
        Attempt::Settling { wait: SETTLE - waited }
    }
}

/// Ends of an attempt's pods that carry no result.
#[derive(Default)]
struct Ends {
    /// Causes in the cluster.
    disrupted: Vec<Cause>,
    /// Pods that lost another one.
    lost_peer: Vec<Cause>,
    /// Causes in the run itself.
    crashed: Vec<Cause>,
    first: Option<Timestamp>,
}

/// Why a pod ended, and when.
struct Cause {
    at: Timestamp,
    text: String,
}

/// The cause that came first: others may be its effects.
fn first(causes: &[Cause]) -> Option<String> {
    causes.iter().min_by_key(|cause| cause.at).map(|cause| cause.text.clone())
}

/// Collects the ends of all pods; `Err` is the result that one of them carries.
fn read_ends(pods: &[&Pod], now: Timestamp) -> Result<Ends, Box<Attempt>> {
    let mut ends = Ends::default();
    for pod in pods {
        let name = pod.name_any();
        let Some(end) = terminated(pod) else {
            if phase(pod) == "Failed" {
                let reason = pod.status.as_ref().and_then(|status| status.reason.as_deref()).unwrap_or("Lost");
                ends.disrupted.push(Cause { at: now, text: format!("pod {name}: {reason}") });
            }
            continue;
        };
        let at = end.finished_at.as_ref().map_or(now, |time| time.0);
        match end.exit_code {
            exit_code::USER_ERROR => return Err(Box::new(user_error(end))),
            exit_code::DONE if index(pod) == Some(0) => match result(end) {
                Some(TrainResult::Succeeded(summary)) => return Err(Box::new(Attempt::Succeeded(summary))),
                Some(TrainResult::GateFailed(summary)) => return Err(Box::new(gate_failed(summary))),
                _ => {
                    let text = format!("pod {name} ended with code 0 but without a result");
                    ends.crashed.push(Cause { at, text });
                }
            },
            exit_code::DONE => {}
            code => {
                ends.first = Some(ends.first.map_or(at, |first| first.min(at)));
                let causes = match code {
                    _ if is_disrupted(pod) => &mut ends.disrupted,
                    exit_code::STOPPED => &mut ends.disrupted,
                    exit_code::LOST_PEER => &mut ends.lost_peer,
                    _ => &mut ends.crashed,
                };
                causes.push(Cause { at, text: describe(&name, end) });
            }
        }
    }
    Ok(ends)
}

/// Parses the termination message.
fn result(end: &ContainerStateTerminated) -> Option<TrainResult> {
    serde_json::from_str(end.message.as_deref()?.trim()).ok()
}

fn user_error(end: &ContainerStateTerminated) -> Attempt {
    let message = match result(end) {
        Some(TrainResult::Failed { message }) => message,
        _ => end.message.as_deref().unwrap_or_default().trim().to_owned(),
    };
    Attempt::Failed { reason: USER_ERROR, message, summary: None }
}

fn gate_failed(summary: TrainSummary) -> Attempt {
    Attempt::Failed { reason: "GateFailed", message: summary.failed_gates.join("; "), summary: Some(summary) }
}

/// Describes the end of a pod in one line: its exit code, the code's meaning and the termination message.
fn describe(pod: &str, end: &ContainerStateTerminated) -> String {
    let meaning = match end.exit_code {
        exit_code::LOST_PEER => "lost a peer".into(),
        exit_code::STOPPED => "was asked to stop".into(),
        exit_code::HUNG => "no step ended in time (failurePolicy.hangSeconds)".into(),
        exit_code::NON_FINITE => "the loss was not finite".into(),
        _ => end.reason.clone().unwrap_or_else(|| "Error".into()),
    };
    let message = match result(end) {
        Some(TrainResult::Failed { message }) => message,
        _ => end.message.clone().unwrap_or_default(),
    };
    format!("pod {pod} ended with code {}: {meaning} {}", end.exit_code, message.trim()).trim_end().into()
}

/// Returns how the attempt ended if its pods are gone, or are about to go, without a result.
fn lost_pods(batch_job: &Job) -> Option<Attempt> {
    let name = batch_job.name_any();
    let ended = |cause| Some(Attempt::Ended { fault: Fault::Infrastructure, cause });
    if batch_job.metadata.deletion_timestamp.is_some() {
        return ended(format!("Job {name} was deleted"));
    }
    let mut conditions =
        batch_job.status.iter().flat_map(|status| status.conditions.iter().flatten()).filter(|c| c.status == "True");
    let end =
        conditions.find(|condition| matches!(condition.type_.as_str(), "Failed" | "FailureTarget" | "Complete"))?;
    if end.type_ == "Complete" {
        return ended(format!("Job {name} is complete, but the pod with its result was deleted"));
    }
    let message = end.message.as_deref().unwrap_or_default();
    ended(format!("a pod of Job {name} was deleted: {message}"))
}

fn progress(batch_job: &Job, pods: &[&Pod], nodes: u32) -> Attempt {
    let count = |wanted: &str| pods.iter().filter(|pod| phase(pod) == wanted).count();
    let running = count("Running");
    if running > 0 && running + count("Succeeded") >= nodes as usize {
        return Attempt::Running;
    }
    if queue::holds(batch_job) {
        return Attempt::Waiting { message: "waiting for admission by the queue".into() };
    }
    let waiting = pods.iter().find_map(|pod| pods::waiting_reason(pod));
    Attempt::Waiting { message: waiting.unwrap_or_else(|| format!("{running} of {nodes} pods are running")) }
}

/// Returns how the trainer's container ended, if it did.
fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    let containers = pod.status.as_ref()?.container_statuses.as_ref()?;
    let trainer = containers.iter().find(|container| container.name == COMPONENT)?;
    trainer.state.as_ref()?.terminated.as_ref()
}

/// Returns when the trainer's process started.
pub fn process_start(pod: &Pod) -> Option<Timestamp> {
    let container = pod.status.as_ref()?.container_statuses.as_ref()?.first()?.state.as_ref()?;
    let running = container.running.as_ref().and_then(|running| running.started_at.as_ref());
    running.or_else(|| container.terminated.as_ref()?.started_at.as_ref()).map(|time| time.0)
}

/// Returns whether the pod was evicted, preempted, deleted, or lost with its node.
fn is_disrupted(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_some()
        || conditions.any(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True")
}

/// Returns whether a pod of an earlier attempt could still write a checkpoint.
pub fn may_still_write(pod: &Pod, now: Timestamp) -> bool {
    let lost = pod.metadata.deletion_timestamp.as_ref().is_some_and(|deletion| since(deletion.0, now) > LOST_NODE);
    !lost && terminated(pod).is_none() && !matches!(phase(pod), "Failed" | "Succeeded")
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

/// Returns whether the pod belongs to the Job, by UID: a FineTuneJob that was deleted and created again has Jobs of the
/// same names.
pub fn belongs_to(pod: &Pod, batch_job: Option<&Job>) -> bool {
    let uid = batch_job.and_then(|batch_job| batch_job.metadata.uid.as_ref());
    uid.is_some() && pod.labels().get(CONTROLLER_UID) == uid
}

/// Returns the pod's index in its Job, which is the rank of its node.
pub fn index(pod: &Pod) -> Option<u32> {
    pod.labels().get(INDEX).or_else(|| pod.annotations().get(INDEX))?.parse().ok()
}
