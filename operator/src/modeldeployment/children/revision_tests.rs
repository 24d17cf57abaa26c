//! The children of a revision whose engine is a container.

use clap::Parser;
use serde_json::{Value, json};

use super::*;
use crate::modeldeployment::validate::{InvalidDeployment, validate};

const REVISION: &str = "m-aaaaaaaa";

/// The children of a revision of a deployment with this engine and further fields.
fn children(engine: Value, more: Value) -> Result<RevisionChildren, InvalidDeployment> {
    let mut spec = json!({"model": {"from": "s3://models/a"}, "credentialsSecretName": "s3", "engine": engine});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let deployment = serde_json::from_value(json!({
        "apiVersion": "athanor.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "m", "namespace": "ns", "uid": "d1"}, "spec": spec,
    }));
    let settings = Settings::parse_from(["athanor-operator", "--server-image=server:1", "--image-pull-secret=pull"]);
    let server = Server { name: REVISION.into(), model_uri: "s3://models/a".into(), adapters: Vec::new() };
    validate(&deployment.unwrap()).map(|deployment| build(&deployment, &settings, &server))
}

fn engine() -> Value {
    let args = ["--model", "$(MODEL_DIR)", "--served-model-name", "$(MODEL_NAME)", "--port", "$(PORT)"];
    json!({"container": {"image": "vllm:1", "args": args}})
}

fn pod(children: &RevisionChildren) -> Value {
    serde_json::to_value(&children.deployment.spec.as_ref().unwrap().template).unwrap()
}

/// The value of a variable of a container.
fn variable<'a>(container: &'a Value, name: &str) -> Option<&'a str> {
    container["env"].as_array()?.iter().find(|variable| variable["name"] == name)?["value"].as_str()
}

fn mounts(container: &Value) -> Vec<(&str, &str, bool)> {
    let mounts = container["volumeMounts"].as_array().unwrap().iter();
    mounts
        .map(|mount| {
            let text = |field: &str| mount[field].as_str().unwrap();
            (text("name"), text("mountPath"), mount["readOnly"] == json!(true))
        })
        .collect()
}

#[test]
fn an_init_container_fetches_the_model_and_the_users_container_reads_it() {
    let resources = json!({"limits": {"nvidia.com/gpu": "1", "memory": "64Gi"}});
    let env = json!([{"name": "AWS_REGION", "value": "here"}, {"name": "MODEL_DIR", "value": "/elsewhere"}]);
    let more = json!({"podTemplate": {"resources": resources, "env": env, "scratchSizeLimit": "90Gi"}});
    let children = children(engine(), more).unwrap();
    assert_eq!(children.warning, None, "nothing is known of the image, whatever the pods reserve");
    let template = pod(&children);
    let spec = &template["spec"];
    let [fetch, server] = [&spec["initContainers"][0], &spec["containers"][0]];

    assert_eq!(fetch["image"], "server:1");
    assert_eq!(
        fetch["command"],
        json!(["athanor-server", "fetch", "--config", "/etc/athanor/serve.json", "--to", "/mnt/models"])
    );
    assert_eq!(fetch["envFrom"][0]["secretRef"]["name"], "s3");
    assert_eq!(variable(fetch, "AWS_REGION"), Some("here"));
    assert_eq!(
        mounts(fetch),
        [("config", "/etc/athanor", true), ("model", "/mnt/models", false), ("tmp", "/tmp", false)]
    );
    assert_eq!(fetch["resources"]["limits"], json!({"memory": "1Gi"}), "the GPU is the server's");
    let config = children.config.data.as_ref().unwrap()["serve.json"].clone();
    let config: ServeConfig = serde_json::from_str(&config).unwrap();
    assert_eq!((&*config.model_uri, &*config.revision), ("s3://models/a", REVISION));

    assert_eq!(
        (&server["name"], &server["image"], &server["command"]),
        (&json!("server"), &json!("vllm:1"), &Value::Null)
    );
    assert_eq!(server["args"], engine()["container"]["args"]);
    let expected =
        [("MODEL_DIR", "/mnt/models"), ("MODEL_NAME", "m"), ("PORT", "8000"), ("HOME", "/tmp"), ("AWS_REGION", "here")];
    for (name, value) in expected {
        assert_eq!(variable(server, name), Some(value), "{name}");
    }
    assert_eq!(server["envFrom"], Value::Null, "the credentials of the store are not the server's");
    assert_eq!(server["resources"], resources);
    assert_eq!(mounts(server), [("model", "/mnt/models", true), ("shm", "/dev/shm", false), ("tmp", "/tmp", false)]);
    let volumes: Vec<&str> =
        spec["volumes"].as_array().unwrap().iter().map(|volume| volume["name"].as_str().unwrap()).collect();
    assert_eq!(volumes, ["model", "shm", "tmp", "config"]);
    assert_eq!(spec["volumes"][0]["emptyDir"]["sizeLimit"], "90Gi");
    assert_eq!(spec["imagePullSecrets"], json!([{"name": "pull"}]));
}

#[test]
fn the_pods_are_restricted_and_found_by_the_router_and_by_prometheus() {
    let children = children(engine(), json!({})).unwrap();
    let template = pod(&children);
    let spec = &template["spec"];
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
    assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(spec["automountServiceAccountToken"], false);
    for container in [&spec["initContainers"][0], &spec["containers"][0]] {
        let expected = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": true});
        assert_eq!(container["securityContext"], expected, "{}", container["name"]);
    }
    let server = &spec["containers"][0];
    assert_eq!(server["ports"], json!([{"name": "http", "containerPort": 8000, "protocol": "TCP"}]));
    let service = serde_json::to_value(&children.service.spec).unwrap();
    // The router takes the port of this name; there is none for gRPC.
    let port = json!({"name": "http", "port": 8080, "targetPort": "http", "protocol": "TCP"});
    assert_eq!(service["ports"], json!([port]));
    let labels = template["metadata"]["labels"].as_object().unwrap();
    let selector = service["selector"].as_object().unwrap();
    assert!(selector.iter().all(|(name, value)| labels[name] == *value), "{selector:?}");
    let annotations = &template["metadata"]["annotations"];
    for (name, value) in [("scrape", "true"), ("port", "8000"), ("path", "/metrics")] {
        assert_eq!(annotations[format!("prometheus.io/{name}")], value, "{name}");
    }
}

#[test]
fn a_pod_has_time_to_start_and_to_end_its_answers() {
    let found = children(engine(), json!({"maxRequestSeconds": 60})).unwrap();
    let template = pod(&found);
    let server = &template["spec"]["containers"][0];
    let probe = &server["startupProbe"];
    assert_eq!((&probe["httpGet"]["path"], &probe["httpGet"]["port"]), (&json!("/health"), &json!("http")));
    let product = probe["failureThreshold"].as_i64().unwrap() * probe["periodSeconds"].as_i64().unwrap();
    assert_eq!(product, 1800);
    // The stop delay is three seconds by default.
    assert_eq!(server["lifecycle"]["preStop"]["sleep"]["seconds"], 63);
    assert_eq!(template["spec"]["terminationGracePeriodSeconds"], 75);
    let deadline = |children: &RevisionChildren| children.deployment.spec.as_ref().unwrap().progress_deadline_seconds;
    assert_eq!(deadline(&found), Some(2400), "the model is fetched before the container starts");

    let mut own = engine();
    let fields = json!({"command": ["serve"], "port": 9000, "readinessPath": "/ready", "metricsPath": "/m", "startupTimeoutSeconds": 7,
        "drainSeconds": 120});
    own["container"].as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let found = children(own, json!({"maxRequestSeconds": 60, "image": "own:2"})).unwrap();
    let template = pod(&found);
    let server = &template["spec"]["containers"][0];
    assert_eq!(server["command"], json!(["serve"]));
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        assert_eq!(server[probe]["httpGet"]["path"], "/ready", "{probe}");
    }
    assert_eq!(server["lifecycle"]["preStop"]["sleep"]["seconds"], 123);
    // The hook must not take longer than the pod may.
    assert_eq!(template["spec"]["terminationGracePeriodSeconds"], 135);
    assert_eq!(template["metadata"]["annotations"]["prometheus.io/path"], "/m");
    assert_eq!((&server["ports"][0]["containerPort"], variable(server, "PORT")), (&json!(9000), Some("9000")));
    assert_eq!((&template["spec"]["initContainers"][0]["image"], deadline(&found)), (&json!("own:2"), Some(607)));
}

#[test]
fn the_builtin_engine_is_the_default_and_keeps_its_pods() {
    let found = children(json!({}), json!({})).unwrap();
    let template = pod(&found);
    assert_eq!(template["spec"]["initContainers"], Value::Null);
    let server = &template["spec"]["containers"][0];
    assert_eq!(
        (&server["image"], &server["args"], &server["lifecycle"]),
        (&json!("server:1"), &Value::Null, &Value::Null)
    );
    let ports = serde_json::to_value(&found.service.spec.unwrap().ports).unwrap();
    let names: Vec<&Value> = ports.as_array().unwrap().iter().map(|port| &port["targetPort"]).collect();
    assert_eq!(names, ["http", "grpc"]);
    assert_eq!(found.deployment.spec.unwrap().progress_deadline_seconds, Some(600));
    let both = json!({"builtin": {}, "container": {"image": "vllm:1"}});
    assert_eq!(children(both, json!({})).err(), Some(InvalidDeployment::Engine));
    let adapters = json!({"adapters": [{"name": "a", "from": "s3://adapters/a"}]});
    assert_eq!(children(engine(), adapters).err(), Some(InvalidDeployment::AdaptersOfContainer));
    let base = json!({"model": {"base": {"from": "s3://models/b"}, "from": "s3://adapters/a"}});
    assert_eq!(children(engine(), base).err(), Some(InvalidDeployment::AdaptersOfContainer));
}
