//! What a server answers with, without a model of its own: models come in by the traits of [`engine::backend`].
//!
//! - [`engine`]: one thread owns the model and batches waiting requests; it works on token ids, not on texts or wire types;
//! - [`service`]: texts to token ids and back, under the limits of the configuration;
//! - [`api`]: the OpenAI-style JSON API and the Open Inference Protocol v2 over a [`service::Service`];
//! - [`capacity`]: how many bytes of bodies, and calls, a process takes at once; `admission` applies it to each connection;
//! - [`lifecycle`]: listeners, their limits and the shutdown of a process; the router uses it as well;
//! - [`runtime`]: their threads, which yield to those of a model;
//! - [`tls`]: the certificate of a listener.
//!
//! Left out on purpose: training, Kubernetes and Kafka.

mod admission;
#[cfg(test)]
mod admission_tests;
pub mod api;
pub mod capacity;
pub mod engine;
pub mod lifecycle;
pub mod runtime;
pub mod service;
#[cfg(any(test, feature = "test-support"))]
pub mod test_support;
pub mod tls;
