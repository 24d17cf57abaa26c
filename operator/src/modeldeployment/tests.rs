//! Table tests of targets, canaries, retraining and children.

mod adapters;

use std::{collections::BTreeMap, sync::Arc};

use athanor_contract::{
    Decimal,
    monitor::{MonitorConfig, MonitorStatus, Verdict},
    serve::{EngineConfig, LatencyHistogram, RevisionAnalysis, RouterConfig, ServeConfig, Speculation, Weights},
    train::{OffsetRange, TrainSummary},
};
use athanor_crds::{
    CandidateStatus, FineTuneJob, FineTuneJobStatus, ModelDeployment, ModelDeploymentStatus, ObservedSource,
    RevisionCounts, RevisionStatus, condition as types,
};
use clap::Parser;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use serde_json::json;

use super::{
    apply::Applied,
    build,
    children::{retraining, router},
    decide::{Decision, decide},
    dereference::Observed,
    names,
    observe::{adapters::Loaded, workload::Workload},
    status,
    validate::{InvalidDeployment, validate},
};
use crate::{
    condition::{self, State, Value},
    settings::Settings,
};

fn at(seconds: i64) -> Timestamp {
    "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap() + jiff::SignedDuration::from_secs(seconds)
}

fn deployment(spec: serde_json::Value) -> ModelDeployment {
    serde_json::from_value(json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "m", "namespace": "ns", "uid": "d1", "generation": 1}, "spec": spec,
    }))
    .unwrap()
}

fn retraining_spec() -> serde_json::Value {
    json!({
        "model": {"from": "s3://models/a"},
        "feedback": {"kafka": {"bootstrapServers": "kafka:9092"}},
        "monitor": {},
        "credentialsSecretName": "s3",
        "retrain": {"minimumSamples": 100, "cooldownSeconds": 600, "template": {"labels": {"team": "nlp"}, "spec": {
            "model": {"from": "s3://models/base", "task": "TextClassification"},
            "data": {"sources": [{"name": "reviews", "uri": "s3://data/reviews.jsonl"}]},
            "evaluate": {"gates": [{"metric": "Accuracy", "minimumGain": "0.01"}]},
            "output": {"to": "s3://out"}}}},
    })
}

/// A FineTuneJob with an outcome (`None`: it runs) that was over after so many seconds.
fn job(name: &str, outcome: Option<(&str, &'static str)>, end: i64, digest: &str) -> Arc<FineTuneJob> {
    let mut job = crate::finetunejob::tests::job(name, &format!("uid-{name}"));
    let mut conditions = Vec::new();
    let state = match outcome.map(|(status, _)| status) {
        Some("True") => State::True,
        Some(_) => State::False,
        None => State::Unknown,
    };
    let succeeded = Value::new(state, outcome.map_or("Running", |(_, reason)| reason), "");
    condition::set(&mut conditions, types::SUCCEEDED, &succeeded, None, at(end));
    job.status = Some(FineTuneJobStatus {
        conditions,
        completion_time: outcome.map(|_| Time(at(end))),
        summary: outcome.map(|_| TrainSummary {
            artifact: format!("s3://out/{name}/artifact"),
            model_digest: digest.into(),
            ..TrainSummary::default()
        }),
        ..FineTuneJobStatus::default()
    });
    Arc::new(job)
}

fn revision(name: &str, ready: bool) -> RevisionStatus {
    RevisionStatus {
        name: name.into(),
        model_uri: "s3://models/a".into(),
        ready_at: ready.then(|| Time(at(0))),
        ..RevisionStatus::default()
    }
}

fn workload(available: i32) -> Workload {
    Workload { desired: 1, available, answering: available, replicas: 1, stuck: None }
}

fn observed(deployment: ModelDeployment) -> Observed {
    Observed {
        deployment,
        source_job: None,
        adapter_jobs: BTreeMap::new(),
        retrainings: vec![],
        revisions: BTreeMap::new(),
        router: Some(workload(1)),
        has_monitor: false,
        waiting: BTreeMap::new(),
        loaded: Loaded::default(),
        counts: None,
        routers: String::new(),
    }
}

fn decision(observed: &Observed, now: i64) -> Decision {
    decide(&validate(&observed.deployment).unwrap(), observed, at(now))
}

/// The current revision's name, the candidate's with its weight, and the reason of Progressing.
fn shown(decision: &Decision) -> (Option<String>, Option<(String, u32)>, &'static str) {
    let candidate = decision.rollout.candidate.as_ref();
    (
        decision.rollout.current.as_ref().map(|current| current.name.clone()),
        candidate.map(|candidate| (candidate.revision.name.clone(), candidate.weight)),
        decision.rollout.progressing.reason,
    )
}

const OLD: &str = "m-aaaaaaaa";
const NEW: &str = "m-bbbbbbbb";

/// A deployment with a current revision and a retraining that passed its gates.
fn canary(candidate: Option<CandidateStatus>) -> Observed {
    let mut subject = observed(deployment(json!({"model": {"from": "s3://models/a"}})));
    subject.deployment.status = Some(ModelDeploymentStatus {
        current_revision: Some(RevisionStatus {
            job: Some("first".into()),
            completed_at: Some(Time(at(1))),
            ..revision(OLD, true)
        }),
        candidate,
        source: Some(ObservedSource { value: "s3://models/a".into(), since: None }),
        ..ModelDeploymentStatus::default()
    });
    subject.retrainings = vec![job("second", Some(("True", "Succeeded")), 50, "bbbbbbbbcc")];
    subject.revisions = [(OLD.to_owned(), workload(1)), (NEW.to_owned(), workload(1))].into();
    subject.counts =
        Some([(NEW.to_owned(), RevisionAnalysis { requests: 100, errors: 3, ..RevisionAnalysis::default() })].into());
    subject
}

fn at_step(step_index: u32, weight: u32, since: i64) -> Option<CandidateStatus> {
    let revision = RevisionStatus {
        model_uri: "s3://out/second/artifact".into(),
        job: Some("second".into()),
        completed_at: Some(Time(at(50))),
        ..revision(NEW, true)
    };
    Some(CandidateStatus {
        revision,
        step_index,
        weight,
        since: Time(at(since)),
        started_at: Some(Time(at(50))),
        message: String::new(),
        baseline: RevisionCounts { requests: 40, errors: 3, ..RevisionCounts::default() },
        champion_baseline: RevisionCounts::default(),
        routers: String::new(),
        latency_limit_ms: None,
    })
}

#[test]
fn the_newest_good_model_is_the_target() {
    let by_job = || deployment(json!({"model": {"fromJob": {"name": "first"}}}));
    let mut subject = observed(by_job());
    assert_eq!((shown(&decision(&subject, 60)).0, decision(&subject, 60).ready.reason), (None, "JobNotFound"));
    subject.source_job = Some(job("first", None, 0, ""));
    assert_eq!(decision(&subject, 60).ready.reason, "WaitingForJob");
    subject.source_job = Some(job("first", Some(("False", "GateFailed")), 1, "aaaaaaaa"));
    assert_eq!((shown(&decision(&subject, 60)).0, decision(&subject, 60).ready.reason), (None, "JobFailed"));
    subject.source_job = Some(job("first", Some(("True", "Succeeded")), 1, "aaaaaaaa11"));
    assert_eq!(shown(&decision(&subject, 60)).0.as_deref(), Some(OLD), "the first revision takes all traffic at once");

    // Served for a while; its job is deleted, and a retraining that failed its gates is newer.
    let current = decision(&subject, 60).rollout.current.unwrap();
    let ready = RevisionStatus { ready_at: Some(Time(at(60))), ..current };
    let source = decision(&subject, 60).source;
    subject.deployment.status = Some(ModelDeploymentStatus {
        current_revision: Some(ready),
        source: Some(source),
        ..ModelDeploymentStatus::default()
    });
    subject.source_job = None;
    subject.retrainings = vec![job("second", Some(("False", "GateFailed")), 70, "bbbbbbbb")];
    assert_eq!(shown(&decision(&subject, 80)), (Some(OLD.into()), None, "Stable"));

    // The user changes the model after a retraining had ended: the user's choice counts.
    let mut subject = canary(None);
    subject.deployment.spec.model.from = Some("s3://models/z".into());
    let wanted = names::revision("m", None, "s3://models/z");
    assert_eq!(shown(&decision(&subject, 60)), (Some(OLD.into()), Some((wanted, 0)), "WaitingForPods"));
}

#[test]
fn a_canary_goes_on_holds_or_rolls_back() {
    let counts = |requests, errors, latency_ms| {
        let mut buckets = vec![0; LatencyHistogram::BUCKETS];
        buckets[LatencyHistogram::bucket(latency_ms)] = requests;
        Some(RevisionAnalysis {
            requests,
            errors,
            latency: LatencyHistogram::new(buckets),
            ..RevisionAnalysis::default()
        })
    };
    // Candidate so far, its available pods, counts, seconds now; current, candidate's weight, reason.
    let table = [
        ("new", None, 0, counts(0, 0, 0.0), 60, OLD, Some(0), "WaitingForPods"),
        ("ready", at_step(0, 0, 55), 1, counts(40, 3, 0.0), 60, OLD, Some(10), "Canary"),
        ("ready but routers do not answer", at_step(0, 0, 55), 1, None, 60, OLD, Some(0), "WaitingForPods"),
        ("pausing", at_step(0, 10, 58), 1, counts(140, 3, 0.0), 60, OLD, Some(10), "Canary"),
        ("passed", at_step(0, 10, 55), 1, counts(140, 3, 0.0), 60, OLD, Some(50), "Canary"),
        ("too few requests", at_step(0, 10, 50), 1, counts(89, 3, 0.0), 60, OLD, Some(10), "Inconclusive"),
        ("few requests, all failed", at_step(0, 10, 50), 1, counts(49, 12, 0.0), 60, OLD, None, "RolledBack"),
        ("few requests, one failed", at_step(0, 10, 50), 1, counts(49, 4, 0.0), 60, OLD, Some(10), "Inconclusive"),
        ("above the limit by chance", at_step(0, 10, 50), 1, counts(140, 5, 0.0), 60, OLD, Some(10), "Inconclusive"),
        ("a router is silent", at_step(0, 10, 50), 1, None, 60, OLD, Some(10), "Inconclusive"),
        ("a router began again", at_step(1, 50, 50), 1, counts(39, 0, 0.0), 60, OLD, Some(50), "Canary"),
        ("errors, before the pause is over", at_step(0, 10, 59), 1, counts(140, 23, 0.0), 60, OLD, None, "RolledBack"),
        ("slow", at_step(0, 10, 55), 1, counts(140, 3, 250.0), 60, OLD, None, "RolledBack"),
        ("slow, before the pause is over", at_step(0, 10, 59), 1, counts(140, 3, 250.0), 60, OLD, None, "RolledBack"),
        ("as slow as allowed", at_step(0, 10, 55), 1, counts(140, 3, 200.0), 60, OLD, Some(50), "Canary"),
        ("not whole after the pause", at_step(0, 10, 55), 0, counts(140, 3, 0.0), 60, OLD, Some(10), "Inconclusive"),
        ("dead with all the traffic", at_step(2, 100, 55), 0, counts(140, 3, 0.0), 60, OLD, None, "RolledBack"),
        (
            "dead with all the traffic, which is little",
            at_step(2, 100, 55),
            0,
            counts(41, 4, 0.0),
            60,
            OLD,
            None,
            "RolledBack",
        ),
        ("dead before the pause is over", at_step(2, 100, 59), 0, counts(41, 3, 0.0), 60, OLD, None, "RolledBack"),
        ("dead, and a router is silent", at_step(2, 100, 59), 0, None, 60, OLD, None, "RolledBack"),
        ("dead with half of the traffic", at_step(1, 50, 59), 0, counts(41, 3, 0.0), 60, OLD, Some(50), "Canary"),
        ("last step", at_step(2, 100, 55), 1, counts(140, 3, 0.0), 60, NEW, None, "Promoted"),
    ];
    for (case, candidate, available, counts, now, current, weight, reason) in table {
        let mut subject = canary(candidate);
        subject.deployment.spec.rollout.canary.analysis.max_latency_p95_ms = Some(200);
        let running = subject.deployment.status.as_mut().unwrap().candidate.as_mut();
        running.into_iter().for_each(|candidate| candidate.latency_limit_ms = Some(200));
        subject.revisions.insert(NEW.into(), workload(available));
        subject.counts = counts.map(|counts| [(NEW.to_owned(), counts)].into());
        let decision = decision(&subject, now);
        assert_eq!(
            shown(&decision),
            (Some(current.into()), weight.map(|weight| (NEW.to_owned(), weight)), reason),
            "{case}"
        );
        let weights = router::weights("m", &decision.rollout);
        assert_eq!(weights.iter().map(|revision| revision.weight).sum::<u32>(), 100, "{case}");
        assert!(decision.remove.is_empty(), "{case}: nothing that has or just lost traffic is deleted");
    }
}

#[test]
fn a_candidate_whose_deployment_changes_is_not_dead() {
    let mut subject = canary(at_step(2, 100, 59));
    subject.counts =
        Some([(NEW.to_owned(), RevisionAnalysis { requests: 41, errors: 3, ..RevisionAnalysis::default() })].into());
    let mut reason = |workload: Option<Workload>| {
        subject.revisions.remove(NEW);
        subject.revisions.extend(workload.map(|workload| (NEW.to_owned(), workload)));
        decision(&subject, 60).rollout.progressing.reason
    };
    // Another number of replicas that has not been observed yet, or a new template whose pods start.
    assert_eq!(reason(Some(Workload { answering: 1, ..workload(0) })), "Canary");
    assert_eq!(reason(Some(Workload { desired: 0, ..workload(0) })), "Canary", "the user scaled it to zero");
    assert_eq!(reason(Some(workload(0))), "RolledBack");
    assert_eq!(reason(None), "RolledBack", "somebody deleted the Deployment");
}

#[test]
fn a_candidate_is_compared_with_the_champion_in_the_same_step() {
    let counts =
        |requests, errors, refused| RevisionAnalysis { requests, errors, refused, ..RevisionAnalysis::default() };
    // The candidate's counts since its baseline of 40 requests and 3 errors, the champion's, reason, part of the message.
    let table = [
        ("both fail as often", counts(140, 8, 0), counts(900, 45, 0), "Canary", ""),
        (
            "the candidate fails more often",
            counts(140, 33, 0),
            counts(900, 9, 0),
            "RolledBack",
            "30 of 100 requests failed, of the champion's 9 of 900",
        ),
        (
            "the candidate refuses",
            counts(40, 3, 60),
            counts(900, 0, 9),
            "RolledBack",
            "and 60 were refused, of the champion's 9",
        ),
        ("both refuse", counts(140, 3, 60), counts(900, 0, 540), "Canary", ""),
        (
            "the candidate is wrong more often",
            RevisionAnalysis { feedback_total: 80, feedback_correct: 40, ..counts(140, 3, 0) },
            RevisionAnalysis { feedback_total: 800, feedback_correct: 760, ..counts(900, 0, 0) },
            "RolledBack",
            "and 40 of 80 answers with feedback were wrong, of the champion's 40 of 800",
        ),
    ];
    for (case, candidate, champion, reason, message) in table {
        let mut subject = canary(at_step(0, 10, 55));
        subject.deployment.spec.rollout.canary.analysis.max_accuracy_loss = Decimal::new(0.05);
        subject.revisions.insert(NEW.into(), workload(1));
        subject.counts = Some([(NEW.to_owned(), candidate), (OLD.to_owned(), champion)].into());
        let progressing = decision(&subject, 60).rollout.progressing;
        assert_eq!(progressing.reason, reason, "{case}: {}", progressing.message);
        assert!(progressing.message.contains(message), "{case}: {}", progressing.message);
    }
}

/// Counts of so many answers of which some took 1000 ms and the others 1 ms.
fn timed(answers: u64, slow: u64) -> RevisionAnalysis {
    let mut buckets = vec![0; LatencyHistogram::BUCKETS];
    buckets[LatencyHistogram::bucket(1.0)] = answers - slow;
    buckets[LatencyHistogram::bucket(1000.0)] = slow;
    RevisionAnalysis { requests: answers, latency: LatencyHistogram::new(buckets), ..RevisionAnalysis::default() }
}

#[test]
fn a_candidate_is_too_slow_if_that_is_shown_and_the_champion_is_not() {
    // Answers of the candidate in the step and slow ones among them, the champion's, reason, part of the message.
    let rolled_back =
        "30 of 100 answers (30.0 %) took longer than 200 ms (maxLatencyP95Ms), of the champion's 9 of 900";
    let table = [
        ("slow", (100, 30), (900, 9), "RolledBack", rolled_back),
        ("slow by chance", (100, 8), (900, 9), "Inconclusive", "more answers are slower than maxLatencyP95Ms"),
        ("within", (100, 5), (900, 9), "Canary", ""),
        ("both are slow", (100, 30), (900, 270), "Canary", ""),
        ("few answers", (10, 10), (90, 0), "RolledBack", "10 of 10 answers (100.0 %)"),
    ];
    for (case, (answers, slow), (all, champion_slow), reason, message) in table {
        let mut subject = canary(at_step(0, 10, 50));
        let analysis = &mut subject.deployment.spec.rollout.canary.analysis;
        analysis.max_latency_p95_ms = Some(200);
        let candidate = subject.deployment.status.as_mut().unwrap().candidate.as_mut().unwrap();
        // What came before the step, all of it slow, does not count.
        candidate.baseline = RevisionCounts { requests: 40, answered: 40, slow: 40, ..RevisionCounts::default() };
        candidate.latency_limit_ms = Some(200);
        let counts = [(NEW.to_owned(), timed(40 + answers, 40 + slow)), (OLD.to_owned(), timed(all, champion_slow))];
        subject.counts = Some(counts.into());
        let progressing = decision(&subject, 60).rollout.progressing;
        assert_eq!(progressing.reason, reason, "{case}: {}", progressing.message);
        assert!(progressing.message.contains(message), "{case}: {}", progressing.message);
        // With another limit other answers are slow: the step begins again, and without one none is.
        for limit in [Some(2_000), None] {
            subject.deployment.spec.rollout.canary.analysis.max_latency_p95_ms = limit;
            let again = decision(&subject, 60).rollout.candidate.unwrap();
            let begun = (again.weight, again.since.0, again.latency_limit_ms, again.baseline.slow);
            assert_eq!(begun, (10, at(60), limit, 0), "{case}");
            assert_eq!(again.baseline.answered, 40 + answers);
        }
    }
}

#[test]
fn a_running_step_is_looked_at_less_often_as_it_grows_older() {
    let wait = |age: i64, pause: u32| {
        let mut subject = canary(at_step(0, 10, 0));
        let canary = &mut subject.deployment.spec.rollout.canary;
        canary.steps[0].pause_seconds = pause;
        // Without a verdict: nobody asks the model.
        subject.counts =
            Some([(NEW.to_owned(), RevisionAnalysis { requests: 40, errors: 3, ..Default::default() })].into());
        decision(&subject, age).rollout.wait.unwrap().as_secs_f64()
    };
    let inconclusive = [1, 20, 100, 300, 100_000].map(|age| wait(age, 0));
    assert_eq!(inconclusive, [1.0, 1.0, 5.0, 15.0, 15.0]);
    // During the pause as well, and its end is not missed.
    assert_eq!([(100, 3_600), (300, 3_600), (300, 303)].map(|(age, pause)| wait(age, pause)), [5.0, 15.0, 3.0]);
}

#[test]
fn a_rollout_without_a_deadline_of_its_own_ends_seven_days_after_its_pauses() {
    let mut subject = canary(at_step(0, 10, 50));
    subject.deployment.spec.rollout.canary.steps[1].pause_seconds = 86_400;
    subject.counts =
        Some([(NEW.to_owned(), RevisionAnalysis { requests: 45, errors: 3, ..Default::default() })].into());
    // Two pauses of 5 s and one of a day; the rollout began at 50 s.
    let deadline = 50 + 10 + 8 * 86_400;
    let held = decision(&subject, deadline - 1);
    assert_eq!((shown(&held).2, held.rollout.wait), ("Inconclusive", Some(std::time::Duration::from_secs(1))));
    let over = decision(&subject, deadline).rollout.progressing;
    assert_eq!(over.reason, "RolledBack");
    assert!(
        over.message.contains("no verdict within 691210 s (the default of deadlineSeconds): on hold"),
        "{}",
        over.message
    );
}

#[test]
fn a_step_begins_again_with_other_routers() {
    let mut subject = canary(at_step(1, 50, 50));
    subject.counts =
        Some([(NEW.to_owned(), RevisionAnalysis { requests: 140, errors: 3, ..Default::default() })].into());
    assert_eq!(shown(&decision(&subject, 60)).1, Some((NEW.to_owned(), 100)), "the step is over");
    subject.routers = "another".into();
    let again = decision(&subject, 60);
    assert_eq!(shown(&again).1, Some((NEW.to_owned(), 50)));
    let candidate = again.rollout.candidate.unwrap();
    assert_eq!((candidate.routers.as_str(), candidate.baseline.requests, candidate.since.0), ("another", 140, at(60)));
}

#[test]
fn a_rolled_back_revision_is_tried_again_when_the_user_asks_once() {
    let mut subject = canary(None);
    subject.deployment.status.as_mut().unwrap().failed_revisions = vec![NEW.into()];
    let ask = |subject: &mut Observed, value: &str| {
        let annotation = (athanor_crds::RETRY_ROLLOUT_ANNOTATION.to_owned(), value.to_owned());
        subject.deployment.metadata.annotations = Some([annotation].into());
    };
    ask(&mut subject, "monday");
    let first = decision(&subject, 60);
    assert_eq!((first.rollout.failed.len(), shown(&first).1), (0, Some((NEW.to_owned(), 10))));
    let mut next = status::next(&subject, &first, Ok(&Applied::assumed()), at(60));
    assert_eq!(next.retried_rollout.as_deref(), Some("monday"));
    // It fails once more, and stays failed until the annotation has another value.
    (next.candidate, next.failed_revisions) = (None, vec![NEW.into()]);
    subject.deployment.status = Some(next);
    assert_eq!(decision(&subject, 70).rollout.failed, [NEW]);
    ask(&mut subject, "tuesday");
    assert!(decision(&subject, 70).rollout.failed.is_empty());
}

#[test]
fn a_rollout_without_a_verdict_ends_at_its_deadline() {
    for (available, message) in [(1, "a verdict needs 50 requests"), (0, "0 of 1 pods")] {
        let mut subject = canary(at_step(0, if available == 0 { 0 } else { 10 }, 50));
        subject.deployment.spec.rollout.canary.deadline_seconds = Some(100);
        subject.revisions.insert(NEW.into(), workload(available));
        subject.counts =
            Some([(NEW.to_owned(), RevisionAnalysis { requests: 45, errors: 3, ..Default::default() })].into());
        assert_eq!(shown(&decision(&subject, 149)).1.map(|(name, _)| name), Some(NEW.to_owned()));
        let over = decision(&subject, 150);
        assert_eq!(shown(&over), (Some(OLD.into()), None, "RolledBack"));
        let told = &over.rollout.progressing.message;
        assert!(told.contains("no verdict within 100 s (deadlineSeconds)") && told.contains(message), "{told}");
        assert_eq!(over.rollout.failed, [NEW]);
    }
}

#[test]
fn a_revision_without_traffic_is_deleted_after_its_drain_and_a_failed_one_is_not_tried_again() {
    let mut subject = canary(at_step(0, 10, 59));
    subject.counts =
        Some([(NEW.to_owned(), RevisionAnalysis { requests: 140, errors: 90, ..RevisionAnalysis::default() })].into());
    let first = decision(&subject, 60);
    assert!(
        first.rollout.progressing.message.contains("87 of 100 requests failed"),
        "{}",
        first.rollout.progressing.message
    );
    subject.deployment.status = Some(status::next(&subject, &first, Ok(&Applied::assumed()), at(60)));
    let later = decision(&subject, 61);
    assert_eq!((shown(&later), later.remove.len()), ((Some(OLD.into()), None, "Stable"), 0));
    let next = status::next(&subject, &later, Ok(&Applied::assumed()), at(61));
    let progressing = condition::get(&next.conditions, types::PROGRESSING).unwrap();
    assert!(progressing.reason == "RolledBack" && progressing.message.contains("87 of 100"), "the reason stays");
    let drained = decision(&subject, 200);
    assert_eq!((drained.remove, drained.rollout.previous), (vec![NEW.to_owned()], None));
}

#[test]
fn a_revision_that_never_answered_is_replaced_without_a_canary() {
    let mut subject = canary(None);
    subject.revisions.insert(OLD.into(), workload(0));
    let status = subject.deployment.status.as_mut().unwrap();
    status.current_revision.as_mut().unwrap().ready_at = None;
    let decision = decision(&subject, 60);
    assert_eq!(shown(&decision).0.as_deref(), Some(NEW));
    assert_eq!(decision.remove, [OLD]);
}

#[test]
fn a_revision_that_answers_with_some_of_its_pods_is_kept() {
    let mut subject = canary(None);
    subject.revisions.insert(OLD.into(), Workload { desired: 3, available: 2, answering: 2, replicas: 3, stuck: None });
    let status = subject.deployment.status.as_mut().unwrap();
    status.current_revision.as_mut().unwrap().ready_at = None;
    let decision = decision(&subject, 60);
    assert_eq!(shown(&decision).0.as_deref(), Some(OLD));
    assert!(decision.remove.is_empty());
}

#[test]
fn a_long_last_message_of_a_pod_fits_the_status() {
    let mut subject = canary(None);
    subject.revisions.insert(NEW.into(), workload(0));
    subject.waiting.insert(NEW.into(), "x".repeat(5000));
    let candidate = decision(&subject, 60).rollout.candidate.unwrap();
    assert_eq!(candidate.message.chars().count(), 1024);
}

#[test]
fn another_model_in_the_specification_forgets_what_failed() {
    let mut subject = canary(None);
    subject.deployment.status.as_mut().unwrap().failed_revisions = vec![NEW.into()];
    assert_eq!(decision(&subject, 60).rollout.failed, [NEW]);
    subject.deployment.spec.model.from = Some("s3://models/b".into());
    assert!(decision(&subject, 60).rollout.failed.is_empty());
}

#[test]
fn what_failed_stays_failed_however_much_fails_after_it() {
    let mut subject = canary(None);
    let mut jobs = vec![];
    let mut fail = |subject: &mut Observed, number: i64| {
        jobs.push(job(&format!("r{number}"), Some(("True", "Succeeded")), 100 + number, &format!("{number:08x}")));
        subject.retrainings = jobs.clone();
        let decided = decision(subject, 5_000);
        let candidate = decided.rollout.candidate.clone().expect("the newest is tried");
        assert_eq!(candidate.revision.job, Some(format!("r{number}")));
        subject.deployment.status = Some(status::next(subject, &decided, Ok(&Applied::assumed()), at(5_000)));
        // Its pods crash.
        let stuck = Workload { stuck: Some("crashed".into()), ..workload(0) };
        subject.revisions.insert(candidate.revision.name, stuck);
        let over = decision(subject, 5_001);
        assert_eq!(over.rollout.progressing.reason, "RolledBack");
        subject.deployment.status = Some(status::next(subject, &over, Ok(&Applied::assumed()), at(5_001)));
    };
    for number in 0..40 {
        fail(&mut subject, number);
    }
    let status = subject.deployment.status.as_ref().unwrap();
    assert_eq!((status.failed_revisions.len(), &status.settled_until), (32, &Some(Time(at(139)))));
    assert_eq!(shown(&decision(&subject, 6_000)).1, None, "none of the 40 is tried again");
    // Unless the user asks for it: the newest, whose crashed pods are gone.
    subject.revisions.retain(|_, workload| workload.stuck.is_none());
    subject.deployment.metadata.annotations =
        Some([(athanor_crds::RETRY_ROLLOUT_ANNOTATION.to_owned(), "now".to_owned())].into());
    let again = decision(&subject, 6_000).rollout;
    assert_eq!(again.candidate.unwrap().revision.job.as_deref(), Some("r39"));
    assert_eq!(again.settled_until, None);
}

#[test]
fn the_part_of_a_monitor_that_is_gone_is_removed() {
    let mut subject = drifted();
    assert!(!decision(&subject, 200).clear_monitor);
    monitor(&mut subject).topic = "another".into();
    let value = decision(&subject, 200).drifted.unwrap();
    assert_eq!((value.state, value.reason), (State::Unknown, "TooFewEvents"), "another topic's verdict");
    (subject.deployment.spec.feedback, subject.deployment.spec.monitor) = (None, None);
    subject.deployment.spec.retrain = None;
    subject.has_monitor = true;
    let removed = decision(&subject, 200);
    assert_eq!((removed.remove_monitor, removed.clear_monitor), (true, false), "it may still write");
    subject.has_monitor = false;
    let removed = decision(&subject, 200);
    assert_eq!((removed.remove_monitor, removed.clear_monitor, removed.drifted), (false, true, None));
    subject.deployment.status.as_mut().unwrap().monitor = None;
    assert!(!decision(&subject, 200).clear_monitor);
}

/// A deployment that has drifted.
fn drifted() -> Observed {
    let mut subject = observed(deployment(retraining_spec()));
    let name = names::revision("m", None, "s3://models/a");
    let range = |partition, begin, end| OffsetRange { partition, begin, end };
    subject.deployment.status = Some(ModelDeploymentStatus {
        current_revision: Some(revision(&name, true)),
        monitor: Some(MonitorStatus {
            revision: name.clone(),
            verdict: Verdict::Drifted,
            labelled: 100,
            ranges: vec![range(0, 5, 90), range(1, 7, 7)],
            ..MonitorStatus::default()
        }),
        ..ModelDeploymentStatus::default()
    });
    subject.revisions = [(name, workload(1))].into();
    subject
}

/// The monitor's part of the status.
fn monitor(subject: &mut Observed) -> &mut MonitorStatus {
    subject.deployment.status.as_mut().unwrap().monitor.as_mut().unwrap()
}

#[test]
fn a_retraining_starts_when_all_conditions_are_met() {
    type Change = fn(&mut Observed);
    let table: Vec<(&str, Change)> = vec![
        ("Training", |_| {}),
        ("NotDrifted", |subject| monitor(subject).verdict = Verdict::Stable),
        ("NoVerdict", |subject| monitor(subject).revision = "m-old".into()),
        ("TooFewSamples", |subject| monitor(subject).labelled = 99),
        ("NoEvents", |subject| monitor(subject).ranges.clear()),
        ("NoVerdict", |subject| monitor(subject).topic = "another".into()),
        ("Cooldown", |subject| subject.deployment.status.as_mut().unwrap().last_retrained_at = Some(Time(at(100)))),
        ("WaitingForApproval", |subject| {
            subject.deployment.spec.retrain.as_mut().unwrap().approval = athanor_crds::Approval::Manual;
        }),
        ("NoNewEvents", |subject| {
            let new = decision(subject, 200).retraining.create.unwrap();
            let mut before = Arc::unwrap_or_clone(job("m-before", Some(("False", "GateFailed")), 50, ""));
            before.spec = retraining::build(&validate(&subject.deployment).unwrap(), &new).unwrap().spec;
            before.spec.ttl_seconds_after_finished = Some(60);
            subject.retrainings = vec![Arc::new(before)];
        }),
    ];
    for (reason, change) in table {
        let mut subject = drifted();
        change(&mut subject);
        let retraining = decision(&subject, 200).retraining;
        assert_eq!(retraining.condition.unwrap().reason, reason);
        assert_eq!(retraining.create.is_some(), reason == "Training", "{reason}");
    }
    let mut approved = drifted();
    let name = decision(&approved, 200).retraining.create.unwrap().name;
    approved.deployment.spec.retrain.as_mut().unwrap().approval = athanor_crds::Approval::Manual;
    approved.deployment.metadata.annotations =
        Some([(athanor_crds::APPROVE_ANNOTATION.to_owned(), name.clone())].into());
    assert_eq!(decision(&approved, 200).retraining.create.unwrap().name, name);
}

#[test]
fn the_condition_says_whether_gates_rest_on_feedback_alone() {
    let warning = "its gates rest on feedback alone: add one on the rows of a source that you trust";
    let gate = |sources: &[&str]| match sources {
        [] => json!({"metric": "Accuracy", "minimumGain": "0.01"}),
        _ => json!({"metric": "Accuracy", "minimumGain": "0.01", "sources": sources}),
    };
    let both = gate(&["feedback", "reviews"]);
    // The template's gates, and the part of the message that they lead to.
    let table = [
        (vec![gate(&[])], ""),
        (vec![gate(&["feedback"])], warning),
        (vec![gate(&["feedback"]), gate(&["feedback"])], warning),
        (vec![gate(&["feedback"]), gate(&["reviews"])], ""),
        (vec![gate(&["feedback"]), gate(&[])], ""),
        (vec![both], ""),
        (vec![], "it has no gates, so any new model is served"),
    ];
    for (gates, part) in table {
        let mut spec = retraining_spec();
        spec["retrain"]["template"]["spec"]["evaluate"]["gates"] = gates.clone().into();
        let mut subject = drifted();
        subject.deployment.spec = deployment(spec).spec;
        let check = |subject: &Observed, expected: (&str, State)| {
            let condition = decision(subject, 200).retraining.condition.unwrap();
            assert_eq!((condition.reason, condition.state), expected);
            let message = condition.message;
            assert!(message.contains(part), "{gates:?}: {message}");
            let warns = ["feedback alone", "no gates"].iter().any(|text| message.contains(text));
            assert_eq!(warns, !part.is_empty(), "{gates:?}: {message}");
        };
        // When it is proposed, when it starts, and while it runs.
        subject.deployment.spec.retrain.as_mut().unwrap().approval = athanor_crds::Approval::Manual;
        check(&subject, ("WaitingForApproval", State::False));
        subject.deployment.spec.retrain.as_mut().unwrap().approval = athanor_crds::Approval::Automatic;
        check(&subject, ("Training", State::True));
        let started = decision(&subject, 200);
        let name = started.retraining.create.clone().unwrap().name;
        subject.deployment.status = Some(status::next(&subject, &started, Ok(&Applied::assumed()), at(200)));
        subject.retrainings = vec![job(&name, None, 0, "")];
        check(&subject, ("Training", State::True));
    }
    // The source may have another name.
    let mut subject = drifted();
    subject.deployment.spec.retrain.as_mut().unwrap().source_name = "users".into();
    let template = &mut subject.deployment.spec.retrain.as_mut().unwrap().template;
    template.spec.train.evaluate.gates[0].sources = Some(vec!["users".into()]);
    assert!(decision(&subject, 200).retraining.condition.unwrap().message.contains(warning));
}

#[test]
fn a_proposal_stays_the_same_until_it_is_approved_or_replaced() {
    let mut subject = drifted();
    subject.deployment.spec.retrain.as_mut().unwrap().approval = athanor_crds::Approval::Manual;
    let proposed = |subject: &mut Observed, now: i64| {
        let decision = decision(subject, now);
        subject.deployment.status = Some(status::next(subject, &decision, Ok(&Applied::assumed()), at(now)));
        decision.retraining.proposal
    };
    let first = proposed(&mut subject, 200).unwrap();
    // Events go on, and the name that the user was told stays.
    monitor(&mut subject).ranges[0].end = 500;
    assert_eq!(proposed(&mut subject, 210).unwrap(), first);
    let mut approved = subject.deployment.clone();
    approved.metadata.annotations = Some([(athanor_crds::APPROVE_ANNOTATION.to_owned(), first.job.clone())].into());
    let unapproved = std::mem::replace(&mut subject.deployment, approved);
    let started = decision(&subject, 220).retraining;
    assert_eq!(started.create.map(|new| (new.name, new.ranges)), Some((first.job.clone(), first.ranges.clone())));
    assert_eq!(started.proposal, None);
    // A template that an operator reads with another default keeps the name, and so does another revision, whose events
    // are others; without drift there is no proposal.
    subject.deployment = unapproved;
    subject.deployment.spec.retrain.as_mut().unwrap().template.spec.train.hyperparameters.seed += 1;
    assert_eq!(proposed(&mut subject, 230).unwrap(), first);
    subject.deployment.status.as_mut().unwrap().retraining_proposal.as_mut().unwrap().revision = "m-old".into();
    let second = proposed(&mut subject, 230).unwrap();
    assert_eq!((&second.job, second.ranges[0].end), (&first.job, 500));
    monitor(&mut subject).verdict = Verdict::Stable;
    assert_eq!(proposed(&mut subject, 240), None);
}

#[test]
fn retrainings_without_another_model_double_the_cooldown() {
    for (outcome, digest) in [(("False", "GateFailed"), ""), (("True", "Succeeded"), "cccccccc")] {
        let mut subject = drifted();
        subject.deployment.spec.retrain.as_mut().unwrap().cooldown_seconds = 100;
        monitor(&mut subject).revision = "m-cccccccc".into();
        subject.revisions = [("m-cccccccc".to_owned(), workload(1))].into();
        let current = subject.deployment.status.as_mut().unwrap().current_revision.as_mut().unwrap();
        (current.name, current.model_digest) = ("m-cccccccc".into(), Some("cccccccc".into()));
        (current.job, current.completed_at) = (Some("m-1".into()), Some(Time(at(0))));
        let mut now = 1_000;
        for cooldown in [200, 400, 800] {
            let decided = decision(&subject, now);
            let name = decided.retraining.create.clone().unwrap().name;
            subject.deployment.status = Some(status::next(&subject, &decided, Ok(&Applied::assumed()), at(now)));
            subject.retrainings = vec![job(&name, Some(outcome), now, digest)];
            let over = decision(&subject, now + 1);
            let message = &over.retraining.last.as_ref().unwrap().message;
            assert_eq!(message.contains("is the one that is served"), outcome.0 == "True", "{message}");
            subject.deployment.status = Some(status::next(&subject, &over, Ok(&Applied::assumed()), at(now + 1)));
            // New events, so that there is something to train on.
            monitor(&mut subject).ranges[0].end += 10;
            let reason = |subject: &Observed, now| decision(subject, now).retraining.condition.unwrap().reason;
            assert_eq!(reason(&subject, now + cooldown - 1), "Cooldown");
            assert_eq!(reason(&subject, now + cooldown), "Training");
            now += cooldown;
        }
        let status = subject.deployment.status.as_ref().unwrap();
        assert_eq!(status.fruitless_retrainings, 3);
    }
}

#[test]
fn a_retraining_is_exact_idempotent_and_followed_to_its_end() {
    let mut subject = drifted();
    let first = decision(&subject, 200);
    let new = first.retraining.create.clone().unwrap();
    assert_eq!(
        decision(&subject, 300).retraining.create.unwrap().name,
        new.name,
        "the same events are the same retraining"
    );
    let validated = validate(&subject.deployment).unwrap();
    let built = retraining::build(&validated, &new).unwrap();
    let source = built.spec.train.data.sources.last().unwrap();
    let kafka = source.kafka.as_ref().unwrap();
    assert_eq!((source.name.as_str(), kafka.topic.as_str()), ("feedback", "athanor.ns.m"));
    assert_eq!(kafka.ranges, [OffsetRange { partition: 0, begin: 5, end: 90 }]);
    assert_eq!(built.spec.train.evaluate.baseline.as_deref(), Some("s3://models/a"));
    assert_eq!(built.spec.train.model.from, "s3://models/base");
    assert_eq!(built.spec.credentials_secret_name.as_deref(), Some("s3"));
    assert_eq!(built.metadata.labels.unwrap()["team"], "nlp");

    // Killed before the status was written: the job is found, and more events make no second one.
    let mut running = Arc::unwrap_or_clone(job(&new.name, None, 0, ""));
    running.spec = built.spec.clone();
    subject.retrainings = vec![Arc::new(running)];
    monitor(&mut subject).ranges[0].end = 95;
    let again = decision(&subject, 210).retraining;
    assert_eq!(
        (again.create, again.running.map(|running| (running.job, running.ranges))),
        (None, Some((new.name.clone(), new.ranges.clone())))
    );

    // As well if it was over by then: its end is recorded, and the next one has another name.
    let mut killed = drifted();
    killed.retrainings = vec![job(&new.name, Some(("False", "GateFailed")), 205, "")];
    for count in [1, 1] {
        let decided = decision(&killed, 210);
        assert_eq!((&decided.retraining.create, decided.retraining.count), (&None, count));
        killed.deployment.status = Some(status::next(&killed, &decided, Ok(&Applied::assumed()), at(210)));
    }
    let recorded = killed.deployment.status.as_ref().unwrap();
    assert_eq!((&recorded.retraining, recorded.fruitless_retrainings), (&None, 1));
    assert_eq!(recorded.last_retraining.as_ref().unwrap().job, new.name);
    let later = decision(&killed, 100_000).retraining;
    assert_ne!(later.create.unwrap().name, new.name);
    assert_eq!(later.count, 2);

    // Gates failed: the champion stays, the cooldown begins.
    subject.deployment.status = Some(status::next(&subject, &first, Ok(&Applied::assumed()), at(200)));
    subject.retrainings = vec![job(&new.name, Some(("False", "GateFailed")), 400, "cccccccc")];
    let over = decision(&subject, 401);
    assert_eq!(over.retraining.running, None);
    let Value { reason, message, .. } = over.retraining.condition.clone().unwrap();
    assert!(reason == "Cooldown" && message.contains("GateFailed"), "{reason} {message}");
    assert_eq!(over.rollout.candidate, None);

    // Passed: its artifact is the candidate.
    subject.retrainings = vec![job(&new.name, Some(("True", "Succeeded")), 400, "cccccccc")];
    let passed = decision(&subject, 401);
    assert_eq!(shown(&passed).1, Some(("m-cccccccc".to_owned(), 0)));
    assert_eq!(passed.retraining.used, new.ranges);
}

#[test]
fn a_retraining_begins_where_those_before_it_did() {
    let mut subject = drifted();
    let range = |partition, begin, end| OffsetRange { partition, begin, end };
    subject.deployment.status.as_mut().unwrap().retrained_ranges = vec![range(0, 2, 4), range(1, 7, 9)];
    // Between 4 and 5 are the events of a canary; nothing of partition 1 is the current revision's.
    monitor(&mut subject).ranges = vec![range(0, 5, 90), range(2, 3, 3)];
    let ranges = decision(&subject, 200).retraining.create.unwrap().ranges;
    assert_eq!(ranges, [range(0, 2, 90), range(1, 7, 9)]);
    // Another topic may come after feedback was switched off.
    subject.deployment.spec.feedback = None;
    (subject.deployment.spec.monitor, subject.deployment.spec.retrain) = (None, None);
    let decision = decision(&subject, 200);
    let status = status::next(&subject, &decision, Ok(&Applied::assumed()), at(200));
    assert!(status.retrained_ranges.is_empty());
}

#[test]
fn the_children_are_what_processes_read() {
    let settings = Settings::parse_from(["athanor-operator"]);
    let mut subject = canary(at_step(1, 50, 58));
    let full = deployment(retraining_spec());
    subject.deployment.spec.feedback = full.spec.feedback;
    subject.deployment.spec.monitor = full.spec.monitor;
    subject.deployment.spec.replicas = 3;
    subject.deployment.spec.max_request_seconds = 600;
    let feedback = subject.deployment.spec.feedback.as_mut().unwrap();
    (feedback.sample_percent, feedback.redact) = (25, vec![r"\d{16}".into()]);
    feedback.kafka.topic_config = [("min.insync.replicas".to_owned(), "2".to_owned())].into();
    let mut validated = validate(&subject.deployment).unwrap();
    validated.owner = vec![OwnerReference { uid: "d1".into(), controller: Some(true), ..OwnerReference::default() }];
    let decision = decision(&subject, 60);
    let children = build::build(&validated, &settings, &decision, "00ff".into());
    let names: Vec<_> =
        children.revisions.iter().map(|revision| revision.deployment.metadata.name.clone().unwrap()).collect();
    assert_eq!(names, [OLD, NEW]);
    let server = serde_json::to_value(&children.revisions[1].deployment).unwrap();
    assert_eq!(
        (&server["spec"]["replicas"], &server["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"]),
        (&json!(3), &json!(0))
    );
    let selector = server["spec"]["selector"]["matchLabels"].as_object().unwrap();
    let labels = &server["spec"]["template"]["metadata"]["labels"];
    assert!(selector.iter().all(|(key, value)| labels[key] == *value));
    // The longest request may end before the pod is killed.
    let grace = |pod: &serde_json::Value| pod["spec"]["template"]["spec"]["terminationGracePeriodSeconds"].clone();
    let served = children.revisions[1].config.data.as_ref().unwrap()["serve.json"].clone();
    let served: ServeConfig = serde_json::from_str(&served).unwrap();
    assert_eq!((served.limits.max_request_seconds, grace(&server)), (600, json!(615)));
    let router = children.router.unwrap();
    // And events that wait for Kafka are handed over.
    assert_eq!(grace(&serde_json::to_value(&router.deployment).unwrap()), json!(660));
    let config: RouterConfig = serde_json::from_str(&router.config.data.unwrap()["router.json"]).unwrap();
    let weights: Vec<_> =
        config.revisions.iter().map(|revision| (revision.service.as_str(), revision.weight)).collect();
    assert_eq!(weights, [(OLD, 50), (NEW, 50)]);
    assert_eq!(config.limits.max_request_seconds, 600);
    let events = config.events.unwrap();
    assert_eq!(
        (&*events.topic, events.sample_percent, &events.redact[..]),
        ("athanor.ns.m", 25, &[r"\d{16}".into()][..])
    );
    assert_eq!(events.topic_config["min.insync.replicas"], "2");
    assert_eq!(router.service.metadata.name.as_deref(), Some("m"));
    let rules = serde_json::to_value(&router.account.role.rules).unwrap();
    assert_eq!(rules[0]["resourceNames"], json!(["m-router"]));
    let monitor = children.monitor.unwrap();
    let config: MonitorConfig = serde_json::from_str(&monitor.config.data.unwrap()["monitor.json"]).unwrap();
    assert_eq!(config.revisions.iter().map(|revision| revision.name.as_str()).collect::<Vec<_>>(), [OLD, NEW]);
    assert!(config.events.redact.is_empty(), "another pattern does not restart the monitor");
    assert!(config.events.topic_config.is_empty(), "it creates no topic");
}

#[test]
fn routers_and_monitors_have_requests_or_what_the_user_set() {
    let settings = Settings::parse_from(["athanor-operator", "--image-pull-secret=pull"]);
    let mut subject = canary(None);
    let full = deployment(retraining_spec());
    (subject.deployment.spec.feedback, subject.deployment.spec.monitor) = (full.spec.feedback, full.spec.monitor);
    let pods = |subject: &Observed| {
        let mut validated = validate(&subject.deployment).unwrap();
        validated.owner = vec![OwnerReference::default()];
        let children = build::build(&validated, &settings, &decision(subject, 60), "00ff".into());
        [children.router.unwrap().deployment, children.monitor.unwrap().deployment]
            .map(|workload| serde_json::to_value(workload.spec.unwrap().template.spec.unwrap()).unwrap())
    };
    for pod in pods(&subject) {
        let resources = json!({"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}});
        assert_eq!(pod["containers"][0]["resources"], resources);
        assert_eq!(pod["imagePullSecrets"], json!([{"name": "pull"}]));
    }
    let own = json!({"resources": {"limits": {"memory": "2Gi"}}, "nodeSelector": {"pool": "edge"}});
    let spec = &mut subject.deployment.spec;
    spec.router_pod_template = serde_json::from_value(own.clone()).unwrap();
    spec.monitor_pod_template = serde_json::from_value(own.clone()).unwrap();
    for pod in pods(&subject) {
        assert_eq!(pod["containers"][0]["resources"], own["resources"]);
        assert_eq!(pod["nodeSelector"], own["nodeSelector"]);
    }
}

#[test]
fn the_playground_is_the_routers_and_off_by_default() {
    let settings = Settings::parse_from(["athanor-operator"]);
    let mut subject = canary(None);
    let router = |subject: &Observed| {
        let validated = validate(&subject.deployment).unwrap();
        let router = build::build(&validated, &settings, &decision(subject, 60), "00ff".into()).router.unwrap();
        (router.config.data.unwrap()["router.json"].clone(), router.deployment)
    };
    let (before, deployment) = router(&subject);
    // A router of an earlier version, during an upgrade, refuses a field that it does not have.
    assert!(!before.contains("playground"), "{before}");
    subject.deployment.spec.playground = true;
    let (after, same) = router(&subject);
    assert!(serde_json::from_str::<RouterConfig>(&after).unwrap().playground);
    assert_eq!(same, deployment, "no router restarts");
}

#[test]
fn a_changed_engine_restarts_the_servers_with_it() {
    let settings = Settings::parse_from(["athanor-operator"]);
    let mut subject = canary(None);
    let built = |subject: &Observed| {
        let validated = validate(&subject.deployment).unwrap();
        let revision = build::build(&validated, &settings, &decision(subject, 60), "00ff".into()).revisions.remove(0);
        let config: ServeConfig = serde_json::from_str(&revision.config.data.unwrap()["serve.json"]).unwrap();
        let annotations = revision.deployment.spec.unwrap().template.metadata.unwrap().annotations;
        ((config.engine, config.limits.max_queue_seconds), annotations)
    };
    let (before, annotations) = built(&subject);
    assert_eq!(before, (EngineConfig::default(), 30));
    let spec = json!({"builtin": {
        "maxModelLength": 512, "kvCacheMemory": "256Mi", "weights": "Int8", "maxQueueSeconds": 120, "speculation": "Disabled",
    }});
    subject.deployment.spec.engine = serde_json::from_value(spec).unwrap();
    let (after, changed) = built(&subject);
    let expected = EngineConfig {
        max_model_length: Some(512),
        kv_cache_memory: Some(256 << 20),
        weights: Weights::Int8,
        speculation: Speculation::Disabled,
    };
    assert_eq!(after, (expected, 120));
    assert_ne!(annotations, changed);
    subject.deployment.spec.engine.builtin.as_mut().unwrap().kv_cache_memory = Some("much".into());
    assert_eq!(validate(&subject.deployment).err(), Some(InvalidDeployment::CacheMemory("much".into())));
}

#[test]
fn the_status_keeps_the_monitors_part_and_does_not_count_what_failed() {
    let subject = drifted();
    let next = status::next(&subject, &decision(&subject, 200), Ok(&Applied::assumed()), at(200));
    assert_eq!(condition::get(&next.conditions, types::DRIFTED).unwrap().status, "True");
    assert_eq!(condition::get(&next.conditions, types::READY).unwrap().status, "True");
    let error = crate::cluster::ClusterError::Foreign { kind: "Service".into(), name: "m".into() };
    let next = status::next(&subject, &decision(&subject, 200), Err(&error), at(200));
    let ready = condition::get(&next.conditions, types::READY).unwrap();
    assert_eq!((ready.status.as_str(), ready.reason.as_str(), next.retraining), ("False", "Refused", None));
    assert!(ready.message.contains("Service m already exists"), "{}", ready.message);
}

#[test]
fn a_wrong_name_or_source_is_refused() {
    let mut long = deployment(json!({"model": {"from": "s3://a"}}));
    long.metadata.name = Some("x".repeat(42));
    assert_eq!(validate(&long).err(), Some(InvalidDeployment::Name("x".repeat(42))));
    let mut clash = retraining_spec();
    clash["retrain"]["sourceName"] = json!("reviews");
    assert_eq!(validate(&deployment(clash)).err(), Some(InvalidDeployment::SourceName("reviews".into())));
    let mut pattern = retraining_spec();
    pattern["feedback"]["redact"] = json!(["a", "["]);
    let refused = validate(&deployment(pattern)).err().unwrap().to_string();
    assert!(refused.starts_with("spec.feedback.redact[1]: regex parse error"), "{refused}");
    let mut topic = retraining_spec();
    topic["feedback"]["kafka"]["topicConfig"] = json!({"min.insync.replicas": "2", "retention ms": "1"});
    assert_eq!(validate(&deployment(topic)).err(), Some(InvalidDeployment::TopicConfig("retention ms".into())));
    assert_eq!(names::revision("m", Some("ABCDEF0123"), ""), "m-abcdef01");
    assert_ne!(names::revision("m", None, "s3://a"), names::revision("m", None, "s3://b"));
}

#[test]
fn one_of_several_callers_gives_at_most_half_of_the_feedback_by_default() {
    let share = |callers: serde_json::Value, percent: Option<u32>| {
        let mut spec = retraining_spec();
        if !callers.is_null() {
            spec["access"] = json!({"apiKeys": {"secretName": "keys", "callers": callers}});
        }
        if let Some(percent) = percent {
            spec["feedback"]["maximumCallerPercent"] = json!(percent);
        }
        validate(&deployment(spec)).unwrap().events.unwrap().maximum_caller_percent
    };
    let two = json!([{"name": "a"}, {"name": "b", "scopes": ["feedback"]}]);
    assert_eq!(share(json!(null), None), 100);
    assert_eq!(share(json!([{"name": "a"}]), None), 100);
    assert_eq!(share(json!([{"name": "a"}, {"name": "b", "scopes": ["infer"]}]), None), 100);
    assert_eq!(share(two.clone(), None), 50);
    assert_eq!(share(two.clone(), Some(100)), 100);
    assert_eq!(share(two, Some(10)), 10);
}
