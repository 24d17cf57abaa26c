//! Generates the gRPC client of `contract/proto/progress.proto`.

fn main() -> std::io::Result<()> {
    // The server half is for tests of the client.
    tonic_prost_build::configure()
        .build_server(false)
        .compile_protos(&["../contract/proto/progress.proto"], &["../contract/proto"])
}
