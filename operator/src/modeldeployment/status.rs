//! The status of a ModelDeployment. `status.monitor` belongs to the monitor and is never written here.

use athanor_crds::{ModelDeployment, ModelDeploymentStatus, condition as types, label};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;

use super::{
    apply::Applied,
    decide::{Decision, retry},
    dereference::Observed,
    names,
    validate::InvalidDeployment,
};
use crate::{
    cluster::{Cluster, ClusterError},
    condition::{self, State, Value, set},
};

/// Writes a status if it differs from the one that was read.
///
/// # Errors
/// A request that failed, or a conflict: the object changed after it was read.
pub async fn write(
    cluster: &Cluster<'_>,
    deployment: &ModelDeployment,
    next: ModelDeploymentStatus,
) -> Result<(), ClusterError> {
    let next = ModelDeploymentStatus { monitor: None, ..next };
    let before = deployment.status.clone().map(|status| ModelDeploymentStatus { monitor: None, ..status });
    let text = |status: Option<&ModelDeploymentStatus>| status.and_then(|status| serde_json::to_value(status).ok());
    if text(before.as_ref()) == text(Some(&next)) {
        return Ok(());
    }
    cluster.write_status(deployment, &next).await
}

/// Returns the status of a deployment with a mistake in its specification; what serves already continues.
pub fn invalid(deployment: &ModelDeployment, error: &InvalidDeployment, now: Timestamp) -> ModelDeploymentStatus {
    let mut status = deployment.status.clone().unwrap_or_default();
    let ready = Value::new(State::False, "InvalidSpec", error.to_string());
    set(&mut status.conditions, types::READY, &ready, deployment.metadata.generation, now);
    status
}

/// Returns the status after a decision.
pub fn next(
    observed: &Observed,
    decision: &Decision,
    applied: Result<&Applied, &ClusterError>,
    now: Timestamp,
) -> ModelDeploymentStatus {
    let before = observed.deployment.status.clone().unwrap_or_default();
    let mut conditions = conditions(observed, decision, &before, now);
    let generation = observed.deployment.metadata.generation;
    match applied {
        Ok(applied) => condition::warn_of_image(&mut conditions, applied.image_warning(), generation, now),
        Err(error) => {
            // The rest of the status stays: a weight that no router has must not count as a step.
            let ready = Value::new(State::False, error.reason(), error.to_string());
            set(&mut conditions, types::READY, &ready, generation, now);
            return ModelDeploymentStatus { conditions, ..before };
        }
    }
    let rollout = &decision.rollout;
    let deployment = observed.deployment.name_any();
    let servers = rollout.current.as_ref().map(|current| names::servers(&deployment, current));
    let workload = servers.as_ref().and_then(|servers| observed.revisions.get(servers));
    ModelDeploymentStatus {
        conditions,
        current_revision: rollout.current.clone(),
        candidate: rollout.candidate.clone(),
        previous_revision: rollout.previous.clone(),
        failed_revisions: rollout.failed.clone(),
        settled_until: rollout.settled_until.clone(),
        retried_rollout: retry(observed).or(before.retried_rollout),
        monitor: before.monitor,
        retrainings: decision.retraining.count,
        retraining: decision.retraining.running.clone(),
        last_retrained_at: decision.retraining.last_retrained_at.clone(),
        last_retraining: decision.retraining.last.clone(),
        retraining_proposal: decision.retraining.proposal.clone(),
        fruitless_retrainings: decision.retraining.fruitless,
        // Offsets of one topic say nothing about another one, which may come after this.
        retrained_ranges: observed
            .deployment
            .spec
            .feedback
            .as_ref()
            .map_or_else(Vec::new, |_| decision.retraining.used.clone()),
        source: Some(decision.source.clone()),
        adapters: decision.adapters.served.clone(),
        selector: servers.map(|servers| format!("{}={servers}", label::REVISION)),
        replicas: workload.map_or(0, |workload| workload.replicas),
    }
}

fn conditions(
    observed: &Observed,
    decision: &Decision,
    before: &ModelDeploymentStatus,
    now: Timestamp,
) -> Vec<Condition> {
    let mut conditions = before.conditions.clone();
    let generation = observed.deployment.metadata.generation;
    set(&mut conditions, types::READY, &decision.ready, generation, now);
    let rollout = &decision.rollout;
    // The message of a promotion or rollback stays until something else happens.
    let ended = condition::get(&conditions, types::PROGRESSING)
        .is_some_and(|last| matches!(last.reason.as_str(), "Promoted" | "RolledBack"));
    if rollout.progressing.reason != "Stable" || !ended {
        set(&mut conditions, types::PROGRESSING, &rollout.progressing, generation, now);
    }
    for (type_, value) in [
        (types::DRIFTED, &decision.drifted),
        (types::RETRAINING, &decision.retraining.condition),
        (types::ADAPTERS_RESOLVED, &decision.adapters.condition),
    ] {
        match value {
            Some(value) => set(&mut conditions, type_, value, generation, now),
            None => conditions.retain(|condition| condition.type_ != type_),
        }
    }
    conditions
}
