//! Kills and bad input of a language model on the real cluster, after `make demo-chat`: real pods, real SIGKILL.
//! Run with one test thread; each test has a namespace of its own.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use athanor_crds::FineTuneJobStatus;
use athanor_tests::{
    chat::Client,
    cluster::{Cluster, job_refused, job_succeeded, kill_9, processes, wait},
    finance::{self, Domain, Part},
    stages::Stages,
    storage,
};
use serde_json::{Value, json};

const MINUTES: Duration = Duration::from_secs(60);
const DEMO: &str = "demo-chat";

/// A short training with LoRA on the demo's rows, which generates few answers.
fn job(name: &str, change: impl Fn(&mut Value)) -> String {
    let mut job = json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
        "spec": {
            "model": {"from": "s3://athanor/models/smollm2-135m", "task": "CausalLanguageModel"},
            "adapter": {"lora": {"rank": 8}},
            "data": {"sources": [{
                "name": "rows", "uri": "s3://athanor/data/finance.jsonl", "columns": {"messages": "messages"},
            }]},
            "hyperparameters": {"maxSteps": 10, "batchSize": 4, "learningRate": 5e-4, "maxSequenceLength": 256},
            "evaluate": {"generation": {"samples": 2, "maxNewTokens": 8}},
            "checkpoint": {"everySteps": 2},
            "output": {"to": "s3://athanor/tests/out"},
            "credentialsSecretName": "s3-credentials",
        },
    });
    change(&mut job["spec"]);
    job.to_string()
}

/// A fresh namespace.
async fn prepare(namespace: &str) -> Result<Cluster> {
    let cluster = Cluster::connect().await?;
    cluster.fresh_namespace(namespace).await?;
    Ok(cluster)
}

async fn status(cluster: &Cluster, namespace: &str, name: &str) -> Result<FineTuneJobStatus> {
    Ok(cluster.jobs(namespace).get(name).await?.status.unwrap_or_default())
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo-chat"]
async fn a_killed_rank_and_a_killed_operator_lose_no_more_than_the_steps_since_the_checkpoint() -> Result<()> {
    let namespace = "kill-chat-rank";
    let cluster = prepare(namespace).await?;
    cluster.apply(namespace, &job("killed", |spec| spec["distributed"] = json!({"numNodes": 2}))).await?;
    wait("step 3", MINUTES * 4, async || {
        let progress = status(&cluster, namespace, "killed").await?.progress;
        Ok(progress.is_some_and(|progress| progress.step >= 3).then_some(()))
    })
    .await?;
    let operators = cluster.select("athanor-system", "").await?;
    let operators: Vec<u32> = operators.iter().flat_map(|pod| processes(pod, "athanor-operator")).collect();
    kill_9(&operators)?;
    let pods = cluster.select(namespace, "batch.kubernetes.io/job-completion-index=1").await?;
    kill_9(&pods.iter().flat_map(|pod| processes(pod, "athanor-trainer")).collect::<Vec<u32>>())?;
    let job = job_succeeded(&cluster, namespace, "killed", MINUTES * 5, |_| ()).await?;
    let status = job.status.unwrap_or_default();
    ensure!(status.restarts == 1, "restarts: {}", status.restarts);
    let summary = status.summary.context("no summary")?;
    ensure!(summary.steps == 10, "steps: {}", summary.steps);
    ensure!(summary.metrics.contains_key("baseline/tokenF1"), "metrics: {:?}", summary.metrics);
    cluster.delete_namespace(namespace).await
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo-chat"]
async fn a_killed_server_ends_its_streams_with_an_error_and_no_other_request() -> Result<()> {
    let namespace = "kill-chat-server";
    let cluster = prepare(namespace).await?;
    let summary = status(&cluster, DEMO, "finance").await?.summary.context("run make demo-chat first")?;
    let manifest = json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": "served"},
        "spec": {
            "model": {"from": summary.artifact},
            "engine": {"builtin": {"maxModelLength": 512, "kvCacheMemory": "256Mi"}},
            "credentialsSecretName": "s3-credentials",
        },
    });
    cluster.apply(namespace, &manifest.to_string()).await?;
    let stages = Stages::new(cluster.clone(), namespace, "served");
    stages.ready("served").await?;
    let address = cluster.service(namespace, "served").await?;
    let sentences = finance::sentences(Domain::Away, Part::Exam, 8)?;
    let client = Client::new(address.clone(), "served")?;
    wait("the router answers", MINUTES, async || Ok(client.ask(&sentences[0], None).await.is_ok().then_some(())))
        .await?;

    // At a high temperature the answer is long.
    let body = json!({
        "model": "served", "stream": true, "temperature": 1.5, "max_tokens": 400,
        "messages": [{"role": "user", "content": "Write a long story about a bank and a borrower."}],
    });
    let http = reqwest::Client::builder().no_proxy().build()?;
    let mut stream = http.post(format!("{address}/v1/chat/completions")).json(&body).send().await?;
    ensure!(stream.status().is_success(), "{}", stream.status());
    let mut text = String::new();
    while text.matches("data:").count() < 4 {
        let chunk = stream.chunk().await?.context("the stream ended before it was killed")?;
        text.push_str(&String::from_utf8_lossy(&chunk));
    }
    let pods = cluster.select(namespace, "app.kubernetes.io/component=server").await?;
    kill_9(&pods.iter().flat_map(|pod| processes(pod, "athanor-server")).collect::<Vec<u32>>())?;
    while let Some(chunk) = stream.chunk().await.context("the stream was cut instead of ended")? {
        text.push_str(&String::from_utf8_lossy(&chunk));
    }
    let last = text.trim().lines().last().unwrap_or_default();
    ensure!(last.contains("\"error\"") && !text.contains("[DONE]"), "the stream ended with {last}");
    println!("the stream ended with {last}");

    // A request without an answer so far waits for the server, or is refused; later ones are answered.
    stages.ready("served").await?;
    wait("the router answers again", MINUTES * 2, async || {
        Ok(client.ask(&sentences[0], None).await.is_ok().then_some(()))
    })
    .await?;
    cluster.delete_namespace(namespace).await
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo-chat"]
async fn bad_models_and_rows_fail_the_job_once_with_a_reason() -> Result<()> {
    let namespace = "bad-chat-input";
    let cluster = prepare(namespace).await?;
    let bucket = storage::bucket()?;
    let put =
        async |key: &str, bytes: &[u8]| storage::put(&bucket, &format!("tests/bad-chat/{key}"), bytes.to_vec()).await;
    let names = storage::names(&bucket, "models/smollm2-135m").await?;
    let name = names.iter().find(|name| name.ends_with(".gguf")).context("no GGUF file in the bucket")?;
    let file = storage::get(&bucket, name).await?;
    put("truncated/model.gguf", &file[..file.len() / 2]).await?;
    put("none.jsonl", b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n").await?;
    put("role.jsonl", b"{\"messages\": [{\"role\": \"bot\", \"content\": \"a\"}]}\n").await?;
    let data = |key: &'static str| {
        move |spec: &mut Value| spec["data"]["sources"][0]["uri"] = format!("s3://athanor/tests/bad-chat/{key}").into()
    };
    let model = |spec: &mut Value| spec["model"]["from"] = "s3://athanor/tests/bad-chat/truncated".into();
    let cases: [(&str, String, &[&str]); 3] = [
        ("truncated", job("truncated", model), &["model.gguf"]),
        ("no-answer", job("no-answer", data("none.jsonl")), &["none.jsonl row 1", "messages", "assistant"]),
        ("role", job("role", data("role.jsonl")), &["role.jsonl row 1", "messages", "bot"]),
    ];
    for (_, manifest, _) in &cases {
        cluster.apply(namespace, manifest).await?;
    }
    for (name, _, parts) in &cases {
        job_refused(&cluster, namespace, name, MINUTES * 4, parts).await?;
    }
    cluster.delete_namespace(namespace).await
}
