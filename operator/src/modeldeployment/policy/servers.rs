//! Which servers there are: one group for each revision, or one for all revisions that are adapters of the same base.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use athanor_contract::serve::AdapterConfig;
use athanor_crds::{AdapterStatus, ModelDeploymentStatus, RevisionStatus};
use jiff::Timestamp;

use super::rollout::Rollout;
use crate::{
    modeldeployment::{
        names,
        observe::{adapters::Loaded, workload::Workload},
    },
    time::since,
};

/// Time in which the servers of a candidate have to load it: ten minutes in which pods with another base have to become
/// ready, and five more.
const LOADING: Duration = Duration::from_secs(900);

/// A group of servers with one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Name of the group's Deployment, Service, ConfigMap and PodDisruptionBudget: that of its revision, unless it is
    /// shared.
    pub name: String,
    pub model_uri: String,
    /// What is loaded besides: adapters that clients select, and revisions. Sorted by name.
    pub adapters: Vec<AdapterConfig>,
}

/// Returns the servers of the current revision and of the candidate. A revision that is answering its last requests
/// stays loaded if its servers are among them.
pub fn servers(deployment: &str, rollout: &Rollout, selectable: &[AdapterStatus]) -> Vec<Server> {
    let candidate = rollout.candidate.as_ref().map(|candidate| &candidate.revision);
    let mut servers: Vec<Server> = Vec::new();
    for revision in rollout.current.iter().chain(candidate) {
        let name = names::servers(deployment, revision);
        if servers.iter().all(|server| server.name != name) {
            let adapter =
                |adapter: &AdapterStatus| AdapterConfig { name: adapter.name.clone(), uri: adapter.uri.clone() };
            let model_uri = revision.base.clone().unwrap_or_else(|| revision.model_uri.clone());
            servers.push(Server { name, model_uri, adapters: selectable.iter().map(adapter).collect() });
        }
    }
    let current = rollout.current.iter().chain(candidate);
    let current = current.map(|revision| (&revision.name, revision.base.as_ref(), Some(&revision.model_uri)));
    let previous = rollout.previous.iter().map(|it| (&it.name, it.base.as_ref(), it.model_uri.as_ref()));
    for (name, base, uri) in current.chain(previous) {
        let Some((base, uri)) = base.zip(uri) else { continue };
        let shared = names::shared_servers(deployment, base);
        let Some(server) = servers.iter_mut().find(|server| server.name == shared) else { continue };
        if server.adapters.iter().all(|adapter| adapter.name != *name) {
            server.adapters.push(AdapterConfig { name: name.clone(), uri: uri.clone() });
        }
    }
    for server in &mut servers {
        server.adapters.sort();
    }
    servers
}

/// Returns the names of the servers that have traffic or requests to finish.
pub fn needed(deployment: &str, rollout: &Rollout) -> BTreeSet<String> {
    let candidate = rollout.candidate.as_ref().map(|candidate| &candidate.revision);
    let serving = rollout.current.iter().chain(candidate).map(|revision| names::servers(deployment, revision));
    let previous = rollout.previous.iter().map(|previous| match &previous.base {
        Some(base) => names::shared_servers(deployment, base),
        None => previous.name.clone(),
    });
    serving.chain(previous).collect()
}

/// Returns whether a revision's pods have to be asked whether they have loaded it. Once all of them had, the readiness
/// of pods alone counts: a pod that starts loads its adapters before it is ready.
pub fn is_loading(revision: &RevisionStatus) -> bool {
    revision.base.is_some() && revision.ready_at.is_none()
}

/// The state of a revision's servers, from the revision's point of view.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Workloads by revision.
    pub workloads: BTreeMap<String, Workload>,
    /// Why a pod does not run or has not loaded the revision, by revision.
    pub waiting: BTreeMap<String, String>,
}

/// What is known of all servers, by their names.
pub struct Known<'a> {
    pub workloads: &'a BTreeMap<String, Workload>,
    /// Why a pod does not run.
    pub waiting: &'a BTreeMap<String, String>,
    pub loaded: &'a Loaded,
    pub now: Timestamp,
}

/// Returns the state of the servers of the current revision, of the candidate and of the model to serve.
pub fn view(
    deployment: &str,
    status: &ModelDeploymentStatus,
    target: Option<&RevisionStatus>,
    known: &Known<'_>,
) -> View {
    let mut view = View::default();
    let candidate = status.candidate.as_ref();
    let begun = candidate.and_then(|candidate| candidate.started_at.as_ref()).map(|time| time.0);
    // The status says whether a revision was ready before, so it comes before the target.
    let revisions = [
        (status.current_revision.as_ref(), None),
        (candidate.map(|candidate| &candidate.revision), begun),
        (target, None),
    ];
    for (revision, begun) in revisions {
        let Some(revision) = revision.filter(|revision| !view.workloads.contains_key(&revision.name)) else { continue };
        let servers = names::servers(deployment, revision);
        let Some(workload) = known.workloads.get(&servers) else { continue };
        let mut workload = workload.clone();
        let mut why = known.waiting.get(&servers).cloned();
        if is_loading(revision) {
            let (have, ready) = known.loaded.count(&servers, &revision.name);
            if have < ready {
                let lacking = format!("{have} of {ready} ready pods have loaded the adapter");
                if begun.is_some_and(|begun| since(begun, known.now) > LOADING) {
                    workload.stuck.get_or_insert_with(|| lacking.clone());
                }
                why.get_or_insert(lacking);
            }
            if have < ready || ready == 0 {
                // Fewer than are desired, however many pods there are during an update.
                workload.available = workload.available.min(have).min(workload.desired.max(1) - 1);
            }
        }
        if let Some(why) = why {
            view.waiting.insert(revision.name.clone(), why);
        }
        view.workloads.insert(revision.name.clone(), workload);
    }
    view
}
