//! The state of a Kubernetes Deployment and of its pods.

use std::collections::BTreeSet;

use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    core::v1::Pod,
};
use kube::{Resource, ResourceExt};

use crate::cluster::is_owned_by;

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

/// UIDs of the ReplicaSets of one workload.
///
/// A pod is the workload's if its controller is one of them. Names and labels prove nothing: whoever may create pods
/// chooses them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicaSets(BTreeSet<String>);

impl ReplicaSets {
    /// Takes those of `sets` whose controller is the workload with this UID.
    pub fn of<'a, K: Resource + 'a>(sets: impl IntoIterator<Item = &'a K>, workload: &str) -> Self {
        let own = sets.into_iter().filter(|set| is_owned_by(*set, workload));
        Self(own.filter_map(|set| set.uid()).collect())
    }

    /// Returns whether the pod's controller is one of them.
    pub fn control(&self, pod: &Pod) -> bool {
        let mut owners = pod.owner_references().iter();
        owners.any(|owner| {
            owner.controller == Some(true)
                && owner.kind == ReplicaSet::kind(&())
                && owner.api_version == ReplicaSet::api_version(&())
                && self.0.contains(&owner.uid)
        })
    }
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
    fn a_pod_is_its_replica_sets_by_uid() {
        let owned = |name: &str, version: &str, kind: &str, uid: &str, controller: bool| {
            let owner =
                json!({"apiVersion": version, "kind": kind, "name": "any", "uid": uid, "controller": controller});
            json!({"metadata": {"name": name, "uid": format!("uid-{name}"), "ownerReferences": [owner]}})
        };
        let set = |name: &str, workload: &str| -> ReplicaSet {
            serde_json::from_value(owned(name, "apps/v1", "Deployment", workload, true)).unwrap()
        };
        let sets = [set("router-1", "d1"), set("router-2", "d1"), set("other-1", "d2"), ReplicaSet::default()];
        let own = ReplicaSets::of(&sets, "d1");
        let pod = |version: &str, kind: &str, set: &str, controller: bool| -> Pod {
            serde_json::from_value(owned("p", version, kind, set, controller)).unwrap()
        };
        for set in ["uid-router-1", "uid-router-2"] {
            assert!(own.control(&pod("apps/v1", "ReplicaSet", set, true)), "{set}");
        }
        let mut invented = pod("apps/v1", "ReplicaSet", "invented", true);
        assert!(!own.control(&invented), "a name and an invented UID");
        invented.labels_mut().insert("pod-template-hash".into(), "1".into());
        invented.owner_references_mut()[0].name = "router-1".into();
        assert!(!own.control(&invented), "with the labels and the name of a real one");
        assert!(!own.control(&pod("apps/v1", "ReplicaSet", "uid-other-1", true)), "another workload's");
        assert!(!own.control(&pod("apps/v1", "ReplicaSet", "uid-router-1", false)), "not its controller");
        assert!(!own.control(&pod("batch/v1", "Job", "uid-router-1", true)), "another kind");
        assert!(!own.control(&pod("example.com/v1", "ReplicaSet", "uid-router-1", true)), "another group");
        assert!(!own.control(&Pod::default()), "a pod that nobody controls");
        assert!(!ReplicaSets::of(&sets, "").control(&pod("apps/v1", "ReplicaSet", "", true)));
    }
}
