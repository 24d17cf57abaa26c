//! The ModelDeployment controller: which model is served, how a new one takes over, and when another is trained.
//!
//! A revision is one model with its own Deployment and Service; the router in front of all of them follows one ConfigMap, whose
//! weights are all that a canary changes. The state of a rollout is in `status`, and every step of it can be taken again.

mod analysis;
mod apply;
mod build;
mod build_front;
mod decide;
mod dereference;
mod names;
mod retrain;
mod rollout;
mod status;
mod target;
#[cfg(test)]
mod tests;
mod validate;

use std::{sync::Arc, time::Instant};

use athanor_crds::ModelDeployment;
use jiff::Timestamp;
use kube::{ResourceExt, runtime::controller::Action};

use crate::context::{Context, ReconcileError};

pub const KIND: &str = athanor_contract::process::api::MODEL_DEPLOYMENT;

/// Name of an object in the operator's own records.
pub fn key(deployment: &ModelDeployment) -> String {
    format!("{KIND}/{}/{}", deployment.namespace().unwrap_or_default(), deployment.name_any())
}

/// Brings one deployment closer to what its specification says.
#[tracing::instrument(skip_all, fields(namespace = deployment.namespace(), deployment = deployment.name_any()))]
pub async fn reconcile(deployment: Arc<ModelDeployment>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let started = Instant::now();
    let result = steps(&deployment, &context).await;
    context.finished(KIND, &key(&deployment), started, &result);
    result
}

async fn steps(deployment: &ModelDeployment, context: &Context) -> Result<Action, ReconcileError> {
    let Some(observed) = dereference::dereference(&context.client, &context.http, deployment).await? else {
        return Ok(Action::await_change());
    };
    let now = Timestamp::now();
    let validated = match validate::validate(&observed.deployment) {
        Ok(validated) => validated,
        Err(error) => {
            status::write(&context.client, &observed.deployment, status::invalid(&observed.deployment, &error, now))
                .await?;
            return Ok(Action::await_change());
        }
    };
    let plan = decide::decide(&validated, &observed, now);
    let children = build::build(&validated, &context.settings, &plan, names::random_key());
    let applied = apply::apply(&context.client, &validated, &plan, children).await;
    let next = status::next(&observed, &plan, applied.as_ref().map(|_| ()), now);
    status::write(&context.client, &observed.deployment, next).await?;
    applied?;
    Ok(plan.requeue.map_or_else(Action::await_change, Action::requeue))
}
