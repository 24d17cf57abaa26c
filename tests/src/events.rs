//! Reads a deployment's topic with a consumer that shares no code with Athanor's.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use athanor_contract::{event::attribute, process::variable};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    consumer::{BaseConsumer, Consumer},
    message::Headers,
    types::RDKafkaErrorCode,
};

pub const BOOTSTRAP: &str = "198.51.100.1:9092";

/// Keys of the Secret with the credentials of the broker's secure port (cluster/versions.sh).
pub fn credentials() -> Result<serde_json::Value> {
    let state = std::env::var_os("ATHANOR_CLUSTER").map_or("/var/lib/athanor-cluster".into(), std::path::PathBuf::from);
    let authority = state.join("pki/ca.crt");
    let authority = std::fs::read_to_string(&authority).with_context(|| format!("reading {}", authority.display()))?;
    Ok(serde_json::json!({
        variable::KAFKA_SECURITY_PROTOCOL: "SASL_SSL",
        variable::KAFKA_SASL_MECHANISM: "PLAIN",
        variable::KAFKA_SASL_USERNAME: "athanor",
        variable::KAFKA_SASL_PASSWORD: "athanor-secret",
        variable::KAFKA_SSL_CA: authority,
    }))
}

/// Deletes a topic and waits until the broker has forgotten it; none there is fine.
pub async fn delete_topic(topic: &str) -> Result<()> {
    let admin: AdminClient<_> =
        ClientConfig::new().set("bootstrap.servers", BOOTSTRAP).create().context("Kafka admin")?;
    for result in admin.delete_topics(&[topic], &AdminOptions::new()).await.context("Kafka")? {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
            Err((_, code)) => anyhow::bail!("topic {topic} cannot be deleted: {code}"),
        }
    }
    Ok(())
}

/// One record of the topic.
#[derive(Clone, Debug)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    pub id: String,
    pub kind: String,
    /// RFC 3339.
    pub time: String,
    pub trace_parent: Option<String>,
    pub request_id: String,
    /// JSON.
    pub value: Vec<u8>,
}

/// Every record of a topic from its beginning up to now. Blocking.
pub fn read_all(topic: &str) -> Result<Vec<Record>> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", BOOTSTRAP)
        .set("group.id", "athanor-demo-audit")
        .set("enable.auto.commit", "false")
        .create()
        .context("Kafka consumer")?;
    let timeout = Duration::from_secs(20);
    let metadata = consumer.fetch_metadata(Some(topic), timeout).context("Kafka metadata")?;
    let mut ends = BTreeMap::new();
    let mut assignment = TopicPartitionList::new();
    for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
        let (low, high) = consumer.fetch_watermarks(topic, partition.id(), timeout)?;
        if high > low {
            ends.insert(partition.id(), high);
            assignment.add_partition_offset(topic, partition.id(), Offset::Offset(low))?;
        }
    }
    consumer.assign(&assignment)?;
    let mut records = Vec::new();
    while !ends.is_empty() {
        let message = consumer.poll(timeout).context("the topic ended early")??;
        let header = |name: &str| {
            let headers = message.headers()?;
            let found = headers.iter().find(|header| header.key == name)?;
            found.value.map(|value| String::from_utf8_lossy(value).into_owned())
        };
        records.push(Record {
            partition: message.partition(),
            offset: message.offset(),
            id: header(attribute::ID).unwrap_or_default(),
            kind: header(attribute::TYPE).unwrap_or_default(),
            time: header(attribute::TIME).unwrap_or_default(),
            trace_parent: header(attribute::TRACE_PARENT),
            request_id: message.key().map(|key| String::from_utf8_lossy(key).into_owned()).unwrap_or_default(),
            value: message.payload().unwrap_or_default().to_vec(),
        });
        if ends.get(&message.partition()).is_some_and(|end| message.offset() + 1 >= *end) {
            ends.remove(&message.partition());
        }
    }
    Ok(records)
}
