//! Puts a decision about a FineTuneJob into the cluster.

use athanor_crds::FineTuneJob;
use k8s_openapi::api::batch::v1::Job;
use kube::Client;

use super::{build::Children, decide::Decision, validate::ValidatedJob};
use crate::cluster::{self, ClusterError};

/// That a decision is in the cluster; only then is there a status for it.
#[derive(Debug)]
pub struct Applied {
    /// The attempt's Job was created just now.
    pub created: bool,
}

pub async fn apply(
    client: &Client,
    job: &ValidatedJob,
    decision: &Decision,
    children: Option<Children>,
) -> Result<Applied, ClusterError> {
    for (name, uid) in &decision.remove {
        cluster::delete::<Job>(client, &job.namespace, name, Some(uid)).await?;
    }
    if decision.expire {
        cluster::delete::<FineTuneJob>(client, &job.namespace, &job.name, Some(&job.uid)).await?;
    }
    let Some(Children { config, service, job: indexed }) = children else { return Ok(Applied { created: false }) };
    cluster::apply(client, &config).await?;
    cluster::apply(client, &service).await?;
    let created = cluster::create(client, &indexed).await?;
    if !created {
        // It was not among the Jobs of this FineTuneJob, so it is somebody else's, or it came up between the two requests.
        let name = indexed.metadata.name.clone().unwrap_or_default();
        let api: kube::Api<Job> = kube::Api::namespaced(client.clone(), &job.namespace);
        let there = api.get_opt(&name).await.ok().flatten();
        if there.is_some_and(|there| !cluster::is_owned_by(&there, &job.uid)) {
            return Err(ClusterError::Foreign { kind: "Job".into(), name });
        }
    }
    Ok(Applied { created })
}
