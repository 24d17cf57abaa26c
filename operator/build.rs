//! Generates the server of the progress protocol.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=../contract/proto/progress.proto");
    tonic_prost_build::configure()
        .build_client(true)
        .compile_protos(&["../contract/proto/progress.proto"], &["../contract/proto"])?;
    Ok(())
}
