// A C ABI over what tch does not have of libtorch. Its functions take and assign `at::Tensor*`, the same pointers that
// tch holds. Every function that can throw returns a status (0 ok, 1 error, 2 a peer is lost) and fills `message`, to
// be freed by the caller with athanor_free. `ffi.rs` declares the same functions.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/distributed/c10d/exception.h>

#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

inline constexpr int kOk = 0, kError = 1, kLostPeer = 2;

inline bool has_any_of(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    if (text.find(part) != std::string::npos) return true;
  }
  return false;
}

// Whether the other end went away or stopped answering, which a new start of all ranks repairs. A wrong use of NCCL, a
// driver or /dev/shm that it cannot use, and a peer that cannot be connected to do not go away by themselves. The text
// decides besides the type because Gloo throws runtime errors, and because a failed collective inside a backward pass
// reaches us as the autograd engine's rethrow. `of_store`: the exception is one of TCPStore or its sockets.
inline bool is_lost_peer(const std::string& text, bool of_store) {
  if (has_any_of(text, {"Connection closed by peer", "Connection reset by peer", "Broken pipe", "closed by remote peer",
                        "Remote peer closed the connection", "ncclRemoteError", "remote process exited"})) {
    return true;
  }
  if (has_any_of(text, {"NCCL error", "connectFullMesh failed", "timed out connecting", "Connect timeout", "SO_ERROR",
                        "trying to connect", "failed to connect", "Connection refused", "server socket"})) {
    return false;
  }
  return of_store || has_any_of(text, {"Timed out waiting", "timed out", "timing out", "operation timeout", "Wait timeout",
                                       "wait timeout", "Socket Timeout", "recvValue failed", "recvVector failed",
                                       "sendBytes failed", "No route to host", "NCCL communicator was aborted"});
}

// Only the first line, and NCCL's reason if there is one: what else follows in c10's messages is a C++ stack trace.
inline int fail(char** message, int status, const std::string& text) {
  auto line = text.substr(0, text.find('\n'));
  const std::string reason = "Last error:\n";
  if (const auto at = text.find(reason); at != std::string::npos) {
    const auto begin = at + reason.size();
    line += ": " + text.substr(begin, text.find('\n', begin) - begin);
  }
  *message = strdup(line.c_str());
  return status;
}

inline int fail_as_found(char** message, const std::string& text, bool of_store) {
  return fail(message, is_lost_peer(text, of_store) ? kLostPeer : kError, text);
}

template <typename F>
int guarded(char** message, F&& f) {
  try {
    f();
    return kOk;
  } catch (const c10::DistNetworkError& e) {
    return fail_as_found(message, e.what_without_backtrace(), true);
  } catch (const c10::DistStoreError& e) {
    return fail_as_found(message, e.what_without_backtrace(), true);
  } catch (const c10::Error& e) {
    return fail_as_found(message, e.what_without_backtrace(), false);
  } catch (const std::exception& e) {
    return fail_as_found(message, e.what(), false);
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
