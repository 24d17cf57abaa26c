//! Kills at random: of Athanor's processes and pods, and of what they depend on. The same seed chooses the same kills.

use std::{
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use athanor_contract::process::port;
use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt, api::DeleteParams};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::task::JoinHandle;

use crate::{
    cluster::{Cluster, kill_9, processes},
    paths,
};

/// Between two looks at what answers.
const SAMPLE: Duration = Duration::from_millis(250);
/// Time in which endpoints follow what is ready, before and after a sample.
const ENDPOINTS: Duration = Duration::from_secs(3);

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// A process in a pod by SIGKILL; its container restarts, and the disk of the pod stays.
    Process(&'static str),
    /// A pod with its disk, as an eviction does it.
    Pod(&'static str),
    /// A process outside of pods by SIGKILL, which is started again after some seconds.
    Infrastructure(&'static str),
}

const VICTIMS: [Victim; 11] = [
    Victim::Process("operator"),
    Victim::Process("router"),
    Victim::Process("server"),
    Victim::Process("monitor"),
    Victim::Process("trainer"),
    Victim::Pod("router"),
    Victim::Pod("server"),
    Victim::Pod("monitor"),
    Victim::Infrastructure("kafka"),
    Victim::Infrastructure("s3"),
    Victim::Infrastructure("kube-apiserver"),
];

/// Kills in a namespace, and in the operator's.
pub struct Chaos {
    cluster: Cluster,
    namespace: String,
    random: StdRng,
}

impl Chaos {
    pub fn new(cluster: Cluster, namespace: &str, seed: u64) -> Self {
        Self { cluster, namespace: namespace.to_owned(), random: StdRng::seed_from_u64(seed) }
    }

    /// Kills something and waits for some seconds. Returns what it was; `None` if there was nothing of the kind.
    pub async fn strike(&mut self) -> Result<Option<Victim>> {
        let victim = VICTIMS[self.random.random_range(0..VICTIMS.len())];
        let (choice, pause) = (self.random.random::<u32>(), self.random.random_range(2.0..7.0));
        let struck = match victim {
            Victim::Process(component) => self.kill_process(component, choice).await?,
            Victim::Pod(component) => self.delete_pod(component, choice).await?,
            Victim::Infrastructure(name) => {
                kill_9(&[recorded(name)?])?;
                let away = Duration::from_secs_f64(self.random.random_range(1.0..8.0));
                tokio::time::sleep(away).await;
                start_again().await?;
                true
            }
        };
        tokio::time::sleep(Duration::from_secs_f64(pause)).await;
        Ok(struck.then_some(victim))
    }

    /// Pods of a component, one of which is chosen. Those of the operator are in its own namespace.
    async fn pods(&self, component: &str) -> Vec<Pod> {
        let (namespace, selector) = match component {
            "operator" => ("athanor-system", String::new()),
            _ => (self.namespace.as_str(), format!("app.kubernetes.io/component={component}")),
        };
        let listed = self.cluster.select(namespace, &selector).await;
        let mut pods = listed.unwrap_or_default();
        pods.sort_by_key(ResourceExt::name_any);
        pods
    }

    async fn kill_process(&self, component: &str, choice: u32) -> Result<bool> {
        let command = format!("athanor-{component}");
        let mut pids: Vec<u32> = self.pods(component).await.iter().flat_map(|pod| processes(pod, &command)).collect();
        pids.sort_unstable();
        if pids.is_empty() {
            return Ok(false);
        }
        // It may end by itself in between.
        Ok(kill_9(&[pids[choice as usize % pids.len()]]).is_ok())
    }

    async fn delete_pod(&self, component: &str, choice: u32) -> Result<bool> {
        let pods = self.pods(component).await;
        let there: Vec<&Pod> = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect();
        if there.is_empty() {
            return Ok(false);
        }
        let name = there[choice as usize % there.len()].name_any();
        Ok(self.cluster.pods(&self.namespace).delete(&name, &DeleteParams::default()).await.is_ok())
    }
}

/// Process id of a part of the cluster, as `cluster/up` recorded it.
fn recorded(name: &str) -> Result<u32> {
    let state = std::env::var_os("ATHANOR_CLUSTER").map_or("/var/lib/athanor-cluster".into(), PathBuf::from);
    let path = state.join("run").join(format!("{name}.pid"));
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut fields = text.split_whitespace();
    let (Some(pid), Some(began)) = (fields.next(), fields.next()) else { bail!("{} is incomplete", path.display()) };
    // An id that was given to another process since is not ours.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("{name} does not run"))?;
    let now = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19));
    ensure!(now == Some(began), "process {pid} is not {name}");
    Ok(pid.parse()?)
}

async fn start_again() -> Result<()> {
    let up = tokio::task::spawn_blocking(|| Command::new(paths::checkout().join("cluster/up")).output()).await??;
    ensure!(up.status.success(), "cluster/up: {}", String::from_utf8_lossy(&up.stderr));
    Ok(())
}

/// When a router and a server answered that they are ready, sampled by HTTP at the pods themselves.
#[derive(Clone)]
pub struct Availability {
    samples: Arc<Mutex<Vec<(Instant, bool)>>>,
    task: Arc<JoinHandle<()>>,
}

impl Availability {
    /// Samples the pods of a namespace until it is dropped.
    pub fn watch(cluster: Cluster, namespace: &str) -> Result<Self> {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_millis(400)).build()?;
        let (seen, namespace) = (samples.clone(), namespace.to_owned());
        let task = tokio::spawn(async move {
            let mut pods: Vec<Pod> = Vec::new();
            loop {
                // With a limit: the API server may be away.
                let listed = tokio::time::timeout(Duration::from_secs(1), cluster.select(&namespace, "")).await;
                if let Ok(Ok(listed)) = listed {
                    pods = listed;
                }
                let available = any_ready(&http, &pods, "router", port::ROUTER_OPS).await
                    && any_ready(&http, &pods, "server", port::HTTP).await;
                seen.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), available));
                tokio::time::sleep(SAMPLE).await;
            }
        });
        Ok(Self { samples, task: Arc::new(task) })
    }

    /// Whether there was no router or no server at a moment between these two, or little before or after.
    pub fn was_away(&self, begin: Instant, end: Instant) -> bool {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.iter().any(|&(at, available)| !available && at + ENDPOINTS >= begin && at <= end + ENDPOINTS)
    }

    /// Share of the samples at which a router and a server were ready.
    pub fn share(&self) -> f64 {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        samples.iter().filter(|(_, available)| *available).count() as f64 / samples.len().max(1) as f64
    }
}

impl Drop for Availability {
    fn drop(&mut self) {
        if Arc::strong_count(&self.task) == 1 {
            self.task.abort();
        }
    }
}

async fn any_ready(http: &reqwest::Client, pods: &[Pod], component: &str, port: u16) -> bool {
    let addresses = pods.iter().filter_map(|pod| {
        let labels = pod.metadata.labels.as_ref()?;
        let is_one = labels.get("app.kubernetes.io/component").is_some_and(|found| found == component);
        let address = pod.status.as_ref()?.pod_ip.clone()?;
        (is_one && pod.metadata.deletion_timestamp.is_none()).then_some(address)
    });
    let ask = addresses.map(async |address| {
        let answer = http.get(format!("http://{address}:{port}/readyz")).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    });
    futures::future::join_all(ask).await.contains(&true)
}
