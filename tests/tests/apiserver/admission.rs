//! What a real API server takes and refuses by the CRDs alone: unknown fields, unions, ranges, immutability.

use anyhow::Result;
use athanor_tests::apiserver::ApiServer;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde_json::{Value, json};

fn api(client: &Client, kind: &str) -> Api<DynamicObject> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("athanor.dev", "v1alpha1", kind));
    Api::namespaced_with(client.clone(), "default", &resource)
}

fn job(change: impl Fn(&mut Value)) -> Value {
    let mut spec = json!({
        "model": {"from": "s3://bucket/model", "task": "TextClassification"},
        "data": {"sources": [{"name": "reviews", "uri": "s3://bucket/reviews.csv"}]},
        "output": {"to": "s3://bucket/out"},
    });
    change(&mut spec);
    json!({"apiVersion": "athanor.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"generateName": "job-"}, "spec": spec})
}

fn deployment(change: impl Fn(&mut Value)) -> Value {
    let mut spec = json!({"model": {"from": "s3://bucket/model"}});
    change(&mut spec);
    json!({"apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment", "metadata": {"generateName": "deployment-"}, "spec": spec})
}

/// An example of a rule between fields, as patches of [`job`]. The Rust rules decide the same examples in contract/tests/rules.rs.
#[derive(serde::Deserialize)]
struct Example {
    message: String,
    refused: Vec<Value>,
    accepted: Vec<Value>,
}

fn access(callers: Value) -> Value {
    json!({"apiKeys": {"secretName": "keys", "callers": callers}})
}

fn adapters(names: &[impl AsRef<str>]) -> Value {
    names.iter().map(|name| json!({"name": name.as_ref(), "from": "s3://bucket/adapter"})).collect()
}

fn numbered(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{number:02}{}", "a".repeat(61))).collect()
}

fn rules() -> Vec<Example> {
    serde_json::from_str(include_str!("../../../contract/tests/rules.json")).unwrap()
}

/// JSON merge patch (RFC 7396).
fn merge(target: &mut Value, patch: &Value) {
    match (target.as_object_mut(), patch) {
        (Some(target), Value::Object(patch)) => {
            for (name, value) in patch {
                merge(target.entry(name).or_insert(Value::Null), value);
            }
        }
        _ => *target = patch.clone(),
    }
}

/// A job that searches; `more` are further fields of the search.
fn search(parameters: Value, more: Value) -> Value {
    job(|spec| {
        spec["hyperparameters"]["search"] = json!({"parameters": parameters});
        spec["hyperparameters"]["search"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    })
}

/// Creates as `kubectl` does, with strict validation of fields. The message when refused.
async fn create(client: &Client, object: &Value) -> Result<DynamicObject, String> {
    let kind = object["kind"].as_str().unwrap();
    // kube's PostParams carries no fieldValidation, so the request is built by hand.
    let plural = if kind == "FineTuneJob" { "finetunejobs" } else { "modeldeployments" };
    let uri = format!("/apis/athanor.dev/v1alpha1/namespaces/default/{plural}?fieldValidation=Strict");
    let request = http_request(&uri, object);
    client.request::<DynamicObject>(request).await.map_err(|error| match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    })
}

fn http_request(uri: &str, body: &Value) -> http::Request<Vec<u8>> {
    http::Request::post(uri).header("content-type", "application/json").body(serde_json::to_vec(body).unwrap()).unwrap()
}

#[tokio::test]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
async fn the_api_server_refuses_what_cannot_work() -> Result<()> {
    let server = ApiServer::start().await?;
    let client = &server.client;

    // The smallest manifests are whole, and defaults are filled in.
    let made = create(client, &job(|_| {})).await.unwrap();
    assert_eq!(made.data["spec"]["hyperparameters"]["batchSize"], 32, "{}", made.data);
    create(client, &deployment(|_| {})).await.unwrap();
    let adapted = deployment(|spec| {
        spec["model"] = json!({"base": {"from": "s3://bucket/model"}, "fromJob": {"name": "lora"}});
        spec["adapters"] = adapters(&["legal"]);
    });
    create(client, &adapted).await.unwrap();
    let foreign =
        deployment(|spec| spec["engine"] = json!({"container": {"image": "vllm:1", "args": ["--port", "$(PORT)"]}}));
    let made_foreign = create(client, &foreign).await.unwrap();
    let container = json!({"image": "vllm:1", "args": ["--port", "$(PORT)"], "port": 8000, "readinessPath": "/health",
        "metricsPath": "/metrics", "startupTimeoutSeconds": 1800});
    assert_eq!(
        made_foreign.data["spec"]["engine"],
        json!({"container": container}),
        "without a default of the other engine"
    );
    let builtin = deployment(|spec| spec["engine"] = json!({"builtin": {"maxModelLength": 512}}));
    create(client, &builtin).await.unwrap();
    let parameters = json!([
        {"name": "learningRate", "range": {"min": 1e-5, "max": 1e-3, "scale": "Log"}},
        {"name": "batchSize", "values": [16.0, 32.0]},
        {"name": "optimizer", "choices": ["AdamW", "SGD"]},
    ]);
    let made_search = create(client, &search(parameters, json!({"algorithm": "ASHA", "asha": {}}))).await.unwrap();
    let found = &made_search.data["spec"]["hyperparameters"]["search"];
    assert_eq!((&found["maxTrials"], &found["asha"]["reductionFactor"]), (&json!(20), &json!(3)), "{found}");
    let annotated = create(client, &job(|spec| spec["data"]["annotate"] = json!({"teacher": {}}))).await.unwrap();
    let found = &annotated.data["spec"]["data"]["annotate"];
    assert_eq!(found["teacher"]["minimumConfidence"], "0.9", "{found}");

    let mut refused: Vec<(&str, Value)> = vec![
        ("unknown field", job(|spec| spec["hyperparameters"] = json!({"learningrate": 0.1}))),
        ("unknown field", job(|spec| spec["modle"] = json!({}))),
        (
            "Duplicate value",
            job(|spec| {
                let source = spec["data"]["sources"][0].clone();
                spec["data"]["sources"].as_array_mut().unwrap().push(source);
            }),
        ),
        ("should match", job(|spec| spec["model"]["from"] = "ftp://somewhere".into())),
        ("Unsupported value", job(|spec| spec["model"]["task"] = "Telepathy".into())),
        ("should have at least 1 items", job(|spec| spec["data"]["sources"] = json!([]))),
        ("less than or equal to", job(|spec| spec["hyperparameters"] = json!({"learningRate": 99}))),
        ("greater than or equal to", job(|spec| spec["hyperparameters"] = json!({"batchSize": 0}))),
        ("greater than or equal to", job(|spec| spec["hyperparameters"] = json!({"crossValidation": {"folds": 1}}))),
        ("less than or equal to", job(|spec| spec["hyperparameters"] = json!({"crossValidation": {"folds": 21}}))),
        ("Unsupported value", job(|spec| spec["failurePolicy"] = json!({"onNonFinite": "Ignore"}))),
        ("Unsupported value", search(json!([{"name": "luck", "values": [1.0]}]), json!({}))),
        (
            "Duplicate value",
            search(json!([{"name": "l1", "values": [0.0]}, {"name": "l1", "values": [0.1]}]), json!({})),
        ),
        ("should have at least 1 items", search(json!([]), json!({}))),
        (
            "greater than or equal to",
            search(
                json!([{"name": "l1", "values": [0.0]}]),
                json!({"algorithm": "ASHA", "asha": {"reductionFactor": 1}}),
            ),
        ),
        ("less than or equal to", search(json!([{"name": "l1", "values": [0.0]}]), json!({"maxTrials": 1000}))),
        ("should match", job(|spec| spec["evaluate"] = json!({"gates": [{"metric": "Accuracy", "minimum": "much"}]}))),
        (
            "Required value",
            job(|spec| {
                spec.as_object_mut().unwrap().remove("output");
            }),
        ),
        ("exactly one of from and fromJob", deployment(|spec| spec["model"] = json!({}))),
        (
            "exactly one of from and fromJob",
            deployment(|spec| spec["model"] = json!({"from": "s3://b/m", "fromJob": {"name": "j"}})),
        ),
        ("should match", deployment(|spec| spec["model"] = json!({"base": {"from": "models/b"}, "from": "s3://b/m"}))),
        ("Required value", deployment(|spec| spec["model"] = json!({"base": {}, "from": "s3://b/m"}))),
        ("exactly one of from and fromJob", deployment(|spec| spec["model"] = json!({"base": {"from": "s3://b/m"}}))),
        ("exactly one of from and fromJob", deployment(|spec| spec["adapters"] = json!([{"name": "a"}]))),
        (
            "exactly one of from and fromJob",
            deployment(|spec| spec["adapters"] = json!([{"name": "a", "from": "s3://b/a", "fromJob": {"name": "j"}}])),
        ),
        ("should match", deployment(|spec| spec["adapters"] = adapters(&["A b"]))),
        ("Duplicate value", deployment(|spec| spec["adapters"] = adapters(&["a", "a"]))),
        ("at most 64 items", deployment(|spec| spec["adapters"] = adapters(&numbered(65)))),
        ("spec.adapters: the name of an adapter must not be", {
            let mut named = deployment(|spec| spec["adapters"] = adapters(&["other", "legal"]));
            named["metadata"] = json!({"name": "legal"});
            named
        }),
        (
            "set at most one of builtin and container",
            deployment(|spec| spec["engine"] = json!({"builtin": {}, "container": {"image": "vllm:1"}})),
        ),
        ("model.base and adapters require engine.builtin", {
            let container = json!({"container": {"image": "vllm:1"}});
            deployment(|spec| (spec["engine"], spec["adapters"]) = (container.clone(), adapters(&["a"])))
        }),
        ("Required value", deployment(|spec| spec["engine"] = json!({"container": {"args": ["a"]}}))),
        (
            "greater than or equal to 1024",
            deployment(|spec| spec["engine"] = json!({"container": {"image": "vllm:1", "port": 80}})),
        ),
        (
            "should match",
            deployment(|spec| spec["engine"] = json!({"container": {"image": "vllm:1", "readinessPath": "health"}})),
        ),
        ("monitor requires feedback", deployment(|spec| spec["monitor"] = json!({}))),
        ("set apiKeys, tls or both", deployment(|spec| spec["access"] = json!({}))),
        ("should have at least 1 items", deployment(|spec| spec["access"] = access(json!([])))),
        (
            "Unsupported value: \"admin\"",
            deployment(|spec| spec["access"] = access(json!([{"name": "a", "scopes": ["admin"]}]))),
        ),
        ("should match", deployment(|spec| spec["access"] = access(json!([{"name": "../a"}])))),
        ("Duplicate value", deployment(|spec| spec["access"] = access(json!([{"name": "a"}, {"name": "a"}])))),
        (
            "less than or equal to 100",
            deployment(|spec| {
                spec["feedback"] = json!({"kafka": {"bootstrapServers": "k:9092"}, "maximumCallerPercent": 101});
            }),
        ),
        (
            "must not decrease",
            deployment(|spec| {
                spec["rollout"] = json!({"canary": {"steps": [{"trafficPercent": 50}, {"trafficPercent": 10}]}})
            }),
        ),
        (
            "less than or equal to",
            deployment(|spec| spec["rollout"] = json!({"canary": {"steps": [{"trafficPercent": 200}]}})),
        ),
    ];
    let rules = rules();
    let examples = rules.iter().flat_map(|example| example.refused.iter().map(|patch| (&*example.message, patch)));
    refused.extend(examples.map(|(message, patch)| (message, job(|spec| merge(spec, patch)))));
    assert!(refused.len() > 50, "only {} manifests", refused.len());
    for (part, object) in &refused {
        match create(client, object).await {
            Ok(_) => panic!("taken, but should be refused with {part:?}: {object}"),
            Err(message) => assert!(message.contains(part), "{part:?} is not in: {message}\n{object}"),
        }
    }

    for patch in rules.iter().flat_map(|example| &example.accepted) {
        create(client, &job(|spec| merge(spec, patch))).await.unwrap_or_else(|error| panic!("{error}: {patch}"));
    }

    // The specification of a job is fixed, but for what may change while it runs.
    let jobs = api(client, "FineTuneJob");
    let name = made.metadata.name.unwrap();
    let merge = async |patch: Value| {
        let patched = jobs.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map(|_| ()).map_err(|error| error.to_string())
    };
    merge(json!({"spec": {"suspend": true, "ttlSecondsAfterFinished": 60}})).await.unwrap();
    let message = merge(json!({"spec": {"output": {"to": "s3://bucket/elsewhere"}}})).await.unwrap_err();
    assert!(message.contains("immutable"), "{message}");

    let deployments = api(client, "ModelDeployment");
    let fed = deployment(|spec| spec["feedback"] = json!({"kafka": {"bootstrapServers": "k:9092", "topic": "a"}}));
    let made = create(client, &fed);
    let name = made.await.unwrap().metadata.name.unwrap();
    for (name, value, fine) in [
        ("retention.ms", json!("604800000"), true),
        ("retention.ms", json!(1), false),
        (&*"a".repeat(129), json!("1"), false),
    ] {
        let configured = deployment(|spec| {
            spec["feedback"] = json!({"kafka": {"bootstrapServers": "k:9092", "topicConfig": {name: value}}});
        });
        let created = create(client, &configured).await.map(|_| ());
        assert_eq!(created.is_ok(), fine, "{name}: {created:?}");
    }
    let patch = json!({"spec": {"feedback": {"kafka": {"topic": "b"}}}});
    let error = deployments.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await.unwrap_err();
    assert!(error.to_string().contains("topic is immutable"), "{error}");
    Ok(())
}

/// A specification with as many entries in each list that a rule reads as the schema allows, and names of the longest
/// kind.
fn largest_spec() -> Value {
    let name = |index: usize| format!("{index:02}{}", "s".repeat(61));
    let ranges: Vec<Value> = (0..1024).map(|partition| json!({"partition": partition, "begin": 0, "end": 9})).collect();
    let sources: Vec<Value> = (0..32)
        .map(|index| {
            let kafka = json!({"bootstrapServers": "kafka:9092", "topic": "t", "ranges": ranges});
            json!({"name": name(index), "kafka": kafka})
        })
        .collect();
    let gates: Vec<Value> = (0..32)
        .map(|_| json!({"metric": "Accuracy", "minimumGain": "0.1", "sources": (0..32).map(name).collect::<Vec<_>>()}))
        .collect();
    let names = "accumulateSteps batchSize beta1 beta2 clipNorm dropout epsilon l1 l2 learningRate maxSequenceLength momentum \
                 seed warmupRatio weightDecay epochs";
    let parameters: Vec<Value> = names
        .split_whitespace()
        .map(|name| json!({"name": name, "values": (0..64).map(|value| value as f64 / 1e4).collect::<Vec<f64>>()}))
        .collect();
    let terms = vec![
        json!({"weight": 1.0, "hiddenState": {"layers": (0..128).map(|_| json!({"teacher": 1, "student": 1})).collect::<Vec<_>>()}});
        16
    ];
    json!({
        "model": {
            "from": "s3://bucket/model", "task": "TextClassification",
            "labels": (0..1024).map(|index| format!("label {index}")).collect::<Vec<_>>(),
            "student": {"keepLayers": (0..128).collect::<Vec<_>>()},
        },
        "teacher": {"from": "s3://bucket/teacher"},
        "objective": {"terms": terms},
        "data": {"sources": sources},
        "hyperparameters": {"search": {"parameters": parameters}},
        "evaluate": {"baseline": "s3://bucket/baseline", "gates": gates},
        "compress": vec![json!({"quantize": {"method": "Int8Dynamic"}}); 8],
        "output": {"to": "s3://bucket/out"},
    })
}

/// The API server gives up on a rule whose evaluation costs too much: no list may be so long that this happens.
#[tokio::test]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn the_largest_manifests_are_within_the_cost_limits_of_the_rules() -> Result<()> {
    let server = ApiServer::start().await?;
    let job = job(|spec| *spec = largest_spec());
    create(&server.client, &job).await.unwrap_or_else(|error| panic!("{}", &error[..error.len().min(2000)]));
    let deployment = deployment(|spec| {
        let mut template = largest_spec();
        // One source is added for the recorded events.
        template["data"]["sources"].as_array_mut().unwrap().pop();
        let callers =
            (0..256).map(|number| json!({"name": format!("caller-{number}"), "tokensPerMinute": 1000})).collect();
        let steps = (1..=32).map(|step| json!({"trafficPercent": 3 * step + 4})).collect::<Vec<_>>();
        *spec = json!({
            "model": {"fromJob": {"name": "first"}},
            "adapters": adapters(&numbered(64)),
            "rollout": {"canary": {"steps": steps}},
            "feedback": {"kafka": {"bootstrapServers": "kafka:9092"}, "redact": vec!["[0-9]{4,}"; 16]},
            "monitor": {},
            "access": access(callers),
            "retrain": {"template": {"spec": template}},
        });
    });
    create(&server.client, &deployment).await.unwrap_or_else(|error| panic!("{}", &error[..error.len().min(2000)]));
    Ok(())
}

#[tokio::test]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn every_example_is_taken() -> Result<()> {
    use serde::Deserialize;
    let server = ApiServer::start().await?;
    let folder = athanor_tests::paths::checkout().join("examples");
    let mut taken = 0;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|ending| ending != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path)?;
        for document in serde_yaml::Deserializer::from_str(&text) {
            let mut object = Value::deserialize(document)?;
            if object["apiVersion"] == "athanor.dev/v1alpha1" {
                object["metadata"]["namespace"] = "default".into();
                create(&server.client, &object).await.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                taken += 1;
            }
        }
    }
    assert!(taken >= 12, "only {taken} examples");
    Ok(())
}
