//! Rules between fields: each example of `rules.json` by the Rust rule, and the rules that only Rust checks.
//!
//! `tests/tests/apiserver/admission.rs` gives the same examples to a real API server, which checks them by CEL.

use std::collections::BTreeSet;

use athanor_contract::{
    Decimal,
    train::{Metric, Task, TrainSpec, mistakes},
};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Example {
    message: String,
    refused: Vec<Value>,
    accepted: Vec<Value>,
}

fn examples() -> Vec<Example> {
    serde_json::from_str(include_str!("rules.json")).unwrap()
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

fn spec(patch: &Value) -> TrainSpec {
    let mut spec = json!({
        "model": {"from": "s3://bucket/model", "task": "TextClassification"},
        "data": {"sources": [{"name": "reviews", "uri": "s3://bucket/reviews.csv"}]},
        "output": {"to": "s3://bucket/out"},
    });
    merge(&mut spec, patch);
    serde_json::from_value(spec).unwrap_or_else(|error| panic!("{error}: {patch}"))
}

fn found(spec: &TrainSpec) -> Vec<String> {
    mistakes(spec).iter().map(ToString::to_string).collect()
}

/// The messages of all CEL rules in a schema; those below `hyperparameters.search` apart.
fn messages(schema: &Value, path: &str, all: &mut BTreeSet<(bool, String)>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        all.insert((path.contains(".search"), rule["message"].as_str().unwrap().to_owned()));
    }
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        messages(inner, &format!("{path}.{name}"), all);
    }
    for inner in [&schema["items"]].into_iter().chain(schema["anyOf"].as_array().into_iter().flatten()) {
        if inner.is_object() {
            messages(inner, path, all);
        }
    }
}

#[test]
fn every_cel_rule_has_examples_that_the_rust_rule_decides_alike() {
    let settings =
        schemars::generate::SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<TrainSpec>();
    let mut all = BTreeSet::new();
    messages(schema.as_value(), "", &mut all);
    let examples = examples();
    let listed: BTreeSet<&str> = examples.iter().map(|example| example.message.as_str()).collect();
    assert_eq!(listed, all.iter().map(|(_, message)| message.as_str()).collect(), "rules.json lists every CEL rule");
    for example in &examples {
        for patch in &example.accepted {
            assert_eq!(found(&spec(patch)), [""; 0], "{patch}");
        }
        if all.contains(&(true, example.message.clone())) {
            // The search crate parses a search's parameters and has a test of its own.
            continue;
        }
        for patch in &example.refused {
            let found = mistakes(&spec(patch));
            assert!(found.iter().any(|mistake| mistake.message == example.message), "{found:?}: {patch}");
        }
    }
}

#[test]
fn a_mistake_names_its_field() {
    let annotate = json!({"endpoint": {"url": "http://e/v1", "model": "m", "maximumCost": "1", "temperature": "3"}});
    let cases = [
        (json!({"data": {"annotate": annotate}}), "data.annotate.endpoint.temperature: must be between 0 and 2"),
        (json!({"data": {"annotate": annotate}}), "data.annotate.endpoint.labels: required unless model.labels is set"),
        (json!({"data": {"annotate": {"teacher": {}}}}), "data.annotate.teacher: requires a teacher"),
        (json!({"model": {"labels": ["a", "b", "a"]}}), "model.labels: \"a\" appears more than once"),
        (json!({"objective": {"terms": [{"softLabel": {}}]}}), "objective.terms[0].softLabel: requires a teacher"),
        (
            json!({"objective": {"terms": [{"contrastive": {}}]}}),
            "objective.terms[0].contrastive: the task TextClassification does not have this term; use crossEntropy, ",
        ),
        (json!({"objective": {"terms": [{}]}}), "objective.terms[0]: set exactly one of crossEntropy, "),
        (
            json!({"teacher": {"from": "s3://t"}, "objective": {"terms": [{"crossEntropy": {}}]}}),
            "teacher: nothing uses it: no term of objective.terms (crossEntropy) needs a teacher",
        ),
        (
            json!({"model": {"task": "MaskedLanguageModel"}, "teacher": {"from": "s3://t", "outputs": "Cached"}}),
            "teacher.outputs: Cached requires the task TextClassification without hiddenState terms",
        ),
        (
            json!({"model": {"task": "Embedding"}, "hyperparameters": {"accumulateSteps": 2}}),
            "hyperparameters.accumulateSteps: must be 1 for contrastive terms",
        ),
        (
            json!({"compress": [{"quantize": {}}, {"prune": {"twoOfFour": true}}]}),
            "compress[1]: prune must come before quantize",
        ),
        (
            json!({"evaluate": {"gates": [{"metric": "Accuracy", "minimum": "0.5", "sources": ["x"]}]}}),
            "evaluate.gates[0].sources: no source is named \"x\"",
        ),
        (
            json!({"data": {"sources": [{"name": "a", "uri": "s3://a"}, {"name": "a", "uri": "s3://b"}]}}),
            "data.sources[1].name: two sources are named \"a\"",
        ),
        (
            json!({"data": {"sources": [{"name": "a", "uri": "s3://a", "columns": {"pair": "answer"}}]}}),
            "data.sources[0].columns.pair: requires the task Embedding; TextClassification reads one text from each row",
        ),
        (
            json!({
                "model": {"student": {"fresh": {"layers": 1, "hiddenSize": 8, "attentionHeads": 2, "intermediateSize": 8}}},
                "data": {"select": {"method": "Random", "keepPercent": 50, "viewer": "Model"}},
            }),
            "data.select.viewer: Model requires a model with trained weights",
        ),
    ];
    for (patch, part) in cases {
        let found = found(&spec(&patch));
        assert!(found.iter().any(|mistake| mistake.starts_with(part)), "{part:?} is not in {found:#?}");
    }
}

#[test]
fn a_language_model_has_options_of_its_own() {
    let language_model = |patch: Value| {
        let mut all = json!({"model": {"task": "CausalLanguageModel"}});
        merge(&mut all, &patch);
        found(&spec(&all))
    };
    let gates = json!([{"metric": "Perplexity", "maximum": "5"}, {"metric": "TokenF1", "minimumGain": "0.1"}]);
    let valid = json!({
        "adapter": {"lora": {"rank": 8}},
        "hyperparameters": {"packing": true},
        "data": {"sources": [{"name": "a", "uri": "s3://a", "columns": {"messages": "chat"}}]},
        "evaluate": {"gates": gates, "generation": {"samples": 10}},
        "objective": {"terms": [{"nextToken": {}}]},
    });
    assert_eq!(language_model(valid), [""; 0]);
    let refused = json!({
        "model": {"labels": ["a", "b"]}, "compress": [{"quantize": {}}], "data": {"split": {"stratify": true}},
    });
    let fields = ["model.labels", "data.split.stratify", "compress"];
    assert_eq!(
        language_model(refused),
        fields.map(|field| format!("{field}: the task CausalLanguageModel does not support it"))
    );
    let classifier = json!({
        "adapter": {"lora": {}},
        "hyperparameters": {"packing": true},
        "data": {"sources": [{"name": "a", "uri": "s3://a", "columns": {"prompt": "p", "completion": "c"}}]},
    });
    let fields =
        ["adapter", "hyperparameters.packing", "data.sources[0].columns.prompt", "data.sources[0].columns.completion"];
    assert_eq!(
        found(&spec(&classifier)),
        fields.map(|field| format!("{field}: requires the task CausalLanguageModel"))
    );
}

#[test]
fn metrics_and_selections_are_of_the_task() {
    let of = |task: Task, metric: Option<Metric>, method: &str| {
        let mut search = json!({"parameters": [{"name": "learningRate", "values": [1e-5, 1e-4]}]});
        if let Some(metric) = metric {
            search["objective"] = json!({"metric": metric});
        }
        spec(&json!({
            "model": {"task": task},
            "data": {"select": {"method": method, "keepPercent": 50}},
            "hyperparameters": {"search": search},
            "evaluate": {"gates": [{"metric": "Accuracy", "minimum": "0"}, {"metric": "MacroF1", "minimum": "0"}]},
        }))
    };
    assert_eq!(found(&of(Task::TextClassification, None, "Uncertainty")), [""; 0]);
    let expected = [
        "data.select.method: GradientMatching requires labels, which the task TextRegression does not have",
        "hyperparameters.search.objective.metric: the task TextRegression has no Accuracy; use PearsonCorrelation",
        "evaluate.gates[0].metric: the task TextRegression has no Accuracy; use PearsonCorrelation",
        "evaluate.gates[1].metric: the task TextRegression has no MacroF1; use PearsonCorrelation",
    ];
    assert_eq!(found(&of(Task::TextRegression, None, "GradientMatching")), expected);
    assert_eq!(found(&of(Task::TextRegression, Some(Metric::PearsonCorrelation), "Random")), expected[2..]);
    let vectors = found(&of(Task::Embedding, None, "ClusterCenter"));
    assert_eq!(vectors, ["evaluate.gates[1].metric: the task Embedding has no MacroF1; use Accuracy"]);
}

#[test]
fn what_compares_with_the_teacher_requires_one() {
    let mut student = spec(&json!({
        "data": {"select": {"method": "Random", "keepPercent": 50}},
        "evaluate": {"gates": [{"metric": "Accuracy", "minimumOfTeacher": "0.97"}]},
    }));
    assert_eq!(found(&student), ["evaluate.gates[0].minimumOfTeacher: requires a teacher"]);
    student.teacher = serde_json::from_value(json!({"from": "s3://m/teacher"})).ok();
    student.data.augment = serde_json::from_value(json!({"copies": 4})).ok();
    student.data.select.as_mut().unwrap().minimum_agreement = Decimal::new(0.8);
    assert_eq!(found(&student), [""; 0]);
    student.objective = serde_json::from_value(json!({"terms": [{"crossEntropy": {}}]})).unwrap();
    let expected = "data.augment: no term of the objective needs the teacher, so nothing learns from the new texts";
    assert_eq!(found(&student), [expected]);
    student.teacher = None;
    let found = found(&student);
    for field in ["data.select.minimumAgreement", "data.augment", "evaluate.gates[0].minimumOfTeacher"] {
        assert!(found.contains(&format!("{field}: requires a teacher")), "{field}: {found:#?}");
    }
}
