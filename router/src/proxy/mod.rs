//! The protocols that are forwarded to a revision.

pub mod call;
pub mod exchange;
pub mod generation;
pub mod grpc;
pub mod http;
pub mod pass;
pub mod stream;
