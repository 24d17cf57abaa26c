// What concerns the whole process or thread: messages, autocast, gradient mode, exit.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
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

void athanor_exit_now(int code) { _exit(code); }

}  // extern "C"
