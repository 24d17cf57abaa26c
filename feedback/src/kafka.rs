//! What every Kafka client of Athanor shares: a base configuration, the broker's credentials and logs through `tracing`.

use athanor_contract::process::variable;
use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    consumer::ConsumerContext,
    error::{KafkaError, RDKafkaErrorCode},
};

/// Sends librdkafka's logs to `tracing`.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogContext;

impl ClientContext for LogContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
                tracing::error!(facility, "librdkafka: {message}");
            }
            RDKafkaLogLevel::Warning => tracing::warn!(facility, "librdkafka: {message}"),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => tracing::info!(facility, "librdkafka: {message}"),
            RDKafkaLogLevel::Debug => tracing::debug!(facility, "librdkafka: {message}"),
        }
    }

    // Callers see each failed operation themselves; a broker that is away is logged by them once, not by every socket.
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, "librdkafka: {reason}");
    }
}

impl ConsumerContext for LogContext {}

/// Environment variables with credentials, and librdkafka's names for them.
const SECURITY: [(&str, &str); 7] = [
    (variable::KAFKA_SECURITY_PROTOCOL, "security.protocol"),
    (variable::KAFKA_SASL_MECHANISM, "sasl.mechanism"),
    (variable::KAFKA_SASL_USERNAME, "sasl.username"),
    (variable::KAFKA_SASL_PASSWORD, "sasl.password"),
    (variable::KAFKA_SSL_CA, "ssl.ca.pem"),
    (variable::KAFKA_SSL_CERTIFICATE, "ssl.certificate.pem"),
    (variable::KAFKA_SSL_KEY, "ssl.key.pem"),
];

/// Client settings common to producers and consumers: a broker that comes back is noticed within a second or so. Credentials come
/// from the environment (`KAFKA_SECURITY_PROTOCOL` and the like), which a pod has from the Secret of its specification.
pub fn client_config(bootstrap_servers: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", bootstrap_servers)
        .set("client.id", "athanor")
        .set("reconnect.backoff.ms", "100")
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.keepalive.enable", "true")
        .set("log.connection.close", "false")
        // The lines librdkafka writes at `error` about each refused connection say no more than our own warning.
        .set_log_level(RDKafkaLogLevel::Critical);
    for (name, setting) in SECURITY {
        if let Ok(value) = std::env::var(name)
            && !value.is_empty()
        {
            // A value made by kubectl from a file ends with a line break.
            config.set(setting, value.trim_end_matches(['\n', '\r']));
        }
    }
    config
}

/// Settings of a consumer that is assigned partitions and offsets by hand and never joins its group's rebalancing.
pub fn consumer_config(bootstrap_servers: &str, group: &str) -> ClientConfig {
    let mut config = client_config(bootstrap_servers);
    config
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", "read_committed");
    config
}

/// Whether the broker answered that there is no such topic or partition.
pub fn is_unknown_topic(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownPartition
    )
}
