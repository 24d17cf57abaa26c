//! The CustomResourceDefinitions as they are installed: what the derives give, made stricter where the API server wants
//! it.
//!
//! Besides the derives there are seven changes: every string, list and map gets a bound (the cost of a CEL rule is
//! estimated by bounds); formats that Kubernetes does not know go; `nullable` goes, since no type of ours writes null;
//! a FineTuneJob's specification becomes immutable (not in the type, because ModelDeployment has the same type in its
//! template, which may change); that template may leave out a baseline; no adapter has the name of its deployment; and
//! names are such that the children's names are valid.

use athanor_contract::train::rules::GAIN_NEEDS_BASELINE;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

use crate::{FineTuneJob, ModelDeployment};

/// Longest string where the type says nothing.
const STRING: u64 = 4096;
/// Most items of a list or a map where the type says nothing.
const ITEMS: u64 = 1024;
/// The only fields of a FineTuneJob's specification that may change.
const MUTABLE: [&str; 2] = ["suspend", "ttlSecondsAfterFinished"];

/// `{name}-{attempt}-{index}` is a pod's host name, which has at most 63 characters.
pub const LONGEST_JOB_NAME: usize = 52;
/// `{name}-{ten digits}` is the name of a retraining.
pub const LONGEST_DEPLOYMENT_NAME: usize = LONGEST_JOB_NAME - 11;

/// Every definition with the name of the file that holds it.
pub fn definitions() -> Vec<(&'static str, CustomResourceDefinition)> {
    vec![
        ("finetunejobs.yaml", strict(FineTuneJob::crd(), LONGEST_JOB_NAME, immutable)),
        ("modeldeployments.yaml", strict(ModelDeployment::crd(), LONGEST_DEPLOYMENT_NAME, deployment)),
    ]
}

/// A definition as YAML, with the line that says where it comes from.
pub fn yaml(definition: &CustomResourceDefinition) -> Result<String, serde_yaml::Error> {
    let text = serde_yaml::to_string(definition)?;
    Ok(format!("# Written by `cargo run -p athanor-crds --bin crdgen -- crds/`; change crds/src instead.\n{text}"))
}

fn strict(definition: CustomResourceDefinition, longest: usize, change: fn(&mut Value)) -> CustomResourceDefinition {
    let mut value = serde_json::to_value(definition).expect("a definition is JSON");
    for version in value["spec"]["versions"].as_array_mut().into_iter().flatten() {
        let schema = &mut version["schema"]["openAPIV3Schema"];
        tidy(schema);
        schema["x-kubernetes-validations"] = json!([{
            "rule": format!("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && self.metadata.name.size() <= {longest}"),
            "message": format!(
                "metadata.name names Services and pods: at most {longest} lower-case letters, digits and '-', beginning with a letter"),
        }]);
        change(schema);
    }
    // Defaults are objects, whose fields would otherwise be in the order of the structs.
    value.sort_all_objects();
    serde_json::from_value(value).expect("the changes keep it a definition")
}

/// The changes of a ModelDeployment's schema.
fn deployment(schema: &mut Value) {
    without_baseline_rule(&mut schema["properties"]["spec"]);
    let rule = json!({
        "rule": "!has(self.spec.adapters) || self.spec.adapters.all(adapter, adapter.name != self.metadata.name)",
        "message": "spec.adapters: the name of an adapter must not be the ModelDeployment's",
    });
    if let Some(rules) = schema["x-kubernetes-validations"].as_array_mut() {
        rules.push(rule);
    }
}

/// A retraining's baseline is the current artifact, which the operator fills in: a template may have gates with
/// minimumGain alone.
fn without_baseline_rule(spec: &mut Value) {
    let template = &mut spec["properties"]["retrain"]["properties"]["template"]["properties"]["spec"];
    if let Some(rules) = template["x-kubernetes-validations"].as_array_mut() {
        rules.retain(|rule| rule["message"] != *GAIN_NEEDS_BASELINE.message);
    }
}

/// One rule a field, so that the message names the field.
fn immutable(schema: &mut Value) {
    let spec = &mut schema["properties"]["spec"];
    let required: Vec<&str> = spec["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let properties = spec["properties"].as_object().cloned().unwrap_or_default();
    let rules = properties.iter().filter(|(name, _)| !MUTABLE.contains(&name.as_str())).map(|(name, schema)| {
        let same = format!("self.{name} == oldSelf.{name}");
        // A field with a default is always there by the time rules run.
        let rule = if required.contains(&name.as_str()) || schema.get("default").is_some() {
            same
        } else {
            format!("has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || {same})")
        };
        json!({"rule": rule, "message": format!("{name} is immutable: create another FineTuneJob"), "reason": "FieldValueForbidden", "fieldPath": format!(".{name}")})
    });
    let rules: Vec<Value> =
        spec["x-kubernetes-validations"].as_array().into_iter().flatten().cloned().chain(rules).collect();
    spec["x-kubernetes-validations"] = Value::from(rules);
}

/// Bounds and formats, at every depth.
fn tidy(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else { return };
    object.remove("nullable");
    if object.get("format").and_then(Value::as_str).is_some_and(|format| format.starts_with("uint")) {
        object.remove("format");
        object.entry("minimum").or_insert(json!(0));
    }
    match object.get("type").and_then(Value::as_str) {
        Some("string") if !object.contains_key("enum") && !object.contains_key("format") => {
            bound(object, "maxLength", STRING)
        }
        Some("array") => bound(object, "maxItems", ITEMS),
        Some("object") if object.contains_key("additionalProperties") => bound(object, "maxProperties", ITEMS),
        _ => {}
    }
    if object.get("x-kubernetes-int-or-string").is_some() {
        // A quantity or a port.
        bound(object, "maxLength", 64);
    }
    if let Some(properties) = object.get_mut("properties").and_then(Value::as_object_mut) {
        properties.values_mut().for_each(tidy);
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = object.get_mut(key) {
            tidy(inner);
        }
    }
}

fn bound(object: &mut Map<String, Value>, key: &str, most: u64) {
    object.entry(key).or_insert(json!(most));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(path: &str, schema: &Value, visit: &mut dyn FnMut(&str, &Value)) {
        visit(path, schema);
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            walk(&format!("{path}.{name}"), inner, visit);
        }
        for key in ["items", "additionalProperties"] {
            if schema[key].is_object() {
                walk(&format!("{path}[]"), &schema[key], visit);
            }
        }
    }

    #[test]
    fn the_yaml_beside_the_crate_is_what_crdgen_writes() {
        for (name, definition) in definitions() {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
            let committed = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(committed == yaml(&definition).unwrap(), "{name} is out of date: make generate");
        }
    }

    #[test]
    fn a_laptop_knows_which_fields_only_a_cluster_needs() {
        let fields = |schema: &Value| -> std::collections::BTreeSet<String> {
            schema["properties"].as_object().unwrap().keys().cloned().collect()
        };
        let (_, job) = definitions().into_iter().find(|(name, _)| name.starts_with("finetunejobs")).unwrap();
        let schema = serde_json::to_value(&job.spec.versions[0].schema).unwrap();
        let trained = schemars::schema_for!(athanor_contract::train::TrainSpec);
        let trained = fields(&serde_json::to_value(trained).unwrap());
        let rest = &fields(&schema["openAPIV3Schema"]["properties"]["spec"]) - &trained;
        assert_eq!(rest, athanor_contract::train::CLUSTER_FIELDS.map(str::to_owned).into());
    }

    #[test]
    fn every_field_is_described_structural_and_bounded() {
        for (name, definition) in definitions() {
            let schema = serde_json::to_value(&definition.spec.versions[0].schema).unwrap();
            walk("", &schema["openAPIV3Schema"], &mut |path, schema| {
                let foreign = path.contains("podTemplate.") || path.contains("conditions[]");
                let outside =
                    path.is_empty() || path.ends_with("[]") || [".apiVersion", ".kind", ".metadata"].contains(&path);
                assert!(foreign || outside || schema["description"].is_string(), "{name}: {path} has no description");
                for key in ["anyOf", "oneOf", "allOf", "$ref"] {
                    assert!(
                        schema[key].is_null() || schema["x-kubernetes-int-or-string"] == true,
                        "{name}: {path} has {key}"
                    );
                }
                assert!(
                    schema["type"].is_string() || schema["x-kubernetes-int-or-string"] == true,
                    "{name}: {path} has no type"
                );
                match schema["type"].as_str() {
                    Some("string") => assert!(
                        !(schema["maxLength"].is_null() && schema["enum"].is_null() && schema["format"].is_null()),
                        "{name}: {path} is unbounded"
                    ),
                    Some("array") => assert!(schema["maxItems"].is_u64(), "{name}: {path} is unbounded"),
                    _ => {}
                }
            });
        }
    }

    #[test]
    fn a_job_of_ten_lines_gets_every_default() {
        let job: FineTuneJob = serde_yaml::from_str(
            "apiVersion: athanor.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: a}\nspec:\n  model: {from: s3://m/a, task: TextClassification}\n  \
             data: {sources: [{name: reviews, uri: s3://d/a.jsonl}]}\n  output: {to: s3://o}\n",
        )
        .unwrap();
        assert_eq!(job.spec.train.hyperparameters.batch_size, 32);
        assert_eq!(job.spec.train.distributed.num_nodes, 1);
        assert!(!job.spec.suspend);
    }
}
