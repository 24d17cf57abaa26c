//! The router without Kubernetes: a configuration file that is read again when it changes, and endpoints from the command line.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;

use crate::{
    balance::endpoints::{Address, Registry},
    config,
};

/// Between looks at the file.
const POLL: Duration = Duration::from_millis(500);

/// `revision=host:httpPort[:grpcPort]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointArgument {
    pub revision: String,
    pub host: String,
    pub http: u16,
    pub grpc: Option<u16>,
}

impl std::str::FromStr for EndpointArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (revision, address) = text.split_once('=')?;
            let mut parts = address.split(':');
            let (host, http, grpc) = (parts.next()?, parts.next()?, parts.next());
            if revision.is_empty() || host.is_empty() || parts.next().is_some() {
                return None;
            }
            let grpc = grpc.map(|port| port.parse().ok());
            if grpc == Some(None) {
                return None;
            }
            Some(Self { revision: revision.into(), host: host.into(), http: http.parse().ok()?, grpc: grpc.flatten() })
        };
        parse().ok_or_else(|| format!("{text:?} is not revision=host:httpPort[:grpcPort]"))
    }
}

/// Reads the configuration and sets the endpoints once; an error here is the user's.
pub async fn load(file: &PathBuf, endpoints: &[EndpointArgument], registry: &Registry) -> anyhow::Result<String> {
    let text = tokio::fs::read_to_string(file).await.with_context(|| format!("reading {}", file.display()))?;
    let config = config::parse(&text).with_context(|| file.display().to_string())?;
    registry.set_config(config.clone());
    set_endpoints(&config, endpoints, registry).await?;
    Ok(text)
}

async fn set_endpoints(
    config: &athanor_contract::serve::RouterConfig,
    endpoints: &[EndpointArgument],
    registry: &Registry,
) -> anyhow::Result<()> {
    for revision in &config.revisions {
        // Revisions that are adapters of the same model may share its servers.
        let names: Vec<&str> =
            config.revisions.iter().filter(|it| it.service == revision.service).map(|it| it.name.as_str()).collect();
        let mut addresses = Vec::new();
        for endpoint in endpoints.iter().filter(|endpoint| names.contains(&endpoint.revision.as_str())) {
            let found = tokio::net::lookup_host((endpoint.host.as_str(), endpoint.http)).await;
            let http: SocketAddr = found
                .with_context(|| format!("resolving {}", endpoint.host))?
                .next()
                .with_context(|| format!("{} has no address", endpoint.host))?;
            let grpc = endpoint.grpc.map(|port| SocketAddr::new(http.ip(), port));
            addresses.push(Address { http, grpc, draining: false });
        }
        registry.set_endpoints(&revision.service, addresses);
    }
    Ok(())
}

/// Takes changes of the file, for as long as the process lives. A bad one is refused and the last good one stays.
pub async fn follow(file: PathBuf, endpoints: Vec<EndpointArgument>, registry: Arc<Registry>, mut last: String) {
    loop {
        tokio::time::sleep(POLL).await;
        match tokio::fs::read_to_string(&file).await {
            Ok(text) if text != last => {
                match load(&file, &endpoints, &registry).await {
                    Ok(_) => tracing::info!(file = %file.display(), "configuration taken"),
                    Err(error) => tracing::error!(
                        error = format!("{error:#}"),
                        "the configuration is refused; the last one stays"
                    ),
                }
                last = text;
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, file = %file.display(), "the configuration cannot be read; the last one stays")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn revisions_that_share_servers_have_the_endpoints_of_each_other() {
        let text = r#"{"namespace": "n", "deployment": "d", "revisions": [
            {"name": "a", "service": "base", "weight": 60, "adapter": "a"},
            {"name": "b", "service": "base", "weight": 40, "adapter": "b"},
            {"name": "c", "service": "c", "weight": 0}]}"#;
        let registry = Registry::default();
        let config = config::parse(text).unwrap();
        registry.set_config(config.clone());
        let endpoints = ["a=127.0.0.1:1", "c=127.0.0.1:2"].map(|text| text.parse::<EndpointArgument>().unwrap());
        set_endpoints(&config, &endpoints, &registry).await.unwrap();
        let snapshot = registry.snapshot();
        let ports: Vec<Vec<u16>> = snapshot
            .revisions
            .iter()
            .map(|revision| revision.endpoints.iter().map(|endpoint| endpoint.http.port()).collect())
            .collect();
        assert_eq!(ports, [vec![1], vec![1], vec![2]]);
    }

    #[test]
    fn endpoints_from_the_command_line() {
        let with_grpc: EndpointArgument = "blue=127.0.0.1:8080:8081".parse().unwrap();
        assert_eq!((with_grpc.http, with_grpc.grpc), (8080, Some(8081)));
        assert_eq!("b=host:1".parse::<EndpointArgument>().unwrap().grpc, None);
        for bad in ["", "host:1", "b=host", "b=host:x", "b=host:1:x", "b=host:1:2:3", "=host:1", "b=:1"] {
            assert!(bad.parse::<EndpointArgument>().is_err(), "{bad}");
        }
    }
}
