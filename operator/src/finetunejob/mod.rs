//! The FineTuneJob controller: one Indexed Job an attempt, restarted as a whole until it is done or its restarts are used up.
//!
//! An attempt is never reused: what ends it (a failure, a preemption, a suspension) raises `status.attempt`, the Job of the old
//! attempt is deleted, and once its pods are gone the Job of the new one is created. Every step is found again in the cluster, so
//! the operator may be killed between any two of them.
//!
//! A job with `hyperparameters.search` has child FineTuneJobs first, one for each trial, and its own attempts with the best of them.

mod apply;
mod build;
mod claims;
mod decide;
mod dereference;
mod search;
#[cfg(test)]
mod search_tests;
mod status;
#[cfg(test)]
pub mod tests;
mod validate;

pub use decide::{is_over, since};
pub use validate::is_service_name;

use std::{sync::Arc, time::Instant};

use athanor_crds::FineTuneJob;
use jiff::Timestamp;
use kube::{ResourceExt, runtime::controller::Action};

use crate::context::{Context, ReconcileError};

pub const KIND: &str = athanor_contract::process::api::FINE_TUNE_JOB;

/// Name of an object in the operator's own records.
pub fn key(job: &FineTuneJob) -> String {
    format!("{KIND}/{}/{}", job.namespace().unwrap_or_default(), job.name_any())
}

/// Brings one job closer to its end.
#[tracing::instrument(skip_all, fields(namespace = job.namespace(), job = job.name_any()))]
pub async fn reconcile(job: Arc<FineTuneJob>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    let started = Instant::now();
    let result = steps(&job, &context).await;
    context.finished(KIND, &key(&job), started, &result);
    result
}

async fn steps(job: &FineTuneJob, context: &Context) -> Result<Action, ReconcileError> {
    let Some(observed) = dereference::dereference(&context.client, &context.reports, job).await? else {
        return Ok(Action::await_change());
    };
    let now = Timestamp::now();
    let validated = match validate::validate(&observed.job) {
        Ok(validated) => validated,
        Err(error) => {
            status::write(&context.client, &observed.job, status::invalid(&observed.job, &error, now)).await?;
            return Ok(Action::await_change());
        }
    };
    let decision = decide::decide(&observed, now);
    let children = build::build(&validated, &context.settings, &decision);
    let applied = apply::apply(&context.client, &validated, &decision, children).await;
    let next = status::next(&observed, &decision, applied.as_ref(), now);
    if status::is_over(&next) {
        context.reports.forget(&validated.uid);
    }
    status::write(&context.client, &observed.job, next).await?;
    applied?;
    Ok(decision.requeue.map_or_else(Action::await_change, Action::requeue))
}
