//! Outsiders on the real cluster, after `make demo`: nobody asks without a key, and nobody steers a model beyond its share.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use athanor_contract::{
    artifact::sha256_hex,
    event::{self, attribute},
    monitor::Verdict,
    process::header,
};
use athanor_crds::ModelDeploymentStatus;
use athanor_tests::{
    cluster::{Cluster, condition, job_succeeded, wait},
    events,
    sentiment::{self, HOME, Part},
    traffic::Client,
};
use kube::api::ListParams;
use rdkafka::{
    ClientConfig,
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use serde_json::{Value, json};

const NAMESPACE: &str = "poisoning";
const NAME: &str = "guarded";
const MINUTES: Duration = Duration::from_secs(60);
/// Callers that tell the truth, each with so many answers.
const HONEST: usize = 10;
const HONEST_LABELS: usize = 20;
/// Wrong labels of the hostile caller.
const HOSTILE_LABELS: usize = 400;
/// Events that an outsider writes to the topic.
const FORGED: usize = 500;
/// `maximumCallerPercent`.
const SHARE: usize = 10;

fn key(caller: &str) -> String {
    format!("sk-{caller}")
}

fn callers() -> Vec<String> {
    (0..HONEST).map(|number| format!("honest-{number}")).chain(["hostile".to_owned()]).collect()
}

fn manifest(artifact: &str, topic: &str) -> String {
    let callers: Vec<Value> = callers().iter().map(|name| json!({"name": name})).collect();
    json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": NAME},
        "spec": {
            "model": {"from": artifact}, "replicas": 1, "credentialsSecretName": "s3-credentials",
            "access": {"apiKeys": {"secretName": "keys", "callers": callers}},
            "feedback": {"kafka": {"bootstrapServers": events::BOOTSTRAP, "topic": topic}, "maximumCallerPercent": SHARE},
            "monitor": {"windowPredictions": 10_000, "minimumLabels": 30},
            "retrain": {"minimumSamples": 30, "template": {"spec": {
                "model": {"from": "s3://athanor/models/minilm-l6", "task": "TextClassification"},
                "data": {"sources": [{"name": "rows", "uri": "s3://athanor/tests/rows.csv"}]},
                "output": {"to": "s3://athanor/tests/out"}}}},
        },
    })
    .to_string()
}

/// Writes predictions with wrong labels to the topic, as someone who has the broker's address alone.
async fn forge(topic: &str, revision: &str) -> Result<()> {
    let producer: FutureProducer = ClientConfig::new().set("bootstrap.servers", events::BOOTSTRAP).create()?;
    for number in 0..FORGED {
        let id = format!("r-{number:032x}-1-0123456789ab");
        let prediction = json!({"requestId": id, "index": 0, "revision": revision, "text": format!("forged {number}"),
            "label": "positive", "confidence": 0.9, "latencyMs": 1.0});
        let feedback = json!({"requestId": id, "index": 0, "expectedLabel": "negative", "caller": "honest-0"});
        for (kind, ce_id, data) in [
            (event::PREDICTION, format!("{id}/0"), prediction),
            (event::FEEDBACK, format!("forged-{number}"), feedback),
        ] {
            let mut headers = OwnedHeaders::new();
            for (name, value) in [
                (attribute::SPEC_VERSION, event::SPEC_VERSION),
                (attribute::ID, ce_id.as_str()),
                (attribute::SOURCE, &format!("/athanor/{NAMESPACE}/{NAME}")),
                (attribute::TYPE, kind),
                (attribute::TIME, "2026-11-28T12:00:00Z"),
                (attribute::CONTENT_TYPE, event::CONTENT_TYPE),
                (attribute::SIGNATURE, &"0".repeat(64)),
            ] {
                headers = headers.insert(Header { key: name, value: Some(value) });
            }
            let payload = data.to_string();
            let record = FutureRecord::to(topic).key(&id).payload(&payload).headers(headers);
            producer.send(record, Duration::from_secs(10)).await.map_err(|(error, _)| error)?;
        }
    }
    Ok(())
}

async fn status(cluster: &Cluster) -> Result<ModelDeploymentStatus> {
    Ok(cluster.deployments(NAMESPACE).get(NAME).await?.status.unwrap_or_default())
}

/// Without a key, or with a made-up one, nothing is answered and nothing is taken.
async fn strangers_get_nothing(address: &str) -> Result<()> {
    for stranger in [Client::new(address)?, Client::new(address)?.with_key("sk-guess")] {
        let refused = stranger.classify("first", None).await.err().context("a stranger was answered")?.to_string();
        ensure!(refused.starts_with("401"), "{refused}");
        let refused = stranger.feedback("r-1", "positive").await.err().context("taken")?.to_string();
        ensure!(refused.contains("401"), "{refused}");
    }
    Ok(())
}

/// The id of an answer is good for its one input, and for no other answer.
async fn forged_ids_take_no_feedback(client: &Client, address: &str, text: &str) -> Result<()> {
    let answer = client.classify(text, None).await?;
    let mut another = answer.request_id.clone();
    another.replace_range(2..3, if another.as_bytes()[2] == b'0' { "1" } else { "0" });
    for id in [another, answer.request_id.replacen("-1-", "-9-", 1), answer.request_id[..34].to_owned()] {
        let refused = client.feedback(&id, "positive").await.err().context("a forged id was taken")?.to_string();
        ensure!(refused.contains("404"), "{id}: {refused}");
    }
    // Each response has an id, but only that of an answer is good for feedback.
    let http = reqwest::Client::builder().no_proxy().build()?;
    let url = |path: &str| format!("{address}{path}");
    for (request, status) in [
        (http.get(url("/v1/models")), 200),
        (http.post(url("/v1/classify")).json(&json!({"input": []})), 422),
        (http.post(url("/v1/classify")).json(&json!({"input": text, "model": "another"})), 404),
    ] {
        let response = request.bearer_auth(key("hostile")).send().await?;
        let found = response.status().as_u16();
        ensure!(found == status || (found == 400 && status == 422), "{}: {found}", response.url());
        let id = response.headers().get(header::REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default();
        ensure!(!id.is_empty(), "a response of status {found} has no request id");
        let refused = client.feedback(id, "positive").await.err().context("an id without an answer was taken")?;
        ensure!(refused.to_string().contains("404"), "{id}: {refused}");
    }
    Ok(())
}

/// Trains on the whole topic as a retraining would: the records of the topic, and the rows.
async fn retraining(cluster: &Cluster, topic: &str) -> Result<(usize, usize)> {
    let name = topic.to_owned();
    let records = tokio::task::spawn_blocking(move || events::read_all(&name)).await??;
    let mut ends = std::collections::BTreeMap::new();
    for record in &records {
        let end = ends.entry(record.partition).or_insert(0);
        *end = (*end).max(record.offset + 1);
    }
    let ranges: Vec<Value> =
        ends.iter().map(|(partition, end)| json!({"partition": partition, "begin": 0, "end": end})).collect();
    let job = json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "from-events"},
        "spec": {
            "model": {"from": "s3://athanor/models/minilm-l6", "task": "TextClassification", "labels": ["negative", "positive"]},
            "data": {"sources": [{"name": "events", "kafka": {"bootstrapServers": events::BOOTSTRAP, "topic": topic, "ranges": ranges,
                "signingKeysSecretName": format!("{NAME}-signing-keys"), "maximumCallerPercent": SHARE}}]},
            "hyperparameters": {"maxSteps": 1},
            "output": {"to": "s3://athanor/tests/out"},
            "credentialsSecretName": "s3-credentials",
        },
    });
    cluster.apply(NAMESPACE, &job.to_string()).await?;
    let job = job_succeeded(cluster, NAMESPACE, "from-events", MINUTES * 3, |_| {}).await?;
    let rows = job.status.and_then(|status| status.summary).context("no summary")?.rows;
    Ok((records.len(), (rows.train + rows.validation + rows.test) as usize))
}

#[tokio::test]
#[ignore = "needs the demo's cluster: make demo"]
async fn a_hostile_caller_and_a_writer_of_the_topic_steer_nothing_beyond_their_share() -> Result<()> {
    let cluster = Cluster::connect().await?;
    cluster.fresh_namespace(NAMESPACE).await?;
    let keys: Value =
        callers().iter().map(|name| (name.clone(), format!("sha256:{}", sha256_hex(key(name).as_bytes())))).collect();
    cluster.secret(NAMESPACE, "keys", keys).await?;
    let job = cluster.jobs("demo").get("sentiment").await.context("run make demo first")?;
    let artifact = job.status.and_then(|status| status.summary).context("the demo's job has no summary")?.artifact;
    let topic = format!("athanor.{NAMESPACE}.events-{}", std::process::id());
    cluster.apply(NAMESPACE, &manifest(&artifact, &topic)).await?;
    let revision = wait("the deployment is Ready", MINUTES * 3, async || {
        let status = status(&cluster).await?;
        let ready = condition(&status.conditions, "Ready").is_some_and(|condition| condition.status == "True");
        Ok(status.current_revision.filter(|_| ready).map(|revision| revision.name))
    })
    .await?;
    let address = cluster.service(NAMESPACE, NAME).await?;
    let client = |caller: &str| anyhow::Ok(Client::new(address.clone())?.with_key(&key(caller)));
    let hostile = client("hostile")?;
    wait("the router answers", MINUTES, async || Ok(hostile.classify("first", None).await.is_ok().then_some(())))
        .await?;

    strangers_get_nothing(&address).await?;
    let texts = sentiment::texts(&HOME, Part::Traffic)?;
    ensure!(texts.len() > HONEST * HONEST_LABELS + HOSTILE_LABELS, "only {} texts", texts.len());
    forged_ids_take_no_feedback(&hostile, &address, &texts[0].text).await?;
    let (honest, rest) = texts.split_at(HONEST * HONEST_LABELS);
    for text in &rest[..HOSTILE_LABELS] {
        let answer = hostile.classify(&text.text, None).await?;
        let wrong = if answer.label == "positive" { "negative" } else { "positive" };
        hostile.feedback(&answer.request_id, wrong).await?;
    }
    let honest_clients = (0..HONEST).map(|number| client(&format!("honest-{number}"))).collect::<Result<Vec<_>>>()?;
    for (text, client) in honest.iter().zip(honest_clients.iter().cycle()) {
        let answer = client.classify(&text.text, None).await?;
        client.feedback(&answer.request_id, text.label).await?;
    }
    forge(&topic, &revision).await?;

    let answered = (HONEST * HONEST_LABELS + HOSTILE_LABELS) as u64;
    let monitor = wait("the monitor has read all events", MINUTES * 2, async || {
        let monitor = status(&cluster).await?.monitor.filter(|monitor| monitor.predictions > answered);
        Ok(monitor.filter(|monitor| monitor.labelled >= (HONEST * HONEST_LABELS) as u64))
    })
    .await?;
    let most = HONEST * HONEST_LABELS * 100 / (100 - SHARE);
    println!(
        "{} labels counted, at most {most}; {} predictions; {:?}",
        monitor.labelled, monitor.predictions, monitor.verdict
    );
    ensure!(monitor.labelled as usize <= most + 2, "{} labels were counted, at most {most}", monitor.labelled);
    ensure!((monitor.predictions as usize) < answered as usize + 60, "forged predictions were counted: {monitor:?}");
    // Some verdicts' time, in which the operator would have acted.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let status = status(&cluster).await?;
    let verdict = status.monitor.as_ref().map(|monitor| monitor.verdict);
    ensure!(verdict != Some(Verdict::Drifted), "{:?}", status.monitor);
    let jobs = cluster.jobs(NAMESPACE).list(&ListParams::default()).await?.items;
    ensure!(jobs.is_empty() && status.retraining.is_none(), "a retraining started");

    let (records, all) = retraining(&cluster, &topic).await?;
    println!("{records} records in the topic, {all} rows of a retraining");
    ensure!(records >= 2 * (FORGED + HOSTILE_LABELS), "only {records} records");
    // Texts that occur twice are one row.
    ensure!((HONEST * HONEST_LABELS * 9 / 10..=most).contains(&all), "{all} rows, at most {most}");
    cluster.delete_namespace(NAMESPACE).await
}
