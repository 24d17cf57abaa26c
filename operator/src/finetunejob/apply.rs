//! Puts a decision about a FineTuneJob into the cluster.

use athanor_crds::FineTuneJob;
use k8s_openapi::api::batch::v1::Job;
use kube::{Api, Client, ResourceExt};

use super::{
    build::{Attempt, Children},
    decide::Decision,
    validate::ValidatedJob,
};
use crate::cluster::{self, Child, ClusterError};

/// That a decision is in the cluster; only then is there a status for it.
#[derive(Debug)]
pub struct Applied {
    /// The attempt's Job, or a trial, was created just now.
    pub created: bool,
}

pub async fn apply(
    client: &Client,
    job: &ValidatedJob,
    decision: &Decision,
    children: Children,
) -> Result<Applied, ClusterError> {
    for (name, uid) in &decision.remove {
        cluster::delete::<Job>(client, &job.namespace, name, Some(uid)).await?;
    }
    for (name, uid) in &decision.remove_trials {
        cluster::delete::<FineTuneJob>(client, &job.namespace, name, Some(uid)).await?;
    }
    if decision.expire {
        cluster::delete::<FineTuneJob>(client, &job.namespace, &job.name, Some(&job.uid)).await?;
    }
    let Children { attempt, trials } = children;
    let mut created = false;
    for trial in &trials {
        created |= create_own(client, job, trial).await?;
    }
    if let Some(Attempt { config, service, job: indexed }) = attempt {
        cluster::apply(client, &config).await?;
        cluster::apply(client, &service).await?;
        created |= create_own(client, job, &indexed).await?;
    }
    Ok(Applied { created })
}

/// Creates a child that was not among this FineTuneJob's own: if it is there, it is somebody else's, or came up between two requests.
async fn create_own<K: Child>(client: &Client, job: &ValidatedJob, child: &K) -> Result<bool, ClusterError> {
    let created = cluster::create(client, child).await?;
    if !created {
        let name = child.name_any();
        let api: Api<K> = Api::namespaced(client.clone(), &job.namespace);
        let there = api.get_opt(&name).await.ok().flatten();
        if there.is_some_and(|there| !cluster::is_owned_by(&there, &job.uid)) {
            return Err(ClusterError::Foreign { kind: K::kind(&()).into(), name });
        }
    }
    Ok(created)
}
