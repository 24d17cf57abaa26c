//! Generates the gRPC client of `contract/proto/progress.proto`, and links the allocator.

fn main() -> std::io::Result<()> {
    // Of the whole process, libtorch included: a step's large blocks come back from the step before, where glibc's malloc faults
    // them in anew and breaks its heap into pieces. Of the static library, so that a program needs nothing beside it.
    println!("cargo:rustc-link-lib=static:-bundle=tcmalloc_minimal");
    let architecture = std::env::var("CARGO_CFG_TARGET_ARCH").expect("cargo tells the architecture");
    println!("cargo:rustc-link-search=native=/usr/lib/{architecture}-linux-gnu");
    println!("cargo:rustc-link-lib=dylib=stdc++");
    // The server half is for tests of the client.
    tonic_prost_build::configure()
        .build_server(false)
        .compile_protos(&["../contract/proto/progress.proto"], &["../contract/proto"])
}
