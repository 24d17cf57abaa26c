//! The labels of each revision, learned from its servers' `/v1/models`, so that feedback with an unknown label is refused.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Deserialize;

use crate::balance::{client::Client, endpoints::Registry};

/// Between attempts to learn the labels of revisions whose labels are not known yet.
const RETRY: Duration = Duration::from_secs(1);
/// The most a `/v1/models` answer may hold.
const MAX_BYTES: usize = 4 << 20;

/// What is read of a `/v1/models` answer. Servers of other projects have other fields, and no labels.
#[derive(Deserialize)]
struct ModelList {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    labels: Vec<String>,
}

/// Labels by revision; a revision never changes its labels.
#[derive(Default)]
pub struct Labels {
    known: Mutex<HashMap<Arc<str>, Arc<[String]>>>,
}

impl Labels {
    pub fn set(&self, revision: Arc<str>, labels: Vec<String>) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(revision, labels.into());
    }

    pub fn get(&self, revision: &str) -> Option<Arc<[String]>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(revision).cloned()
    }

    /// The labels that any known revision has.
    pub fn all(&self) -> BTreeSet<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.values().flat_map(|labels| labels.iter().cloned()).collect()
    }

    /// Whether the labels of a revision are known. A language model has none.
    pub fn are_known(&self) -> bool {
        !self.known.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn keep(&self, names: &[Arc<str>]) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| names.contains(name));
    }
}

/// Asks the servers of revisions with unknown labels, for as long as the process lives.
pub async fn learn(registry: Arc<Registry>, client: Client, labels: Arc<Labels>) {
    let mut snapshots = registry.subscribe();
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let mut missing = false;
        for revision in &snapshot.revisions {
            if labels.get(&revision.name).is_some() {
                continue;
            }
            missing = true;
            for endpoint in &revision.endpoints {
                match client
                    .get(endpoint.http, "/v1/models", MAX_BYTES)
                    .await
                    .map(|body| serde_json::from_slice::<ModelList>(&body))
                {
                    Ok(Ok(list)) => {
                        let names = list.data.into_iter().flat_map(|model| model.labels).collect();
                        labels.set(revision.name.clone(), names);
                        break;
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(%error, endpoint = %endpoint.http, "/v1/models is not a list of models")
                    }
                    Err(error) => tracing::debug!(error, endpoint = %endpoint.http, "/v1/models was not answered"),
                }
            }
        }
        let names: Vec<Arc<str>> = snapshot.revisions.iter().map(|revision| revision.name.clone()).collect();
        labels.keep(&names);
        tokio::select! {
            changed = snapshots.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if missing => {}
        }
    }
}
