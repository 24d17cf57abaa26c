//! What Athanor's processes say to each other: plain serde and schemars types, no I/O.
//!
//! - [`train`]: the training part of a `FineTuneJob`, what the operator mounts into a trainer, and what comes back;
//! - [`serve`]: configuration of server and router;
//! - [`monitor`]: configuration of the monitor, and its verdict;
//! - [`process`]: environment variables, ports, files and names that two processes share;
//! - [`event`]: the CloudEvents on a deployment's Kafka topic;
//! - [`hexadecimal`]: bytes as digits;
//! - [`redaction`]: replacement of parts of recorded texts;
//! - [`artifact`]: the manifest that makes a folder a model or a checkpoint.

pub mod artifact;
mod decimal;
pub mod event;
pub mod hexadecimal;
pub mod monitor;
pub mod process;
pub mod redaction;
pub mod serve;
pub mod train;

pub use decimal::Decimal;
