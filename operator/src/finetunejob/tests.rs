//! Table tests of decisions, children and status.

use std::sync::Arc;

use athanor_contract::train::{TrainConfig, TrainResult, TrainSummary};
use athanor_crds::{FineTuneJob, FineTuneJobStatus, condition as types};
use clap::Parser;
use jiff::Timestamp;
use k8s_openapi::{
    api::{batch::v1::Job, core::v1::Pod},
    apimachinery::pkg::apis::meta::v1::Time,
};
use serde_json::{Value, json};

use super::{
    apply::Applied,
    attempt::is_over,
    build,
    decide::{Decision, Phase},
    dereference::Observed,
    policy::restart::MAX_PREEMPTIONS,
    status,
    validate::{InvalidJob, is_service_name, validate},
};
use crate::{
    cluster::Identity,
    condition::{self, State, Value as Condition},
    progress::Report,
    prune,
    settings::Settings,
};

/// A FineTuneJob of ten lines.
pub fn job(name: &str, uid: &str) -> FineTuneJob {
    serde_json::from_value(json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "ns", "uid": uid, "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "model": {"from": "s3://models/minilm", "task": "TextClassification"},
            "data": {"sources": [{"name": "reviews", "uri": "s3://data/reviews.jsonl"}]},
            "output": {"to": "s3://out/"},
        },
    }))
    .unwrap()
}

fn at(seconds: i64) -> Timestamp {
    "2026-01-01T00:00:00Z".parse::<Timestamp>().unwrap() + jiff::SignedDuration::from_secs(seconds)
}

fn pod(index: u32, attempt: u32, status: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {
            "name": format!("a-{attempt}-{index}-x"),
            "labels": {"batch.kubernetes.io/controller-uid": format!("j{attempt}"), "batch.kubernetes.io/job-completion-index": index.to_string()},
        },
        "status": status,
    }))
    .unwrap()
}

fn running(index: u32) -> Pod {
    let state = json!({"running": {"startedAt": "2026-01-01T00:00:05Z"}});
    pod(
        index,
        0,
        json!({"phase": "Running", "containerStatuses": [{"name": "trainer", "image": "", "imageID": "", "ready": true, "restartCount": 0, "state": state}]}),
    )
}

fn ended(index: u32, code: i32, message: &str) -> Pod {
    let state = json!({"terminated": {"exitCode": code, "message": message, "finishedAt": "2026-01-01T00:01:00Z"}});
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    pod(
        index,
        0,
        json!({"phase": phase, "containerStatuses": [{"name": "trainer", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state}]}),
    )
}

fn batch_job(attempt: u32, conditions: Value) -> Arc<Job> {
    let mut batch_job: Job = serde_json::from_value(json!({
        "metadata": {"name": format!("a-{attempt}"), "uid": format!("j{attempt}")}, "status": {"conditions": conditions},
    }))
    .unwrap();
    prune::batch_job(&mut batch_job);
    Arc::new(batch_job)
}

/// The pods as the cache keeps them.
fn watched(mut pods: Vec<Pod>) -> Vec<Arc<Pod>> {
    pods.iter_mut().for_each(prune::pod);
    pods.into_iter().map(Arc::new).collect()
}

fn observed(job: FineTuneJob, pods: Vec<Pod>) -> Observed {
    let batch_jobs = vec![batch_job(0, json!([]))];
    Observed { job, batch_jobs, pods: watched(pods), report: None, trials: vec![], is_awaited: false }
}

fn decide(observed: &Observed, now: Timestamp) -> Decision {
    super::decide::decide(&validate(&observed.job).unwrap(), observed, now)
}

/// What is decided once the status of a decision is written.
fn decide_after(observed: &mut Observed, decision: &Decision, now: Timestamp) -> Decision {
    observed.job.status = Some(status::next(observed, decision, Ok(&Applied::assumed(false)), now));
    decide(observed, now)
}

fn of_two_nodes() -> FineTuneJob {
    let mut job = job("a", "0123456789abcdef");
    job.spec.train.distributed.num_nodes = 2;
    job
}

fn summary() -> TrainSummary {
    TrainSummary { artifact: "s3://out/a/artifact".into(), steps: 80, ..TrainSummary::default() }
}

fn text(result: &TrainResult) -> String {
    serde_json::to_string(result).unwrap()
}

#[test]
fn an_attempt_ends_by_its_pods_exit_codes() {
    let succeeded = text(&TrainResult::Succeeded(summary()));
    let gates = text(&TrainResult::GateFailed(TrainSummary {
        failed_gates: vec!["accuracy 0.7 is below 0.8".into()],
        ..summary()
    }));
    let wrong = text(&TrainResult::Failed { message: "data.sources[0].uri: row 3: no column 'text'".into() });
    // Pods, seconds now, the phase's name, and what attempt follows.
    let table: Vec<(&str, Vec<Pod>, i64, &str, u32)> = vec![
        ("nothing yet", vec![], 10, "Pending", 0),
        ("one of two", vec![running(0)], 10, "Pending", 0),
        ("both", vec![running(0), running(1)], 10, "Running", 0),
        ("done", vec![ended(0, 0, &succeeded), ended(1, 0, "")], 61, "Succeeded", 0),
        ("result before the other's end", vec![ended(0, 0, &succeeded), running(1)], 61, "Succeeded", 0),
        ("result beside a peer that lost it", vec![ended(0, 0, &succeeded), ended(1, 42, "")], 61, "Succeeded", 0),
        ("gates", vec![ended(0, 0, &gates), ended(1, 0, "")], 61, "GateFailed", 0),
        ("user error", vec![ended(0, 3, &wrong), ended(1, 42, "")], 61, "UserError", 0),
        ("crash", vec![ended(0, 42, ""), ended(1, 137, "")], 61, "counted", 1),
        ("crash, the other runs", vec![running(0), ended(1, 139, "")], 61, "counted", 1),
        ("hang", vec![ended(0, 43, ""), ended(1, 43, "")], 61, "counted", 1),
        ("no result", vec![ended(0, 0, ""), ended(1, 0, "")], 61, "counted", 1),
        ("stopped", vec![ended(0, 42, ""), ended(1, 45, "")], 61, "uncounted", 1),
        ("a network that fails all", vec![ended(0, 42, ""), ended(1, 42, "")], 61, "counted", 1),
        ("one that blames a peer, before the first step", vec![ended(0, 42, "")], 64, "counted", 1),
        ("too early to say", vec![ended(0, 42, ""), running(1)], 61, "Pending", 0),
        ("late enough to say", vec![ended(0, 42, ""), running(1)], 64, "counted", 1),
        ("evicted", vec![running(0), pod(1, 0, json!({"phase": "Failed", "reason": "Evicted"}))], 61, "uncounted", 1),
    ];
    for (case, pods, now, expected, attempt) in table {
        let mut subject = observed(of_two_nodes(), pods);
        let decision = decide(&subject, at(now));
        let name = match &decision.phase {
            Phase::Pending { .. } => "Pending",
            Phase::Running => "Running",
            Phase::Succeeded(_) => "Succeeded",
            Phase::Failed { reason, .. } => reason,
            Phase::Restarting { counted: true, .. } => "counted",
            Phase::Restarting { counted: false, .. } => "uncounted",
            other => panic!("{case}: {other:?}"),
        };
        assert_eq!((name, decision.attempt), (expected, attempt), "{case}");
        assert!(
            decision.remove.is_empty() && !decision.create,
            "{case}: the end is recorded before anything is deleted"
        );
        let after = decide_after(&mut subject, &decision, at(now));
        let removed: Vec<Identity> = (0..attempt).map(|_| Identity { name: "a-0".into(), uid: "j0".into() }).collect();
        assert_eq!(after.remove, removed, "{case}: the Job of an attempt that ended is deleted, no other");
        assert_eq!(after.attempt, attempt, "{case}: an end is counted once");
    }
}

/// Repeats the same end of one of two pods until the job has failed. Returns the attempts, the reason and the message.
fn repeat(report: Option<Report>, mut advance: impl FnMut(&mut Report)) -> (u32, &'static str, String) {
    let mut subject = observed(of_two_nodes(), vec![ended(0, 42, "NCCL error: unhandled system error"), running(1)]);
    subject.report = report;
    for _ in 0..100 {
        let attempt = subject.job.status.as_ref().map_or(0, |status| status.attempt);
        let name = format!("a-{attempt}");
        subject.batch_jobs = vec![batch_job(attempt, json!([]))];
        let pods = [ended(0, 42, "NCCL error: unhandled system error"), running(1)].map(|mut pod| {
            let labels = pod.metadata.labels.as_mut().unwrap();
            labels.insert("batch.kubernetes.io/controller-uid".into(), format!("j{attempt}"));
            pod.metadata.name = Some(format!("{name}-x"));
            pod
        });
        subject.pods = watched(pods.into());
        let decision = decide(&subject, at(100));
        subject.job.status = Some(status::next(&subject, &decision, Ok(&Applied::assumed(false)), at(100)));
        if let Phase::Failed { reason, message, .. } = decision.phase {
            return (attempt + 1, reason, message);
        }
        assert_eq!(subject.job.status.as_ref().unwrap().attempt, attempt + 1);
        subject.report.iter_mut().for_each(&mut advance);
    }
    panic!("100 attempts")
}

#[test]
fn one_of_two_ranks_that_always_loses_its_peer_is_permanent() {
    let at_step = |step, checkpoint_step| Some(Report { step, checkpoint_step, total_steps: 80, ..Report::default() });
    // Three restarts are allowed, by default.
    for (case, report, attempts) in [
        ("before the trainer reports", None, 4),
        ("before the first step", at_step(0, 0), 4),
        ("in a run without a checkpoint", at_step(57, 0), 5),
        ("always at the same step", at_step(57, 50), 5),
    ] {
        let (made, reason, message) = repeat(report, |_| {});
        assert_eq!((made, reason), (attempts, "TooManyRestarts"), "{case}: {message}");
        assert!(message.contains("lost a peer NCCL error: unhandled system error"), "{case}: {message}");
    }
    // As long as there are further checkpoints, the peers are taken for preempted.
    let (made, ..) = repeat(at_step(50, 50), |report| {
        if report.checkpoint_step < 1_000 {
            (report.step, report.checkpoint_step) = (report.step + 50, report.checkpoint_step + 50);
        }
    });
    assert_eq!(made, 20 + 4);
}

#[test]
fn restarts_are_bounded_and_messages_name_the_cause() {
    let with = |restarts, preemptions| {
        let mut job = of_two_nodes();
        job.status =
            Some(FineTuneJobStatus { restarts, fruitless_preemptions: preemptions, ..FineTuneJobStatus::default() });
        job
    };
    for (restarts, preemptions, code, expected) in [
        (2, 0, 137, None),
        (3, 0, 137, Some("TooManyRestarts")),
        (3, 0, 42, Some("TooManyRestarts")),
        (3, 0, 45, None),
        (0, MAX_PREEMPTIONS, 45, Some("TooManyPreemptions")),
    ] {
        let decision = decide(
            &observed(with(restarts, preemptions), vec![ended(0, code, "out of memory"), ended(1, code, "")]),
            at(70),
        );
        match (&decision.phase, expected) {
            (Phase::Restarting { .. }, None) => {}
            (Phase::Failed { reason, message, .. }, Some(wanted)) => {
                assert_eq!(*reason, wanted);
                assert!(message.contains("out of memory") && message.contains(&code.to_string()), "{message}");
            }
            other => panic!("{restarts} {preemptions} {code}: {other:?}"),
        }
    }
}

#[test]
fn a_new_attempt_waits_for_the_pods_of_the_old_one() {
    let mut subject = observed(of_two_nodes(), vec![running(0)]);
    subject.job.status = Some(FineTuneJobStatus { attempt: 1, ..FineTuneJobStatus::default() });
    let decision = decide(&subject, at(70));
    assert_eq!((decision.create, decision.remove), (false, vec![Identity { name: "a-0".into(), uid: "j0".into() }]));
    subject.batch_jobs.clear();
    subject.pods = watched(vec![ended(0, 42, "")]);
    let decision = decide(&subject, at(70));
    assert!(decision.create && decision.attempt == 1 && decision.remove.is_empty());
    // Pods on a node that does not answer do not hold the next attempt back.
    let mut lost = running(0);
    lost.metadata.deletion_timestamp = Some(Time(at(40)));
    subject.pods = watched(vec![lost]);
    assert!(!decide(&subject, at(50)).create);
    assert!(decide(&subject, at(60)).create);
}

#[test]
fn suspension_deadline_deletion_and_time_to_live() {
    let mut subject = observed(of_two_nodes(), vec![running(0), running(1)]);
    subject.job.spec.suspend = true;
    let decision = decide(&subject, at(20));
    assert_eq!((&decision.phase, decision.attempt, decision.remove.len()), (&Phase::Suspended, 1, 0));
    let after = decide_after(&mut subject, &decision, at(20));
    assert_eq!((&after.phase, after.attempt, after.remove.len()), (&Phase::Suspended, 1, 1));
    // Suspended already: nothing more happens.
    subject.batch_jobs.clear();
    assert_eq!(decide(&subject, at(21)).attempt, 1);

    let mut subject = observed(of_two_nodes(), vec![running(0), running(1)]);
    subject.job.spec.active_deadline_seconds = Some(60);
    subject.job.status = Some(FineTuneJobStatus { start_time: Some(Time(at(0))), ..FineTuneJobStatus::default() });
    assert_eq!(decide(&subject, at(59)).phase, Phase::Running);
    let decision = decide(&subject, at(60));
    assert!(matches!(decision.phase, Phase::Failed { reason: "DeadlineExceeded", .. }) && decision.remove.len() == 1);

    let mut subject = observed(of_two_nodes(), vec![running(0)]);
    subject.batch_jobs =
        vec![batch_job(0, json!([{"type": "Failed", "status": "True", "message": "BackoffLimitExceeded"}]))];
    assert!(matches!(decide(&subject, at(60)).phase, Phase::Restarting { counted: false, .. }), "a pod was deleted");

    let mut subject = observed(of_two_nodes(), vec![]);
    subject.batch_jobs = vec![batch_job(0, json!([{"type": "Complete", "status": "True"}]))];
    assert!(matches!(decide(&subject, at(60)).phase, Phase::Restarting { counted: false, .. }), "its result is gone");

    let mut subject = observed(of_two_nodes(), vec![]);
    let mut conditions = Vec::new();
    condition::set(&mut conditions, types::SUCCEEDED, &Condition::new(State::True, "Succeeded", ""), None, at(0));
    subject.job.status =
        Some(FineTuneJobStatus { conditions, completion_time: Some(Time(at(0))), ..FineTuneJobStatus::default() });
    let decision = decide(&subject, at(9));
    assert_eq!((decision.phase, decision.expire, decision.requeue), (Phase::Over, false, None));
    subject.job.spec.ttl_seconds_after_finished = Some(10);
    let decision = decide(&subject, at(9));
    assert_eq!((decision.expire, decision.requeue.map(|wait| wait.as_secs())), (false, Some(1)));
    assert!(decide(&subject, at(10)).expire);
    subject.is_awaited = true;
    let awaited = decide(&subject, at(10));
    assert!(!awaited.expire && awaited.requeue.is_some(), "its deployment has not looked yet");
    subject.is_awaited = false;
}

#[test]
fn the_children_are_what_trainers_read() {
    let settings = Settings::parse_from([
        "athanor-operator",
        "--progress-address=http://op:9443",
        "--otlp-endpoint=http://otel:4317",
    ]);
    let mut job = of_two_nodes();
    job.spec.credentials_secret_name = Some("s3".into());
    job.spec.pod_template = Some(
        serde_json::from_value(json!({"labels": {"team": "nlp", "app.kubernetes.io/name": "mine"},
            "env": [{"name": "ATHANOR_NUM_NODES", "value": "9"}, {"name": "X", "value": "1"}]}))
        .unwrap(),
    );
    let decision = Decision { create: true, ..Decision::new(Phase::Running, 2) };
    let validated = validate(&job).unwrap();
    let children = build::build(&validated, &settings, &decision).attempt.unwrap();
    let config: TrainConfig = serde_json::from_str(&children.config.data.as_ref().unwrap()["train.json"]).unwrap();
    assert_eq!(config.checkpoint_to, "s3://out/a-01234567/checkpoints");
    assert_eq!(config.events_to, "s3://out/a-01234567/tensorboard");
    assert_eq!(config.artifact_to, "s3://out/a-01234567/artifact");
    assert_eq!(config.progress_to.as_deref(), Some("http://op:9443"));
    let job = serde_json::to_value(&children.batch_job).unwrap();
    assert_eq!(job["metadata"]["name"], "a-2");
    assert_eq!(
        (&job["spec"]["completions"], &job["spec"]["parallelism"], &job["spec"]["backoffLimit"]),
        (&json!(2), &json!(2), &json!(0))
    );
    assert_eq!(job["spec"]["completionMode"], "Indexed");
    let template = &job["spec"]["template"];
    assert_eq!(template["metadata"]["labels"]["team"], "nlp");
    assert_eq!(template["metadata"]["labels"]["app.kubernetes.io/name"], "athanor-trainer");
    let pod = &template["spec"];
    assert_eq!(pod["subdomain"], children.service.unwrap().metadata.name.unwrap());
    assert_eq!((&pod["restartPolicy"], &pod["automountServiceAccountToken"]), (&json!("Never"), &json!(false)));
    let container = &pod["containers"][0];
    let env = |name: &str| {
        container["env"].as_array().unwrap().iter().filter(|entry| entry["name"] == name).cloned().collect::<Vec<_>>()
    };
    assert_eq!(env("ATHANOR_NUM_NODES"), [json!({"name": "ATHANOR_NUM_NODES", "value": "2"})]);
    assert_eq!(env("ATHANOR_MASTER_ADDR")[0]["value"], "a-2-0.a-trainer.ns.svc.cluster.local");
    assert_eq!(env("X").len(), 1);
    assert_eq!(env("OTEL_EXPORTER_OTLP_ENDPOINT")[0]["value"], "http://otel:4317");
    assert_eq!(container["envFrom"][0]["secretRef"]["name"], "s3");
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert!(build::build(&validated, &settings, &Decision { create: false, ..decision }).attempt.is_none());
}

#[test]
fn one_node_meets_nobody() {
    let settings = Settings::parse_from(["athanor-operator"]);
    let children = |job: &FineTuneJob| {
        let decision = Decision { create: true, ..Decision::new(Phase::Running, 0) };
        build::build(&validate(job).unwrap(), &settings, &decision).attempt.unwrap()
    };
    let pod = |batch_job: Job| serde_json::to_value(batch_job.spec.unwrap().template.spec.unwrap()).unwrap();
    let has_master = |pod: &Value| {
        pod["containers"][0]["env"].as_array().unwrap().iter().any(|entry| entry["name"] == "ATHANOR_MASTER_ADDR")
    };
    let mut alone = job("a", "0123456789abcdef");
    alone.spec.train.distributed.processes_per_node = 4;
    let one = children(&alone);
    assert!(one.service.is_none(), "its processes share a network");
    let one = pod(one.batch_job);
    assert_eq!((&one["subdomain"], has_master(&one)), (&Value::Null, false));
    let two = children(&of_two_nodes());
    assert!(two.service.is_some());
    assert!(has_master(&pod(two.batch_job)));
}

#[test]
fn pods_with_gpus_run_the_image_with_cuda_or_a_condition_says_that_there_is_none() {
    let mut job = of_two_nodes();
    job.spec.pod_template =
        Some(serde_json::from_value(json!({"resources": {"limits": {"nvidia.com/gpu": "1"}}})).unwrap());
    let children = |arguments: &[&str]| {
        let settings = Settings::parse_from(["athanor-operator", "--trainer-image=t"].iter().chain(arguments));
        let decision = Decision { create: true, ..Decision::new(Phase::Running, 0) };
        build::build(&validate(&job).unwrap(), &settings, &decision).attempt.unwrap()
    };
    let image = |batch_job: &Job| {
        batch_job.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers[0].image.clone().unwrap()
    };
    let with = children(&["--trainer-cuda-image=t-cuda"]);
    assert_eq!((image(&with.batch_job).as_str(), &with.warning), ("t-cuda", &None));
    let without = children(&[]);
    assert_eq!(image(&without.batch_job), "t");
    let mut subject = observed(job.clone(), vec![]);
    subject.batch_jobs.clear();
    let decision = decide(&subject, at(0));
    let next = |subject: &Observed, applied: Applied| status::next(subject, &decision, Ok(&applied), at(1)).conditions;
    let conditions = next(&subject, Applied::assumed_attempt(without.warning));
    let warning = condition::get(&conditions, types::GPU_IMAGE).unwrap();
    assert_eq!((warning.status.as_str(), warning.reason.as_str()), ("False", "NoCudaImage"));
    // It stays until the next attempt, which may have another image.
    subject.job.status = Some(FineTuneJobStatus { conditions, ..FineTuneJobStatus::default() });
    assert!(condition::get(&next(&subject, Applied::assumed(false)), types::GPU_IMAGE).is_some());
    assert!(condition::get(&next(&subject, Applied::assumed_attempt(None)), types::GPU_IMAGE).is_none());
}

#[test]
fn claims_are_mounted_read_only_and_read_as_files() {
    let mut job = job("a", "0123456789abcdef");
    let train = &mut job.spec.train;
    train.data.sources[0].uri = Some("pvc://reviews/2026/*.jsonl".into());
    train.data.sources.push(train.data.sources[0].clone());
    train.data.sources[1].name = "again".into();
    train.model.from = "pvc://models.shared/minilm".into();
    let settings = Settings::parse_from(["athanor-operator"]);
    let decision = decide(&observed(job.clone(), vec![]), at(0));
    let children = build::build(&validate(&job).unwrap(), &settings, &Decision { create: true, ..decision });
    let attempt = children.attempt.unwrap();
    let config: TrainConfig = serde_json::from_str(&attempt.config.data.unwrap()["train.json"]).unwrap();
    let uris: Vec<_> = config.spec.data.sources.iter().map(|source| source.uri.as_deref().unwrap()).collect();
    assert_eq!(uris, ["file:///mnt/claims/reviews/2026/*.jsonl"; 2]);
    assert_eq!(config.spec.model.from, "file:///mnt/claims/models.shared/minilm");
    let pod = serde_json::to_value(attempt.batch_job.spec.unwrap().template.spec.unwrap()).unwrap();
    let named = |list: &Value, name: &str| {
        list.as_array().unwrap().iter().find(|entry| entry["name"] == name).cloned().unwrap_or_default()
    };
    for (name, claim) in [("claim-0", "models.shared"), ("claim-1", "reviews")] {
        let source = json!({"claimName": claim, "readOnly": true});
        assert_eq!(named(&pod["volumes"], name)["persistentVolumeClaim"], source);
        let mount = named(&pod["containers"][0]["volumeMounts"], name);
        assert_eq!((&mount["mountPath"], &mount["readOnly"]), (&json!(format!("/mnt/claims/{claim}")), &json!(true)));
    }
    assert_eq!(named(&pod["volumes"], "claim-2"), Value::Null, "once a claim");
}

#[test]
fn names_of_services_are_checked() {
    for (name, fine) in
        [("a", true), ("a-1", true), ("1a", false), ("a.b", false), ("a-", false), ("", false), ("A", false)]
    {
        assert_eq!(is_service_name(name, 52), fine, "{name}");
    }
    let mut numbers = job("a", "u");
    numbers.spec.train.model.task = athanor_contract::train::Task::TextRegression;
    assert!(validate(&numbers).is_ok());
    let gates = json!({"gates": [{"metric": "MacroF1", "minimum": "0.8"}]});
    numbers.spec.train.evaluate = serde_json::from_value(gates).unwrap();
    let message = validate(&numbers).err().unwrap().to_string();
    assert!(message.starts_with("spec.evaluate.gates[0].metric: the task TextRegression has no MacroF1"), "{message}");
    let long = "a".repeat(53);
    assert_eq!(validate(&job(&long, "u")).err(), Some(InvalidJob::Name(long)));
}

#[test]
fn the_status_shows_progress_restarts_and_the_result() {
    let mut subject = observed(of_two_nodes(), vec![running(0), running(1)]);
    subject.report = Some(Report {
        stage: "Training".into(),
        step: 57,
        total_steps: 80,
        loss: 0.25,
        eta_seconds: 80.4,
        timeline: [("firstStep".to_owned(), 4.0)].into(),
        ..Report::default()
    });
    let created = Applied::assumed(true);
    let next = status::next(&subject, &decide(&subject, at(20)), Ok(&created), at(20));
    let progress = next.progress.clone().unwrap();
    assert_eq!((progress.percent, progress.percent_text.as_str(), progress.eta.as_deref()), (71, "71%", Some("1m20s")));
    assert_eq!(
        next.timeline["firstStep"].get(),
        9.0,
        "4 s after the process began, which was 5 s after the object's creation"
    );
    assert_eq!(condition::get(&next.conditions, types::SUCCEEDED).unwrap().status, "Unknown");
    assert!(!is_over(&next));

    subject.job.status = Some(next);
    subject.pods = watched(vec![ended(0, 137, ""), ended(1, 42, "")]);
    let next = status::next(&subject, &decide(&subject, at(62)), Ok(&Applied::assumed(false)), at(62));
    assert_eq!((next.restarts, next.preemptions, next.attempt), (1, 0, 1));
    assert_eq!(condition::get(&next.conditions, types::SUCCEEDED).unwrap().reason, "Restarting");

    subject.pods = watched(vec![ended(0, 0, &text(&TrainResult::Succeeded(summary()))), ended(1, 0, "")]);
    let next = status::next(&subject, &decide(&subject, at(90)), Ok(&Applied::assumed(false)), at(90));
    assert!(is_over(&next));
    assert_eq!((next.completion_time, next.summary), (Some(Time(at(90))), Some(summary())));
    assert_eq!((next.progress.as_ref().unwrap().percent, next.progress.unwrap().step), (100, 80));
}

#[test]
fn no_report_makes_a_status_too_large() {
    let mut subject = observed(of_two_nodes(), vec![running(0), running(1)]);
    let many = |from: usize| Report {
        step: u64::MAX / 2,
        total_steps: u64::MAX / 2,
        timeline: (from..from + 32).map(|number| (format!("event{number}"), 1.0)).collect(),
        ..Report::default()
    };
    for from in [0, 32, 64] {
        subject.report = Some(many(from));
        let applied = Applied::assumed(from == 64);
        subject.job.status = Some(status::next(&subject, &decide(&subject, at(20)), Ok(&applied), at(20)));
    }
    assert_eq!(subject.job.status.as_ref().unwrap().progress.as_ref().unwrap().percent, 100);
    subject.pods = watched(vec![ended(0, 0, &text(&TrainResult::Succeeded(summary()))), ended(1, 0, "")]);
    let next = status::next(&subject, &decide(&subject, at(90)), Ok(&Applied::assumed(false)), at(90));
    assert!(next.timeline.len() <= 32, "{} entries", next.timeline.len());
    for name in ["admitted", "podsRunning", "processStart", "finished"] {
        assert!(next.timeline.contains_key(name), "{name}");
    }
}

#[test]
fn spans_read_like_a_clock() {
    for (seconds, text) in [(0.4, "0s"), (59.6, "1m0s"), (80.0, "1m20s"), (4000.0, "1h6m40s")] {
        assert_eq!(status::span(seconds), text);
    }
}

#[test]
fn a_job_that_is_over_is_not_validated_again() {
    let mut wrong = job(&"a".repeat(53), "u");
    let error = validate(&wrong).err().unwrap();
    wrong.status = Some(status::invalid(&wrong, &error, at(5)));
    wrong.spec.ttl_seconds_after_finished = Some(10);
    assert!(validate(&wrong).is_ok());
    let subject = observed(wrong, vec![]);
    assert_eq!(decide(&subject, at(6)).phase, Phase::Over);
    assert!(decide(&subject, at(15)).expire, "the time to live counts for an invalid job as well");
}

#[test]
fn a_cache_that_lags_makes_nothing_twice() {
    let now = at(70);
    // The attempt's Kubernetes Job was created, and the cache does not have it yet: the same Job is created again,
    // under the name that exists already, and nothing is counted.
    let mut subject = observed(of_two_nodes(), vec![]);
    subject.batch_jobs.clear();
    let first = decide(&subject, now);
    let again = decide_after(&mut subject, &first, now);
    let settings = Settings::parse_from(["athanor-operator"]);
    let name = |decision: &Decision| {
        let children = build::build(&validate(&of_two_nodes()).unwrap(), &settings, decision);
        children.attempt.unwrap().batch_job.metadata.name.unwrap()
    };
    assert_eq!((name(&first), name(&again)), ("a-0".to_owned(), "a-0".to_owned()));
    assert_eq!((again.attempt, again.remove.len()), (0, 0));

    // The attempt ended, and the cache does not have the status yet: the same end gives the same status.
    let mut subject = observed(of_two_nodes(), vec![ended(0, 137, ""), ended(1, 42, "")]);
    let next = |subject: &Observed| status::next(subject, &decide(subject, now), Ok(&Applied::assumed(false)), now);
    let (once, twice) = (next(&subject), next(&subject));
    assert_eq!((once.attempt, once.restarts), (1, 1));
    assert_eq!((twice.attempt, twice.restarts), (1, 1));

    // The Job of the earlier attempt was deleted, and the cache still has it: only that Job is named, with its UID.
    subject.job.status = Some(FineTuneJobStatus { attempt: 1, restarts: 1, ..FineTuneJobStatus::default() });
    subject.batch_jobs.push(batch_job(1, json!([])));
    let decision = decide(&subject, now);
    assert_eq!(decision.remove, [Identity { name: "a-0".into(), uid: "j0".into() }]);
    assert_eq!((decision.attempt, decision.create), (1, false));
}
