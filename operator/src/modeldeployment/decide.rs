//! What should be of a ModelDeployment: target, rollout and retraining put together, a function of what was read and of
//! the time.

use std::time::Duration;

use athanor_contract::monitor::{MonitorStatus, Verdict};
use athanor_crds::{ModelDeploymentStatus, ObservedSource, RETRY_ROLLOUT_ANNOTATION};
use jiff::Timestamp;
use kube::ResourceExt;

use super::{
    dereference::Observed,
    observe::workload::Workload,
    policy::{
        adapters::{self, Adapters},
        retrain::{self, Retraining},
        rollout::{self, Rollout},
        servers::{self, View},
        target::{self, Target},
    },
    validate::ValidatedDeployment,
};
use crate::condition::{self, State, Value};

/// Wait before a deployment that is not ready is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// Most characters of the annotation that asks for another try, in the schema of the status.
const MOST_RETRY: usize = 256;

/// What should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub source: ObservedSource,
    pub rollout: Rollout,
    pub retraining: Retraining,
    /// Adapters that clients select.
    pub adapters: Adapters,
    /// Servers whose children are deleted.
    pub remove: Vec<String>,
    /// Whether the monitor's children are deleted.
    pub remove_monitor: bool,
    /// Whether the monitor's part of the status is removed, which nothing writes any more.
    pub clear_monitor: bool,
    /// The condition Ready.
    pub ready: Value,
    /// The condition Drifted; absent without spec.monitor.
    pub drifted: Option<Value>,
    pub requeue: Option<Duration>,
}

/// Decides what should be.
pub fn decide(deployment: &ValidatedDeployment, observed: &Observed, now: Timestamp) -> Decision {
    let mut status = observed.deployment.status.clone().unwrap_or_default();
    let base = deployment.base.as_deref();
    let source = target::source(&status, &deployment.source, base, now);
    if source.since != status.source.as_ref().and_then(|source| source.since.clone()) {
        // Another spec.model: what failed before may be tried again.
        forget_failures(&mut status);
    }
    let retry = retry(observed);
    if retry.is_some() && retry != status.retried_rollout {
        forget_failures(&mut status);
    }
    // Offsets and verdicts of another topic say nothing about this one. A monitor of an older version names none.
    let topic = deployment.events.as_ref().map(|events| events.topic.as_str());
    status.monitor = status.monitor.filter(|monitor| monitor.topic.is_empty() || Some(monitor.topic.as_str()) == topic);
    let status = &status;
    let job = observed.source_job.as_deref();
    let wanted = target::Wanted { deployment: &deployment.name, source: &deployment.source, base, job };
    let target = target::target(wanted, &source, &observed.retrainings, status);
    let (wanted, missing) = match &target {
        Target::Model(revision) => (Some(revision), None),
        Target::Missing { reason, message } => (None, Some(Value::new(State::False, reason, message))),
    };
    let known =
        servers::Known { workloads: &observed.revisions, waiting: &observed.waiting, loaded: &observed.loaded, now };
    let view = servers::view(&deployment.name, status, wanted, &known);
    let inputs = rollout::Inputs {
        workloads: &view.workloads,
        waiting: &view.waiting,
        router_ready: observed.router.as_ref().is_some_and(|router| router.available > 0),
        counts: observed.counts.as_ref(),
        routers: &observed.routers,
        now,
    };
    let rollout = rollout::rollout(&deployment.spec.rollout.canary, status, wanted, &inputs);
    let inputs = retrain::Inputs {
        deployment: &deployment.name,
        uid: &deployment.uid,
        approved: retrain::approved(observed.deployment.annotations()),
        current: rollout.current.as_ref(),
        rolling_out: rollout.candidate.is_some(),
        jobs: &observed.retrainings,
        now,
    };
    let retraining = retrain::retrain(deployment.spec.retrain.as_ref(), status, &inputs);
    let ready = ready(&rollout, observed, &view, missing);
    let look_again = (ready.state != State::True || retraining.running.is_some()).then_some(LOOK_AGAIN);
    let requeue = [rollout.wait, retraining.wait, look_again].into_iter().flatten().min();
    Decision {
        source,
        adapters: adapters::resolve(&deployment.spec.adapters, &observed.adapter_jobs, &status.adapters),
        remove: unused(&deployment.name, &rollout, observed),
        remove_monitor: deployment.spec.monitor.is_none() && observed.has_monitor,
        clear_monitor: deployment.spec.monitor.is_none()
            && !observed.has_monitor
            && observed.deployment.status.as_ref().is_some_and(|status| status.monitor.is_some()),
        drifted: deployment.spec.monitor.is_some().then(|| drifted(&rollout, status.monitor.as_ref())),
        rollout,
        retraining,
        ready,
        requeue,
    }
}

/// Lets everything that was rolled back be tried again.
fn forget_failures(status: &mut ModelDeploymentStatus) {
    status.failed_revisions.clear();
    status.settled_until = None;
}

/// Returns the value of the annotation by which the user asks to try again what was rolled back.
pub fn retry(observed: &Observed) -> Option<String> {
    let value = observed.deployment.annotations().get(RETRY_ROLLOUT_ANNOTATION)?;
    Some(condition::cut(value, MOST_RETRY))
}

/// Returns the servers that have no traffic and no requests to finish.
fn unused(deployment: &str, rollout: &Rollout, observed: &Observed) -> Vec<String> {
    let needed = servers::needed(deployment, rollout);
    observed.revisions.keys().filter(|name| !needed.contains(*name)).cloned().collect()
}

/// Returns the condition Ready.
fn ready(rollout: &Rollout, observed: &Observed, view: &View, missing: Option<Value>) -> Value {
    let Some(current) = &rollout.current else {
        return missing.unwrap_or_else(|| Value::new(State::False, "NoModel", "there is no model yet"));
    };
    let nothing = Workload::default();
    let workload = view.workloads.get(&current.name).unwrap_or(&nothing);
    let why = |why: Option<&String>| why.map(|why| format!(": {why}")).unwrap_or_default();
    if workload.desired == 0 && view.workloads.contains_key(&current.name) {
        return Value::new(State::False, "ScaledToZero", "spec.replicas is 0");
    }
    if !workload.is_ready() {
        let message = format!("{}: {}{}", current.name, workload.progress(), why(view.waiting.get(&current.name)));
        return Value::new(State::False, "WaitingForPods", message);
    }
    if observed.router.as_ref().is_none_or(|router| router.available == 0) {
        return Value::new(
            State::False,
            "WaitingForRouter",
            format!("no router is ready{}", why(observed.waiting.get(""))),
        );
    }
    Value::new(State::True, "Available", format!("{} has {} available pods", current.name, workload.available))
}

/// Returns the condition Drifted: the monitor's verdict on the current revision.
fn drifted(rollout: &Rollout, monitor: Option<&MonitorStatus>) -> Value {
    let current = rollout.current.as_ref().map(|current| current.name.as_str()).unwrap_or_default();
    match monitor.filter(|monitor| monitor.revision == current).map(|monitor| (monitor.verdict, monitor)) {
        Some((Verdict::Drifted, monitor)) => Value::new(State::True, "Drifted", statistics(monitor)),
        Some((Verdict::Stable, monitor)) => Value::new(State::False, "Stable", statistics(monitor)),
        Some((Verdict::Unknown, _)) | None => {
            Value::new(State::Unknown, "TooFewEvents", "there is no verdict on the current revision yet")
        }
    }
}

fn statistics(monitor: &MonitorStatus) -> String {
    let texts = monitor
        .statistics
        .iter()
        .map(|statistic| format!("{} {} (threshold {})", statistic.name, statistic.value, statistic.threshold));
    texts.collect::<Vec<_>>().join(", ")
}
