//! Process-wide settings of libtorch: autocast, RNG state, threads, what devices can do, copies to the host, and the way out.

use std::{ffi::c_int, marker::PhantomData};

use tch::{Device, Tensor};

use crate::{Error, ffi};

/// While it lives, matrix products on the device run in bfloat16 on this thread; weights stay as they are.
pub struct Autocast {
    cuda: c_int,
    before: c_int,
    // The setting is the thread's: the guard must not leave it.
    not_send: PhantomData<*const ()>,
}

impl Autocast {
    pub fn bf16(device: Device) -> Self {
        let cuda = c_int::from(matches!(device, Device::Cuda(_)));
        // SAFETY: sets a thread-local of libtorch.
        let before = unsafe { ffi::athanor_autocast_enter(cuda) };
        Self { cuda, before, not_send: PhantomData }
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: undoes the enter of `bf16` on the same thread.
        unsafe { ffi::athanor_autocast_exit(self.cuda, self.before) }
    }
}

/// Whether bfloat16 products are the hardware's own. A GPU whose compute capability cannot be read counts as one without.
pub fn computes_in_bf16(device: Device) -> bool {
    if let Device::Cuda(index) = device {
        return cuda_capability(index).is_ok_and(|(major, _)| has_bf16(major));
    }
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Whether GPUs of a compute capability, of which this is the major number, multiply bfloat16: from Ampere (8.0) on. Volta
/// (7.0) and Turing (7.5) emulate it.
fn has_bf16(major: c_int) -> bool {
    major >= 8
}

/// Major and minor number of a GPU's compute capability.
fn cuda_capability(index: usize) -> Result<(c_int, c_int), Error> {
    let device = i8::try_from(index).map(c_int::from).map_err(|_| Error::Torch(format!("there is no GPU {index}")))?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both numbers outlive the call.
    ffi::call(|message| unsafe { ffi::athanor_cuda_capability(device, &mut major, &mut minor, message) })?;
    Ok((major, minor))
}

/// A copy of a tensor in the host's memory, detached; page-locked if the tensor is on a GPU.
pub fn copy_to_host(tensor: &Tensor) -> Result<Tensor, Error> {
    let into = Tensor::new();
    // SAFETY: both tensors are alive for the call; the shim assigns the copy to `into`, which this function alone holds.
    ffi::call(|message| unsafe { ffi::athanor_copy_to_host(ffi::pointer(tensor), ffi::pointer(&into), message) })?;
    Ok(into)
}

/// State of the CPU's default random generator, a byte tensor.
pub fn rng_state() -> Result<Tensor, Error> {
    let into = Tensor::new();
    // SAFETY: the shim assigns the state to the tensor behind the pointer, which this function alone holds.
    ffi::call(|message| unsafe { ffi::athanor_rng_get(ffi::pointer(&into), message) })?;
    Ok(into)
}

/// Sets the CPU's default random generator to what [`rng_state`] gave.
pub fn set_rng_state(state: &Tensor) -> Result<(), Error> {
    // SAFETY: the tensor is alive for the call.
    ffi::call(|message| unsafe { ffi::athanor_rng_set(ffi::pointer(state), message) })
}

/// Threads inside one operation of this thread.
pub fn num_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// Sets the threads inside one operation, for operations that this thread starts.
pub fn set_num_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
}

/// Whether this build can talk NCCL.
pub fn has_nccl() -> bool {
    // SAFETY: returns a constant.
    unsafe { ffi::athanor_has_nccl() != 0 }
}

/// Ends the process at once, without C++ destructors, which may wait for a peer that is gone. Flush what matters
/// before.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit does not return and touches no memory.
    unsafe { ffi::athanor_exit_now(code) };
    unreachable!("_exit does not return")
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn rng_state_brings_the_same_numbers_back() {
        let _turn = crate::GENERATOR.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tch::manual_seed(7);
        let state = rng_state().unwrap();
        let first = Tensor::rand([8], (Kind::Float, Device::Cpu));
        let other = Tensor::rand([8], (Kind::Float, Device::Cpu));
        set_rng_state(&state).unwrap();
        let again = Tensor::rand([8], (Kind::Float, Device::Cpu));
        assert_eq!(first, again);
        assert_ne!(first, other);
    }

    #[test]
    fn bfloat16_is_the_hardwares_own_from_ampere_on() {
        let table = [
            ("V100", (7, 0), false),
            ("T4", (7, 5), false),
            ("A100", (8, 0), true),
            ("L4", (8, 9), true),
            ("H100", (9, 0), true),
            ("B200", (10, 0), true),
        ];
        for (name, (major, _), expected) in table {
            assert_eq!(has_bf16(major), expected, "{name}");
        }
        // No machine has so many GPUs, and a build without CUDA has none.
        assert!(cuda_capability(1000).is_err() && !computes_in_bf16(Device::Cuda(1000)));
    }

    #[test]
    fn a_copy_on_the_host_is_detached_and_shares_no_memory() {
        let weight = Tensor::arange(6, (Kind::Float, Device::cuda_if_available())).view([2, 3]).set_requires_grad(true);
        let copy = copy_to_host(&weight).unwrap();
        tch::no_grad(|| drop(weight.detach().fill_(-1.0)));
        assert_eq!((copy.device(), copy.requires_grad()), (Device::Cpu, false));
        assert_eq!(copy.is_pinned(weight.device()), weight.device().is_cuda());
        assert_eq!(Vec::<Vec<f32>>::try_from(copy).unwrap(), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]);
    }

    #[test]
    fn autocast_ends_with_its_guard() {
        let a = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        {
            let _guard = Autocast::bf16(Device::Cpu);
            assert_eq!(a.matmul(&a).kind(), Kind::BFloat16);
        }
        assert_eq!(a.matmul(&a).kind(), Kind::Float);
    }
}
