//! Which model a deployment should serve.
//!
//! `spec.model` names a base. Retrainings of the deployment that ended after the user's last change of `spec.model`
//! compete with it, and the newest wins. The current revision competes as well, so that it stays when its job is
//! deleted. After a rollback the jobs that were over by the end of the failed one's do not compete any more.

use std::sync::Arc;

use athanor_crds::{FineTuneJob, ModelDeploymentStatus, ObservedSource, RevisionStatus, condition as types};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use crate::{
    condition,
    modeldeployment::{names, validate::Source},
};

/// The model to serve, or the reason that there is none.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    Model(RevisionStatus),
    Missing { reason: &'static str, message: String },
}

/// Returns `spec.model` as of now. Its time changes with its value.
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

/// Returns the model to serve.
pub fn target(
    deployment: &str,
    base: &Source,
    observed: &ObservedSource,
    base_job: Option<&FineTuneJob>,
    retrainings: &[Arc<FineTuneJob>],
    status: &ModelDeploymentStatus,
) -> Target {
    let after_change = |completed: Option<&Time>| match (&observed.since, completed) {
        (None, _) => true,
        (Some(since), Some(completed)) => completed.0 > since.0,
        (Some(_), None) => false,
    };
    let base_name = if let Source::Job(name) = base { Some(name.as_str()) } else { None };
    let is_settled = |revision: &RevisionStatus| {
        let (until, completed) = (status.settled_until.as_ref(), revision.completed_at.as_ref());
        until.zip(completed).is_some_and(|(until, completed)| completed.0 <= until.0)
    };
    let mut pool: Vec<RevisionStatus> = Vec::new();
    pool.extend(base_job.and_then(|job| revision(deployment, job)));
    let retrained = retrainings.iter().filter_map(|job| revision(deployment, job));
    pool.extend(retrained.filter(|revision| after_change(revision.completed_at.as_ref())));
    pool.retain(|revision| !is_settled(revision));
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
            message: format!("FineTuneJob {name} does not exist (spec.model.fromJob)"),
        };
    };
    match outcome(job) {
        Some(Outcome { status: "False", reason, message }) => Target::Missing {
            reason: "JobFailed",
            message: format!("FineTuneJob {name} has no model: {reason}: {message}"),
        },
        _ => Target::Missing { reason: "WaitingForJob", message: format!("FineTuneJob {name} is not over") },
    }
}

/// The condition Succeeded of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome<'a> {
    pub status: &'a str,
    pub reason: &'a str,
    pub message: &'a str,
}

impl Outcome<'_> {
    pub fn is_over(&self) -> bool {
        self.status != "Unknown"
    }
}

/// Returns the condition Succeeded of a job.
pub fn outcome(job: &FineTuneJob) -> Option<Outcome<'_>> {
    let condition = condition::get(&job.status.as_ref()?.conditions, types::SUCCEEDED)?;
    Some(Outcome { status: &condition.status, reason: &condition.reason, message: &condition.message })
}

/// Returns the revision of a job's artifact, if the job has one that passed its gates.
fn revision(deployment: &str, job: &FineTuneJob) -> Option<RevisionStatus> {
    let status = job.status.as_ref()?;
    let summary = status.summary.as_ref().filter(|_| outcome(job).is_some_and(|outcome| outcome.status == "True"))?;
    Some(RevisionStatus {
        name: names::revision(deployment, Some(&summary.model_digest), &summary.artifact),
        model_uri: summary.artifact.clone(),
        model_digest: Some(summary.model_digest.clone()),
        job: Some(job.name_any()),
        completed_at: status.completion_time.clone(),
        ready_at: None,
    })
}
