//! Reads what a decision about a ModelDeployment needs: jobs, workloads and pods from the caches, the routers' counts,
//! and the adapters that servers have loaded.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use athanor_crds::{FineTuneJob, ModelDeployment, label};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use super::{
    names,
    observe::{
        adapters::{self, Loaded},
        counts::{self, Counts},
        workload::{ReplicaSets, Workload, is_ready},
    },
    policy::servers,
};
use crate::{cluster, pods, reconciler::ReconcileError, stores::Stores};

/// Label of a pod with the component that it belongs to.
const COMPONENT: &str = "app.kubernetes.io/component";

/// What was read.
pub struct Observed {
    pub deployment: ModelDeployment,
    /// The FineTuneJob that `spec.model.fromJob` names.
    pub source_job: Option<Arc<FineTuneJob>>,
    /// The FineTuneJobs that `spec.adapters` names, by name.
    pub adapter_jobs: BTreeMap<String, Arc<FineTuneJob>>,
    /// FineTuneJobs that this deployment created.
    pub retrainings: Vec<Arc<FineTuneJob>>,
    /// Workloads of servers by their names: that of their revision, unless revisions share them.
    pub revisions: BTreeMap<String, Workload>,
    /// Workload of the routers.
    pub router: Option<Workload>,
    /// Whether there is a workload of the monitor.
    pub has_monitor: bool,
    /// Why a pod does not run, by servers; the router has the empty name.
    pub waiting: BTreeMap<String, String>,
    /// What the servers of revisions that are being loaded have loaded.
    pub loaded: Loaded,
    /// Counts of the routers, read during a canary only. Absent if a router did not answer.
    pub counts: Option<Counts>,
    /// Digest of the routers that were asked, each with its restarts.
    pub routers: String,
}

/// Reads; `None` when the deployment is being deleted.
///
/// # Errors
/// The object has no namespace or UID.
pub async fn dereference(
    stores: &Stores,
    http: &reqwest::Client,
    deployment: &ModelDeployment,
) -> Result<Option<Observed>, ReconcileError> {
    if deployment.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let namespace = deployment.namespace().ok_or(ReconcileError::Incomplete("namespace"))?;
    let uid = deployment.uid().ok_or(ReconcileError::Incomplete("uid"))?;
    let name = deployment.name_any();
    let source_job = deployment.spec.model.from_job.as_ref();
    let source_job = source_job.and_then(|job| stores.fine_tune_jobs.get(&namespace, &job.name));
    let adapter_jobs = deployment.spec.adapters.iter().filter_map(|adapter| {
        let job = &adapter.from_job.as_ref()?.name;
        Some((job.clone(), stores.fine_tune_jobs.get(&namespace, job)?))
    });
    let adapter_jobs = adapter_jobs.collect();
    let mut retrainings = stores.fine_tune_jobs.select(&namespace, label::DEPLOYMENT, &name);
    retrainings.retain(|job| cluster::is_owned_by(&**job, &uid));
    retrainings.sort_by_key(|job| job.name_any());
    let mut pods = stores.pods.select(&namespace, label::DEPLOYMENT, &name);
    pods.sort_by_key(|pod| pod.name_any());
    let mut observed = Observed {
        deployment: deployment.clone(),
        source_job,
        adapter_jobs,
        retrainings,
        revisions: BTreeMap::new(),
        router: None,
        has_monitor: false,
        waiting: waiting(&pods),
        loaded: loaded(stores, http, deployment, &pods).await,
        counts: None,
        routers: String::new(),
    };
    for workload in stores.workloads.select(&namespace, label::DEPLOYMENT, &name) {
        if !cluster::is_owned_by(&*workload, &uid) {
            continue;
        }
        if workload.name_any() == names::router(&name) {
            observed.router = Some(Workload::of(&workload));
        } else if workload.name_any() == names::monitor(&name) {
            observed.has_monitor = true;
        } else if let Some(revision) = workload.labels().get(label::REVISION) {
            observed.revisions.insert(revision.clone(), Workload::of(&workload));
        }
    }
    if deployment.status.as_ref().is_some_and(|status| status.candidate.is_some()) {
        let routers = answering(stores, deployment, &names::router(&name), &pods);
        observed.routers = counts::identity(&routers);
        observed.counts = counts::read(http, &routers).await;
    }
    Ok(Some(observed))
}

/// Returns the ready pods of a workload of the deployment. Only these are asked: the user of a namespace may create pods
/// with any labels.
fn answering<'a>(stores: &Stores, deployment: &ModelDeployment, workload: &str, pods: &'a [Arc<Pod>]) -> Vec<&'a Pod> {
    let namespace = deployment.namespace().unwrap_or_default();
    let workload = stores.workloads.get(&namespace, workload);
    let owner = deployment.uid().unwrap_or_default();
    let workload = workload.filter(|workload| cluster::is_owned_by(&**workload, &owner));
    let Some(workload) = workload.and_then(|workload| workload.uid()) else { return Vec::new() };
    let sets = stores.replica_sets.select(&namespace, label::DEPLOYMENT, &deployment.name_any());
    let sets = ReplicaSets::of(sets.iter().map(|set| &**set), &workload);
    pods.iter().map(AsRef::as_ref).filter(|pod| is_ready(pod) && sets.control(pod)).collect()
}

/// Asks the pods of servers that are loading a revision.
async fn loaded(stores: &Stores, http: &reqwest::Client, deployment: &ModelDeployment, pods: &[Arc<Pod>]) -> Loaded {
    let mut loaded = Loaded::default();
    let Some(status) = &deployment.status else { return loaded };
    let candidate = status.candidate.as_ref().map(|candidate| &candidate.revision);
    let loading = status.current_revision.iter().chain(candidate).filter(|revision| servers::is_loading(revision));
    let loading: BTreeSet<String> = loading.map(|revision| names::servers(&deployment.name_any(), revision)).collect();
    for servers in loading {
        let pods = answering(stores, deployment, &servers, pods);
        loaded.insert(&servers, adapters::read(http, &pods).await);
    }
    loaded
}

/// Returns why a pod of each revision, or of the router, does not run.
fn waiting(pods: &[Arc<Pod>]) -> BTreeMap<String, String> {
    let waiting = pods.iter().filter(|pod| component(pod) != names::MONITOR).filter_map(|pod| {
        let revision = pod.labels().get(label::REVISION).cloned().unwrap_or_default();
        Some((revision, pods::waiting_reason(pod)?))
    });
    waiting.collect()
}

fn component(pod: &Pod) -> &str {
    pod.labels().get(COMPONENT).map(String::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
    use kube::{core::PartialObjectMeta, runtime::watcher::Event};
    use serde::de::DeserializeOwned;
    use serde_json::json;

    use super::*;

    /// An object of the deployment `m` by its labels, with a controller.
    fn object<K: DeserializeOwned>(name: &str, uid: &str, (kind, owner): (&str, &str)) -> K {
        let version = if kind == "ModelDeployment" { "athanor.dev/v1alpha1" } else { "apps/v1" };
        let owner = json!({"apiVersion": version, "kind": kind, "name": "x", "uid": owner, "controller": true});
        let labels = json!({"athanor.dev/deployment": "m", "app.kubernetes.io/component": "router"});
        let metadata =
            json!({"name": name, "namespace": "ns", "uid": uid, "labels": labels, "ownerReferences": [owner]});
        serde_json::from_value(json!({"metadata": metadata})).unwrap()
    }

    fn pod(name: &str, set: &str) -> Arc<Pod> {
        let mut pod: Pod = object(name, name, ("ReplicaSet", set));
        let status = json!({"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]});
        pod.status = serde_json::from_value(status).unwrap();
        Arc::new(pod)
    }

    #[test]
    fn only_pods_of_the_deployments_own_replica_sets_are_asked() {
        let (stores, mut feeds) = Stores::new();
        let deployment: ModelDeployment = serde_json::from_value(json!({
            "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "spec": {"model": {"from": "s3://models/a"}},
            "metadata": {"name": "m", "namespace": "ns", "uid": "md"},
        }))
        .unwrap();
        let now = Instant::now();
        let pods = [pod("real", "rs"), pod("invented", "none"), pod("theirs", "rs-theirs"), pod("server", "rs-server")];
        let asked = |stores: &Stores| -> Vec<String> {
            answering(stores, &deployment, "m-router", &pods).iter().map(|pod| pod.name_any()).collect()
        };
        assert_eq!(asked(&stores), [""; 0], "nothing is known yet");
        // A Deployment and its ReplicaSet by the user, under labels of the router.
        for (name, uid, owner) in
            [("m-router", "d", ("ModelDeployment", "md")), ("copy", "d-theirs", ("ModelDeployment", "invented"))]
        {
            feeds.workloads.take(&Event::Apply(object::<Deployment>(name, uid, owner)), now);
        }
        assert_eq!(asked(&stores), [""; 0], "no ReplicaSet is known");
        for (name, uid, workload) in
            [("m-router-1", "rs", "d"), ("copy-1", "rs-theirs", "d-theirs"), ("m-1", "rs-server", "d-server")]
        {
            let set = object::<PartialObjectMeta<ReplicaSet>>(name, uid, ("Deployment", workload));
            feeds.replica_sets.take(&Event::Apply(set), now);
        }
        assert_eq!(asked(&stores), ["real"]);
        // A Deployment of the router's name that is not this deployment's.
        let theirs = object::<Deployment>("m-router", "d", ("ModelDeployment", "another"));
        feeds.workloads.take(&Event::Apply(theirs), now);
        assert_eq!(asked(&stores), [""; 0]);
    }
}
