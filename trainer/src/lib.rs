//! Fine-tuning of encoders and decoders, and distillation of encoders, on one or many processes: data in, artifact out.
//!
//! [`job::run::run`] is one rank. It trains the single-device model of `athanor-models`; parallelism wraps it from
//! outside, by a process group and a gradient reducer, and the same code runs with one rank, with Gloo and with NCCL.
//! The Kubernetes API is never called: the configuration comes as a file, the result leaves as a termination message
//! and an exit code.
//!
//! - [`job`]: a job from its configuration to its artifact, with `check` and the search on a laptop;
//! - [`data`]: rows to tokens and batches;
//! - [`curate`]: the rows of one training: annotated, selected, augmented;
//! - [`network`]: the model of a job, an encoder or a decoder;
//! - [`tasks`]: what differs between tasks, one file each;
//! - [`objectives`]: what is minimised, one file a term; [`teacher`]: the model whose answers a student learns;
//! - [`train`]: the loop, its optimizer step on one rank or many, and checkpoints;
//! - [`evaluate`]: metrics and gates; [`compress`]: smaller forms of the result;
//! - [`distributed`]: rank and world, rendezvous, launching the ranks of one machine and what they share;
//! - [`report`]: progress to the operator, `/metrics`, the terminal, the termination message, and the report.

pub mod compress;
pub mod curate;
pub mod data;
pub mod distributed;
mod error;
pub mod evaluate;
pub mod job;
mod lock;
pub mod network;
pub mod objectives;
pub mod report;
pub mod tasks;
pub mod teacher;
pub mod train;

pub use error::TrainError;

/// Tests of one process share libtorch's generator: those that draw from it take turns.
#[cfg(test)]
static GENERATOR: std::sync::Mutex<()> = std::sync::Mutex::new(());
