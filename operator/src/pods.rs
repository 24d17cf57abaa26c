//! What all pods of Athanor have in common: labels, the `restricted` security profile, environment, the user's additions.

use std::collections::BTreeMap;

use athanor_crds::{PodOverrides, label};
use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvFromSource, EnvVar,
        EnvVarSource, HTTPGetAction, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, Pod, PodSecurityContext,
        PodSpec, PodTemplateSpec, Probe, SeccompProfile, SecretEnvSource, SecurityContext, TopologySpreadConstraint,
        Volume, VolumeMount,
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

/// User and group of every container.
const USER: i64 = 65532;

pub type Labels = BTreeMap<String, String>;

/// Labels of a child: the recommended ones, and the one that says whose it is.
pub fn labels(component: &str, owner_label: &str, owner: &str) -> Labels {
    [
        ("app.kubernetes.io/name", format!("athanor-{component}").as_str()),
        ("app.kubernetes.io/instance", owner),
        ("app.kubernetes.io/component", component),
        ("app.kubernetes.io/managed-by", "athanor"),
        (owner_label, owner),
    ]
    .into_iter()
    .map(|(key, value)| (key.into(), value.into()))
    .collect()
}

/// Labels that select the pods of a component of one deployment, or of one of its revisions.
pub fn selector(component: &str, deployment: &str, revision: Option<&str>) -> Labels {
    let mut selector = Labels::from([
        ("app.kubernetes.io/component".into(), component.into()),
        (label::DEPLOYMENT.into(), deployment.into()),
    ]);
    selector.extend(revision.map(|revision| (label::REVISION.into(), revision.into())));
    selector
}

/// One container and the pod around it.
pub struct PodPlan<'a> {
    /// Also the container's name.
    pub component: &'static str,
    pub image: &'a str,
    pub command: Vec<String>,
    pub labels: Labels,
    pub annotations: Labels,
    pub env: Vec<EnvVar>,
    /// Secret whose keys become environment.
    pub credentials: Option<&'a str>,
    pub ports: Vec<(&'static str, i32)>,
    pub metrics_port: i32,
    /// With the place that each is mounted at.
    pub volumes: Vec<(Volume, String)>,
    pub overrides: Option<&'a PodOverrides>,
    /// Absent: the namespace's default, without a token.
    pub service_account: Option<String>,
    pub grace_seconds: i64,
    /// Labels of pods that rather lie on different nodes: one that dies should not take them all.
    pub spread: Option<Labels>,
}

/// The template of a plan. The user's labels, annotations and variables never replace Athanor's.
pub fn template(plan: PodPlan<'_>) -> PodTemplateSpec {
    let defaults = PodOverrides::default();
    let overrides = plan.overrides.unwrap_or(&defaults);
    let mut labels = overrides.labels.clone();
    labels.extend(plan.labels);
    let mut annotations = overrides.annotations.clone();
    annotations.extend(plan.annotations);
    annotations.insert("prometheus.io/scrape".into(), "true".into());
    annotations.insert("prometheus.io/port".into(), plan.metrics_port.to_string());
    let mut env: Vec<EnvVar> =
        overrides.env.iter().filter(|theirs| plan.env.iter().all(|ours| ours.name != theirs.name)).cloned().collect();
    env.extend(plan.env);
    let (volumes, mounts): (Vec<Volume>, Vec<VolumeMount>) = plan
        .volumes
        .into_iter()
        .chain([(scratch("tmp", None), "/tmp".into())])
        .map(|(volume, path)| {
            let is_read = volume.config_map.is_some() || volume.persistent_volume_claim.is_some();
            let read_only = is_read.then_some(true);
            let mount =
                VolumeMount { name: volume.name.clone(), mount_path: path, read_only, ..VolumeMount::default() };
            (volume, mount)
        })
        .unzip();
    let has_token = plan.service_account.is_some();
    let ports = plan.ports.into_iter().map(|(name, container_port)| ContainerPort {
        name: Some(name.into()),
        container_port,
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    });
    let container = Container {
        name: plan.component.into(),
        image: Some(plan.image.into()),
        image_pull_policy: Some("IfNotPresent".into()),
        command: Some(plan.command),
        env: Some(env),
        env_from: plan.credentials.map(|name| {
            vec![EnvFromSource {
                secret_ref: Some(SecretEnvSource { name: name.into(), optional: Some(false) }),
                ..EnvFromSource::default()
            }]
        }),
        ports: Some(ports.collect()),
        resources: overrides.resources.clone(),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add: None }),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(mounts),
        ..Container::default()
    };
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels), annotations: Some(annotations), ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            containers: vec![container],
            automount_service_account_token: Some(has_token),
            service_account_name: plan.service_account.or_else(|| overrides.service_account_name.clone()),
            enable_service_links: Some(false),
            node_selector: (!overrides.node_selector.is_empty()).then(|| overrides.node_selector.clone()),
            tolerations: (!overrides.tolerations.is_empty()).then(|| overrides.tolerations.clone()),
            priority_class_name: overrides.priority_class_name.clone(),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(USER),
                run_as_group: Some(USER),
                fs_group: Some(USER),
                seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
                ..PodSecurityContext::default()
            }),
            termination_grace_period_seconds: Some(plan.grace_seconds),
            volumes: Some(volumes),
            topology_spread_constraints: plan.spread.map(|labels| vec![spread(labels)]),
            ..PodSpec::default()
        }),
    }
}

fn spread(labels: Labels) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "kubernetes.io/hostname".into(),
        when_unsatisfiable: "ScheduleAnyway".into(),
        label_selector: Some(LabelSelector { match_labels: Some(labels), ..LabelSelector::default() }),
        ..TopologySpreadConstraint::default()
    }
}

/// A variable with a value.
pub fn variable(name: &str, value: impl Into<String>) -> EnvVar {
    EnvVar { name: name.into(), value: Some(value.into()), value_from: None }
}

/// A variable with a field of the pod.
pub fn field(name: &str, path: &str) -> EnvVar {
    let field_ref = Some(ObjectFieldSelector { api_version: Some("v1".into()), field_path: path.into() });
    EnvVar { name: name.into(), value: None, value_from: Some(EnvVarSource { field_ref, ..EnvVarSource::default() }) }
}

/// Variables of every process: where traces go and where caches may live.
pub fn common_environment(otlp_endpoint: Option<&str>) -> Vec<EnvVar> {
    let mut env = vec![
        variable("HOME", "/tmp"),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
    ];
    env.extend(otlp_endpoint.map(|endpoint| variable("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)));
    env
}

/// An empty folder that goes with the pod.
pub fn scratch(name: &str, medium: Option<&str>) -> Volume {
    Volume {
        name: name.into(),
        empty_dir: Some(EmptyDirVolumeSource { medium: medium.map(Into::into), size_limit: None }),
        ..Volume::default()
    }
}

/// A ConfigMap's files.
pub fn config(config_map: &str) -> Volume {
    Volume {
        name: "config".into(),
        config_map: Some(ConfigMapVolumeSource { name: config_map.into(), ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    }
}

/// What a PersistentVolumeClaim holds, to be read.
pub fn claim(name: &str, claim: &str) -> Volume {
    Volume {
        name: name.into(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim.into(),
            read_only: Some(true),
        }),
        ..Volume::default()
    }
}

/// A GET on a named port.
pub fn probe(path: &str, port: &str, period_seconds: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.into()),
            port: IntOrString::String(port.into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        failure_threshold: Some(failures),
        timeout_seconds: Some(2),
        ..Probe::default()
    }
}

/// Why a pod does not run yet, in the words of kubelet or scheduler; nothing to say about one that does.
pub fn waiting_reason(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    for container in status.container_statuses.iter().flatten() {
        if let Some(waiting) = container.state.as_ref().and_then(|state| state.waiting.as_ref()) {
            let reason = waiting.reason.as_deref().unwrap_or("Waiting");
            if matches!(reason, "ContainerCreating" | "PodInitializing") {
                continue;
            }
            let last = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
            let message =
                last.and_then(|ended| ended.message.as_deref()).or(waiting.message.as_deref()).unwrap_or_default();
            return Some(format!("pod {name}: {reason}: {}", message.trim()));
        }
    }
    let unscheduled = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")?;
    Some(format!("pod {name}: {}", unscheduled.message.as_deref().unwrap_or("not scheduled")))
}
