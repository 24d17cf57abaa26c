//! Metrics about objects, computed from the caches at every scrape: a deleted object has no metrics any more.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use athanor_crds::{FineTuneJob, ModelDeployment, condition as types};
use kube::ResourceExt;

use crate::{condition, stores::Stores};

/// Renders the metrics as Prometheus text. Only the leader has caches of the objects.
pub fn render(stores: &Stores, is_leader: bool) -> String {
    let mut text = String::new();
    let help = "1 if this process holds the Lease, and reconciles.";
    text.push_str(&format!("# HELP {LEADER} {help}\n# TYPE {LEADER} gauge\n{LEADER} {}\n", u8::from(is_leader)));
    if is_leader {
        jobs(&mut text, &stores.fine_tune_jobs.state());
        deployments(&mut text, &stores.model_deployments.state());
    }
    text
}

const LEADER: &str = "athanor_operator_leader";

/// States that are counted even if no job has them.
const STATES: [&str; 9] = [
    "Pending",
    "Searching",
    "Running",
    "Succeeded",
    "UserError",
    "GateFailed",
    "TooManyRestarts",
    "TooManyPreemptions",
    "DeadlineExceeded",
];

struct Family<'a> {
    text: &'a mut String,
    name: &'static str,
}

impl<'a> Family<'a> {
    fn new(text: &'a mut String, name: &'static str, help: &str) -> Self {
        text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} gauge\n"));
        Self { text, name }
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels.iter().map(|(key, value)| format!("{key}=\"{}\"", escape(value))).collect();
        // Writing to a String cannot fail.
        let _infallible = writeln!(self.text, "{}{{{}}} {value}", self.name, labels.join(","));
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Returns the state of a job: the reason of its condition Succeeded.
fn state(job: &FineTuneJob) -> String {
    let conditions = job.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    condition::get(conditions, types::SUCCEEDED).map_or_else(|| "Pending".into(), |condition| condition.reason.clone())
}

fn jobs(text: &mut String, jobs: &[Arc<FineTuneJob>]) {
    let mut states: BTreeMap<String, u32> = STATES.map(|state| (state.to_owned(), 0)).into();
    for job in jobs {
        *states.entry(state(job)).or_default() += 1;
    }
    let mut family =
        Family::new(text, "athanor_finetunejobs", "FineTuneJobs by the reason of their condition Succeeded.");
    for (state, count) in states {
        family.sample(&[("state", &state)], f64::from(count));
    }
    let mut each = |name: &'static str, help: &str, value: &dyn Fn(&FineTuneJob) -> Option<f64>| {
        let mut family = Family::new(text, name, help);
        for job in jobs {
            if let Some(value) = value(job) {
                let namespace = job.namespace().unwrap_or_default();
                family.sample(&[("namespace", &namespace), ("job", &job.name_any())], value);
            }
        }
    };
    each("athanor_finetunejob_progress_ratio", "Completed optimizer steps as a share of all steps.", &|job| {
        let progress = job.status.as_ref()?.progress.as_ref()?;
        (progress.total_steps > 0).then(|| progress.step as f64 / progress.total_steps as f64)
    });
    each("athanor_finetunejob_running", "1 until the job is over; 0 while it is suspended.", &|job| {
        let runs = !crate::finetunejob::is_over(job.status.as_ref()?) && !job.spec.suspend;
        Some(f64::from(u8::from(runs)))
    });
    each("athanor_finetunejob_loss", "Newest training loss.", &|job| {
        Some(job.status.as_ref()?.progress.as_ref()?.loss?.get())
    });
    each("athanor_finetunejob_restarts", "Restarts that counted against failurePolicy.maxRestarts.", &|job| {
        Some(f64::from(job.status.as_ref()?.restarts))
    });
}

fn deployments(text: &mut String, deployments: &[Arc<ModelDeployment>]) {
    let name = |deployment: &ModelDeployment| (deployment.namespace().unwrap_or_default(), deployment.name_any());
    let help = "Share of requests that go to the candidate revision, in percent.";
    let mut family = Family::new(text, "athanor_modeldeployment_candidate_weight", help);
    for deployment in deployments {
        let (namespace, name) = name(deployment);
        let candidate = deployment.status.as_ref().and_then(|status| status.candidate.as_ref());
        let revision = candidate.map(|candidate| candidate.revision.name.as_str()).unwrap_or_default();
        let weight = candidate.map_or(0, |candidate| candidate.weight);
        family.sample(&[("namespace", &namespace), ("deployment", &name), ("revision", revision)], f64::from(weight));
    }
    let mut each = |metric: &'static str, help: &str, type_: &str| {
        let mut family = Family::new(text, metric, help);
        for deployment in deployments {
            let (namespace, name) = name(deployment);
            let conditions = deployment.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
            let holds = condition::get(conditions, type_).is_some_and(|condition| condition.status == "True");
            family.sample(&[("namespace", &namespace), ("deployment", &name)], f64::from(u8::from(holds)));
        }
    };
    each("athanor_modeldeployment_ready", "1 if all pods of the current revision are ready.", types::READY);
    each(
        "athanor_modeldeployment_drifted",
        "1 if the monitor reports that the current revision has drifted.",
        types::DRIFTED,
    );
    each("athanor_modeldeployment_retraining", "1 while a retraining is running.", types::RETRAINING);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_are_counted_by_state_and_labels_are_escaped() {
        let mut text = String::new();
        jobs(&mut text, &[Arc::new(crate::finetunejob::tests::job("a", "1"))]);
        assert!(text.contains("athanor_finetunejobs{state=\"Pending\"} 1\n"), "{text}");
        assert!(text.contains("athanor_finetunejobs{state=\"Succeeded\"} 0\n"), "{text}");
        assert_eq!(escape("a\"b\\\n"), "a\\\"b\\\\\\n");
    }
}
