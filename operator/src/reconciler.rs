//! The steps of a reconcile, the same for every kind: read, validate, decide, build, apply, write the status.

use std::{
    fmt::Debug,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use kube::{Resource, ResourceExt, runtime::controller::Action};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    cluster::{Cluster, ClusterError},
    context::Context,
    memory::{Lag, RESYNC},
    settings::Settings,
    stores::{Cache, Stores},
};

/// Longest time of one reconcile. A request that hangs must not hold its object for ever: the reconcile fails and is
/// repeated.
const LIMIT: Duration = Duration::from_secs(60);
/// Wait after a conflict: the change that caused it is about to arrive in the cache.
const CONFLICT: Duration = Duration::from_millis(200);

/// A kind of object and what its reconcile consists of. Only `dereference`, `apply`, `refuse` and `write` may wait for
/// anything; the other steps are functions of their arguments.
pub trait Kind:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// Everything that was read.
    type Observed: Send + Sync;
    /// The object without mistakes.
    type Validated: Send + Sync;
    /// A mistake in the object.
    type Invalid: std::error::Error + Send + Sync;
    /// What should be.
    type Decision: Send + Sync;
    /// Objects that the decision requires.
    type Children: Send;
    /// Proof that a decision is in the cluster.
    type Applied: Send + Sync;
    type Status: Send;

    /// Name of the kind.
    const NAME: &'static str;

    /// Returns the cache of the kind.
    fn cache(stores: &Stores) -> &Cache<Self>;

    /// Reads what a decision needs, without a request to the API server; `None` if the object is being deleted.
    fn dereference(
        &self,
        context: &Context,
    ) -> impl Future<Output = Result<Option<Self::Observed>, ReconcileError>> + Send;

    fn validate(observed: &Self::Observed) -> Result<Self::Validated, Self::Invalid>;

    fn decide(validated: &Self::Validated, observed: &Self::Observed, now: Timestamp) -> Self::Decision;

    /// Builds the children. `entropy` is random.
    fn build(
        validated: &Self::Validated,
        settings: &Settings,
        decision: &Self::Decision,
        entropy: [u8; 32],
    ) -> Self::Children;

    fn apply(
        cluster: &Cluster<'_>,
        validated: &Self::Validated,
        decision: &Self::Decision,
        children: Self::Children,
    ) -> impl Future<Output = Result<Self::Applied, ClusterError>> + Send;

    /// Returns the status after a decision that was applied, or after one that could not be.
    fn status(
        observed: &Self::Observed,
        decision: &Self::Decision,
        applied: Result<&Self::Applied, &ClusterError>,
        now: Timestamp,
    ) -> Self::Status;

    /// Stops what an invalid object must not keep running. Returns the object's status.
    fn refuse(
        cluster: &Cluster<'_>,
        observed: &Self::Observed,
        invalid: &Self::Invalid,
        now: Timestamp,
    ) -> impl Future<Output = Result<Self::Status, ClusterError>> + Send;

    /// Writes the status if it changed. Returns the time for which a change is held back.
    fn write(
        cluster: &Cluster<'_>,
        observed: &Self::Observed,
        status: Self::Status,
    ) -> impl Future<Output = Result<Option<Duration>, ClusterError>> + Send;

    /// Returns whether nothing is left to do once the status after a decision is written, so that the event of that
    /// write needs no reconcile.
    fn is_settled(decision: &Self::Decision) -> bool;

    /// Returns when to reconcile again even if nothing changes.
    fn requeue(decision: &Self::Decision) -> Option<Duration>;
}

/// A reconcile that failed; it is repeated after a growing pause.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Write(#[from] ClusterError),
    #[error("the object has no {0}")]
    Incomplete(&'static str),
    #[error("the watch of {kind} objects has not shown this operator's own write for {} s", .waited.as_secs())]
    Behind { kind: String, waited: Duration },
    #[error("the reconcile did not end within {} s", .0.as_secs_f64())]
    TimedOut(Duration),
}

/// Returns the name of an object in the operator's own records.
pub fn key<K: Kind>(object: &K) -> String {
    record_key(K::NAME, object.meta().namespace.as_deref(), &object.name_any())
}

/// Returns the name of an object in the operator's own records.
pub fn record_key(kind: &str, namespace: Option<&str>, name: &str) -> String {
    format!("{kind}/{}/{name}", namespace.unwrap_or_default())
}

/// Brings one object closer to its specification, within a minute. Counts the reconcile and its time.
///
/// # Errors
/// See [`ReconcileError`].
pub async fn reconcile<K: Kind>(object: Arc<K>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    reconcile_within(LIMIT, object, context).await
}

/// Is [`reconcile`] with a time limit of its own.
///
/// # Errors
/// See [`ReconcileError`].
#[tracing::instrument(skip_all, fields(kind = K::NAME, namespace = object.namespace(), name = object.name_any()))]
pub async fn reconcile_within<K: Kind>(
    limit: Duration,
    object: Arc<K>,
    context: Arc<Context>,
) -> Result<Action, ReconcileError> {
    let started = Instant::now();
    let key = key(&*object);
    let result = match tokio::time::timeout(limit, steps(&*object, &key, &context)).await {
        // Not a failure: the object changed while it was reconciled, and is reconciled again with the change.
        Ok(Err(ReconcileError::Write(ClusterError::Conflict { .. }))) => Ok(Action::requeue(CONFLICT)),
        Ok(result) => result,
        Err(_) => Err(ReconcileError::TimedOut(limit)),
    };
    let label = if result.is_ok() { "ok" } else { "error" };
    metrics::counter!("athanor_operator_reconciles_total", "kind" => K::NAME, "result" => label).increment(1);
    metrics::histogram!("athanor_operator_reconcile_seconds", "kind" => K::NAME)
        .record(started.elapsed().as_secs_f64());
    if result.is_ok() {
        context.succeeded(&key);
    }
    result
}

/// The error policy of a controller: logs the error and repeats the reconcile after a growing pause.
pub fn failed<K: Kind>(object: Arc<K>, error: &ReconcileError, context: Arc<Context>) -> Action {
    let (namespace, name) = (object.namespace(), object.name_any());
    tracing::warn!(kind = K::NAME, namespace, name, %error, "reconcile failed");
    context.backoff(key(&*object))
}

async fn steps<K: Kind>(object: &K, key: &str, context: &Context) -> Result<Action, ReconcileError> {
    context.stores.wait_until_ready().await;
    match context.memory.lag(key, &context.stores, Instant::now()) {
        None => {}
        Some(Lag::Short(wait)) => return Ok(Action::requeue(wait)),
        Some(Lag::Long { kind, waited }) => return Err(ReconcileError::Behind { kind, waited }),
    }
    // The object that the controller passed may be older than the cache, which has this operator's own writes by now.
    let newest = K::cache(&context.stores).get(&object.namespace().unwrap_or_default(), &object.name_any());
    let Some(object) = newest else { return Ok(Action::await_change()) };
    let Some(observed) = object.dereference(context).await? else { return Ok(Action::await_change()) };
    let cluster = context.cluster(key);
    let now = Timestamp::now();
    let validated = match K::validate(&observed) {
        Ok(validated) => validated,
        Err(invalid) => {
            let status = K::refuse(&cluster, &observed, &invalid, now).await?;
            K::write(&cluster, &observed, status).await?;
            return Ok(Action::await_change());
        }
    };
    let decision = K::decide(&validated, &observed, now);
    let children = K::build(&validated, &context.settings, &decision, rand::random());
    let applied = K::apply(&cluster, &validated, &decision, children).await;
    let status = K::status(&observed, &decision, applied.as_ref(), now);
    let held = K::write(&cluster, &observed, status).await?;
    applied?;
    if K::is_settled(&decision) {
        context.memory.settle(key);
    }
    Ok(Action::requeue([K::requeue(&decision), held].into_iter().flatten().fold(RESYNC, Duration::min)))
}
