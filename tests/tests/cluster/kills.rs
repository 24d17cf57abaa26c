//! Kills and bad input on the real cluster, after `make demo`: real pods, real SIGKILL, the real broker stopped.
//! Run with one test thread; each test has a namespace of its own.

use std::{
    collections::BTreeSet,
    process::Command,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use athanor_contract::event;
use athanor_crds::{FineTuneJob, ModelDeploymentStatus};
use athanor_tests::{
    cluster::{Cluster, condition, job_refused, job_succeeded, kill_9, processes, wait},
    dataset, events,
    labelled::{Labelled, whole},
    paths,
    sentiment::{self, HOME, Part, Text},
    storage,
    traffic::Client,
};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};

use crate::bad_requests;

const MINUTES: Duration = Duration::from_secs(60);

/// A job of some steps on the demo's data.
fn job(name: &str, change: impl Fn(&mut Value)) -> String {
    let mut job = json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
        "spec": {
            "model": {"from": "s3://athanor/models/minilm-l6", "task": "TextClassification"},
            "data": {"sources": [{"name": "rows", "uri": "s3://athanor/tests/rows.csv"}]},
            "hyperparameters": {"maxSteps": 60, "batchSize": 32, "precision": "Auto"},
            "checkpoint": {"everySteps": 10},
            "output": {"to": "s3://athanor/tests/out"},
            "credentialsSecretName": "s3-credentials",
        },
    });
    change(&mut job["spec"]);
    job.to_string()
}

/// A fresh namespace, and the rows every test trains on.
async fn prepare(namespace: &str) -> Result<Cluster> {
    let cluster = Cluster::connect().await?;
    cluster.fresh_namespace(namespace).await?;
    let rows = sentiment::texts(&HOME, Part::Training)?;
    storage::put(&storage::bucket()?, "tests/rows.csv", sentiment::csv(&rows[..2000]).into_bytes()).await?;
    Ok(cluster)
}

/// The newest artifact that the demo's first job wrote.
async fn demo_artifact(cluster: &Cluster) -> Result<String> {
    let job = cluster.jobs("demo").get("sentiment").await.context("run make demo first")?;
    Ok(job.status.and_then(|status| status.summary).context("the demo's job has no summary")?.artifact)
}

async fn step(cluster: &Cluster, namespace: &str, name: &str) -> Result<u64> {
    let job: FineTuneJob = cluster.jobs(namespace).get(name).await?;
    Ok(job.status.and_then(|status| status.progress).map_or(0, |progress| progress.step))
}

async fn kill_operator(cluster: &Cluster) -> Result<()> {
    // A restart takes longer each time (CrashLoopBackOff), so there may be a moment without a process.
    wait("there is an operator to kill", MINUTES * 2, async || {
        let pods = cluster.select("athanor-system", "").await?;
        let pids: Vec<u32> = pods.iter().flat_map(|pod| processes(pod, "athanor-operator")).collect();
        if pids.is_empty() {
            return Ok(None);
        }
        kill_9(&pids).map(Some)
    })
    .await
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo"]
async fn a_killed_rank_restarts_the_gang_from_the_last_checkpoint() -> Result<()> {
    let namespace = "kill-rank";
    let cluster = prepare(namespace).await?;
    cluster.apply(namespace, &job("killed", |spec| spec["distributed"] = json!({"numNodes": 2}))).await?;
    wait("step 25", MINUTES * 3, async || Ok((step(&cluster, namespace, "killed").await? >= 25).then_some(()))).await?;
    let pods = cluster.select(namespace, "batch.kubernetes.io/job-completion-index=1").await?;
    let pids: Vec<u32> = pods.iter().flat_map(|pod| processes(pod, "athanor-trainer")).collect();
    kill_9(&pids)?;
    let killed = Instant::now();

    let steps = std::cell::RefCell::new(Vec::new());
    let job = job_succeeded(&cluster, namespace, "killed", MINUTES * 4, |job| {
        if let Some(status) = &job.status
            && status.restarts == 1
            && let Some(progress) = &status.progress
        {
            steps.borrow_mut().push(progress.step);
        }
    })
    .await?;
    let status = job.status.unwrap_or_default();
    ensure!(status.restarts == 1, "restarts: {}", status.restarts);
    let summary = status.summary.context("no summary")?;
    ensure!(summary.steps == 60, "steps: {}", summary.steps);
    let first = steps.borrow().iter().copied().find(|step| *step > 0).unwrap_or_default();
    println!("restarted, first step seen {first}, done {:.1} s after the kill", killed.elapsed().as_secs_f64());
    // The log of the second gang says where it resumed.
    let pods = cluster.select(namespace, "batch.kubernetes.io/job-completion-index=0").await?;
    let mut logs = String::new();
    for pod in pods {
        logs += &cluster.pods(namespace).logs(&pod.name_any(), &Default::default()).await.unwrap_or_default();
    }
    let resumed = logs.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let resumed = resumed.filter(|line| line["message"] == "resumed from a checkpoint");
    let from = resumed.rev().find_map(|line| line["step"].as_u64()).context("no pod says that it resumed")?;
    // A checkpoint every ten steps, and the kill came after step 25.
    ensure!(from >= 20, "resumed from step {from}");
    println!("resumed from the checkpoint of step {from}");
    cluster.delete_namespace(namespace).await
}

fn deployment(name: &str, change: impl Fn(&mut Value)) -> String {
    let mut deployment = json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": name},
        "spec": {"model": {}, "replicas": 1, "credentialsSecretName": "s3-credentials"},
    });
    change(&mut deployment["spec"]);
    deployment.to_string()
}

async fn status(cluster: &Cluster, namespace: &str, name: &str) -> Result<ModelDeploymentStatus> {
    Ok(cluster.deployments(namespace).get(name).await?.status.unwrap_or_default())
}

async fn ready(cluster: &Cluster, namespace: &str, name: &str) -> Result<String> {
    wait("the deployment is Ready", MINUTES * 3, async || {
        let status = status(cluster, namespace, name).await?;
        let ready = condition(&status.conditions, "Ready").is_some_and(|condition| condition.status == "True");
        Ok(status.current_revision.filter(|_| ready).map(|revision| revision.name))
    })
    .await
}

/// A client that has had its first answer.
async fn client(cluster: &Cluster, namespace: &str, name: &str) -> Result<Client> {
    let client = Client::new(cluster.service(namespace, name).await?)?;
    wait("the router answers", MINUTES, async || Ok(client.classify("first", None).await.is_ok().then_some(())))
        .await?;
    client.counts.requests.store(0, Ordering::Relaxed);
    client.counts.failures.store(0, Ordering::Relaxed);
    Ok(client)
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo"]
async fn a_killed_operator_loses_and_doubles_nothing() -> Result<()> {
    let namespace = "kill-operator";
    let cluster = prepare(namespace).await?;
    let retraining: Value =
        serde_json::from_str(&job("template", |spec| spec["hyperparameters"]["maxSteps"] = 15.into()))?;
    let topic = format!("athanor.{namespace}.loop-{}", std::process::id());
    cluster.apply(namespace, &job("first", |spec| spec["hyperparameters"]["maxSteps"] = 30.into())).await?;
    let manifest = deployment("loop", |spec| {
        spec["model"] = json!({"fromJob": {"name": "first"}});
        spec["rollout"] = json!({"canary": {"steps": [{"trafficPercent": 50, "pauseSeconds": 3}, {"trafficPercent": 100, "pauseSeconds": 1}],
            "analysis": {"minimumRequests": 10}}});
        spec["feedback"] = json!({"kafka": {"bootstrapServers": events::BOOTSTRAP, "topic": topic}});
        spec["monitor"] = json!({"windowPredictions": 50, "minimumLabels": 30});
        spec["retrain"] =
            json!({"minimumSamples": 60, "cooldownSeconds": 3600, "template": {"spec": retraining["spec"]}});
    });
    cluster.apply(namespace, &manifest).await?;

    wait(
        "training has begun",
        MINUTES * 2,
        async || Ok((step(&cluster, namespace, "first").await? >= 5).then_some(())),
    )
    .await?;
    kill_operator(&cluster).await?;
    job_succeeded(&cluster, namespace, "first", MINUTES * 4, |_| {}).await?;
    // The rollout is under way as soon as the job is done.
    kill_operator(&cluster).await?;
    let champion = ready(&cluster, namespace, "loop").await?;

    let client = client(&cluster, namespace, "loop").await?;
    let texts = sentiment::texts(&HOME, Part::Traffic)?;
    for text in &texts[..150] {
        let answer = client.classify(&text.text, None).await?;
        // People who disagree with every answer: the labelled accuracy falls to zero.
        let wrong = if answer.label == "positive" { "negative" } else { "positive" };
        client.feedback(&answer.request_id, wrong).await?;
    }
    let background = client.background(texts, 10);
    wait("a retraining starts", MINUTES * 3, async || {
        Ok(status(&cluster, namespace, "loop").await?.retraining.map(|_| ()))
    })
    .await?;
    kill_operator(&cluster).await?;
    let challenger = wait("the challenger takes over", MINUTES * 6, async || {
        let current = status(&cluster, namespace, "loop").await?.current_revision;
        Ok(current.map(|revision| revision.name).filter(|name| *name != champion))
    })
    .await?;
    println!("{champion} -> {challenger}");

    let jobs = cluster.jobs(namespace).list(&ListParams::default()).await?.items;
    let names: Vec<String> = jobs.iter().map(ResourceExt::name_any).collect();
    ensure!(jobs.len() == 2, "one job and one retraining expected, found {names:?}");
    for job in &jobs {
        let status = job.status.clone().unwrap_or_default();
        ensure!(
            status.restarts == 0 && status.attempt == 0,
            "{}: {} restarts, attempt {}",
            job.name_any(),
            status.restarts,
            status.attempt
        );
    }
    background.finish().await;
    ensure!(client.counts.failures.load(Ordering::Relaxed) == 0, "requests failed");
    cluster.delete_namespace(namespace).await
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo"]
async fn a_killed_server_fails_no_request() -> Result<()> {
    let namespace = "kill-server";
    let cluster = prepare(namespace).await?;
    let artifact = demo_artifact(&cluster).await?;
    let manifest = deployment("served", |spec| {
        spec["model"] = json!({"from": artifact});
        spec["replicas"] = 2.into();
    });
    cluster.apply(namespace, &manifest).await?;
    ready(&cluster, namespace, "served").await?;
    let client = client(&cluster, namespace, "served").await?;
    let servers = async || {
        let pods = cluster.select(namespace, "app.kubernetes.io/component=server").await?;
        Ok::<_, anyhow::Error>(pods)
    };
    let background = client.background(sentiment::texts(&HOME, Part::Traffic)?, 100);
    let requests = || client.counts.requests.load(Ordering::Relaxed);
    wait("requests are answered", MINUTES, async || Ok((requests() > 100).then_some(()))).await?;
    for round in 0..2 {
        let pods = servers().await?;
        let victim =
            pods.iter().find(|pod| !processes(pod, "athanor-server").is_empty()).context("no server process")?;
        let (name, before) = (victim.name_any(), restarts(victim));
        kill_9(&processes(victim, "athanor-server"))?;
        println!("round {round}: killed {name}");
        wait("the kubelet has noticed it", MINUTES, async || {
            let pods = servers().await?;
            Ok(pods.iter().find(|pod| pod.name_any() == name).filter(|pod| restarts(pod) > before).map(|_| ()))
        })
        .await?;
        wait("both servers are ready again", MINUTES * 2, async || {
            let pods = servers().await?;
            let ready = pods.iter().filter(|pod| {
                let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
                conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Ready" && one.status == "True"))
            });
            Ok((ready.count() >= 2).then_some(()))
        })
        .await?;
    }
    background.finish().await;
    let (sent, failed) =
        (client.counts.requests.load(Ordering::Relaxed), client.counts.failures.load(Ordering::Relaxed));
    println!("{sent} requests, {failed} failed");
    ensure!(sent > 500 && failed == 0, "{failed} of {sent} requests failed");

    bad_requests::check(&cluster.service(namespace, "served").await?).await?;
    cluster.delete_namespace(namespace).await
}

/// Restarts of a pod's containers.
fn restarts(pod: &Pod) -> i32 {
    let containers = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref());
    containers.into_iter().flatten().map(|container| container.restart_count).sum()
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo"]
async fn a_stopped_kafka_and_a_replaced_router_lose_no_acknowledged_event() -> Result<()> {
    let namespace = "stop-kafka";
    let cluster = prepare(namespace).await?;
    let artifact = demo_artifact(&cluster).await?;
    let topic = format!("athanor.{namespace}.events-{}", std::process::id());
    let manifest = deployment("events", |spec| {
        spec["model"] = json!({"from": artifact});
        spec["feedback"] = json!({"kafka": {"bootstrapServers": events::BOOTSTRAP, "topic": topic}});
    });
    cluster.apply(namespace, &manifest).await?;
    ready(&cluster, namespace, "events").await?;
    let client = client(&cluster, namespace, "events").await?;

    // A made-up id is refused with a reason.
    let refused = client.feedback("r-0123-forged", "positive").await.unwrap_err().to_string();
    ensure!(refused.contains("404") && refused.contains("request"), "{refused}");

    // Each text comes many times: a job that keeps repeated texts has a row for each request, and two for one that was
    // counted twice.
    let texts: Vec<Text> = (0..4000)
        .map(|n| Text { domain: "made", text: format!("Text number {} was fine.", n % 100), label: "positive" })
        .collect();
    let mut acknowledged = BTreeSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(25));
    let began = Instant::now();
    let mut stopped: Option<Instant> = None;
    let (mut replaced, mut restarted) = (false, false);
    let routers = pod_names(&cluster, namespace).await?;
    for text in &texts {
        ticks.tick().await;
        let answer = client.classify(&text.text, None).await?;
        client.feedback(&answer.request_id, text.label).await?;
        acknowledged.insert(answer.request_id);
        if stopped.is_none() && began.elapsed() > Duration::from_secs(5) {
            stop_kafka()?;
            stopped = Some(Instant::now());
        }
        if !replaced && stopped.is_some_and(|at| at.elapsed() > Duration::from_secs(5)) {
            replaced = true;
            replace_routers(&cluster, namespace).await?;
        }
        if !restarted && stopped.is_some_and(|at| at.elapsed() > Duration::from_secs(60)) {
            restarted = true;
            let up = Command::new(paths::checkout().join("cluster/up")).output()?;
            ensure!(up.status.success(), "cluster/up: {}", String::from_utf8_lossy(&up.stderr));
        }
        if restarted && stopped.is_some_and(|at| at.elapsed() > Duration::from_secs(75)) {
            break;
        }
    }
    ensure!(restarted, "the traffic ended before Kafka was started again");
    wait("the routers of before are gone", MINUTES, async || {
        Ok(pod_names(&cluster, namespace).await?.is_disjoint(&routers).then_some(()))
    })
    .await?;
    println!("{} feedbacks acknowledged over a stop of 60 s and an update of the routers", acknowledged.len());

    let records = wait("every acknowledged event is in Kafka", MINUTES * 2, async || {
        let topic = topic.clone();
        let records = tokio::task::spawn_blocking(move || events::read_all(&topic)).await??;
        let fed: BTreeSet<&String> =
            records.iter().filter(|record| record.kind == event::FEEDBACK).map(|record| &record.request_id).collect();
        Ok(acknowledged.iter().all(|id| fed.contains(id)).then_some(records))
    })
    .await?;
    let ids: BTreeSet<&String> = records.iter().map(|record| &record.id).collect();
    println!("{} records, {} of them repeated deliveries", records.len(), records.len() - ids.len());

    // The dataset of exactly these offsets has each labelled request once.
    let manifest = job("from-events", |spec| {
        spec["data"] = json!({
            "sources": [{"name": "events", "kafka":
                {"bootstrapServers": events::BOOTSTRAP, "topic": topic, "ranges": whole(&records)}}],
            "clean": {"exactDuplicates": "Keep"},
        });
        spec["model"]["labels"] = json!(["negative", "positive"]);
        spec["hyperparameters"]["maxSteps"] = 1.into();
    });
    cluster.apply(namespace, &manifest).await?;
    let job = job_succeeded(&cluster, namespace, "from-events", MINUTES * 3, |_| {}).await?;
    has_each_once(&dataset::check(&job, &records).await?, &acknowledged)?;
    cluster.delete_namespace(namespace).await
}

/// The rows are those of these requests.
fn has_each_once(rows: &[Labelled], acknowledged: &BTreeSet<String>) -> Result<()> {
    let requests = rows.iter().filter_map(|row| row.id.strip_suffix("/0").map(str::to_owned));
    let requests: BTreeSet<String> = requests.collect();
    ensure!(requests.len() == rows.len(), "{} rows of {} requests", rows.len(), requests.len());
    let missing: Vec<&String> = acknowledged.difference(&requests).collect();
    let others: Vec<&String> = requests.difference(acknowledged).collect();
    ensure!(missing.is_empty(), "acknowledged feedback that is not in the dataset: {missing:?}");
    ensure!(others.is_empty(), "rows of requests without feedback: {others:?}");
    Ok(())
}

/// Names of the routers' pods.
async fn pod_names(cluster: &Cluster, namespace: &str) -> Result<BTreeSet<String>> {
    let pods = cluster.select(namespace, "app.kubernetes.io/component=router").await?;
    Ok(pods.iter().map(ResourceExt::name_any).collect())
}

/// Replaces the pods of the routers, and their disks with them, as an update does.
async fn replace_routers(cluster: &Cluster, namespace: &str) -> Result<()> {
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), namespace);
    deployments.restart("events-router").await.context("kubectl rollout restart")?;
    Ok(())
}

/// Ends the broker by the id that the cluster's state folder holds for it.
fn stop_kafka() -> Result<()> {
    let stopped = Command::new(paths::checkout().join("cluster/down")).args(["--only", "kafka"]).output()?;
    ensure!(stopped.status.success(), "cluster/down --only kafka: {}", String::from_utf8_lossy(&stopped.stderr));
    Ok(())
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo"]
async fn bad_input_fails_the_job_once_with_a_reason() -> Result<()> {
    let namespace = "bad-input";
    let cluster = prepare(namespace).await?;
    let bucket = storage::bucket()?;
    let weights = storage::get(&bucket, "models/minilm-l6/model.safetensors").await?;
    let config = storage::get(&bucket, "models/minilm-l6/config.json").await?;
    let tokenizer = storage::get(&bucket, "models/minilm-l6/tokenizer.json").await?;
    let put = async |key: &str, bytes: &[u8]| storage::put(&bucket, &format!("tests/bad/{key}"), bytes.to_vec()).await;
    put("empty.csv", b"").await?;
    put("header.csv", b"text,label\n").await?;
    put("malformed.jsonl", b"{\"text\": \"a\", \"label\": \"positive\"}\n{\"text\": \"b\"}\n").await?;
    put("column.csv", b"sentence,label\nfine,positive\n").await?;
    put("latin.csv", b"text,label\nfine,positive\ncaf\xe9,negative\n").await?;
    for folder in ["truncated", "pickled", "other"] {
        put(&format!("{folder}/tokenizer.json"), &tokenizer).await?;
    }
    put("truncated/config.json", &config).await?;
    put("truncated/model.safetensors", &weights[..weights.len() / 2]).await?;
    put("pickled/config.json", &config).await?;
    put("pickled/pytorch_model.bin", b"\x80\x04]").await?;
    let other = String::from_utf8(config)?.replace("\"bert\"", "\"gpt2\"").replace("BertModel", "GPT2Model");
    put("other/config.json", other.as_bytes()).await?;
    put("other/model.safetensors", &weights).await?;

    let data = |key: &'static str| {
        move |spec: &mut Value| spec["data"]["sources"][0]["uri"] = format!("s3://athanor/tests/bad/{key}").into()
    };
    let model = |key: &'static str| {
        move |spec: &mut Value| spec["model"]["from"] = format!("s3://athanor/tests/bad/{key}").into()
    };
    let secret: k8s_openapi::api::core::v1::Secret = serde_json::from_value(json!({"metadata": {"name": "wrong"},
        "stringData": {"AWS_ENDPOINT_URL": storage::ENDPOINT, "AWS_ACCESS_KEY_ID": "athanor", "AWS_SECRET_ACCESS_KEY": "wrong",
                       "AWS_REGION": storage::REGION}}))?;
    kube::Api::namespaced(cluster.client.clone(), namespace).create(&Default::default(), &secret).await?;

    let cases: Vec<(&str, String, Vec<&str>)> = vec![
        ("missing-data", job("missing-data", data("none.csv")), vec!["none.csv", "nothing there"]),
        ("missing-model", job("missing-model", model("none")), vec!["tests/bad/none"]),
        (
            "wrong-credentials",
            job("wrong-credentials", |spec| spec["credentialsSecretName"] = "wrong".into()),
            vec!["credentials"],
        ),
        ("empty", job("empty", data("empty.csv")), vec!["empty.csv", "empty"]),
        ("header-only", job("header-only", data("header.csv")), vec!["header.csv"]),
        ("malformed", job("malformed", data("malformed.jsonl")), vec!["malformed.jsonl", "2", "label"]),
        ("column", job("column", data("column.csv")), vec!["column.csv", "text"]),
        ("latin", job("latin", data("latin.csv")), vec!["latin.csv", "3", "UTF-8"]),
        (
            "unknown-label",
            job("unknown-label", |spec| spec["model"]["labels"] = json!(["good", "bad"])),
            vec!["rows.csv", "label"],
        ),
        ("truncated", job("truncated", model("truncated")), vec!["model.safetensors"]),
        ("pickled", job("pickled", model("pickled")), vec!["pytorch_model.bin", "pickled"]),
        ("architecture", job("architecture", model("other")), vec!["config.json", "gpt2"]),
    ];
    for (_, manifest, _) in &cases {
        cluster.apply(namespace, manifest).await?;
    }
    for (name, _, parts) in &cases {
        job_refused(&cluster, namespace, name, MINUTES * 4, parts).await?;
    }
    // Nothing was left that could be taken for a result.
    let written = storage::names(&bucket, "tests/out").await?;
    for (name, _, _) in &cases {
        let uid = cluster.jobs(namespace).get(name).await?.metadata.uid.unwrap_or_default();
        let folder = format!("{name}-{}", &uid[..8.min(uid.len())]);
        ensure!(
            !written.iter().any(|key| key.contains(&folder) && key.ends_with("manifest.json")),
            "{name} left a result"
        );
    }
    cluster.delete_namespace(namespace).await
}
