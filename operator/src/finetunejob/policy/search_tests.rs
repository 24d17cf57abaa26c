//! Searches from beginning to end, with an operator that is killed between any two writes.

use std::sync::Arc;

use athanor_contract::{
    Decimal,
    train::{CrossValidationSpec, Hyperparameters, TrainConfig, TrainSummary},
};
use athanor_crds::{FineTuneJob, FineTuneJobStatus, TrialState, condition as types, label};
use clap::Parser;
use jiff::Timestamp;
use kube::ResourceExt;
use serde_json::{Value, json};

use super::search::child_name;
use crate::{
    cluster::Identity,
    condition::{self, State, Value as Condition},
    finetunejob::{
        apply::Applied,
        build,
        decide::{Decision, Phase},
        dereference::Observed,
        status,
        tests::job,
        validate::{InvalidJob, validate},
    },
    settings::Settings,
};

fn decide(observed: &Observed, now: Timestamp) -> Decision {
    crate::finetunejob::decide::decide(&validate(&observed.job).unwrap(), observed, now)
}

fn now() -> Timestamp {
    "2026-01-01T00:01:00Z".parse().unwrap()
}

fn searching(search: Value) -> FineTuneJob {
    let mut job = job("reviews", "0123456789abcdef");
    let mut search = search;
    search["parameters"] = json!([
        {"name": "learningRate", "range": {"min": 1e-6, "max": 1e-2, "scale": "Log"}},
        {"name": "batchSize", "values": [16, 32]},
    ]);
    job.spec.train.hyperparameters.search = Some(serde_json::from_value(search).unwrap());
    job.spec.train.hyperparameters.max_steps = Some(90);
    job.spec.train.compress = vec![serde_json::from_value(json!({"quantize": {}})).unwrap()];
    job.spec.train.evaluate = serde_json::from_value(
        json!({"gates": [{"metric": "Accuracy", "minimum": "0.8"}], "baseline": "s3://models/champion"}),
    )
    .unwrap();
    job
}

/// Ends a trial's job: better the closer its learning rate is to 1e-4, and not at all above 1e-3.
fn end(child: &mut FineTuneJob) {
    let h = &child.spec.train.hyperparameters;
    let (state, reason) =
        if h.learning_rate > 1e-3 { (State::False, "TooManyRestarts") } else { (State::True, "Succeeded") };
    let accuracy = 1.0 - (h.learning_rate.log10() + 4.0).abs() / 4.0 - 1.0 / h.max_steps.unwrap() as f64;
    let mut conditions = Vec::new();
    let succeeded = Condition::new(state, reason, "the loss was not finite");
    condition::set(&mut conditions, types::SUCCEEDED, &succeeded, None, now());
    let key = if h.cross_validation.is_some() { "crossValidation/accuracy" } else { "validation/accuracy" };
    let metrics = [(key.to_owned(), Decimal::new(accuracy).unwrap())].into();
    let summary = Some(TrainSummary { metrics, ..TrainSummary::default() });
    child.status = Some(FineTuneJobStatus { conditions, summary, ..FineTuneJobStatus::default() });
}

/// A cluster in which trials end in the order of their creation, one a reconcile.
struct Cluster {
    job: FineTuneJob,
    trials: Vec<FineTuneJob>,
    settings: Settings,
}

impl Cluster {
    fn new(job: FineTuneJob) -> Self {
        Self { job, trials: Vec::new(), settings: Settings::parse_from(["athanor-operator"]) }
    }

    fn observed(&self) -> Observed {
        Observed {
            job: self.job.clone(),
            batch_jobs: vec![],
            pods: vec![],
            report: None,
            trials: self.trials.iter().cloned().map(Arc::new).collect(),
            is_awaited: false,
        }
    }

    /// One reconcile. An operator may be killed after so many writes, the status being the last.
    fn reconcile(&mut self, writes: usize) -> (Phase, Option<build::AttemptChildren>) {
        let observed = self.observed();
        let decision = decide(&observed, now());
        let children = build::build(&validate(&self.job).unwrap(), &self.settings, &decision);
        let created = children.trials.len();
        for (index, mut trial) in children.trials.into_iter().enumerate().take(writes) {
            assert!(self.trials.iter().all(|other| other.name_any() != trial.name_any()));
            trial.metadata.uid = Some(format!("{}-{index}", self.trials.len()));
            self.trials.push(trial);
        }
        if writes > created {
            self.job.status =
                Some(status::next(&observed, &decision, Ok(&Applied::assumed(children.attempt.is_some())), now()));
        }
        (decision.phase, children.attempt)
    }

    fn running(&self) -> usize {
        self.trials.iter().filter(|trial| trial.status.is_none()).count()
    }

    /// Until the job itself begins, or fails; `writes` says after how many writes the operator is killed in which
    /// reconcile.
    fn run(&mut self, writes: impl Fn(usize) -> usize) -> (Phase, Option<build::AttemptChildren>) {
        let limit = self.job.spec.train.hyperparameters.search.as_ref().unwrap().parallelism as usize;
        for turn in 0..1000 {
            let (phase, attempt) = self.reconcile(writes(turn));
            assert!(self.running() <= limit, "{} at the same time", self.running());
            if attempt.is_some() || !matches!(phase, Phase::Searching { .. }) {
                // A result counts once it is written.
                if self.job.status.as_ref().and_then(|status| status.search.as_ref()).is_some_and(|search| search.done)
                {
                    return (phase, attempt);
                }
            }
            if turn % 2 == 1
                && let Some(trial) = self.trials.iter_mut().find(|trial| trial.status.is_none())
            {
                end(trial);
            }
        }
        panic!("the search does not end");
    }
}

#[test]
fn the_job_trains_with_the_best_of_its_trials() {
    for search in [
        json!({"algorithm": "TPE", "maxTrials": 20, "parallelism": 3}),
        json!({"algorithm": "Random", "maxTrials": 12, "parallelism": 12}),
        json!({"algorithm": "ASHA", "maxTrials": 27, "parallelism": 4, "asha": {"reductionFactor": 3, "minimumSteps": 10}}),
    ] {
        let mut cluster = Cluster::new(searching(search.clone()));
        let (_, attempt) = cluster.run(|_| usize::MAX);
        let status = cluster.job.status.clone().unwrap();
        let found = status.search.unwrap();
        assert_eq!(found.trials.len() as u64, search["maxTrials"].as_u64().unwrap());
        let best = found.trials.iter().find(|trial| Some(&trial.name) == found.best.as_ref()).unwrap();
        assert_eq!(best.state, TrialState::Finished);
        assert!(found.text.contains("trials, best validation/accuracy 0."), "{}", found.text);
        let failed = found.trials.iter().filter(|trial| trial.state == TrialState::Failed).collect::<Vec<_>>();
        assert!(
            !failed.is_empty() && failed.iter().all(|trial| trial.message.as_ref().unwrap().contains("not finite"))
        );

        let config: TrainConfig = serde_json::from_str(&attempt.unwrap().config.data.unwrap()["train.json"]).unwrap();
        let told = config.trials.iter().find(|trial| trial.best).unwrap();
        // The status is rounded when it is written, as the configuration was.
        let written = |results: &[Decimal]| serde_json::to_value(results).unwrap();
        assert_eq!((&told.name, &told.parameters), (&best.name, &best.parameters));
        assert_eq!(written(&told.results), written(&best.results));
        assert_eq!(config.trials.len(), found.trials.len(), "the report has all of them");
        assert_eq!(config.trials.iter().filter(|trial| trial.failed).count(), failed.len());
        let h = &config.spec.hyperparameters;
        assert_eq!(h.learning_rate.to_string(), best.parameters["learningRate"]);
        assert_eq!((h.search.is_none(), h.max_steps, config.spec.evaluate.gates.len()), (true, Some(90), 1));
        assert_eq!(config.spec.output.to, "s3://out/");

        let first = &cluster.trials[0];
        assert_eq!(first.labels()[label::SEARCH], "reviews");
        assert!(first.spec.train.evaluate.gates.is_empty() && first.spec.train.evaluate.baseline.is_none());
        assert_eq!(
            (first.spec.train.compress.len(), config.spec.compress.len()),
            (0, 1),
            "the result alone is compressed"
        );
        assert_eq!(first.spec.train.output.to, "s3://out/", "where the job finds what its trials asked");
        let of_trial = build::train_config(&validate(first).unwrap(), &cluster.settings, &first.spec.train);
        let folder = format!("s3://out/reviews-01234567/trials/{}-0-0/artifact", first.name_any());
        assert_eq!(of_trial.artifact_to, folder);
        assert!(first.spec.train.hyperparameters.search.is_none() && first.owner_references().len() == 1);
        let steps = |child: &FineTuneJob| child.spec.train.hyperparameters.max_steps.unwrap();
        let asha = search["algorithm"] == "ASHA";
        assert_eq!(steps(first), if asha { 10 } else { 90 });
        assert_eq!(cluster.trials.iter().any(|child| steps(child) == 30), asha);
        if asha {
            assert!(best.results.len() == 3 && best.job.ends_with("-2"), "{best:?}");
        }
    }
}

#[test]
fn trials_of_a_cross_validated_job_are_judged_by_their_folds() {
    for search in [
        json!({"algorithm": "Random", "maxTrials": 6, "parallelism": 2}),
        json!({"algorithm": "ASHA", "maxTrials": 9, "parallelism": 2, "asha": {"minimumSteps": 10}}),
    ] {
        let mut job = searching(search);
        job.spec.train.hyperparameters.cross_validation = Some(CrossValidationSpec { folds: 4 });
        let mut cluster = Cluster::new(job);
        let (_, attempt) = cluster.run(|_| usize::MAX);
        let found = cluster.job.status.clone().unwrap().search.unwrap();
        assert!(found.text.contains("trials, best crossValidation/accuracy 0."), "{}", found.text);
        let folds = |h: &Hyperparameters| h.cross_validation.map(|spec| spec.folds);
        assert!(cluster.trials.iter().all(|trial| folds(&trial.spec.train.hyperparameters) == Some(4)));
        let config: TrainConfig = serde_json::from_str(&attempt.unwrap().config.data.unwrap()["train.json"]).unwrap();
        assert_eq!(folds(&config.spec.hyperparameters), Some(4));
    }
}

#[test]
fn an_operator_that_is_killed_continues_identically() {
    for search in [
        json!({"algorithm": "TPE", "maxTrials": 15, "parallelism": 1}),
        json!({"algorithm": "ASHA", "maxTrials": 18, "parallelism": 1, "asha": {"minimumSteps": 10}}),
    ] {
        let mut whole = Cluster::new(searching(search.clone()));
        whole.run(|_| usize::MAX);
        let trials = |cluster: &Cluster| cluster.job.status.clone().unwrap().search.unwrap().trials;
        for killed in 0..4 {
            let mut cluster = Cluster::new(searching(search.clone()));
            // Killed before any write, and between child and status.
            cluster.run(|turn| match (turn + killed) % 4 {
                0 => 0,
                1 => 1,
                _ => usize::MAX,
            });
            assert_eq!(trials(&cluster), trials(&whole), "{search}");
        }
    }
    // With several at a time another order of ends is another search, but nothing is lost and nothing is done twice.
    let search = json!({"algorithm": "TPE", "maxTrials": 15, "parallelism": 4});
    let mut cluster = Cluster::new(searching(search));
    cluster.run(|turn| [0, 2, 9, 1][turn % 4]);
    assert_eq!(cluster.trials.len(), 15);
}

#[test]
fn a_search_without_any_result_fails() {
    let mut job = searching(json!({"algorithm": "Random", "maxTrials": 4, "parallelism": 2}));
    let parameters = &mut job.spec.train.hyperparameters.search.as_mut().unwrap().parameters;
    parameters[0].range.as_mut().unwrap().min = 2e-3;
    let (phase, attempt) = Cluster::new(job).run(|_| usize::MAX);
    assert!(attempt.is_none());
    match phase {
        Phase::Failed { reason, message, .. } => {
            assert_eq!(reason, "SearchFailed");
            assert!(message.starts_with("all 4 trials failed") && message.contains("TooManyRestarts"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_users_error_in_a_trial_ends_the_search() {
    let mut cluster = Cluster::new(searching(json!({"algorithm": "Random", "maxTrials": 20, "parallelism": 3})));
    cluster.reconcile(usize::MAX);
    let mut conditions = Vec::new();
    let message = "data.sources[0]: no column 'text'";
    let succeeded = Condition::new(State::False, "UserError", message);
    condition::set(&mut conditions, types::SUCCEEDED, &succeeded, None, now());
    cluster.trials[1].status = Some(FineTuneJobStatus { conditions, ..FineTuneJobStatus::default() });
    let decision = decide(&cluster.observed(), now());
    let Phase::Failed { reason: "UserError", message, .. } = &decision.phase else { panic!("{:?}", decision.phase) };
    assert!(message.starts_with("trial ") && message.ends_with("): data.sources[0]: no column 'text'"), "{message}");
    assert!(!decision.create && decision.trials.is_empty(), "no trial follows");
    let running: Vec<String> = decision.remove_trials.into_iter().map(|trial| trial.name).collect();
    assert_eq!(running, [cluster.trials[0].name_any(), cluster.trials[2].name_any()], "the others stop");
    let search = decision.search.unwrap();
    assert_eq!((search.trials.len(), search.trials[1].state), (3, TrialState::Failed));
}

#[test]
fn trials_that_pay_for_labels_wait_for_the_first() {
    let mut job = searching(json!({"algorithm": "Random", "maxTrials": 6, "parallelism": 3}));
    let annotate = json!({"endpoint": {"url": "http://teacher/v1", "model": "m", "labels": ["a", "b"]}});
    job.spec.train.data.annotate = Some(serde_json::from_value(annotate).unwrap());
    let mut cluster = Cluster::new(job);
    for _ in 0..3 {
        cluster.reconcile(usize::MAX);
        assert_eq!(cluster.trials.len(), 1, "the others would ask about the same rows");
    }
    end(&mut cluster.trials[0]);
    cluster.reconcile(usize::MAX);
    let running = if cluster.trials[0].spec.train.hyperparameters.learning_rate > 1e-3 { 1 } else { 3 };
    assert_eq!(cluster.running(), running);
    cluster.run(|_| usize::MAX);
    assert_eq!(cluster.trials.len(), 6);
}

#[test]
fn suspension_and_deadline_reach_the_trials() {
    let mut cluster = Cluster::new(searching(json!({"algorithm": "Random", "maxTrials": 4, "parallelism": 2})));
    cluster.reconcile(usize::MAX);
    end(&mut cluster.trials[0]);
    cluster.job.spec.suspend = true;
    let decision = decide(&cluster.observed(), now());
    let running = cluster.trials[1].clone();
    let expected = vec![Identity::from_object(&running)];
    assert_eq!((&decision.phase, &decision.remove_trials), (&Phase::Suspended, &expected));
    assert!(decision.trials.is_empty());
    // It goes on with the trial that was stopped, and with a new one for the one that is over.
    cluster.job.spec.suspend = false;
    cluster.trials.truncate(1);
    cluster.reconcile(usize::MAX);
    assert_eq!(cluster.trials[1].name_any(), running.name_any());
    assert_eq!(cluster.trials.len(), 3);

    cluster.job.spec.active_deadline_seconds = Some(30);
    let status = cluster.job.status.as_mut().unwrap();
    status.start_time = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
        "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap(),
    ));
    let decision = decide(&cluster.observed(), now());
    assert!(matches!(decision.phase, Phase::Failed { reason: "DeadlineExceeded", .. }));
    assert_eq!(decision.remove_trials.len(), 2);
}

#[test]
fn a_wrong_search_is_refused_before_anything_runs() {
    let mut job = searching(json!({"maxTrials": 4}));
    job.spec.train.hyperparameters.search.as_mut().unwrap().parameters[1].values = Some(vec![0.5]);
    let Err(InvalidJob::Search(message)) = validate(&job) else { panic!() };
    assert!(message.contains("batchSize: 0.5 is not between 1 and 65536"), "{message}");
}

#[test]
fn names_of_trials_fit_whatever_the_parent_is_called() {
    assert_eq!(child_name("reviews", "0123456789", 0), "reviews-0123456789");
    assert_eq!(child_name("reviews", "0123456789", 2), "reviews-0123456789-2");
    let long = "a".repeat(52);
    let (one, other) = (child_name(&long, "0123456789", 9), child_name(&long[..51], "0123456789", 9));
    assert!(one.len() <= 52 && one != other);
    assert_eq!(child_name(&"a".repeat(39), "0123456789", 9).len(), 52);
}
