//! The children of a FineTuneJob: the trainer's configuration, an Indexed Job, and a headless Service for the rendezvous
//! of several nodes.

use std::time::Duration;

use athanor_contract::{
    artifact::EVENTS,
    process::{file, path, port, variable},
    train::{TrainConfig, TrainSpec},
};
use athanor_crds::{FineTuneJob, TRIAL_ANNOTATION, label};
use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec},
        core::v1::{ConfigMap, PodTemplateSpec, Service, ServicePort, ServiceSpec},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use super::{
    attempt::{COMPONENT, batch_job_name},
    claims,
    decide::Decision,
    policy::{
        queue,
        search::{NewTrial, SearchResult},
    },
    validate::ValidatedJob,
};
use crate::{
    images::{Choice, gpus},
    pods::{self, PodPlan},
    settings::Settings,
};

/// Port of the rendezvous (c10d's TCPStore) of rank 0.
const MASTER_PORT: i32 = port::RENDEZVOUS as i32;
const METRICS_PORT: i32 = port::TRAINER_METRICS as i32;
/// Size limit of the memory that the processes of a pod share. It is taken only as far as it is used.
const SHARED_MEMORY: &str = "8Gi";
/// Time after SIGTERM for a last checkpoint.
const GRACE: Duration = Duration::from_secs(30);

/// Children to create.
pub struct Children {
    pub attempt: Option<AttemptChildren>,
    /// FineTuneJobs of the search.
    pub trials: Vec<FineTuneJob>,
}

/// Children of one attempt.
pub struct AttemptChildren {
    pub config: ConfigMap,
    /// Absent with one node, whose processes meet on the loopback interface.
    pub service: Option<Service>,
    pub batch_job: Job,
    /// Why the pods are not expected to use their GPUs.
    pub warning: Option<String>,
}

/// Builds the children that the decision requires.
pub fn build(job: &ValidatedJob, settings: &Settings, decision: &Decision) -> Children {
    let attempt = decision.create.then(|| {
        let Choice { image, warning } =
            settings.trainer_images().choose(job.spec.image.as_deref(), job.spec.pod_template.as_ref());
        AttemptChildren {
            config: config(job, settings, decision.search_result.as_ref()),
            service: (job.nodes > 1).then(|| service(job)),
            batch_job: indexed_job(job, settings, decision.attempt, image),
            warning,
        }
    });
    Children { attempt, trials: decision.trials.iter().map(|new| trial(job, new)).collect() }
}

/// Returns the folder of everything that the job writes; a trial's is inside its parent's.
fn folder(job: &ValidatedJob) -> String {
    let named = |name: &str, uid: &str| format!("{name}-{}", uid.get(..8).unwrap_or(uid));
    let parent = job.trial_of.as_ref().map(|parent| format!("{}/trials/", named(&parent.name, &parent.uid)));
    let to = job.spec.train.output.to.trim_end_matches('/');
    format!("{to}/{}{}", parent.unwrap_or_default(), named(&job.name, &job.uid))
}

/// Builds a trial: the job with other hyperparameters, evaluated on the validation rows only. It has the job's output
/// folder, which holds annotations and a teacher's answers: what one trial requested is there for the others and for
/// the job itself.
fn trial(job: &ValidatedJob, new: &NewTrial) -> FineTuneJob {
    let mut spec = job.spec.clone();
    spec.train = new.train.clone();
    spec.train.evaluate.gates.clear();
    spec.train.evaluate.baseline = None;
    spec.train.compress.clear();
    // Suspension, deadline and time to live are those of the parent.
    spec.suspend = false;
    spec.active_deadline_seconds = None;
    spec.ttl_seconds_after_finished = None;
    let annotation = serde_json::to_string(&new.annotation).expect("an annotation has string keys only");
    let mut child = FineTuneJob::new(&new.job, spec);
    child.metadata = ObjectMeta {
        labels: Some(
            [
                ("app.kubernetes.io/managed-by".to_owned(), "athanor".to_owned()),
                (label::SEARCH.into(), job.name.clone()),
            ]
            .into_iter()
            .chain(job.queue_labels.iter().cloned())
            .collect(),
        ),
        annotations: Some([(TRIAL_ANNOTATION.into(), annotation)].into()),
        ..metadata(job, new.job.clone())
    };
    child
}

/// Builds the trainer's configuration.
pub fn train_config(job: &ValidatedJob, settings: &Settings, spec: &TrainSpec) -> TrainConfig {
    let folder = folder(job);
    TrainConfig {
        name: job.name.clone(),
        run_id: job.uid.clone(),
        spec: claims::as_files(spec.clone()),
        checkpoint_to: format!("{folder}/checkpoints"),
        artifact_to: format!("{folder}/artifact"),
        events_to: format!("{folder}/{EVENTS}"),
        trials: Vec::new(),
        progress_to: settings.progress_address.clone(),
    }
}

fn metadata(job: &ValidatedJob, name: String) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(job.namespace.clone()),
        labels: Some(pods::labels(COMPONENT, label::FINE_TUNE_JOB, &job.name)),
        owner_references: Some(job.owner.clone()),
        ..ObjectMeta::default()
    }
}

fn config_name(job: &ValidatedJob) -> String {
    format!("{}-train", job.name)
}

fn service_name(job: &ValidatedJob) -> String {
    format!("{}-trainer", job.name)
}

fn config(job: &ValidatedJob, settings: &Settings, result: Option<&SearchResult>) -> ConfigMap {
    let spec = result.map_or(&job.spec.train, |result| &result.train);
    let trials = result.map_or(Vec::new(), |result| result.trials.clone());
    let config = TrainConfig { trials, ..train_config(job, settings, spec) };
    let text = serde_json::to_string_pretty(&config).expect("a configuration has string keys only");
    ConfigMap {
        metadata: metadata(job, config_name(job)),
        data: Some([(file::TRAIN.into(), text)].into()),
        ..ConfigMap::default()
    }
}

/// Builds a headless Service that publishes pods that are not ready: ranks connect before any of them is ready.
fn service(job: &ValidatedJob) -> Service {
    let port = |name: &str, port| ServicePort {
        name: Some(name.into()),
        port,
        target_port: Some(IntOrString::Int(port)),
        protocol: Some("TCP".into()),
        ..ServicePort::default()
    };
    Service {
        metadata: metadata(job, service_name(job)),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".into()),
            publish_not_ready_addresses: Some(true),
            selector: Some([(label::FINE_TUNE_JOB.into(), job.name.clone())].into()),
            ports: Some(vec![port("rendezvous", MASTER_PORT), port("metrics", METRICS_PORT)]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

fn indexed_job(job: &ValidatedJob, settings: &Settings, attempt: u32, image: &str) -> Job {
    let name = batch_job_name(&job.name, attempt);
    let nodes = i32::try_from(job.nodes).unwrap_or(i32::MAX);
    let template = pod_template(job, settings, &name, image);
    let mut metadata = metadata(job, name);
    metadata.labels.get_or_insert_default().extend(job.queue_labels.iter().cloned());
    Job {
        metadata,
        spec: Some(JobSpec {
            completion_mode: Some("Indexed".into()),
            completions: Some(nodes),
            parallelism: Some(nodes),
            // All pods restart together, in another Job.
            backoff_limit: Some(0),
            suspend: queue::suspend(&job.queue_labels),
            template,
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// Builds the pods of the Kubernetes Job `name`.
fn pod_template(job: &ValidatedJob, settings: &Settings, name: &str, image: &str) -> PodTemplateSpec {
    let mut env = pods::common_environment(settings.otlp_endpoint.as_deref());
    env.extend([
        pods::field(variable::NODE_RANK, "metadata.annotations['batch.kubernetes.io/job-completion-index']"),
        pods::variable(variable::NUM_NODES, job.nodes.to_string()),
        pods::variable(variable::MASTER_PORT, MASTER_PORT.to_string()),
        pods::field(variable::POD_IP, "status.podIP"),
        pods::variable(variable::NAMESPACE, job.namespace.clone()),
        pods::variable(variable::METRICS_PORT, METRICS_PORT.to_string()),
    ]);
    if job.nodes > 1 {
        let master = format!("{name}-0.{}.{}.svc.cluster.local", service_name(job), job.namespace);
        env.push(pods::variable(variable::MASTER_ADDR, master));
    }
    let gpus = gpus(job.spec.pod_template.as_ref());
    if gpus > 0 {
        env.push(pods::variable(variable::GPUS, gpus.to_string()));
    }
    let mut volumes = vec![
        (pods::config(&config_name(job)), path::CONFIG.to_owned()),
        // NCCL and Gloo exchange data between the processes of one node here; the default of 64 MiB is not enough.
        (pods::shared_memory("shm", SHARED_MEMORY), "/dev/shm".into()),
    ];
    // The name of a claim may be longer than a volume's may be.
    volumes.extend(
        claims::of(&job.spec.train)
            .iter()
            .enumerate()
            .map(|(index, claim)| (pods::claim(&format!("claim-{index}"), claim), claims::folder(claim))),
    );
    let kafka = job.spec.train.data.sources.iter().find_map(|source| source.kafka.as_ref());
    if let Some(secret) = kafka.and_then(|kafka| kafka.signing_keys_secret_name.as_ref()) {
        env.push(pods::variable(variable::SIGNING_KEYS, path::SIGNING_KEYS));
        volumes.push((pods::secret("signing-keys", secret), path::SIGNING_KEYS.into()));
    }
    let of_kafka = kafka.and_then(|kafka| kafka.credentials_secret_name.as_deref());
    let credentials = job.spec.credentials_secret_name.as_deref().into_iter().chain(of_kafka).collect();
    let mut template = pods::template(PodPlan {
        component: COMPONENT,
        image,
        pull_secrets: &settings.image_pull_secrets,
        command: ["athanor-trainer", "run", "--config", path::TRAIN_CONFIG].map(Into::into).into(),
        labels: pods::labels(COMPONENT, label::FINE_TUNE_JOB, &job.name),
        annotations: pods::Labels::new(),
        env,
        credentials,
        ports: vec![("metrics", METRICS_PORT)],
        metrics_port: METRICS_PORT,
        volumes,
        probes: None,
        overrides: job.spec.pod_template.as_ref(),
        service_account: None,
        grace_seconds: GRACE.as_secs() as i64,
        // Ranks communicate: nothing spreads them over nodes.
        spread: None,
    });
    if let Some(spec) = &mut template.spec {
        spec.restart_policy = Some("Never".into());
        spec.subdomain = (job.nodes > 1).then(|| service_name(job));
    }
    template
}
