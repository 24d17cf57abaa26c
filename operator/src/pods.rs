//! The common parts of all pods: labels, the `restricted` security profile, environment, probes, the user's overrides.

use std::collections::BTreeMap;

use athanor_crds::{PodOverrides, label};
use k8s_openapi::{
    api::core::v1::{
        Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvFromSource, EnvVar,
        EnvVarSource, HTTPGetAction, LocalObjectReference, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, Pod,
        PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile, SecretEnvSource,
        SecretVolumeSource, SecurityContext, TopologySpreadConstraint, Volume, VolumeMount,
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

/// Time limit of a probe in seconds.
const PROBE_SECONDS: i32 = 2;
/// Time limit of a liveness probe in seconds: a process that is slow on a busy node must not be restarted for it.
const LIVENESS_SECONDS: i32 = 10;
/// User and group of every container.
const USER: i64 = 65532;

pub type Labels = BTreeMap<String, String>;

/// Returns the labels of a child: the recommended ones, and one with the owner's name.
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

/// Returns the labels that select the pods of a component of one deployment, or of one of its revisions.
pub fn selector(component: &str, deployment: &str, revision: Option<&str>) -> Labels {
    let mut selector = Labels::from([
        ("app.kubernetes.io/component".into(), component.into()),
        (label::DEPLOYMENT.into(), deployment.into()),
    ]);
    selector.extend(revision.map(|revision| (label::REVISION.into(), revision.into())));
    selector
}

/// A pod with one container.
pub struct PodPlan<'a> {
    /// Also the name of the container.
    pub component: &'static str,
    pub image: &'a str,
    /// Secrets for pulling the image.
    pub pull_secrets: &'a [String],
    pub command: Vec<String>,
    pub labels: Labels,
    pub annotations: Labels,
    pub env: Vec<EnvVar>,
    /// Secrets whose keys become environment variables.
    pub credentials: Vec<&'a str>,
    pub ports: Vec<(&'static str, i32)>,
    pub metrics_port: i32,
    /// Volumes, each with its mount path.
    pub volumes: Vec<(Volume, String)>,
    pub probes: Option<Probes>,
    pub overrides: Option<&'a PodOverrides>,
    /// Absent: the namespace's default, without a token.
    pub service_account: Option<String>,
    pub grace_seconds: i64,
    /// Labels of the pods that are spread over nodes, so that the loss of one node does not take all of them.
    pub spread: Option<Labels>,
}

/// The user's additions to a router or a monitor. Without resources of the user's the pods have small requests, so that
/// they are not the first to be evicted, and a limit of memory.
pub fn small(overrides: Option<&PodOverrides>) -> PodOverrides {
    let quantities = |pairs: &[(&str, &str)]| {
        Some(pairs.iter().map(|(name, value)| ((*name).to_owned(), Quantity((*value).into()))).collect())
    };
    let mut overrides = overrides.cloned().unwrap_or_default();
    overrides.resources.get_or_insert_with(|| ResourceRequirements {
        requests: quantities(&[("cpu", "10m"), ("memory", "64Mi")]),
        limits: quantities(&[("memory", "1Gi")]),
        ..ResourceRequirements::default()
    });
    // They write next to nothing there.
    overrides.scratch_size_limit.get_or_insert_with(|| Quantity("1Gi".into()));
    overrides
}

/// Probes of a container.
pub struct Probes {
    pub startup: HttpProbe,
    pub readiness: HttpProbe,
    pub liveness: HttpProbe,
}

/// A GET request on a named port.
#[derive(Clone, Copy)]
pub struct HttpProbe {
    pub path: &'static str,
    pub port: &'static str,
    pub period_seconds: i32,
    /// Failures in a row after which the probe has failed.
    pub failures: i32,
}

impl HttpProbe {
    fn build(self, timeout_seconds: i32) -> Probe {
        Probe {
            http_get: Some(HTTPGetAction {
                path: Some(self.path.into()),
                port: IntOrString::String(self.port.into()),
                ..HTTPGetAction::default()
            }),
            period_seconds: Some(self.period_seconds),
            failure_threshold: Some(self.failures),
            timeout_seconds: Some(timeout_seconds),
            ..Probe::default()
        }
    }
}

/// Builds the template of a pod. Labels, annotations and variables of the user never replace Athanor's.
pub fn template(plan: PodPlan<'_>) -> PodTemplateSpec {
    let defaults = PodOverrides::default();
    let overrides = plan.overrides.unwrap_or(&defaults);
    let mut labels = overrides.labels.clone();
    labels.extend(plan.labels.clone());
    let mut annotations = overrides.annotations.clone();
    annotations.extend(plan.annotations.clone());
    annotations.insert("prometheus.io/scrape".into(), "true".into());
    annotations.insert("prometheus.io/port".into(), plan.metrics_port.to_string());
    let mut volumes = plan.volumes.clone();
    volumes.push((scratch("tmp", overrides.scratch_size_limit.as_ref()), "/tmp".into()));
    let container = container(&plan, overrides, volumes.iter().map(|(volume, path)| mount(volume, path)).collect());
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels), annotations: Some(annotations), ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            containers: vec![container],
            automount_service_account_token: Some(plan.service_account.is_some()),
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
            image_pull_secrets: (!plan.pull_secrets.is_empty())
                .then(|| plan.pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() }).collect()),
            termination_grace_period_seconds: Some(plan.grace_seconds),
            volumes: Some(volumes.into_iter().map(|(volume, _)| volume).collect()),
            topology_spread_constraints: plan.spread.map(|labels| vec![spread(labels)]),
            ..PodSpec::default()
        }),
    }
}

fn container(plan: &PodPlan<'_>, overrides: &PodOverrides, mounts: Vec<VolumeMount>) -> Container {
    let is_ours = |theirs: &EnvVar| plan.env.iter().any(|ours| ours.name == theirs.name);
    let mut env: Vec<EnvVar> = overrides.env.iter().filter(|theirs| !is_ours(theirs)).cloned().collect();
    env.extend(plan.env.clone());
    let ports = plan.ports.iter().map(|(name, container_port)| ContainerPort {
        name: Some((*name).into()),
        container_port: *container_port,
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    });
    let probes = plan.probes.as_ref();
    Container {
        name: plan.component.into(),
        image: Some(plan.image.into()),
        image_pull_policy: Some("IfNotPresent".into()),
        command: Some(plan.command.clone()),
        env: Some(env),
        env_from: (!plan.credentials.is_empty())
            .then(|| plan.credentials.iter().map(|name| environment_of_secret(name)).collect()),
        ports: Some(ports.collect()),
        startup_probe: probes.map(|probes| probes.startup.build(PROBE_SECONDS)),
        readiness_probe: probes.map(|probes| probes.readiness.build(PROBE_SECONDS)),
        liveness_probe: probes.map(|probes| probes.liveness.build(LIVENESS_SECONDS)),
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
    }
}

fn environment_of_secret(name: &str) -> EnvFromSource {
    EnvFromSource {
        secret_ref: Some(SecretEnvSource { name: name.into(), optional: Some(false) }),
        ..EnvFromSource::default()
    }
}

/// Mounts a volume; ConfigMaps, Secrets and claims are read-only.
fn mount(volume: &Volume, path: &str) -> VolumeMount {
    let is_read = volume.config_map.is_some() || volume.secret.is_some() || volume.persistent_volume_claim.is_some();
    VolumeMount {
        name: volume.name.clone(),
        mount_path: path.into(),
        read_only: is_read.then_some(true),
        ..VolumeMount::default()
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

/// Returns a variable with a value.
pub fn variable(name: &str, value: impl Into<String>) -> EnvVar {
    EnvVar { name: name.into(), value: Some(value.into()), value_from: None }
}

/// Returns a variable with the value of a field of the pod.
pub fn field(name: &str, path: &str) -> EnvVar {
    let field_ref = Some(ObjectFieldSelector { api_version: Some("v1".into()), field_path: path.into() });
    EnvVar { name: name.into(), value: None, value_from: Some(EnvVarSource { field_ref, ..EnvVarSource::default() }) }
}

/// Returns the variables of every process.
pub fn common_environment(otlp_endpoint: Option<&str>) -> Vec<EnvVar> {
    let mut env = vec![
        variable("HOME", "/tmp"),
        field("POD_NAME", "metadata.name"),
        field("POD_NAMESPACE", "metadata.namespace"),
    ];
    env.extend(otlp_endpoint.map(|endpoint| variable("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)));
    env
}

/// Returns an empty folder on disk that is deleted with the pod.
pub fn scratch(name: &str, size_limit: Option<&Quantity>) -> Volume {
    Volume {
        name: name.into(),
        empty_dir: Some(EmptyDirVolumeSource { medium: None, size_limit: size_limit.cloned() }),
        ..Volume::default()
    }
}

/// Returns an empty folder in memory, which counts against the memory limit of the container that fills it.
pub fn shared_memory(name: &str, size_limit: &str) -> Volume {
    Volume {
        name: name.into(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: Some("Memory".into()),
            size_limit: Some(Quantity(size_limit.into())),
        }),
        ..Volume::default()
    }
}

/// Returns the files of a ConfigMap.
pub fn config(config_map: &str) -> Volume {
    Volume {
        name: "config".into(),
        config_map: Some(ConfigMapVolumeSource { name: config_map.into(), ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    }
}

/// Returns the files of a Secret, which the pod's user alone can read.
pub fn secret(name: &str, secret: &str) -> Volume {
    Volume {
        name: name.into(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret.into()),
            default_mode: Some(0o440),
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// Returns the read-only contents of a PersistentVolumeClaim.
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

/// Returns why a pod does not run, in the words of kubelet or scheduler; `None` for a pod that runs.
pub fn waiting_reason(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let init = status.init_container_statuses.iter().flatten();
    for container in init.chain(status.container_statuses.iter().flatten()) {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_waits_for_the_first_container_that_does_not_run() {
        let status = |name: &str, waiting: &str, ended: &str| {
            json!({
                "name": name, "image": "i", "imageID": "", "ready": false, "restartCount": 1,
                "state": {"waiting": {"reason": waiting, "message": "back-off"}},
                "lastState": {"terminated": {"exitCode": 1, "message": ended}},
            })
        };
        let reason = |init: &str, main: &str| {
            let status = json!({"initContainerStatuses": [status("fetch", init, "fetching s3://m: no such file")],
                "containerStatuses": [status("server", main, "out of memory")]});
            let pod = json!({"metadata": {"name": "m-0"}, "status": status});
            waiting_reason(&serde_json::from_value(pod).unwrap())
        };
        let fetching = reason("CrashLoopBackOff", "PodInitializing");
        assert_eq!(fetching.as_deref(), Some("pod m-0: CrashLoopBackOff: fetching s3://m: no such file"));
        let serving = reason("PodInitializing", "CrashLoopBackOff");
        assert_eq!(serving.as_deref(), Some("pod m-0: CrashLoopBackOff: out of memory"));
        assert_eq!(reason("PodInitializing", "ContainerCreating"), None);
    }
}
