//! Fine-tuning and distillation of encoders on one or many processes: data in, artifact out.
//!
//! [`run::run`] is one rank. It trains the single-device model of `athanor-models`; parallelism wraps it from outside, by a
//! process group and a gradient reducer, and the same code runs with one rank, with Gloo and with NCCL. The Kubernetes API is
//! never called: configuration comes as a file, the result leaves as a termination message and an exit code.
//!
//! - [`config`]: `train.json` of the operator, or the user's manifest on a laptop, whose fields `bounds` checks;
//! - [`data`]: rows to tokens and batches; [`select`]: which of them matter most;
//! - [`objectives`]: what is minimised, with or without a teacher;
//! - [`compress`]: smaller forms of the result;
//! - [`distributed`]: who is who, rendezvous, and launching the ranks of one machine;
//! - `material`: what one training learns from; `cross_validation`: trainings on all folds but one;
//! - [`training`]: the loop, with `words` for its largest table; [`checkpoint`]: its state, saved and resumed;
//! - [`evaluate`]: metrics and gates;
//! - [`check`]: what a job would do, without doing it; [`search`]: trials on a laptop, where no operator makes them jobs;
//! - [`report`]: progress to the operator, `/metrics`, the terminal, the termination message, and the report.

mod annotate;
pub mod artifact;
mod augment;
mod bounds;
pub mod check;
pub mod checkpoint;
pub mod compress;
pub mod config;
mod cross_validation;
pub mod data;
pub mod distributed;
mod error;
pub mod evaluate;
mod material;
pub mod objectives;
mod outcome;
mod prepare;
pub mod report;
pub mod run;
pub mod schedule;
pub mod search;
pub mod select;
mod setup;
pub mod training;
pub mod watchdog;
mod words;

pub use error::TrainError;

/// Tests of one process share libtorch's generator: those that draw from it take turns.
#[cfg(test)]
static GENERATOR: std::sync::Mutex<()> = std::sync::Mutex::new(());
