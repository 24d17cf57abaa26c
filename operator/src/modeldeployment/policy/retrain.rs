//! When another model is trained, and how that training ended.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use athanor_contract::{
    monitor::{MonitorStatus, Verdict},
    train::OffsetRange,
};
use athanor_crds::{
    APPROVE_ANNOTATION, Approval, FineTuneJob, FineTuneJobSpec, ModelDeploymentStatus, RetrainSpec, RetrainingOutcome,
    RetrainingProposal, RetrainingStatus, RevisionStatus,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::target;
use crate::{
    condition::{State, Value, cut},
    modeldeployment::names,
    time,
};

/// Most offset ranges of a FineTuneJob.
const MOST_RANGES: usize = 1024;
/// Most characters of an outcome's message.
const MOST_MESSAGE: usize = 1024;
/// Message of a retraining that changed nothing.
const SAME_MODEL: &str = "its model is the one that is served";
/// Added to a wait for the cooldown, so that it has passed when the wait is over.
const MARGIN: Duration = Duration::from_millis(100);
/// Longest cooldown that retrainings without another model lead to, unless the user's own is longer.
const LONGEST_COOLDOWN: Duration = Duration::from_secs(30 * 24 * 3600);

/// A FineTuneJob to create.
#[derive(Clone, Debug, PartialEq)]
pub struct NewRetraining {
    pub name: String,
    pub ranges: Vec<OffsetRange>,
    /// The artifact of the current revision.
    pub baseline: String,
}

/// Retraining from now on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Retraining {
    /// Number of retrainings that were created, with the one to create now.
    pub count: u64,
    pub create: Option<NewRetraining>,
    pub running: Option<RetrainingStatus>,
    pub last_retrained_at: Option<Time>,
    pub last: Option<RetrainingOutcome>,
    /// The retraining that the user may approve.
    pub proposal: Option<RetrainingProposal>,
    /// Retrainings in a row that led to no other model than the one that is served.
    pub fruitless: u32,
    /// Ranges of the retrainings that led to a model.
    pub used: Vec<OffsetRange>,
    /// The condition Retraining; absent without spec.retrain.
    pub condition: Option<Value>,
    pub wait: Option<Duration>,
}

/// What a retraining is decided on.
pub struct Inputs<'a> {
    pub deployment: &'a str,
    pub uid: &'a str,
    /// Name of the retraining that the user approved.
    pub approved: Option<&'a str>,
    pub current: Option<&'a RevisionStatus>,
    pub rolling_out: bool,
    /// FineTuneJobs that the deployment created.
    pub jobs: &'a [Arc<FineTuneJob>],
    pub now: Timestamp,
}

/// Returns the name of the retraining that the user approved.
pub fn approved(annotations: &BTreeMap<String, String>) -> Option<&str> {
    annotations.get(APPROVE_ANNOTATION).map(String::as_str)
}

/// Decides whether a retraining starts, and records how the last one ended.
pub fn retrain(spec: Option<&RetrainSpec>, status: &ModelDeploymentStatus, inputs: &Inputs<'_>) -> Retraining {
    let mut next = follow(status, inputs);
    if let Some(running) = &next.running {
        let trust = spec.map_or(String::new(), gates_warning);
        let message = format!("FineTuneJob {} trains on the events since {}{trust}", running.job, running.started_at.0);
        next.condition = Some(Value::new(State::True, "Training", message));
        return next;
    }
    let Some(spec) = spec else { return next };
    match propose(spec, status, inputs, &next) {
        Ok(new) => {
            let message = format!("FineTuneJob {} was created{}", new.name, gates_warning(spec));
            let ranges = new.ranges.clone();
            next.count += 1;
            next.running = Some(RetrainingStatus { job: new.name.clone(), ranges, started_at: Time(inputs.now) });
            next.condition = Some(Value::new(State::True, "Training", message));
            next.create = Some(new);
        }
        Err(hold) => {
            next.condition = Some(Value::new(State::False, hold.reason, hold.message));
            next.wait = hold.wait;
            next.proposal = hold.proposal.map(|proposal| *proposal);
        }
    }
    next
}

/// Says so if nothing but the feedback decides whether the new model is better.
fn gates_warning(spec: &RetrainSpec) -> String {
    let gates = &spec.template.spec.train.evaluate.gates;
    let is_feedback = |sources: &Vec<String>| sources.iter().all(|source| *source == spec.source_name);
    let trusts_feedback = gates.iter().all(|gate| gate.sources.as_ref().is_some_and(is_feedback));
    match (gates.is_empty(), trusts_feedback) {
        (true, _) => "; it has no gates, so any new model is served".into(),
        (false, true) => "; its gates rest on feedback alone: add one on the rows of a source that you trust".into(),
        (false, false) => String::new(),
    }
}

/// Returns the retraining under way, or the outcome of one that is over.
fn follow(status: &ModelDeploymentStatus, inputs: &Inputs<'_>) -> Retraining {
    let mut next = Retraining {
        count: status.retrainings,
        last_retrained_at: status.last_retrained_at.clone(),
        last: status.last_retraining.clone(),
        fruitless: status.fruitless_retrainings,
        used: status.retrained_ranges.clone(),
        ..Retraining::default()
    };
    let Some(running) = &status.retraining else {
        // The next one exists if an operator was killed before it could write the status. Its end is recorded by the
        // reconcile after this one.
        let name = following(status, inputs);
        let unrecorded = inputs.jobs.iter().find(|job| job.name_any() == name);
        next.count += u64::from(unrecorded.is_some());
        // An operator of an earlier version gave it another name.
        let runs = |job: &&Arc<FineTuneJob>| target::outcome(job).is_none_or(|outcome| !outcome.is_over());
        let unrecorded = unrecorded.or_else(|| inputs.jobs.iter().find(runs));
        next.running = unrecorded.map(|job| adopt(job, inputs.now));
        return next;
    };
    let job = inputs.jobs.iter().find(|job| job.name_any() == running.job);
    let (end, reason, message) = match job.map(|job| (job, target::outcome(job))) {
        Some((job, Some(outcome))) if outcome.is_over() => {
            let end = job.status.as_ref().and_then(|status| status.completion_time.clone());
            let has_model = outcome.status == "True";
            if has_model {
                next.used = together(&next.used, &running.ranges);
            }
            let is_served = has_model && trained_what_is_served(job, inputs.current);
            next.fruitless = if has_model && !is_served { 0 } else { next.fruitless.saturating_add(1) };
            (end, outcome.reason, if is_served { SAME_MODEL } else { outcome.message })
        }
        Some(_) => {
            next.running = Some(running.clone());
            return next;
        }
        None => (None, "Deleted", "the FineTuneJob was deleted before its end"),
    };
    next.last_retrained_at = Some(end.unwrap_or(Time(inputs.now)));
    next.last = Some(RetrainingOutcome {
        job: running.job.clone(),
        reason: reason.into(),
        message: cut(message, MOST_MESSAGE),
    });
    next
}

/// Returns whether the model that a job has trained was served before.
fn trained_what_is_served(job: &FineTuneJob, current: Option<&RevisionStatus>) -> bool {
    let served = current.filter(|current| current.job != Some(job.name_any())).and_then(|it| it.model_digest.as_ref());
    served.is_some() && served == target::passed(job).map(|summary| &summary.model_digest)
}

fn adopt(job: &FineTuneJob, now: Timestamp) -> RetrainingStatus {
    // The added source is the last one.
    let kafka = job.spec.train.data.sources.iter().rev().find_map(|source| source.kafka.as_ref());
    RetrainingStatus {
        job: job.name_any(),
        ranges: kafka.map(|kafka| kafka.ranges.clone()).unwrap_or_default(),
        started_at: job.metadata.creation_timestamp.clone().unwrap_or(Time(now)),
    }
}

/// Returns the name of the retraining after those that were created.
fn following(status: &ModelDeploymentStatus, inputs: &Inputs<'_>) -> String {
    names::retraining(inputs.deployment, inputs.uid, status.retrainings.saturating_add(1))
}

/// Returns whether a job was made from this template with the events of these ranges.
fn was_trained_on(job: &FineTuneJob, template: &FineTuneJobSpec, ranges: &[OffsetRange]) -> bool {
    let mut spec = job.spec.clone();
    let added = spec.train.data.sources.pop().and_then(|source| source.kafka);
    // What the deployment fills in, and what a user may change in a job that exists.
    spec.train.evaluate.baseline.clone_from(&template.train.evaluate.baseline);
    spec.credentials_secret_name.clone_from(&template.credentials_secret_name);
    (spec.suspend, spec.ttl_seconds_after_finished) = (template.suspend, template.ttl_seconds_after_finished);
    added.is_some_and(|kafka| kafka.ranges == ranges) && spec == *template
}

/// Why no retraining starts now.
struct Hold {
    reason: &'static str,
    message: String,
    wait: Option<Duration>,
    proposal: Option<Box<RetrainingProposal>>,
}

/// Returns the time between the end of a retraining and the next one: it doubles with each one that led to no other model.
fn cooldown(spec: &RetrainSpec, fruitless: u32) -> Duration {
    let own = Duration::from_secs(spec.cooldown_seconds.into());
    own.saturating_mul(1 << fruitless.min(24)).min(LONGEST_COOLDOWN.max(own))
}

/// Returns the proposal that waits for the user's approval, unless the model changed since.
fn waiting<'a>(
    spec: &RetrainSpec,
    status: &'a ModelDeploymentStatus,
    inputs: &Inputs<'_>,
    current: &RevisionStatus,
) -> Option<&'a RetrainingProposal> {
    let proposal = status.retraining_proposal.as_ref()?;
    let is_same = proposal.job == following(status, inputs) && proposal.revision == current.name;
    (spec.approval == Approval::Manual && is_same).then_some(proposal)
}

/// Returns the retraining to create, or the reason that there is none.
fn propose(
    spec: &RetrainSpec,
    status: &ModelDeploymentStatus,
    inputs: &Inputs<'_>,
    followed: &Retraining,
) -> Result<NewRetraining, Hold> {
    let ended = followed.last.as_ref().map_or_else(String::new, |last| {
        format!("; the last retraining, {}, ended as {}: {}", last.job, last.reason, last.message)
    });
    let hold = |reason, message: String| Hold { reason, message, wait: None, proposal: None };
    let monitored = inputs.current.zip(status.monitor.as_ref());
    let Some((current, monitor)) = monitored.filter(|(current, monitor)| current.name == monitor.revision) else {
        let message = format!("the monitor has no verdict on the current revision yet{ended}");
        return Err(hold("NoVerdict", message));
    };
    if monitor.verdict != Verdict::Drifted {
        return Err(hold("NotDrifted", format!("the model has not drifted{ended}")));
    }
    if inputs.rolling_out {
        return Err(hold("RollingOut", "another revision is being rolled out".into()));
    }
    if monitor.labelled < spec.minimum_samples {
        let message = format!(
            "{} requests have feedback; a retraining needs {} (minimumSamples){ended}",
            monitor.labelled, spec.minimum_samples
        );
        return Err(hold("TooFewSamples", message));
    }
    if let Some(last) = &followed.last_retrained_at {
        let left = time::left(cooldown(spec, followed.fruitless), last.0, inputs.now);
        if !left.is_zero() {
            let doubled = match followed.fruitless {
                0 => String::new(),
                count => format!(", doubled for each of the last {count} retrainings without another model"),
            };
            let message = format!("{} s of cooldownSeconds are left{doubled}{ended}", left.as_secs() + 1);
            return Err(Hold { wait: Some(left + MARGIN), ..hold("Cooldown", message) });
        }
    }
    let ranges = match waiting(spec, status, inputs, current) {
        // The user approves a name: it must not change with every event.
        Some(proposal) => proposal.ranges.clone(),
        None => ranges(monitor, &followed.used).map_err(|message| hold("NoEvents", message))?,
    };
    if let Some(job) = inputs.jobs.iter().find(|job| was_trained_on(job, &spec.template.spec, &ranges)) {
        return Err(hold("NoNewEvents", format!("{} was already trained on these events{ended}", job.name_any())));
    }
    let name = following(status, inputs);
    if spec.approval == Approval::Manual && inputs.approved != Some(&name) {
        let message = format!(
            "to start it: kubectl annotate modeldeployment {} --overwrite {APPROVE_ANNOTATION}={name}{}{ended}",
            inputs.deployment,
            gates_warning(spec)
        );
        let proposal = RetrainingProposal { job: name, revision: current.name.clone(), ranges };
        return Err(Hold { proposal: Some(Box::new(proposal)), ..hold("WaitingForApproval", message) });
    }
    Ok(NewRetraining { name, ranges, baseline: current.model_uri.clone() })
}

/// Returns one range for each partition, from the first begin to the last end.
fn together(before: &[OffsetRange], now: &[OffsetRange]) -> Vec<OffsetRange> {
    let mut by_partition: BTreeMap<i32, OffsetRange> = BTreeMap::new();
    for range in before.iter().chain(now) {
        let whole = by_partition.entry(range.partition).or_insert(*range);
        whole.begin = whole.begin.min(range.begin);
        whole.end = whole.end.max(range.end);
    }
    by_partition.into_values().collect()
}

/// Returns the ranges of the current revision's events and of the retrainings before it, with all that is between them: the
/// events of a canary, and those that the revision before answered after its last retraining had begun.
fn ranges(monitor: &MonitorStatus, used: &[OffsetRange]) -> Result<Vec<OffsetRange>, String> {
    let now: Vec<OffsetRange> = monitor.ranges.iter().filter(|range| range.begin < range.end).copied().collect();
    if now.is_empty() {
        return Err("the monitor has no range of events".into());
    }
    let ranges = together(used, &now);
    if ranges.len() > MOST_RANGES {
        return Err(format!(
            "the monitor has {} ranges of events; a FineTuneJob has at most {MOST_RANGES}",
            ranges.len()
        ));
    }
    Ok(ranges)
}
