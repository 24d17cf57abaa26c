//! Drops from watched objects what no reconcile reads, before a cache keeps them. `managedFields` alone takes more memory
//! than all that is read of a pod.
//!
//! Each function names what it keeps. The table tests of decisions read pruned objects.

use k8s_openapi::api::{
    apps::v1::{Deployment, DeploymentSpec},
    batch::v1::{Job, JobSpec, JobStatus},
    core::v1::{ContainerStatus, Pod, PodStatus},
};
use kube::{Resource, ResourceExt};

/// The object as its user applied it, once more as text.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Annotations of the controller of Jobs, such as a pod's index.
const OF_JOBS: &str = "batch.kubernetes.io/";

/// Keeps an object as it is, without the records of who wrote it.
pub fn metadata<K: Resource>(object: &mut K) {
    let metadata = object.meta_mut();
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
}

/// Keeps metadata, whether the Kubernetes Job is suspended, and its conditions.
pub fn batch_job(batch_job: &mut Job) {
    metadata(batch_job);
    batch_job.metadata.annotations = None;
    if let Some(spec) = &mut batch_job.spec {
        *spec = JobSpec { suspend: spec.suspend, ..JobSpec::default() };
    }
    if let Some(status) = &mut batch_job.status {
        *status = JobStatus { conditions: status.conditions.take(), ..JobStatus::default() };
    }
}

/// Keeps metadata, and phase, conditions, address and containers of the status.
pub fn pod(pod: &mut Pod) {
    metadata(pod);
    pod.annotations_mut().retain(|name, _| name.starts_with(OF_JOBS));
    pod.spec = None;
    if let Some(status) = &mut pod.status {
        let containers = status.container_statuses.take();
        *status = PodStatus {
            phase: status.phase.take(),
            reason: status.reason.take(),
            conditions: status.conditions.take(),
            pod_ip: status.pod_ip.take(),
            container_statuses: containers.map(|containers| containers.into_iter().map(container).collect()),
            ..PodStatus::default()
        };
    }
}

fn container(status: ContainerStatus) -> ContainerStatus {
    ContainerStatus {
        name: status.name,
        restart_count: status.restart_count,
        ready: status.ready,
        state: status.state,
        last_state: status.last_state,
        ..ContainerStatus::default()
    }
}

/// Keeps metadata, the number of replicas and the status.
pub fn workload(workload: &mut Deployment) {
    metadata(workload);
    workload.metadata.annotations = None;
    if let Some(spec) = &mut workload.spec {
        *spec = DeploymentSpec { replicas: spec.replicas, ..DeploymentSpec::default() };
    }
}

/// Keeps metadata without annotations.
pub fn replica_set<K: Resource>(replica_set: &mut K) {
    metadata(replica_set);
    replica_set.meta_mut().annotations = None;
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_no_reconcile_reads_is_dropped() {
        let managed = json!([{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {}}}]);
        let mut watched: Pod = serde_json::from_value(json!({
            "metadata": {
                "name": "a-0-0", "uid": "u", "labels": {"athanor.dev/finetunejob": "a"}, "managedFields": managed,
                "annotations": {"batch.kubernetes.io/job-completion-index": "0", "prometheus.io/port": "9100"},
            },
            "spec": {"containers": [{"name": "trainer", "image": "i"}]},
            "status": {
                "phase": "Running", "podIP": "10.0.0.1", "hostIP": "10.0.0.9", "qosClass": "Burstable",
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "trainer", "image": "i", "imageID": "sha256:1", "ready": true,
                    "restartCount": 2, "state": {"running": {"startedAt": "2026-01-01T00:00:05Z"}}}],
            },
        }))
        .unwrap();
        pod(&mut watched);
        let kept = serde_json::to_value(&watched).unwrap();
        assert_eq!(kept["metadata"]["managedFields"], Value::Null);
        assert_eq!(kept["metadata"]["annotations"], json!({"batch.kubernetes.io/job-completion-index": "0"}));
        assert_eq!(
            (&kept["metadata"]["uid"], &kept["metadata"]["labels"]["athanor.dev/finetunejob"]),
            (&json!("u"), &json!("a"))
        );
        assert_eq!(kept["spec"], Value::Null);
        let status = &kept["status"];
        assert_eq!(
            (&status["phase"], &status["podIP"], &status["hostIP"]),
            (&json!("Running"), &json!("10.0.0.1"), &Value::Null)
        );
        let container = &status["containerStatuses"][0];
        assert_eq!((&container["restartCount"], &container["imageID"]), (&json!(2), &json!("")));
        assert_eq!(container["state"]["running"]["startedAt"], "2026-01-01T00:00:05Z");
    }
}
