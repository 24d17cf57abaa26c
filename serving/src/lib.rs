//! Serving without a model of its own: what `athanor-server` answers with, and the stable address in front of all revisions
//! (`athanor-router`). Models come in by the trait [`engine::Backend`], so that a router links no libtorch.
//!
//! - [`engine`]: a thread that owns the model and batches what waits; it knows token ids and nothing of texts or wire types;
//! - [`service`]: texts to token ids to probabilities, under the limits of the configuration;
//! - [`http`] and [`grpc`]: the OpenAI-style JSON API and the Open Inference Protocol v2 over a [`service::Service`];
//! - [`router`]: weights, retries, events and feedback, without a model.
//!
//! Left out on purpose: training, and Kubernetes anywhere but in [`router::kubernetes`].

pub mod engine;
pub mod grpc;
pub mod http;
pub mod lifecycle;
pub mod router;
pub mod service;
#[cfg(test)]
mod test_support;
