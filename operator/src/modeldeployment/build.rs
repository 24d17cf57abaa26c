//! The children of a ModelDeployment: for each revision a server's configuration, Deployment, Service and disruption budget.
//! The router, the monitor and retrainings are in [`super::build_front`].

use athanor_contract::{
    artifact::sha256_hex,
    process::{annotation, file, path, port, variable},
    serve::ServeConfig,
};
use athanor_crds::{FineTuneJob, RevisionStatus, label};
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{ConfigMap, PodTemplateSpec, Secret, Service, ServicePort, ServiceSpec},
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

use super::{
    build_front::{self, Account},
    decide::Plan,
    names::SERVER,
    validate::ValidatedDeployment,
};
use crate::{
    pods::{self, Labels, PodPlan},
    settings::Settings,
};

/// What one revision needs.
pub struct RevisionChildren {
    pub config: ConfigMap,
    pub deployment: Deployment,
    pub service: Service,
    pub budget: PodDisruptionBudget,
}

/// The stable address.
pub struct RouterChildren {
    pub config: ConfigMap,
    /// Created once, never changed.
    pub key: Secret,
    pub account: Account,
    pub deployment: Deployment,
    pub service: Service,
    pub budget: PodDisruptionBudget,
}

/// The monitor.
pub struct MonitorChildren {
    pub config: ConfigMap,
    pub account: Account,
    pub deployment: Deployment,
}

/// Everything that should be there.
pub struct Children {
    pub revisions: Vec<RevisionChildren>,
    /// Absent before the first model is known.
    pub router: Option<RouterChildren>,
    /// Absent without spec.monitor.
    pub monitor: Option<MonitorChildren>,
    /// A retraining to create.
    pub retraining: Option<FineTuneJob>,
}

/// `fresh_key` is used when there is no key for request ids yet.
pub fn build(deployment: &ValidatedDeployment, settings: &Settings, plan: &Plan, fresh_key: String) -> Children {
    let rollout = &plan.rollout;
    let candidate = rollout.candidate.as_ref().map(|candidate| &candidate.revision);
    let revisions: Vec<RevisionChildren> = rollout
        .current
        .iter()
        .chain(candidate)
        .map(|revision| revision_children(deployment, settings, revision))
        .collect();
    Children {
        revisions,
        router: build_front::router(deployment, settings, rollout, fresh_key),
        monitor: build_front::monitor(deployment, settings, rollout),
        retraining: plan.retraining.create.as_ref().and_then(|new| build_front::retraining(deployment, new)),
    }
}

fn revision_children(
    deployment: &ValidatedDeployment,
    settings: &Settings,
    revision: &RevisionStatus,
) -> RevisionChildren {
    let name = &revision.name;
    let selector = pods::selector(SERVER, &deployment.name, Some(name));
    let config = ServeConfig {
        model_name: deployment.name.clone(),
        revision: name.clone(),
        model_uri: revision.model_uri.clone(),
        http_port: port::HTTP,
        grpc_port: port::GRPC,
        limits: Default::default(),
    };
    let (http, grpc) = (i32::from(config.http_port), i32::from(config.grpc_port));
    let drain = i64::try_from(config.limits.drain_seconds).unwrap_or(20);
    let text = serde_json::to_string_pretty(&config).expect("a configuration has string keys only");
    let mut env = pods::common_environment(settings.otlp_endpoint.as_deref());
    env.push(pods::variable(variable::CACHE_DIR, path::MODEL_CACHE));
    let mut labels = pods::labels(SERVER, label::DEPLOYMENT, &deployment.name);
    labels.insert(label::REVISION.into(), name.clone());
    let mut template = pods::template(PodPlan {
        component: SERVER,
        image: deployment.spec.image.as_deref().unwrap_or(&settings.server_image),
        command: ["athanor-server", "--config", path::SERVE_CONFIG].map(Into::into).into(),
        labels: labels.clone(),
        // A changed configuration is another template.
        annotations: Labels::from([(annotation::CONFIG.into(), sha256_hex(text.as_bytes())[..16].into())]),
        env,
        credentials: deployment.spec.credentials_secret_name.as_deref(),
        ports: vec![("http", http), ("grpc", grpc)],
        metrics_port: http,
        volumes: vec![
            (pods::config(name), path::CONFIG.into()),
            (pods::scratch("cache", None), path::MODEL_CACHE.into()),
        ],
        overrides: deployment.spec.pod_template.as_ref(),
        service_account: None,
        grace_seconds: drain + 15,
        spread: Some(pods::selector(SERVER, &deployment.name, Some(name))),
    });
    // A model may take minutes to arrive; once it has, a pod that stops answering is noticed within seconds.
    probes(&mut template, "http", 600);
    let metadata = |name: &str| metadata(deployment, name, labels.clone());
    RevisionChildren {
        config: ConfigMap {
            metadata: metadata(name),
            data: Some([(file::SERVE.into(), text)].into()),
            ..ConfigMap::default()
        },
        deployment: workload(metadata(name), deployment.spec.replicas, selector.clone(), template),
        service: service(metadata(name), selector.clone(), &[("http", http, http), ("grpc", grpc, grpc)]),
        budget: budget(metadata(name), selector),
    }
}

/// Metadata of a child.
pub fn metadata(deployment: &ValidatedDeployment, name: &str, labels: Labels) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        namespace: Some(deployment.namespace.clone()),
        labels: Some(labels),
        owner_references: Some(deployment.owner.clone()),
        ..ObjectMeta::default()
    }
}

/// Startup, readiness and liveness of a template's one container.
pub fn probes(template: &mut PodTemplateSpec, port: &str, startup_seconds: i32) {
    let container = template.spec.as_mut().and_then(|spec| spec.containers.first_mut());
    if let Some(container) = container {
        container.startup_probe = Some(pods::probe("/readyz", port, 1, startup_seconds));
        container.readiness_probe = Some(pods::probe("/readyz", port, 2, 2));
        container.liveness_probe = Some(pods::probe("/healthz", port, 10, 3));
    }
}

/// A Deployment whose updates never have fewer pods than asked for.
pub fn workload(metadata: ObjectMeta, replicas: i32, selector: Labels, template: PodTemplateSpec) -> Deployment {
    Deployment {
        metadata,
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            selector: LabelSelector { match_labels: Some(selector), match_expressions: None },
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_unavailable: Some(IntOrString::Int(0)),
                    max_surge: Some(IntOrString::Int(1)),
                }),
            }),
            revision_history_limit: Some(2),
            progress_deadline_seconds: Some(600),
            template,
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

/// A Service with ports of (name, port, target port).
pub fn service(metadata: ObjectMeta, selector: Labels, ports: &[(&str, i32, i32)]) -> Service {
    let ports = ports.iter().map(|(name, port, target)| ServicePort {
        name: Some((*name).into()),
        port: *port,
        target_port: Some(IntOrString::Int(*target)),
        protocol: Some("TCP".into()),
        app_protocol: (*name == "grpc").then(|| "kubernetes.io/h2c".into()),
        ..ServicePort::default()
    });
    let spec = ServiceSpec { selector: Some(selector), ports: Some(ports.collect()), ..ServiceSpec::default() };
    Service { metadata, spec: Some(spec), status: None }
}

/// One pod at a time may be evicted.
pub fn budget(metadata: ObjectMeta, selector: Labels) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata,
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(LabelSelector { match_labels: Some(selector), match_expressions: None }),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}
