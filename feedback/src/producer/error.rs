//! Why an event was not published.

use std::sync::Arc;

use rdkafka::error::KafkaError;

use crate::spill::SpillError;

#[derive(Debug, thiserror::Error)]
pub enum ProducerError {
    #[error("the Kafka client cannot be configured: {0}")]
    Configuration(#[from] KafkaError),
    /// Neither Kafka nor the disk took the event.
    #[error("the event could not be kept: {0}")]
    Spill(#[from] Arc<SpillError>),
    /// Kafka or JSON will never take this event, such as one larger than the broker's limit.
    #[error("event {id:?} was refused: {reason}")]
    Rejected { id: String, reason: String },
    #[error("the producer has shut down")]
    Closed,
}
