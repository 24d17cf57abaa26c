//! The watches, and the two controllers that they wake.
//!
//! There is one watch for each resource. It fills the cache that reconciles read, and after that wakes what depends on
//! the object: its owner, the deployments that serve a job's model, the search that a trial belongs to.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use athanor_crds::{FineTuneJob, ModelDeployment, label};
use futures::{Stream, StreamExt, stream};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{Deployment, ReplicaSet},
        batch::v1::Job,
        core::v1::{ConfigMap, Pod, Service},
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    core::PartialObjectMeta,
    runtime::{
        Controller, WatchStreamExt,
        controller::{Config, Error},
        reflector::ObjectRef,
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::{
    context::Context,
    finetunejob, prune,
    reconciler::{self, Kind, ReconcileError, record_key},
    stores::{Cache, Cached, Feed, Feeds, version},
    wakes::Wakes,
};

/// Reconciles of each kind that may run at the same time.
const CONCURRENCY: u16 = 16;
/// Time between two heartbeats of a controller.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Labels of children.
const OURS: &str = "app.kubernetes.io/managed-by=athanor";

/// Objects to reconcile.
#[derive(Clone, Default)]
struct Queues {
    jobs: Wakes<FineTuneJob>,
    deployments: Wakes<ModelDeployment>,
}

/// Watches and reconciles until shutdown; reconciles that run then end first. `reported` names the jobs whose trainers
/// reported progress.
pub async fn run(
    client: &Client,
    context: Arc<Context>,
    feeds: Feeds,
    reported: impl Stream<Item = ObjectRef<FineTuneJob>> + Send + 'static,
    shutdown: CancellationToken,
) {
    let queues = Queues::default();
    let jobs = control(stream::select(queues.jobs.clone().stream(), reported), context.clone(), shutdown.clone());
    let deployments = control(queues.deployments.clone().stream(), context.clone(), shutdown);
    let reconciles = async {
        futures::join!(jobs, deployments);
    };
    // The watches have no end: reconciles that end at shutdown still need their caches.
    tokio::select! {
        () = watch_all(client, &context, feeds, &queues) => {}
        () = reconciles => {}
    }
}

/// Runs the controller of one kind on the objects of a stream, and beats with each object that it is done with.
///
/// A heartbeat is an object that does not exist: it passes the queue and takes a place among the running reconciles, and
/// the controller finds that it is not in the cache. It passes once the first list of the cache is complete.
async fn control<K: Kind>(
    objects: impl Stream<Item = ObjectRef<K>> + Send + 'static,
    context: Arc<Context>,
    shutdown: CancellationToken,
) {
    context.liveness.beat(K::NAME, Instant::now());
    let cache = K::cache(&context.stores).store();
    let mut ticks = tokio::time::interval(HEARTBEAT);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let heartbeats = stream::poll_fn(move |task| ticks.poll_tick(task).map(|_| Some(ObjectRef::new("heartbeat"))));
    Controller::for_stream(stream::pending(), cache)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .reconcile_on(stream::select(objects, heartbeats))
        .graceful_shutdown_on(shutdown.cancelled_owned())
        .run(reconciler::reconcile::<K>, reconciler::failed::<K>, context.clone())
        .for_each(async |result: Result<_, Error<ReconcileError, watcher::Error>>| {
            context.liveness.beat(K::NAME, Instant::now());
            // Errors of reconciles are logged by the error policy; the streams of watches are not the controller's.
            // A heartbeat has no namespace.
            if let Err(Error::ObjectNotFound(gone)) = result
                && gone.namespace.is_some()
            {
                context.forget(&record_key(K::NAME, gone.namespace.as_deref(), &gone.name));
            }
        })
        .await;
}

async fn watch_all(client: &Client, context: &Context, feeds: Feeds, queues: &Queues) {
    let namespace = context.settings.namespace_watch.as_deref();
    let Feeds { fine_tune_jobs, model_deployments, batch_jobs, pods, workloads, replica_sets, services, config_maps } =
        feeds;
    let ours = || watcher::Config::default().labels(OURS);
    let deployments = &context.stores.model_deployments;
    let fine_tune_jobs =
        watch(api(client, namespace), watcher::Config::default(), fine_tune_jobs, prune::metadata, |job| {
            let key = record_key(FineTuneJob::NAME, job.metadata.namespace.as_deref(), &job.name_any());
            if !context.memory.is_settled(&key, version(&job.metadata)) {
                queues.jobs.wake([ObjectRef::from_obj(job)]);
            }
            // A search waits for the ends of its trials, and a deployment for that of a job; neither for their progress.
            let is_over = job.status.as_ref().is_some_and(finetunejob::is_over);
            if is_over
                || context.stores.fine_tune_jobs.get(&job.namespace().unwrap_or_default(), &job.name_any()).is_none()
            {
                queues.jobs.wake(named_by(job, label::SEARCH));
                queues.deployments.wake(interested(deployments, job));
            }
        });
    let model_deployments =
        watch(api(client, namespace), watcher::Config::default(), model_deployments, prune::metadata, |deployment| {
            queues.deployments.wake([ObjectRef::from_obj(deployment)]);
        });
    let batch_jobs = watch::<Job>(api(client, namespace), ours(), batch_jobs, prune::batch_job, |batch_job| {
        queues.jobs.wake(owners(batch_job));
    });
    // A pod is not owned by the FineTuneJob but by its Kubernetes Job, and its end must not wait for that Job's status.
    let pods = watch::<Pod>(api(client, namespace), ours(), pods, prune::pod, |pod| {
        queues.jobs.wake(named_by(pod, label::FINE_TUNE_JOB));
        queues.deployments.wake(named_by(pod, label::DEPLOYMENT));
    });
    let workloads = watch::<Deployment>(api(client, namespace), ours(), workloads, prune::workload, |workload| {
        queues.deployments.wake(owners(workload));
    });
    // A pod is trusted once its ReplicaSet is known. The events of both wake nobody: those of the Deployment do.
    let replica_sets = watch::<PartialObjectMeta<ReplicaSet>>(
        api(client, namespace),
        ours(),
        replica_sets,
        prune::replica_set,
        |_| {},
    );
    let services =
        watch::<PartialObjectMeta<Service>>(api(client, namespace), ours(), services, prune::metadata, |service| {
            queues.deployments.wake(owners(service));
        });
    let config_maps = watch::<PartialObjectMeta<ConfigMap>>(
        api(client, namespace),
        ours(),
        config_maps,
        prune::metadata,
        |config_map| {
            queues.deployments.wake(owners(config_map));
        },
    );
    futures::join!(fine_tune_jobs, model_deployments, batch_jobs, pods, workloads, replica_sets, services, config_maps);
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace))
}

/// Keeps a cache current. Calls `changed` with each object that changed or went away, after the cache has the change.
async fn watch<K: Cached + DeserializeOwned>(
    api: Api<K>,
    config: watcher::Config,
    mut feed: Feed<K>,
    prune: fn(&mut K),
    changed: impl Fn(&K),
) {
    let mut events = pin!(watcher(api, config).default_backoff().modify(prune));
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => feed.take(&event, Instant::now()).iter().for_each(|object| changed(object)),
            Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "watch failed; it starts again"),
        }
    }
}

/// Returns the object that a label names.
fn named_by<K: Resource<DynamicType = ()>>(object: &impl Resource, label: &str) -> Option<ObjectRef<K>> {
    Some(ObjectRef::new(object.labels().get(label)?).within(&object.namespace()?))
}

/// Returns the owners of kind `K`.
fn owners<K: Resource<DynamicType = ()>>(child: &impl Resource) -> Vec<ObjectRef<K>> {
    let namespace = child.namespace();
    let owners = child.owner_references().iter();
    owners.filter_map(|owner| ObjectRef::from_owner_ref(namespace.as_deref(), owner, ())).collect()
}

/// Returns the deployments that serve the model or the adapter of a job, or that created the job.
fn interested(deployments: &Cache<ModelDeployment>, job: &FineTuneJob) -> Vec<ObjectRef<ModelDeployment>> {
    let (name, namespace) = (job.name_any(), job.namespace());
    let serving = deployments.state().into_iter().filter(|deployment| {
        let adapters = deployment.spec.adapters.iter().map(|adapter| &adapter.from_job);
        let references = std::iter::once(&deployment.spec.model.from_job).chain(adapters);
        deployment.namespace() == namespace && references.flatten().any(|reference| reference.name == name)
    });
    let serving = serving.map(|deployment| ObjectRef::from_obj(&*deployment));
    serving.chain(named_by(job, label::DEPLOYMENT)).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{lease::Leadership, liveness, progress::Reports, settings::Settings, stores::Stores};

    #[tokio::test]
    async fn a_controller_without_objects_beats_once_its_cache_is_filled() {
        let (stores, mut feeds) = Stores::new();
        let settings = Settings::parse_from(["athanor-operator"]);
        let client = Client::try_from(kube::Config::new("http://127.0.0.1:9".parse().unwrap())).unwrap();
        let reports = Arc::new(Reports::new(tokio::sync::mpsc::channel(1).0));
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let leadership = Leadership::without_election();
        let context = Arc::new(Context::new(client, settings, stores, reports, http, leadership));
        let stop = CancellationToken::new();
        let running = control::<FineTuneJob>(stream::pending(), context.clone(), stop.clone());
        let running = tokio::spawn(running);
        let wait = || tokio::time::sleep(Duration::from_millis(50));
        wait().await;
        // The controller has begun, and its time passes.
        let long_ago = Instant::now().checked_sub(liveness::LIMIT * 2).unwrap();
        context.liveness.beat(FineTuneJob::NAME, long_ago);
        wait().await;
        let stalled = context.liveness.stalled(Instant::now());
        assert_eq!(stalled.map(|one| one.name), Some(FineTuneJob::NAME), "the first list is not complete");
        feeds.fine_tune_jobs.take(&watcher::Event::Init, Instant::now());
        feeds.fine_tune_jobs.take(&watcher::Event::InitDone, Instant::now());
        let beats = async {
            while context.liveness.stalled(Instant::now()).is_some() {
                wait().await;
            }
        };
        tokio::time::timeout(HEARTBEAT, beats).await.expect("the first heartbeat passes");
        stop.cancel();
        tokio::time::timeout(HEARTBEAT, running).await.expect("ends at shutdown").unwrap();
    }
}
