//! The ModelDeployment controller: which model is served, how a new one takes over, and when another is trained.
//!
//! A revision is one model with its own Deployment and Service, or an adapter of a base whose Deployment and Service it
//! shares with other revisions. The router in front of all revisions reads one ConfigMap, and a canary changes nothing but
//! the weights in it, and the adapters of shared servers. The state of a rollout is in `status`, and every step of it can
//! be repeated.
//!
//! Here `deployment` is a ModelDeployment and `workload` is a Kubernetes Deployment.

mod apply;
mod build;
mod children;
mod decide;
mod dereference;
mod names;
mod observe;
mod policy;
mod status;
#[cfg(test)]
mod tests;
mod validate;

use std::time::Duration;

use athanor_crds::{ModelDeployment, ModelDeploymentStatus};
use jiff::Timestamp;

use crate::{
    cluster::{Cluster, ClusterError},
    context::Context,
    reconciler::{Kind, ReconcileError},
    settings::Settings,
    stores::{Cache, Stores},
};

pub use observe::ask::client as pod_client;

impl Kind for ModelDeployment {
    type Observed = dereference::Observed;
    type Validated = validate::ValidatedDeployment;
    type Invalid = validate::InvalidDeployment;
    type Decision = decide::Decision;
    type Children = build::Children;
    type Applied = apply::Applied;
    type Status = ModelDeploymentStatus;

    const NAME: &'static str = athanor_contract::process::api::MODEL_DEPLOYMENT;

    fn cache(stores: &Stores) -> &Cache<Self> {
        &stores.model_deployments
    }

    async fn dereference(&self, context: &Context) -> Result<Option<Self::Observed>, ReconcileError> {
        dereference::dereference(&context.stores, &context.http, self).await
    }

    fn validate(observed: &Self::Observed) -> Result<Self::Validated, Self::Invalid> {
        validate::validate(&observed.deployment)
    }

    fn decide(deployment: &Self::Validated, observed: &Self::Observed, now: Timestamp) -> Self::Decision {
        decide::decide(deployment, observed, now)
    }

    fn build(
        deployment: &Self::Validated,
        settings: &Settings,
        decision: &Self::Decision,
        entropy: [u8; 32],
    ) -> Self::Children {
        build::build(deployment, settings, decision, names::signing_key(entropy))
    }

    async fn apply(
        cluster: &Cluster<'_>,
        deployment: &Self::Validated,
        decision: &Self::Decision,
        children: Self::Children,
    ) -> Result<Self::Applied, ClusterError> {
        apply::apply(cluster, deployment, decision, children).await
    }

    fn status(
        observed: &Self::Observed,
        decision: &Self::Decision,
        applied: Result<&Self::Applied, &ClusterError>,
        now: Timestamp,
    ) -> Self::Status {
        status::next(observed, decision, applied, now)
    }

    async fn refuse(
        _cluster: &Cluster<'_>,
        observed: &Self::Observed,
        invalid: &Self::Invalid,
        now: Timestamp,
    ) -> Result<Self::Status, ClusterError> {
        Ok(status::invalid(&observed.deployment, invalid, now))
    }

    async fn write(
        cluster: &Cluster<'_>,
        observed: &Self::Observed,
        status: Self::Status,
    ) -> Result<Option<Duration>, ClusterError> {
        status::write(cluster, &observed.deployment, status).await.map(|()| None)
    }

    // A rollout goes on from what its own status says.
    fn is_settled(_decision: &Self::Decision) -> bool {
        false
    }

    fn requeue(decision: &Self::Decision) -> Option<Duration> {
        decision.requeue
    }
}
