//! When a deployment could answer at all, sampled by HTTP at its pods themselves: a request that fails otherwise is lost.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use athanor_contract::process::port;
use k8s_openapi::api::{core::v1::Pod, discovery::v1::EndpointSlice};
use kube::{Api, ResourceExt, api::ListParams};
use tokio::task::JoinHandle;

use crate::cluster::Cluster;

/// Between two looks at what answers.
const SAMPLE: Duration = Duration::from_millis(250);

/// What answered at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Whether a router and a server are ready.
    pub answers: bool,
    /// Whether every address to which the Service sends connections is that of a ready router. After a kill Kubernetes
    /// takes the address away within some seconds; until then a connection may be refused.
    pub connects: bool,
}

/// Why a request failed, as far as its client knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A router answered with an error.
    Answer,
    /// At every try the connection was refused or broke.
    Connection,
}

/// Samples, and the task that takes them.
#[derive(Clone)]
pub struct Availability {
    samples: Arc<Mutex<Vec<(Instant, Sample)>>>,
    task: Arc<JoinHandle<()>>,
}

impl Availability {
    /// Samples the pods of a namespace, and the addresses of a Service, until it is dropped.
    pub fn watch(cluster: Cluster, namespace: &str, service: &str) -> Result<Self> {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_millis(400)).build()?;
        let (seen, namespace) = (samples.clone(), namespace.to_owned());
        let slices: Api<EndpointSlice> = Api::namespaced(cluster.client.clone(), &namespace);
        let of_service = ListParams::default().labels(&format!("kubernetes.io/service-name={service}"));
        let task = tokio::spawn(async move {
            let (mut pods, mut addresses) = (Vec::new(), Vec::new());
            loop {
                // With a limit: the API server may be away. What is known stays in force then, for the Service as well.
                let limit = Duration::from_secs(1);
                if let Ok(Ok(listed)) = tokio::time::timeout(limit, cluster.select(&namespace, "")).await {
                    pods = listed;
                }
                if let Ok(Ok(listed)) = tokio::time::timeout(limit, slices.list(&of_service)).await {
                    addresses = listed.items.iter().flat_map(connected).collect();
                }
                let routers = ready(&http, &addresses_of(&pods, "router"), port::ROUTER_OPS).await;
                let servers = ready(&http, &addresses_of(&pods, "server"), port::HTTP).await;
                let connects = addresses.iter().all(|address| routers.contains(address));
                let sample = Sample { answers: !routers.is_empty() && !servers.is_empty(), connects };
                seen.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), sample));
                tokio::time::sleep(SAMPLE).await;
            }
        });
        Ok(Self { samples, task: Arc::new(task) })
    }

    /// Whether a request between these two may have failed in this way.
    pub fn excuses(&self, failure: Failure, begin: Instant, end: Instant) -> bool {
        excuses(&self.samples.lock().unwrap_or_else(PoisonError::into_inner), failure, begin, end)
    }

    /// Share of the samples at which a router and a server were ready.
    pub fn share(&self) -> f64 {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.iter().filter(|(_, sample)| sample.answers).count() as f64 / samples.len().max(1) as f64
    }
}

impl Drop for Availability {
    fn drop(&mut self) {
        if Arc::strong_count(&self.task) == 1 {
            self.task.abort();
        }
    }
}

/// Whether a gap overlaps the request. A gap lasts from the last good sample before it to the second good one after it: by
/// then the routers have heard of the servers that are back. Before the first sample, and after the last one, nothing is
/// known, and nothing excused.
fn excuses(samples: &[(Instant, Sample)], failure: Failure, begin: Instant, end: Instant) -> bool {
    let is_good = |sample: &Sample| sample.answers && (failure == Failure::Answer || sample.connects);
    let time = |at: usize| samples[at.min(samples.len() - 1)].0;
    let bad = samples.iter().enumerate().filter(|(_, (_, sample))| !is_good(sample)).map(|(at, _)| at);
    let gap = |at: usize| (time(at.saturating_sub(1)), time(at + 2));
    bad.map(gap).any(|(from, to)| from <= end && begin <= to)
}

/// Addresses to which a Service sends connections.
fn connected(slice: &EndpointSlice) -> Vec<String> {
    let is_ready = |ready: Option<bool>| ready.unwrap_or(true);
    let endpoints = slice.endpoints.iter();
    let there = endpoints.filter(|it| it.conditions.as_ref().is_none_or(|conditions| is_ready(conditions.ready)));
    there.flat_map(|endpoint| endpoint.addresses.clone()).collect()
}

fn addresses_of(pods: &[Pod], component: &str) -> Vec<String> {
    let of_component = pods.iter().filter(|pod| {
        let label = pod.labels().get("app.kubernetes.io/component");
        label.is_some_and(|found| found == component) && pod.metadata.deletion_timestamp.is_none()
    });
    of_component.filter_map(|pod| pod.status.as_ref()?.pod_ip.clone()).collect()
}

/// Those of the addresses that answer that they are ready.
async fn ready(http: &reqwest::Client, addresses: &[String], port: u16) -> Vec<String> {
    let ask = addresses.iter().map(async |address| {
        let answer = http.get(format!("http://{address}:{port}/readyz")).send().await;
        answer.is_ok_and(|answer| answer.status().is_success()).then(|| address.clone())
    });
    futures::future::join_all(ask).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_gap_that_overlaps_the_request_excuses_it() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let good = Sample { answers: true, connects: true };
        let samples: Vec<_> = (0..40)
            .map(|number| {
                let sample = match number {
                    10 => Sample { answers: false, connects: true },
                    30 => Sample { answers: true, connects: false },
                    _ => good,
                };
                (at(number * 250), sample)
            })
            .collect();
        let excused = |failure, begin, end| excuses(&samples, failure, at(begin), at(end));
        // Good at 2.25 s and again at 2.75 s and 3 s.
        assert!(excused(Failure::Answer, 1_000, 2_300) && excused(Failure::Answer, 2_900, 4_000));
        assert!(!excused(Failure::Answer, 500, 2_200), "it ended before the gap");
        assert!(!excused(Failure::Answer, 3_100, 5_000), "it began after the gap");
        // A router that answers with an error is there.
        assert!(excused(Failure::Connection, 7_400, 7_600) && !excused(Failure::Answer, 7_400, 7_600));
        assert!(!excuses(&[], Failure::Answer, at(0), at(9)));
        assert!(excuses(&[(at(5), Sample { answers: false, connects: true })], Failure::Answer, at(0), at(9)));
    }
}
