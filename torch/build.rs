//! Compiles `src/shim.cpp` against the headers of `$LIBTORCH`. Linking libtorch itself is torch-sys's part.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=src/shim.cpp");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = env::var_os("LIBTORCH").map(PathBuf::from) else {
        panic!("LIBTORCH is not set: run `scripts/fetch libtorch` and `. scripts/env`");
    };
    let include = libtorch.join("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .file("src/shim.cpp")
        .flag("-isystem")
        .flag(include.to_str().expect("LIBTORCH is valid Unicode"))
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").to_str().expect("LIBTORCH is valid Unicode"))
        .define("USE_C10D_GLOO", None)
        .flag_if_supported("-Wno-unused-parameter")
        // GCC 12 sees ghosts in std::optional of libtorch's smart pointers.
        .flag_if_supported("-Wno-maybe-uninitialized");
    if env::var_os("CARGO_FEATURE_NCCL").is_some() {
        // CUDA's and NCCL's headers, where `scripts/fetch libtorch-cuda` puts them; elsewhere CPATH names them.
        for folder in ["nvidia/cu13/include", "nvidia/cu13/include/cccl", "nvidia/nccl/include"] {
            build.flag("-isystem").flag(libtorch.join(folder).to_str().expect("LIBTORCH is valid Unicode"));
        }
        build.define("USE_C10D_NCCL", None).define("ATHANOR_NCCL", None);
        println!("cargo:rustc-link-lib=dylib=torch_cuda");
        println!("cargo:rustc-link-lib=dylib=c10_cuda");
    }
    build.compile("athanor_shim");
    println!("cargo:rustc-link-search=native={}", libtorch.join("lib").display());
    // After the static shim, so that its symbols are found in them.
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
}
