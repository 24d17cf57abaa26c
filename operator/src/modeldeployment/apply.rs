//! Puts a decision about a ModelDeployment into the cluster.

use athanor_crds::ModelDeployment;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Service, ServiceAccount},
    policy::v1::PodDisruptionBudget,
    rbac::v1::{Role, RoleBinding},
};

use super::{
    build::Children,
    children::{
        common::{Account, Kind},
        monitor::{self, MonitorChildren},
        revision::{self, RevisionChildren},
        router::RouterChildren,
    },
    decide::Decision,
    names,
    validate::ValidatedDeployment,
};
use crate::cluster::{Cluster, ClusterError};

/// Proof that a decision is in the cluster. Only [`apply`] makes it, and the status after a decision cannot be made
/// without it.
#[derive(Debug)]
pub struct Applied {
    image_warning: Option<String>,
}

impl Applied {
    /// Returns why the servers are not expected to use the GPUs that they reserve.
    pub fn image_warning(&self) -> Option<&str> {
        self.image_warning.as_deref()
    }

    /// The result of an `apply` that a test leaves out.
    #[cfg(test)]
    pub fn assumed() -> Self {
        Self::assumed_with(None)
    }

    /// The result of an `apply` that a test leaves out, with a warning about the servers' image.
    #[cfg(test)]
    pub fn assumed_with(image_warning: Option<String>) -> Self {
        Self { image_warning }
    }
}

/// Applies servers first, then the weights that send traffic to them, and deletes last what has no traffic any more. A
/// child that is as it was last applied causes no request.
///
/// # Errors
/// A request that failed, or an object of another owner with the name of a child.
pub async fn apply(
    cluster: &Cluster<'_>,
    deployment: &ValidatedDeployment,
    decision: &Decision,
    children: Children,
) -> Result<Applied, ClusterError> {
    let Children { revisions, router, monitor, retraining } = children;
    let owner = deployment.uid.as_str();
    let mut image_warning = None;
    for RevisionChildren { config, deployment: workload, service, budget, warning } in &revisions {
        cluster.apply(config, owner).await?;
        cluster.apply(service, owner).await?;
        cluster.apply(workload, owner).await?;
        cluster.apply(budget, owner).await?;
        image_warning.clone_from(warning);
    }
    if let Some(RouterChildren { config, key, account, deployment: workload, service, budget }) = &router {
        cluster.apply(config, owner).await?;
        cluster.create_once(key).await?;
        apply_account(cluster, account, owner).await?;
        cluster.apply(service, owner).await?;
        cluster.apply(workload, owner).await?;
        cluster.apply(budget, owner).await?;
    }
    if let Some(MonitorChildren { config, account, deployment: workload }) = &monitor {
        cluster.apply(config, owner).await?;
        apply_account(cluster, account, owner).await?;
        cluster.apply(workload, owner).await?;
    }
    let namespace = &deployment.namespace;
    if decision.remove_monitor {
        for kind in monitor::REMOVAL {
            delete(cluster, namespace, kind, &names::monitor(&deployment.name)).await?;
        }
    }
    if decision.clear_monitor {
        cluster.clear_status::<ModelDeployment>(namespace, &deployment.name, owner, "monitor").await?;
    }
    for name in &decision.remove {
        for kind in revision::REMOVAL {
            delete(cluster, namespace, kind, name).await?;
        }
    }
    if let Some(job) = &retraining {
        cluster.create(job, owner).await?;
    }
    Ok(Applied { image_warning })
}

async fn apply_account(cluster: &Cluster<'_>, account: &Account, owner: &str) -> Result<(), ClusterError> {
    let Account { account, role, binding } = account;
    cluster.apply(account, owner).await?;
    cluster.apply(role, owner).await?;
    cluster.apply(binding, owner).await
}

async fn delete(cluster: &Cluster<'_>, namespace: &str, kind: Kind, name: &str) -> Result<(), ClusterError> {
    match kind {
        Kind::ConfigMap => cluster.delete::<ConfigMap>(namespace, name, None).await,
        Kind::Deployment => cluster.delete::<Deployment>(namespace, name, None).await,
        Kind::PodDisruptionBudget => cluster.delete::<PodDisruptionBudget>(namespace, name, None).await,
        Kind::Role => cluster.delete::<Role>(namespace, name, None).await,
        Kind::RoleBinding => cluster.delete::<RoleBinding>(namespace, name, None).await,
        Kind::Service => cluster.delete::<Service>(namespace, name, None).await,
        Kind::ServiceAccount => cluster.delete::<ServiceAccount>(namespace, name, None).await,
    }
}
