//! Revisions that are adapters of one base, and adapters that clients select.

use athanor_contract::serve::{AdapterConfig, AdaptersFile};
use athanor_crds::{AdapterStatus, RetiredRevision};

use super::*;

const BASE: &str = "s3://models/base";

/// A deployment of an adapter, whose canary is one step of all the traffic.
fn of_base(from: &str) -> ModelDeployment {
    deployment(json!({
        "model": {"base": {"from": BASE}, "from": from},
        "rollout": {"canary": {
            "steps": [{"trafficPercent": 100, "pauseSeconds": 0}], "analysis": {"minimumRequests": 0},
        }},
    }))
}

fn revision_of(uri: &str) -> String {
    names::adapter_revision("m", BASE, None, uri)
}

fn shared() -> String {
    names::shared_servers("m", BASE)
}

/// A FineTuneJob that trains an adapter.
fn lora_job(name: &str, outcome: Option<(&str, &'static str)>, end: i64, digest: &str) -> Arc<FineTuneJob> {
    let mut job = Arc::unwrap_or_clone(job(name, outcome, end, digest));
    job.spec.train.adapter = Some(serde_json::from_value(json!({"lora": {"rank": 8}})).unwrap());
    Arc::new(job)
}

/// Decides, and writes the status.
fn step(subject: &mut Observed, now: i64) -> Decision {
    let decided = decision(subject, now);
    subject.deployment.status = Some(status::next(subject, &decided, Ok(&Applied::assumed()), at(now)));
    decided
}

/// What the ready pods of the shared servers list.
fn load(subject: &mut Observed, pods: &[&[&str]]) {
    let pods = pods.iter().map(|names| names.iter().map(|name| (*name).to_owned()).collect());
    subject.loaded.insert(&shared(), pods.collect());
}

/// A deployment whose adapter A answers.
fn answering() -> Observed {
    let mut subject = observed(of_base("s3://adapters/a"));
    step(&mut subject, 0);
    subject.revisions = [(shared(), workload(1))].into();
    subject.counts = Some(BTreeMap::new());
    load(&mut subject, &[&["m", &revision_of("s3://adapters/a")]]);
    step(&mut subject, 1);
    subject
}

/// The servers of a decision: name, configuration, pod template and adapters.
fn servers(
    subject: &Observed,
    decision: &Decision,
) -> Vec<(String, ServeConfig, serde_json::Value, Vec<AdapterConfig>)> {
    let settings = Settings::parse_from(["athanor-operator"]);
    let children = build::build(&validate(&subject.deployment).unwrap(), &settings, decision, "00ff".into());
    let built = children.revisions.into_iter().map(|server| {
        let name = server.deployment.metadata.name.clone().unwrap();
        let data = server.config.data.unwrap();
        assert_eq!(server.service.metadata.name, server.deployment.metadata.name);
        let adapters: AdaptersFile = serde_json::from_str(&data["adapters.json"]).unwrap();
        let template = serde_json::to_value(server.deployment.spec.unwrap().template).unwrap();
        (name, serde_json::from_str(&data["serve.json"]).unwrap(), template, adapters.adapters)
    });
    built.collect()
}

fn named(adapters: &[AdapterConfig]) -> Vec<(&str, &str)> {
    adapters.iter().map(|adapter| (adapter.name.as_str(), adapter.uri.as_str())).collect()
}

fn sorted<'a>(mut pairs: Vec<(&'a str, &'a str)>) -> Vec<(&'a str, &'a str)> {
    pairs.sort_unstable();
    pairs
}

#[test]
fn a_canary_from_one_adapter_to_another_has_one_deployment() {
    let (a, b) = (revision_of("s3://adapters/a"), revision_of("s3://adapters/b"));
    let mut subject = answering();
    let before = servers(&subject, &decision(&subject, 2));
    assert_eq!(before.len(), 1);
    let (name, config, template, adapters) = &before[0];
    assert_eq!((name, &*config.model_uri, &config.revision), (&shared(), BASE, &shared()));
    assert_eq!(named(adapters), [(&*a, "s3://adapters/a")]);

    subject.deployment.spec.model.from = Some("s3://adapters/b".into());
    let waits = step(&mut subject, 10);
    assert_eq!(shown(&waits), (Some(a.clone()), Some((b.clone(), 0)), "WaitingForPods"));
    let during = servers(&subject, &waits);
    assert_eq!(during.len(), 1, "no second copy of the weights");
    assert_eq!((&during[0].0, &during[0].1, &during[0].2), (name, config, template), "no pod restarts");
    let both = sorted(vec![(&*a, "s3://adapters/a"), (&*b, "s3://adapters/b")]);
    assert_eq!(named(&during[0].3), both);
    let weights = router::weights("m", &waits.rollout);
    let routed: Vec<_> =
        weights.iter().map(|it| (it.name.as_str(), it.service.as_str(), it.weight, it.adapter.as_deref())).collect();
    let base = shared();
    assert_eq!(routed, [(&*a, &*base, 100, Some(&*a)), (&*b, &*base, 0, Some(&*b))]);

    // Not before all ready pods have it.
    load(&mut subject, &[&["m", &a], &["m", &a, &b]]);
    subject.revisions.insert(shared(), Workload { desired: 2, available: 2, answering: 2, replicas: 2, stuck: None });
    let waits = step(&mut subject, 11);
    assert_eq!(shown(&waits), (Some(a.clone()), Some((b.clone(), 0)), "WaitingForPods"));
    let message = &waits.rollout.candidate.as_ref().unwrap().message;
    assert_eq!(message, "1 of 2 pods are ready: 1 of 2 ready pods have loaded the adapter");
    load(&mut subject, &[&["m", &b, &a], &["m", &a, &b]]);
    assert_eq!(shown(&step(&mut subject, 12)), (Some(a.clone()), Some((b.clone(), 100)), "Canary"));
    let whole = subject.revisions.insert(shared(), workload(0)).unwrap();
    assert_eq!(shown(&decision(&subject, 13)).2, "Inconclusive", "the servers are the champion's as well");
    subject.revisions.insert(shared(), whole);
    let promoted = step(&mut subject, 13);
    assert_eq!(shown(&promoted), (Some(b.clone()), None, "Promoted"));

    // The champion stays loaded while it answers its last requests.
    assert_eq!(named(&servers(&subject, &promoted)[0].3), both);
    let retired = RetiredRevision {
        name: a,
        model_uri: Some("s3://adapters/a".into()),
        base: Some(BASE.into()),
        since: Time(at(13)),
    };
    assert_eq!(promoted.rollout.previous, Some(retired));
    let drained = step(&mut subject, 100);
    assert_eq!(named(&servers(&subject, &drained)[0].3), [(&*b, "s3://adapters/b")]);
    assert!(drained.remove.is_empty() && promoted.remove.is_empty(), "the shared servers stay");
    let status = subject.deployment.status.as_ref().unwrap();
    assert_eq!((&status.selector, status.replicas), (&Some(format!("athanor.dev/revision={}", shared())), 2));
}

#[test]
fn an_adapter_that_was_rolled_back_stays_loaded_until_its_requests_have_ended() {
    let b = revision_of("s3://adapters/b");
    let mut subject = answering();
    subject.deployment.spec.model.from = Some("s3://adapters/b".into());
    step(&mut subject, 10);
    // It cannot be loaded, and all the while its pods are ready.
    assert_eq!(shown(&step(&mut subject, 910)).1, Some((b.clone(), 0)));
    let over = step(&mut subject, 911);
    assert_eq!((shown(&over).1, over.rollout.progressing.reason), (None, "RolledBack"));
    let message = &over.rollout.progressing.message;
    assert!(message.contains("0 of 1 ready pods have loaded the adapter"), "{message}");
    assert_eq!(servers(&subject, &over)[0].3.len(), 2);
    let drained = step(&mut subject, 1000);
    assert_eq!((servers(&subject, &drained)[0].3.len(), drained.remove.len()), (1, 0));
    assert_eq!(drained.rollout.failed, [b]);
}

#[test]
fn the_first_adapter_is_ready_when_its_pods_have_loaded_it() {
    let mut subject = observed(of_base("s3://adapters/a"));
    let first = step(&mut subject, 0);
    assert_eq!(first.rollout.current.unwrap().base.as_deref(), Some(BASE));
    subject.revisions = [(shared(), workload(1))].into();
    let lacking: [&[&[&str]]; 2] = [&[], &[&["m"]]];
    for pods in lacking {
        load(&mut subject, pods);
        let waits = step(&mut subject, 5);
        assert_eq!((waits.ready.reason, waits.rollout.current.unwrap().ready_at), ("WaitingForPods", None), "{pods:?}");
    }
    load(&mut subject, &[&["m", &revision_of("s3://adapters/a")]]);
    let ready = step(&mut subject, 6);
    assert_eq!((ready.ready.reason, ready.rollout.current.unwrap().ready_at), ("Available", Some(Time(at(6)))));
    // From then on the pods are not asked any more.
    load(&mut subject, &[]);
    assert_eq!(step(&mut subject, 7).ready.reason, "Available");
}

#[test]
fn another_base_is_an_ordinary_new_revision() {
    let mut subject = answering();
    let source = subject.deployment.status.as_ref().unwrap().source.clone().unwrap();
    assert_eq!(source.value, "s3://adapters/a on s3://models/base");
    subject.deployment.spec.model.base.as_mut().unwrap().from = "s3://models/other".into();
    let canary = step(&mut subject, 10);
    let candidate = canary.rollout.candidate.as_ref().unwrap();
    assert_eq!(candidate.revision.name, names::adapter_revision("m", "s3://models/other", None, "s3://adapters/a"));
    let built = servers(&subject, &canary);
    let other = names::shared_servers("m", "s3://models/other");
    let shown: Vec<_> = built.iter().map(|(name, config, ..)| (name.as_str(), config.model_uri.as_str())).collect();
    assert_eq!(shown, [(&*shared(), BASE), (&*other, "s3://models/other")]);
    assert_eq!(built[1].3.len(), 1, "each has its own adapter alone");

    // After its canary the servers of the old base go with their last requests.
    subject.revisions.insert(other.clone(), workload(1));
    subject.loaded.insert(&other, vec![["m".to_owned(), candidate.revision.name.clone()].into()]);
    step(&mut subject, 11);
    let promoted = step(&mut subject, 12);
    assert_eq!((promoted.rollout.progressing.reason, promoted.remove.len()), ("Promoted", 0));
    assert_eq!(step(&mut subject, 100).remove, [shared()]);

    // Without a base, the same folder is a model with servers of its own.
    subject.deployment.spec.model.base = None;
    let plain = step(&mut subject, 200);
    let candidate = plain.rollout.candidate.as_ref().unwrap();
    assert_eq!(
        (&candidate.revision.name, &candidate.revision.base),
        (&names::revision("m", None, "s3://adapters/a"), &None)
    );
}

#[test]
fn a_job_that_trained_an_adapter_is_a_revision_of_the_base() {
    let over = Some(("True", "Succeeded"));
    let of_job = |base: bool| {
        let mut spec = json!({"model": {"fromJob": {"name": "first"}}});
        if base {
            spec["model"]["base"] = json!({"from": BASE});
        }
        observed(deployment(spec))
    };
    let adapter = || names::adapter_revision("m", BASE, Some("aaaaaaaa11"), "");
    // With a base or without; the job; the revision's name and base, or the reason that there is none.
    let table = [
        (true, lora_job("first", over, 1, "aaaaaaaa11"), Ok((adapter(), Some(BASE)))),
        (true, job("first", over, 1, "aaaaaaaa11"), Err("NoAdapter")),
        (true, lora_job("first", None, 1, ""), Err("WaitingForJob")),
        (true, lora_job("first", Some(("False", "GateFailed")), 1, "aaaaaaaa11"), Err("JobFailed")),
        (false, lora_job("first", over, 1, "aaaaaaaa11"), Ok((OLD.to_owned(), None))),
    ];
    for (base, job, expected) in table {
        let mut subject = of_job(base);
        subject.source_job = Some(job);
        let decided = decision(&subject, 60);
        let found = decided.rollout.current.as_ref().map(|current| (current.name.clone(), current.base.as_deref()));
        assert_eq!(found.ok_or(decided.ready.reason), expected);
    }

    // A retraining with an adapter is an adapter as well, one without is a model with servers of its own.
    let mut subject = of_job(true);
    subject.source_job = Some(lora_job("first", over, 1, "aaaaaaaa11"));
    step(&mut subject, 2);
    subject.revisions = [(shared(), workload(1))].into();
    load(&mut subject, &[&["m", &adapter()]]);
    step(&mut subject, 3);
    for (job, name, base) in [
        (
            lora_job("again", over, 50, "bbbbbbbb22"),
            names::adapter_revision("m", BASE, Some("bbbbbbbb22"), ""),
            Some(BASE),
        ),
        (job("again", over, 50, "bbbbbbbb22"), NEW.to_owned(), None),
    ] {
        subject.retrainings = vec![job];
        let candidate = decision(&subject, 60).rollout.candidate.unwrap().revision;
        assert_eq!((candidate.name, candidate.base.as_deref()), (name, base));
        assert_eq!(candidate.model_uri, "s3://out/again/artifact");
    }

    // A base that is added later makes the same job another revision.
    let mut subject = of_job(false);
    subject.source_job = Some(lora_job("first", over, 1, "aaaaaaaa11"));
    step(&mut subject, 2);
    subject.revisions = [(OLD.to_owned(), workload(1))].into();
    step(&mut subject, 3);
    subject.deployment.spec.model.base = of_job(true).deployment.spec.model.base;
    assert_eq!(shown(&step(&mut subject, 4)), (Some(OLD.into()), Some((adapter(), 0)), "WaitingForPods"));
}

#[test]
fn other_adapters_change_no_pod() {
    let mut subject = observed(deployment(json!({"model": {"from": "s3://models/a"}})));
    let before = servers(&subject, &decision(&subject, 1));
    assert!(before[0].3.is_empty());
    let router = |subject: &Observed, decision: &Decision| {
        let settings = Settings::parse_from(["athanor-operator"]);
        let children = build::build(&validate(&subject.deployment).unwrap(), &settings, decision, "00ff".into());
        children.router.unwrap().config.data.unwrap()["router.json"].clone()
    };
    let text = router(&subject, &decision(&subject, 1));
    assert!(!text.contains("adapter"), "a router of an earlier version reads it: {text}");
    subject.deployment.spec.adapters = serde_json::from_value(json!([
        {"name": "medical", "from": "s3://adapters/medical"},
        {"name": "legal", "fromJob": {"name": "lora"}},
    ]))
    .unwrap();
    subject.adapter_jobs = [("lora".to_owned(), lora_job("lora", Some(("True", "Succeeded")), 1, "aaaaaaaa"))].into();
    let decided = decision(&subject, 2);
    let after = servers(&subject, &decided);
    assert_eq!((&after[0].1, &after[0].2), (&before[0].1, &before[0].2));
    assert_eq!(named(&after[0].3), [("legal", "s3://out/lora/artifact"), ("medical", "s3://adapters/medical")]);
    let config: RouterConfig = serde_json::from_str(&router(&subject, &decided)).unwrap();
    assert_eq!(config.adapters, ["medical", "legal"]);
    assert_eq!(config.revisions[0].adapter, None, "the revision has servers of its own");

    // They are in the shared servers of a base, too.
    subject.deployment.spec.model.base = of_base("").spec.model.base;
    let shared = servers(&subject, &decision(&subject, 3));
    let revision = revision_of("s3://models/a");
    let expected =
        [("legal", "s3://out/lora/artifact"), (&*revision, "s3://models/a"), ("medical", "s3://adapters/medical")];
    assert_eq!(named(&shared[0].3), sorted(expected.to_vec()));
}

#[test]
fn an_adapter_waits_for_its_job_and_stays_when_the_job_is_deleted() {
    let mut subject = observed(deployment(json!({
        "model": {"from": "s3://models/a"}, "adapters": [{"name": "legal", "fromJob": {"name": "lora"}}],
    })));
    let over = Some(("True", "Succeeded"));
    let with = |subject: &mut Observed, job: Option<Arc<FineTuneJob>>| {
        subject.adapter_jobs = job.map(|job| ("lora".to_owned(), job)).into_iter().collect();
    };
    for (job, reason, part) in [
        (None, "JobNotFound", "legal: FineTuneJob lora does not exist (spec.adapters.fromJob)"),
        (Some(lora_job("lora", None, 1, "")), "WaitingForJob", "legal: FineTuneJob lora is not over"),
        (Some(lora_job("lora", Some(("False", "GateFailed")), 1, "")), "JobFailed", "GateFailed"),
        (Some(job("lora", over, 1, "aaaaaaaa")), "NoAdapter", "spec.adapter is absent"),
    ] {
        with(&mut subject, job);
        let decided = step(&mut subject, 2);
        let condition = decided.adapters.condition.clone().unwrap();
        assert_eq!((condition.state, condition.reason), (State::False, reason));
        assert!(condition.message.contains(part), "{}", condition.message);
        assert!(servers(&subject, &decided)[0].3.is_empty(), "the rest is served without it");
    }
    with(&mut subject, Some(lora_job("lora", over, 1, "aaaaaaaa")));
    let served = AdapterStatus { name: "legal".into(), uri: "s3://out/lora/artifact".into(), job: Some("lora".into()) };
    let decided = step(&mut subject, 3);
    assert_eq!(
        (&decided.adapters.served[..], decided.adapters.condition.unwrap().state),
        (&[served.clone()][..], State::True)
    );
    let status = subject.deployment.status.as_ref().unwrap();
    assert_eq!(condition::get(&status.conditions, types::ADAPTERS_RESOLVED).unwrap().status, "True");
    for job in [None, Some(lora_job("lora", None, 1, ""))] {
        with(&mut subject, job);
        assert_eq!(step(&mut subject, 4).adapters.served, std::slice::from_ref(&served));
    }
    // Another job is another adapter; without adapters there is no condition.
    subject.deployment.spec.adapters[0].from_job.as_mut().unwrap().name = "other".into();
    assert!(step(&mut subject, 5).adapters.served.is_empty());
    subject.deployment.spec.adapters.clear();
    step(&mut subject, 6);
    let status = subject.deployment.status.as_ref().unwrap();
    assert!(condition::get(&status.conditions, types::ADAPTERS_RESOLVED).is_none());
}

#[test]
fn the_name_of_an_adapter_is_its_own() {
    let with = |adapter: serde_json::Value| {
        validate(&deployment(json!({"model": {"from": "s3://models/a"}, "adapters": [adapter]}))).err()
    };
    let named = |name: &str| with(json!({"name": name, "from": "s3://adapters/a"}));
    for name in ["m", "m-01234567", "m-89abcdef"] {
        assert_eq!(named(name), Some(InvalidDeployment::AdapterName(name.into())));
    }
    for name in ["legal", "m-legal", "m-0123456", "m-012345678", "n-01234567"] {
        assert_eq!(named(name), None, "{name}");
    }
    for adapter in [json!({"name": "a"}), json!({"name": "a", "from": "s3://a", "fromJob": {"name": "j"}})] {
        assert_eq!(with(adapter), Some(InvalidDeployment::Adapter("a".into())));
    }
    let names = [
        revision_of("s3://adapters/a"),
        names::adapter_revision("m", "s3://models/other", None, "s3://adapters/a"),
        names::adapter_revision("m", BASE, Some("aaaaaaaa"), "s3://adapters/a"),
        shared(),
        names::revision("m", None, BASE),
        names::revision("m", None, "s3://adapters/a"),
    ];
    assert!(names.iter().all(|name| names::is_revision("m", name)));
    assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), names.len(), "{names:?}");
}
