//! Reads which adapters the pods of shared servers have loaded, by HTTP from every ready pod.

use std::collections::{BTreeMap, BTreeSet};

use athanor_contract::process::port;
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;

use super::ask::ask;

/// Path of a server's list of models, in which its adapters are.
const MODELS: &str = "/v1/models";

/// Adapters that pods have loaded, by servers: one set of names for each ready pod. It is empty for a pod that does not
/// answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded(BTreeMap<String, Vec<BTreeSet<String>>>);

impl Loaded {
    /// Takes what the ready pods of one group of servers have loaded.
    pub fn insert(&mut self, servers: &str, pods: Vec<BTreeSet<String>>) {
        self.0.insert(servers.into(), pods);
    }

    /// Returns the number of ready pods that have an adapter, and the number of ready pods. Servers that were not asked
    /// have none.
    pub fn count(&self, servers: &str, adapter: &str) -> (i32, i32) {
        let pods = self.0.get(servers).map_or(&[][..], Vec::as_slice);
        let have = pods.iter().filter(|names| names.contains(adapter)).count();
        let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        (number(have), number(pods.len()))
    }
}

/// `GET /v1/models`
#[derive(Deserialize)]
struct ModelList {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

/// Returns the names that each pod lists.
pub async fn read(http: &reqwest::Client, pods: &[&Pod]) -> Vec<BTreeSet<String>> {
    join_all(pods.iter().map(|pod| names(http, pod))).await
}

async fn names(http: &reqwest::Client, pod: &Pod) -> BTreeSet<String> {
    let address = pod.status.as_ref().and_then(|status| status.pod_ip.as_deref());
    let Some(address) = address else { return BTreeSet::new() };
    match ask::<ModelList>(http, address, port::HTTP, MODELS).await {
        Ok(list) => list.data.into_iter().map(|model| model.id).collect(),
        Err(error) => {
            tracing::warn!(address, %error, "the adapters of a server could not be read");
            BTreeSet::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_counted_by_servers_and_adapter() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let mut loaded = Loaded::default();
        loaded.insert("m-1", vec![names(&["m", "a"]), names(&["m", "a", "b"]), names(&[])]);
        assert_eq!(loaded.count("m-1", "a"), (2, 3));
        assert_eq!(loaded.count("m-1", "b"), (1, 3));
        assert_eq!(loaded.count("m-1", "c"), (0, 3));
        assert_eq!(loaded.count("m-2", "a"), (0, 0));
    }
}
