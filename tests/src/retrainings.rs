//! Whether a deployment retrained more often than it had a reason to: which retrainings there were, on what, and which
//! pods ran for them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use athanor_contract::train::OffsetRange;
use athanor_crds::FineTuneJob;
use jiff::Timestamp;
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod};
use kube::{Api, ResourceExt, runtime::watcher};

use crate::{
    cluster::{Cluster, condition},
    events::Record,
    follow::{Following, follow},
    labelled::{Labelled, labelled_by_the_end},
    verdicts::ranges_of,
};

/// How a retraining ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Runs,
    Failed,
    /// It led to a model, whose revision has this name.
    Succeeded(String),
}

/// A FineTuneJob of a deployment's own.
#[derive(Clone, Debug)]
pub struct Retraining {
    pub name: String,
    pub created: Timestamp,
    pub completed: Option<Timestamp>,
    pub outcome: Outcome,
    /// Address of the model that had drifted.
    pub baseline: String,
    /// Address of the model that it led to.
    pub artifact: Option<String>,
    pub ranges: Vec<OffsetRange>,
}

impl Retraining {
    /// # Errors
    /// A field is absent that the operator sets.
    pub fn read(deployment: &str, job: &FineTuneJob) -> Result<Self> {
        let status = job.status.clone().unwrap_or_default();
        let succeeded = condition(&status.conditions, "Succeeded").map_or("Unknown", |found| &found.status);
        let outcome = match (succeeded, &status.summary) {
            ("True", Some(summary)) => {
                let digits = summary.model_digest.get(..8).context("a digest of fewer than eight digits")?;
                Outcome::Succeeded(format!("{deployment}-{digits}"))
            }
            ("False", _) => Outcome::Failed,
            _ => Outcome::Runs,
        };
        Ok(Self {
            name: job.name_any(),
            created: job.metadata.creation_timestamp.as_ref().context("a job without creationTimestamp")?.0,
            completed: status.completion_time.as_ref().map(|time| time.0),
            outcome,
            baseline: job.spec.train.evaluate.baseline.clone().context("a retraining without a baseline")?,
            artifact: status.summary.map(|summary| summary.artifact),
            ranges: ranges_of(job)?,
        })
    }
}

/// What is known of a deployment besides its retrainings.
pub struct Known<'a> {
    /// `status.retrainings`.
    pub count: u64,
    /// Address and name of its first revision.
    pub first: (&'a str, &'a str),
    /// Revisions that were rolled back: the drift that they were trained for is still there.
    pub rolled_back: &'a [String],
    /// `retrain.cooldownSeconds`.
    pub cooldown: Duration,
    /// `retrain.minimumSamples`.
    pub minimum_samples: usize,
    pub records: &'a [Record],
}

/// Checks that no drift was answered by two retrainings. A second one for a drift would have the drifted model of the
/// first as its baseline, although the first led to another model that was served; or the same events; or it would begin
/// before the first was over and the cooldown had passed, which doubles with each that led to no other model; or the
/// revision that it is said to correct would have no labels of its own that justify it.
///
/// # Errors
/// The first rule that a retraining breaks.
pub fn check_retrainings(retrainings: &[Retraining], known: &Known<'_>) -> Result<()> {
    ensure!(
        retrainings.len() as u64 == known.count,
        "{} FineTuneJobs for {} retrainings",
        retrainings.len(),
        known.count
    );
    let mut revisions = BTreeMap::from([known.first]);
    for retraining in retrainings {
        if let (Outcome::Succeeded(revision), Some(artifact)) = (&retraining.outcome, &retraining.artifact) {
            revisions.insert(artifact, revision);
        }
    }
    let mut by_time: Vec<&Retraining> = retrainings.iter().collect();
    by_time.sort_by_key(|retraining| (retraining.created, retraining.completed));
    // Whether a retraining led to another model than the one that had drifted.
    let changed = |one: &Retraining| match &one.outcome {
        Outcome::Succeeded(revision) => revisions.get(one.baseline.as_str()) != Some(&revision.as_str()),
        _ => false,
    };
    let mut cooldown = known.cooldown;
    for (index, retraining) in by_time.iter().enumerate() {
        let Retraining { name, baseline, ranges, .. } = *retraining;
        if let Some(before) = index.checked_sub(1).map(|before| by_time[before]) {
            let Some(completed) = before.completed else { bail!("{name} began while {} ran", before.name) };
            // Both times are whole seconds.
            let pause = retraining.created.as_second() - completed.as_second() + 1;
            cooldown = if changed(before) { known.cooldown } else { cooldown * 2 };
            ensure!(
                pause >= cooldown.as_secs() as i64,
                "{name} began {pause} s after the end of {}, in its cooldown",
                before.name
            );
        }
        let succeeded = by_time[..index].iter().filter(|before| matches!(before.outcome, Outcome::Succeeded(_)));
        if let Some(same) = succeeded.clone().find(|before| before.baseline == *baseline && before.ranges == *ranges) {
            bail!("{name} and {} have the same events", same.name);
        }
        let is_served = |before: &&&Retraining| {
            let is_rolled_back = |revision| known.rolled_back.contains(revision);
            changed(before) && !matches!(&before.outcome, Outcome::Succeeded(revision) if is_rolled_back(revision))
        };
        let earlier: Vec<&&Retraining> = by_time[..index].iter().filter(is_served).collect();
        if let Some(same) = earlier.iter().find(|before| before.baseline == *baseline) {
            bail!("{name} and {} answer one drift: that of {baseline}", same.name);
        }
        let revision = revisions.get(baseline.as_str()).with_context(|| format!("{name}: unknown model {baseline}"))?;
        let rows = labelled_by_the_end(known.records, ranges)?;
        let is_new =
            |row: &&Labelled| row.revision == **revision && !earlier.iter().any(|before| row.is_in(&before.ranges));
        let new = rows.iter().filter(is_new).count();
        ensure!(
            new >= known.minimum_samples,
            "{name} rests on {new} labels of {revision} that no retraining before it had, {} are required",
            known.minimum_samples
        );
    }
    Ok(())
}

/// A Kubernetes Job of a FineTuneJob, with its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attempt {
    pub name: String,
    /// UIDs by the index of the node.
    pub pods: BTreeMap<u32, BTreeSet<String>>,
}

/// What a namespace had of trainings.
#[derive(Default)]
struct Seen {
    /// By the FineTuneJob's UID and the Kubernetes Job's UID, without the pods.
    attempts: BTreeMap<String, BTreeMap<String, Attempt>>,
    /// UIDs of pods by the Kubernetes Job's UID and the index of the node.
    pods: BTreeMap<String, BTreeMap<u32, BTreeSet<String>>>,
}

/// Every Kubernetes Job and pod of trainings in a namespace since this was started.
pub struct Runs {
    seen: Arc<Mutex<Seen>>,
    _watches: [Following; 2],
}

impl Runs {
    pub fn watch(cluster: &Cluster, namespace: &str) -> Self {
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let config = watcher::Config::default().labels("app.kubernetes.io/managed-by=athanor");
        let (jobs, pods) = (seen.clone(), seen.clone());
        let api = Api::<Job>::namespaced(cluster.client.clone(), namespace);
        let job_watch = follow(api, config.clone(), move |job: &Job| {
            let owner = job.owner_references().iter().find(|owner| owner.kind == "FineTuneJob");
            let (Some(owner), Some(uid)) = (owner, job.uid()) else { return };
            let mut seen = jobs.lock().unwrap_or_else(PoisonError::into_inner);
            seen.attempts.entry(owner.uid.clone()).or_default().entry(uid).or_default().name = job.name_any();
        });
        let pod_watch = follow(cluster.pods(namespace), config, move |pod: &Pod| {
            let label = |name: &str| pod.labels().get(name);
            let job = label("batch.kubernetes.io/controller-uid");
            let index = label("batch.kubernetes.io/job-completion-index").and_then(|index| index.parse().ok());
            let (Some(job), Some(index), Some(uid)) = (job, index, pod.uid()) else { return };
            let mut seen = pods.lock().unwrap_or_else(PoisonError::into_inner);
            seen.pods.entry(job.clone()).or_default().entry(index).or_default().insert(uid);
        });
        Self { seen, _watches: [job_watch, pod_watch] }
    }

    /// Attempts of a FineTuneJob by the UIDs of their Kubernetes Jobs.
    pub fn of(&self, job: &FineTuneJob) -> BTreeMap<String, Attempt> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut attempts = seen.attempts.get(&job.uid().unwrap_or_default()).cloned().unwrap_or_default();
        for (uid, attempt) in &mut attempts {
            attempt.pods = seen.pods.get(uid).cloned().unwrap_or_default();
        }
        attempts
    }
}

/// Checks that each attempt of a FineTuneJob that is over ran once: one Kubernetes Job for each number up to `attempt`,
/// and in it at most one pod for each node. Each attempt but the first follows a restart or a preemption that the status
/// counts. Returns the number of pods.
///
/// # Errors
/// The first rule that is broken.
pub fn check_attempts(job: &FineTuneJob, attempts: &BTreeMap<String, Attempt>) -> Result<usize> {
    let name = job.name_any();
    let status = job.status.clone().unwrap_or_default();
    let mut found: Vec<&str> = attempts.values().map(|attempt| attempt.name.as_str()).collect();
    found.sort_unstable();
    let mut expected: Vec<String> = (0..=status.attempt).map(|number| format!("{name}-{number}")).collect();
    expected.sort_unstable();
    ensure!(found == expected, "{name}: Kubernetes Jobs {found:?}, expected {expected:?}");
    ensure!(
        status.attempt == status.restarts + status.preemptions,
        "{name}: attempt {} after {} restarts and {} preemptions",
        status.attempt,
        status.restarts,
        status.preemptions
    );
    let mut pods = 0;
    for attempt in attempts.values() {
        for (node, uids) in &attempt.pods {
            ensure!(uids.len() == 1, "{}: {} pods for node {node}", attempt.name, uids.len());
            pods += 1;
        }
    }
    Ok(pods)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::labelled::tests::{feedback, prediction, range};

    /// Ten labelled answers of each revision, one after the other.
    fn records() -> Vec<Record> {
        let answer = |number: i64| {
            let revision = ["m-00000000", "m-11111111", "m-22222222"][(number / 10) as usize];
            let (request, id) = (format!("q{number}"), format!("f{number}"));
            let text = format!("text {number}");
            [
                prediction(0, 2 * number, &request, revision, &text),
                feedback(0, 2 * number + 1, &id, "01", &request, "a"),
            ]
        };
        (0..30).flat_map(answer).collect()
    }

    fn retraining(name: &str, second: i64, baseline: &str, revision: &str, end: i64) -> Retraining {
        Retraining {
            name: name.into(),
            created: Timestamp::from_second(second).unwrap(),
            completed: Timestamp::from_second(second + 50).ok(),
            outcome: Outcome::Succeeded(format!("m-{revision}")),
            baseline: baseline.into(),
            artifact: Some(format!("s3://out/{name}")),
            ranges: vec![range(0, 0, end)],
        }
    }

    /// Two retrainings: of the first model, and of the one that the first retraining led to.
    fn sound() -> Vec<Retraining> {
        vec![
            retraining("one", 100, "s3://first", "11111111", 20),
            retraining("two", 200, "s3://out/one", "22222222", 40),
        ]
    }

    fn check(retrainings: &[Retraining], count: u64, rolled_back: &[String]) -> Result<()> {
        let known = Known {
            count,
            first: ("s3://first", "m-00000000"),
            rolled_back,
            cooldown: Duration::from_secs(20),
            minimum_samples: 10,
            records: &records(),
        };
        check_retrainings(retrainings, &known)
    }

    fn broken(change: impl Fn(&mut Vec<Retraining>)) -> String {
        let mut retrainings = sound();
        change(&mut retrainings);
        check(&retrainings, retrainings.len() as u64, &[]).unwrap_err().to_string()
    }

    #[test]
    fn a_retraining_for_each_drift_is_right() {
        check(&sound(), 2, &[]).unwrap();
        assert!(check(&sound(), 1, &[]).unwrap_err().to_string().starts_with("2 FineTuneJobs for 1"));
        // The drift of the first model is there until a model is served that has none.
        let again = retraining("two", 200, "s3://first", "22222222", 20);
        let failed = Retraining { outcome: Outcome::Failed, artifact: None, ..sound()[0].clone() };
        check(&[failed, again.clone()], 2, &[]).unwrap();
        let again = retraining("two", 200, "s3://first", "22222222", 30);
        check(&[sound()[0].clone(), again], 2, &["m-11111111".into()]).unwrap();
        // So it is if the first retraining changed nothing. The cooldown doubles.
        let nothing = retraining("one", 100, "s3://first", "00000000", 20);
        let again = |second| retraining("two", second, "s3://first", "22222222", 30);
        check(&[nothing.clone(), again(200)], 2, &[]).unwrap();
        let early = check(&[nothing.clone(), again(180)], 2, &[]).unwrap_err().to_string();
        assert!(early.contains("in its cooldown"), "{early}");
        let same = Retraining { ranges: nothing.ranges.clone(), ..again(200) };
        let same = check(&[nothing, same], 2, &[]).unwrap_err().to_string();
        assert!(same.contains("two and one have the same events"), "{same}");
    }

    #[test]
    fn a_second_retraining_for_a_drift_is_found() {
        let second = |second, end| retraining("twice", second, "s3://first", "33333333", end);
        let at_once = broken(|all| all[1] = second(101, 20));
        assert!(at_once.contains("in its cooldown"), "{at_once}");
        let later = broken(|all| all[1] = second(200, 20));
        assert!(later.contains("twice and one have the same events"), "{later}");
        // With more events of its own it is one all the same.
        let with_more = broken(|all| all[1] = second(200, 60));
        assert!(with_more.contains("twice and one answer one drift"), "{with_more}");
        let running = broken(|all| (all[0].completed, all[0].outcome) = (None, Outcome::Runs));
        assert!(running.contains("two began while one ran"), "{running}");
        // A verdict on the new model without labels of it.
        let no_verdict = broken(|all| all[1].ranges = vec![range(0, 0, 38)]);
        assert!(no_verdict.contains("two rests on 9 labels of m-11111111"), "{no_verdict}");
        let unknown = broken(|all| all[1].baseline = "s3://other".into());
        assert!(unknown.contains("unknown model"), "{unknown}");
    }

    #[test]
    fn an_attempt_that_runs_twice_is_found() {
        let job: FineTuneJob = serde_json::from_value(json!({
            "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "m-1"},
            "spec": {"model": {"from": "s3://m", "task": "TextClassification"}, "data": {"sources": []},
                "output": {"to": "s3://o"}},
            "status": {"attempt": 1, "restarts": 1},
        }))
        .unwrap();
        let attempt = |number: u32, pods: &[&str]| Attempt {
            name: format!("m-1-{number}"),
            pods: BTreeMap::from([(0, pods.iter().map(|uid| (*uid).to_owned()).collect())]),
        };
        let check = |attempts: &[(&str, Attempt)]| {
            let attempts = attempts.iter().map(|(uid, attempt)| ((*uid).to_owned(), attempt.clone())).collect();
            check_attempts(&job, &attempts)
        };
        assert_eq!(check(&[("u0", attempt(0, &["p0"])), ("u1", attempt(1, &["p1"]))]).unwrap(), 2);
        assert!(check(&[("u0", attempt(0, &["p0"]))]).is_err(), "an attempt without a Job");
        let twice = [("u0", attempt(0, &["p0"])), ("u1", attempt(1, &["p1"])), ("u2", attempt(1, &["p2"]))];
        assert!(check(&twice).is_err(), "a Job that was created twice");
        assert!(
            check(&[("u0", attempt(0, &["p0", "p2"])), ("u1", attempt(1, &["p1"]))]).is_err(),
            "two pods of a node"
        );
        let mut uncounted = job.clone();
        uncounted.status.as_mut().unwrap().restarts = 0;
        let both = BTreeMap::from([("u0".into(), attempt(0, &["p0"])), ("u1".into(), attempt(1, &["p1"]))]);
        assert!(check_attempts(&uncounted, &both).is_err(), "an attempt that nothing counts");
    }
}
