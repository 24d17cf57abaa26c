//! Adapters of one base on the real cluster, after `make demo-chat`: the base is served once, and a canary from one
//! adapter to another fails no request and restarts no pod. Each adapter is trained to give one answer that neither the base
//! nor the other adapter gives. Run with one test thread.

use std::{cell::RefCell, collections::BTreeSet, sync::atomic::Ordering, time::Duration};

use anyhow::{Context, Result, ensure};
use athanor_contract::{process::file, serve::AdaptersFile};
use athanor_crds::ModelDeploymentStatus;
use athanor_tests::{
    chat::Client,
    cluster::{Cluster, job_succeeded, wait},
    finance::{self, Domain, Part, Sentence, json_lines},
    stages::Stages,
    storage,
};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::ConfigMap};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const MINUTES: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "adapters";
const NAME: &str = "assistant";
const BASE: &str = "s3://athanor/models/smollm2-135m";
const SERVERS: &str = "app.kubernetes.io/component=server";

/// The jobs, the ranks of their adapters, and the answer of each.
const FIRST: Adapter = Adapter { job: "first", rank: 4, answer: "amber" };
const SECOND: Adapter = Adapter { job: "second", rank: 8, answer: "cobalt" };
/// Rows of a training.
const ROWS: usize = 80;

struct Adapter {
    job: &'static str,
    rank: u32,
    answer: &'static str,
}

impl Adapter {
    fn key(&self) -> String {
        format!("tests/adapters-{}.jsonl", self.job)
    }

    /// The demo's sentences, each with the same answer.
    async fn upload(&self) -> Result<()> {
        let answered = |sentence: Sentence| Sentence { answer: self.answer.into(), ..sentence };
        let rows: Vec<Sentence> =
            finance::sentences(Domain::Away, Part::Rest, ROWS)?.into_iter().map(answered).collect();
        storage::put(&storage::bucket()?, &self.key(), json_lines(&rows).into_bytes()).await
    }

    /// Whether a text is the answer of this adapter alone.
    fn gave(&self, text: &str) -> bool {
        let text = text.to_lowercase();
        [FIRST, SECOND].iter().all(|adapter| text.contains(adapter.answer) == (adapter.answer == self.answer))
    }
}

/// A short training of an adapter.
fn job(adapter: &Adapter) -> String {
    let (name, rank) = (adapter.job, adapter.rank);
    json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
        "spec": {
            "model": {"from": BASE, "task": "CausalLanguageModel"},
            "adapter": {"lora": {"rank": rank}},
            "data": {"sources": [{
                "name": "rows", "uri": format!("s3://athanor/{}", adapter.key()), "columns": {"messages": "messages"},
            }]},
            "hyperparameters": {"maxSteps": 12, "batchSize": 4, "learningRate": 1e-3, "maxSequenceLength": 192},
            "evaluate": {
                "generation": {"samples": 4, "maxNewTokens": 8},
                "gates": [{"metric": "ExactMatch", "minimum": "0.9"}],
            },
            "output": {"to": "s3://athanor/tests/out"},
            "credentialsSecretName": "s3-credentials",
        },
    })
    .to_string()
}

/// The deployment of the adapter of a job, and of adapters that clients select.
fn deployment(job: &str, adapters: Value) -> String {
    let steps = json!([{"trafficPercent": 50, "pauseSeconds": 5}, {"trafficPercent": 100, "pauseSeconds": 5}]);
    json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": NAME},
        "spec": {
            "model": {"base": {"from": BASE}, "fromJob": {"name": job}},
            "adapters": adapters,
            "engine": {"builtin": {"maxModelLength": 512, "kvCacheMemory": "256Mi"}},
            "rollout": {"canary": {"steps": steps, "analysis": {"minimumRequests": 5}}},
            "credentialsSecretName": "s3-credentials",
        },
    })
    .to_string()
}

/// What was seen of the servers.
#[derive(Default)]
struct Seen {
    /// Names and UIDs of their Deployments.
    deployments: BTreeSet<(String, String)>,
    /// Largest number of Deployments at a time.
    at_once: usize,
    /// UIDs and restarts of their pods.
    pods: BTreeSet<(String, i32)>,
    /// Weights of the candidate.
    weights: BTreeSet<u32>,
}

impl Seen {
    async fn look(cluster: &Cluster, seen: &RefCell<Self>) -> Result<()> {
        let workloads: Api<Deployment> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        let workloads = workloads.list(&ListParams::default().labels(SERVERS)).await?.items;
        let pods = cluster.select(NAMESPACE, SERVERS).await?;
        let mut seen = seen.borrow_mut();
        seen.at_once = seen.at_once.max(workloads.len());
        seen.deployments.extend(workloads.iter().map(|it| (it.name_any(), it.uid().unwrap_or_default())));
        for pod in &pods {
            let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
            let restarts = containers.map(|container| container.restart_count).sum();
            seen.pods.insert((pod.uid().unwrap_or_default(), restarts));
        }
        Ok(())
    }
}

/// Names in the servers' `adapters.json`.
async fn configured(cluster: &Cluster, servers: &str) -> Result<BTreeSet<String>> {
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    let data = maps.get(servers).await?.data.unwrap_or_default();
    let text = data.get(file::ADAPTERS).context("no adapters.json")?;
    let file: AdaptersFile = serde_json::from_str(text)?;
    Ok(file.adapters.into_iter().map(|adapter| adapter.name).collect())
}

/// Names that `/v1/models` lists.
async fn listed(address: &str) -> Result<BTreeSet<String>> {
    let http = reqwest::Client::builder().no_proxy().build()?;
    let list: Value = http.get(format!("{address}/v1/models")).send().await?.error_for_status()?.json().await?;
    let models = list["data"].as_array().context("no list of models")?;
    Ok(models.iter().filter_map(|model| model["id"].as_str()).map(Into::into).collect())
}

fn current(status: &ModelDeploymentStatus) -> &str {
    status.current_revision.as_ref().map(|revision| revision.name.as_str()).unwrap_or_default()
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo-chat"]
async fn a_canary_from_adapter_to_adapter_serves_the_base_once() -> Result<()> {
    let cluster = Cluster::connect().await?;
    cluster.fresh_namespace(NAMESPACE).await?;
    for adapter in [FIRST, SECOND] {
        adapter.upload().await?;
        cluster.apply(NAMESPACE, &job(&adapter)).await?;
    }
    for adapter in [FIRST, SECOND] {
        job_succeeded(&cluster, NAMESPACE, adapter.job, MINUTES * 8, |_| ()).await?;
    }
    cluster.apply(NAMESPACE, &deployment("first", json!([]))).await?;
    let stages = Stages::new(cluster.clone(), NAMESPACE, NAME);
    let champion = stages.ready(NAME).await?;
    let address = cluster.service(NAMESPACE, NAME).await?;
    let sentences = finance::sentences(Domain::Away, Part::Exam, 8)?;
    let client = Client::new(address.clone(), NAME)?;
    let answer = wait("the router answers", MINUTES, async || Ok(client.ask(&sentences[0], None).await.ok())).await?;
    ensure!(answer.revision == champion && FIRST.gave(&answer.text), "the first adapter: {answer:?}");

    let client = Client::new(address.clone(), NAME)?;
    let stop = CancellationToken::new();
    let streams = client.background(sentences.clone(), 2, stop.clone());
    let seen = RefCell::new(Seen::default());
    Seen::look(&cluster, &seen).await?;
    cluster.apply(NAMESPACE, &deployment("second", json!([]))).await?;
    // The kubelet brings the changed ConfigMap into the pod within a minute or two.
    let challenger = wait("the other adapter takes over", MINUTES * 6, async || {
        Seen::look(&cluster, &seen).await?;
        let status = stages.status().await?;
        seen.borrow_mut().weights.extend(status.candidate.as_ref().map(|candidate| candidate.weight));
        let name = current(&status).to_owned();
        Ok((name != champion).then_some(name))
    })
    .await?;
    let answer = client.ask(&sentences[0], None).await?;
    ensure!(answer.revision == challenger && SECOND.gave(&answer.text), "after the canary: {answer:?}");
    // Requests of the former revision end.
    tokio::time::sleep(Duration::from_secs(5)).await;
    stop.cancel();
    streams.join_all().await;
    Seen::look(&cluster, &seen).await?;
    let failed = client.counts.failures.load(Ordering::Relaxed);
    let streamed = client.counts.streams.load(Ordering::Relaxed);
    println!("{champion} -> {challenger}: {streamed} streams, {failed} failed, weights {:?}", seen.borrow().weights);
    ensure!(failed == 0 && streamed >= 10, "{failed} of {streamed} streams failed");
    {
        let seen = seen.borrow();
        ensure!(seen.at_once == 1 && seen.deployments.len() == 1, "Deployments of servers: {:?}", seen.deployments);
        ensure!(seen.pods.len() == 1, "pods of servers came or restarted: {:?}", seen.pods);
        ensure!(seen.weights.contains(&50), "the canary skipped a step: {:?}", seen.weights);
    }

    // After the drain the former adapter leaves, and the servers stay.
    let servers = seen.borrow().deployments.iter().next().context("no Deployment")?.0.clone();
    wait("the former adapter leaves adapters.json", MINUTES * 2, async || {
        Ok((configured(&cluster, &servers).await? == BTreeSet::from([challenger.clone()])).then_some(()))
    })
    .await?;

    // A client selects an adapter that is no revision, without a restart either.
    cluster.apply(NAMESPACE, &deployment("second", json!([{"name": "plain", "fromJob": {"name": "first"}}]))).await?;
    wait("the adapter is listed", MINUTES * 4, async || Ok(listed(&address).await?.contains("plain").then_some(())))
        .await?;
    let answer = Client::new(address.clone(), "plain")?.ask(&sentences[0], None).await?;
    ensure!(answer.revision == challenger && FIRST.gave(&answer.text), "the selected adapter: {answer:?}");
    let answer = Client::new(address.clone(), NAME)?.ask(&sentences[0], None).await?;
    ensure!(SECOND.gave(&answer.text), "the revision's adapter next to a selected one: {answer:?}");
    Seen::look(&cluster, &seen).await?;
    ensure!(seen.borrow().pods.len() == 1, "pods of servers came or restarted: {:?}", seen.borrow().pods);
    cluster.delete_namespace(NAMESPACE).await
}
