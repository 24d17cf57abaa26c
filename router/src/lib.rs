//! The router: the stable address of a ModelDeployment.
//!
//! - [`balance`]: chooses a revision by weight and an endpoint by load, and retries what another endpoint can still answer;
//! - [`proxy`]: the HTTP and gRPC servers that forward requests;
//! - [`record`]: signs request ids, publishes predictions and feedback as events;
//! - [`adapter`]: which adapter a request selects;
//! - [`access`]: API keys of callers, their scopes and limits;
//! - [`playground`]: a page for trying the model in a browser;
//! - [`analysis`]: counts per revision what a canary analysis needs;
//! - [`source`]: where configuration and endpoints come from. Only [`source::kubernetes`] talks to Kubernetes: one ConfigMap and
//!   EndpointSlices.
//!
//! It has no model and keeps nothing that another replica would need.

pub mod access;
pub mod adapter;
pub mod analysis;
pub mod balance;
pub mod config;
pub mod gateway;
pub mod playground;
pub mod proxy;
pub mod record;
pub mod source;
#[cfg(test)]
mod tests;
