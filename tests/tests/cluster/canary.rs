//! A canary on the real cluster, after `make demo`, that clients and pods of the namespace try to decide: requests that name
//! a revision do not count, and nobody asks a pod that only poses as a router.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use athanor_contract::{
    process::{path, port},
    serve::RouterAnalysis,
};
use athanor_crds::ModelDeploymentStatus;
use athanor_tests::{
    cluster::{Cluster, condition, wait},
    sentiment::{self, HOME, Part},
    traffic::Client,
};
use axum::{Json, Router, extract::State, routing::get};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::task::JoinHandle;

const NAMESPACE: &str = "canary";
const NAME: &str = "guarded";
const MINUTES: Duration = Duration::from_secs(60);
const ROUTERS: &str = "app.kubernetes.io/component=router";
/// Address of this machine that pods reach.
const HOST: &str = "198.51.100.1";
/// Pause of a step.
const PAUSE: Duration = Duration::from_secs(5);
const PINNED: usize = 60;

fn manifest(artifact: &str) -> String {
    let pause = PAUSE.as_secs();
    json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": NAME},
        "spec": {
            "model": {"from": artifact}, "replicas": 1, "credentialsSecretName": "s3-credentials",
            "rollout": {"canary": {
                "steps": [{"trafficPercent": 50, "pauseSeconds": pause}, {"trafficPercent": 100, "pauseSeconds": 1}],
                "analysis": {"minimumRequests": 30},
            }},
        },
    })
    .to_string()
}

async fn status(cluster: &Cluster) -> Result<ModelDeploymentStatus> {
    Ok(cluster.deployments(NAMESPACE).get(NAME).await?.status.unwrap_or_default())
}

/// Artifacts of the demo's first job and of its retraining.
async fn artifacts(cluster: &Cluster) -> Result<(String, String)> {
    let jobs = cluster.jobs("demo").list(&ListParams::default()).await?.items;
    let artifact = |is_first: bool| {
        let mut of_kind = jobs.iter().filter(|job| (job.name_any() == "sentiment") == is_first);
        of_kind.find_map(|job| {
            let status = job.status.as_ref()?;
            let has_succeeded = condition(&status.conditions, "Succeeded").is_some_and(|it| it.status == "True");
            status.summary.as_ref().filter(|_| has_succeeded).map(|summary| summary.artifact.clone())
        })
    };
    artifact(true).zip(artifact(false)).context("run make demo first")
}

/// A pod with the labels and the owner of a router's, but another UID of the owner. It is ready by its status, and its
/// address is this machine, where every look at its counts finds a thousand more failures of the candidate.
struct Impostor {
    looks: Arc<AtomicU64>,
    tasks: [JoinHandle<()>; 2],
}

impl Impostor {
    async fn start(cluster: &Cluster, router: &Pod, candidate: &str) -> Result<Self> {
        let looks = Arc::new(AtomicU64::new(0));
        let counts = async |State((looks, candidate)): State<(Arc<AtomicU64>, String)>| {
            let failures = 1000 * (looks.fetch_add(1, Ordering::Relaxed) + 1);
            let counts = json!({"requests": failures, "errors": failures, "feedback_total": 0, "feedback_correct": 0});
            Json(json!({"revisions": {(candidate): counts}}))
        };
        let app = Router::new().route(path::ANALYSIS, get(counts)).with_state((looks.clone(), candidate.to_owned()));
        let listener = tokio::net::TcpListener::bind((HOST, port::ROUTER_OPS)).await.context("the port of a router")?;
        let serving = tokio::spawn(async move { axum::serve(listener, app).await.unwrap_or_default() });

        let mut owners = router.metadata.owner_references.clone().unwrap_or_default();
        owners.iter_mut().for_each(|owner| owner.uid = "00000000-0000-4000-8000-000000000000".into());
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"generateName": "impostor-", "labels": router.labels(), "ownerReferences": owners},
            "spec": {
                "schedulerName": "nobody",
                "automountServiceAccountToken": false,
                "securityContext": {"runAsNonRoot": true, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{"name": "router", "image": "none", "securityContext":
                    {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}],
            },
        }))?;
        let pods = cluster.pods(NAMESPACE);
        // One that can be made at all is made here, with its errors.
        pose(&pods, &pod).await?;
        // The garbage collector finds out after some seconds that there is no such owner.
        let posing = tokio::spawn(async move {
            loop {
                let _ = pose(&pods, &pod).await;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        Ok(Self { looks, tasks: [serving, posing] })
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Creates a pod, unless one of its name is left, and declares it ready.
async fn pose(pods: &kube::Api<Pod>, pod: &Pod) -> Result<()> {
    let is_impostor = |pod: &Pod| pod.name_any().starts_with("impostor-") && pod.metadata.deletion_timestamp.is_none();
    if pods.list(&ListParams::default()).await?.iter().any(is_impostor) {
        return Ok(());
    }
    let created = pods.create(&PostParams::default(), pod).await?;
    let status = json!({"status": {"phase": "Running", "podIP": HOST, "podIPs": [{"ip": HOST}],
        "conditions": [{"type": "Ready", "status": "True"}]}});
    pods.patch_status(&created.name_any(), &PatchParams::default(), &Patch::Strategic(status)).await?;
    Ok(())
}

/// Requests to a revision that the routers have counted.
async fn counted(routers: &[Pod], revision: &str) -> Result<u64> {
    let http = reqwest::Client::builder().no_proxy().build()?;
    let mut all = 0;
    for router in routers {
        let address = router.status.as_ref().and_then(|status| status.pod_ip.clone()).context("no address")?;
        let url = format!("http://{address}:{}{}", port::ROUTER_OPS, path::ANALYSIS);
        let analysis: RouterAnalysis = http.get(url).send().await?.error_for_status()?.json().await?;
        all += analysis.revisions.get(revision).map_or(0, |counts| counts.requests);
    }
    Ok(all)
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo"]
async fn neither_pinned_requests_nor_an_impostor_decide_a_canary() -> Result<()> {
    let cluster = Cluster::connect().await?;
    cluster.fresh_namespace(NAMESPACE).await?;
    let (first, second) = artifacts(&cluster).await?;
    cluster.apply(NAMESPACE, &manifest(&first)).await?;
    let champion = wait("the deployment is Ready", MINUTES * 3, async || {
        let status = status(&cluster).await?;
        let ready = condition(&status.conditions, "Ready").is_some_and(|condition| condition.status == "True");
        Ok(status.current_revision.filter(|_| ready).map(|revision| revision.name))
    })
    .await?;
    let routers = cluster.select(NAMESPACE, ROUTERS).await?;
    let router = routers.first().context("no router")?;
    // Not by the Service, which sends connections to the impostor as well.
    let address = router.status.as_ref().and_then(|status| status.pod_ip.clone()).context("a router has no address")?;
    let client = Client::new(format!("http://{address}:{}", port::HTTP))?;
    wait("the router answers", MINUTES, async || Ok(client.classify("first", None).await.is_ok().then_some(())))
        .await?;

    cluster.apply(NAMESPACE, &manifest(&second)).await?;
    let candidate = wait("a candidate is there", MINUTES, async || {
        Ok(status(&cluster).await?.candidate.map(|candidate| candidate.revision.name))
    })
    .await?;
    let impostor = Impostor::start(&cluster, router, &candidate).await?;
    wait("the candidate has traffic", MINUTES * 3, async || {
        Ok(status(&cluster).await?.candidate.filter(|candidate| candidate.weight == 50).map(|_| ()))
    })
    .await?;

    let texts = sentiment::texts(&HOME, Part::Traffic)?;
    for text in &texts[..PINNED] {
        // The router learns of the revision a moment after the status says so.
        wait("the candidate answers", MINUTES, async || Ok(client.classify(&text.text, Some(&candidate)).await.ok()))
            .await?;
    }
    tokio::time::sleep(PAUSE * 2).await;
    let held = status(&cluster).await?;
    let step = held.candidate.as_ref().map(|candidate| (candidate.step_index, candidate.weight));
    ensure!(step == Some((0, 50)), "{PINNED} requests that name the candidate decided a step: {step:?}, {held:?}");
    let requests = counted(&routers, &candidate).await?;
    ensure!(requests == 0, "{requests} requests that name the candidate were counted");

    client.counts.failures.store(0, Ordering::Relaxed);
    let traffic = client.background(texts, 20);
    wait("the candidate is promoted", MINUTES * 2, async || {
        let status = status(&cluster).await?;
        ensure!(status.failed_revisions.is_empty(), "rolled back: {:?}", status.conditions);
        Ok(status.current_revision.filter(|current| current.name == candidate).map(|_| ()))
    })
    .await?;
    traffic.finish().await;
    let (looks, failures) = (impostor.looks.load(Ordering::Relaxed), client.counts.failures.load(Ordering::Relaxed));
    println!("{champion} -> {candidate}; {looks} looks at the impostor's counts, {failures} requests failed");
    ensure!(looks == 0, "the operator asked a pod that is no router {looks} times");
    ensure!(failures == 0, "{failures} requests failed");
    ensure!(status(&cluster).await?.failed_revisions.is_empty(), "the candidate was rolled back");
    drop(impostor);
    cluster.delete_namespace(NAMESPACE).await
}
