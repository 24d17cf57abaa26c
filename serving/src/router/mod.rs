//! The router: the stable address of a ModelDeployment.
//!
//! It chooses a revision by weight and an endpoint by load ([`endpoints`]), retries what another endpoint can still answer
//! ([`forward`]), signs request ids ([`request_id`]), publishes predictions and feedback as events ([`events`], [`feedback`]), and
//! counts per revision what a canary analysis needs ([`analysis`]). It has no model and keeps nothing that another replica would need.
//! Only [`kubernetes`] talks to Kubernetes: one ConfigMap and EndpointSlices.

pub mod analysis;
pub mod config;
pub mod endpoints;
pub mod events;
pub mod feedback;
pub mod forward;
pub mod gateway;
pub mod grpc;
pub mod http;
pub mod kubernetes;
pub mod labels;
pub mod local;
pub mod recent;
pub mod request_id;
pub mod select;
#[cfg(test)]
mod tests;
