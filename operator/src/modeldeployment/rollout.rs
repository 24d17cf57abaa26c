//! How a new model takes over: the steps of a canary, from what is observed and the time alone.

use std::{collections::BTreeMap, time::Duration};

use athanor_crds::{AnalysisSpec, CanarySpec, CandidateStatus, ModelDeploymentStatus, RetiredRevision, RevisionStatus};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{analysis::Counts, dereference::Workload};
use crate::{condition::State, finetunejob::since};

/// A revision that lost its traffic may still answer what it was asked: a router's request timeout and its drain.
const DRAIN: Duration = Duration::from_secs(50);
/// How often a running step is looked at.
const POLL: Duration = Duration::from_secs(1);
/// Characters of a candidate's message, as the schema has it.
const MOST_MESSAGE: usize = 1024;
/// Most revisions remembered as failed.
const MOST_FAILED: usize = 32;

/// Revisions from now on.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    pub current: Option<RevisionStatus>,
    pub candidate: Option<CandidateStatus>,
    pub previous: Option<RetiredRevision>,
    pub failed: Vec<String>,
    /// The condition Progressing.
    pub state: State,
    pub reason: &'static str,
    pub message: String,
    pub wait: Option<Duration>,
}

/// What a rollout is decided on.
pub struct Seen<'a> {
    pub workloads: &'a BTreeMap<String, Workload>,
    pub waiting: &'a BTreeMap<String, String>,
    pub router_ready: bool,
    pub counts: Option<&'a BTreeMap<String, Counts>>,
}

pub fn rollout(
    spec: &CanarySpec,
    status: &ModelDeploymentStatus,
    target: Option<&RevisionStatus>,
    seen: &Seen<'_>,
    now: Timestamp,
) -> Rollout {
    let ready = |name: &str| seen.workloads.get(name).is_some_and(Workload::is_ready);
    let mut current = status.current_revision.clone();
    if let Some(revision) = current.as_mut().filter(|revision| revision.ready_at.is_none() && ready(&revision.name)) {
        revision.ready_at = Some(Time(now));
    }
    let mut next = Rollout {
        current,
        candidate: None,
        previous: status.previous_revision.clone().filter(|previous| since(previous.since.0, now) < DRAIN),
        failed: status.failed_revisions.clone(),
        state: State::False,
        reason: "Stable",
        message: String::new(),
        wait: None,
    };
    // A revision that took the traffic back is not on its way out.
    next.previous =
        next.previous.filter(|previous| next.current.as_ref().is_none_or(|current| current.name != previous.name));
    next.wait = next.previous.as_ref().map(|previous| DRAIN.saturating_sub(since(previous.since.0, now)) + POLL);
    let Some(target) = target else { return next };
    let Some(champion) = &next.current else {
        next.current = Some(target.clone());
        return next;
    };
    if champion.name == target.name {
        return next;
    }
    if next.failed.contains(&target.name) {
        next.reason = "RolledBack";
        next.message =
            previous_message(status).unwrap_or_else(|| format!("revision {} was rolled back before", target.name));
        return next;
    }
    let answers = seen.workloads.get(&champion.name).is_some_and(|workload| workload.available > 0);
    if champion.ready_at.is_none() && !answers {
        // There is no traffic to protect.
        next.current = Some(target.clone());
        return next;
    }
    let running = status.candidate.clone().filter(|candidate| candidate.revision.name == target.name);
    let candidate = running.unwrap_or_else(|| CandidateStatus {
        revision: target.clone(),
        step_index: 0,
        weight: 0,
        since: Time(now),
        message: String::new(),
        baseline_requests: 0,
        baseline_errors: 0,
    });
    step(spec, candidate, seen, next, now)
}

/// The message of the rollback, kept as long as its revision stays the target.
fn previous_message(status: &ModelDeploymentStatus) -> Option<String> {
    let progressing = crate::condition::get(&status.conditions, athanor_crds::condition::PROGRESSING)?;
    (progressing.reason == "RolledBack").then(|| progressing.message.clone())
}

fn step(
    spec: &CanarySpec,
    mut candidate: CandidateStatus,
    seen: &Seen<'_>,
    mut next: Rollout,
    now: Timestamp,
) -> Rollout {
    let name = candidate.revision.name.clone();
    let workload = seen.workloads.get(&name).cloned().unwrap_or_default();
    // The operator was told other steps meanwhile: go on at the last of them.
    let last = spec.steps.len().saturating_sub(1);
    let index = (candidate.step_index as usize).min(last);
    let Some(planned) = spec.steps.get(index).copied() else { return next };
    next.state = State::True;
    next.wait = Some(POLL);

    if candidate.weight == 0 {
        if let Some(stuck) = &workload.stuck {
            let why = seen.waiting.get(&name).unwrap_or(stuck);
            return roll_back(next, candidate, format!("its pods did not become ready: {why}"), now);
        }
        let hold = if !workload.is_ready() {
            next.wait = Some(Duration::from_secs(5));
            let waiting = seen.waiting.get(&name).map(|why| format!(": {why}")).unwrap_or_default();
            Some(format!("{} of {} pods are ready{waiting}", workload.available, workload.desired.max(1)))
        } else if !seen.router_ready || seen.counts.is_none() {
            Some("the routers do not answer".into())
        } else {
            None
        };
        if let Some(message) = hold {
            return going_on(next, "WaitingForPods", CandidateStatus { message, ..candidate });
        }
        candidate.revision.ready_at.get_or_insert(Time(now));
        return going_on(next, "Canary", begin(candidate, index, planned.traffic_percent, seen, now));
    }

    let Some(counts) = seen.counts else {
        let message = "holding: not every router answers".into();
        return going_on(next, "Inconclusive", CandidateStatus { message, ..candidate });
    };
    let counts = counts.get(&name).copied().unwrap_or_default();
    let (Some(requests), Some(errors)) = (
        counts.requests.checked_sub(candidate.baseline_requests),
        counts.errors.checked_sub(candidate.baseline_errors),
    ) else {
        // A router started again and counts from zero.
        return going_on(next, "Canary", begin(candidate, index, planned.traffic_percent, seen, now));
    };
    let numbers =
        format!("step {} of {} at {} %: {errors} of {requests} requests failed", index + 1, last + 1, candidate.weight);
    if let Some(broken) = broken_limit(&spec.analysis, requests, errors, counts.latency_p95_ms) {
        return roll_back(next, candidate, format!("{numbers}, {broken}"), now);
    }
    let passed = since(candidate.since.0, now);
    let pause = Duration::from_secs(planned.pause_seconds.into());
    if passed < pause {
        next.wait = Some((pause - passed).min(POLL));
        // Without the counts: a status that changes with every request would be written as often.
        let message =
            format!("step {} of {} at {} % lasts {} s", index + 1, last + 1, candidate.weight, planned.pause_seconds);
        return going_on(next, "Canary", CandidateStatus { message, ..candidate });
    }
    if requests < spec.analysis.minimum_requests {
        let message = format!(
            "holding at step {} of {}: a verdict needs {} requests",
            index + 1,
            last + 1,
            spec.analysis.minimum_requests
        );
        return going_on(next, "Inconclusive", CandidateStatus { message, ..candidate });
    }
    if !workload.is_ready() {
        let message = format!("{} of {} pods are ready", workload.available, workload.desired.max(1));
        // With all of the traffic there is nobody else to answer.
        if candidate.weight == 100 && workload.available == 0 {
            return roll_back(next, candidate, message, now);
        }
        return going_on(next, "Inconclusive", CandidateStatus { message: format!("holding: {message}"), ..candidate });
    }
    if index < last {
        let percent = spec.steps.get(index + 1).map_or(100, |step| step.traffic_percent);
        return going_on(next, "Canary", begin(candidate, index + 1, percent, seen, now));
    }
    let retired = next.current.take().map(|champion| RetiredRevision { name: champion.name, since: Time(now) });
    next.message = format!("{name} was promoted; {numbers}");
    next.current = Some(candidate.revision);
    next.previous = retired;
    next.state = State::False;
    next.reason = "Promoted";
    next
}

fn going_on(mut next: Rollout, reason: &'static str, candidate: CandidateStatus) -> Rollout {
    // A crash's last words may be longer than the field.
    let candidate = CandidateStatus { message: crate::condition::cut(&candidate.message, MOST_MESSAGE), ..candidate };
    next.reason = reason;
    next.message = format!("{}: {}", candidate.revision.name, candidate.message);
    next.candidate = Some(candidate);
    next
}

/// A step from now on, counted from what the routers have now.
fn begin(candidate: CandidateStatus, index: usize, weight: u32, seen: &Seen<'_>, now: Timestamp) -> CandidateStatus {
    let counts = seen.counts.and_then(|counts| counts.get(&candidate.revision.name)).copied().unwrap_or_default();
    CandidateStatus {
        step_index: u32::try_from(index).unwrap_or(u32::MAX),
        weight,
        since: Time(now),
        message: format!("step {} began at {weight} %", index + 1),
        baseline_requests: counts.requests,
        baseline_errors: counts.errors,
        ..candidate
    }
}

/// The limit that the numbers break. Fewer requests than a verdict needs break none.
fn broken_limit(analysis: &AnalysisSpec, requests: u64, errors: u64, p95: f64) -> Option<String> {
    if requests == 0 || requests < analysis.minimum_requests {
        return None;
    }
    let limit = analysis.max_error_percent.get();
    let percent = errors as f64 * 100.0 / requests as f64;
    if percent > limit {
        return Some(format!("{percent:.2} % and the limit is {limit} % (maxErrorPercent)"));
    }
    let limit = analysis.max_latency_p95_ms?;
    (p95 > f64::from(limit))
        .then(|| format!("the 95th percentile of latency is {p95:.0} ms and the limit is {limit} ms (maxLatencyP95Ms)"))
}

fn roll_back(mut next: Rollout, candidate: CandidateStatus, why: String, now: Timestamp) -> Rollout {
    let name = candidate.revision.name;
    next.message = format!("{name} was rolled back: {why}");
    next.failed.push(name.clone());
    let excess = next.failed.len().saturating_sub(MOST_FAILED);
    next.failed.drain(..excess);
    next.previous = Some(RetiredRevision { name, since: Time(now) });
    next.candidate = None;
    next.state = State::False;
    next.reason = "RolledBack";
    next.wait = Some(POLL);
    next
}
