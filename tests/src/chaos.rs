//! Kills at random: of Athanor's processes and pods, and of what they depend on. The same seed chooses the same kills.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use athanor_contract::process::port;
use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt, api::DeleteParams};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    cluster::{Cluster, kill_9, processes},
    paths,
};

/// Between two looks at what answers.
const SAMPLE: Duration = Duration::from_millis(250);
/// Time that a router pod may take to hand over its events and to end.
const HAND_OVER: Duration = Duration::from_secs(150);
/// Time in which the events on the routers' disks reach Kafka.
const REPLAY: Duration = Duration::from_secs(60);
/// Time that the process of a pod which was deleted without grace may still answer.
const LINGERS: Duration = Duration::from_secs(5);

/// How a pod ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// As an eviction does it: the process gets a signal and its grace period.
    Graceful,
    /// The pod is deleted with a grace period of 0, as when its node is lost.
    AtOnce,
}

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Victim {
    /// A process in a pod by SIGKILL; its container restarts, and the disk of the pod stays.
    Process(&'static str),
    /// A pod with its disk.
    Pod(&'static str, End),
    /// A process outside of pods by SIGKILL, which is started again after some seconds.
    Infrastructure(&'static str),
    /// Kafka, and a router's pod with its disk while Kafka is away.
    KafkaAndRouter(End),
}

const VICTIMS: [Victim; 17] = [
    Victim::Process("operator"),
    Victim::Process("router"),
    Victim::Process("server"),
    Victim::Process("monitor"),
    Victim::Process("trainer"),
    Victim::Pod("operator", End::Graceful),
    Victim::Pod("router", End::Graceful),
    Victim::Pod("router", End::AtOnce),
    Victim::Pod("server", End::Graceful),
    Victim::Pod("server", End::AtOnce),
    Victim::Pod("monitor", End::AtOnce),
    Victim::Pod("trainer", End::AtOnce),
    Victim::Infrastructure("kafka"),
    Victim::Infrastructure("s3"),
    Victim::Infrastructure("kube-apiserver"),
    Victim::KafkaAndRouter(End::Graceful),
    Victim::KafkaAndRouter(End::AtOnce),
];

/// The kinds of victims, each once before any comes again, in random order.
struct Choice {
    random: StdRng,
    left: Vec<Victim>,
}

impl Choice {
    fn draw(&mut self) -> Victim {
        if self.left.is_empty() {
            self.left.extend(VICTIMS);
        }
        let at = self.random.random_range(0..self.left.len());
        self.left.swap_remove(at)
    }
}

/// From and to when events that a router acknowledged may have been on a disk that was lost, as docs/events.md says.
#[derive(Clone, Debug, Default)]
pub struct Losses(Vec<(Instant, Instant)>);

impl Losses {
    /// Whether what was acknowledged between these two may be lost.
    pub fn may_include(&self, begin: Instant, end: Instant) -> bool {
        self.0.iter().any(|&(from, to)| from <= end && begin <= to)
    }
}

/// Kills in a namespace, and in the operator's.
pub struct Chaos {
    cluster: Cluster,
    namespace: String,
    choice: Choice,
    http: reqwest::Client,
    pub losses: Losses,
}

impl Chaos {
    pub fn new(cluster: Cluster, namespace: &str, seed: u64) -> Result<Self> {
        Ok(Self {
            cluster,
            namespace: namespace.to_owned(),
            choice: Choice { random: StdRng::seed_from_u64(seed), left: Vec::new() },
            http: reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(2)).build()?,
            losses: Losses::default(),
        })
    }

    /// Kills something and waits for some seconds. Returns what it was; `None` if there was nothing of the kind.
    pub async fn strike(&mut self) -> Result<Option<Victim>> {
        let victim = self.choice.draw();
        let random = &mut self.choice.random;
        let (choice, pause) = (random.random::<u32>() as usize, random.random_range(2.0..7.0));
        let away = Duration::from_secs_f64(random.random_range(1.0..8.0));
        let struck = match victim {
            Victim::Process(component) => self.kill_process(component, choice).await?,
            Victim::Pod("router", End::AtOnce) => self.lose_router(choice, None).await?,
            Victim::Pod(component, end) => self.delete_pod(component, choice, end).await?.is_some(),
            Victim::Infrastructure(name) => {
                kill_9(&[recorded(name)?])?;
                tokio::time::sleep(away).await;
                start_again().await?;
                true
            }
            Victim::KafkaAndRouter(End::AtOnce) => self.lose_router(choice, Some(away)).await?,
            Victim::KafkaAndRouter(End::Graceful) => self.replace_router(choice, away).await?,
        };
        tokio::time::sleep(Duration::from_secs_f64(pause)).await;
        Ok(struck.then_some(victim))
    }

    /// Deletes a router's pod while Kafka is away, which comes back once the pod is gone: another router has its events by
    /// then, and nothing may be lost.
    async fn replace_router(&self, choice: usize, away: Duration) -> Result<bool> {
        if self.spilled().await.len() < 2 {
            return Ok(false);
        }
        kill_9(&[recorded("kafka")?])?;
        tokio::time::sleep(away).await;
        let deleted = self.delete_pod("router", choice, End::Graceful).await?;
        if let Some(name) = &deleted {
            let (pods, began) = (self.cluster.pods(&self.namespace), Instant::now());
            while began.elapsed() < HAND_OVER && !matches!(pods.get_opt(name).await, Ok(None)) {
                tokio::time::sleep(SAMPLE).await;
            }
        }
        start_again().await?;
        Ok(deleted.is_some())
    }

    /// Deletes a router's pod at once; with `away` while Kafka is away, for so long before and after. What that router had
    /// acknowledged since Kafka had all events may be lost.
    async fn lose_router(&mut self, choice: usize, away: Option<Duration>) -> Result<bool> {
        let Some(begin) = self.replayed().await else { return Ok(false) };
        if let Some(away) = away {
            kill_9(&[recorded("kafka")?])?;
            tokio::time::sleep(away).await;
        }
        let deleted = self.delete_pod("router", choice, End::AtOnce).await?;
        if let Some(away) = away {
            tokio::time::sleep(away).await;
            start_again().await?;
        }
        self.losses.0.push((begin, Instant::now() + LINGERS));
        Ok(deleted.is_some())
    }

    /// Waits until two routers or more have nothing on their disks. Returns a time before which all that was acknowledged
    /// is in Kafka; `None` if that takes too long.
    async fn replayed(&self) -> Option<Instant> {
        let began = Instant::now();
        while began.elapsed() < REPLAY {
            let asked = Instant::now();
            let spilled = self.spilled().await;
            if spilled.len() >= 2 && spilled.iter().all(|bytes| *bytes == Some(0.0)) {
                return Some(asked);
            }
            tokio::time::sleep(SAMPLE).await;
        }
        None
    }

    /// Bytes on the disk of each router; `None` for one that does not answer.
    async fn spilled(&self) -> Vec<Option<f64>> {
        let pods = self.pods("router").await;
        let asked = pods.iter().map(async |pod| {
            let address = pod.status.as_ref()?.pod_ip.clone()?;
            let answer = self.http.get(format!("http://{address}:{}/metrics", port::ROUTER_OPS)).send().await.ok()?;
            gauge(&answer.text().await.ok()?, "athanor_events_spill_bytes")
        });
        futures::future::join_all(asked).await
    }

    /// Pods of a component. Those of the operator are in its own namespace.
    async fn pods(&self, component: &str) -> Vec<Pod> {
        let selector = match component {
            "operator" => String::new(),
            _ => format!("app.kubernetes.io/component={component}"),
        };
        let listed = self.cluster.select(self.namespace_of(component), &selector).await;
        let mut pods = listed.unwrap_or_default();
        pods.sort_by_key(ResourceExt::name_any);
        pods
    }

    fn namespace_of(&self, component: &str) -> &str {
        if component == "operator" { "athanor-system" } else { &self.namespace }
    }

    async fn kill_process(&self, component: &str, choice: usize) -> Result<bool> {
        let command = format!("athanor-{component}");
        let mut pids: Vec<u32> = self.pods(component).await.iter().flat_map(|pod| processes(pod, &command)).collect();
        pids.sort_unstable();
        if pids.is_empty() {
            return Ok(false);
        }
        // It may end by itself in between.
        Ok(kill_9(&[pids[choice % pids.len()]]).is_ok())
    }

    /// Returns the pod's name.
    async fn delete_pod(&self, component: &str, choice: usize, end: End) -> Result<Option<String>> {
        let pods = self.pods(component).await;
        // The pod of a training that is over is not one that can be killed.
        let runs = |pod: &&Pod| {
            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
            pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
        };
        let there: Vec<&Pod> = pods.iter().filter(runs).collect();
        if there.is_empty() {
            return Ok(None);
        }
        let name = there[choice % there.len()].name_any();
        let parameters = match end {
            End::Graceful => DeleteParams::default(),
            End::AtOnce => DeleteParams::default().grace_period(0),
        };
        let deleted = self.cluster.pods(self.namespace_of(component)).delete(&name, &parameters).await;
        Ok(deleted.is_ok().then_some(name))
    }
}

/// The value of a gauge without labels in Prometheus' text format.
fn gauge(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_victim_comes_before_any_comes_again() {
        let mut choice = Choice { random: StdRng::seed_from_u64(7), left: Vec::new() };
        let kinds = VICTIMS.len();
        for _ in 0..2 {
            let round: std::collections::BTreeSet<Victim> = (0..kinds).map(|_| choice.draw()).collect();
            assert_eq!(round.len(), kinds);
        }
    }

    #[test]
    fn what_was_acknowledged_outside_of_an_outage_may_not_be_lost() {
        let at = |seconds| Instant::now() + Duration::from_secs(seconds);
        let (begin, end) = (at(10), at(20));
        let losses = Losses(vec![(begin, end)]);
        assert!(losses.may_include(at(12), at(13)) && losses.may_include(at(5), at(11)));
        assert!(!losses.may_include(at(5), at(9)) && !losses.may_include(at(21), at(30)));
        assert!(!Losses::default().may_include(begin, end));
    }

    #[test]
    fn a_gauge_is_found_by_its_whole_name() {
        let text = "# TYPE a_bytes gauge\na_bytes_total 7\na_bytes 12.5\n";
        assert_eq!((gauge(text, "a_bytes"), gauge(text, "a")), (Some(12.5), None));
    }
}
