//! The state of a Kubernetes Deployment and of its pods.

use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::ResourceExt;

/// Label of a pod with the hash of its template, which the ReplicaSet's name ends with.
const TEMPLATE_HASH: &str = "pod-template-hash";

/// The state of a Kubernetes Deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    pub desired: i32,
    /// Available pods of the newest template.
    pub available: i32,
    /// Available pods of any template, whether the newest generation has been observed or not.
    pub answering: i32,
    pub replicas: i32,
    /// The message of an exceeded progress deadline.
    pub stuck: Option<String>,
}

impl Workload {
    pub fn of(workload: &Deployment) -> Self {
        let desired = workload.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        let Some(status) = &workload.status else { return Self { desired, ..Self::default() } };
        let is_current = status.observed_generation >= workload.metadata.generation;
        let answering = status.available_replicas.unwrap_or(0);
        let available = answering.min(status.updated_replicas.unwrap_or(0));
        let stuck = status.conditions.iter().flatten().find(|condition| {
            condition.type_ == "Progressing"
                && condition.status == "False"
                && condition.reason.as_deref() == Some("ProgressDeadlineExceeded")
        });
        Self {
            desired,
            available: if is_current { available } else { 0 },
            answering,
            replicas: status.replicas.unwrap_or(0),
            stuck: stuck.filter(|_| is_current).map(|condition| condition.message.clone().unwrap_or_default()),
        }
    }

    /// Returns whether pods are wanted and none is available. It is not affected by a change of the specification that
    /// the controller of Deployments has not observed yet.
    pub fn is_dead(&self) -> bool {
        self.desired > 0 && self.answering == 0
    }

    /// Returns whether there is at least one pod and all of them are available.
    pub fn is_ready(&self) -> bool {
        self.available >= self.desired.max(1)
    }

    /// Describes how many pods are ready.
    pub fn progress(&self) -> String {
        format!("{} of {} pods are ready", self.available, self.desired.max(1))
    }
}

/// Returns whether a pod's condition Ready is True.
pub fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Returns whether a pod belongs to a ReplicaSet of the workload with this name.
pub fn is_of(pod: &Pod, workload: &str) -> bool {
    let Some(hash) = pod.labels().get(TEMPLATE_HASH) else { return false };
    let set = format!("{workload}-{hash}");
    let is_set = |kind: &str, name: &str| kind == "ReplicaSet" && name == set;
    pod.owner_references().iter().any(|owner| owner.controller == Some(true) && is_set(&owner.kind, &owner.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_status_of_another_generation_does_not_count() {
        let workload = |observed: i64, available: i32| {
            let reason = "ProgressDeadlineExceeded";
            let progressing = json!([{"type": "Progressing", "status": "False", "reason": reason, "message": "late"}]);
            let status = json!({"observedGeneration": observed, "availableReplicas": available, "updatedReplicas": 2,
                "replicas": 3, "conditions": progressing});
            let template = json!({"metadata": {}, "spec": {"containers": []}});
            let spec = json!({"replicas": 2, "selector": {}, "template": template});
            Workload::of(
                &serde_json::from_value(json!({"metadata": {"generation": 2}, "spec": spec, "status": status}))
                    .unwrap(),
            )
        };
        let current = workload(2, 3);
        assert_eq!((current.available, current.replicas, current.stuck.as_deref()), (2, 3, Some("late")));
        assert!(current.is_ready() && !workload(2, 1).is_ready());
        let old = workload(1, 3);
        assert_eq!((old.desired, old.available, &old.stuck), (2, 0, &None));
        // The pods answer although the newest generation has not been observed.
        assert!(!old.is_dead() && !old.is_ready());
        assert!(workload(2, 0).is_dead() && workload(1, 0).is_dead());
        assert!(!Workload::default().is_dead(), "scaled to zero");
    }

    #[test]
    fn a_pod_is_its_replica_sets() {
        let pod = |kind: &str, name: &str, controller: bool| -> Pod {
            let owner =
                json!({"apiVersion": "apps/v1", "kind": kind, "name": name, "uid": "u", "controller": controller});
            let metadata = json!({"name": "p", "labels": {"pod-template-hash": "5d9c"}, "ownerReferences": [owner]});
            serde_json::from_value(json!({"metadata": metadata})).unwrap()
        };
        assert!(is_of(&pod("ReplicaSet", "m-1-5d9c", true), "m-1"));
        assert!(!is_of(&pod("ReplicaSet", "m-1-5d9c", true), "m-2"), "another workload's");
        assert!(!is_of(&pod("ReplicaSet", "m-1-x", true), "m-1"), "the ReplicaSet of another template");
        assert!(!is_of(&pod("ReplicaSet", "m-1-5d9c", false), "m-1"));
        assert!(!is_of(&pod("Job", "m-1-5d9c", true), "m-1"));
        assert!(!is_of(&Pod::default(), "m-1"), "a pod that nobody controls");
    }
}
