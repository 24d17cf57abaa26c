//! Generates the Open Inference Protocol's messages, client and server, and the descriptor that gRPC reflection serves.

use std::{env, error::Error, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let descriptor = PathBuf::from(env::var("OUT_DIR")?).join("inference.bin");
    tonic_prost_build::configure()
        .bytes(".")
        .file_descriptor_set_path(descriptor)
        .compile_protos(&["proto/open_inference_grpc.proto"], &["proto"])?;
    Ok(())
}
