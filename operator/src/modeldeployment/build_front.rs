//! What stands in front of revisions and beside them: router, monitor, and the FineTuneJob of a retraining.

use athanor_contract::{
    process::{api, file, path, port, variable},
    serve::{MonitorConfig, MonitoredRevision, RouterConfig, RouterRevision},
    train::{KafkaSource, Source},
};
use athanor_crds::{FineTuneJob, label};
use k8s_openapi::api::{
    core::v1::{ConfigMap, EnvVar, EnvVarSource, Secret, SecretKeySelector, ServiceAccount},
    rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject},
};

use super::{
    build::{MonitorChildren, RouterChildren, budget, metadata, probes, service, workload},
    names::{self, MONITOR, ROUTER},
    retrain::NewRetraining,
    rollout::Rollout,
    validate::ValidatedDeployment,
};
use crate::{
    pods::{self, Labels, PodPlan},
    settings::Settings,
};

const HTTP_PORT: i32 = port::HTTP as i32;
const GRPC_PORT: i32 = port::GRPC as i32;
const ROUTER_OPS_PORT: i32 = port::ROUTER_OPS as i32;
const MONITOR_OPS_PORT: i32 = port::MONITOR_OPS as i32;
/// Key of the Secret that holds the key of request ids.
const KEY: &str = "key";

/// Who a process is to the API server, and the little that it may do.
pub struct Account {
    pub account: ServiceAccount,
    pub role: Role,
    pub binding: RoleBinding,
}

fn account(deployment: &ValidatedDeployment, name: &str, labels: &Labels, rules: Vec<PolicyRule>) -> Account {
    let metadata = || metadata(deployment, name, labels.clone());
    Account {
        account: ServiceAccount {
            metadata: metadata(),
            automount_service_account_token: Some(false),
            ..ServiceAccount::default()
        },
        role: Role { metadata: metadata(), rules: Some(rules) },
        binding: RoleBinding {
            metadata: metadata(),
            role_ref: RoleRef { api_group: "rbac.authorization.k8s.io".into(), kind: "Role".into(), name: name.into() },
            subjects: Some(vec![Subject {
                kind: "ServiceAccount".into(),
                name: name.into(),
                namespace: Some(deployment.namespace.clone()),
                api_group: None,
            }]),
        },
    }
}

fn rule(group: &str, resource: &str, verbs: &[&str], name: Option<&str>) -> PolicyRule {
    PolicyRule {
        api_groups: Some(vec![group.into()]),
        resources: Some(vec![resource.into()]),
        resource_names: name.map(|name| vec![name.into()]),
        verbs: verbs.iter().map(|verb| (*verb).into()).collect(),
        ..PolicyRule::default()
    }
}

/// The weights of all revisions; they add up to 100.
pub fn weights(rollout: &Rollout) -> Vec<RouterRevision> {
    let revision = |name: &str, weight| RouterRevision { name: name.into(), service: name.into(), weight };
    let candidate =
        rollout.candidate.as_ref().map(|candidate| (candidate.revision.name.as_str(), candidate.weight.min(100)));
    let share = candidate.map_or(0, |(_, weight)| weight);
    let current = rollout.current.iter().map(|current| revision(&current.name, 100 - share));
    current.chain(candidate.map(|(name, weight)| revision(name, weight))).collect()
}

pub fn router(
    deployment: &ValidatedDeployment,
    settings: &Settings,
    rollout: &Rollout,
    fresh_key: String,
) -> Option<RouterChildren> {
    rollout.current.as_ref()?;
    let name = names::router(&deployment.name);
    let labels = pods::labels(ROUTER, label::DEPLOYMENT, &deployment.name);
    let selector = pods::selector(ROUTER, &deployment.name, None);
    let config = RouterConfig {
        namespace: deployment.namespace.clone(),
        deployment: deployment.name.clone(),
        revisions: weights(rollout),
        events: deployment.events.clone(),
        limits: Default::default(),
    };
    let grace = i64::try_from(config.limits.drain_seconds).unwrap_or(20) + 15;
    let text = serde_json::to_string_pretty(&config).expect("a configuration has string keys only");
    let mut env = pods::common_environment(settings.otlp_endpoint.as_deref());
    env.push(pods::variable(variable::SPILL_DIR, path::SPOOL));
    env.push(EnvVar {
        name: variable::REQUEST_ID_KEY.into(),
        value: None,
        value_from: Some(EnvVarSource {
            secret_key_ref: Some(SecretKeySelector {
                name: names::router_key(&deployment.name),
                key: KEY.into(),
                optional: Some(false),
            }),
            ..EnvVarSource::default()
        }),
    });
    let mut template = pods::template(PodPlan {
        component: ROUTER,
        image: &settings.router_image,
        command: ["athanor-router", "--namespace", &deployment.namespace, "--config-map", &name].map(Into::into).into(),
        labels: labels.clone(),
        annotations: Labels::new(),
        env,
        credentials: None,
        ports: vec![("http", HTTP_PORT), ("grpc", GRPC_PORT), ("ops", ROUTER_OPS_PORT)],
        metrics_port: ROUTER_OPS_PORT,
        volumes: vec![(pods::scratch("spool", None), path::SPOOL.into())],
        overrides: None,
        service_account: Some(name.clone()),
        grace_seconds: grace,
        spread: Some(pods::selector(ROUTER, &deployment.name, None)),
    });
    // It is ready only once a server is, which may take as long as a model takes to arrive: no startup probe ends it before.
    probes(&mut template, "ops", 60);
    if let Some(container) = template.spec.as_mut().and_then(|spec| spec.containers.first_mut()) {
        container.startup_probe = Some(pods::probe("/healthz", "ops", 1, 60));
    }
    // A name narrows list and watch too, as long as the field selector names it.
    let rules = vec![
        rule("", "configmaps", &["get", "list", "watch"], Some(&name)),
        rule("discovery.k8s.io", "endpointslices", &["get", "list", "watch"], None),
    ];
    let metadata = |name: &str| metadata(deployment, name, labels.clone());
    Some(RouterChildren {
        config: ConfigMap {
            metadata: metadata(&name),
            data: Some([(file::ROUTER.into(), text)].into()),
            ..ConfigMap::default()
        },
        key: Secret {
            metadata: metadata(&names::router_key(&deployment.name)),
            string_data: Some([(KEY.into(), fresh_key)].into()),
            ..Secret::default()
        },
        account: account(deployment, &name, &labels, rules),
        deployment: workload(metadata(&name), settings.router_replicas, selector.clone(), template),
        service: service(
            metadata(&deployment.name),
            selector.clone(),
            &[("http", port::SERVICE_HTTP.into(), HTTP_PORT), ("grpc", GRPC_PORT, GRPC_PORT)],
        ),
        budget: budget(metadata(&name), selector),
    })
}

pub fn monitor(deployment: &ValidatedDeployment, settings: &Settings, rollout: &Rollout) -> Option<MonitorChildren> {
    let (windows, events) = deployment.spec.monitor.clone().zip(deployment.events.clone())?;
    rollout.current.as_ref()?;
    let name = names::monitor(&deployment.name);
    let labels = pods::labels(MONITOR, label::DEPLOYMENT, &deployment.name);
    let candidate = rollout.candidate.as_ref().map(|candidate| &candidate.revision);
    let revisions = rollout.current.iter().chain(candidate);
    let config = MonitorConfig {
        namespace: deployment.namespace.clone(),
        deployment: deployment.name.clone(),
        events,
        // The current one first.
        revisions: revisions
            .map(|revision| MonitoredRevision { name: revision.name.clone(), model_uri: revision.model_uri.clone() })
            .collect(),
        windows,
    };
    let text = serde_json::to_string_pretty(&config).expect("a configuration has string keys only");
    let mut template = pods::template(PodPlan {
        component: MONITOR,
        image: &settings.monitor_image,
        command: ["athanor-monitor", "--config", path::MONITOR_CONFIG].map(Into::into).into(),
        labels: labels.clone(),
        annotations: Labels::new(),
        env: pods::common_environment(settings.otlp_endpoint.as_deref()),
        credentials: deployment.spec.credentials_secret_name.as_deref(),
        ports: vec![("ops", MONITOR_OPS_PORT)],
        metrics_port: MONITOR_OPS_PORT,
        volumes: vec![(pods::config(&name), path::CONFIG.into())],
        overrides: None,
        service_account: Some(name.clone()),
        grace_seconds: 30,
        spread: None,
    });
    probes(&mut template, "ops", 300);
    if let Some(container) = template.spec.as_mut().and_then(|spec| spec.containers.first_mut()) {
        container.startup_probe = Some(pods::probe("/healthz", "ops", 1, 60));
    }
    let rules = vec![
        rule(api::GROUP, api::MODEL_DEPLOYMENTS, &["get"], Some(&deployment.name)),
        rule(api::GROUP, "modeldeployments/status", &["get", "patch"], Some(&deployment.name)),
    ];
    let metadata = |name: &str| metadata(deployment, name, labels.clone());
    let mut workload = workload(metadata(&name), 1, pods::selector(MONITOR, &deployment.name, None), template);
    // Two at once would share partitions, and each would see half of the traffic.
    if let Some(strategy) = workload.spec.as_mut().and_then(|spec| spec.strategy.as_mut()) {
        strategy.type_ = Some("Recreate".into());
        strategy.rolling_update = None;
    }
    Some(MonitorChildren {
        config: ConfigMap {
            metadata: metadata(&name),
            data: Some([(file::MONITOR.into(), text)].into()),
            ..ConfigMap::default()
        },
        account: account(deployment, &name, &labels, rules),
        deployment: workload,
    })
}

/// The template with the recorded events as one more source and the champion as the baseline.
pub fn retraining(deployment: &ValidatedDeployment, new: &NewRetraining) -> Option<FineTuneJob> {
    let (retrain, events) = deployment.spec.retrain.as_ref().zip(deployment.events.as_ref())?;
    let mut spec = retrain.template.spec.clone();
    spec.train.data.sources.push(Source {
        name: retrain.source_name.clone(),
        uri: None,
        format: None,
        kafka: Some(KafkaSource {
            bootstrap_servers: events.bootstrap_servers.clone(),
            topic: events.topic.clone(),
            ranges: new.ranges.clone(),
        }),
        columns: Default::default(),
    });
    spec.train.evaluate.baseline = Some(new.baseline.clone());
    if spec.credentials_secret_name.is_none() {
        spec.credentials_secret_name = deployment.spec.credentials_secret_name.clone();
    }
    let mut labels = retrain.template.labels.clone();
    labels.extend([
        (label::DEPLOYMENT.into(), deployment.name.clone()),
        ("app.kubernetes.io/managed-by".into(), "athanor".into()),
    ]);
    let mut job = FineTuneJob::new(&new.name, spec);
    job.metadata = metadata(deployment, &new.name, labels);
    Some(job)
}
