//! The router's eyes in a cluster: one ConfigMap, and the EndpointSlices of the Services it names. Nothing else is read, nothing is
//! written.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use athanor_contract::process::port;
use futures::StreamExt;
use k8s_openapi::api::{core::v1::ConfigMap, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, ResourceExt,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    balance::endpoints::{Address, Registry},
    config,
};

/// Label of an EndpointSlice that names its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Follows the ConfigMap and the endpoints it leads to, for as long as the process lives.
pub async fn watch(client: Client, namespace: String, name: String, registry: Arc<Registry>) {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
    let selected = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = watcher::watcher(maps, selected).default_backoff().boxed();
    // One watch a Service; dropping the handle ends it.
    let mut services: HashMap<String, AbortOnDropHandle<()>> = HashMap::new();
    while let Some(event) = events.next().await {
        let map = match event {
            Ok(Event::Apply(map) | Event::InitApply(map)) => map,
            Ok(Event::Delete(_)) => {
                tracing::warn!(config_map = name, "the ConfigMap is gone; its last configuration stays");
                continue;
            }
            Ok(Event::Init | Event::InitDone) => continue,
            Err(error) => {
                tracing::warn!(%error, config_map = name, "the watch of the ConfigMap failed and starts again");
                continue;
            }
        };
        let text = map.data.as_ref().and_then(|data| data.get(config::KEY)).map(String::as_str).unwrap_or_default();
        let parsed = config::parse(text);
        metrics::gauge!("athanor_router_config_valid_ratio").set(f64::from(u8::from(parsed.is_ok())));
        match parsed {
            Ok(config) => {
                let wanted: Vec<String> = config.revisions.iter().map(|revision| revision.service.clone()).collect();
                let weights: Vec<String> =
                    config.revisions.iter().map(|revision| format!("{}={}", revision.name, revision.weight)).collect();
                tracing::info!(weights = weights.join(" "), "configuration taken");
                // Before the new watches start, or what they find could be forgotten with services no longer named.
                registry.set_config(config);
                services.retain(|service, _| wanted.contains(service));
                for service in wanted {
                    services.entry(service.clone()).or_insert_with(|| {
                        let slices = Api::namespaced(client.clone(), &namespace);
                        AbortOnDropHandle::new(tokio::spawn(watch_service(slices, service, registry.clone())))
                    });
                }
            }
            Err(error) => {
                tracing::error!(%error, config_map = name, "the configuration is refused; the last one stays")
            }
        }
    }
}

async fn watch_service(slices: Api<EndpointSlice>, service: String, registry: Arc<Registry>) {
    let selected = watcher::Config::default().labels(&format!("{SERVICE_LABEL}={service}"));
    let mut events = watcher::watcher(slices, selected).default_backoff().boxed();
    let mut known: BTreeMap<String, Vec<Address>> = BTreeMap::new();
    // What a listing has brought so far; it replaces `known` only when it is whole.
    let mut listing = Some(BTreeMap::new());
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listing = Some(BTreeMap::new()),
            Ok(Event::InitApply(slice)) => {
                listing.get_or_insert_default().insert(slice.name_any(), addresses(&slice));
            }
            Ok(Event::InitDone) => known = listing.take().unwrap_or_default(),
            Ok(Event::Apply(slice)) => {
                known.insert(slice.name_any(), addresses(&slice));
            }
            Ok(Event::Delete(slice)) => {
                known.remove(&slice.name_any());
            }
            Err(error) => tracing::warn!(%error, service, "the watch of EndpointSlices failed and starts again"),
        }
        if listing.is_none() {
            registry.set_endpoints(&service, known.values().flatten().copied().collect());
        }
    }
}

/// Operational addresses of the routers behind the Service that are ready: not of this one once it ends.
pub async fn ready_routers(client: &Client, namespace: &str, service: &str) -> Vec<SocketAddr> {
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), namespace);
    let selected = kube::api::ListParams::default().labels(&format!("{SERVICE_LABEL}={service}"));
    let found = match slices.list(&selected).await {
        Ok(found) => found.items,
        Err(error) => {
            tracing::warn!(%error, service, "the other routers cannot be listed");
            Vec::new()
        }
    };
    let ready = found.iter().flat_map(addresses).filter(|address| !address.draining);
    ready.map(|address| SocketAddr::new(address.http.ip(), port::ROUTER_OPS)).collect()
}

/// Addresses of a slice that answer: ready ones, and those that drain.
pub fn addresses(slice: &EndpointSlice) -> Vec<Address> {
    let port = |name: &str| {
        let port = slice.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name))?.port?;
        u16::try_from(port).ok()
    };
    let Some(http) = port("http").or_else(|| port("https")) else { return Vec::new() };
    let grpc = port("grpc");
    let endpoints = slice.endpoints.iter().filter_map(|endpoint| {
        let conditions = endpoint.conditions.as_ref();
        // Absent means true, except for terminating.
        let ready = conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
        let serving = conditions.and_then(|conditions| conditions.serving).unwrap_or(ready);
        if !ready && !serving {
            return None;
        }
        let ip: IpAddr = endpoint.addresses.first()?.parse().ok()?;
        Some(Address {
            http: SocketAddr::new(ip, http),
            grpc: grpc.map(|port| SocketAddr::new(ip, port)),
            draining: !ready,
        })
    });
    endpoints.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ready_and_draining_endpoints_of_a_slice() {
        let slice: EndpointSlice = serde_json::from_value(serde_json::json!({
            "addressType": "IPv4",
            "metadata": {"name": "a-1"},
            "ports": [{"name": "grpc", "port": 8081}, {"name": "http", "port": 8080}],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "conditions": {"ready": true, "serving": true}},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": true, "terminating": true}},
                {"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": false}},
                {"addresses": ["10.0.0.4"]},
                {"addresses": ["a.host.name"]},
            ],
        }))
        .unwrap();
        let found: Vec<(String, bool)> = addresses(&slice).iter().map(|a| (a.http.to_string(), a.draining)).collect();
        let expected = [("10.0.0.1:8080", false), ("10.0.0.2:8080", true), ("10.0.0.4:8080", false)];
        assert_eq!(found, expected.map(|(address, draining)| (address.to_owned(), draining)));
        assert_eq!(addresses(&slice)[0].grpc.unwrap().to_string(), "10.0.0.1:8081");
        let mut no_http = slice.clone();
        no_http.ports = None;
        assert_eq!(addresses(&no_http), []);
    }
}
