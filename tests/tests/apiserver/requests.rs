//! The requests that the operator makes to a real API server: it lists when it starts, and never in a reconcile.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use athanor_crds::FineTuneJob;
use athanor_tests::apiserver::ApiServer;
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Service},
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::operator::Operator;

/// Requests of the API server by verb and resource, of all clients.
type Requests = BTreeMap<(String, String), u64>;

/// Samples of `apiserver_request_total`: the line up to its number, and the number.
pub async fn samples(client: &Client) -> Result<Vec<(String, u64)>> {
    let request = http::Request::get("/metrics").body(Vec::new())?;
    let text = client.request_text(request).await?;
    let lines = text.lines().filter(|line| line.starts_with("apiserver_request_total{"));
    let sample = |line: &str| {
        let (labels, count) = line.rsplit_once(' ').context("a sample without a value")?;
        Ok((labels.to_owned(), count.parse::<f64>()? as u64))
    };
    let samples = lines.map(sample).collect::<Result<Vec<_>>>()?;
    ensure!(!samples.is_empty(), "the API server reports no apiserver_request_total");
    Ok(samples)
}

/// Counts requests by verb and resource.
async fn requests(client: &Client) -> Result<Requests> {
    let mut requests = Requests::new();
    for (labels, count) in samples(client).await? {
        let label = |name: &str| {
            let value = labels.split_once(&format!("{name}=\""))?.1;
            Some(value.split_once('"')?.0.to_owned())
        };
        let (Some(verb), Some(resource)) = (label("verb"), label("resource")) else { continue };
        *requests.entry((verb, resource)).or_default() += count;
    }
    Ok(requests)
}

/// Requests between two readings; requests of this test are subtracted by the caller.
fn between(before: &Requests, after: &Requests, verb: &str, resource: &str) -> u64 {
    let key = (verb.to_owned(), resource.to_owned());
    after.get(&key).copied().unwrap_or(0) - before.get(&key).copied().unwrap_or(0)
}

fn job(name: &str) -> Result<FineTuneJob> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
        "spec": {
            "model": {"from": "s3://bucket/model", "task": "TextClassification"},
            "data": {"sources": [{"name": "reviews", "uri": "s3://bucket/reviews.csv"}]},
            "output": {"to": "s3://bucket/out"},
        },
    }))?)
}

async fn wait_for<T>(what: &str, mut ready: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = ready().await? {
            return Ok(found);
        }
        ensure!(started.elapsed() < Duration::from_secs(60), "{what}: not within 60 s");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The reason of the condition Succeeded, and the attempt.
async fn state(jobs: &Api<FineTuneJob>, name: &str) -> Result<Option<(String, u32)>> {
    let Some(status) = jobs.get(name).await?.status else { return Ok(None) };
    let succeeded = status.conditions.iter().find(|condition| condition.type_ == "Succeeded");
    Ok(succeeded.map(|succeeded| (succeeded.reason.clone(), status.attempt)))
}

/// Writes the status of a pod as a kubelet would.
async fn set_pod(pods: &Api<Pod>, name: &str, phase: &str, state: Value) -> Result<()> {
    let container = json!({"name": "trainer", "image": "i", "imageID": "i", "ready": phase == "Running",
        "restartCount": 0, "state": state});
    let status = json!({"status": {"phase": phase, "containerStatuses": [container]}});
    pods.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}

/// Makes the pod of an attempt, as the controller of Jobs would, which does not run here.
async fn make_pod(client: &Client, batch_job: &Job) -> Result<String> {
    let spec = batch_job.spec.as_ref().context("a Job without a specification")?;
    let mut pod = Pod {
        metadata: spec.template.metadata.clone().unwrap_or_default(),
        spec: spec.template.spec.clone(),
        status: None,
    };
    let name = format!("{}-0-test", batch_job.metadata.name.as_deref().unwrap_or_default());
    pod.metadata.name = Some(name.clone());
    let uid = batch_job.metadata.uid.clone().context("a Job without a UID")?;
    pod.metadata.labels.get_or_insert_default().extend([
        ("batch.kubernetes.io/controller-uid".to_owned(), uid),
        ("batch.kubernetes.io/job-completion-index".to_owned(), "0".to_owned()),
    ]);
    Api::<Pod>::namespaced(client.clone(), "default").create(&PostParams::default(), &pod).await?;
    Ok(name)
}

#[tokio::test]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn a_reconcile_lists_nothing() -> Result<()> {
    let server = ApiServer::start().await?;
    let client = &server.client;
    let jobs: Api<FineTuneJob> = Api::namespaced(client.clone(), "default");
    let batch_jobs: Api<Job> = Api::namespaced(client.clone(), "default");
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let before = requests(client).await?;
    let _operator = Operator::start(&server, "operator", &server.kubeconfig()?, &[])?;

    // The first job shows that the operator leads and that its caches are filled.
    jobs.create(&PostParams::default(), &job("first")?).await?;
    let pending = async || Ok(state(&jobs, "first").await?.filter(|(reason, _)| reason == "Pending"));
    wait_for("the first job", pending).await?;
    let started = requests(client).await?;
    for resource in
        ["finetunejobs", "modeldeployments", "jobs", "pods", "deployments", "replicasets", "services", "configmaps"]
    {
        let lists = between(&before, &started, "LIST", resource);
        // kube-apiserver's own controllers may list Services as well.
        let watches = between(&before, &started, "WATCH", resource);
        println!("{resource}: {lists} lists, {watches} watches until the caches were filled");
    }

    // A whole life: created, running, failed, restarted, succeeded.
    jobs.create(&PostParams::default(), &job("second")?).await?;
    let batch_job = wait_for("the Job", async || Ok(batch_jobs.get_opt("second-0").await?)).await?;
    let pod = make_pod(client, &batch_job).await?;
    set_pod(&pods, &pod, "Running", json!({"running": {"startedAt": "2026-01-01T00:00:05Z"}})).await?;
    let reached = async |wanted: &str, attempt: u32| {
        let seen = async || Ok(state(&jobs, "second").await?.filter(|state| *state == (wanted.to_owned(), attempt)));
        wait_for(&format!("{wanted} in attempt {attempt}"), seen).await
    };
    reached("Running", 0).await?;
    set_pod(&pods, &pod, "Failed", json!({"terminated": {"exitCode": 137, "finishedAt": "2026-01-01T00:01:00Z"}}))
        .await?;
    reached("Pending", 1).await?;
    let batch_job = wait_for("the second Job", async || Ok(batch_jobs.get_opt("second-1").await?)).await?;
    ensure!(batch_jobs.get_opt("second-0").await?.is_none_or(|job| job.metadata.deletion_timestamp.is_some()));
    let pod = make_pod(client, &batch_job).await?;
    set_pod(&pods, &pod, "Running", json!({"running": {"startedAt": "2026-01-01T00:02:05Z"}})).await?;
    reached("Running", 1).await?;
    let wrong =
        json!({"terminated": {"exitCode": 3, "message": "no column 'text'", "finishedAt": "2026-01-01T00:03:00Z"}});
    set_pod(&pods, &pod, "Failed", wrong).await?;
    reached("UserError", 1).await?;

    let after = requests(client).await?;
    for resource in ["finetunejobs", "modeldeployments", "jobs", "pods", "deployments", "replicasets"] {
        let lists = between(&started, &after, "LIST", resource);
        ensure!(lists == 0, "{lists} lists of {resource} after the caches were filled");
    }
    // Written once each: the children of two attempts, and the ConfigMap of the second is as it was.
    ensure!(between(&started, &after, "POST", "jobs") == 2, "a Job of each attempt, each created once");
    // Pending and Running of two attempts, Restarting, UserError; messages that change in between wait.
    let statuses: u64 = ["APPLY", "PATCH"].iter().map(|verb| between(&started, &after, verb, "finetunejobs")).sum();
    println!("{statuses} writes of the status");
    ensure!((6..=8).contains(&statuses), "{statuses} writes of the status");
    let status = jobs.get("second").await?.status.context("no status")?;
    ensure!((status.restarts, status.attempt) == (1, 1), "{status:?}");
    Api::<ConfigMap>::namespaced(client.clone(), "default").get("second-train").await?;
    let service = Api::<Service>::namespaced(client.clone(), "default").get_opt("second-trainer").await?;
    ensure!(service.is_none(), "one node needs no Service");
    Ok(())
}
