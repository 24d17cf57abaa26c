//! Reads what a decision about a FineTuneJob needs: the newest job, its Kubernetes Jobs, their pods, the newest report.

use athanor_crds::{FineTuneJob, label};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{Api, Client, ResourceExt, api::ListParams};

use super::decide::is_over;
use crate::{
    cluster,
    context::ReconcileError,
    progress::{Report, Reports},
};

/// What there is.
pub struct Observed {
    pub job: FineTuneJob,
    /// Jobs of this FineTuneJob, of all attempts.
    pub jobs: Vec<Job>,
    /// Pods of this FineTuneJob, of all attempts.
    pub pods: Vec<Pod>,
    pub report: Option<Report>,
    /// FineTuneJobs that are trials of this one's search.
    pub trials: Vec<FineTuneJob>,
}

/// Reads; `None` when the job is gone or going.
pub async fn dereference(
    client: &Client,
    reports: &Reports,
    job: &FineTuneJob,
) -> Result<Option<Observed>, ReconcileError> {
    let namespace = job.namespace().ok_or(ReconcileError::Incomplete("namespace"))?;
    let name = job.name_any();
    // The cache may not know of a status that was just written, and the attempt is in there.
    let newest = Api::<FineTuneJob>::namespaced(client.clone(), &namespace).get_opt(&name).await;
    let Some(job) = newest.map_err(ReconcileError::read("the FineTuneJob"))? else { return Ok(None) };
    if job.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let uid = job.uid().ok_or(ReconcileError::Incomplete("uid"))?;
    let ours = ListParams::default().labels(&format!("{}={name}", label::FINE_TUNE_JOB));
    let jobs: Api<Job> = Api::namespaced(client.clone(), &namespace);
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let trials = async {
        let status = job.status.as_ref();
        let is_done = status.is_some_and(|status| is_over(status) || status.search.as_ref().is_some_and(|s| s.done));
        if job.spec.train.hyperparameters.search.is_none() || is_done {
            return Ok(Vec::new());
        }
        let of_search = ListParams::default().labels(&format!("{}={name}", label::SEARCH));
        let trials: Api<FineTuneJob> = Api::namespaced(client.clone(), &namespace);
        trials.list(&of_search).await.map(|list| list.items)
    };
    let (jobs, pods, mut trials) = futures::try_join!(jobs.list(&ours), pods.list(&ours), trials)
        .map_err(ReconcileError::read("Jobs, pods and trials"))?;
    trials.retain(|trial| cluster::is_owned_by(trial, &uid));
    let jobs: Vec<Job> = jobs.items.into_iter().filter(|job| cluster::is_owned_by(job, &uid)).collect();
    let report = reports.get(&uid);
    Ok(Some(Observed { job, jobs, pods: pods.items, report, trials }))
}
