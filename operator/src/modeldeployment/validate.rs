//! Turns a ModelDeployment into one that children can be built from. What the API server refuses by the CRD is not
//! checked again.

use athanor_contract::{
    redaction::{InvalidPattern, Redaction},
    serve::{EngineConfig, EventsConfig, Scope},
};
use athanor_crds::{
    ContainerEngine, EngineSpec, ModelDeployment, ModelDeploymentSpec, schema::LONGEST_DEPLOYMENT_NAME,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;

use super::names;
use crate::{cluster, finetunejob::is_service_name};

/// Most characters of a topic's name in Kafka.
const LONGEST_TOPIC: usize = 249;

/// A deployment whose children have valid names.
pub struct ValidatedDeployment {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub owner: Vec<OwnerReference>,
    pub source: Source,
    /// Folder of the base model, if the model to serve is an adapter.
    pub base: Option<String>,
    /// Kafka topic of the events, with its name filled in.
    pub events: Option<EventsConfig>,
    pub engine: Engine,
    pub spec: ModelDeploymentSpec,
}

/// `spec.model`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Uri(String),
    Job(String),
}

/// `spec.engine`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// That of athanor-server.
    Builtin(EngineConfig),
    /// A server of another project.
    Container(ContainerEngine),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDeployment {
    #[error(
        "metadata.name: {0:?} is the name of Services and pods; it must have at most {LONGEST_DEPLOYMENT_NAME} characters, start with a \
         lower-case letter and contain only lower-case letters, digits and '-'"
    )]
    Name(String),
    #[error("spec.model: set exactly one of from and fromJob")]
    Model,
    #[error("spec.adapters: {0:?} is the name of the deployment or may be that of a revision; choose another one")]
    AdapterName(String),
    #[error("spec.adapters: {0:?} must have exactly one of from and fromJob")]
    Adapter(String),
    #[error(
        "spec.retrain.template.spec.data.sources: {0:?} is also the name of the added source (spec.retrain.sourceName); \
         rename one of the two"
    )]
    SourceName(String),
    #[error("spec.feedback.kafka.topic: {0:?} has more than {LONGEST_TOPIC} characters; set a shorter one")]
    Topic(String),
    #[error("spec.feedback.kafka.topicConfig: {0:?} is not the name of a topic's configuration, such as retention.ms")]
    TopicConfig(String),
    #[error("spec.feedback.{0}")]
    Redact(#[from] InvalidPattern),
    #[error("spec.engine.builtin.kvCacheMemory: {0:?} is not a quantity of bytes such as 512Mi")]
    CacheMemory(String),
    #[error("spec.engine: set at most one of builtin and container")]
    Engine,
    #[error("spec.engine.container: model.base and adapters require engine.builtin")]
    AdaptersOfContainer,
    #[error("the object has no {0}")]
    Incomplete(&'static str),
}

/// Checks the specification.
///
/// # Errors
/// The first mistake, with its field.
pub fn validate(deployment: &ModelDeployment) -> Result<ValidatedDeployment, InvalidDeployment> {
    let name = deployment.name_any();
    if !is_service_name(&name, LONGEST_DEPLOYMENT_NAME) {
        return Err(InvalidDeployment::Name(name));
    }
    let namespace = deployment.namespace().ok_or(InvalidDeployment::Incomplete("namespace"))?;
    let spec = &deployment.spec;
    let source = match (&spec.model.from, &spec.model.from_job) {
        (Some(uri), None) => Source::Uri(uri.clone()),
        (None, Some(job)) => Source::Job(job.name.clone()),
        _ => return Err(InvalidDeployment::Model),
    };
    for adapter in &spec.adapters {
        if adapter.name == name || names::is_revision(&name, &adapter.name) {
            return Err(InvalidDeployment::AdapterName(adapter.name.clone()));
        }
        if adapter.from.is_some() == adapter.from_job.is_some() {
            return Err(InvalidDeployment::Adapter(adapter.name.clone()));
        }
    }
    if let Some(retrain) = &spec.retrain
        && retrain.template.spec.train.data.sources.iter().any(|source| source.name == retrain.source_name)
    {
        return Err(InvalidDeployment::SourceName(retrain.source_name.clone()));
    }
    let events = spec.feedback.as_ref().map(|feedback| EventsConfig {
        bootstrap_servers: feedback.kafka.bootstrap_servers.clone(),
        topic: feedback.kafka.topic.clone().unwrap_or_else(|| format!("athanor.{namespace}.{name}")),
        topic_config: feedback.kafka.topic_config.clone(),
        sample_percent: feedback.sample_percent,
        redact: feedback.redact.clone(),
        maximum_caller_percent: feedback.maximum_caller_percent.unwrap_or_else(|| default_share(spec)),
        durable_predictions: feedback.durable_predictions,
    });
    if let Some(events) = &events {
        Redaction::compile(&events.redact)?;
    }
    if let Some(events) = events.as_ref().filter(|events| events.topic.len() > LONGEST_TOPIC) {
        return Err(InvalidDeployment::Topic(events.topic.clone()));
    }
    let topic_config = events.iter().flat_map(|events| events.topic_config.keys());
    if let Some(name) = topic_config.into_iter().find(|name| !is_config_name(name)) {
        return Err(InvalidDeployment::TopicConfig(name.clone()));
    }
    let engine = engine(&spec.engine)?;
    if matches!(engine, Engine::Container(_)) && (spec.model.base.is_some() || !spec.adapters.is_empty()) {
        return Err(InvalidDeployment::AdaptersOfContainer);
    }
    Ok(ValidatedDeployment {
        engine,
        uid: deployment.uid().ok_or(InvalidDeployment::Incomplete("uid"))?,
        owner: cluster::owner(deployment),
        base: spec.model.base.as_ref().map(|base| base.from.clone()),
        spec: spec.clone(),
        name,
        namespace,
        source,
        events,
    })
}

fn engine(spec: &EngineSpec) -> Result<Engine, InvalidDeployment> {
    match (&spec.builtin, &spec.container) {
        (Some(_), Some(_)) => Err(InvalidDeployment::Engine),
        (None, Some(container)) => Ok(Engine::Container(container.clone())),
        (builtin, None) => {
            let config = builtin.clone().unwrap_or_default().config().map_err(InvalidDeployment::CacheMemory)?;
            Ok(Engine::Builtin(config))
        }
    }
}

/// Largest percentage of the feedback that may come from one caller, if the user has set none. A single caller with the
/// scope is all the feedback there is.
fn default_share(spec: &ModelDeploymentSpec) -> u32 {
    let keys = spec.access.as_ref().and_then(|access| access.api_keys.as_ref());
    let callers = keys.iter().flat_map(|keys| &keys.callers);
    if callers.filter(|caller| caller.scopes.contains(&Scope::Feedback)).count() > 1 { 50 } else { 100 }
}

/// Returns whether a name has the form of those of Kafka's topic configurations.
fn is_config_name(name: &str) -> bool {
    name.starts_with(|first: char| first.is_ascii_lowercase())
        && name
            .chars()
            .all(|character| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '.')
}
