//! `make test-chaos`: the loop under traffic while its parts are killed at random, after `make demo`.
//!
//! `CHAOS_KILLS` (50) says how many kills, `CHAOS_SEED` which (else the clock chooses; the seed is printed).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use athanor_contract::event;
use athanor_crds::{FineTuneJob, ModelDeploymentStatus};
use athanor_tests::{
    availability::{Availability, Failure},
    chaos::{Chaos, Losses},
    cluster::{Cluster, job_succeeded, wait},
    dataset,
    events::{self, Record},
    labelled::whole,
    retrainings::{Known, Outcome, Retraining, Runs, check_attempts, check_retrainings},
    sentiment::{self, HOME, Part, Text},
    traffic::{self, Client},
};
use k8s_openapi::api::{
    apps::v1::Deployment,
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Secret, Service, ServiceAccount},
    policy::v1::PodDisruptionBudget,
    rbac::v1::{Role, RoleBinding},
};
use kube::{
    Api, Resource, ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

const NAMESPACE: &str = "chaos";
const NAME: &str = "loop";
const MINUTES: Duration = Duration::from_secs(60);
/// Clients that send one request after the other.
const CLIENTS: usize = 3;
/// Tries of a request, the first one included, and the pause before the second, doubled before the third: those of the
/// openai client (`max_retries` 2).
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);
const MINIMUM_SAMPLES: u64 = 60;
const COOLDOWN: Duration = Duration::from_secs(20);
/// Texts of the traffic at a time. Few, so that they repeat: an event that is counted twice would be seen.
const TEXTS: usize = 40;
/// Requests of a client after which one text takes the place of another: later retrainings have other rows, and lead to
/// other models.
const TURN: usize = 10;
const MANAGED: &str = "app.kubernetes.io/managed-by=athanor";

fn number(variable: &str, default: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}: {text:?} is not a number")),
        Err(_) => Ok(default),
    }
}

/// A job on the events of the topic: the ranges take the place of the sources in a retraining.
fn training(sources: Value) -> Value {
    json!({
        "model": {"from": "s3://athanor/models/minilm-l6", "task": "TextClassification", "labels": ["negative", "positive"]},
        "data": {"sources": sources},
        "hyperparameters": {"maxSteps": 12, "batchSize": 16, "precision": "Auto"},
        "checkpoint": {"everySteps": 4},
        "failurePolicy": {"maxRestarts": 10},
        "output": {"to": "s3://athanor/tests/out"},
        "credentialsSecretName": "s3-credentials",
    })
}

fn deployment(artifact: &str, topic: &str) -> String {
    json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": NAME},
        "spec": {
            "model": {"from": artifact}, "replicas": 2, "credentialsSecretName": "s3-credentials",
            "rollout": {"canary": {
                "steps": [{"trafficPercent": 50, "pauseSeconds": 3}, {"trafficPercent": 100, "pauseSeconds": 1}],
                // What is killed here fails requests of whichever revision it belongs to.
                "analysis": {"minimumRequests": 10, "maxErrorPercent": "100"},
            }},
            "feedback": {"kafka": {"bootstrapServers": events::BOOTSTRAP, "topic": topic}, "durablePredictions": true},
            "monitor": {"windowPredictions": 50, "minimumLabels": 30, "averageRunLength": 1000},
            "retrain": {
                "minimumSamples": MINIMUM_SAMPLES, "cooldownSeconds": COOLDOWN.as_secs(),
                "template": {"spec": training(json!([{"name": "rows", "uri": "s3://athanor/tests/chaos.csv"}]))},
            },
        },
    })
    .to_string()
}

/// What the clients saw.
#[derive(Default)]
struct Seen {
    requests: u64,
    /// Requests with feedback that was acknowledged: when their first try began, and when the acknowledgement arrived.
    acknowledged: BTreeMap<String, (Instant, Instant)>,
    /// Requests with feedback whose acknowledgement did not arrive: it may have been kept.
    unsure: BTreeSet<String>,
    failed: Vec<Failed>,
}

/// A request that failed at every try.
struct Failed {
    begin: Instant,
    end: Instant,
    failure: Failure,
    /// The last one.
    error: String,
}

/// Asks until there is an answer.
///
/// # Errors
/// That of the last try, after a failure of every one. It is one of the connection if all were.
async fn persistently<T, F: Future<Output = Result<T>>>(ask: impl Fn() -> F) -> Result<T, Failed> {
    let (begin, mut failure, mut pause) = (Instant::now(), Failure::Connection, PAUSE);
    let mut left = TRIES;
    loop {
        let error = match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        if !traffic::is_of_connection(&error) {
            failure = Failure::Answer;
        }
        left -= 1;
        if left == 0 {
            return Err(Failed { begin, end: Instant::now(), failure, error: format!("{error:#}") });
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}

async fn ask_and_disagree(
    client: Client,
    texts: Arc<Vec<Text>>,
    first: usize,
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
) {
    for number in first.. {
        if stop.is_cancelled() {
            return;
        }
        let (text, begun) = (&texts[(number % TEXTS + number / TURN) % texts.len()], Instant::now());
        let answer = persistently(|| {
            let (client, text) = (client.clone(), text.text.clone());
            async move { client.classify(&text, None).await }
        })
        .await;
        seen.lock().unwrap().requests += 1;
        let failed = match answer {
            Err(failed) => Some(failed),
            // People who disagree with every answer, so that the model drifts; every second says so.
            Ok(answer) if number % 2 == 0 => {
                let wrong = if answer.label == "positive" { "negative" } else { "positive" };
                seen.lock().unwrap().unsure.insert(answer.request_id.clone());
                let given = persistently(|| {
                    let (client, id) = (client.clone(), answer.request_id.clone());
                    async move { client.feedback(&id, wrong).await }
                })
                .await;
                if given.is_ok() {
                    let mut seen = seen.lock().unwrap();
                    seen.unsure.remove(&answer.request_id);
                    seen.acknowledged.insert(answer.request_id, (begun, Instant::now()));
                }
                given.err()
            }
            Ok(_) => None,
        };
        seen.lock().unwrap().failed.extend(failed);
        tokio::time::sleep(Duration::from_millis(120)).await;
    }
}

async fn status(cluster: &Cluster) -> Result<ModelDeploymentStatus> {
    Ok(cluster.deployments(NAMESPACE).get(NAME).await?.status.unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the demo's cluster: make demo"]
async fn whatever_is_killed_nothing_is_lost_or_done_twice() -> Result<()> {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let (kills, seed) = (number("CHAOS_KILLS", 50)?, number("CHAOS_SEED", clock)?);
    println!("CHAOS_KILLS={kills} CHAOS_SEED={seed}");
    let cluster = Cluster::connect().await?;
    cluster.fresh_namespace(NAMESPACE).await?;
    let rows = sentiment::texts(&HOME, Part::Training)?;
    let bucket = athanor_tests::storage::bucket()?;
    athanor_tests::storage::put(&bucket, "tests/chaos.csv", sentiment::csv(&rows[..400]).into_bytes()).await?;
    let first = cluster.jobs("demo").get("sentiment").await.context("run make demo first")?;
    let artifact = first.status.and_then(|status| status.summary).context("the demo's job has no summary")?.artifact;
    let topic = format!("athanor.{NAMESPACE}.{clock}");
    cluster.apply(NAMESPACE, &deployment(&artifact, &topic)).await?;
    let champion = wait("the deployment serves", MINUTES * 4, async || {
        let status = status(&cluster).await?;
        let ready =
            athanor_tests::cluster::condition(&status.conditions, "Ready").is_some_and(|it| it.status == "True");
        Ok(status.current_revision.filter(|_| ready).map(|revision| revision.name))
    })
    .await?;

    let client = Client::new(cluster.service(NAMESPACE, NAME).await?)?;
    wait("the router answers", MINUTES, async || Ok(client.classify("first", None).await.is_ok().then_some(())))
        .await?;
    let texts = sentiment::texts(&HOME, Part::Traffic)?;
    let (texts, seen, stop) = (Arc::new(texts), Arc::new(Mutex::new(Seen::default())), CancellationToken::new());
    let availability = Availability::watch(cluster.clone(), NAMESPACE, NAME)?;
    let runs = Runs::watch(&cluster, NAMESPACE);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|first| {
            tokio::spawn(ask_and_disagree(client.clone(), texts.clone(), first * 13, seen.clone(), stop.clone()))
        })
        .collect();

    let begun = Instant::now();
    let mut chaos = Chaos::new(cluster.clone(), NAMESPACE, seed)?;
    let mut struck = BTreeMap::new();
    let mut done = 0;
    while done < kills {
        let Some(victim) = chaos.strike().await? else { continue };
        done += 1;
        println!("{:>5.0} s  kill {done}: {victim:?}", begun.elapsed().as_secs_f64());
        *struck.entry(format!("{victim:?}")).or_insert(0) += 1;
    }
    println!("{kills} kills in {:.0} s: {struck:?}", begun.elapsed().as_secs_f64());

    let promoted = wait("the loop has retrained and promoted", MINUTES * 8, async || {
        let current = status(&cluster).await?.current_revision;
        Ok(current.map(|revision| revision.name).filter(|name| *name != champion))
    })
    .await?;
    println!("{champion} -> {promoted} {:.0} s after the first kill", begun.elapsed().as_secs_f64());
    stop.cancel();
    for client in clients {
        client.await?;
    }
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    println!(
        "{} requests, {} failed at all of {TRIES} tries; {} feedbacks acknowledged, {} unsure; routers and servers ready {:.1} % of the time",
        seen.requests,
        seen.failed.len(),
        seen.acknowledged.len(),
        seen.unsure.len(),
        availability.share() * 100.0
    );
    for Failed { begin, end, failure, error } in &seen.failed {
        ensure!(
            availability.excuses(*failure, *begin, *end),
            "a request failed while a router and a server were ready: {error}"
        );
    }

    let records = every_acknowledged_event_is_recorded(&cluster, &topic, &seen, &chaos.losses).await?;
    no_retraining_runs_twice(&cluster, &runs, &records, (&artifact, &champion)).await?;
    every_event_is_in_the_dataset_once(&cluster, &topic, &records, &seen, &chaos.losses).await?;
    nothing_is_orphaned(&cluster).await?;
    // A container that was killed starts later each time, a new pod does not: the tests after this one kill it as well.
    for pod in cluster.select("athanor-system", "").await? {
        cluster.pods("athanor-system").delete(&pod.name_any(), &DeleteParams::default()).await?;
    }
    cluster.delete_namespace(NAMESPACE).await
}

/// Reads the topic once it has all feedback that cannot have been lost with a disk, with a consumer that is not Athanor's.
async fn every_acknowledged_event_is_recorded(
    cluster: &Cluster,
    topic: &str,
    seen: &Seen,
    losses: &Losses,
) -> Result<Vec<Record>> {
    let safe = |(_, (begin, end)): &(&String, &(Instant, Instant))| !losses.may_include(*begin, *end);
    let safe: BTreeSet<&String> = seen.acknowledged.iter().filter(safe).map(|(id, _)| id).collect();
    println!("{} of {} acknowledged feedbacks may not be lost with a disk", safe.len(), seen.acknowledged.len());
    ensure!(safe.len() * 4 > seen.acknowledged.len(), "most of the feedback may be lost: the test shows nothing");
    let records = wait("every acknowledged feedback is in Kafka", MINUTES * 3, async || {
        let topic = topic.to_owned();
        let records = tokio::task::spawn_blocking(move || events::read_all(&topic)).await??;
        let fed: BTreeSet<&String> =
            records.iter().filter(|record| record.kind == event::FEEDBACK).map(|record| &record.request_id).collect();
        Ok(safe.iter().all(|id| fed.contains(id)).then_some(records))
    });
    let records = records.await.with_context(|| format!("see kubectl -n {NAMESPACE} logs -l {MANAGED}"))?;
    let ids: BTreeSet<&String> = records.iter().map(|record| &record.id).collect();
    println!("{} records, {} of them repeated deliveries", records.len(), records.len() - ids.len());
    // What waits on a router's disk now would not be in the ranges below.
    let pods = cluster.select(NAMESPACE, "app.kubernetes.io/component=router").await?;
    ensure!(!pods.is_empty(), "there is no router any more");
    Ok(records)
}

/// Each drift was answered by one retraining, each attempt of which ran once; and each that succeeded was trained on the
/// events of its ranges.
async fn no_retraining_runs_twice(
    cluster: &Cluster,
    runs: &Runs,
    records: &[Record],
    first: (&str, &str),
) -> Result<()> {
    let (deployment, jobs) = wait("every retraining is counted", MINUTES, async || {
        let deployment = cluster.deployments(NAMESPACE).get(NAME).await?;
        let jobs = cluster.jobs(NAMESPACE).list(&ListParams::default()).await?.items;
        let uid = deployment.uid().unwrap_or_default();
        let own = |job: &FineTuneJob| job.owner_references().iter().any(|owner| owner.uid == uid);
        let jobs: Vec<FineTuneJob> = jobs.into_iter().filter(own).collect();
        let count = deployment.status.as_ref().map_or(0, |status| status.retrainings);
        // A job is created before it is counted.
        Ok((jobs.len() as u64 == count).then_some((deployment, jobs)))
    })
    .await?;
    let status = deployment.status.unwrap_or_default();
    let retrainings = jobs.iter().map(|job| Retraining::read(NAME, job)).collect::<Result<Vec<_>>>()?;
    let known = Known {
        count: status.retrainings,
        first,
        rolled_back: &status.failed_revisions,
        cooldown: COOLDOWN,
        minimum_samples: MINIMUM_SAMPLES as usize,
        records,
    };
    check_retrainings(&retrainings, &known)?;
    for (job, retraining) in jobs.iter().zip(&retrainings) {
        if retraining.outcome == Outcome::Runs {
            continue;
        }
        let pods = check_attempts(job, &runs.of(job))?;
        let rows = match retraining.outcome {
            Outcome::Succeeded(_) => dataset::check(job, records).await?.len(),
            _ => 0,
        };
        println!("{}: {:?}, {rows} labelled events, {pods} pods", retraining.name, retraining.outcome);
    }
    Ok(())
}

/// A job over the whole topic is trained on the answers with acknowledged feedback, by their ids, texts that repeat
/// included.
async fn every_event_is_in_the_dataset_once(
    cluster: &Cluster,
    topic: &str,
    records: &[Record],
    seen: &Seen,
    losses: &Losses,
) -> Result<()> {
    let kafka = json!({"bootstrapServers": events::BOOTSTRAP, "topic": topic, "ranges": whole(records)});
    let mut spec = training(json!([{"name": "events", "kafka": kafka}]));
    spec["data"]["clean"] = json!({"exactDuplicates": "Keep"});
    // A text is in one part, and there are few.
    spec["data"]["split"] = json!({"validationPercent": 30, "testPercent": 30});
    spec["hyperparameters"]["maxSteps"] = 1.into();
    let job = json!({"apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "all-events"}, "spec": spec});
    cluster.apply(NAMESPACE, &job.to_string()).await?;
    let job = job_succeeded(cluster, NAMESPACE, "all-events", MINUTES * 4, |_| {}).await?;
    let rows = dataset::check(&job, records).await?;
    let requests: BTreeSet<&str> = rows.iter().filter_map(|row| row.id.strip_suffix("/0")).collect();
    ensure!(requests.len() == rows.len(), "{} rows of {} requests", rows.len(), requests.len());
    let is_missing = |(id, _): &(&String, &(Instant, Instant))| !requests.contains(id.as_str());
    let missing: Vec<_> = seen.acknowledged.iter().filter(is_missing).collect();
    println!(
        "{} rows of {} acknowledged feedbacks ({} unsure); {} were lost with a disk",
        rows.len(),
        seen.acknowledged.len(),
        seen.unsure.len(),
        missing.len()
    );
    for (id, (begin, end)) in missing {
        ensure!(losses.may_include(*begin, *end), "acknowledged feedback to {id} is not in the dataset");
    }
    let is_known = |id: &&str| seen.acknowledged.contains_key(*id) || seen.unsure.contains(*id);
    let unknown: Vec<&str> = requests.into_iter().filter(|id| !is_known(id)).collect();
    ensure!(unknown.is_empty(), "rows of requests that nobody gave feedback to: {unknown:?}");
    Ok(())
}

/// Every object of Athanor's has an owner that exists, and goes with it.
async fn nothing_is_orphaned(cluster: &Cluster) -> Result<()> {
    let jobs = cluster.jobs(NAMESPACE);
    let deployment = cluster.deployments(NAMESPACE).get(NAME).await?;
    let mut owners: BTreeSet<String> = deployment.uid().into_iter().collect();
    owners.extend(jobs.list(&ListParams::default()).await?.iter().filter_map(ResourceExt::uid));
    owners.extend(uids::<Deployment>(cluster).await?);
    owners.extend(uids::<Job>(cluster).await?);
    let sets: Api<k8s_openapi::api::apps::v1::ReplicaSet> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    owners.extend(sets.list(&ListParams::default()).await?.iter().filter_map(ResourceExt::uid));
    for (name, owner) in owned(cluster).await? {
        ensure!(owner.as_ref().is_some_and(|owner| owners.contains(owner)), "{name} has no owner: {owner:?}");
    }
    cluster.deployments(NAMESPACE).delete(NAME, &DeleteParams::default()).await?;
    jobs.delete("all-events", &DeleteParams::default()).await?;
    wait("everything goes with its owner", MINUTES * 3, async || Ok(owned(cluster).await?.is_empty().then_some(())))
        .await
}

async fn uids<K>(cluster: &Cluster) -> Result<Vec<String>>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    K::DynamicType: Default,
{
    let api: Api<K> = Api::namespaced(cluster.client.clone(), NAMESPACE);
    Ok(api.list(&ListParams::default().labels(MANAGED)).await?.iter().filter_map(ResourceExt::uid).collect())
}

/// Athanor's objects in the namespace with the UID of their controller.
async fn owned(cluster: &Cluster) -> Result<Vec<(String, Option<String>)>> {
    async fn of<K>(cluster: &Cluster, kind: &str, found: &mut Vec<(String, Option<String>)>) -> Result<()>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
        K::DynamicType: Default,
    {
        let api: Api<K> = Api::namespaced(cluster.client.clone(), NAMESPACE);
        for object in api.list(&ListParams::default().labels(MANAGED)).await? {
            let owner = object.owner_references().first().map(|owner| owner.uid.clone());
            found.push((format!("{kind} {}", object.name_any()), owner));
        }
        Ok(())
    }
    let mut found = Vec::new();
    of::<Deployment>(cluster, "Deployment", &mut found).await?;
    of::<Job>(cluster, "Job", &mut found).await?;
    of::<Pod>(cluster, "Pod", &mut found).await?;
    of::<ConfigMap>(cluster, "ConfigMap", &mut found).await?;
    of::<Secret>(cluster, "Secret", &mut found).await?;
    of::<Service>(cluster, "Service", &mut found).await?;
    of::<ServiceAccount>(cluster, "ServiceAccount", &mut found).await?;
    of::<Role>(cluster, "Role", &mut found).await?;
    of::<RoleBinding>(cluster, "RoleBinding", &mut found).await?;
    of::<PodDisruptionBudget>(cluster, "PodDisruptionBudget", &mut found).await?;
    of::<FineTuneJob>(cluster, "FineTuneJob", &mut found).await?;
    Ok(found)
}
