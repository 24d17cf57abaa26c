//! Parts that several children of a ModelDeployment have in common.

use athanor_contract::process::path;
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{PodTemplateSpec, Service, ServiceAccount, ServicePort, ServiceSpec, Volume},
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
        rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

use crate::{
    modeldeployment::{names, validate::ValidatedDeployment},
    pods::{self, HttpProbe, Labels, Probes},
    settings::Settings,
};

/// A kind of child that is deleted by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    ConfigMap,
    Deployment,
    PodDisruptionBudget,
    Role,
    RoleBinding,
    Service,
    ServiceAccount,
}

/// Returns the metadata of a child.
pub fn metadata(deployment: &ValidatedDeployment, name: &str, labels: Labels) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        namespace: Some(deployment.namespace.clone()),
        labels: Some(labels),
        owner_references: Some(deployment.owner.clone()),
        ..ObjectMeta::default()
    }
}

/// Returns probes on a named port. The pod may take `startup.period_seconds * startup.failures` to start; after that a
/// pod that stops answering is noticed within seconds.
pub fn probes(port: &'static str, startup: HttpProbe) -> Probes {
    Probes {
        startup,
        readiness: HttpProbe { path: "/readyz", port, period_seconds: 2, failures: 2 },
        liveness: HttpProbe { path: "/healthz", port, period_seconds: 10, failures: 3 },
    }
}

/// Seconds of a pod's grace beyond its stop delay and its drain, for the last events.
const MARGIN_SECONDS: i64 = 12;

/// Returns the time that a pod has to end: the delay in which others stop sending, and its drain, in which the longest
/// request may end as well.
pub fn grace_seconds(settings: &Settings, drain_seconds: u64, max_request_seconds: u64) -> i64 {
    let margin = MARGIN_SECONDS + i64::from(settings.stop_delay_seconds);
    i64::try_from(drain_seconds.max(max_request_seconds)).unwrap_or(i64::MAX).saturating_add(margin)
}

/// Builds a Deployment whose updates never have fewer available pods than `replicas`.
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

/// A port of a Service.
#[derive(Clone, Copy)]
pub struct Port {
    pub name: &'static str,
    pub port: i32,
    /// Name of the containers' port. Pods of before and after a change of the number are both reached.
    pub target: &'static str,
}

/// Builds a Service.
pub fn service(metadata: ObjectMeta, selector: Labels, ports: &[Port]) -> Service {
    let ports = ports.iter().map(|port| ServicePort {
        name: Some(port.name.into()),
        port: port.port,
        target_port: Some(IntOrString::String(port.target.into())),
        protocol: Some("TCP".into()),
        app_protocol: (port.name == "grpc").then(|| "kubernetes.io/h2c".into()),
        ..ServicePort::default()
    });
    let spec = ServiceSpec { selector: Some(selector), ports: Some(ports.collect()), ..ServiceSpec::default() };
    Service { metadata, spec: Some(spec), status: None }
}

/// Builds a budget that lets one pod at a time be evicted.
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

/// Returns the volume with the deployment's signing keys, and where it is mounted.
pub fn signing_keys(deployment: &ValidatedDeployment) -> (Volume, String) {
    (pods::secret("signing-keys", &names::signing_keys(&deployment.name)), path::SIGNING_KEYS.into())
}

/// Returns the Secret with the credentials of the deployment's Kafka, if there is one.
pub fn kafka_credentials(deployment: &ValidatedDeployment) -> Option<&str> {
    deployment.spec.feedback.as_ref()?.kafka.credentials_secret_name.as_deref()
}

/// The identity of a process at the API server, and its rights.
pub struct Account {
    pub account: ServiceAccount,
    pub role: Role,
    pub binding: RoleBinding,
}

/// Builds an account with these rights.
pub fn account(deployment: &ValidatedDeployment, name: &str, labels: &Labels, rules: Vec<PolicyRule>) -> Account {
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

/// Returns a right on a resource, on one object of it if `name` is given.
pub fn rule(group: &str, resource: &str, verbs: &[&str], name: Option<&str>) -> PolicyRule {
    PolicyRule {
        api_groups: Some(vec![group.into()]),
        resources: Some(vec![resource.into()]),
        resource_names: name.map(|name| vec![name.into()]),
        verbs: verbs.iter().map(|verb| (*verb).into()).collect(),
        ..PolicyRule::default()
    }
}
