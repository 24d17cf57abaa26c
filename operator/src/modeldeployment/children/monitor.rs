//! The monitor: it compares the recorded events with the model's reference.

use athanor_contract::{
    monitor::{MonitorConfig, MonitoredRevision},
    process::{api, file, path, port, variable},
    serve::EventsConfig,
};
use athanor_crds::label;
use k8s_openapi::api::{apps::v1::Deployment, core::v1::ConfigMap};

use super::common::{Account, Kind, account, kafka_credentials, metadata, probes, rule, signing_keys, workload};
use crate::{
    modeldeployment::{
        names::{self, MONITOR},
        policy::rollout::Rollout,
        validate::ValidatedDeployment,
    },
    pods::{self, HttpProbe, Labels, PodPlan},
    settings::Settings,
};

const MONITOR_OPS_PORT: i32 = port::MONITOR_OPS as i32;

/// Children of the monitor. All of them have its name.
pub struct MonitorChildren {
    pub config: ConfigMap,
    pub account: Account,
    pub deployment: Deployment,
}

/// Kinds of the monitor's children in the order of their deletion.
pub const REMOVAL: [Kind; 5] = [Kind::RoleBinding, Kind::Role, Kind::ServiceAccount, Kind::ConfigMap, Kind::Deployment];

/// Builds the children; `None` without spec.monitor or before there is a model.
pub fn build(deployment: &ValidatedDeployment, settings: &Settings, rollout: &Rollout) -> Option<MonitorChildren> {
    let (windows, events) = deployment.spec.monitor.clone().zip(deployment.events.clone())?;
    rollout.current.as_ref()?;
    let name = names::monitor(&deployment.name);
    let labels = pods::labels(MONITOR, label::DEPLOYMENT, &deployment.name);
    let candidate = rollout.candidate.as_ref().map(|candidate| &candidate.revision);
    let revisions = rollout.current.iter().chain(candidate);
    let config = MonitorConfig {
        namespace: deployment.namespace.clone(),
        deployment: deployment.name.clone(),
        // The rest concerns the router: a change of it must not make the monitor start again.
        events: EventsConfig {
            maximum_caller_percent: events.maximum_caller_percent,
            ..EventsConfig::new(events.bootstrap_servers, events.topic)
        },
        // The current revision is the first.
        revisions: revisions
            .map(|revision| MonitoredRevision { name: revision.name.clone(), model_uri: revision.model_uri.clone() })
            .collect(),
        windows,
    };
    let text = serde_json::to_string_pretty(&config).expect("a configuration has string keys only");
    let startup = HttpProbe { path: "/healthz", port: "ops", period_seconds: 1, failures: 60 };
    let overrides = pods::small(deployment.spec.monitor_pod_template.as_ref());
    let mut env = pods::common_environment(settings.otlp_endpoint.as_deref());
    env.push(pods::variable(variable::SIGNING_KEYS, path::SIGNING_KEYS));
    let credentials =
        deployment.spec.credentials_secret_name.as_deref().into_iter().chain(kafka_credentials(deployment));
    let template = pods::template(PodPlan {
        component: MONITOR,
        image: &settings.monitor_image,
        pull_secrets: &settings.image_pull_secrets,
        command: ["athanor-monitor", "--config", path::MONITOR_CONFIG].map(Into::into).into(),
        labels: labels.clone(),
        annotations: Labels::new(),
        env,
        credentials: credentials.collect(),
        ports: vec![("ops", MONITOR_OPS_PORT)],
        metrics_port: MONITOR_OPS_PORT,
        volumes: vec![(pods::config(&name), path::CONFIG.into()), signing_keys(deployment)],
        probes: Some(probes("ops", startup)),
        overrides: Some(&overrides),
        service_account: Some(name.clone()),
        grace_seconds: 30,
        spread: None,
    });
    let rules = vec![
        rule(api::GROUP, api::MODEL_DEPLOYMENTS, &["get"], Some(&deployment.name)),
        rule(api::GROUP, "modeldeployments/status", &["get", "patch"], Some(&deployment.name)),
    ];
    let metadata = |name: &str| metadata(deployment, name, labels.clone());
    let mut workload = workload(metadata(&name), 1, pods::selector(MONITOR, &deployment.name, None), template);
    // Two at the same time would share the partitions, and each would read half of the traffic.
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
