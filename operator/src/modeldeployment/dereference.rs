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
        workload::{Workload, is_of, is_ready},
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
        loaded: loaded(http, deployment, &pods).await,
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
        let routers = pods.iter().map(AsRef::as_ref).filter(|pod| component(pod) == names::ROUTER && is_ready(pod));
        let routers: Vec<&Pod> = routers.collect();
        observed.routers = counts::identity(&routers);
        observed.counts = counts::read(http, &routers).await;
    }
    Ok(Some(observed))
}

/// Asks the pods of servers that are loading a revision.
async fn loaded(http: &reqwest::Client, deployment: &ModelDeployment, pods: &[Arc<Pod>]) -> Loaded {
    let mut loaded = Loaded::default();
    let Some(status) = &deployment.status else { return loaded };
    let candidate = status.candidate.as_ref().map(|candidate| &candidate.revision);
    let loading = status.current_revision.iter().chain(candidate).filter(|revision| servers::is_loading(revision));
    let loading: BTreeSet<String> = loading.map(|revision| names::servers(&deployment.name_any(), revision)).collect();
    for servers in loading {
        let pods = pods.iter().map(AsRef::as_ref).filter(|pod| component(pod) == names::SERVER);
        let pods: Vec<&Pod> = pods.filter(|pod| is_ready(pod) && is_of(pod, &servers)).collect();
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
