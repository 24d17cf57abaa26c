//! A model that llama.cpp's server answers for (`spec.engine.container`), on the real cluster after `make demo-chat` and
//! `scripts/images llamacpp`: answers, streams, events, feedback, a pod that goes down and a canary, without a failed
//! request.

use std::{sync::atomic::Ordering, time::Duration};

use anyhow::{Context, Result, ensure};
use athanor_contract::event::{FEEDBACK, GENERATION};
use athanor_tests::{
    chat::Client,
    cluster::{Cluster, wait},
    events,
    finance::{self, Domain, Part, Sentence},
    stages::Stages,
    storage,
};
use kube::{ResourceExt, api::DeleteParams};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const NAMESPACE: &str = "foreign-engine";
const NAME: &str = "smol";
const IMAGE: &str = "athanor.local/athanor/llamacpp:test";
const FIRST: &str = "s3://athanor/models/smollm2-135m";
/// Folder of the second revision in the bucket.
const SECOND: &str = "tests/foreign-engine/smollm2-135m";
const SERVERS: &str = "app.kubernetes.io/component=server";
const MINUTES: Duration = Duration::from_secs(60);

fn manifest(model: &str, topic: &str) -> String {
    json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": NAME},
        "spec": {
            "model": {"from": model},
            "credentialsSecretName": "s3-credentials",
            // A stream takes some seconds; a pod that is deleted runs on for half a minute.
            "maxRequestSeconds": 60,
            "engine": {"container": {
                "image": IMAGE,
                "args": ["--model", "$(MODEL_DIR)/model.gguf", "--alias", "$(MODEL_NAME)", "--host", "0.0.0.0", "--port", "$(PORT)",
                    "--ctx-size", "8192", "--parallel", "4", "--metrics",
                    // Its threads wait actively for each other: with two servers on two cores that takes seconds for a token.
                    "--threads", "1"],
                "drainSeconds": 30,
            }},
            "feedback": {"kafka": {"bootstrapServers": events::BOOTSTRAP, "topic": topic}},
            "rollout": {"canary": {
                "steps": [{"trafficPercent": 50, "pauseSeconds": 2}, {"trafficPercent": 100, "pauseSeconds": 2}],
                "analysis": {"minimumRequests": 5},
            }},
        },
    })
    .to_string()
}

/// The kinds of the events of a request that are in the topic.
async fn kinds(topic: &str, request_id: &str) -> Result<Vec<String>> {
    let topic = topic.to_owned();
    let records = tokio::task::spawn_blocking(move || events::read_all(&topic)).await??;
    Ok(records.into_iter().filter(|record| record.request_id == request_id).map(|record| record.kind).collect())
}

/// A stream of a client that does not ask for its usage.
async fn plain_stream(address: &str, sentence: &Sentence) -> Result<String> {
    let body = json!({"model": NAME, "messages": sentence.messages(), "max_tokens": 16, "stream": true});
    let http = reqwest::Client::builder().no_proxy().build()?;
    let answer = http.post(format!("{address}/v1/chat/completions")).json(&body).send().await?;
    let id = answer.headers().get("x-request-id").context("no request id")?.to_str()?.to_owned();
    let text = answer.error_for_status()?.text().await?;
    ensure!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    Ok(id)
}

/// The deployment's list of models, and the metrics of its pod.
async fn looks_like_llama_cpp(cluster: &Cluster, address: &str) -> Result<()> {
    let http = reqwest::Client::builder().no_proxy().build()?;
    let models: Value = http.get(format!("{address}/v1/models")).send().await?.error_for_status()?.json().await?;
    ensure!(models["data"][0]["id"] == NAME, "{models}");
    let pods = cluster.select(NAMESPACE, SERVERS).await?;
    let pod = pods.first().context("no pod of a server")?;
    let annotation = |name: &str| pod.annotations().get(&format!("prometheus.io/{name}")).cloned().unwrap_or_default();
    let ip = pod.status.as_ref().and_then(|status| status.pod_ip.clone()).context("the pod has no address")?;
    let url = format!("http://{ip}:{}{}", annotation("port"), annotation("path"));
    let metrics = http.get(&url).send().await?.error_for_status()?.text().await?;
    ensure!(metrics.contains("llamacpp:"), "{url}: {metrics}");
    Ok(())
}

/// Deletes the only pod of the servers and waits until another has taken its place and it is gone.
async fn replace_the_pod(cluster: &Cluster) -> Result<()> {
    let pods = cluster.select(NAMESPACE, SERVERS).await?;
    let [old] = pods.as_slice() else { anyhow::bail!("{} pods of servers", pods.len()) };
    let old = old.name_any();
    cluster.pods(NAMESPACE).delete(&old, &DeleteParams::default()).await?;
    wait("another pod has taken its place", MINUTES * 3, async || {
        let pods = cluster.select(NAMESPACE, SERVERS).await?;
        Ok((pods.len() == 1 && pods[0].name_any() != old).then_some(()))
    })
    .await
}

#[tokio::test]
#[ignore = "needs the demo's cluster and an image: make demo-chat, scripts/images llamacpp"]
async fn another_server_is_rolled_out_recorded_and_stopped_without_a_failed_request() -> Result<()> {
    let cluster = Cluster::connect().await?;
    cluster.fresh_namespace(NAMESPACE).await?;
    let bucket = storage::bucket()?;
    let names = storage::names(&bucket, "models/smollm2-135m").await?;
    let name = names.iter().find(|name| name.ends_with(".gguf")).context("run make demo-chat first")?;
    storage::put(&bucket, &format!("{SECOND}/second.gguf"), storage::get(&bucket, name).await?).await?;
    let topic = format!("athanor.{NAMESPACE}.events-{}", std::process::id());

    cluster.apply(NAMESPACE, &manifest(FIRST, &topic)).await?;
    let stages = Stages::new(cluster.clone(), NAMESPACE, NAME);
    let champion = stages.ready(NAME).await?;
    let address = cluster.service(NAMESPACE, NAME).await?;
    let sentences = finance::sentences(Domain::Away, Part::Exam, 20)?;
    let probe = Client::new(address.clone(), NAME)?;
    wait("the router answers", MINUTES, async || Ok(probe.ask(&sentences[0], None).await.is_ok().then_some(())))
        .await?;

    let client = Client::new(address.clone(), NAME)?;
    let whole = client.ask(&sentences[0], None).await?;
    let streamed = client.stream(&sentences[1]).await?;
    for answer in [&whole, &streamed] {
        ensure!(answer.revision == champion && answer.tokens > 0 && !answer.text.is_empty(), "{answer:?}");
    }
    let plain = plain_stream(&address, &sentences[2]).await?;
    client.correct(&whole.request_id, &sentences[0].answer).await?;
    for (id, expected) in [
        (&whole.request_id, &[FEEDBACK, GENERATION][..]),
        (&streamed.request_id, &[GENERATION]),
        (&plain, &[GENERATION]),
    ] {
        wait(&format!("the events of {id} are in Kafka"), MINUTES, async || {
            let mut found = kinds(&topic, id).await?;
            found.sort();
            Ok((found == expected).then_some(()))
        })
        .await?;
    }
    looks_like_llama_cpp(&cluster, &address).await?;

    let stop = CancellationToken::new();
    let streams = client.background(sentences.clone(), 2, stop.clone());
    replace_the_pod(&cluster).await?;
    stages.ready(NAME).await?;
    println!("a pod was replaced while {} streams ran", client.counts.streams.load(Ordering::Relaxed));
    cluster.apply(NAMESPACE, &manifest(&format!("s3://athanor/{SECOND}"), &topic)).await?;
    let (challenger, weights) = stages.canary(&champion, MINUTES * 4).await?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    stop.cancel();
    streams.join_all().await;
    ensure!(challenger != champion && weights.contains(&50), "{challenger}, weights {weights:?}");
    let pinned = client.ask(&sentences[3], Some(&challenger)).await?;
    ensure!(pinned.tokens > 0, "{pinned:?}");
    let counts = &client.counts;
    let [sent, failed] = [&counts.streams, &counts.failures].map(|count| count.load(Ordering::Relaxed));
    println!("{sent} streams, {failed} requests failed; weights {weights:?}");
    ensure!(sent >= 8 && failed == 0, "{sent} streams, {failed} requests failed");
    cluster.delete_namespace(NAMESPACE).await
}
