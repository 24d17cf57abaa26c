//! What the monitor published before a retraining appeared, read from the API server and not from what the operator wrote
//! of it.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use athanor_contract::{
    monitor::{MonitorStatus, Verdict},
    train::OffsetRange,
};
use athanor_crds::{FineTuneJob, ModelDeploymentStatus};
use kube::runtime::watcher;

use crate::{
    cluster::Cluster,
    events::Record,
    follow::{Following, follow},
    labelled::labelled_by_the_end,
};

/// A published verdict, and whether there was a retraining in that version of the status.
#[derive(Clone, Debug, PartialEq)]
pub struct Version {
    pub monitor: MonitorStatus,
    pub retraining: Option<String>,
}

/// All versions of a deployment's verdict since this was started.
pub struct Verdicts {
    versions: Arc<Mutex<Vec<Version>>>,
    _watch: Following,
}

impl Verdicts {
    pub fn watch(cluster: &Cluster, namespace: &str, deployment: &str) -> Self {
        let versions = Arc::new(Mutex::new(Vec::new()));
        let seen = versions.clone();
        let config = watcher::Config::default().fields(&format!("metadata.name={deployment}"));
        let watch = follow(cluster.deployments(namespace), config, move |deployment| {
            if let Some(status) = &deployment.status {
                add(&mut seen.lock().unwrap_or_else(PoisonError::into_inner), status);
            }
        });
        Self { versions, _watch: watch }
    }

    pub fn versions(&self) -> Vec<Version> {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn add(versions: &mut Vec<Version>, status: &ModelDeploymentStatus) {
    let Some(monitor) = status.monitor.clone() else { return };
    let version = Version { monitor, retraining: status.retraining.as_ref().map(|retraining| retraining.job.clone()) };
    if versions.last() != Some(&version) {
        versions.push(version);
    }
}

/// The offset ranges that a retraining reads from Kafka.
///
/// # Errors
/// It has no such source.
pub fn ranges_of(job: &FineTuneJob) -> Result<Vec<OffsetRange>> {
    let mut sources = job.spec.train.data.sources.iter();
    let kafka = sources.find_map(|source| source.kafka.as_ref()).context("the retraining has no Kafka source")?;
    Ok(kafka.ranges.clone())
}

/// Finds the published verdict whose ranges the first retraining of a deployment reads: Drifted, with `minimum` labels or
/// more, and published before the status named the retraining. Later retrainings add the ranges of those before them.
///
/// # Errors
/// There is none, or the watch never saw the retraining.
pub fn verdict<'a>(
    versions: &'a [Version],
    retraining: &str,
    ranges: &[OffsetRange],
    minimum: u64,
) -> Result<&'a MonitorStatus> {
    let named = versions.iter().position(|version| version.retraining.as_deref() == Some(retraining));
    let named = named.with_context(|| format!("no version of the status names {retraining}"))?;
    let before = versions[..=named].iter().map(|version| &version.monitor);
    let allowed: Vec<&MonitorStatus> =
        before.filter(|monitor| monitor.verdict == Verdict::Drifted && monitor.labelled >= minimum).collect();
    let published: Vec<&Vec<OffsetRange>> = allowed.iter().map(|monitor| &monitor.ranges).collect();
    let found = allowed.iter().copied().find(|monitor| !ranges.is_empty() && monitor.ranges == ranges);
    found.with_context(|| format!("{retraining} reads {ranges:?}; published with the verdict Drifted: {published:?}"))
}

/// Compares a verdict's number of labels with the events: the monitor's own count is not taken for granted. It has read the
/// topic from its beginning, so that a label which overtook the first answer of a partition counts as well.
///
/// # Errors
/// They differ.
pub fn check_labels(monitor: &MonitorStatus, records: &[Record]) -> Result<()> {
    let rows = labelled_by_the_end(records, &monitor.ranges)?;
    let own = rows.iter().filter(|row| row.revision == monitor.revision).count();
    ensure!(
        own as u64 == monitor.labelled,
        "the monitor counts {} labels of {}, its ranges have {own}",
        monitor.labelled,
        monitor.revision
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labelled::tests::{feedback, prediction, range};

    fn monitor(verdict: Verdict, labelled: u64, end: i64) -> MonitorStatus {
        MonitorStatus {
            verdict,
            labelled,
            revision: "r1".into(),
            ranges: vec![range(0, 0, end)],
            ..MonitorStatus::default()
        }
    }

    fn version(verdict: Verdict, labelled: u64, end: i64, retraining: Option<&str>) -> Version {
        Version { monitor: monitor(verdict, labelled, end), retraining: retraining.map(Into::into) }
    }

    #[test]
    fn only_ranges_of_a_drift_with_enough_labels_before_the_retraining_count() {
        let versions = [
            version(Verdict::Stable, 90, 10, None),
            version(Verdict::Drifted, 95, 20, None),
            version(Verdict::Drifted, 120, 30, None),
            version(Verdict::Drifted, 120, 30, Some("m-1")),
            version(Verdict::Drifted, 150, 40, Some("m-1")),
        ];
        let found = |end: i64| verdict(&versions, "m-1", &[range(0, 0, end)], 100).map(|monitor| monitor.labelled);
        assert_eq!(found(30).unwrap(), 120);
        for (end, mistake) in [(10, "not drifted"), (20, "too few labels"), (40, "published later"), (29, "one less")] {
            assert!(found(end).is_err(), "{mistake}");
        }
        assert!(verdict(&versions, "m-1", &[range(0, 1, 30)], 100).is_err(), "another begin");
        assert!(verdict(&versions, "m-1", &[], 100).is_err());
        assert!(verdict(&versions, "m-2", &[range(0, 0, 30)], 100).is_err(), "another retraining");
    }

    #[test]
    fn the_monitors_count_is_compared_with_the_events() {
        let records = [
            prediction(0, 0, "p", "r1", "text"),
            feedback(0, 1, "f1", "01", "p", "a"),
            prediction(0, 2, "q", "r0", "of another revision"),
            feedback(0, 3, "f2", "01", "q", "a"),
        ];
        check_labels(&monitor(Verdict::Drifted, 1, 4), &records).unwrap();
        assert!(check_labels(&monitor(Verdict::Drifted, 2, 4), &records).is_err());
        assert!(check_labels(&monitor(Verdict::Drifted, 1, 1), &records).is_err(), "the label is behind the range");
    }
}
