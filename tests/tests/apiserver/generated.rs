//! Manifests generated from the schemas of the CRDs, on a real API server: mistakes are refused with the path of their
//! field, and whatever is accepted the operator reconciles without an error.
//!
//! `GENERATED_SEED` chooses others (the seed is printed). The fields of pod templates that are Kubernetes' own types have
//! values that Kubernetes takes, and none of the mistakes: it checks them when a pod is created.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use athanor_contract::train::{TrainSpec, mistakes};
use athanor_tests::{apiserver::ApiServer, paths};
use kube::{
    Api, Client,
    api::ListParams,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use proptest::{
    strategy::{Strategy, ValueTree},
    string::string_regex,
    test_runner::TestRunner,
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Map, Value, json};

use crate::operator::Operator;

const COUNT: usize = 500;
/// Kinds with the plural of their resources.
const KINDS: [(&str, &str); 2] = [("FineTuneJob", "finetunejobs"), ("ModelDeployment", "modeldeployments")];
const POD_TEMPLATES: [&str; 3] = ["podTemplate", "routerPodTemplate", "monitorPodTemplate"];

/// Draws values of a schema.
struct Generator {
    random: StdRng,
    runner: TestRunner,
}

impl Generator {
    fn new(seed: u64) -> Self {
        Self { random: StdRng::seed_from_u64(seed), runner: TestRunner::deterministic() }
    }

    /// A value of the schema; a property that is not required is there with the probability `optional`.
    fn value(&mut self, schema: &Value, optional: f64) -> Value {
        if let Some(options) = schema["enum"].as_array() {
            return options.choose(&mut self.random).cloned().unwrap_or_default();
        }
        if schema["x-kubernetes-int-or-string"] == true {
            return json!(self.random.random_range(1..10));
        }
        match schema["type"].as_str() {
            Some("object") => self.object(schema, optional),
            Some("array") => self.array(schema, optional),
            Some("string") => self.string(schema).into(),
            Some("boolean") => self.random.random::<bool>().into(),
            Some("integer") => self.integer(schema).into(),
            Some("number") => self.number(schema).into(),
            _ => json!({}),
        }
    }

    fn object(&mut self, schema: &Value, optional: f64) -> Value {
        let mut object = Map::new();
        if let Some(values) = schema.get("additionalProperties").filter(|values| values.is_object()) {
            for index in 0..self.random.random_range(0..3) {
                object.insert(format!("key{index}"), self.value(values, optional));
            }
        }
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let wanted = required.contains(&name.as_str()) || self.random.random_bool(optional);
            if wanted {
                let value = match POD_TEMPLATES.contains(&name.as_str()) {
                    true => self.pod_template(property),
                    false => self.value(property, optional),
                };
                object.insert(name.clone(), value);
            }
        }
        object.into()
    }

    /// Some of the fields of a pod template.
    fn pod_template(&mut self, schema: &Value) -> Value {
        let number: u32 = self.random.random_range(1..9);
        let (name, memory) = (format!("key{number}"), format!("{number}Gi"));
        let mut template = Map::new();
        for (field, value) in [
            ("resources", json!({"requests": {"memory": "64Mi"}, "limits": {"memory": memory, "cpu": "1500m"}})),
            ("nodeSelector", json!({(name.clone()): "value"})),
            ("tolerations", json!([{"key": name, "operator": "Exists", "effect": "NoSchedule"}])),
            ("labels", json!({(format!("example.org/{name}")): "value"})),
            ("annotations", json!({(format!("example.org/{name}")): "any value"})),
            ("serviceAccountName", json!(name)),
            ("env", json!([{"name": "SOME_VARIABLE", "value": name}])),
            ("scratchSizeLimit", json!(memory)),
            ("priorityClassName", json!(name)),
        ] {
            assert!(schema["properties"].get(field).is_some(), "pod templates have no field {field}");
            if self.random.random() {
                template.insert(field.into(), value);
            }
        }
        template.into()
    }

    fn array(&mut self, schema: &Value, optional: f64) -> Value {
        let least = schema["minItems"].as_u64().unwrap_or(0);
        let most = schema["maxItems"].as_u64().unwrap_or(3).min(least + 2);
        let count = self.random.random_range(least..=most);
        let mut items: Vec<Value> = (0..count).map(|_| self.value(&schema["items"], optional)).collect();
        // Keys of a list that is a map, and values of a set, occur once.
        let keys: Vec<&str> =
            schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let key = |item: &Value| match keys.is_empty() {
            true => item.to_string(),
            false => keys.iter().map(|name| item[*name].to_string()).collect(),
        };
        let mut seen = std::collections::BTreeSet::new();
        items.retain(|item| seen.insert(key(item)));
        items.into()
    }

    fn string(&mut self, schema: &Value) -> String {
        let least = schema["minLength"].as_u64().unwrap_or(0) as usize;
        let most = (schema["maxLength"].as_u64().unwrap_or(16) as usize).min(least + 12);
        if let Some(pattern) = schema["pattern"].as_str() {
            // The crate draws whole matches and knows no anchors; any character would be any of Unicode's.
            let pattern = pattern
                .trim_start_matches('^')
                .trim_end_matches('$')
                .replace(").+", ")[a-z0-9]{1,9}")
                .replace("//.+", "//[a-z0-9]{1,9}");
            let strategy = string_regex(&pattern).expect("a pattern of the schema");
            return strategy.new_tree(&mut self.runner).expect("a match").current();
        }
        let length = self.random.random_range(least..=most.max(least));
        (0..length).map(|_| char::from(*b"abcdefghij0123456789".choose(&mut self.random).unwrap_or(&b'a'))).collect()
    }

    fn integer(&mut self, schema: &Value) -> i64 {
        let least = schema["minimum"].as_f64().map_or(0, |least| least as i64);
        let most = schema["maximum"].as_f64().map_or(1_000, |most| most as i64).max(least);
        // Bounds are where mistakes are.
        match self.random.random_range(0..4) {
            0 => least,
            1 => most,
            _ => self.random.random_range(least..=most.min(least + 1_000)),
        }
    }

    fn number(&mut self, schema: &Value) -> f64 {
        let least = schema["minimum"].as_f64().unwrap_or(0.0);
        let most = schema["maximum"].as_f64().unwrap_or(least + 1.0);
        least + (most - least) * self.random.random_range(0.05..0.95)
    }

    /// Makes one mistake in a value of the schema; returns its path, such as `spec.data.sources[0].uri`. `None` if the
    /// value has no place for one.
    fn spoil(&mut self, schema: &Value, value: &mut Value) -> Option<String> {
        let mut places = Vec::new();
        find_places(schema, value, "spec".into(), String::new(), &mut places);
        let (pointer, path, schema) = places.choose(&mut self.random)?.clone();
        let target = value.pointer_mut(&pointer)?;
        match (schema["type"].as_str(), target) {
            (Some("object"), Value::Object(object)) => {
                let required: Vec<&str> =
                    schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
                let missing = required.into_iter().filter(|name| schema["properties"][*name].get("default").is_none());
                let missing: Vec<&str> = missing.filter(|name| object.contains_key(*name)).collect();
                match missing.choose(&mut self.random).filter(|_| self.random.random()) {
                    Some(name) => {
                        object.remove(*name);
                        Some(format!("{path}.{name}"))
                    }
                    None => {
                        object.insert("unheardOf".into(), json!(1));
                        Some(format!("{path}.unheardOf"))
                    }
                }
            }
            (kind, target) => {
                let most = schema["maximum"].as_f64().filter(|most| *most < 9e15);
                let longest = schema["maxLength"].as_u64().filter(|longest| *longest < 10_000);
                *target = match kind {
                    Some("string") if schema.get("enum").is_some() => json!("NoSuchValue"),
                    Some("string") if self.random.random() && longest.is_some() => {
                        "x".repeat(longest.unwrap_or(0) as usize + 1).into()
                    }
                    Some("string") if schema.get("pattern").is_some() => json!("\u{7f} no"),
                    Some("integer") if self.random.random() && most.is_some() => json!(most.unwrap_or(0.0) as i64 + 1),
                    Some("integer" | "number") if schema.get("minimum").is_some() => {
                        json!(schema["minimum"].as_f64().unwrap_or(0.0) as i64 - 1)
                    }
                    Some("string") => json!(7),
                    _ => json!("no"),
                };
                Some(path)
            }
        }
    }
}

/// Collects what can be spoilt: JSON pointer, path in messages, and schema. Values of maps are left out.
fn find_places(
    schema: &Value,
    value: &Value,
    path: String,
    pointer: String,
    places: &mut Vec<(String, String, Value)>,
) {
    if schema["x-kubernetes-int-or-string"] == true || schema["x-kubernetes-preserve-unknown-fields"] == true {
        return;
    }
    let is_map = schema.get("additionalProperties").is_some();
    match value {
        Value::Object(_) if is_map => {}
        Value::Object(object) => {
            places.push((pointer.clone(), path.clone(), schema.clone()));
            for (name, value) in object.iter().filter(|(name, _)| !POD_TEMPLATES.contains(&name.as_str())) {
                find_places(
                    &schema["properties"][name],
                    value,
                    format!("{path}.{name}"),
                    format!("{pointer}/{name}"),
                    places,
                );
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                find_places(&schema["items"], item, format!("{path}[{index}]"), format!("{pointer}/{index}"), places);
            }
        }
        _ => places.push((pointer, path, schema.clone())),
    }
}

/// The schema of a kind's specification.
fn schema(plural: &str) -> Result<Value> {
    let text = std::fs::read_to_string(paths::checkout().join(format!("crds/{plural}.yaml")))?;
    let crd: Value = serde_yaml::from_str(&text)?;
    Ok(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"].clone())
}

/// Creates as `kubectl` does, with strict validation of fields; the message when refused.
async fn create(client: &Client, plural: &str, object: &Value) -> Result<Result<(), String>> {
    let uri = format!("/apis/athanor.dev/v1alpha1/namespaces/default/{plural}?fieldValidation=Strict");
    let request =
        http::Request::post(&uri).header("content-type", "application/json").body(serde_json::to_vec(object)?)?;
    match client.request::<DynamicObject>(request).await {
        Ok(_) => Ok(Ok(())),
        Err(kube::Error::Api(status)) => Ok(Err(status.message.clone())),
        Err(error) => Err(error.into()),
    }
}

/// Whether the rules between the fields of the training hold.
fn keeps_rules(kind: &str, spec: &Value) -> bool {
    let training = match kind {
        "FineTuneJob" => spec,
        _ => match spec.pointer("/retrain/template/spec") {
            Some(training) => training,
            None => return true,
        },
    };
    serde_json::from_value::<TrainSpec>(training.clone()).is_ok_and(|training| mistakes(&training).is_empty())
}

fn manifest(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "athanor.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// Whether a message says what is wrong with the values of a search: each of its parts names a parameter of the search,
/// or `asha`, and a number that it calls out of bounds is one of that parameter's and out of these bounds.
fn is_mistake_of(search: &Value, message: &str) -> bool {
    let Some(mistakes) = message.strip_prefix("spec.hyperparameters.search: ") else { return false };
    let parameters = search["parameters"].as_array().map(Vec::as_slice).unwrap_or_default();
    mistakes.split("; search: ").all(|mistake| {
        let name = mistake.split([':', ' ']).next().unwrap_or_default();
        if name == "asha" {
            return true;
        }
        let Some(parameter) = parameters.iter().find(|parameter| parameter["name"] == name) else { return false };
        let Some((number, bounds)) = mistake.split_once(" is not between ") else { return true };
        let read = |text: &str| text.rsplit(' ').next().and_then(|word| word.parse::<f64>().ok());
        let (Some(number), Some((least, most))) = (read(number), bounds.split_once(" and ")) else { return false };
        let (Some(least), Some(most)) = (read(least), read(most)) else { return false };
        numbers(parameter).contains(&number) && !(least..=most).contains(&number)
    })
}

/// All numbers in a value.
fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        Value::Object(values) => values.values().flat_map(numbers).collect(),
        value => value.as_f64().into_iter().collect(),
    }
}

#[test]
fn only_a_mistake_that_the_search_has_is_one_of_it() {
    let search = json!({"parameters": [{"name": "learningRate", "range": {"min": 0.1, "max": 30}}]});
    let is_mistake = |message: &str| is_mistake_of(&search, &format!("spec.hyperparameters.{message}"));
    assert!(is_mistake("search: learningRate: 30 is not between 0 and 10"));
    assert!(is_mistake("search: asha: reductionFactor is at least 2; search: learningRate is there twice"));
    assert!(!is_mistake("search: learningRate: 30 is not between 0 and 100"), "it is");
    assert!(!is_mistake("search: learningRate: 20 is not between 0 and 10"), "the search has no 20");
    assert!(!is_mistake("search: batchSize: there are no values"), "the search has no such parameter");
    assert!(!is_mistake("learningRate: 30 is not between 0 and 10"), "not of the search");
    assert!(!is_mistake_of(&search, "the object store does not answer"));
}

/// How many objects have no conditions yet, reasons of conditions by their number, and what went wrong. A job may have
/// passed its deadline and its time to live, and be gone.
async fn reasons(client: &Client, kind: &str) -> Result<(usize, BTreeMap<String, usize>, Vec<String>)> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("athanor.dev", "v1alpha1", kind));
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), "default", &resource);
    let (mut reasons, mut wrong, mut open) = (BTreeMap::new(), Vec::new(), 0);
    for object in api.list(&ListParams::default()).await? {
        let conditions = object.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
        open += usize::from(conditions.is_empty());
        // The values that a search may try are checked by the operator, with their path.
        let search = object.data.pointer("/spec/hyperparameters/search");
        for condition in conditions {
            let reason = condition["reason"].as_str().unwrap_or_default().to_owned();
            // What is missing here belongs to a cluster: a job to serve from, pods that run.
            let message = condition["message"].as_str().unwrap_or_default();
            if search.is_some_and(|search| is_mistake_of(search, message)) {
                *reasons.entry("InvalidSearch".into()).or_insert(0) += 1;
                continue;
            }
            if reason.contains("Invalid") || reason.contains("Error") || reason.contains("Conflict") {
                let name = object.metadata.name.as_deref().unwrap_or_default();
                wrong.push(format!("{kind} {name}: {reason}: {}\n{}", condition["message"], object.data["spec"]));
            }
            *reasons.entry(reason).or_insert(0) += 1;
        }
    }
    Ok((open, reasons, wrong))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs etcd and kube-apiserver: make test-apiserver"]
async fn generated_manifests_are_refused_with_a_path_or_reconciled() -> Result<()> {
    let seed: u64 = std::env::var("GENERATED_SEED").map_or(Ok(1), |text| text.parse()).context("GENERATED_SEED")?;
    println!("GENERATED_SEED={seed}");
    let server = ApiServer::start().await?;
    let client = &server.client;
    let mut generator = Generator::new(seed);
    for (kind, plural) in KINDS {
        let schema = schema(plural)?;
        let (mut accepted, mut tried) = (Vec::new(), 0);
        while accepted.len() < COUNT {
            tried += 1;
            ensure!(tried < 2_000 * COUNT, "{kind}: only {} of {tried} manifests were accepted", accepted.len());
            let optional = generator.random.random_range(0.02..0.2);
            let spec = generator.value(&schema, optional);
            // Rules between fields, which the schema does not say.
            if !keeps_rules(kind, &spec) {
                continue;
            }
            let object = manifest(kind, &format!("valid-{}", accepted.len()), &spec);
            match create(client, plural, &object).await? {
                Ok(()) => accepted.push(spec),
                // Such a rule of a deployment, or a key that occurs twice; it has a path as well.
                Err(message) => ensure!(message.contains("spec"), "{kind}: {message}: {spec}"),
            }
        }
        let mut refused = 0;
        while refused < COUNT {
            let mut spec = accepted[generator.random.random_range(0..COUNT)].clone();
            let Some(path) = generator.spoil(&schema, &mut spec) else { continue };
            let answer = create(client, plural, &manifest(kind, "invalid", &spec)).await?;
            let message = answer.err().with_context(|| format!("{kind}: a mistake at {path} was accepted: {spec}"))?;
            ensure!(message.contains(&path), "{kind}: a mistake at {path} is not named: {message}");
            refused += 1;
        }
        println!("{kind}: {COUNT} accepted of {tried}, {refused} spoilt ones refused with their path");
    }

    let _operator = Operator::start(&server, "operator", &server.kubeconfig()?, &[])?;
    let begun = Instant::now();
    for (kind, _) in KINDS {
        let found = loop {
            let (open, reasons, wrong) = reasons(client, kind).await?;
            if open == 0 {
                break (reasons, wrong);
            }
            ensure!(
                begun.elapsed() < Duration::from_secs(240),
                "{kind}: {open} of {COUNT} not reconciled: {reasons:?}"
            );
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        println!("{kind}: reconciled, {:?}", found.0);
        ensure!(found.1.is_empty(), "{} went wrong, such as {}", found.1.len(), found.1[0]);
    }
    let log = std::fs::read_to_string(server.folder().join("operator.log"))?;
    let errors: Vec<&str> =
        log.lines().filter(|line| line.contains("\"ERROR\"") || line.contains("panicked")).collect();
    ensure!(errors.is_empty(), "{}", errors.join("\n"));
    println!("all reconciled after {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}
