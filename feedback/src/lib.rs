//! Events of a deployment through Kafka, and what is learnt from them.
//!
//! - [`cloudevents`]: an event as a Kafka record and back;
//! - [`producer`]: publishing that loses nothing it acknowledged, with [`spill`] files while Kafka is away;
//! - [`signing`]: keys that sign request ids and events;
//! - [`snapshot`]: exact offset ranges as labelled rows;
//! - [`drift`]: the statistics, [`window`]: the state machine over a deployment's events that uses them.
//!
//! The library knows no Kubernetes; only the binary `athanor-monitor` (feature `monitor`) does.

pub mod cloudevents;
pub mod drift;
pub mod kafka;
pub mod producer;
pub mod signing;
pub mod snapshot;
pub mod spill;
pub mod window;

pub use producer::{Producer, ProducerError};
pub use snapshot::{CorrectedAnswer, LabelledRow, Snapshot, SnapshotError, read_rows};
