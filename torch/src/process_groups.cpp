// c10d's process groups (Gloo, NCCL), their collectives, and the Reducer of DistributedDataParallel. shim.hpp says what
// functions return.
#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#ifdef ATHANOR_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include "shim.hpp"

namespace {

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
};

}  // namespace

extern "C" {

int athanor_has_nccl() {
#ifdef ATHANOR_NCCL
  return 1;
#else
  return 0;
#endif
}

// `listener`: a socket for the store to listen on, of which rank 0 becomes the owner; -1 for one of its own.
int athanor_group_new(int nccl, const char* store_host, uint16_t store_port, int listener, const char* bind_host, int rank,
                      int world, int64_t timeout_ms, Group** out, char** message) {
  return guarded(message, [&] {
    const auto timeout = std::chrono::milliseconds(timeout_ms);
    c10d::TCPStoreOptions options;
    options.port = store_port;
    options.isServer = rank == 0;
    if (listener >= 0) options.masterListenFd = listener;
    options.numWorkers = world;
    options.timeout = timeout;
    auto store = c10::make_intrusive<c10d::TCPStore>(store_host, options);
    auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, world);
    if (nccl) {
#ifdef ATHANOR_NCCL
      auto nccl_options = c10d::ProcessGroupNCCL::Options::create();
      nccl_options->timeout = timeout;
      auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, world, nccl_options);
      group->setBackend(c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::NCCL, backend);
      group->setDefaultBackend(c10d::ProcessGroup::BackendType::NCCL);
#else
      TORCH_CHECK(false, "this build has no NCCL");
#endif
    } else {
      auto gloo_options = c10d::ProcessGroupGloo::Options::create(timeout);
      gloo_options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(bind_host));
      auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world, gloo_options);
      group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, backend);
      group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    }
    *out = new Group{group};
  });
}

void athanor_group_drop(Group* group) { delete group; }

int athanor_all_reduce_sum(Group* group, at::Tensor* tensor, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> tensors{*tensor};
    group->group->allreduce(tensors)->wait();
  });
}

int athanor_broadcast(Group* group, at::Tensor* tensor, int root, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    group->group->broadcast(tensors, options)->wait();
  });
}

int athanor_broadcast_coalesced(Group* group, at::Tensor* const* tensors, size_t count, int64_t buffer_bytes, int root,
                                char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    c10d::broadcast_coalesced(group->group, list(tensors, count), static_cast<size_t>(buffer_bytes), root);
  });
}

// `into` [ranks * n] gets `own` [n] of each rank, in the order of the ranks; both are contiguous.
int athanor_all_gather(Group* group, at::Tensor* own, at::Tensor* into, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    group->group->_allgather_base(*into, *own)->wait();
  });
}

int athanor_barrier(Group* group, char** message) {
  return guarded(message, [&] { group->group->barrier()->wait(); });
}

// Fails as libtorch does, for tests of what is a lost peer.
int athanor_fail_as(int kind, const char* text, char** message) {
  return guarded(message, [&] {
    switch (kind) {
      case 1: C10_THROW_ERROR(Error, text);
      case 2: C10_THROW_ERROR(DistBackendError, text);
      case 3: C10_THROW_ERROR(DistStoreError, text);
      case 4: C10_THROW_ERROR(DistNetworkError, text);
      default: throw std::runtime_error(text);
    }
  });
}

int athanor_reducer_new(Group* group, at::Tensor* const* parameters, size_t count, int64_t first_bucket_bytes,
                        int64_t bucket_bytes, c10d::Reducer** out, char** message) {
  return guarded(message, [&] {
    auto params = list(parameters, count);
    // Buckets fill in the order gradients appear in the backward pass, which is about the reverse of the parameters'
    // order.
    std::vector<at::Tensor> reversed(params.rbegin(), params.rend());
    auto [buckets, limits] = c10d::compute_bucket_assignment_by_size(
        reversed, {static_cast<size_t>(first_bucket_bytes), static_cast<size_t>(bucket_bytes)});
    for (auto& bucket : buckets)
      for (auto& index : bucket) index = count - 1 - index;
    std::vector<bool> sparse(count, false);
    *out = new c10d::Reducer(params, buckets, group->group, sparse, bucket_bytes, /*find_unused_parameters=*/false,
                             /*gradient_as_bucket_view=*/true, {}, first_bucket_bytes,
                             /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false, {});
  });
}

// Reducer's destructor may throw; there is nothing left to do then.
void athanor_reducer_drop(c10d::Reducer* reducer) {
  try {
    delete reducer;
  } catch (...) {
  }
}

int athanor_reducer_prepare_for_forward(c10d::Reducer* reducer, char** message) {
  return guarded(message, [&] {
    // After the first step the buckets follow the order in which gradients really came, once.
    reducer->rebuild_buckets();
    reducer->prepare_for_forward();
  });
}

int athanor_reducer_prepare_for_backward(c10d::Reducer* reducer, char** message) {
  return guarded(message, [&] { reducer->prepare_for_backward({}); });
}

}  // extern "C"
