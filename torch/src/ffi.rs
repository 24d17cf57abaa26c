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
    #[cfg(test)]
    pub fn athanor_fail_as(kind: c_int, text: *const c_char, message: *mut *mut c_char) -> c_int;
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

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    /// How `guarded` of `shim.hpp` reports an exception with this text.
    fn fail_as(kind: Kind, text: &str) -> Error {
        let text = CString::new(text).unwrap();
        // SAFETY: the text outlives the call.
        call(|message| unsafe { athanor_fail_as(kind as c_int, text.as_ptr(), message) }).unwrap_err()
    }

    /// C++ exceptions, as `athanor_fail_as` numbers them.
    #[derive(Clone, Copy, Debug)]
    enum Kind {
        Runtime,
        Torch,
        Backend,
        Store,
        Network,
    }

    #[test]
    fn a_peer_that_went_away_is_lost() {
        for (kind, text) in [
            (
                Kind::Runtime,
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:31",
            ),
            (
                Kind::Torch,
                "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [10.0.0.2]:31: Connection reset by peer",
            ),
            (
                Kind::Runtime,
                "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 660000ms for recv operation to complete",
            ),
            (Kind::Runtime, "Gloo connectFullMesh failed with [pair.cc:547] Connection closed by peer [10.0.0.2]:31"),
            (
                Kind::Backend,
                "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL version 2.28",
            ),
            (
                Kind::Backend,
                "NCCL error in: NCCLUtils.cpp:77, unhandled system error, NCCL version 2.28\nncclSystemError: System call\n\
                 Last error:\nsocketProgress: Connection closed by remote peer 10.0.0.2<4000>",
            ),
            (
                Kind::Backend,
                "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7) ran for 600001 milliseconds before timing out.",
            ),
            (Kind::Store, "Timed out after 301 seconds waiting for clients. 1/2 clients joined."),
            (
                Kind::Network,
                "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
            ),
        ] {
            let error = fail_as(kind, text);
            assert!(matches!(error, Error::LostPeer(_)), "{kind:?}: {error}");
        }
    }

    #[test]
    fn what_another_start_does_not_repair_is_no_lost_peer() {
        for (kind, text) in [
            (
                Kind::Backend,
                "NCCL error in: NCCLUtils.cpp:77, invalid usage (run with NCCL_WARN for details), NCCL version 2.28\n\
                 ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n\
                 Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1b000",
            ),
            (
                Kind::Backend,
                "NCCL error in: NCCLUtils.cpp:77, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28\n\
                 ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. It can be also \
                 caused by unexpected exit of a remote peer, you can check NCCL warnings for failure reason and see if there is \
                 connection closure by a peer.\n\
                 Last error:\nError while creating shared memory segment /dev/shm/nccl-a (size 33030528)",
            ),
            (
                Kind::Backend,
                "NCCL communicator was aborted on rank 0. Original reason for failure was: NCCL error: unhandled cuda error",
            ),
            (Kind::Backend, "ProcessGroupNCCL is only supported with GPUs, no GPUs found!"),
            (
                Kind::Runtime,
                "Gloo connectFullMesh failed with [pair.cc:144] timed out connecting: SO_ERROR: Connection timed out, remote=[10.0.0.2]:31",
            ),
            (
                Kind::Torch,
                "[enforce fail at gloo/transport/tcp/device.cc:83] ifa != nullptr. Unable to find address for: eth7",
            ),
            (
                Kind::Network,
                "The client socket has timed out after 300000ms while trying to connect to (10.0.0.1, 29500).",
            ),
            (
                Kind::Network,
                "The server socket has failed to listen on any local network address. port: 29500, code: -98, name: EADDRINUSE",
            ),
            (Kind::Torch, "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ] {
            let error = fail_as(kind, text);
            assert!(matches!(error, Error::Torch(_)), "{kind:?}: {error}");
        }
    }

    #[test]
    fn the_message_has_the_reason_and_no_stack_trace() {
        let text = "NCCL error in: a.cpp:7, invalid usage, NCCL version 2.28\nncclInvalidUsage: long\nLast error:\nDuplicate GPU\nmore";
        let error = fail_as(Kind::Backend, text).to_string();
        assert_eq!(error, "libtorch: NCCL error in: a.cpp:7, invalid usage, NCCL version 2.28: Duplicate GPU");
        assert_eq!(fail_as(Kind::Runtime, "first\nframe #0").to_string(), "libtorch: first");
    }
}
