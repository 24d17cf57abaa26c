//! The messages and services, generated from `proto/open_inference_grpc.proto`.
#![allow(missing_docs, clippy::all, clippy::too_many_lines)]

tonic::include_proto!("inference");

/// The descriptors that reflection serves.
pub const DESCRIPTOR: &[u8] = tonic::include_file_descriptor_set!("inference");
