//! What should be of a ModelDeployment, from what is observed and the time alone: target, rollout and retraining put together.

use std::time::Duration;

use athanor_crds::ObservedSource;
use jiff::Timestamp;
use kube::ResourceExt;

use super::{
    dereference::{Observed, Workload},
    retrain::{self, Retraining, Subject},
    rollout::{self, Rollout, Seen},
    target::{self, Target},
    validate::ValidatedDeployment,
};
use crate::condition::State;

const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// What should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub source: ObservedSource,
    pub rollout: Rollout,
    pub retraining: Retraining,
    /// Revisions whose children go.
    pub remove: Vec<String>,
    /// There is a monitor's Deployment.
    pub had_monitor: bool,
    /// The condition Ready.
    pub ready: (State, &'static str, String),
    pub requeue: Option<Duration>,
}

pub fn decide(deployment: &ValidatedDeployment, observed: &Observed, now: Timestamp) -> Plan {
    let mut status = observed.deployment.status.clone().unwrap_or_default();
    let source = target::source(&status, &deployment.source, now);
    if source.since != status.source.as_ref().and_then(|source| source.since.clone()) {
        // Whoever changes spec.model may try again what failed before.
        status.failed_revisions.clear();
    }
    let status = &status;
    let target = target::target(
        &deployment.name,
        &deployment.source,
        &source,
        observed.source_job.as_ref(),
        &observed.retrainings,
        status,
    );
    let (wanted, missing) = match &target {
        Target::Model(revision) => (Some(revision), None),
        Target::Missing { reason, message } => (None, Some((*reason, message.clone()))),
    };
    let seen = Seen {
        workloads: &observed.revisions,
        waiting: &observed.waiting,
        router_ready: observed.router.as_ref().is_some_and(|router| router.available > 0),
        counts: observed.counts.as_ref(),
    };
    let rollout = rollout::rollout(&deployment.spec.rollout.canary, status, wanted, &seen, now);
    let subject = Subject {
        deployment: &deployment.name,
        uid: &deployment.uid,
        approved: retrain::approved(observed.deployment.annotations()),
        current: rollout.current.as_ref(),
        rolling_out: rollout.candidate.is_some(),
        jobs: &observed.retrainings,
    };
    let retraining = retrain::retrain(deployment.spec.retrain.as_ref(), status, &subject, now);
    let kept = [
        rollout.current.as_ref().map(|revision| &revision.name),
        rollout.candidate.as_ref().map(|candidate| &candidate.revision.name),
        rollout.previous.as_ref().map(|previous| &previous.name),
    ];
    let remove = observed.revisions.keys().filter(|name| !kept.contains(&Some(*name))).cloned().collect();
    let ready = ready(&rollout, observed, missing);
    // Why pods wait and that a retraining was deleted are not watched.
    let unwatched = (ready.0 != State::True || retraining.running.is_some()).then_some(LOOK_AGAIN);
    let requeue = [rollout.wait, retraining.wait, unwatched].into_iter().flatten().min();
    Plan { source, rollout, retraining, remove, had_monitor: observed.has_monitor, ready, requeue }
}

fn ready(
    rollout: &Rollout,
    observed: &Observed,
    missing: Option<(&'static str, String)>,
) -> (State, &'static str, String) {
    let Some(current) = &rollout.current else {
        let (reason, message) = missing.unwrap_or(("NoModel", "there is no model yet".into()));
        return (State::False, reason, message);
    };
    let nothing = Workload::default();
    let workload = observed.revisions.get(&current.name).unwrap_or(&nothing);
    let why = |name: &str| observed.waiting.get(name).map(|why| format!(": {why}")).unwrap_or_default();
    if workload.desired == 0 && observed.revisions.contains_key(&current.name) {
        return (State::False, "ScaledToZero", "spec.replicas is 0".into());
    }
    if !workload.is_ready() {
        let message = format!(
            "{} of {} pods of {} are ready{}",
            workload.available,
            workload.desired.max(1),
            current.name,
            why(&current.name)
        );
        return (State::False, "WaitingForPods", message);
    }
    if observed.router.as_ref().is_none_or(|router| router.available == 0) {
        return (State::False, "WaitingForRouter", format!("no router is ready{}", why("")));
    }
    (State::True, "Available", format!("{} answers with {} pods", current.name, workload.available))
}
