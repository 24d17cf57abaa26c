//! What both demos share: stages with their times, jobs that are followed with a progress bar, and waiting for the status of
//! a deployment.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use athanor_crds::{FineTuneJob, ModelDeployment, ModelDeploymentStatus};
use indicatif::{ProgressBar, ProgressStyle};
use kube::ResourceExt;

use crate::{
    cluster::{self, Cluster, condition, wait},
    dataset, events, paths, storage,
    verdicts::{Verdicts, check_labels, ranges_of, verdict},
};

/// One run of a demo.
pub struct Stages {
    pub cluster: Cluster,
    pub namespace: &'static str,
    /// Name of the ModelDeployment that the demo is about.
    pub deployment: &'static str,
    began: Instant,
    /// What was done, and the seconds it took.
    done: Vec<(&'static str, f64)>,
}

impl Stages {
    pub fn new(cluster: Cluster, namespace: &'static str, deployment: &'static str) -> Self {
        Self { cluster, namespace, deployment, began: Instant::now(), done: Vec::new() }
    }

    /// Seconds since the beginning.
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    pub fn begin(&self, name: &'static str) -> (&'static str, Instant) {
        println!("[{:>6.1} s] {name} ...", self.seconds());
        (name, Instant::now())
    }

    pub fn end(&mut self, (name, started): (&'static str, Instant), result: &str) {
        let seconds = started.elapsed().as_secs_f64();
        println!("[{:>6.1} s]   {result} ({seconds:.1} s)", self.seconds());
        self.done.push((name, seconds));
    }

    pub fn print_seconds(&self) {
        println!("\nSeconds of each stage");
        for (name, seconds) in &self.done {
            println!("  {seconds:>7.1}  {name}");
        }
    }

    /// Follows a job with a progress bar until it succeeded, and saves its report.
    pub async fn train(&self, name: &str) -> Result<FineTuneJob> {
        let bar = ProgressBar::new(100).with_style(ProgressStyle::with_template("  {bar:40} {pos:>3} %  {msg}")?);
        let printed = Cell::new(0);
        let job = cluster::job_succeeded(&self.cluster, self.namespace, name, Duration::from_secs(1200), |job| {
            let Some(progress) = job.status.as_ref().and_then(|status| status.progress.as_ref()) else { return };
            let loss = progress.loss.map_or("-".to_owned(), |loss| loss.to_string());
            let message = format!(
                "{} step {}/{} loss {loss} ETA {}",
                progress.stage,
                progress.step,
                progress.total_steps,
                progress.eta.as_deref().unwrap_or("-")
            );
            bar.set_position(progress.percent.into());
            bar.set_message(message.clone());
            // Where nobody sees the bar, a line every tenth of the way.
            if bar.is_hidden() && progress.percent / 10 > printed.get() {
                printed.set(progress.percent / 10);
                println!("[{:>6.1} s]   {:>3} % {message}", self.seconds(), progress.percent);
            }
        })
        .await;
        bar.finish_and_clear();
        let job = job?;
        let summary =
            job.status.as_ref().and_then(|status| status.summary.as_ref()).context("the job has no summary")?;
        println!("             report: {}", save_report(&summary.artifact, name).await?);
        Ok(job)
    }

    pub async fn status(&self) -> Result<ModelDeploymentStatus> {
        let deployment: ModelDeployment = self.cluster.deployments(self.namespace).get(self.deployment).await?;
        Ok(deployment.status.unwrap_or_default())
    }

    /// The name of the current revision once a deployment is Ready.
    pub async fn ready(&self, deployment: &str) -> Result<String> {
        wait(&format!("ModelDeployment {deployment} is Ready"), Duration::from_secs(180), async || {
            let found: ModelDeployment = self.cluster.deployments(self.namespace).get(deployment).await?;
            let status = found.status.unwrap_or_default();
            let ready = condition(&status.conditions, "Ready").is_some_and(|condition| condition.status == "True");
            Ok(status.current_revision.filter(|_| ready).map(|revision| revision.name))
        })
        .await
    }

    /// Waits for a status of the deployment.
    pub async fn wait_status(&self, wanted: impl Fn(&ModelDeploymentStatus) -> bool) -> Result<ModelDeploymentStatus> {
        let found = wait("the status says so", Duration::from_secs(120), async || {
            let status = self.status().await?;
            Ok(wanted(&status).then_some(status))
        });
        let (namespace, name) = (self.namespace, self.deployment);
        found.await.with_context(|| format!("see kubectl -n {namespace} get mdep {name} -o yaml"))
    }

    /// Waits until the monitor has found a drift.
    pub async fn drifted(&self) -> Result<ModelDeploymentStatus> {
        let is_drifted = |status: &ModelDeploymentStatus| {
            condition(&status.conditions, "Drifted").is_some_and(|condition| condition.status == "True")
        };
        self.wait_status(is_drifted).await.context("the monitor sees the drift")
    }

    /// Waits until another revision has all traffic; returns it and the weights it had on the way.
    pub async fn canary(&self, champion: &str, limit: Duration) -> Result<(String, Vec<u32>)> {
        let seen = RefCell::new(BTreeSet::new());
        let challenger = wait("the challenger takes over", limit, async || {
            let status = self.status().await?;
            if let Some(candidate) = &status.candidate {
                seen.borrow_mut().insert(candidate.weight);
            }
            ensure!(status.failed_revisions.is_empty(), "rolled back: {:?}", status.failed_revisions);
            Ok(status.current_revision.map(|revision| revision.name).filter(|name| name != champion))
        })
        .await?;
        Ok((challenger, seen.into_inner().into_iter().collect()))
    }
}

/// Copies a job's report from its artifact to where a browser finds it.
async fn save_report(artifact: &str, name: &str) -> Result<String> {
    let folder = artifact.strip_prefix(&format!("s3://{}/", storage::BUCKET)).context("the artifact is elsewhere")?;
    let html = storage::get(&storage::bucket()?, &format!("{folder}/report.html")).await?;
    ensure!(html.starts_with(b"<!doctype html>"), "{artifact}/report.html is no page");
    let path = paths::cache().join("logs").join(format!("report-{name}.html"));
    std::fs::write(&path, html).with_context(|| path.display().to_string())?;
    Ok(path.display().to_string())
}

/// Checks what a deployment's first retraining was trained on, against a verdict that was published before it and against
/// the events that its ranges hold. `minimum` is `retrain.minimumSamples`.
///
/// # Errors
/// Its ranges are not those of the verdict; or verdict, report or data digest differ from the events.
pub async fn check_retraining(job: &FineTuneJob, verdicts: &Verdicts, minimum: u64, topic: &'static str) -> Result<()> {
    let (name, ranges) = (job.name_any(), ranges_of(job)?);
    let versions = verdicts.versions();
    let published = verdict(&versions, &name, &ranges, minimum)?;
    let records = tokio::task::spawn_blocking(move || events::read_all(topic)).await??;
    check_labels(published, &records)?;
    let rows = dataset::check(job, &records).await?;
    println!("             {name} reads the verdict's ranges, with {} labelled events, and no others", rows.len());
    Ok(())
}

pub fn print_timeline(job: &FineTuneJob) {
    let Some(status) = &job.status else { return };
    let mut timeline: Vec<_> = status.timeline.iter().collect();
    timeline.sort_by(|a, b| a.1.get().total_cmp(&b.1.get()));
    let line: Vec<String> = timeline.iter().map(|(name, seconds)| format!("{name} {seconds} s")).collect();
    println!("             since kubectl apply: {}", line.join(", "));
}

/// The monitor's statistics as a line.
pub fn statistics(status: &ModelDeploymentStatus) -> String {
    let Some(monitor) = &status.monitor else { return "no verdict".into() };
    let values: Vec<String> = monitor
        .statistics
        .iter()
        .map(|statistic| format!("{} {} (limit {})", statistic.name, statistic.value, statistic.threshold))
        .collect();
    format!(
        "{:?} after {} predictions, {} labelled: {}",
        monitor.verdict,
        monitor.predictions,
        monitor.labelled,
        values.join(", ")
    )
}
