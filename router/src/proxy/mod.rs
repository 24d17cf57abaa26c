//! The protocols that are forwarded to a revision.

pub mod grpc;
pub mod http;
