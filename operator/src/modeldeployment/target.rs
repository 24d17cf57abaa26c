//! Which model a deployment should serve.
//!
//! `spec.model` names a base. Retrainings of the deployment that ended after the user's last change of `spec.model` compete with
//! it: the newest wins. The current revision competes too, so that it stays when its job is deleted.

use athanor_crds::{FineTuneJob, ModelDeploymentStatus, ObservedSource, RevisionStatus, condition as types};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::{names, validate::Source};
use crate::condition;

/// The model to serve, or why there is none.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    Model(RevisionStatus),
    Missing { reason: &'static str, message: String },
}

/// `spec.model` as seen now; its time moves when it changes.
pub fn source(status: &ModelDeploymentStatus, source: &Source, now: Timestamp) -> ObservedSource {
    let value = match source {
        Source::Uri(uri) => uri.clone(),
        Source::Job(name) => format!("job/{name}"),
    };
    match &status.source {
        None => ObservedSource { value, since: None },
        Some(before) if before.value == value => before.clone(),
        Some(_) => ObservedSource { value, since: Some(Time(now)) },
    }
}

pub fn target(
    deployment: &str,
    base: &Source,
    observed: &ObservedSource,
    base_job: Option<&FineTuneJob>,
    retrainings: &[FineTuneJob],
    status: &ModelDeploymentStatus,
) -> Target {
    let after_change = |completed: Option<&Time>| match (&observed.since, completed) {
        (None, _) => true,
        (Some(since), Some(completed)) => completed.0 > since.0,
        (Some(_), None) => false,
    };
    let base_name = if let Source::Job(name) = base { Some(name.as_str()) } else { None };
    let mut pool: Vec<RevisionStatus> = Vec::new();
    pool.extend(base_job.and_then(|job| revision(deployment, job)));
    let retrained = retrainings.iter().filter_map(|job| revision(deployment, job));
    pool.extend(retrained.filter(|revision| after_change(revision.completed_at.as_ref())));
    let current = status.current_revision.iter().filter(|current| match current.job.as_deref() {
        None => false,
        Some(job) => Some(job) == base_name || after_change(current.completed_at.as_ref()),
    });
    pool.extend(current.cloned());
    pool.retain(|revision| !status.failed_revisions.contains(&revision.name));
    if let Some(newest) = pool.into_iter().max_by_key(|revision| revision.completed_at.as_ref().map(|time| time.0)) {
        return Target::Model(newest);
    }
    match base {
        Source::Uri(uri) => Target::Model(RevisionStatus {
            name: names::revision(deployment, None, uri),
            model_uri: uri.clone(),
            ..RevisionStatus::default()
        }),
        Source::Job(name) => missing(name, base_job),
    }
}

fn missing(name: &str, job: Option<&FineTuneJob>) -> Target {
    let Some(job) = job else {
        return Target::Missing {
            reason: "JobNotFound",
            message: format!("there is no FineTuneJob {name} (spec.model.fromJob)"),
        };
    };
    let summary = outcome(job);
    match summary {
        Some(("False", reason, message)) => Target::Missing {
            reason: "JobFailed",
            message: format!("FineTuneJob {name} made no model: {reason}: {message}"),
        },
        _ => Target::Missing { reason: "WaitingForJob", message: format!("FineTuneJob {name} is not over") },
    }
}

/// Status, reason and message of a job's summary condition.
pub fn outcome(job: &FineTuneJob) -> Option<(&str, &str, &str)> {
    let condition = condition::get(&job.status.as_ref()?.conditions, types::SUCCEEDED)?;
    Some((&condition.status, &condition.reason, &condition.message))
}

/// The revision that a job's artifact makes, if it made one that passed its gates.
fn revision(deployment: &str, job: &FineTuneJob) -> Option<RevisionStatus> {
    let status = job.status.as_ref()?;
    let summary = status.summary.as_ref().filter(|_| outcome(job).is_some_and(|(value, ..)| value == "True"))?;
    Some(RevisionStatus {
        name: names::revision(deployment, Some(&summary.model_digest), &summary.artifact),
        model_uri: summary.artifact.clone(),
        model_digest: Some(summary.model_digest.clone()),
        job: Some(job.name_any()),
        completed_at: status.completion_time.clone(),
        ready_at: None,
    })
}
