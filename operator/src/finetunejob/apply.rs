//! Puts a decision about a FineTuneJob into the cluster.

use athanor_crds::FineTuneJob;
use k8s_openapi::api::batch::v1::Job;
use kube::ResourceExt;

use super::{
    build::{AttemptChildren, Children},
    decide::Decision,
    dereference::Observed,
    policy::search,
    validate::ValidatedJob,
};
use crate::cluster::{Cluster, ClusterError, Identity};

/// Proof that a decision is in the cluster. Only [`apply`] makes it, and the status after a decision cannot be made
/// without it.
#[derive(Debug)]
pub struct Applied {
    created: bool,
    image: Option<ImageCheck>,
}

/// Result of the choice of an image for pods that were created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageCheck {
    /// Why the pods are not expected to use their GPUs.
    pub warning: Option<String>,
}

impl Applied {
    /// Returns whether the Kubernetes Job of the attempt, or a trial, was created by this reconcile.
    pub fn created(&self) -> bool {
        self.created
    }

    /// Returns the result of the choice of an image, if the children of an attempt were applied.
    pub fn image(&self) -> Option<&ImageCheck> {
        self.image.as_ref()
    }

    /// The result of an `apply` that a test leaves out.
    #[cfg(test)]
    pub fn assumed(created: bool) -> Self {
        Self { created, image: None }
    }

    /// As [`Self::assumed`], of the children of an attempt.
    #[cfg(test)]
    pub fn assumed_attempt(warning: Option<String>) -> Self {
        Self { created: true, image: Some(ImageCheck { warning }) }
    }
}

/// Deletes and creates what the decision requires. Creating twice is creating once: names follow from the attempt's
/// number and from the trial's assignment.
///
/// # Errors
/// A request that failed, or an object of another owner with the name of a child.
pub async fn apply(
    cluster: &Cluster<'_>,
    job: &ValidatedJob,
    decision: &Decision,
    children: Children,
) -> Result<Applied, ClusterError> {
    for batch_job in &decision.remove {
        cluster.delete::<Job>(&job.namespace, &batch_job.name, Some(&batch_job.uid)).await?;
    }
    for trial in &decision.remove_trials {
        cluster.delete::<FineTuneJob>(&job.namespace, &trial.name, Some(&trial.uid)).await?;
    }
    if decision.expire {
        cluster.delete::<FineTuneJob>(&job.namespace, &job.name, Some(&job.uid)).await?;
    }
    let Children { attempt, trials } = children;
    let mut created = false;
    for trial in &trials {
        created |= cluster.create(trial, &job.uid).await?;
    }
    let mut image = None;
    if let Some(AttemptChildren { config, service, batch_job, warning }) = attempt {
        cluster.create_or_apply(&config, &job.uid).await?;
        if let Some(service) = &service {
            cluster.create_or_apply(service, &job.uid).await?;
        }
        created |= cluster.create(&batch_job, &job.uid).await?;
        image = Some(ImageCheck { warning });
    }
    Ok(Applied { created, image })
}

/// Deletes the Kubernetes Jobs and the unfinished trials of a job that has become invalid: nothing observes them any
/// more.
///
/// # Errors
/// A request that failed.
pub async fn stop(cluster: &Cluster<'_>, observed: &Observed) -> Result<(), ClusterError> {
    let namespace = observed.job.namespace().unwrap_or_default();
    for batch_job in &observed.batch_jobs {
        let Identity { name, uid } = Identity::from_object(&**batch_job);
        cluster.delete::<Job>(&namespace, &name, Some(&uid)).await?;
    }
    for Identity { name, uid } in search::unfinished(&observed.trials) {
        cluster.delete::<FineTuneJob>(&namespace, &name, Some(&uid)).await?;
    }
    Ok(())
}
