//! The dependency table of ARCHITECTURE.md, checked against what cargo says.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use serde_json::Value;

/// Crates that each crate of ours may use of ours, and other crates it must not reach, directly or through others.
const TABLE: [(&str, &[&str], &[&str]); 11] = [
    ("contract", &[], &["kube", "tch", "tokio"]),
    ("telemetry", &[], &["kube", "tch"]),
    ("store", &["contract"], &["kube", "tch"]),
    ("crds", &["contract"], &["kube-client", "tch"]),
    ("torch", &["contract"], &["kube", "axum", "tonic", "rdkafka"]),
    ("models", &["contract", "torch"], &["kube", "axum", "tonic", "reqwest", "rdkafka"]),
    ("feedback", &["contract", "store", "telemetry"], &["tch"]),
    ("operator", &["contract", "crds", "telemetry"], &["tch", "rdkafka"]),
    ("trainer", &["contract", "feedback", "models", "store", "telemetry", "torch"], &[]),
    ("serving", &["contract", "feedback", "models", "store", "telemetry", "torch"], &[]),
    ("tests", &["contract", "crds"], &["tch"]),
];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--offline", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Normal dependencies of each package by name (not for tests or build scripts).
fn edges(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let names: BTreeMap<&str, &str> = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap()))
        .collect();
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array().unwrap() {
        let uses = edges.entry(names[node["id"].as_str().unwrap()].to_owned()).or_default();
        for dependency in node["deps"].as_array().unwrap() {
            if dependency["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"].is_null()) {
                uses.insert(names[dependency["pkg"].as_str().unwrap()].to_owned());
            }
        }
    }
    edges
}

fn reach<'a>(edges: &'a BTreeMap<String, BTreeSet<String>>, from: &'a str) -> BTreeSet<&'a str> {
    let (mut seen, mut open) = (BTreeSet::new(), vec![from]);
    while let Some(name) = open.pop() {
        for next in edges.get(name).into_iter().flatten() {
            if seen.insert(next.as_str()) {
                open.push(next);
            }
        }
    }
    seen
}

#[test]
fn crates_use_only_what_the_table_allows() {
    let metadata = metadata();
    let edges = edges(&metadata);
    let ours: BTreeSet<String> =
        edges.keys().filter_map(|name| name.strip_prefix("athanor-")).map(str::to_owned).collect();
    let listed: BTreeSet<String> = TABLE.iter().map(|row| row.0.to_owned()).collect();
    assert_eq!(ours, listed, "the table and the workspace differ");
    for (name, allowed, forbidden) in TABLE {
        let package = format!("athanor-{name}");
        for used in edges[&package].iter().filter_map(|used| used.strip_prefix("athanor-")) {
            assert!(allowed.contains(&used), "{name} uses {used}, which the table does not allow");
        }
        let reached = reach(&edges, &package);
        for crate_name in forbidden {
            assert!(!reached.contains(crate_name), "{name} reaches {crate_name}, which the table forbids");
        }
    }
}

/// Kubernetes clients live in few places: the trainer never has one, serving only in its router, the operator only in three steps.
#[test]
fn the_kubernetes_client_stays_where_it_belongs() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let output = Command::new("grep")
        .args(["-rlE", "\\bkube(::|_runtime)", "--include=*.rs", "trainer", "serving", "models", "torch"])
        .current_dir(root)
        .output()
        .unwrap();
    for file in String::from_utf8(output.stdout).unwrap().lines() {
        assert!(
            file.starts_with("serving/src/router/") || file == "serving/src/bin/athanor-router.rs",
            "{file} uses kube outside the router"
        );
    }
    let output = Command::new("grep")
        .args(["-rlE", "\\bClient\\b", "--include=*.rs", "operator/src/finetunejob", "operator/src/modeldeployment"])
        .current_dir(root)
        .output()
        .unwrap();
    for file in String::from_utf8(output.stdout).unwrap().lines() {
        let step = std::path::Path::new(file).file_stem().unwrap().to_str().unwrap();
        assert!(["dereference", "apply", "status", "mod"].contains(&step), "{file} names a Client");
    }
}
