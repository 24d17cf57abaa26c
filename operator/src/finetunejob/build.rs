//! The children of a FineTuneJob: the trainer's configuration, a headless Service for the rendezvous, an Indexed Job.

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
        core::v1::{ConfigMap, Service, ServicePort, ServiceSpec},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};

use super::{
    claims,
    decide::{Decision, job_name},
    search::{Found, NewTrial},
    validate::ValidatedJob,
};
use crate::{
    pods::{self, PodPlan},
    settings::Settings,
};

/// Component, and name of the container.
pub const COMPONENT: &str = "trainer";
/// Port of rank 0's rendezvous.
const MASTER_PORT: i32 = port::RENDEZVOUS as i32;
const METRICS_PORT: i32 = port::TRAINER_METRICS as i32;
/// Seconds for a last checkpoint after SIGTERM.
const GRACE: Duration = Duration::from_secs(30);

/// What a decision asks for.
pub struct Children {
    pub attempt: Option<Attempt>,
    /// FineTuneJobs of the search.
    pub trials: Vec<FineTuneJob>,
}

/// Everything that one attempt needs.
pub struct Attempt {
    pub config: ConfigMap,
    pub service: Service,
    pub job: Job,
}

/// The children that the decision asks for.
pub fn build(job: &ValidatedJob, settings: &Settings, decision: &Decision) -> Children {
    let attempt = decision.create.then(|| Attempt {
        config: config(job, settings, decision.found.as_ref()),
        service: service(job),
        job: indexed_job(job, settings, decision.attempt),
    });
    Children { attempt, trials: decision.trials.iter().map(|new| trial(job, new)).collect() }
}

/// Folder of all that the job makes; a trial's is inside its parent's.
fn folder(job: &ValidatedJob) -> String {
    let named = |name: &str, uid: &str| format!("{name}-{}", uid.get(..8).unwrap_or(uid));
    let parent = job.trial_of.as_ref().map(|parent| format!("{}/trials/", named(&parent.name, &parent.uid)));
    let to = job.spec.train.output.to.trim_end_matches('/');
    format!("{to}/{}{}", parent.unwrap_or_default(), named(&job.name, &job.uid))
}

/// A trial: the job with other hyperparameters, judged by its validation rows alone. Its output is the job's, where annotations and
/// a teacher's answers are kept: what one trial asked, the others and the job itself find there.
fn trial(job: &ValidatedJob, new: &NewTrial) -> FineTuneJob {
    let mut spec = job.spec.clone();
    spec.train = new.train.clone();
    spec.train.evaluate.gates.clear();
    spec.train.evaluate.baseline = None;
    spec.train.compress.clear();
    // Suspending, limits of time and deletion are the parent's business.
    spec.suspend = false;
    spec.active_deadline_seconds = None;
    spec.ttl_seconds_after_finished = None;
    let mark = serde_json::to_string(&new.mark).expect("a mark has string keys only");
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
        annotations: Some([(TRIAL_ANNOTATION.into(), mark)].into()),
        ..metadata(job, new.job.clone())
    };
    child
}

/// The trainer's configuration.
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

fn config(job: &ValidatedJob, settings: &Settings, found: Option<&Found>) -> ConfigMap {
    let spec = found.map_or(&job.spec.train, |found| &found.train);
    let trials = found.map_or(Vec::new(), |found| found.trials.clone());
    let config = TrainConfig { trials, ..train_config(job, settings, spec) };
    let text = serde_json::to_string_pretty(&config).expect("a configuration has string keys only");
    ConfigMap {
        metadata: metadata(job, config_name(job)),
        data: Some([(file::TRAIN.into(), text)].into()),
        ..ConfigMap::default()
    }
}

/// Headless, and with addresses of pods that are not ready: ranks meet before any of them is.
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

fn indexed_job(job: &ValidatedJob, settings: &Settings, attempt: u32) -> Job {
    let name = job_name(&job.name, attempt);
    let nodes = i32::try_from(job.spec.train.distributed.num_nodes).unwrap_or(i32::MAX);
    let master = format!("{name}-0.{}.{}.svc.cluster.local", service_name(job), job.namespace);
    let mut env = pods::common_environment(settings.otlp_endpoint.as_deref());
    env.extend([
        pods::field(variable::NODE_RANK, "metadata.annotations['batch.kubernetes.io/job-completion-index']"),
        pods::variable(variable::NUM_NODES, nodes.to_string()),
        pods::variable(variable::MASTER_ADDR, master),
        pods::variable(variable::MASTER_PORT, MASTER_PORT.to_string()),
        pods::field(variable::POD_IP, "status.podIP"),
        pods::variable(variable::NAMESPACE, job.namespace.clone()),
        pods::variable(variable::METRICS_PORT, METRICS_PORT.to_string()),
    ]);
    let mut volumes = vec![
        (pods::config(&config_name(job)), path::CONFIG.to_owned()),
        // NCCL and Gloo exchange data of one node's processes here; the default of 64 MiB is too little.
        (pods::scratch("shm", Some("Memory")), "/dev/shm".into()),
    ];
    // A claim's name may be too long for a volume's.
    volumes.extend(
        claims::of(&job.spec.train)
            .iter()
            .enumerate()
            .map(|(index, claim)| (pods::claim(&format!("claim-{index}"), claim), claims::folder(claim))),
    );
    let mut template = pods::template(PodPlan {
        component: COMPONENT,
        image: job.spec.image.as_deref().unwrap_or(&settings.trainer_image),
        command: ["athanor-trainer", "run", "--config", path::TRAIN_CONFIG].map(Into::into).into(),
        labels: pods::labels(COMPONENT, label::FINE_TUNE_JOB, &job.name),
        annotations: pods::Labels::new(),
        env,
        credentials: job.spec.credentials_secret_name.as_deref(),
        ports: vec![("metrics", METRICS_PORT)],
        metrics_port: METRICS_PORT,
        volumes,
        overrides: job.spec.pod_template.as_ref(),
        service_account: None,
        grace_seconds: GRACE.as_secs() as i64,
        // Ranks are better off close together.
        spread: None,
    });
    if let Some(spec) = &mut template.spec {
        spec.restart_policy = Some("Never".into());
        spec.subdomain = Some(service_name(job));
    }
    let mut metadata = metadata(job, name);
    metadata.labels.get_or_insert_default().extend(job.queue_labels.iter().cloned());
    Job {
        metadata,
        spec: Some(JobSpec {
            completion_mode: Some("Indexed".into()),
            completions: Some(nodes),
            parallelism: Some(nodes),
            // The gang restarts as a whole, by another Job.
            backoff_limit: Some(0),
            // A queue starts it.
            suspend: (!job.queue_labels.is_empty()).then_some(true),
            template,
            ..JobSpec::default()
        }),
        status: None,
    }
}
