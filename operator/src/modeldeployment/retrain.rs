//! When another model is trained, and what became of it.

use std::time::Duration;

use athanor_contract::{serve::Verdict, train::OffsetRange};
use athanor_crds::{
    APPROVE_ANNOTATION, Approval, FineTuneJob, ModelDeploymentStatus, RetrainSpec, RetrainingOutcome, RetrainingStatus,
    RevisionStatus,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::{names, target};
use crate::{
    condition::{State, cut},
    finetunejob::since,
};

/// Offset ranges that a FineTuneJob takes.
const MOST_RANGES: usize = 1024;

/// A FineTuneJob to create.
#[derive(Clone, Debug, PartialEq)]
pub struct NewRetraining {
    pub name: String,
    pub ranges: Vec<OffsetRange>,
    /// The champion's artifact.
    pub baseline: String,
}

/// Retraining from now on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Retraining {
    pub create: Option<NewRetraining>,
    pub running: Option<RetrainingStatus>,
    pub last_retrained_at: Option<Time>,
    pub last: Option<RetrainingOutcome>,
    /// The condition Retraining; absent without spec.retrain.
    pub condition: Option<(State, String, String)>,
    pub wait: Option<Duration>,
}

/// What a retraining is decided on.
pub struct Subject<'a> {
    pub deployment: &'a str,
    pub uid: &'a str,
    /// Name of a retraining that a person let start.
    pub approved: Option<&'a str>,
    pub current: Option<&'a RevisionStatus>,
    pub rolling_out: bool,
    /// FineTuneJobs of this deployment.
    pub jobs: &'a [FineTuneJob],
}

/// What a person lets start.
pub fn approved(annotations: &std::collections::BTreeMap<String, String>) -> Option<&str> {
    annotations.get(APPROVE_ANNOTATION).map(String::as_str)
}

pub fn retrain(
    spec: Option<&RetrainSpec>,
    status: &ModelDeploymentStatus,
    subject: &Subject<'_>,
    now: Timestamp,
) -> Retraining {
    let mut next = Retraining {
        last_retrained_at: status.last_retrained_at.clone(),
        last: status.last_retraining.clone(),
        ..Retraining::default()
    };
    if let Some(running) = status.retraining.as_ref() {
        let job = subject.jobs.iter().find(|job| job.name_any() == running.job);
        match job.map(target::outcome) {
            Some(Some((value, reason, message))) if value != "Unknown" => {
                let end = job.and_then(|job| job.status.as_ref()?.completion_time.clone());
                next.last_retrained_at = Some(end.unwrap_or(Time(now)));
                next.last = Some(RetrainingOutcome {
                    job: running.job.clone(),
                    reason: reason.into(),
                    message: cut(message, 1024),
                });
            }
            Some(_) => next.running = Some(running.clone()),
            None => {
                next.last_retrained_at = Some(Time(now));
                next.last = Some(RetrainingOutcome {
                    job: running.job.clone(),
                    reason: "Deleted".into(),
                    message: "it was deleted before its end".into(),
                });
            }
        }
    } else if let Some(job) =
        subject.jobs.iter().find(|job| target::outcome(job).is_none_or(|(value, ..)| value == "Unknown"))
    {
        // Created before the operator could write that down.
        next.running = Some(adopt(job, now));
    }
    if let Some(running) = &next.running {
        let message = format!("FineTuneJob {} trains on the events since {}", running.job, running.started_at.0);
        next.condition = Some((State::True, "Training".into(), message));
        return next;
    }
    let Some(spec) = spec else { return next };
    let hold = |next: Retraining, reason: &str, message: String| Retraining {
        condition: Some((State::False, reason.into(), message)),
        ..next
    };
    let ended = next.last.as_ref().map_or_else(String::new, |last| {
        format!("; the last one, {}, ended as {}: {}", last.job, last.reason, last.message)
    });
    let Some((current, monitor)) =
        subject.current.zip(status.monitor.as_ref()).filter(|(current, monitor)| current.name == monitor.revision)
    else {
        return hold(next, "NoVerdict", format!("the monitor has no verdict on the current revision yet{ended}"));
    };
    if monitor.verdict != Verdict::Drifted {
        return hold(next, "NotDrifted", format!("the model is not stale{ended}"));
    }
    if subject.rolling_out {
        return hold(next, "RollingOut", "another revision is on its way".into());
    }
    if monitor.labelled < spec.minimum_samples {
        let message = format!(
            "{} requests with feedback, and a retraining needs {} (minimumSamples){ended}",
            monitor.labelled, spec.minimum_samples
        );
        return hold(next, "TooFewSamples", message);
    }
    if let Some(last) = &next.last_retrained_at {
        let left = Duration::from_secs(spec.cooldown_seconds.into()).saturating_sub(since(last.0, now));
        if !left.is_zero() {
            next.wait = Some(left + Duration::from_millis(100));
            return hold(next, "Cooldown", format!("{} s left of cooldownSeconds{ended}", left.as_secs() + 1));
        }
    }
    let ranges: Vec<OffsetRange> = monitor.ranges.iter().filter(|range| range.begin < range.end).copied().collect();
    if ranges.is_empty() || ranges.len() > MOST_RANGES {
        return hold(next, "NoEvents", format!("the monitor names {} ranges of events", ranges.len()));
    }
    let name = names::retraining(subject.deployment, subject.uid, &spec.template, &ranges);
    if subject.jobs.iter().any(|job| job.name_any() == name) {
        return hold(next, "NoNewEvents", format!("{name} was trained on these events already{ended}"));
    }
    if spec.approval == Approval::Manual && subject.approved != Some(&name) {
        let message = format!(
            "kubectl annotate modeldeployment {} --overwrite {APPROVE_ANNOTATION}={name} starts it{ended}",
            subject.deployment
        );
        return hold(next, "WaitingForApproval", message);
    }
    next.running = Some(RetrainingStatus { job: name.clone(), ranges: ranges.clone(), started_at: Time(now) });
    next.condition = Some((State::True, "Training".into(), format!("FineTuneJob {name} was created")));
    next.create = Some(NewRetraining { name, ranges, baseline: current.model_uri.clone() });
    next
}

fn adopt(job: &FineTuneJob, now: Timestamp) -> RetrainingStatus {
    let sources = &job.spec.train.data.sources;
    RetrainingStatus {
        job: job.name_any(),
        // The added source is the last.
        ranges: sources
            .iter()
            .rev()
            .find_map(|source| source.kafka.as_ref())
            .map(|kafka| kafka.ranges.clone())
            .unwrap_or_default(),
        started_at: job.metadata.creation_timestamp.clone().unwrap_or(Time(now)),
    }
}
