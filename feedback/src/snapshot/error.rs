//! Why a snapshot cannot be read.

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("topic {topic:?} does not exist at {bootstrap_servers}")]
    TopicMissing { topic: String, bootstrap_servers: String },
    #[error("topic {topic:?} has no partition {partition}")]
    PartitionMissing { topic: String, partition: i32 },
    #[error("ranges[{index}] of topic {topic:?} is not valid: {message}")]
    Range { topic: String, index: usize, message: String },
    #[error("partition {partition} of topic {topic:?} ends at offset {high}, but the range ends at {end}")]
    BeyondEnd { topic: String, partition: i32, end: i64, high: i64 },
    #[error("signingKeysSecretName {secret:?}: {message}")]
    Keys { secret: String, message: String },
    #[error("Kafka at {bootstrap_servers} cannot be read: {message}")]
    Unavailable { bootstrap_servers: String, message: String },
}

impl SnapshotError {
    /// Whether the source must be changed: trying again does not help.
    pub fn is_user_error(&self) -> bool {
        !matches!(self, Self::Unavailable { .. })
    }
}
