//! What a user sees of a FineTuneJob.

use athanor_contract::Decimal;
use athanor_crds::{FineTuneJob, FineTuneJobStatus, Progress, condition};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Client, ResourceExt};

use super::{
    apply::Applied,
    decide::{self, Decision, Phase, since},
    dereference::Observed,
    validate::InvalidJob,
};
use crate::{
    cluster::{self, ClusterError},
    condition::{State, set},
    progress::Report,
};

pub use decide::is_over;

/// Writes a status if it differs from the one the object has.
pub async fn write(client: &Client, job: &FineTuneJob, next: FineTuneJobStatus) -> Result<(), ClusterError> {
    let text = |status: Option<&FineTuneJobStatus>| status.and_then(|status| serde_json::to_value(status).ok());
    if text(job.status.as_ref()) == text(Some(&next)) {
        return Ok(());
    }
    cluster::apply_status::<FineTuneJob>(client, &job.namespace().unwrap_or_default(), &job.name_any(), &next).await
}

/// The status of a job that cannot be run as it is.
pub fn invalid(job: &FineTuneJob, error: &InvalidJob, now: Timestamp) -> FineTuneJobStatus {
    let mut status = job.status.clone().unwrap_or_default();
    set(
        &mut status.conditions,
        condition::SUCCEEDED,
        State::False,
        "InvalidSpec",
        error.to_string(),
        job.metadata.generation,
        now,
    );
    status.completion_time.get_or_insert(Time(now));
    status
}

/// The status after a decision, pure.
pub fn next(
    observed: &Observed,
    decision: &Decision,
    applied: Result<&Applied, &ClusterError>,
    now: Timestamp,
) -> FineTuneJobStatus {
    let job = &observed.job;
    let mut status = job.status.clone().unwrap_or_default();
    if decision.phase == Phase::Over {
        return status;
    }
    let created = job.metadata.creation_timestamp.as_ref().map_or(now, |time| time.0);
    let generation = job.metadata.generation;
    let mark = |status: &mut FineTuneJobStatus, name: &str, at: f64| {
        if let Some(seconds) = Decimal::new((at * 1000.0).round() / 1000.0) {
            status.timeline.entry(name.into()).or_insert(seconds);
        }
    };
    let since_created = |at: Timestamp| since(created, at).as_secs_f64();

    if matches!(applied, Ok(Applied { created: true })) {
        status.start_time.get_or_insert(Time(now));
        mark(&mut status, "admitted", since_created(now));
    }
    if decision.phase == Phase::Running {
        mark(&mut status, "podsRunning", since_created(now));
    }
    if let Some(report) = &observed.report {
        let began = observed.pods.iter().filter(|pod| decide::index(pod) == Some(0)).find_map(process_start);
        if let Some(began) = began.map(since_created) {
            mark(&mut status, "processStart", began);
            for (name, seconds) in report.timeline.iter().filter(|(_, seconds)| **seconds > 0.0) {
                mark(&mut status, name, began + seconds);
            }
        }
        status.progress = Some(progress(report));
    }

    let (state, reason, message) = match &decision.phase {
        Phase::Suspended => (State::Unknown, "Suspended", "spec.suspend is true".into()),
        Phase::Searching { message } => (State::Unknown, "Searching", message.clone()),
        Phase::Pending { message } => (State::Unknown, "Pending", message.clone()),
        Phase::Running => (State::Unknown, "Running", "all pods run".into()),
        Phase::Restarting { cause, .. } => {
            (State::Unknown, "Restarting", format!("from the last checkpoint, because {cause}"))
        }
        Phase::Succeeded(summary) => (State::True, "Succeeded", format!("the artifact is at {}", summary.artifact)),
        Phase::Failed { reason, message, .. } => (State::False, *reason, message.clone()),
        Phase::Over => return status,
    };
    set(&mut status.conditions, condition::SUCCEEDED, state, reason, message, generation, now);
    let running = State::from(decision.phase == Phase::Running);
    set(&mut status.conditions, condition::RUNNING, running, reason, "", generation, now);

    status.attempt = decision.attempt;
    if let Some(search) = &decision.search {
        status.search = Some(search.clone());
    }
    match &decision.phase {
        Phase::Restarting { counted: true, .. } => status.restarts += 1,
        Phase::Restarting { counted: false, .. } => status.preemptions += 1,
        // The deadline counts from the next start.
        Phase::Suspended => status.start_time = None,
        _ => {}
    }
    if state != State::Unknown {
        status.completion_time.get_or_insert(Time(now));
        mark(&mut status, "finished", since_created(now));
    }
    if let Phase::Succeeded(summary) | Phase::Failed { summary: Some(summary), .. } = &decision.phase {
        let last = status.progress.take().unwrap_or_default();
        let text = "100%".to_owned();
        status.progress = Some(Progress {
            stage: "Done".into(),
            step: summary.steps,
            total_steps: summary.steps,
            percent: 100,
            percent_text: text,
            eta: None,
            ..last
        });
        status.summary = Some(summary.clone());
    }
    if let Err(error) = applied
        && state == State::Unknown
    {
        let reason = if error.is_refusal() { "Refused" } else { "ApplyFailed" };
        set(&mut status.conditions, condition::SUCCEEDED, State::Unknown, reason, error.to_string(), generation, now);
    }
    status
}

fn process_start(pod: &k8s_openapi::api::core::v1::Pod) -> Option<Timestamp> {
    let container = pod.status.as_ref()?.container_statuses.as_ref()?.first()?.state.as_ref()?;
    let running = container.running.as_ref().and_then(|running| running.started_at.as_ref());
    running.or_else(|| container.terminated.as_ref()?.started_at.as_ref()).map(|time| time.0)
}

fn progress(report: &Report) -> Progress {
    let percent = (report.step.min(report.total_steps) * 100).checked_div(report.total_steps).unwrap_or(0) as u8;
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

/// 4000 s is 1h6m40s.
pub fn span(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, _) => format!("{minutes}m{rest}s"),
        _ => format!("{hours}h{minutes}m{rest}s"),
    }
}
