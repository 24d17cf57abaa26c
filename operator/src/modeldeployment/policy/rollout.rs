//! How a new model takes over: the steps of a canary.

use std::{collections::BTreeMap, time::Duration};

use athanor_contract::{Decimal, serve::RevisionAnalysis};
use athanor_crds::{
    CanarySpec, CandidateStatus, ModelDeploymentStatus, RetiredRevision, RevisionCounts, RevisionStatus,
    condition as types,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::compare::{self, Worse};
use crate::{
    condition::{self, State, Value},
    modeldeployment::observe::{counts::Counts, workload::Workload},
    time::{left, since},
};

/// Time in which a revision without traffic may still answer: a router's request timeout and its drain.
const DRAIN: Duration = Duration::from_secs(50);
/// Shortest and longest wait between two looks at a running step: a twentieth of its age, so that a fault is found
/// soon in relation to what it has cost, and a step of days costs little.
const POLL: Duration = Duration::from_secs(1);
const LONGEST_POLL: Duration = Duration::from_secs(15);
/// Time beyond the pauses of its steps after which a rollout without a verdict is rolled back, by default.
const DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);
/// Wait for the pods of a candidate; their Deployment is watched.
const PODS: Duration = Duration::from_secs(5);
/// Most characters of a candidate's message in the schema.
const MOST_MESSAGE: usize = 1024;
/// Most revisions that are remembered as failed.
const MOST_FAILED: usize = 32;

/// Revisions from now on.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    pub current: Option<RevisionStatus>,
    pub candidate: Option<CandidateStatus>,
    pub previous: Option<RetiredRevision>,
    pub failed: Vec<String>,
    /// Completion time of the newest job whose model was rolled back.
    pub settled_until: Option<Time>,
    /// The condition Progressing.
    pub progressing: Value,
    pub wait: Option<Duration>,
}

/// What a rollout is decided on.
pub struct Inputs<'a> {
    /// Workloads by revision. One whose servers have not loaded it has no available pods.
    pub workloads: &'a BTreeMap<String, Workload>,
    /// Why a pod does not run or has not loaded the revision, by revision.
    pub waiting: &'a BTreeMap<String, String>,
    pub router_ready: bool,
    /// Absent if a router did not answer.
    pub counts: Option<&'a Counts>,
    /// Digest of the routers that counted, each with its restarts.
    pub routers: &'a str,
    pub now: Timestamp,
}

impl Inputs<'_> {
    fn counts_of(&self, revision: &str) -> RevisionAnalysis {
        self.counts.and_then(|counts| counts.get(revision)).cloned().unwrap_or_default()
    }

    /// What the routers have counted for a revision. `latency_limit` is in milliseconds; without one no answer is slow.
    fn totals_of(&self, revision: &str, latency_limit: Option<u32>) -> RevisionCounts {
        let RevisionAnalysis { requests, errors, refused, latency, feedback_total, feedback_correct, .. } =
            self.counts_of(revision);
        let wrong = feedback_total.saturating_sub(feedback_correct);
        let slow = latency_limit.map_or(0, |limit| latency.slower_than(limit.into()));
        RevisionCounts { requests, errors, refused, judged: feedback_total, wrong, answered: latency.total(), slow }
    }
}

/// The counts since the routers had counted `before`. `None` if there are fewer: a router restarted.
fn since_then(now: RevisionCounts, before: RevisionCounts) -> Option<RevisionCounts> {
    Some(RevisionCounts {
        requests: now.requests.checked_sub(before.requests)?,
        errors: now.errors.checked_sub(before.errors)?,
        refused: now.refused.checked_sub(before.refused)?,
        judged: now.judged.checked_sub(before.judged)?,
        wrong: now.wrong.checked_sub(before.wrong)?,
        answered: now.answered.checked_sub(before.answered)?,
        slow: now.slow.checked_sub(before.slow)?,
    })
}

/// Decides which revisions there are, and how much traffic the candidate has.
pub fn rollout(
    spec: &CanarySpec,
    status: &ModelDeploymentStatus,
    target: Option<&RevisionStatus>,
    inputs: &Inputs<'_>,
) -> Rollout {
    let mut next = carry_on(status, inputs);
    let Some(target) = target else { return next };
    let Some(champion) = &next.current else {
        next.current = Some(target.clone());
        return next;
    };
    if champion.name == target.name {
        return next;
    }
    if next.failed.contains(&target.name) {
        let message =
            previous_message(status).unwrap_or_else(|| format!("revision {} was rolled back before", target.name));
        next.progressing = Value::new(State::False, "RolledBack", message);
        return next;
    }
    let answers = inputs.workloads.get(&champion.name).is_some_and(|workload| workload.available > 0);
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
        since: Time(inputs.now),
        started_at: Some(Time(inputs.now)),
        message: String::new(),
        baseline: RevisionCounts::default(),
        champion_baseline: RevisionCounts::default(),
        routers: String::new(),
        latency_limit_ms: None,
    });
    // The steps may have changed since: the rollout continues at the last of them.
    let last = spec.steps.len().saturating_sub(1);
    let index = (candidate.step_index as usize).min(last);
    let Some(planned) = spec.steps.get(index) else { return next };
    let canary = Canary {
        spec,
        inputs,
        champion: champion.name.clone(),
        index,
        last,
        pause: Duration::from_secs(planned.pause_seconds.into()),
        percent: planned.traffic_percent,
        workload: inputs.workloads.get(&candidate.revision.name).cloned().unwrap_or_default(),
        candidate,
    };
    let decided = if canary.candidate.weight == 0 { canary.start(next) } else { canary.judge(next) };
    within_deadline(spec, decided, inputs.now)
}

/// Rolls a candidate back that is still there when the rollout should be over.
fn within_deadline(spec: &CanarySpec, mut next: Rollout, now: Timestamp) -> Rollout {
    let begun = next.candidate.as_ref().and_then(|candidate| candidate.started_at.as_ref());
    let Some(begun) = begun else { return next };
    let (deadline, origin) = match spec.deadline_seconds {
        Some(seconds) => (Duration::from_secs(seconds.into()), "deadlineSeconds"),
        None => {
            let pauses = spec.steps.iter().map(|step| Duration::from_secs(step.pause_seconds.into()));
            (pauses.sum::<Duration>() + DEADLINE, "the default of deadlineSeconds")
        }
    };
    let left = left(deadline, begun.0, now);
    if !left.is_zero() {
        next.wait = Some(next.wait.map_or(left, |wait| wait.min(left)));
        return next;
    }
    let Some(candidate) = next.candidate.take() else { return next };
    let why = format!("no verdict within {} s ({origin}): {}", deadline.as_secs(), candidate.message);
    give_up(next, candidate.revision, &why, now)
}

/// Takes the traffic from a revision for good.
fn give_up(mut next: Rollout, revision: RevisionStatus, why: &str, now: Timestamp) -> Rollout {
    let ends = [next.settled_until, revision.completed_at.clone()];
    next.settled_until = ends.into_iter().flatten().max_by_key(|time| time.0);
    next.progressing = Value::new(State::False, "RolledBack", format!("{} was rolled back: {why}", revision.name));
    next.failed.push(revision.name.clone());
    let excess = next.failed.len().saturating_sub(MOST_FAILED);
    next.failed.drain(..excess);
    next.previous = Some(retire(revision, now));
    next.wait = Some(POLL);
    next
}

/// Returns a revision that has no traffic any more and is answering its last requests.
fn retire(revision: RevisionStatus, now: Timestamp) -> RetiredRevision {
    let RevisionStatus { name, model_uri, base, .. } = revision;
    let model_uri = base.is_some().then_some(model_uri);
    RetiredRevision { name, model_uri, base, since: Time(now) }
}

/// Returns the revisions as they are, without those whose requests have drained.
fn carry_on(status: &ModelDeploymentStatus, inputs: &Inputs<'_>) -> Rollout {
    let now = inputs.now;
    let ready = |name: &str| inputs.workloads.get(name).is_some_and(Workload::is_ready);
    let mut current = status.current_revision.clone();
    if let Some(revision) = current.as_mut().filter(|revision| revision.ready_at.is_none() && ready(&revision.name)) {
        revision.ready_at = Some(Time(now));
    }
    let draining = status.previous_revision.clone().filter(|previous| since(previous.since.0, now) < DRAIN);
    // A revision that has its traffic back is kept.
    let previous = draining.filter(|previous| current.as_ref().is_none_or(|current| current.name != previous.name));
    let wait = previous.as_ref().map(|previous| left(DRAIN, previous.since.0, now) + POLL);
    Rollout {
        current,
        candidate: None,
        previous,
        failed: status.failed_revisions.clone(),
        settled_until: status.settled_until.clone(),
        progressing: Value::new(State::False, "Stable", ""),
        wait,
    }
}

/// Returns the message of the last rollback, which stays as long as its revision is the target.
fn previous_message(status: &ModelDeploymentStatus) -> Option<String> {
    let progressing = condition::get(&status.conditions, types::PROGRESSING)?;
    (progressing.reason == "RolledBack").then(|| progressing.message.clone())
}

/// A candidate at a step of its canary.
struct Canary<'a> {
    spec: &'a CanarySpec,
    inputs: &'a Inputs<'a>,
    /// Name of the revision that it is compared with.
    champion: String,
    candidate: CandidateStatus,
    workload: Workload,
    index: usize,
    last: usize,
    /// Pause of the step.
    pause: Duration,
    /// Share of the traffic in the step.
    percent: u32,
}

impl Canary<'_> {
    /// Gives the candidate its first traffic once its pods are ready.
    fn start(mut self, mut next: Rollout) -> Rollout {
        next.wait = Some(PODS);
        let waiting = self.inputs.waiting.get(&self.candidate.revision.name);
        if let Some(stuck) = &self.workload.stuck {
            let why = format!("its pods did not become ready: {}", waiting.unwrap_or(stuck));
            return self.roll_back(next, &why);
        }
        if !self.workload.is_ready() {
            let waiting = waiting.map(|why| format!(": {why}")).unwrap_or_default();
            let message = format!("{}{waiting}", self.workload.progress());
            return self.hold(next, "WaitingForPods", message);
        }
        if !self.inputs.router_ready || self.inputs.counts.is_none() {
            return self.hold(next, "WaitingForPods", "not all routers answer".into());
        }
        self.candidate.revision.ready_at.get_or_insert(Time(self.inputs.now));
        let (index, percent) = (self.index, self.percent);
        self.begin(next, index, percent)
    }

    /// Whether the candidate has all of the traffic and no pod of it answers. A missing workload counts as one without
    /// pods. Servers that the champion shares are no fault of the candidate.
    fn is_dead(&self, next: &Rollout) -> bool {
        let base = self.candidate.revision.base.as_ref();
        let is_shared = base.is_some() && next.current.as_ref().and_then(|current| current.base.as_ref()) == base;
        let workload = self.inputs.workloads.get(&self.candidate.revision.name);
        self.candidate.weight == 100 && !is_shared && workload.is_none_or(Workload::is_dead)
    }

    /// Judges a candidate that has traffic: rolls it back, holds it, or takes it to the next step.
    fn judge(self, mut next: Rollout) -> Rollout {
        if self.is_dead(&next) {
            // No other revision answers: neither the pause nor the number of requests matters.
            let why = format!("no pod of it answers at 100 %: {}", self.workload.progress());
            return self.roll_back(next, &why);
        }
        let age = since(self.candidate.since.0, self.inputs.now);
        let poll = (age / 20).clamp(POLL, LONGEST_POLL);
        next.wait = Some(poll);
        if self.inputs.counts.is_none() {
            return self.hold(next, "Inconclusive", "on hold: not all routers answer".into());
        }
        let is_same = self.candidate.routers == self.inputs.routers
            && self.candidate.latency_limit_ms == self.spec.analysis.max_latency_p95_ms;
        let Some(step) = self.step().filter(|_| is_same) else {
            // A router came, went or restarted, and its counts with it, or other answers count as slow.
            let (index, percent) = (self.index, self.percent);
            return self.begin(next, index, percent);
        };
        let RevisionCounts { requests, errors, .. } = step.candidate;
        let place = format!("step {} of {}", self.index + 1, self.last + 1);
        let at = format!("{place} at {} %", self.candidate.weight);
        let numbers = format!("{at}: {errors} of {requests} requests failed");
        if let Some(why) = self.fault(&step) {
            return self.roll_back(next, &format!("{numbers}{why}"));
        }
        let left = left(self.pause, self.candidate.since.0, self.inputs.now);
        if !left.is_zero() {
            next.wait = Some(left.min(poll));
            // Without the counts: the status would be written with every request.
            let message = format!("{at} lasts {} s", self.pause.as_secs());
            return self.hold(next, "Canary", message);
        }
        let minimum = self.spec.analysis.minimum_requests;
        if requests < minimum {
            return self.hold(next, "Inconclusive", format!("on hold at {place}: a verdict needs {minimum} requests"));
        }
        if !compare::is_within(&step) {
            // Without the counts, as above.
            let message = format!("on hold at {place}: more requests fail than maxErrorPercent, too few for a verdict");
            return self.hold(next, "Inconclusive", message);
        }
        if !compare::is_fast(&step) {
            let message =
                format!("on hold at {place}: more answers are slower than maxLatencyP95Ms, too few for a verdict");
            return self.hold(next, "Inconclusive", message);
        }
        if !self.workload.is_ready() {
            let message = format!("on hold: {}", self.workload.progress());
            return self.hold(next, "Inconclusive", message);
        }
        if self.index < self.last {
            let index = self.index + 1;
            let percent = self.spec.steps.get(index).map_or(100, |step| step.traffic_percent);
            return self.begin(next, index, percent);
        }
        self.promote(next, &numbers)
    }

    /// The counts of the step so far; `None` if a router's counts began again.
    fn step(&self) -> Option<compare::Step> {
        let latency_limit = self.spec.analysis.max_latency_p95_ms;
        let candidate = self.inputs.totals_of(&self.candidate.revision.name, latency_limit);
        let champion = self.inputs.totals_of(&self.champion, latency_limit);
        Some(compare::Step {
            candidate: since_then(candidate, self.candidate.baseline)?,
            champion: since_then(champion, self.candidate.champion_baseline)?,
            champion_so_far: champion,
            share: f64::from(self.candidate.weight) / 100.0,
            limit: self.spec.analysis.max_error_percent.get() / 100.0,
            accuracy_loss: self.spec.analysis.max_accuracy_loss.map(Decimal::get),
            has_latency_limit: latency_limit.is_some(),
            steps: self.last + 1,
        })
    }

    /// Why the candidate has to go, if anything, as the end of a sentence that says how many of its requests failed.
    fn fault(&self, step: &compare::Step) -> Option<String> {
        let compare::Step { candidate, champion, .. } = *step;
        let analysis = &self.spec.analysis;
        Some(match compare::worse(step)? {
            Worse::Errors => format!(", of the champion's {} of {}", champion.errors, champion.requests),
            Worse::Limit => {
                let percent = candidate.errors as f64 * 100.0 / candidate.requests.max(1) as f64;
                let limit = analysis.max_error_percent;
                format!(" ({percent:.2} %), more than the limit of {limit} % (maxErrorPercent)")
            }
            Worse::Refusals => {
                format!(" and {} were refused, of the champion's {}", candidate.refused, champion.refused)
            }
            Worse::Accuracy => format!(
                " and {} of {} answers with feedback were wrong, of the champion's {} of {}",
                candidate.wrong, candidate.judged, champion.wrong, champion.judged
            ),
            Worse::Latency => {
                let limit = analysis.max_latency_p95_ms.unwrap_or_default();
                let (slow, answered) = (candidate.slow, candidate.answered);
                let percent = slow as f64 * 100.0 / answered.max(1) as f64;
                format!(
                    " and {slow} of {answered} answers ({percent:.1} %) took longer than {limit} ms (maxLatencyP95Ms), \
                     of the champion's {} of {}",
                    champion.slow, champion.answered
                )
            }
        })
    }

    /// Begins a step; its requests count from what the routers have counted so far.
    fn begin(mut self, mut next: Rollout, index: usize, weight: u32) -> Rollout {
        next.wait = Some(POLL);
        let latency_limit = self.spec.analysis.max_latency_p95_ms;
        self.candidate.step_index = u32::try_from(index).unwrap_or(u32::MAX);
        self.candidate.weight = weight;
        self.candidate.since = Time(self.inputs.now);
        self.candidate.baseline = self.inputs.totals_of(&self.candidate.revision.name, latency_limit);
        self.candidate.champion_baseline = self.inputs.totals_of(&self.champion, latency_limit);
        self.candidate.routers = self.inputs.routers.to_owned();
        self.candidate.latency_limit_ms = latency_limit;
        self.hold(next, "Canary", format!("step {} began at {weight} %", index + 1))
    }

    /// Keeps the candidate, with a message.
    fn hold(self, mut next: Rollout, reason: &'static str, message: String) -> Rollout {
        // The last message of a pod that crashed may be longer than the field.
        let candidate = CandidateStatus { message: condition::cut(&message, MOST_MESSAGE), ..self.candidate };
        let message = format!("{}: {}", candidate.revision.name, candidate.message);
        next.progressing = Value::new(State::True, reason, message);
        next.candidate = Some(candidate);
        next
    }

    fn promote(self, mut next: Rollout, numbers: &str) -> Rollout {
        let message = format!("{} was promoted; {numbers}", self.candidate.revision.name);
        next.previous = next.current.take().map(|champion| retire(champion, self.inputs.now));
        next.current = Some(self.candidate.revision);
        next.progressing = Value::new(State::False, "Promoted", message);
        next.wait = Some(POLL);
        next
    }

    fn roll_back(self, next: Rollout, why: &str) -> Rollout {
        give_up(next, self.candidate.revision, why, self.inputs.now)
    }
}
