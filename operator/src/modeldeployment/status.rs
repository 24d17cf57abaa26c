//! What a user sees of a ModelDeployment. `status.monitor` belongs to the monitor and is never written here.

use athanor_contract::serve::Verdict;
use athanor_crds::{ModelDeployment, ModelDeploymentStatus, condition, label};
use jiff::Timestamp;
use kube::{Client, ResourceExt};

use super::{decide::Plan, dereference::Observed, validate::InvalidDeployment};
use crate::{
    cluster::{self, ClusterError},
    condition::{State, set},
};

/// Writes a status if it differs from the one the object has.
pub async fn write(
    client: &Client,
    deployment: &ModelDeployment,
    next: ModelDeploymentStatus,
) -> Result<(), ClusterError> {
    let next = ModelDeploymentStatus { monitor: None, ..next };
    let before = deployment.status.clone().map(|status| ModelDeploymentStatus { monitor: None, ..status });
    let text = |status: Option<&ModelDeploymentStatus>| status.and_then(|status| serde_json::to_value(status).ok());
    if text(before.as_ref()) == text(Some(&next)) {
        return Ok(());
    }
    cluster::apply_status::<ModelDeployment>(
        client,
        &deployment.namespace().unwrap_or_default(),
        &deployment.name_any(),
        &next,
    )
    .await
}

/// The status of a deployment that cannot be run as it is; what already serves goes on.
pub fn invalid(deployment: &ModelDeployment, error: &InvalidDeployment, now: Timestamp) -> ModelDeploymentStatus {
    let mut status = deployment.status.clone().unwrap_or_default();
    let generation = deployment.metadata.generation;
    set(&mut status.conditions, condition::READY, State::False, "InvalidSpec", error.to_string(), generation, now);
    status
}

/// The status after a plan, pure.
pub fn next(
    observed: &Observed,
    plan: &Plan,
    applied: Result<(), &ClusterError>,
    now: Timestamp,
) -> ModelDeploymentStatus {
    let generation = observed.deployment.metadata.generation;
    let before = observed.deployment.status.clone().unwrap_or_default();
    let mut conditions = before.conditions;
    let (state, reason, message) = &plan.ready;
    set(&mut conditions, condition::READY, *state, reason, message, generation, now);
    let rollout = &plan.rollout;
    // A promotion or rollback stays told until the next thing happens.
    let told = crate::condition::get(&conditions, condition::PROGRESSING);
    let keeps = rollout.reason == "Stable"
        && told.is_some_and(|told| matches!(told.reason.as_str(), "Promoted" | "RolledBack"));
    if !keeps {
        set(&mut conditions, condition::PROGRESSING, rollout.state, rollout.reason, &rollout.message, generation, now);
    }
    if observed.deployment.spec.monitor.is_some() {
        let current = rollout.current.as_ref().map(|current| current.name.as_str()).unwrap_or_default();
        let verdict =
            before.monitor.as_ref().filter(|monitor| monitor.revision == current).map(|monitor| monitor.verdict);
        let (state, reason, message) = match verdict {
            Some(Verdict::Drifted) => (State::True, "Drifted", statistics(&before.monitor)),
            Some(Verdict::Stable) => (State::False, "Stable", statistics(&before.monitor)),
            Some(Verdict::Unknown) | None => {
                (State::Unknown, "TooFewEvents", "no verdict on the current revision yet".into())
            }
        };
        set(&mut conditions, condition::DRIFTED, state, reason, message, generation, now);
    } else {
        conditions.retain(|condition| condition.type_ != condition::DRIFTED);
    }
    match &plan.retraining.condition {
        Some((state, reason, message)) => {
            set(&mut conditions, condition::RETRAINING, *state, reason, message, generation, now)
        }
        None => conditions.retain(|condition| condition.type_ != condition::RETRAINING),
    }
    let workload = rollout.current.as_ref().and_then(|current| observed.revisions.get(&current.name));
    let mut next = ModelDeploymentStatus {
        conditions,
        current_revision: rollout.current.clone(),
        candidate: rollout.candidate.clone(),
        previous_revision: rollout.previous.clone(),
        failed_revisions: rollout.failed.clone(),
        monitor: before.monitor,
        retraining: plan.retraining.running.clone(),
        last_retrained_at: plan.retraining.last_retrained_at.clone(),
        last_retraining: plan.retraining.last.clone(),
        source: Some(plan.source.clone()),
        selector: rollout.current.as_ref().map(|current| format!("{}={}", label::REVISION, current.name)),
        replicas: workload.map_or(0, |workload| workload.replicas),
    };
    if let Err(error) = applied {
        // What could not be done has not happened: a weight that no router has must not count as a step.
        next = ModelDeploymentStatus {
            conditions: next.conditions,
            ..observed.deployment.status.clone().unwrap_or_default()
        };
        let reason = if error.is_refusal() { "Refused" } else { "ApplyFailed" };
        set(&mut next.conditions, condition::READY, State::False, reason, error.to_string(), generation, now);
    }
    next
}

fn statistics(monitor: &Option<athanor_contract::serve::MonitorStatus>) -> String {
    let all = monitor.iter().flat_map(|monitor| &monitor.statistics);
    let words =
        all.map(|statistic| format!("{} {} (threshold {})", statistic.name, statistic.value, statistic.threshold));
    words.collect::<Vec<_>>().join(", ")
}
