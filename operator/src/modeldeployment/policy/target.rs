//! Which model a deployment should serve.
//!
//! `spec.model` names a model. Retrainings of the deployment that ended after the user's last change of `spec.model`
//! compete with it, and the newest wins. The current revision competes as well, so that it stays when its job is
//! deleted. After a rollback the jobs that were over by the end of the failed one's do not compete any more.
//!
//! With `spec.model.base` the models are adapters of that base. A retraining that trained no adapter is a revision with
//! servers of its own.

use std::sync::Arc;

use athanor_contract::train::TrainSummary;
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
pub fn source(status: &ModelDeploymentStatus, source: &Source, base: Option<&str>, now: Timestamp) -> ObservedSource {
    let mut value = match source {
        Source::Uri(uri) => uri.clone(),
        Source::Job(name) => format!("job/{name}"),
    };
    if let Some(base) = base {
        value = format!("{value} on {base}");
    }
    match &status.source {
        None => ObservedSource { value, since: None },
        Some(before) if before.value == value => before.clone(),
        Some(_) => ObservedSource { value, since: Some(Time(now)) },
    }
}

/// What `spec.model` says.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    pub deployment: &'a str,
    pub source: &'a Source,
    /// Folder of the base model that the model to serve is an adapter of.
    pub base: Option<&'a str>,
    /// The FineTuneJob that the source names.
    pub job: Option<&'a FineTuneJob>,
}

/// Returns the model to serve.
pub fn target(
    wanted: Wanted<'_>,
    observed: &ObservedSource,
    retrainings: &[Arc<FineTuneJob>],
    status: &ModelDeploymentStatus,
) -> Target {
    let Wanted { deployment, source, base, job: source_job } = wanted;
    let after_change = |completed: Option<&Time>| match (&observed.since, completed) {
        (None, _) => true,
        (Some(since), Some(completed)) => completed.0 > since.0,
        (Some(_), None) => false,
    };
    let source_name = if let Source::Job(name) = source { Some(name.as_str()) } else { None };
    let is_settled = |revision: &RevisionStatus| {
        let (until, completed) = (status.settled_until.as_ref(), revision.completed_at.as_ref());
        until.zip(completed).is_some_and(|(until, completed)| completed.0 <= until.0)
    };
    let mut pool: Vec<RevisionStatus> = Vec::new();
    pool.extend(source_job.filter(|job| is_of_kind(job, base)).and_then(|job| revision(deployment, base, job)));
    let retrained = retrainings.iter().filter_map(|job| revision(deployment, base, job));
    pool.extend(retrained.filter(|revision| after_change(revision.completed_at.as_ref())));
    pool.retain(|revision| !is_settled(revision));
    let current = status.current_revision.iter().filter(|current| match current.job.as_deref() {
        None => false,
        // With another base it is another revision.
        Some(job) if Some(job) == source_name => current.base.as_deref() == base,
        Some(_) => after_change(current.completed_at.as_ref()),
    });
    pool.extend(current.cloned());
    pool.retain(|revision| !status.failed_revisions.contains(&revision.name));
    if let Some(newest) = pool.into_iter().max_by_key(|revision| revision.completed_at.as_ref().map(|time| time.0)) {
        return Target::Model(newest);
    }
    match source {
        Source::Uri(uri) => Target::Model(RevisionStatus {
            name: name(deployment, base, None, uri),
            model_uri: uri.clone(),
            base: base.map(Into::into),
            ..RevisionStatus::default()
        }),
        Source::Job(name) => {
            let (reason, message) = missing(name, source_job, base.is_some(), "spec.model");
            Target::Missing { reason, message }
        }
    }
}

/// Returns why the job that `field` names has no model, or no adapter, to serve.
pub fn missing(name: &str, job: Option<&FineTuneJob>, is_adapter: bool, field: &str) -> (&'static str, String) {
    let Some(job) = job else {
        return ("JobNotFound", format!("FineTuneJob {name} does not exist ({field}.fromJob)"));
    };
    match outcome(job) {
        Some(Outcome { status: "False", reason, message }) => {
            ("JobFailed", format!("FineTuneJob {name} has no model: {reason}: {message}"))
        }
        _ if is_adapter && !has_adapter(job) => {
            ("NoAdapter", format!("FineTuneJob {name} trains no adapter: its spec.adapter is absent ({field}.fromJob)"))
        }
        _ => ("WaitingForJob", format!("FineTuneJob {name} is not over")),
    }
}

/// Returns whether the artifact of a job has an adapter next to the merged weights.
pub fn has_adapter(job: &FineTuneJob) -> bool {
    job.spec.train.adapter.is_some()
}

/// Returns whether a job trains what is served: an adapter if there is a base.
fn is_of_kind(job: &FineTuneJob, base: Option<&str>) -> bool {
    base.is_none() || has_adapter(job)
}

/// Returns the name of the revision with this model, or with this adapter of a base.
fn name(deployment: &str, base: Option<&str>, digest: Option<&str>, uri: &str) -> String {
    match base {
        Some(base) => names::adapter_revision(deployment, base, digest, uri),
        None => names::revision(deployment, digest, uri),
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

/// Returns the summary of a job whose artifact passed its gates.
pub fn passed(job: &FineTuneJob) -> Option<&TrainSummary> {
    let summary = job.status.as_ref()?.summary.as_ref();
    summary.filter(|_| outcome(job).is_some_and(|outcome| outcome.status == "True"))
}

/// Returns the revision of a job's artifact, if the job has one that passed its gates. It is an adapter if there is a
/// base and the job trained one.
fn revision(deployment: &str, base: Option<&str>, job: &FineTuneJob) -> Option<RevisionStatus> {
    let summary = passed(job)?;
    let status = job.status.as_ref()?;
    let base = base.filter(|_| has_adapter(job));
    Some(RevisionStatus {
        name: name(deployment, base, Some(&summary.model_digest), &summary.artifact),
        model_uri: summary.artifact.clone(),
        base: base.map(Into::into),
        model_digest: Some(summary.model_digest.clone()),
        job: Some(job.name_any()),
        completed_at: status.completion_time.clone(),
        ready_at: None,
    })
}
