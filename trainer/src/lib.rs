//! Fine-tuning of a classifier on one or many processes: data in, artifact out.
//!
//! [`run::run`] is one rank. It trains the single-device model of `athanor-models`; parallelism wraps it from outside, by a
//! process group and a gradient reducer, and the same code runs with one rank, with Gloo and with NCCL. The Kubernetes API is
//! never called: configuration comes as a file, the result leaves as a termination message and an exit code.
//!
//! - [`config`]: `train.json` of the operator, or the user's manifest on a laptop;
//! - [`data`]: sources to rows, split, tokens, batches;
//! - [`distributed`]: who is who, rendezvous, and launching the ranks of one machine;
//! - [`training`]: the loop; [`checkpoint`]: its state, saved and resumed; [`evaluate`]: metrics and gates;
//! - [`check`]: what a job would do, without doing it;
//! - [`report`]: progress to the operator, `/metrics`, the terminal, the termination message, and the report.

pub mod artifact;
pub mod check;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod distributed;
mod error;
pub mod evaluate;
pub mod report;
pub mod run;
pub mod schedule;
pub mod training;
pub mod watchdog;

pub use error::TrainError;
