//! The C ABI of the files in `src/*.cpp`, and the translation of its statuses.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::Error;

/// `at::Tensor*`, as tch hands it out.
pub type TensorPointer = *mut c_void;

/// `athanor::AdamStep` of `kernels.hpp`: `w = w keep - size m / (sqrt(v) second_scale + epsilon)` after the moments'
/// update.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AdamStep {
    pub keep: f32,
    pub beta1_rest: f32,
    pub beta2: f32,
    pub beta2_rest: f32,
    pub size: f32,
    pub second_scale: f32,
    pub epsilon: f32,
}

unsafe extern "C" {
    pub fn athanor_free(message: *mut c_char);
    pub fn athanor_has_nccl() -> c_int;
    pub fn athanor_group_new(
        nccl: c_int,
        store_host: *const c_char,
        store_port: u16,
        listener: c_int,
        bind_host: *const c_char,
        rank: c_int,
        world: c_int,
        timeout_ms: i64,
        out: *mut *mut c_void,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_group_drop(group: *mut c_void);
    pub fn athanor_all_reduce_sum(group: *mut c_void, tensor: TensorPointer, message: *mut *mut c_char) -> c_int;
    pub fn athanor_broadcast(
        group: *mut c_void,
        tensor: TensorPointer,
        root: c_int,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_broadcast_coalesced(
        group: *mut c_void,
        tensors: *const TensorPointer,
        count: usize,
        buffer_bytes: i64,
        root: c_int,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_all_gather(
        group: *mut c_void,
        own: TensorPointer,
        into: TensorPointer,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_barrier(group: *mut c_void, message: *mut *mut c_char) -> c_int;
    pub fn athanor_reducer_new(
        group: *mut c_void,
        parameters: *const TensorPointer,
        count: usize,
        first_bucket_bytes: i64,
        bucket_bytes: i64,
        out: *mut *mut c_void,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_reducer_drop(reducer: *mut c_void);
    pub fn athanor_reducer_prepare_for_forward(reducer: *mut c_void, message: *mut *mut c_char) -> c_int;
    pub fn athanor_reducer_prepare_for_backward(reducer: *mut c_void, message: *mut *mut c_char) -> c_int;
    pub fn athanor_backward(loss: TensorPointer, message: *mut *mut c_char) -> c_int;
    pub fn athanor_zero_grad(parameters: *const TensorPointer, count: usize, message: *mut *mut c_char) -> c_int;
    pub fn athanor_norm(
        tensors: *const TensorPointer,
        count: usize,
        norm: *mut f64,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_scale(tensors: *const TensorPointer, count: usize, factor: f64, message: *mut *mut c_char) -> c_int;
    pub fn athanor_add_penalty(
        parameters: *const TensorPointer,
        count: usize,
        l1: f64,
        l2: f64,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_optimizer_step(
        rule: c_int,
        parameters: *const TensorPointer,
        gradients: *const TensorPointer,
        first: *const TensorPointer,
        second: *const TensorPointer,
        steps: *const TensorPointer,
        count: usize,
        learning_rate: f64,
        a: f64,
        b: f64,
        momentum: f64,
        weight_decay: f64,
        epsilon: f64,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_embedding_adam(
        table: TensorPointer,
        first: TensorPointer,
        second: TensorPointer,
        gradients: TensorPointer,
        rows: *const i64,
        count: usize,
        steps_of_row: *mut i64,
        base: i64,
        recent: *const AdamStep,
        steps: usize,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_autocast_enter(cuda: c_int) -> c_int;
    pub fn athanor_autocast_exit(cuda: c_int, before: c_int);
    pub fn athanor_linear_pack(
        weight: TensorPointer,
        rows: i64,
        into: TensorPointer,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_linear_packed(
        x: TensorPointer,
        packed: TensorPointer,
        bias: TensorPointer,
        activation: *const c_char,
        algorithm: *const c_char,
        into: TensorPointer,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_linear_quantize(
        weight: TensorPointer,
        packed: TensorPointer,
        scales: TensorPointer,
        zeros: TensorPointer,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_linear_int8(
        x: TensorPointer,
        packed: TensorPointer,
        scales: TensorPointer,
        zeros: TensorPointer,
        bias: TensorPointer,
        activation: *const c_char,
        algorithm: *const c_char,
        into: TensorPointer,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_dropout(x: TensorPointer, p: f64, into: TensorPointer, message: *mut *mut c_char) -> c_int;
    pub fn athanor_grad_enabled() -> c_int;
    pub fn athanor_layer(
        x: TensorPointer,
        parameters: *const TensorPointer,
        relative: TensorPointer,
        mask: TensorPointer,
        heads: i64,
        first_token: c_int,
        activation: c_int,
        attention_dropout: f64,
        hidden_dropout: f64,
        eps: f64,
        into: TensorPointer,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_rng_get(into: TensorPointer, message: *mut *mut c_char) -> c_int;
    pub fn athanor_rng_set(state: TensorPointer, message: *mut *mut c_char) -> c_int;
    pub fn athanor_cuda_capability(
        device: c_int,
        major: *mut c_int,
        minor: *mut c_int,
        message: *mut *mut c_char,
    ) -> c_int;
    pub fn athanor_copy_to_host(tensor: TensorPointer, into: TensorPointer, message: *mut *mut c_char) -> c_int;
    pub fn athanor_exit_now(code: c_int);
}

/// Runs a shim call with a place for its message and turns the status into a result.
pub fn call(run: impl FnOnce(*mut *mut c_char) -> c_int) -> Result<(), Error> {
    let mut message: *mut c_char = std::ptr::null_mut();
    let status = run(&mut message);
    if status == 0 {
        return Ok(());
    }
    let text = if message.is_null() {
        "no message".to_owned()
    } else {
        // SAFETY: on failure the shim stores a NUL-terminated string of its own, freed here and nowhere else.
        unsafe {
            let text = CStr::from_ptr(message).to_string_lossy().into_owned();
            athanor_free(message);
            text
        }
    };
    Err(if status == 2 { Error::LostPeer(text) } else { Error::Torch(text) })
}

/// Pointers to the tensors, valid as long as the tensors are.
pub fn pointers(tensors: &[tch::Tensor]) -> Vec<TensorPointer> {
    tensors.iter().map(pointer).collect()
}

pub fn pointer(tensor: &tch::Tensor) -> TensorPointer {
    tensor.as_ptr().cast_mut().cast()
}
