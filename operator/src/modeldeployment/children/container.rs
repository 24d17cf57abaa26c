//! The pods of a revision whose model a server of another project answers for (`spec.engine.container`): an init
//! container with athanor-server's image fetches the model, and the user's container reads it.

use athanor_contract::process::{path, variable};
use athanor_crds::{ContainerEngine, PodOverrides};
use k8s_openapi::{
    api::core::v1::{
        Container, EnvVar, HTTPGetAction, Lifecycle, LifecycleHandler, PodTemplateSpec, Probe, SleepAction, Volume,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::common::grace_seconds;
use crate::{
    images::Choice,
    modeldeployment::{names::SERVER, validate::ValidatedDeployment},
    pods::{self, Labels, PodPlan},
    settings::Settings,
};

/// Name of the volume with the model.
const MODEL: &str = "model";
/// Size limit of the memory that the processes of a container share, as with tensor parallelism. It is taken only as far as
/// it is used.
const SHARED_MEMORY: &str = "8Gi";
/// Value of the variable USER: programs that ask for the user's name would fail, since images have no entry for the user's
/// number.
const USER: &str = "athanor";
/// Seconds for a model to arrive, in the progress deadline of the Deployment.
const FETCH_SECONDS: u32 = 600;

/// Builds the template of the pods. `revision` is the name of the revision, and of the ConfigMap with its `serve.json`.
pub fn template(
    deployment: &ValidatedDeployment,
    settings: &Settings,
    engine: &ContainerEngine,
    revision: &str,
    labels: Labels,
    mut annotations: Labels,
) -> PodTemplateSpec {
    let overrides = deployment.spec.pod_template.as_ref();
    let model = pods::scratch(MODEL, overrides.and_then(|overrides| overrides.scratch_size_limit.as_ref()));
    let fetch = fetch(deployment, settings, revision, &model);
    let port = i32::from(engine.port);
    let drain = engine.drain_seconds.unwrap_or(deployment.spec.max_request_seconds);
    annotations.insert("prometheus.io/path".into(), engine.metrics_path.clone());
    let mut template = pods::template(PodPlan {
        component: SERVER,
        image: &engine.image,
        pull_secrets: &settings.image_pull_secrets,
        command: engine.command.clone(),
        labels,
        annotations,
        env: environment(deployment, settings, engine),
        // Those of the model's store are for the init container alone.
        credentials: Vec::new(),
        ports: vec![("http", port)],
        metrics_port: port,
        volumes: vec![
            (model, path::ENGINE_MODEL.into()),
            (pods::shared_memory("shm", SHARED_MEMORY), "/dev/shm".into()),
        ],
        probes: None,
        overrides,
        service_account: None,
        grace_seconds: grace_seconds(settings, drain.into(), deployment.spec.max_request_seconds.into()),
        spread: Some(pods::selector(SERVER, &deployment.name, Some(revision))),
    });
    let pod = template.spec.get_or_insert_default();
    for container in &mut pod.containers {
        complete(container, engine, i64::from(settings.stop_delay_seconds) + i64::from(drain));
    }
    pod.init_containers = Some(vec![fetch]);
    pod.volumes.get_or_insert_default().push(pods::config(revision));
    template
}

/// Returns the seconds within which a new pod of a Deployment must become ready: those for the model and for the server.
pub fn progress_deadline_seconds(engine: &ContainerEngine) -> i32 {
    seconds(engine.startup_timeout_seconds.saturating_add(FETCH_SECONDS))
}

fn seconds(seconds: u32) -> i32 {
    i32::try_from(seconds).unwrap_or(i32::MAX)
}

/// Returns the variables of the user's container.
fn environment(deployment: &ValidatedDeployment, settings: &Settings, engine: &ContainerEngine) -> Vec<EnvVar> {
    let mut env = pods::common_environment(settings.otlp_endpoint.as_deref());
    env.push(pods::variable("USER", USER));
    env.push(pods::variable(variable::MODEL_DIR, path::ENGINE_MODEL));
    env.push(pods::variable(variable::MODEL_NAME, &deployment.name));
    env.push(pods::variable(variable::PORT, engine.port.to_string()));
    env
}

/// Builds the init container, which is that of a pod that only fetches the model.
fn fetch(deployment: &ValidatedDeployment, settings: &Settings, config_map: &str, model: &Volume) -> Container {
    // They may say where the model's store is.
    let env = deployment.spec.pod_template.as_ref().map(|overrides| overrides.env.clone()).unwrap_or_default();
    let overrides = pods::small(Some(&PodOverrides { env, ..PodOverrides::default() }));
    // It runs on the CPU, whatever the server's container reserves.
    let Choice { image, .. } = settings.server_images().choose(deployment.spec.image.as_deref(), None);
    let plan = PodPlan {
        component: "fetch",
        image,
        pull_secrets: &[],
        command: ["athanor-server", "fetch", "--config", path::SERVE_CONFIG, "--to", path::ENGINE_MODEL]
            .map(Into::into)
            .into(),
        labels: Labels::new(),
        annotations: Labels::new(),
        env: pods::common_environment(settings.otlp_endpoint.as_deref()),
        credentials: deployment.spec.credentials_secret_name.as_deref().into_iter().collect(),
        ports: Vec::new(),
        metrics_port: 0,
        volumes: vec![(pods::config(config_map), path::CONFIG.into()), (model.clone(), path::ENGINE_MODEL.into())],
        probes: None,
        overrides: Some(&overrides),
        service_account: None,
        grace_seconds: 0,
        spread: None,
    };
    let containers = pods::template(plan).spec.map(|spec| spec.containers).unwrap_or_default();
    let container = containers.into_iter().next().unwrap_or_default();
    Container { ports: None, ..container }
}

/// Sets what only the user's container has. `stop_delay`: seconds from the deletion of the pod to SIGTERM.
fn complete(container: &mut Container, engine: &ContainerEngine, stop_delay: i64) {
    // Absent: those of the image.
    container.command = (!engine.command.is_empty()).then(|| engine.command.clone());
    container.args = (!engine.args.is_empty()).then(|| engine.args.clone());
    container.startup_probe = Some(probe(engine, 1, seconds(engine.startup_timeout_seconds), 5));
    // Servers in Python may be slow to answer while they compute.
    container.readiness_probe = Some(probe(engine, 2, 3, 5));
    container.liveness_probe = Some(probe(engine, 10, 6, 10));
    // New requests go elsewhere as soon as the pod is being deleted; those in progress end in this time.
    let pre_stop = LifecycleHandler { sleep: Some(SleepAction { seconds: stop_delay }), ..LifecycleHandler::default() };
    container.lifecycle = (stop_delay > 0).then(|| Lifecycle { pre_stop: Some(pre_stop), ..Lifecycle::default() });
    let mounts = container.volume_mounts.iter_mut().flatten();
    mounts.filter(|mount| mount.name == MODEL).for_each(|mount| mount.read_only = Some(true));
}

fn probe(engine: &ContainerEngine, period_seconds: i32, failures: i32, timeout_seconds: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(engine.readiness_path.clone()),
            port: IntOrString::String("http".into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        failure_threshold: Some(failures),
        timeout_seconds: Some(timeout_seconds),
        ..Probe::default()
    }
}
