//! The router: the stable address in front of all revisions.

use athanor_contract::{
    process::{HAND_OVER_SECONDS, file, path, port, variable},
    serve::{AccessConfig, RouterConfig, RouterLimits, RouterRevision},
};
use athanor_crds::{RevisionStatus, label};
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, PodTemplateSpec, Secret, Service},
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::api::resource::Quantity,
};

use super::common::{
    Account, Port, account, budget, grace_seconds, kafka_credentials, metadata, probes, rule, service, signing_keys,
    workload,
};
use crate::{
    modeldeployment::{
        decide::Decision,
        names::{self, ROUTER},
        policy::rollout::Rollout,
        validate::ValidatedDeployment,
    },
    pods::{self, HttpProbe, Labels, PodPlan},
    settings::Settings,
};

const HTTP_PORT: i32 = port::HTTP as i32;
const GRPC_PORT: i32 = port::GRPC as i32;
const ROUTER_OPS_PORT: i32 = port::ROUTER_OPS as i32;

/// Size limit of the folder for events that Kafka has not taken yet. The spill has a limit of its own, 1 GiB; segments that
/// cannot be read stay besides.
const SPOOL: &str = "3Gi";

/// Children of the router. They stay as long as the deployment does and are deleted with it.
pub struct RouterChildren {
    pub config: ConfigMap,
    /// Created once, never changed.
    pub key: Secret,
    pub account: Account,
    pub deployment: Deployment,
    pub service: Service,
    pub budget: PodDisruptionBudget,
}

/// Returns the weights of all revisions; they add up to 100.
pub fn weights(deployment: &str, rollout: &Rollout) -> Vec<RouterRevision> {
    let weighted = |revision: &RevisionStatus, weight| RouterRevision {
        name: revision.name.clone(),
        service: names::servers(deployment, revision),
        weight,
        adapter: revision.base.as_ref().map(|_| revision.name.clone()),
    };
    let candidate = rollout.candidate.as_ref().map(|candidate| (&candidate.revision, candidate.weight.min(100)));
    let share = candidate.map_or(0, |(_, weight)| weight);
    let current = rollout.current.iter().map(|current| weighted(current, 100 - share));
    current.chain(candidate.map(|(revision, weight)| weighted(revision, weight))).collect()
}

/// Builds the children; `None` before there is a model. `fresh_key` becomes the signing key if there is none yet.
pub fn build(
    deployment: &ValidatedDeployment,
    settings: &Settings,
    decision: &Decision,
    fresh_key: String,
) -> Option<RouterChildren> {
    let rollout = &decision.rollout;
    rollout.current.as_ref()?;
    let name = names::router(&deployment.name);
    let labels = pods::labels(ROUTER, label::DEPLOYMENT, &deployment.name);
    let selector = pods::selector(ROUTER, &deployment.name, None);
    let config = RouterConfig {
        namespace: deployment.namespace.clone(),
        deployment: deployment.name.clone(),
        revisions: weights(&deployment.name, rollout),
        adapters: decision.adapters.served.iter().map(|adapter| adapter.name.clone()).collect(),
        events: deployment.events.clone(),
        limits: RouterLimits {
            max_request_seconds: deployment.spec.max_request_seconds.into(),
            ..RouterLimits::default()
        },
        playground: deployment.spec.playground,
    };
    let mut grace = grace_seconds(settings, config.limits.drain_seconds, config.limits.max_request_seconds);
    if config.events.is_some() {
        grace += HAND_OVER_SECONDS as i64;
    }
    let text = serde_json::to_string_pretty(&config).expect("a configuration has string keys only");
    let template = pod_template(deployment, settings, &name, &labels, grace);
    // A name restricts list and watch as well, if the field selector has it.
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
            metadata: metadata(&names::signing_keys(&deployment.name)),
            string_data: Some([(file::CURRENT_KEY.into(), fresh_key)].into()),
            ..Secret::default()
        },
        account: account(deployment, &name, &labels, rules),
        deployment: workload(metadata(&name), settings.router_replicas, selector.clone(), template),
        service: service(metadata(&deployment.name), selector.clone(), &ports(deployment)),
        budget: budget(metadata(&name), selector),
    })
}

/// Returns the ports of the deployment's Service.
fn ports(deployment: &ValidatedDeployment) -> [Port; 2] {
    let has_tls = deployment.spec.access.as_ref().is_some_and(|access| access.tls.is_some());
    let http = match has_tls {
        true => Port { name: "https", port: port::SERVICE_HTTPS.into(), target: "http" },
        false => Port { name: "http", port: port::SERVICE_HTTP.into(), target: "http" },
    };
    [http, Port { name: if has_tls { "grpcs" } else { "grpc" }, port: GRPC_PORT, target: "grpc" }]
}

fn pod_template(
    deployment: &ValidatedDeployment,
    settings: &Settings,
    name: &str,
    labels: &Labels,
    grace: i64,
) -> PodTemplateSpec {
    let mut env = pods::common_environment(settings.otlp_endpoint.as_deref());
    env.push(pods::variable(variable::SPILL_DIR, path::SPOOL));
    env.push(pods::variable(variable::SIGNING_KEYS, path::SIGNING_KEYS));
    env.push(pods::variable(variable::SHUTDOWN_GRACE_SECONDS, settings.stop_delay_seconds.to_string()));
    let spool = pods::scratch("spool", Some(&Quantity(SPOOL.into())));
    let mut volumes = vec![(spool, path::SPOOL.into()), signing_keys(deployment)];
    let access = deployment.spec.access.as_ref();
    if let Some(keys) = access.and_then(|access| access.api_keys.as_ref()) {
        let config = AccessConfig { callers: keys.callers.clone() };
        let text = serde_json::to_string(&config).expect("a configuration has string keys only");
        env.extend([pods::variable(variable::ACCESS, text), pods::variable(variable::API_KEYS, path::API_KEYS)]);
        volumes.push((pods::secret("api-keys", &keys.secret_name), path::API_KEYS.into()));
    }
    if let Some(tls) = access.and_then(|access| access.tls.as_ref()) {
        env.push(pods::variable(variable::TLS, path::TLS));
        volumes.push((pods::secret("tls", &tls.secret_name), path::TLS.into()));
    }
    // A router is ready once a server is, which may take as long as a model takes to arrive: only its process must
    // start in time.
    let startup = HttpProbe { path: "/healthz", port: "ops", period_seconds: 1, failures: 60 };
    let overrides = pods::small(deployment.spec.router_pod_template.as_ref());
    pods::template(PodPlan {
        component: ROUTER,
        image: &settings.router_image,
        pull_secrets: &settings.image_pull_secrets,
        command: ["athanor-router", "--namespace", &deployment.namespace, "--config-map", name].map(Into::into).into(),
        labels: labels.clone(),
        annotations: Labels::new(),
        env,
        credentials: kafka_credentials(deployment).into_iter().collect(),
        ports: vec![("http", HTTP_PORT), ("grpc", GRPC_PORT), ("ops", ROUTER_OPS_PORT)],
        metrics_port: ROUTER_OPS_PORT,
        volumes,
        probes: Some(probes("ops", startup)),
        overrides: Some(&overrides),
        service_account: Some(name.into()),
        grace_seconds: grace,
        spread: Some(pods::selector(ROUTER, &deployment.name, None)),
    })
}
