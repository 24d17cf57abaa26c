//! Puts a plan for a ModelDeployment into the cluster.

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Service, ServiceAccount},
    policy::v1::PodDisruptionBudget,
    rbac::v1::{Role, RoleBinding},
};
use kube::Client;

use super::{
    build::{Children, MonitorChildren, RevisionChildren, RouterChildren},
    build_front::Account,
    decide::Plan,
    names,
    validate::ValidatedDeployment,
};
use crate::cluster::{ClusterError, apply as put, apply_to_own, create, delete};

/// That a plan is in the cluster; only then is there a status for it.
#[derive(Debug)]
pub struct Applied;

/// Servers first, then the weights that send traffic to them, and only then what has no traffic any more goes.
pub async fn apply(
    client: &Client,
    deployment: &ValidatedDeployment,
    plan: &Plan,
    children: Children,
) -> Result<Applied, ClusterError> {
    let Children { revisions, router, monitor, retraining } = children;
    let owner = deployment;
    for RevisionChildren { config, deployment, service, budget } in &revisions {
        put(client, config).await?;
        put(client, service).await?;
        put(client, deployment).await?;
        put(client, budget).await?;
    }
    if let Some(RouterChildren { config, key, account, deployment, service, budget }) = &router {
        put(client, config).await?;
        create(client, key).await?;
        put_account(client, account).await?;
        // The one child with the user's own name.
        apply_to_own(client, service, &owner.uid).await?;
        put(client, deployment).await?;
        put(client, budget).await?;
    }
    let namespace = &deployment.namespace;
    match &monitor {
        Some(MonitorChildren { config, account, deployment }) => {
            put(client, config).await?;
            put_account(client, account).await?;
            put(client, deployment).await?;
        }
        None if deployment.spec.monitor.is_none() && plan.had_monitor => {
            let name = names::monitor(&deployment.name);
            delete::<Deployment>(client, namespace, &name, None).await?;
            delete::<RoleBinding>(client, namespace, &name, None).await?;
            delete::<Role>(client, namespace, &name, None).await?;
            delete::<ServiceAccount>(client, namespace, &name, None).await?;
            delete::<ConfigMap>(client, namespace, &name, None).await?;
        }
        None => {}
    }
    for name in &plan.remove {
        delete::<PodDisruptionBudget>(client, namespace, name, None).await?;
        delete::<Service>(client, namespace, name, None).await?;
        delete::<ConfigMap>(client, namespace, name, None).await?;
        // Last: a revision is known by its Deployment.
        delete::<Deployment>(client, namespace, name, None).await?;
    }
    if let Some(job) = &retraining {
        create(client, job).await?;
    }
    Ok(Applied)
}

async fn put_account(client: &Client, Account { account, role, binding }: &Account) -> Result<(), ClusterError> {
    put(client, account).await?;
    put(client, role).await?;
    put(client, binding).await?;
    Ok(())
}
