//! The operator against a real API server whose writes fail one at a time, and two operators of which one was suspended.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use athanor_crds::{FineTuneJob, ModelDeployment};
use athanor_tests::{
    apiserver::ApiServer,
    faults::{FAULTS, FaultProxy, Planned},
};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        batch::v1::Job,
        coordination::v1::Lease,
        core::v1::{ConfigMap, Secret, Service, ServiceAccount},
        policy::v1::PodDisruptionBudget,
        rbac::v1::{Role, RoleBinding},
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::operator::Operator;

/// Writes of one job, and of one deployment, from its creation, or from an update, until nothing is left to do, at most: each
/// of them meets each fault. The test fails if there are more.
const WRITES_OF_A_JOB: usize = 8;
const WRITES_OF_A_DEPLOYMENT: usize = 22;

fn job(name: &str) -> Result<FineTuneJob> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
        "spec": {
            "model": {"from": "s3://bucket/model", "task": "TextClassification"},
            "data": {"sources": [{"name": "reviews", "uri": "s3://bucket/reviews.csv"}]},
            "output": {"to": "s3://bucket/out"},
            "distributed": {"numNodes": 2},
        },
    }))?)
}

fn deployment(name: &str) -> Result<ModelDeployment> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"name": name},
        "spec": {
            "model": {"from": "s3://bucket/model"},
            "feedback": {"kafka": {"bootstrapServers": "kafka:9092"}},
            "monitor": {},
        },
    }))?)
}

async fn until<T>(what: &str, seconds: u64, mut ready: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = ready().await? {
            return Ok(found);
        }
        ensure!(started.elapsed() < Duration::from_secs(seconds), "{what}: not within {seconds} s");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Names of the objects of a kind that belong to `owner`, without its name.
async fn children<K>(client: &Client, found: &mut BTreeMap<String, BTreeSet<String>>) -> Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
{
    let api: Api<K> = Api::namespaced(client.clone(), "default");
    for object in api.list(&ListParams::default()).await?.items {
        let Some(owner) = object.owner_references().first().map(|owner| owner.name.clone()) else { continue };
        let name = object.name_any();
        let rest = name.strip_prefix(&owner).unwrap_or(&name).to_owned();
        found.entry(owner).or_default().insert(format!("{} {rest}", K::kind(&())));
    }
    Ok(())
}

async fn all_children(client: &Client) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut found = BTreeMap::new();
    children::<ConfigMap>(client, &mut found).await?;
    children::<Secret>(client, &mut found).await?;
    children::<Service>(client, &mut found).await?;
    children::<ServiceAccount>(client, &mut found).await?;
    children::<Deployment>(client, &mut found).await?;
    children::<Job>(client, &mut found).await?;
    children::<PodDisruptionBudget>(client, &mut found).await?;
    children::<Role>(client, &mut found).await?;
    children::<RoleBinding>(client, &mut found).await?;
    Ok(found)
}

/// Reasons of all conditions, and what else of a status does not depend on the time.
fn outline(status: &Value) -> Value {
    let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
    let reasons: BTreeMap<String, Value> = conditions
        .iter()
        .map(|condition| (condition["type"].as_str().unwrap_or_default().to_owned(), condition["reason"].clone()))
        .collect();
    json!({"reasons": reasons, "attempt": status["attempt"], "restarts": status["restarts"], "preemptions": status["preemptions"],
        "model": status["currentRevision"]["modelUri"]})
}

async fn outlines(client: &Client) -> Result<BTreeMap<String, Value>> {
    let mut found = BTreeMap::new();
    for job in Api::<FineTuneJob>::namespaced(client.clone(), "default").list(&ListParams::default()).await?.items {
        found.insert(job.name_any(), outline(&serde_json::to_value(&job.status)?));
    }
    for deployment in
        Api::<ModelDeployment>::namespaced(client.clone(), "default").list(&ListParams::default()).await?.items
    {
        found.insert(deployment.name_any(), outline(&serde_json::to_value(&deployment.status)?));
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn a_fault_of_any_write_leads_to_the_same_state() -> Result<()> {
    let server = ApiServer::start().await?;
    let client = &server.client;
    let mut planned = HashMap::new();
    for (prefix, writes) in [("j", WRITES_OF_A_JOB), ("d", WRITES_OF_A_DEPLOYMENT)] {
        for (kind, fault) in FAULTS.into_iter().enumerate() {
            planned.extend((0..writes).map(|write| (format!("{prefix}{kind}-{write:02}"), Planned { fault, write })));
        }
        // The one that nothing happens to.
        planned.insert(format!("{prefix}x-99"), Planned { fault: FAULTS[0], write: usize::MAX });
    }
    let proxy = FaultProxy::start(server.address(), server.token().into(), planned.clone()).await?;
    let kubeconfig = server.kubeconfig_at("faults", &proxy.address)?;
    let _operator = Operator::start(&server, "operator", &kubeconfig, &[])?;
    let jobs: Api<FineTuneJob> = Api::namespaced(client.clone(), "default");
    let deployments: Api<ModelDeployment> = Api::namespaced(client.clone(), "default");
    for name in planned.keys() {
        match name.starts_with('j') {
            true => jobs.create(&PostParams::default(), &job(name)?).await.map(|_| ())?,
            false => deployments.create(&PostParams::default(), &deployment(name)?).await.map(|_| ())?,
        }
    }
    let settled = settle(client, &proxy, &planned, &BTreeMap::new()).await;
    if settled.is_err() {
        print!("{}", std::fs::read_to_string(server.folder().join("operator.log")).unwrap_or_default());
    }
    let created = settled?;
    for (name, outline) in &created {
        ensure!(name.starts_with('d') || outline["attempt"] == json!(0), "{name}: {outline}");
    }
    for name in planned.keys().filter(|name| name.starts_with('j')) {
        let created = proxy.created("/jobs", &format!("{name}-0"));
        ensure!(created == 1, "the Job of {name} was created {created} times");
    }

    // The same faults in the life of an object: another model, whose servers take the place of those before, and a job that
    // is suspended.
    proxy.begin_again();
    for name in planned.keys() {
        let merge = PatchParams::default();
        match name.starts_with('j') {
            true => jobs.patch(name, &merge, &Patch::Merge(json!({"spec": {"suspend": true}}))).await.map(|_| ())?,
            false => {
                let model = json!({"spec": {"model": {"from": "s3://bucket/another"}}});
                deployments.patch(name, &merge, &Patch::Merge(model)).await.map(|_| ())?;
            }
        }
    }
    let settled = settle(client, &proxy, &planned, &created).await;
    if settled.is_err() {
        print!("{}", std::fs::read_to_string(server.folder().join("operator.log")).unwrap_or_default());
    }
    settled?;
    for name in planned.keys().filter(|name| name.starts_with('j')) {
        let created = [0, 1].map(|attempt| proxy.created("/jobs", &format!("{name}-{attempt}")));
        ensure!(created == [1, 0], "the Jobs of {name} were created {created:?} times");
    }
    Ok(())
}

/// The object of a kind that nothing happens to.
fn undisturbed(name: &str) -> &'static str {
    if name.starts_with('j') { "jx-99" } else { "dx-99" }
}

/// Waits until all objects are in the state of the undisturbed one, which is another one than `before`. Returns their
/// outlines. Each planned fault has occurred then, as far as an object without a fault is usually written as often; and
/// nothing is written any more.
async fn settle(
    client: &Client,
    proxy: &FaultProxy,
    planned: &HashMap<String, Planned>,
    before: &BTreeMap<String, Value>,
) -> Result<BTreeMap<String, Value>> {
    let began = Instant::now();
    let same = async || {
        let (children, outlines) = (all_children(client).await?, outlines(client).await?);
        let of = |name: &str| (children.get(name).cloned(), outlines.get(name).cloned());
        let is_settled = |name: &str| {
            let outline = outlines.get(name);
            outline.is_some_and(|outline| outline["reasons"] != json!({})) && outline != before.get(name)
        };
        let differs = planned.keys().filter(|name| of(name) != of(undisturbed(name)) || !is_settled(name));
        let different: BTreeSet<&String> = differs.collect();
        if began.elapsed() > Duration::from_secs(140) {
            println!("still different: {different:?}");
        }
        anyhow::Ok(different.is_empty().then_some(outlines))
    };
    until("all objects are in the same state", 150, &same).await?;
    // It stays so: nothing is written once all is as it should be.
    let writes = || planned.keys().map(|name| proxy.writes(name)).sum::<usize>();
    let mut last = writes();
    until("nothing is written for ten seconds", 60, async || {
        tokio::time::sleep(Duration::from_secs(10)).await;
        let now = writes();
        Ok((std::mem::replace(&mut last, now) == now).then_some(()))
    })
    .await?;
    let found = same().await?.context("the states differ again")?;
    println!("{} objects with {} faults after {:.0} s", planned.len(), proxy.faults(), began.elapsed().as_secs_f64());
    for (name, most) in [("jx-99", WRITES_OF_A_JOB), ("dx-99", WRITES_OF_A_DEPLOYMENT)] {
        // Those whose fault was due at a later write than their last one, the undisturbed one among them.
        let intact: Vec<(&String, &Planned)> = planned
            .iter()
            .filter(|(other, planned)| undisturbed(other) == name && proxy.writes(other) <= planned.write)
            .collect();
        let mut writes: Vec<usize> = intact.iter().map(|(other, _)| proxy.writes(other)).collect();
        writes.sort_unstable();
        // Usually: the median. One that is reconciled again before the operator has seen its own last writes has more.
        let (fewest, usual, most_of_one) = (writes[0], writes[writes.len() / 2], writes[writes.len() - 1]);
        println!(
            "{} objects like {name} without a fault: {fewest} to {most_of_one} writes, usually {usual}",
            writes.len()
        );
        ensure!(
            (2..=most).contains(&usual),
            "an object like {name} took {usual} writes: change the constants of this test"
        );
        // Two changes of a status may be one write, so that one object may have one write fewer than another.
        let missed: Vec<&String> =
            intact.iter().filter(|(_, planned)| planned.write < usual - 1).map(|(other, _)| *other).collect();
        ensure!(missed.is_empty(), "the fault of {missed:?} did not occur");
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn a_suspended_leader_that_resumes_writes_nothing() -> Result<()> {
    let server = ApiServer::start().await?;
    let client = &server.client;
    let jobs: Api<FineTuneJob> = Api::namespaced(client.clone(), "default");
    let batch_jobs: Api<Job> = Api::namespaced(client.clone(), "default");
    let leases: Api<Lease> = Api::namespaced(client.clone(), "default");
    // Each operator has a proxy, which counts its writes.
    let start = async |identity: &str| {
        let proxy = FaultProxy::start(server.address(), server.token().into(), HashMap::new()).await?;
        let kubeconfig = server.kubeconfig_at(identity, &proxy.address)?;
        anyhow::Ok((Operator::start(&server, identity, &kubeconfig, &[])?, proxy))
    };
    let holder = async || {
        let lease = leases.list(&ListParams::default()).await?.items.into_iter().next();
        anyhow::Ok(lease.and_then(|lease| lease.spec).and_then(|spec| spec.holder_identity).unwrap_or_default())
    };
    let has_job = async |name: &str| {
        let name = format!("{name}-0");
        until(&format!("Job {name}"), 60, async || Ok(batch_jobs.get_opt(&name).await?)).await
    };
    let (mut first, first_proxy) = start("first").await?;
    jobs.create(&PostParams::default(), &job("one")?).await?;
    has_job("one").await?;
    ensure!(holder().await? == "first");
    let (_second, second_proxy) = start("second").await?;
    // Both are there, and the second waits: what the first does is done once.
    jobs.create(&PostParams::default(), &job("two")?).await?;
    has_job("two").await?;
    ensure!(second_proxy.all_writes() == 0, "a standby wrote");

    first.signal("STOP")?;
    let began = Instant::now();
    until("the second takes over", 40, async || Ok((holder().await? == "second").then_some(()))).await?;
    println!("taken over after {:.0} s", began.elapsed().as_secs_f64());
    // Work that the first one will find as soon as it goes on, while it still believes that it leads.
    for number in 0..20 {
        jobs.create(&PostParams::default(), &job(&format!("later-{number}"))?).await?;
    }
    has_job("later-19").await?;
    let before = first_proxy.all_writes();
    ensure!(before > 0 && second_proxy.all_writes() > 20, "{before} and {} writes", second_proxy.all_writes());
    // It hears of the work at once, and only later that there is another leader.
    first_proxy.slow_leases();
    first.signal("CONT")?;
    let ended = until("the first ends", 40, async || first.ended()).await?;
    ensure!(!ended.success(), "an operator that lost its leadership has to be restarted");
    let after = first_proxy.all_writes();
    ensure!(after == before, "the first wrote {} times after it was resumed", after - before);
    ensure!(holder().await? == "second");
    Ok(())
}
