// What concerns the whole process or thread, and devices: messages, autocast, gradient mode, compute capability, exit.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#ifdef ATHANOR_NCCL
#include <ATen/cuda/CUDAContext.h>
#endif
#include <unistd.h>

#include <cstdlib>

#include "shim.hpp"

extern "C" {

void athanor_free(char* message) { free(message); }

int athanor_autocast_enter(int cuda) {
  const auto device = cuda ? at::kCUDA : at::kCPU;
  const bool before = at::autocast::is_autocast_enabled(device);
  at::autocast::set_autocast_enabled(device, true);
  at::autocast::set_autocast_dtype(device, at::kBFloat16);
  at::autocast::increment_nesting();
  return before;
}

void athanor_autocast_exit(int cuda, int before) {
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(cuda ? at::kCUDA : at::kCPU, before != 0);
}

int athanor_grad_enabled() { return at::GradMode::is_enabled(); }

// The compute capability of a GPU, such as 8 and 9.
int athanor_cuda_capability(int device, int* major, int* minor, char** message) {
  return guarded(message, [&] {
#ifdef ATHANOR_NCCL
    const auto* properties = at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(device));
    *major = properties->major;
    *minor = properties->minor;
#else
    TORCH_CHECK(false, "this build has no CUDA: device ", device, " has no compute capability");
#endif
  });
}

// A copy in the host's memory; in page-locked memory if the tensor is on a GPU.
int athanor_copy_to_host(at::Tensor* tensor, at::Tensor* into, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    const auto options = at::TensorOptions().dtype(tensor->scalar_type()).device(at::kCPU).pinned_memory(tensor->is_cuda());
    auto host = at::empty(tensor->sizes(), options);
    host.copy_(*tensor);
    *into = host;
  });
}

void athanor_exit_now(int code) { _exit(code); }

}  // extern "C"
