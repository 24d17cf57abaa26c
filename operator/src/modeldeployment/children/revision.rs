//! The servers of a revision, or of revisions that are adapters of the same model, with their Service.

use athanor_contract::{
    artifact::sha256_hex,
    process::{annotation, file, path, port, variable},
    serve::{AdaptersFile, EngineConfig, ServeConfig, ServeLimits},
};
use athanor_crds::label;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, PodTemplateSpec, Service},
    policy::v1::PodDisruptionBudget,
};

use super::{
    common::{Kind, Port, budget, grace_seconds, metadata, probes, service, workload},
    container,
};
use crate::{
    modeldeployment::{
        names::SERVER,
        policy::servers::Server,
        validate::{Engine, ValidatedDeployment},
    },
    pods::{self, HttpProbe, Labels, PodPlan},
    settings::Settings,
};

/// Children of one group of servers. All of them have its name.
pub struct RevisionChildren {
    pub config: ConfigMap,
    pub deployment: Deployment,
    pub service: Service,
    pub budget: PodDisruptionBudget,
    /// Why the servers are not expected to use their GPUs.
    pub warning: Option<String>,
}

/// Kinds of a revision's children in the order of their deletion. The Deployment is last, because a revision that has
/// one is removed again if the operator is killed in between.
pub const REMOVAL: [Kind; 4] = [Kind::PodDisruptionBudget, Kind::Service, Kind::ConfigMap, Kind::Deployment];

/// Builds the children of a group of servers.
pub fn build(deployment: &ValidatedDeployment, settings: &Settings, server: &Server) -> RevisionChildren {
    let name = &server.name;
    let selector = pods::selector(SERVER, &deployment.name, Some(name));
    let config = ServeConfig {
        model_name: deployment.name.clone(),
        revision: name.clone(),
        model_uri: server.model_uri.clone(),
        http_port: port::HTTP,
        grpc_port: port::GRPC,
        limits: ServeLimits {
            max_request_seconds: deployment.spec.max_request_seconds.into(),
            max_queue_seconds: deployment.spec.engine.max_queue_seconds(),
            ..ServeLimits::default()
        },
        engine: match deployment.engine {
            Engine::Builtin(engine) => engine,
            Engine::Container(_) => EngineConfig::default(),
        },
        adapters: Vec::new(),
        accept_any_model: false,
    };
    let text = serde_json::to_string_pretty(&config).expect("a configuration has string keys only");
    let adapters = AdaptersFile { adapters: server.adapters.clone() };
    let adapters = serde_json::to_string_pretty(&adapters).expect("a configuration has string keys only");
    let mut labels = pods::labels(SERVER, label::DEPLOYMENT, &deployment.name);
    labels.insert(label::REVISION.into(), name.clone());
    // A changed configuration changes the template, and so restarts the pods; other adapters do not.
    let annotations = Labels::from([(annotation::CONFIG.into(), sha256_hex(text.as_bytes())[..16].into())]);
    let metadata = |name: &str| metadata(deployment, name, labels.clone());
    let mut ports = vec![Port { name: "http", port: config.http_port.into(), target: "http" }];
    let (mut warning, mut progress_deadline) = (None, None);
    let template = match &deployment.engine {
        Engine::Builtin(_) => {
            ports.push(Port { name: "grpc", port: config.grpc_port.into(), target: "grpc" });
            let own = deployment.spec.image.as_deref();
            let choice = settings.server_images().choose(own, deployment.spec.pod_template.as_ref());
            warning = choice.warning;
            template(deployment, settings, &config, choice.image, labels.clone(), annotations)
        }
        Engine::Container(engine) => {
            progress_deadline = Some(container::progress_deadline_seconds(engine));
            container::template(deployment, settings, engine, name, labels.clone(), annotations)
        }
    };
    let mut workload = workload(metadata(name), deployment.spec.replicas, selector.clone(), template);
    if let (Some(seconds), Some(spec)) = (progress_deadline, &mut workload.spec) {
        spec.progress_deadline_seconds = Some(seconds);
    }
    RevisionChildren {
        config: ConfigMap {
            metadata: metadata(name),
            data: Some([(file::SERVE.into(), text), (file::ADAPTERS.into(), adapters)].into()),
            ..ConfigMap::default()
        },
        deployment: workload,
        service: service(metadata(name), selector.clone(), &ports),
        budget: budget(metadata(name), selector),
        warning,
    }
}

/// Builds the template of the pods of athanor-server.
fn template(
    deployment: &ValidatedDeployment,
    settings: &Settings,
    config: &ServeConfig,
    image: &str,
    labels: Labels,
    annotations: Labels,
) -> PodTemplateSpec {
    let name = &config.revision;
    let (http, grpc) = (i32::from(config.http_port), i32::from(config.grpc_port));
    let mut env = pods::common_environment(settings.otlp_endpoint.as_deref());
    env.push(pods::variable(variable::CACHE_DIR, path::MODEL_CACHE));
    env.push(pods::variable(variable::SHUTDOWN_GRACE_SECONDS, settings.stop_delay_seconds.to_string()));
    let size_limit = deployment.spec.pod_template.as_ref().and_then(|pod| pod.scratch_size_limit.as_ref());
    // A model may take minutes to arrive.
    let startup = HttpProbe { path: "/readyz", port: "http", period_seconds: 1, failures: 600 };
    pods::template(PodPlan {
        component: SERVER,
        image,
        pull_secrets: &settings.image_pull_secrets,
        command: ["athanor-server", "--config", path::SERVE_CONFIG].map(Into::into).into(),
        labels,
        annotations,
        env,
        credentials: deployment.spec.credentials_secret_name.as_deref().into_iter().collect(),
        ports: vec![("http", http), ("grpc", grpc)],
        metrics_port: http,
        volumes: vec![
            (pods::config(name), path::CONFIG.into()),
            (pods::scratch("cache", size_limit), path::MODEL_CACHE.into()),
        ],
        probes: Some(probes("http", startup)),
        overrides: deployment.spec.pod_template.as_ref(),
        service_account: None,
        grace_seconds: grace_seconds(settings, config.limits.drain_seconds, config.limits.max_request_seconds),
        spread: Some(pods::selector(SERVER, &deployment.name, Some(name))),
    })
}

#[cfg(test)]
#[path = "revision_tests.rs"]
mod tests;
