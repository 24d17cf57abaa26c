//! Compiles the C++ of `src` against the headers of `$LIBTORCH`. Linking libtorch itself is torch-sys's part.

use std::{env, path::PathBuf};

fn main() {
    for file in ["kernels.cpp", "kernels.hpp", "layer.cpp", "shim.cpp", "shim.hpp"] {
        println!("cargo:rerun-if-changed=src/{file}");
    }
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = env::var_os("LIBTORCH").map(PathBuf::from) else {
        panic!("LIBTORCH is not set: run `scripts/fetch libtorch` and `. scripts/env`");
    };
    let include = libtorch.join("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .files(["src/shim.cpp", "src/layer.cpp"])
        .flag("-isystem")
        .flag(include.to_str().expect("LIBTORCH is valid Unicode"))
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").to_str().expect("LIBTORCH is valid Unicode"))
        .define("USE_C10D_GLOO", None)
        // Without it libtorch's parallel loops run on one thread where they are compiled here.
        .flag("-fopenmp")
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
    // Behind the shim, which calls it. A square root vectorizes only where it need not set errno.
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .file("src/kernels.cpp")
        .opt_level(3)
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .compile("athanor_kernels");
    println!("cargo:rustc-link-search=native={}", libtorch.join("lib").display());
    // After the static shim, so that its symbols are found in them.
    println!("cargo:rustc-link-lib=dylib=torch_cpu");
    println!("cargo:rustc-link-lib=dylib=c10");
    println!("cargo:rustc-link-lib=dylib=gomp");
}
