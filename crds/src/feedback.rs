//! What a ModelDeployment records, and where.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where events are recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {"rule": "has(self.kafka.topic) == has(oldSelf.kafka.topic) && (!has(self.kafka.topic) || self.kafka.topic == oldSelf.kafka.topic)",
     "message": "topic is immutable: offsets of the old topic would be read from the new one"}]))]
pub struct FeedbackSpec {
    /// Kafka cluster and topic.
    pub kafka: KafkaSpec,
    /// Percentage of requests that are recorded with their answers and feedback. The id of a request decides.
    #[serde(default = "default_sample")]
    #[schemars(range(min = 1, max = 100))]
    pub sample_percent: u32,
    /// Whether a classifier's answer waits until it is recorded in Kafka or on the router's disk, some milliseconds. Without
    /// it, a router that is killed may lose the answers of its last moment, whose feedback is then of no use.
    #[serde(default, skip_serializing_if = "crate::is_default")]
    pub durable_predictions: bool,
    /// Regular expressions in the syntax of Rust's regex crate. Each match in a recorded prompt, message, answer, text
    /// or correction is replaced by "[redacted]" before it is written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 256)), extend("x-kubernetes-list-type" = "atomic"))]
    pub redact: Vec<String>,
    /// Largest percentage of the feedback in a drift verdict, and of the rows in a retraining, that may come from one
    /// caller of access.apiKeys. With 25, a verdict requires the feedback of four callers at least. Absent: 50 if two or
    /// more callers may give feedback, else 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub maximum_caller_percent: Option<u32>,
}

fn default_sample() -> u32 {
    100
}

/// A Kafka topic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaSpec {
    /// Addresses of the brokers, host:port, separated by commas.
    #[schemars(length(min = 1, max = 1024))]
    pub bootstrap_servers: String,
    /// Topic for predictions and feedback. Absent: athanor.{namespace}.{name}.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 249), regex(pattern = r"^[a-zA-Z0-9._-]+$"))]
    pub topic: Option<String>,
    /// Configuration of the topic, such as `retention.ms: "604800000"` or `min.insync.replicas: "2"`, when a router creates it.
    /// A topic that exists is not changed: neither one that was created elsewhere nor, after a change of this field, one that
    /// a router created. Without a name or value that Kafka takes, the topic is not created. Absent: the broker's defaults.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32, "additionalProperties" = {"type": "string", "maxLength": 1024}, "x-kubernetes-validations" = [
        {"rule": "self.all(name, size(name) <= 128)", "message": "a name in topicConfig has at most 128 characters"}]))]
    pub topic_config: BTreeMap<String, String>,
    /// Name of a Secret in the same namespace whose keys become environment variables of router, monitor and
    /// retrainings: KAFKA_SECURITY_PROTOCOL, KAFKA_SASL_MECHANISM, KAFKA_SASL_USERNAME, KAFKA_SASL_PASSWORD,
    /// KAFKA_SSL_CA, KAFKA_SSL_CERTIFICATE and KAFKA_SSL_KEY (the last three in PEM), as far as the brokers need them.
    /// Absent: the brokers take connections without credentials.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub credentials_secret_name: Option<String>,
}
