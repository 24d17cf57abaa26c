//! Compiles the C++ of `src/native`, once for each instruction set; `dispatch.cpp` takes the best that the machine has.

use std::env;

const HEADERS: [&str; 11] = [
    "abi.hpp",
    "adapter.hpp",
    "attention.hpp",
    "decoder.hpp",
    "encoder.hpp",
    "float_product.hpp",
    "isa.hpp",
    "machine.hpp",
    "product.hpp",
    "team.hpp",
    "vector.hpp",
];

fn main() {
    for header in HEADERS {
        println!("cargo:rerun-if-changed=src/native/{header}");
    }
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        panic!("athanor-cpu has kernels for x86_64 only");
    }
    let avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"];
    let avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"];
    compile("avx2", &avx2);
    compile("avx512", &[avx2.as_slice(), avx512.as_slice()].concat());
    compile("avx512bf16", &[avx2.as_slice(), avx512.as_slice(), &["-mavx512bf16"]].concat());
    compile("dispatch", &[]);
}

fn compile(name: &str, flags: &[&str]) {
    let file = format!("src/native/{name}.cpp");
    println!("cargo:rerun-if-changed={file}");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").file(&file).opt_level(3);
    // Products and sums are fused where the code says so and nowhere else, so that every row is computed in the same way.
    build.flag("-ffp-contract=off").flag("-fno-math-errno").flag("-fno-trapping-math");
    // A vector of 64 bytes is two of 32 where AVX512 is absent; no such vector crosses a call between files.
    build.flag_if_supported("-Wno-psabi");
    // GCC 12 sees uninitialised registers in its own headers.
    build.flag_if_supported("-Wno-maybe-uninitialized");
    for flag in flags {
        build.flag(flag);
    }
    build.compile(&format!("athanor_cpu_{name}"));
}
