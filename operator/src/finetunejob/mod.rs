//! The FineTuneJob controller: one Indexed Job for each attempt, restarted as a whole until it is done or its restarts
//! are used up.
//!
//! An attempt is never used twice. Its end (a failure, a preemption, a suspension) raises `status.attempt`; then the
//! Kubernetes Job of the earlier attempt is deleted, and once its pods have ended the Job of the next one is created.
//! Every step is visible in the cluster, so the operator may be killed between any two of them.
//!
//! A job with `hyperparameters.search` first has child FineTuneJobs, one for each trial, and then attempts of its own
//! with the values of the best trial.
//!
//! Here `job` is a FineTuneJob and `batch_job` is a Kubernetes Job.

mod apply;
mod attempt;
mod build;
mod claims;
mod decide;
mod dereference;
mod policy;
mod status;
#[cfg(test)]
pub mod tests;
mod validate;

pub use attempt::is_over;
pub use validate::is_service_name;

use std::time::Duration;

use athanor_crds::{FineTuneJob, FineTuneJobStatus};
use jiff::Timestamp;

use crate::{
    cluster::{Cluster, ClusterError},
    context::Context,
    reconciler::{Kind, ReconcileError},
    settings::Settings,
    stores::{Cache, Stores},
};

impl Kind for FineTuneJob {
    type Observed = dereference::Observed;
    type Validated = validate::ValidatedJob;
    type Invalid = validate::InvalidJob;
    type Decision = decide::Decision;
    type Children = build::Children;
    type Applied = apply::Applied;
    type Status = FineTuneJobStatus;

    const NAME: &'static str = athanor_contract::process::api::FINE_TUNE_JOB;

    fn cache(stores: &Stores) -> &Cache<Self> {
        &stores.fine_tune_jobs
    }

    async fn dereference(&self, context: &Context) -> Result<Option<Self::Observed>, ReconcileError> {
        dereference::dereference(&context.stores, &context.reports, self)
    }

    fn validate(observed: &Self::Observed) -> Result<Self::Validated, Self::Invalid> {
        validate::validate(&observed.job)
    }

    fn decide(job: &Self::Validated, observed: &Self::Observed, now: Timestamp) -> Self::Decision {
        decide::decide(job, observed, now)
    }

    fn build(
        job: &Self::Validated,
        settings: &Settings,
        decision: &Self::Decision,
        _entropy: [u8; 32],
    ) -> Self::Children {
        build::build(job, settings, decision)
    }

    async fn apply(
        cluster: &Cluster<'_>,
        job: &Self::Validated,
        decision: &Self::Decision,
        children: Self::Children,
    ) -> Result<Self::Applied, ClusterError> {
        apply::apply(cluster, job, decision, children).await
    }

    fn status(
        observed: &Self::Observed,
        decision: &Self::Decision,
        applied: Result<&Self::Applied, &ClusterError>,
        now: Timestamp,
    ) -> Self::Status {
        status::next(observed, decision, applied, now)
    }

    async fn refuse(
        cluster: &Cluster<'_>,
        observed: &Self::Observed,
        invalid: &Self::Invalid,
        now: Timestamp,
    ) -> Result<Self::Status, ClusterError> {
        apply::stop(cluster, observed).await?;
        Ok(status::invalid(&observed.job, invalid, now))
    }

    async fn write(
        cluster: &Cluster<'_>,
        observed: &Self::Observed,
        status: Self::Status,
    ) -> Result<Option<Duration>, ClusterError> {
        status::write(cluster, &observed.job, status).await
    }

    fn is_settled(decision: &Self::Decision) -> bool {
        decision.is_settled()
    }

    fn requeue(decision: &Self::Decision) -> Option<Duration> {
        decision.requeue
    }
}
