//! The C ABI of `native/dispatch.cpp`. `native/abi.hpp` has the same structures.

use std::ffi::c_void;

use crate::Error;

/// Which kernels compute. The order is that of speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX512 with VNNI.
    Avx512,
    /// AVX512 with VNNI and BF16. Attention of decoders rounds queries and weights to BF16.
    Avx512Bf16,
}

impl InstructionSet {
    /// # Errors
    /// This machine lacks it.
    pub(crate) fn check(self) -> Result<(), Error> {
        match Self::best() {
            Some(best) if self <= best => Ok(()),
            _ => Err(Error::Invalid(format!("this machine lacks {self:?}"))),
        }
    }

    pub(crate) fn number(self) -> i32 {
        match self {
            Self::Avx2 => 1,
            Self::Avx512 => 2,
            Self::Avx512Bf16 => 3,
        }
    }

    /// The best that this machine has; none if it lacks AVX2.
    pub fn best() -> Option<Self> {
        // SAFETY: the function takes nothing and reads the processor's features.
        match unsafe { athanor_cpu_instruction_set() } {
            0 => None,
            1 => Some(Self::Avx2),
            2 => Some(Self::Avx512),
            _ => Some(Self::Avx512Bf16),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub data: *const u8,
    pub format: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub outputs: i64,
    pub inputs: i64,
    pub tiles: *const Tile,
    pub bias: *const f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Layer {
    pub qkv: Matrix,
    pub output: Matrix,
    pub gate_up: Matrix,
    pub down: Matrix,
    pub input_norm: *const f32,
    pub post_attention_norm: *const f32,
    pub query_norm: *const f32,
    pub key_norm: *const f32,
    pub window: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct LowRankTile {
    pub b: *const u16,
    pub first: i32,
    pub count: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct LowRank {
    pub rank: i64,
    pub a: *const u16,
    pub scales: *const f32,
    pub tiles: *const LowRankTile,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AdapterLayer {
    pub qkv: LowRank,
    pub output: LowRank,
    pub gate_up: LowRank,
    pub down: LowRank,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub layers: i64,
    pub hidden: i64,
    pub intermediate: i64,
    pub heads: i64,
    pub key_value_heads: i64,
    pub head_dim: i64,
    pub vocabulary: i64,
    pub max_length: i64,
    pub blocks: i64,
    pub threads: i64,
    pub eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub tokens: *const u32,
    pub length: i64,
    pub start: i64,
    pub blocks: *const u32,
    pub logits: i64,
    pub adapter: *const AdapterLayer,
    pub rank: i64,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct EncoderLayer {
    pub qkv: Matrix,
    pub output: Matrix,
    pub up: Matrix,
    pub down: Matrix,
    pub attention_weight: *const f32,
    pub attention_shift: *const f32,
    pub output_weight: *const f32,
    pub output_shift: *const f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct EncoderEmbeddings {
    pub words: Matrix,
    pub positions: *const f32,
    pub weight: *const f32,
    pub shift: *const f32,
    pub relative: *const f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Dense {
    pub outputs: i64,
    pub inputs: i64,
    pub weight: *const f32,
    pub bias: *const f32,
    pub activation: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct EncoderShape {
    pub layers: i64,
    pub hidden: i64,
    pub intermediate: i64,
    pub heads: i64,
    pub max_length: i64,
    pub threads: i64,
    pub eps: f32,
    pub activation: i32,
    pub first_token: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Text {
    pub tokens: *const u32,
    pub length: i64,
}

unsafe extern "C" {
    fn athanor_cpu_instruction_set() -> i32;
    fn athanor_cpu_advise(data: *mut u8, bytes: usize);
    fn athanor_cpu_use_few_heaps();
    fn athanor_cpu_release_free_memory();
    pub(crate) fn athanor_cpu_decoder(
        instruction_set: i32,
        shape: *const Shape,
        layers: *const Layer,
        embeddings: *const Matrix,
        head: *const Matrix,
        norm: *const f32,
        frequencies: *const f32,
    ) -> *mut c_void;
    pub(crate) fn athanor_cpu_step(decoder: *mut c_void, rows: *const Row, count: i64, logits: *mut f32) -> i32;
    pub(crate) fn athanor_cpu_free(decoder: *mut c_void);
    pub(crate) fn athanor_cpu_encoder(
        instruction_set: i32,
        shape: *const EncoderShape,
        layers: *const EncoderLayer,
        embeddings: *const EncoderEmbeddings,
        head: *const Dense,
        heads: i64,
    ) -> *mut c_void;
    pub(crate) fn athanor_cpu_encode(encoder: *mut c_void, texts: *const Text, count: i64, outputs: *mut f32) -> i32;
    pub(crate) fn athanor_cpu_encoder_free(encoder: *mut c_void);
}

/// Has all threads share two heaps of the C library. By default each thread may get one of its own, and what it has freed at the end of its
/// heap stays there whatever [`release_free_memory`] does: each thread that read an adapter kept its size once more. To be called before
/// there are other threads.
pub fn use_few_heaps() {
    // SAFETY: mallopt(M_ARENA_MAX) sets a number that later allocations read.
    unsafe { athanor_cpu_use_few_heaps() }
}

/// Gives memory that the process has freed back to the system. The C library keeps it otherwise: what was used to read and pack weights
/// would count as the process's own for as long as it runs. Takes some milliseconds.
pub fn release_free_memory() {
    // SAFETY: malloc_trim frees nothing that is in use, and may be called from any thread.
    unsafe { athanor_cpu_release_free_memory() }
}

/// Asks for huge pages; a kernel without them ignores it.
pub(crate) fn advise_huge_pages(data: *mut u8, bytes: usize) {
    // SAFETY: madvise(MADV_HUGEPAGE) changes no contents; the caller owns the range.
    unsafe { athanor_cpu_advise(data, bytes) }
}
