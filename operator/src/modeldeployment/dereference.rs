//! Reads what a decision about a ModelDeployment needs: jobs, revisions' Deployments, pods, and the routers' counts.

use std::collections::BTreeMap;

use athanor_crds::{FineTuneJob, ModelDeployment, label};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{Api, Client, ResourceExt, api::ListParams};

use super::{
    analysis::{self, Counts},
    names,
};
use crate::{cluster, context::ReconcileError, pods};

/// What there is.
pub struct Observed {
    pub deployment: ModelDeployment,
    /// The FineTuneJob that `spec.model.fromJob` names.
    pub source_job: Option<FineTuneJob>,
    /// FineTuneJobs that this deployment created.
    pub retrainings: Vec<FineTuneJob>,
    /// Server Deployments by revision.
    pub revisions: BTreeMap<String, Workload>,
    /// The routers' Deployment.
    pub router: Option<Workload>,
    /// There is a monitor's Deployment.
    pub has_monitor: bool,
    /// Why a pod does not run, by revision; the router's has the empty name.
    pub waiting: BTreeMap<String, String>,
    /// What the routers counted by revision; read during a canary only, and absent when a router did not answer.
    pub counts: Option<BTreeMap<String, Counts>>,
}

/// What matters of a Deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    pub desired: i32,
    /// Pods of the newest template that answer.
    pub available: i32,
    pub replicas: i32,
    /// Kubernetes gave up waiting, with its message.
    pub stuck: Option<String>,
}

impl Workload {
    pub fn of(deployment: &Deployment) -> Self {
        let desired = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        let Some(status) = &deployment.status else { return Self { desired, ..Self::default() } };
        let seen = status.observed_generation >= deployment.metadata.generation;
        let available = status.available_replicas.unwrap_or(0).min(status.updated_replicas.unwrap_or(0));
        let stuck = status.conditions.iter().flatten().find(|condition| {
            condition.type_ == "Progressing"
                && condition.status == "False"
                && condition.reason.as_deref() == Some("ProgressDeadlineExceeded")
        });
        Self {
            desired,
            available: if seen { available } else { 0 },
            replicas: status.replicas.unwrap_or(0),
            stuck: stuck.filter(|_| seen).map(|condition| condition.message.clone().unwrap_or_default()),
        }
    }

    /// All its pods answer, and there is at least one.
    pub fn is_ready(&self) -> bool {
        self.available >= self.desired.max(1)
    }
}

/// Reads; `None` when the deployment is gone or going.
pub async fn dereference(
    client: &Client,
    http: &reqwest::Client,
    deployment: &ModelDeployment,
) -> Result<Option<Observed>, ReconcileError> {
    let namespace = deployment.namespace().ok_or(ReconcileError::Incomplete("namespace"))?;
    let name = deployment.name_any();
    // The cache may not know of a status that was just written, and the rollout is in there.
    let newest = Api::<ModelDeployment>::namespaced(client.clone(), &namespace).get_opt(&name).await;
    let Some(deployment) = newest.map_err(ReconcileError::read("the ModelDeployment"))? else { return Ok(None) };
    if deployment.metadata.deletion_timestamp.is_some() {
        return Ok(None);
    }
    let uid = deployment.uid().ok_or(ReconcileError::Incomplete("uid"))?;
    let ours = ListParams::default().labels(&format!("{}={name}", label::DEPLOYMENT));
    let jobs: Api<FineTuneJob> = Api::namespaced(client.clone(), &namespace);
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), &namespace);
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let source_job = async {
        match &deployment.spec.model.from_job {
            Some(reference) => jobs.get_opt(&reference.name).await,
            None => Ok(None),
        }
    };
    let (source_job, retrainings, deployments, pods) =
        futures::try_join!(source_job, jobs.list(&ours), deployments.list(&ours), pods.list(&ours))
            .map_err(ReconcileError::read("jobs, Deployments and pods"))?;
    let retrainings = retrainings.items.into_iter().filter(|job| cluster::is_owned_by(job, &uid)).collect();
    let mut router = None;
    let mut has_monitor = false;
    let mut revisions = BTreeMap::new();
    for workload in deployments.items.iter().filter(|workload| cluster::is_owned_by(*workload, &uid)) {
        if workload.name_any() == names::router(&name) {
            router = Some(Workload::of(workload));
        } else if workload.name_any() == names::monitor(&name) {
            has_monitor = true;
        } else if let Some(revision) = workload.labels().get(label::REVISION) {
            revisions.insert(revision.clone(), Workload::of(workload));
        }
    }
    let component = |pod: &&Pod| pod.labels().get("app.kubernetes.io/component").cloned().unwrap_or_default();
    let mut waiting = BTreeMap::new();
    for pod in pods.items.iter().filter(|pod| component(pod) != names::MONITOR) {
        if let Some(reason) = pods::waiting_reason(pod) {
            waiting.insert(pod.labels().get(label::REVISION).cloned().unwrap_or_default(), reason);
        }
    }
    let has_candidate = deployment.status.as_ref().is_some_and(|status| status.candidate.is_some());
    let counts = if has_candidate {
        let routers: Vec<&Pod> = pods.items.iter().filter(|pod| component(pod) == names::ROUTER).collect();
        analysis::read(http, &routers).await
    } else {
        None
    };
    Ok(Some(Observed { deployment, source_job, retrainings, revisions, router, has_monitor, waiting, counts }))
}
