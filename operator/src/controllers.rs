//! The two watch loops. What an object depends on wakes it up: its children, the jobs it names, a trainer's report.

use std::{collections::BTreeMap, fmt::Debug, sync::Arc};

use athanor_crds::{FineTuneJob, ModelDeployment, label};
use futures::{Stream, StreamExt};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        batch::v1::Job,
        core::v1::{ConfigMap, Pod, Service},
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        Controller,
        controller::Config,
        reflector::{ObjectRef, Store},
        watcher,
    },
};
use tokio_util::sync::CancellationToken;

use crate::{context::Context, finetunejob, modeldeployment};

/// Reconciles at the same time, of each kind.
const CONCURRENCY: u16 = 16;

/// The caches of both kinds.
#[derive(Clone)]
pub struct Stores {
    pub jobs: Store<FineTuneJob>,
    pub deployments: Store<ModelDeployment>,
}

/// Both controllers, ready to run.
pub struct Controllers {
    jobs: Controller<FineTuneJob>,
    deployments: Controller<ModelDeployment>,
    pub stores: Stores,
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    namespace.map_or_else(|| Api::all(client.clone()), |namespace| Api::namespaced(client.clone(), namespace))
}

/// Sets the watches up. `reported` names the jobs whose trainers said something.
pub fn controllers(
    context: &Context,
    reported: impl Stream<Item = ObjectRef<FineTuneJob>> + Send + 'static,
) -> Controllers {
    let client = &context.client;
    let namespace = context.settings.namespace_watch.as_deref();
    let all = watcher::Config::default;
    let ours = || watcher::Config::default().labels("app.kubernetes.io/managed-by=athanor");

    let jobs = Controller::new(api::<FineTuneJob>(client, namespace), all())
        .with_config(Config::default().concurrency(CONCURRENCY))
        .owns(api::<Job>(client, namespace), ours())
        // Not owned by the FineTuneJob but by its Job; a pod's end must not wait for the Job's status.
        .watches(api::<Pod>(client, namespace), all().labels(label::FINE_TUNE_JOB), |pod: Pod| {
            named_by::<FineTuneJob>(pod.labels(), label::FINE_TUNE_JOB, pod.namespace())
        })
        // A trial that has ended makes room for the next.
        .watches(api::<FineTuneJob>(client, namespace), all().labels(label::SEARCH), |trial: FineTuneJob| {
            let is_over = trial.status.as_ref().is_some_and(finetunejob::is_over);
            named_by::<FineTuneJob>(trial.labels(), label::SEARCH, trial.namespace()).filter(|_| is_over)
        })
        .reconcile_on(reported);

    let deployments = Controller::new(api::<ModelDeployment>(client, namespace), all())
        .with_config(Config::default().concurrency(CONCURRENCY))
        .owns(api::<Deployment>(client, namespace), ours())
        .owns(api::<Service>(client, namespace), ours())
        .owns(api::<ConfigMap>(client, namespace), ours());
    let store = deployments.store();
    let readers = store.clone();
    let deployments = deployments.watches(api::<FineTuneJob>(client, namespace), all(), move |job: FineTuneJob| {
        // Progress is of no interest here, only an end.
        if job.status.as_ref().is_some_and(finetunejob::is_over) { interested(&readers, &job) } else { Vec::new() }
    });
    let stores = Stores { jobs: jobs.store(), deployments: store };
    Controllers { jobs, deployments, stores }
}

fn named_by<K: Resource<DynamicType = ()>>(
    labels: &BTreeMap<String, String>,
    key: &str,
    namespace: Option<String>,
) -> Option<ObjectRef<K>> {
    Some(ObjectRef::new(labels.get(key)?).within(&namespace?))
}

/// Deployments that serve a job's output or created it.
fn interested(deployments: &Store<ModelDeployment>, job: &FineTuneJob) -> Vec<ObjectRef<ModelDeployment>> {
    let (name, namespace) = (job.name_any(), job.namespace());
    let named = deployments.state().into_iter().filter(|deployment| {
        let reference = deployment.spec.model.from_job.as_ref();
        deployment.namespace() == namespace && reference.is_some_and(|reference| reference.name == name)
    });
    let named = named.map(|deployment| ObjectRef::from_obj(&*deployment));
    named.chain(named_by(job.labels(), label::DEPLOYMENT, job.namespace())).collect()
}

impl Controllers {
    /// Runs until shutdown; reconciles under way end first.
    pub async fn run(self, context: Arc<Context>, shutdown: CancellationToken) {
        let jobs = self
            .jobs
            .graceful_shutdown_on(shutdown.clone().cancelled_owned())
            .run(
                finetunejob::reconcile,
                |job, error, context| {
                    tracing::warn!(namespace = job.namespace(), job = job.name_any(), %error, "FineTuneJob");
                    context.backoff(finetunejob::key(&job))
                },
                context.clone(),
            )
            .for_each(async |result| note(result));
        let deployments = self
            .deployments
            .graceful_shutdown_on(shutdown.cancelled_owned())
            .run(
                modeldeployment::reconcile,
                |deployment, error, context| {
                    tracing::warn!(namespace = deployment.namespace(), deployment = deployment.name_any(), %error, "ModelDeployment");
                    context.backoff(modeldeployment::key(&deployment))
                },
                context,
            )
            .for_each(async |result| note(result));
        futures::join!(jobs, deployments);
    }
}

/// Errors of reconciles were logged where they are counted; what is left are errors of watches.
fn note<T, E: Debug + std::error::Error>(result: Result<T, kube::runtime::controller::Error<E, watcher::Error>>) {
    match result {
        Ok(_) | Err(kube::runtime::controller::Error::ReconcilerFailed(..)) => {}
        // Gone between the event and the reconcile.
        Err(kube::runtime::controller::Error::ObjectNotFound(_)) => {}
        Err(error) => tracing::warn!(%error, "watch"),
    }
}
