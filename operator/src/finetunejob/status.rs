//! The status of a FineTuneJob.

use std::time::Duration;

use athanor_contract::Decimal;
use athanor_crds::{FineTuneJob, FineTuneJobStatus, Progress, condition as types};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{
    apply::Applied,
    attempt,
    decide::{Decision, Phase},
    dereference::Observed,
    policy::{pace, restart},
    validate::InvalidJob,
};
use crate::{
    cluster::{Cluster, ClusterError, Hold},
    condition::{self, State, Value, set},
    progress::Report,
    time::since,
};

/// Writes a status if it differs from the one that was read. Returns the time for which a change that is not urgent is
/// held back.
///
/// # Errors
/// A request that failed, or a conflict: the object changed after it was read.
pub async fn write(
    cluster: &Cluster<'_>,
    job: &FineTuneJob,
    next: FineTuneJobStatus,
) -> Result<Option<Duration>, ClusterError> {
    let held = cluster.hold_status(pace::change(job.status.as_ref(), &next));
    if let Hold::Due = held {
        cluster.write_status(job, &next).await?;
    }
    Ok(if let Hold::For(wait) = held { Some(wait) } else { None })
}

/// Returns the status of a job with a mistake in its specification.
pub fn invalid(job: &FineTuneJob, error: &InvalidJob, now: Timestamp) -> FineTuneJobStatus {
    let mut status = job.status.clone().unwrap_or_default();
    let succeeded = Value::new(State::False, "InvalidSpec", error.to_string());
    set(&mut status.conditions, types::SUCCEEDED, &succeeded, job.metadata.generation, now);
    let running = Value::new(State::False, "InvalidSpec", "");
    set(&mut status.conditions, types::RUNNING, &running, job.metadata.generation, now);
    status.completion_time.get_or_insert(Time(now));
    status
}

/// Returns the status after a decision.
pub fn next(
    observed: &Observed,
    decision: &Decision,
    applied: Result<&Applied, &ClusterError>,
    now: Timestamp,
) -> FineTuneJobStatus {
    let job = &observed.job;
    let mut status = job.status.clone().unwrap_or_default();
    let Some(succeeded) = succeeded(&decision.phase) else { return status };
    let timeline = Timeline { created: job.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0) };
    if applied.is_ok_and(Applied::created) {
        status.start_time.get_or_insert(Time(now));
        timeline.mark(&mut status, "admitted", now);
    }
    if decision.phase == Phase::Running {
        timeline.mark(&mut status, "podsRunning", now);
    }
    if let Some(report) = &observed.report {
        timeline.mark_report(&mut status, observed, report);
        status.progress = Some(progress(report));
    }
    let generation = job.metadata.generation;
    set(&mut status.conditions, types::SUCCEEDED, &succeeded, generation, now);
    let running = Value::new((decision.phase == Phase::Running).into(), succeeded.reason, "");
    set(&mut status.conditions, types::RUNNING, &running, generation, now);
    if let Some(check) = applied.ok().and_then(Applied::image) {
        condition::warn_of_image(&mut status.conditions, check.warning.as_deref(), generation, now);
    }
    status.attempt = decision.attempt;
    if let Some(search) = &decision.search {
        status.search = Some(search.clone());
    }
    count(&mut status, &decision.phase, now);
    if succeeded.state != State::Unknown {
        status.completion_time.get_or_insert(Time(now));
        timeline.mark(&mut status, "finished", now);
    }
    summarise(&mut status, &decision.phase);
    if let Err(error) = applied
        && succeeded.state == State::Unknown
    {
        let succeeded = Value::new(State::Unknown, error.reason(), error.to_string());
        set(&mut status.conditions, types::SUCCEEDED, &succeeded, generation, now);
    }
    status
}

/// The condition Succeeded in a phase; `None` if the job was over before.
fn succeeded(phase: &Phase) -> Option<Value> {
    let value = match phase {
        Phase::Suspended => Value::new(State::Unknown, "Suspended", "spec.suspend is true"),
        Phase::Searching { message } => Value::new(State::Unknown, "Searching", message),
        Phase::Pending { message } => Value::new(State::Unknown, "Pending", message),
        Phase::Running => Value::new(State::Unknown, "Running", "all pods are running"),
        Phase::Restarting { cause, .. } => {
            Value::new(State::Unknown, "Restarting", format!("restarting from the last checkpoint: {cause}"))
        }
        Phase::Succeeded(summary) => {
            Value::new(State::True, "Succeeded", format!("the artifact is at {}", summary.artifact))
        }
        Phase::Failed { reason, message, .. } => Value::new(State::False, reason, message),
        Phase::Over => return None,
    };
    Some(value)
}

/// Counts a restart or a preemption.
fn count(status: &mut FineTuneJobStatus, phase: &Phase, now: Timestamp) {
    match phase {
        Phase::Restarting { counted: true, .. } => status.restarts += 1,
        Phase::Restarting { counted: false, .. } => restart::count_preemption(status, now),
        // The deadline counts from the next start.
        Phase::Suspended => status.start_time = None,
        _ => {}
    }
}

/// Adds the summary of a job that ended with one.
fn summarise(status: &mut FineTuneJobStatus, phase: &Phase) {
    let (Phase::Succeeded(summary) | Phase::Failed { summary: Some(summary), .. }) = phase else { return };
    status.progress = Some(Progress {
        stage: "Done".into(),
        step: summary.steps,
        total_steps: summary.steps,
        percent: 100,
        percent_text: "100%".into(),
        eta: None,
        ..status.progress.take().unwrap_or_default()
    });
    status.summary = Some(summary.clone());
}

/// Times of events in seconds from the creation of the object. An event keeps its first time.
struct Timeline {
    created: Timestamp,
}

impl Timeline {
    fn mark(&self, status: &mut FineTuneJobStatus, name: &str, at: Timestamp) {
        self.mark_seconds(status, name, since(self.created, at).as_secs_f64());
    }

    fn mark_seconds(&self, status: &mut FineTuneJobStatus, name: &str, seconds: f64) {
        if let Some(seconds) = Decimal::new((seconds * 1000.0).round() / 1000.0) {
            status.timeline.entry(name.into()).or_insert(seconds);
        }
    }

    /// Marks what the trainer reported, in seconds from the start of its process.
    fn mark_report(&self, status: &mut FineTuneJobStatus, observed: &Observed, report: &Report) {
        let mut first = observed.pods.iter().filter(|pod| attempt::index(pod) == Some(0));
        let Some(start) = first.find_map(|pod| attempt::process_start(pod)) else { return };
        self.mark(status, "processStart", start);
        let start = since(self.created, start).as_secs_f64();
        for (name, seconds) in report.timeline.iter().filter(|(_, seconds)| **seconds > 0.0) {
            // The schema has room for a few events; more must not make the whole status invalid.
            if !OWN_EVENTS.contains(&name.as_str()) && status.timeline.len() < MOST_EVENTS {
                self.mark_seconds(status, name, start + seconds);
            }
        }
    }
}

/// Events that the operator marks itself.
const OWN_EVENTS: [&str; 4] = ["admitted", "podsRunning", "processStart", "finished"];
/// Entries of the timeline beyond which a report adds none: the schema has 32, of which the operator's own may come later.
const MOST_EVENTS: usize = 32 - OWN_EVENTS.len();

fn progress(report: &Report) -> Progress {
    let done = u128::from(report.step.min(report.total_steps)) * 100;
    let percent = done.checked_div(report.total_steps.into()).unwrap_or(0) as u8;
    Progress {
        stage: report.stage.clone(),
        step: report.step,
        total_steps: report.total_steps,
        percent,
        percent_text: format!("{percent}%"),
        loss: (report.step > 0).then_some(report.loss).and_then(Decimal::new),
        eta: (report.eta_seconds.is_finite() && report.eta_seconds > 0.0).then(|| span(report.eta_seconds)),
        samples_per_second: Decimal::new(report.samples_per_second).filter(|rate| rate.get() > 0.0),
        metrics: report
            .metrics
            .iter()
            .filter_map(|(name, value)| Some((name.clone(), Decimal::new(*value)?)))
            .collect(),
        checkpoint_step: report.checkpoint_step,
    }
}

/// Formats seconds; 4000 s is 1h6m40s.
pub fn span(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest}s"),
        _ => format!("{hours}h{minutes}m{rest}s"),
    }
}
