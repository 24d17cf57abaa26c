//! Reads what a decision about a FineTuneJob needs from the caches: its Kubernetes Jobs, their pods, its trials, the
//! newest report.

use std::sync::Arc;

use athanor_crds::{FineTuneJob, label};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::ResourceExt;

use super::attempt::is_over;
use crate::{
    cluster,
    progress::{Report, Reports},
    reconciler::ReconcileError,
    stores::Stores,
};

/// What was read.
pub struct Observed {
    pub job: FineTuneJob,
    /// Kubernetes Jobs of all attempts.
    pub batch_jobs: Vec<Arc<Job>>,
    /// Pods of all attempts.
    pub pods: Vec<Arc<Pod>>,
    pub report: Option<Report>,
    /// FineTuneJobs that are trials of this one's search.
    pub trials: Vec<Arc<FineTuneJob>>,
    /// Whether the ModelDeployment that created the job has not noted its end yet, or is rolling its model out.
    pub is_awaited: bool,
}

/// Reads; `None` when the job is being deleted.
///
/// # Errors
/// The object has no namespace or UID.
pub fn dereference(stores: &Stores, reports: &Reports, job: &FineTuneJob) -> Result<Option<Observed>, ReconcileError> {
    if job.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let namespace = job.namespace().ok_or(ReconcileError::Incomplete("namespace"))?;
    let uid = job.uid().ok_or(ReconcileError::Incomplete("uid"))?;
    let name = job.name_any();
    let status = job.status.as_ref();
    let is_over = status.is_some_and(is_over);
    let report = if is_over {
        reports.forget(&uid);
        None
    } else {
        reports.get(&uid)
    };
    let searches = job.spec.train.hyperparameters.search.is_some()
        && !is_over
        && !status.is_some_and(|status| status.search.as_ref().is_some_and(|search| search.done));
    let mut trials = if searches { stores.fine_tune_jobs.select(&namespace, label::SEARCH, &name) } else { Vec::new() };
    trials.retain(|trial| cluster::is_owned_by(&**trial, &uid));
    trials.sort_by_key(|trial| trial.name_any());
    let mut batch_jobs = stores.batch_jobs.select(&namespace, label::FINE_TUNE_JOB, &name);
    batch_jobs.retain(|batch_job| cluster::is_owned_by(&**batch_job, &uid));
    let mut pods = stores.pods.select(&namespace, label::FINE_TUNE_JOB, &name);
    pods.sort_by_key(|pod| pod.name_any());
    let is_awaited = job.labels().get(label::DEPLOYMENT).is_some_and(|deployment| {
        let deployment = stores.model_deployments.get(&namespace, deployment);
        let Some(status) = deployment.as_ref().and_then(|deployment| deployment.status.as_ref()) else { return false };
        let candidate = status.candidate.as_ref().and_then(|candidate| candidate.revision.job.as_ref());
        status.retraining.as_ref().is_some_and(|retraining| retraining.job == name) || candidate == Some(&name)
    });
    Ok(Some(Observed { job: job.clone(), batch_jobs, pods, report, trials, is_awaited }))
}
