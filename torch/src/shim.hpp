// A C ABI over what tch does not have of libtorch. Its functions take and assign `at::Tensor*`, the same pointers that
// tch holds. Every function that can throw returns a status (0 ok, 1 error, 2 a peer is lost) and fills `message`, to
// be freed by the caller with athanor_free. `ffi.rs` declares the same functions.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/distributed/c10d/exception.h>

#include <cstring>
#include <string>
#include <vector>

inline constexpr int kOk = 0, kError = 1, kLostPeer = 2;

// What Gloo, NCCL and the store say when the other end is gone. The text is looked at besides the type because a failed
// collective inside a backward pass reaches us as the autograd engine's rethrow.
inline bool speaks_of_a_lost_peer(const std::string& text) {
  for (const char* part : {"Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused",
                           "gloo/transport", "Timed out waiting", "timed out", "Socket Timeout", "recvValue failed",
                           "remote process exited", "NCCL communicator was aborted", "sendBytes failed", "recvVector failed"}) {
    if (text.find(part) != std::string::npos) return true;
  }
  return false;
}

// Only the first line: what follows in c10's messages is a C++ stack trace.
inline int fail(char** message, int status, const std::string& text) {
  auto line = text.substr(0, text.find('\n'));
  *message = strdup(line.c_str());
  return status;
}

template <typename F>
int guarded(char** message, F&& f) {
  try {
    f();
    return kOk;
  } catch (const c10::DistError& e) {
    return fail(message, kLostPeer, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    std::string text = e.what_without_backtrace();
    return fail(message, speaks_of_a_lost_peer(text) ? kLostPeer : kError, text);
  } catch (const std::exception& e) {
    std::string text = e.what();
    return fail(message, speaks_of_a_lost_peer(text) ? kLostPeer : kError, text);
  } catch (...) {
    return fail(message, kError, "unknown C++ exception");
  }
}

inline std::vector<at::Tensor> list(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (size_t i = 0; i < count; i++) out.push_back(*tensors[i]);
  return out;
}
