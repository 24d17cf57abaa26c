//! Which requests a reconcile makes, and that caches which lag do no harm.
//!
//! The API server here is a map from paths to objects. The caches are fed by hand, so that they can lag as far as a
//! test needs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use athanor_crds::{FineTuneJob, ModelDeployment};
use athanor_operator::{
    context::Context,
    lease::Leadership,
    progress::Reports,
    reconciler::{self, Kind, ReconcileError},
    settings::Settings,
    stores::{Cached, Feed, Feeds, Stores},
};
use axum::{
    Json, Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, Uri},
};
use clap::Parser;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{Client, runtime::controller::Action, runtime::watcher::Event};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

#[derive(Default)]
struct Objects {
    by_path: BTreeMap<String, Value>,
    requests: Vec<String>,
    version: u64,
}

#[derive(Clone, Default)]
struct Server(Arc<Mutex<Objects>>);

fn failure(code: StatusCode) -> (StatusCode, Json<Value>) {
    refused(code, &code.canonical_reason().unwrap_or_default().replace(' ', ""))
}

fn refused(code: StatusCode, reason: &str) -> (StatusCode, Json<Value>) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code.as_u16(),
        "reason": reason, "message": "refused by the test's server"});
    (code, Json(status))
}

async fn answer(State(server): State<Server>, method: Method, uri: Uri, body: Bytes) -> (StatusCode, Json<Value>) {
    let mut objects = server.0.lock().unwrap();
    let path = uri.path().to_owned();
    objects.requests.push(format!("{method} {path}"));
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    match method {
        Method::GET => match objects.by_path.get(&path) {
            Some(object) => (StatusCode::OK, Json(object.clone())),
            None => failure(StatusCode::NOT_FOUND),
        },
        Method::POST => {
            let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
            if objects.by_path.contains_key(&path) {
                return refused(StatusCode::CONFLICT, "AlreadyExists");
            }
            (StatusCode::CREATED, Json(objects.put(&path, body)))
        }
        Method::PATCH => match path.strip_suffix("/status") {
            None => (StatusCode::OK, Json(objects.put(&path, body))),
            Some(path) => {
                let Some(object) = objects.by_path.get(path).cloned() else { return failure(StatusCode::NOT_FOUND) };
                if body["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"]
                    || body["metadata"]["uid"] != object["metadata"]["uid"]
                {
                    return failure(StatusCode::CONFLICT);
                }
                let mut changed = object;
                changed["status"] = body["status"].clone();
                (StatusCode::OK, Json(objects.put(path, changed)))
            }
        },
        Method::DELETE => match objects.by_path.remove(&path) {
            Some(_) => (StatusCode::OK, Json(json!({"kind": "Status", "apiVersion": "v1", "status": "Success"}))),
            None => failure(StatusCode::NOT_FOUND),
        },
        _ => failure(StatusCode::METHOD_NOT_ALLOWED),
    }
}

impl Objects {
    fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        let uid = self
            .by_path
            .get(path)
            .map_or_else(|| json!(format!("uid of {path}")), |old| old["metadata"]["uid"].clone());
        object["metadata"]["uid"] = uid;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.by_path.insert(path.into(), object.clone());
        object
    }
}

impl Server {
    async fn client(&self) -> Client {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Client::try_from(kube::Config::new(format!("http://{address}").parse().unwrap())).unwrap()
    }

    fn put<K: DeserializeOwned>(&self, path: &str, object: Value) -> K {
        serde_json::from_value(self.0.lock().unwrap().put(path, object)).unwrap()
    }

    fn get<K: DeserializeOwned>(&self, path: &str) -> K {
        serde_json::from_value(self.0.lock().unwrap().by_path[path].clone()).unwrap()
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().requests)
    }
}

/// Brings a cache to the server's present state of one object.
fn show<K: Cached + DeserializeOwned>(server: &Server, feed: &mut Feed<K>, path: &str) {
    feed.take(&Event::Apply(server.get(path)), Instant::now());
}

fn list_nothing<K: Cached>(feed: &mut Feed<K>) {
    feed.take(&Event::Init, Instant::now());
    feed.take(&Event::InitDone, Instant::now());
}

async fn operator(server: &Server) -> (Arc<Context>, Feeds) {
    operator_of(server.client().await)
}

/// An operator with caches that have listed nothing. `client` chooses the cryptography of the process, which the client
/// of routers needs as well.
fn operator_of(client: Client) -> (Arc<Context>, Feeds) {
    let (stores, mut feeds) = Stores::new();
    list_nothing(&mut feeds.fine_tune_jobs);
    list_nothing(&mut feeds.model_deployments);
    list_nothing(&mut feeds.batch_jobs);
    list_nothing(&mut feeds.pods);
    list_nothing(&mut feeds.workloads);
    list_nothing(&mut feeds.replica_sets);
    list_nothing(&mut feeds.services);
    list_nothing(&mut feeds.config_maps);
    let settings = Settings::parse_from(["athanor-operator"]);
    let (changed, _reported) = tokio::sync::mpsc::channel(1);
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let reports = Arc::new(Reports::new(changed));
    let leadership = Leadership::without_election();
    (Arc::new(Context::new(client, settings, stores, reports, http, leadership)), feeds)
}

async fn reconcile<K: Kind>(object: &K, context: &Arc<Context>) -> Result<Action, ReconcileError> {
    reconciler::reconcile(Arc::new(object.clone()), context.clone()).await
}

const JOBS: &str = "/apis/athanor.dev/v1alpha1/namespaces/ns/finetunejobs";
const DEPLOYMENTS: &str = "/apis/athanor.dev/v1alpha1/namespaces/ns/modeldeployments";
const CORE: &str = "/api/v1/namespaces/ns";

fn train() -> Value {
    json!({
        "model": {"from": "s3://models/minilm", "task": "TextClassification"},
        "data": {"sources": [{"name": "reviews", "uri": "s3://data/reviews.jsonl"}]},
        "output": {"to": "s3://out/"},
    })
}

fn on_nodes(nodes: u32) -> Value {
    let mut spec = train();
    spec["distributed"] = json!({"numNodes": nodes});
    spec
}

fn object(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "athanor.dev/v1alpha1", "kind": kind, "spec": spec,
        "metadata": {"name": name, "namespace": "ns", "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"}})
}

#[tokio::test]
async fn a_job_is_created_once_although_the_caches_lag() {
    let server = Server::default();
    let (context, mut feeds) = operator(&server).await;
    let path = format!("{JOBS}/a");
    let batch_job = "/apis/batch/v1/namespaces/ns/jobs";
    let job: FineTuneJob = server.put(&path, object("FineTuneJob", "a", on_nodes(4)));
    show(&server, &mut feeds.fine_tune_jobs, &path);
    reconcile(&job, &context).await.unwrap();
    let created = [
        format!("POST {CORE}/configmaps"),
        format!("POST {CORE}/services"),
        format!("POST {batch_job}"),
        format!("PATCH {path}/status"),
    ];
    assert_eq!(server.requests(), created, "children and status, a request each");

    // No cache shows any of it, then only some do: the reconcile waits.
    let waits = async |step: &str| {
        let action = reconcile(&job, &context).await.unwrap();
        assert_eq!(server.requests(), [""; 0], "{step}");
        assert!(format!("{action:?}").contains("250ms"), "{step}: {action:?}");
    };
    waits("nothing is shown").await;
    show(&server, &mut feeds.fine_tune_jobs, &path);
    waits("the status is shown").await;
    show(&server, &mut feeds.config_maps, &format!("{CORE}/configmaps/a-train"));
    show(&server, &mut feeds.services, &format!("{CORE}/services/a-trainer"));
    waits("the Job is not shown").await;
    show(&server, &mut feeds.batch_jobs, &format!("{batch_job}/a-0"));
    reconcile(&job, &context).await.unwrap();
    assert_eq!(server.requests(), [""; 0], "nothing changed, so there is nothing to write");

    // An operator that starts anew with a cache that misses the Job finds the name in use, and that the Job is its own.
    let (context, mut feeds) = operator(&server).await;
    show(&server, &mut feeds.fine_tune_jobs, &path);
    show(&server, &mut feeds.config_maps, &format!("{CORE}/configmaps/a-train"));
    show(&server, &mut feeds.services, &format!("{CORE}/services/a-trainer"));
    reconcile(&job, &context).await.unwrap();
    let requests = server.requests();
    assert_eq!(requests.iter().filter(|request| request.starts_with("POST")).count(), 1, "{requests:?}");
    assert!(requests.contains(&format!("GET {batch_job}/a-0")), "{requests:?}");
    let now: FineTuneJob = server.get(&path);
    assert_eq!(now.status.unwrap().attempt, 0);
}

/// Shows the caches all that the server has, except for the object itself.
fn show_children(server: &Server, feeds: &mut Feeds) {
    let paths: Vec<String> = server.0.lock().unwrap().by_path.keys().cloned().collect();
    for path in paths {
        if path.contains("/configmaps/") {
            show(server, &mut feeds.config_maps, &path);
        } else if path.contains("/services/") {
            show(server, &mut feeds.services, &path);
        } else if path.contains("/jobs/") {
            show(server, &mut feeds.batch_jobs, &path);
        } else if path.contains("/pods/") {
            show(server, &mut feeds.pods, &path);
        }
    }
}

#[tokio::test]
async fn a_job_of_four_nodes_takes_six_requests_while_its_pods_start_one_by_one() {
    let server = Server::default();
    let (context, mut feeds) = operator(&server).await;
    let path = format!("{JOBS}/a");
    let job: FineTuneJob = server.put(&path, object("FineTuneJob", "a", on_nodes(4)));
    show(&server, &mut feeds.fine_tune_jobs, &path);
    reconcile(&job, &context).await.unwrap();
    let mut requests = server.requests();
    let uid = server.get::<Job>("/apis/batch/v1/namespaces/ns/jobs/a-0").metadata.uid.unwrap();
    let state = |state: Value| json!([{"name": "trainer", "image": "i", "imageID": "i", "ready": true, "restartCount": 0, "state": state}]);
    let put_pod = |index: usize, phase: &str, state_now: Value| {
        let labels = json!({"athanor.dev/finetunejob": "a", "batch.kubernetes.io/controller-uid": uid,
            "batch.kubernetes.io/job-completion-index": index.to_string()});
        let name = format!("a-0-{index}");
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "ns", "labels": labels},
            "status": {"phase": phase, "containerStatuses": state(state_now)}});
        let _pod: Pod = server.put(&format!("{CORE}/pods/{name}"), pod);
    };
    let mut reconciles = async |held: bool| {
        show_children(&server, &mut feeds);
        show(&server, &mut feeds.fine_tune_jobs, &path);
        let action = format!("{:?}", reconcile(&job, &context).await.unwrap());
        // Held back for less than five seconds, or else until the next resynchronisation.
        assert_eq!(action.contains("600s"), !held, "{action}");
        server.requests()
    };
    for index in 0..3 {
        put_pod(index, "Running", json!({"running": {"startedAt": "2026-01-01T00:00:05Z"}}));
        assert_eq!(reconciles(true).await, [""; 0], "{} of 4 pods run", index + 1);
    }
    put_pod(3, "Running", json!({"running": {"startedAt": "2026-01-01T00:00:05Z"}}));
    requests.extend(reconciles(false).await);
    assert_eq!(requests.len(), 5, "another stage is written at once: {requests:?}");
    assert_eq!(reconciles(false).await, [""; 0]);
    let wrong = json!({"terminated": {"exitCode": 3, "message": "no column", "finishedAt": "2026-01-01T00:01:00Z"}});
    put_pod(0, "Failed", wrong);
    requests.extend(reconciles(false).await);
    assert_eq!(requests.iter().filter(|request| request.starts_with("PATCH")).count(), 3, "{requests:?}");
    assert_eq!(requests.len(), 6, "{requests:?}");
    assert_eq!(reconciles(false).await, [""; 0]);
}

#[tokio::test]
async fn a_reconcile_that_hangs_ends_at_its_time_limit_and_is_repeated() {
    let limit = Duration::from_millis(200);
    let server = Server::default();
    let path = format!("{JOBS}/a");
    let job: FineTuneJob = server.put(&path, object("FineTuneJob", "a", train()));
    // The API server takes the connection and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap()).parse().unwrap();
    let (context, mut feeds) = operator_of(Client::try_from(kube::Config::new(url)).unwrap());
    show(&server, &mut feeds.fine_tune_jobs, &path);
    let job = Arc::new(job);
    let began = Instant::now();
    let error = reconciler::reconcile_within(limit, job.clone(), context.clone()).await.unwrap_err();
    assert!(matches!(error, ReconcileError::TimedOut(_)), "{error}");
    assert_eq!(error.to_string(), "the reconcile did not end within 0.2 s");
    assert!(began.elapsed() < Duration::from_secs(30), "the request itself has no time limit");
    assert_eq!(reconciler::failed(job.clone(), &error, context.clone()), Action::requeue(Duration::from_secs(1)));
    assert_eq!(reconciler::failed(job.clone(), &error, context), Action::requeue(Duration::from_secs(2)));

    // As well while a cache is not filled.
    let (stores, _feeds) = Stores::new();
    let (context, mut feeds) = operator(&server).await;
    let empty = Context::new(
        server.client().await,
        context.settings.clone(),
        stores,
        context.reports.clone(),
        context.http.clone(),
        Leadership::without_election(),
    );
    let error = reconciler::reconcile_within(limit, job.clone(), Arc::new(empty)).await.unwrap_err();
    assert!(matches!(error, ReconcileError::TimedOut(_)), "{error}");
    assert_eq!(server.requests(), [""; 0]);
    show(&server, &mut feeds.fine_tune_jobs, &path);
    reconciler::reconcile_within(Duration::from_secs(30), job, context).await.unwrap();
}

#[tokio::test]
async fn a_child_of_another_owner_stays_although_the_cache_does_not_have_it() {
    let server = Server::default();
    let (context, mut feeds) = operator(&server).await;
    let path = format!("{JOBS}/a");
    let job: FineTuneJob = server.put(&path, object("FineTuneJob", "a", train()));
    show(&server, &mut feeds.fine_tune_jobs, &path);
    let config = format!("{CORE}/configmaps/a-train");
    let theirs = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a-train", "namespace": "ns"}});
    let theirs: Value = server.put(&config, theirs);
    let error = reconcile(&job, &context).await.unwrap_err().to_string();
    assert_eq!(error, "ConfigMap a-train already exists and belongs to another owner; rename one of the two");
    let requests = [format!("POST {CORE}/configmaps"), format!("GET {config}"), format!("PATCH {path}/status")];
    assert_eq!(server.requests(), requests);
    assert_eq!(server.get::<Value>(&config), theirs);
}

#[tokio::test]
async fn a_status_is_not_written_over_a_change_that_was_not_seen() {
    let server = Server::default();
    let (context, mut feeds) = operator(&server).await;
    let path = format!("{JOBS}/a");
    let mut suspended = train();
    suspended["suspend"] = true.into();
    let job: FineTuneJob = server.put(&path, object("FineTuneJob", "a", suspended));
    show(&server, &mut feeds.fine_tune_jobs, &path);
    // Somebody deletes the object and creates it again.
    server.0.lock().unwrap().by_path.remove(&path);
    let _again: FineTuneJob = server.put(&path, object("FineTuneJob", "a", train()));
    let action = reconcile(&job, &context).await.unwrap();
    assert!(format!("{action:?}").contains("200ms"), "a conflict is no failure: {action:?}");
    assert_eq!(server.requests(), [format!("PATCH {path}/status")]);
    assert!(server.get::<FineTuneJob>(&path).status.is_none());
}

#[tokio::test]
async fn children_are_written_only_when_something_changed() {
    let server = Server::default();
    let (context, mut feeds) = operator(&server).await;
    let path = format!("{DEPLOYMENTS}/m");
    let deployment: ModelDeployment =
        server.put(&path, object("ModelDeployment", "m", json!({"model": {"from": "s3://models/a"}})));
    show(&server, &mut feeds.model_deployments, &path);
    reconcile(&deployment, &context).await.unwrap();
    let first = server.requests();
    assert!(
        first.len() > 10 && !first.iter().any(|request| request.starts_with("GET") && request.ends_with('s')),
        "{first:?}"
    );

    let apps = "/apis/apps/v1/namespaces/ns/deployments";
    let all = |server: &Server, feeds: &mut Feeds| {
        let paths: Vec<String> = server.0.lock().unwrap().by_path.keys().cloned().collect();
        for path in paths {
            if path.starts_with(DEPLOYMENTS) {
                show(server, &mut feeds.model_deployments, &path);
            } else if path.starts_with(apps) {
                show(server, &mut feeds.workloads, &path);
            } else if path.contains("/configmaps/") {
                show(server, &mut feeds.config_maps, &path);
            } else if path.contains("/services/") {
                show(server, &mut feeds.services, &path);
            }
        }
    };
    all(&server, &mut feeds);
    reconcile(&deployment, &context).await.unwrap();
    assert_eq!(server.requests(), [""; 0], "nothing changed");

    // Somebody deletes a ConfigMap: it is applied again, and nothing else.
    let config = format!("{CORE}/configmaps/m-router");
    let gone = server.get(&config);
    server.0.lock().unwrap().by_path.remove(&config);
    feeds.config_maps.take(&Event::Delete(gone), Instant::now());
    reconcile(&deployment, &context).await.unwrap();
    assert_eq!(server.requests(), [format!("GET {config}"), format!("PATCH {config}")]);
    all(&server, &mut feeds);

    // Somebody has an object with the name of a child: it stays as it is, and the condition says so.
    server.0.lock().unwrap().by_path.remove(&config);
    let theirs = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m-router", "namespace": "ns"}});
    let theirs = server.put(&config, theirs);
    feeds.config_maps.take(&Event::Apply(theirs), Instant::now());
    let error = reconcile(&deployment, &context).await.unwrap_err().to_string();
    assert_eq!(error, "ConfigMap m-router already exists and belongs to another owner; rename one of the two");
    assert_eq!(server.requests(), [format!("GET {config}"), format!("PATCH {path}/status")]);
    let status = server.get::<ModelDeployment>(&path).status.unwrap();
    let ready = status.conditions.iter().find(|condition| condition.type_ == "Ready").unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "Refused"));
}

#[tokio::test]
async fn a_retraining_that_the_cache_does_not_show_yet_is_not_taken_for_deleted() {
    let server = Server::default();
    let (context, mut feeds) = operator(&server).await;
    let path = format!("{DEPLOYMENTS}/m");
    let spec = json!({
        "model": {"from": "s3://models/a"},
        "feedback": {"kafka": {"bootstrapServers": "kafka:9092"}},
        "monitor": {},
        "retrain": {"template": {"spec": train()}},
    });
    let mut drifted = object("ModelDeployment", "m", spec);
    let deployment: ModelDeployment = server.put(&path, drifted.clone());
    show(&server, &mut feeds.model_deployments, &path);
    reconcile(&deployment, &context).await.unwrap();
    let status = server.get::<ModelDeployment>(&path).status.unwrap();
    drifted["status"] = serde_json::to_value(&status).unwrap();
    drifted["status"]["monitor"] = json!({"revision": status.current_revision.unwrap().name, "verdict": "Drifted",
        "topic": "athanor.ns.m", "labelled": 1000, "ranges": [{"partition": 0, "begin": 5, "end": 90}]});
    let _drifted: ModelDeployment = server.put(&path, drifted);
    // Another process starts with what there is now, so that only this one's writes are waited for.
    let (context, mut feeds) = operator(&server).await;
    show(&server, &mut feeds.model_deployments, &path);
    server.requests();
    reconcile(&deployment, &context).await.unwrap();
    assert_eq!(server.requests().iter().filter(|request| **request == format!("POST {JOBS}")).count(), 1);
    let running = server.get::<ModelDeployment>(&path).status.unwrap().retraining.unwrap();

    // The deployment's status is shown, and the FineTuneJob is not.
    list_nothing(&mut feeds.workloads);
    list_nothing(&mut feeds.config_maps);
    list_nothing(&mut feeds.services);
    show(&server, &mut feeds.model_deployments, &path);
    reconcile(&deployment, &context).await.unwrap();
    assert_eq!(server.requests(), [""; 0], "the reconcile waits");
    show(&server, &mut feeds.fine_tune_jobs, &format!("{JOBS}/{}", running.job));
    reconcile(&deployment, &context).await.unwrap();
    let status = server.get::<ModelDeployment>(&path).status.unwrap();
    assert_eq!((status.retraining, status.last_retraining), (Some(running), None));
}
