// A C ABI over what tch does not have: c10d's process groups and Reducer, autocast, fused optimizers, RNG state.
// shim.hpp says what its functions return. Tensors are `at::Tensor*`, the same pointers that tch holds.
#include <torch/torch.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>
#ifdef ATHANOR_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <unistd.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "kernels.hpp"
#include "shared_matrices.hpp"
#include "shared_memory.hpp"
#include "shim.hpp"

namespace {

using athanor::AdamStep;
using athanor::Drop;

at::Tensor drop_with(const at::Tensor& input, uint64_t seed, double p) {
  auto x = input.contiguous();
  auto y = at::empty_like(x);
  const Drop mask(seed, p);
  at::parallel_for(0, x.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    if (x.scalar_type() == at::kBFloat16) {
      athanor::drop(static_cast<const uint16_t*>(x.const_data_ptr()) + begin, static_cast<uint16_t*>(y.mutable_data_ptr()) + begin,
                    end - begin, begin, mask);
    } else {
      athanor::drop(x.const_data_ptr<float>() + begin, y.mutable_data_ptr<float>() + begin, end - begin, begin, mask);
    }
  });
  return y;
}

// The mask is a function of seed and position: nothing is kept for the backward pass, and any number of threads draws the same.
struct Dropout : torch::autograd::Function<Dropout> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, int64_t seed, double p) {
    context->saved_data["seed"] = seed;
    context->saved_data["p"] = p;
    return drop_with(x, static_cast<uint64_t>(seed), p);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto seed = static_cast<uint64_t>(context->saved_data["seed"].toInt());
    return {drop_with(gradients[0], seed, context->saved_data["p"].toDouble()), at::Tensor(), at::Tensor()};
  }
};

// The 2-norm of all numbers of contiguous tensors of floats on the CPU, where libtorch's takes one thread. Blocks have a fixed size, so
// that the sum does not depend on the number of threads.
double norm_of(const std::vector<at::Tensor>& tensors) {
  constexpr int64_t size = 1 << 14;
  std::vector<std::pair<const float*, int64_t>> blocks;
  for (const auto& tensor : tensors)
    for (int64_t at = 0; at < tensor.numel(); at += size)
      blocks.emplace_back(tensor.const_data_ptr<float>() + at, std::min(size, tensor.numel() - at));
  std::vector<double> sums(blocks.size());
  at::parallel_for(0, static_cast<int64_t>(blocks.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) sums[i] = athanor::sum_of_squares(blocks[i].first, blocks[i].second);
  });
  double sum = 0;
  for (double block : sums) sum += block;
  return std::sqrt(sum);
}

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  // Where its ranks share some.
  std::shared_ptr<athanor::SharedMemory> memory;
};

// Cuts has, for each tensor, the places between which each rank's part is: `world` + 1 numbers.
athanor::Parts<float> parts_of(const std::vector<at::Tensor>& tensors, const int64_t* cuts, int64_t world) {
  athanor::Parts<float> parts;
  parts.of.resize(world);
  for (const auto& tensor : tensors) {
    TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous() && cuts[world] == tensor.numel(),
                "only contiguous tensors of floats on the CPU can be shared in parts");
    auto* data = tensor.mutable_data_ptr<float>();
    for (int64_t rank = 0; rank < world; rank++)
      if (cuts[rank] < cuts[rank + 1]) parts.of[rank].push_back({data + cuts[rank], cuts[rank + 1] - cuts[rank]});
    cuts += world + 1;
  }
  return parts;
}

// Gloo, whose sums go through shared memory instead of sockets.
struct SharedMemoryGloo : c10d::ProcessGroupGloo {
  // Before Gloo connects the ranks, so that all of them have mapped it once they are connected.
  SharedMemoryGloo(std::shared_ptr<athanor::SharedMemory> memory, const c10::intrusive_ptr<c10d::Store>& store, int rank, int world,
                   c10::intrusive_ptr<Options> options)
      : c10d::ProcessGroupGloo(store, rank, world, std::move(options)), memory_(std::move(memory)) {}

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    const auto is_summed = [](const at::Tensor& tensor) {
      return tensor.is_cpu() && !tensor.is_sparse() && (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
    };
    if (!(options.reduceOp == c10d::ReduceOp::SUM) || !std::all_of(tensors.begin(), tensors.end(), is_summed))
      return c10d::ProcessGroupGloo::allreduce(tensors, options);
    for (auto& tensor : tensors) {
      auto flat = tensor.contiguous();
      if (flat.scalar_type() == at::kFloat) {
        memory_->sum(flat.mutable_data_ptr<float>(), flat.numel());
      } else {
        memory_->sum(flat.mutable_data_ptr<double>(), flat.numel());
      }
      if (!flat.is_same(tensor)) tensor.copy_(flat);
    }
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    future->markCompleted(c10::IValue(tensors));
    return c10d::Work::create_from_future(future);
  }

 private:
  std::shared_ptr<athanor::SharedMemory> memory_;
};

}  // namespace

extern "C" {

void athanor_free(char* message) { free(message); }

int athanor_has_nccl() {
#ifdef ATHANOR_NCCL
  return 1;
#else
  return 0;
#endif
}

// `shared_memory` is a file's descriptor, or negative for none.
int athanor_group_new(int nccl, const char* store_host, uint16_t store_port, const char* bind_host, int rank, int world,
                      int64_t timeout_ms, int shared_memory, Group** out, char** message) {
  return guarded(message, [&] {
    const auto timeout = std::chrono::milliseconds(timeout_ms);
    c10d::TCPStoreOptions options;
    options.port = store_port;
    options.isServer = rank == 0;
    options.numWorkers = world;
    options.timeout = timeout;
    auto store = c10::make_intrusive<c10d::TCPStore>(store_host, options);
    auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, world);
    std::shared_ptr<athanor::SharedMemory> memory;
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
      c10::intrusive_ptr<c10d::ProcessGroupGloo> backend;
      if (shared_memory >= 0) {
        memory = std::make_shared<athanor::SharedMemory>(shared_memory, rank, world, timeout);
        backend = c10::make_intrusive<SharedMemoryGloo>(memory, store, rank, world, gloo_options);
      } else {
        backend = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world, gloo_options);
      }
      group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, backend);
      group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    }
    *out = new Group{group, memory};
  });
}

void athanor_group_drop(Group* group) { delete group; }

int athanor_all_reduce_sum(Group* group, at::Tensor* tensor, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    std::vector<at::Tensor> tensors{*tensor};
    group->group->allreduce(tensors)->wait();
  });
}

int athanor_broadcast(Group* group, at::Tensor* tensor, int root, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    group->group->broadcast(tensors, options)->wait();
  });
}

int athanor_broadcast_coalesced(Group* group, at::Tensor* const* tensors, size_t count, int64_t buffer_bytes, int root,
                                char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    c10d::broadcast_coalesced(group->group, list(tensors, count), static_cast<size_t>(buffer_bytes), root);
  });
}

int athanor_barrier(Group* group, char** message) {
  return guarded(message, [&] { group->group->barrier()->wait(); });
}

// Moves parameters, whose ranks share memory, into it: those of rank 0, from now on the same memory for all of them.
int athanor_share_parameters(Group* group, at::Tensor* const* parameters, size_t count, char** message) {
  return guarded(message, [&] {
    TORCH_CHECK(group->memory, "the ranks share no memory");
    std::size_t bytes = 0;
    const auto size_of = [](const at::Tensor& parameter) { return (parameter.storage().nbytes() + 63) / 64 * 64; };
    for (const auto& parameter : list(parameters, count)) {
      TORCH_CHECK(parameter.is_cpu() && parameter.is_contiguous() && parameter.storage_offset() == 0 &&
                      parameter.storage().nbytes() == parameter.nbytes(),
                  "only tensors on the CPU that have their memory for themselves can be shared");
      bytes += size_of(parameter);
    }
    const auto region = group->memory->region(bytes);
    const auto each = [&](auto&& visit) {
      char* at = region.get();
      for (size_t i = 0; i < count; i++) {
        visit(*parameters[i], at);
        at += size_of(*parameters[i]);
      }
    };
    if (group->memory->rank() == 0)
      each([](const at::Tensor& parameter, char* at) { memcpy(at, parameter.const_data_ptr(), parameter.nbytes()); });
    group->memory->sync();
    each([&](const at::Tensor& parameter, char* at) {
      const auto release = [](void* owner) { delete static_cast<std::shared_ptr<char>*>(owner); };
      parameter.storage().set_data_ptr(at::DataPtr(at, new std::shared_ptr<char>(region), release, at::kCPU));
    });
  });
}

// Gives each rank a copy of its own again, once all of them ask for it.
int athanor_unshare_parameters(Group* group, at::Tensor* const* parameters, size_t count, char** message) {
  return guarded(message, [&] {
    TORCH_CHECK(group->memory, "the ranks share no memory");
    group->memory->sync();
    for (size_t i = 0; i < count; i++) {
      auto copy = parameters[i]->detach().clone();
      parameters[i]->storage().set_data_ptr(copy.storage().set_data_ptr(at::DataPtr()));
    }
  });
}

// `half`: products are bfloat16.
int athanor_matrices_new(Group* group, at::Tensor* const* matrices, size_t count, int half, athanor::SharedMatrices** out, char** message) {
  return guarded(message, [&] {
    TORCH_CHECK(group->memory, "the ranks share no memory");
    *out = new athanor::SharedMatrices(group->memory, list(matrices, count), half != 0 ? at::kBFloat16 : at::kFloat);
  });
}

void athanor_matrices_drop(athanor::SharedMatrices* matrices) { delete matrices; }

void athanor_matrices_open(athanor::SharedMatrices* matrices, int open) { matrices->open(open != 0); }

// After a rank has changed its parts of the parameters: brings their copies up to date, and returns once all ranks have.
int athanor_publish(Group* group, athanor::SharedMatrices* matrices, at::Tensor* const* parameters, size_t count, const int64_t* cuts,
                    char** message) {
  return guarded(message, [&] {
    TORCH_CHECK(group->memory, "the ranks share no memory");
    const int64_t rank = group->memory->rank(), world = group->memory->world();
    at::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t* places = cuts + i * (world + 1);
        matrices->narrow(*parameters[i], places[rank], places[rank + 1]);
      }
    });
    group->memory->sync();
  });
}

// Sums the parameters' gradients over the ranks, which share memory: each gets the sums of its own parts; what it has of the others' is not
// said. `cuts` are those of parts_of.
int athanor_sum_gradients(Group* group, athanor::SharedMatrices* matrices, at::Tensor* const* parameters, size_t count, const int64_t* cuts,
                          char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    TORCH_CHECK(group->memory, "the ranks share no memory");
    const int64_t rank = group->memory->rank(), world = group->memory->world();
    std::vector<at::Tensor> gradients;
    std::vector<int64_t> gradient_cuts;
    std::vector<size_t> in_matrices;
    for (size_t i = 0; i < count; i++) {
      if (matrices->has_gradient(*parameters[i])) {
        in_matrices.push_back(i);
        continue;
      }
      auto& gradient = parameters[i]->mutable_grad();
      TORCH_CHECK(gradient.defined(), "a parameter has no gradient");
      gradient = gradient.contiguous();
      gradients.push_back(gradient);
      const int64_t* places = cuts + static_cast<int64_t>(i) * (world + 1);
      gradient_cuts.insert(gradient_cuts.end(), places, places + world + 1);
    }
    group->memory->sum_to_owners(parts_of(gradients, gradient_cuts.data(), world));
    group->memory->sync();
    at::parallel_for(0, static_cast<int64_t>(in_matrices.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const size_t place = in_matrices[static_cast<size_t>(i)];
        const int64_t* places = cuts + static_cast<int64_t>(place) * (world + 1);
        matrices->sum_gradient(*parameters[place], places[rank], places[rank + 1]);
      }
    });
  });
}

int athanor_reducer_new(Group* group, at::Tensor* const* parameters, size_t count, int64_t first_bucket_bytes,
                        int64_t bucket_bytes, c10d::Reducer** out, char** message) {
  return guarded(message, [&] {
    auto params = list(parameters, count);
    // Buckets fill in the order gradients appear in the backward pass, which is about the reverse of the parameters' order.
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

int athanor_backward(at::Tensor* loss, char** message) {
  return guarded(message, [&] { loss->backward(); });
}

int athanor_zero_grad(at::Tensor* const* parameters, size_t count, char** message) {
  return guarded(message, [&] {
    for (size_t i = 0; i < count; i++) parameters[i]->mutable_grad() = at::Tensor();
  });
}

// The 2-norm of all numbers of the tensors; all on their device but the returned number.
int athanor_norm(at::Tensor* const* tensors, size_t count, double* norm, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    const auto all = list(tensors, count);
    const auto is_plain = [](const at::Tensor& x) { return x.is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous(); };
    if (std::all_of(all.begin(), all.end(), is_plain)) {
      *norm = norm_of(all);
    } else {
      *norm = at::linalg_vector_norm(at::stack(at::_foreach_norm(all, 2)), 2).item<double>();
    }
  });
}

int athanor_scale(at::Tensor* const* tensors, size_t count, double factor, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    at::_foreach_mul_(list(tensors, count), factor);
  });
}

// Adds the gradient of l1 * |w| + l2 / 2 * w^2 to the gradients.
int athanor_add_penalty(at::Tensor* const* parameters, size_t count, double l1, double l2, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    for (size_t i = 0; i < count; i++) {
      auto& parameter = *parameters[i];
      auto& grad = parameter.mutable_grad();
      TORCH_CHECK(grad.defined(), "a parameter has no gradient");
      if (l2 != 0) grad.add_(parameter, l2);
      if (l1 != 0) grad.add_(parameter.sign(), l1);
    }
  });
}

// One step of rule 0 SGD, 1 Adam, 2 AdamW, 3 RMSprop. `first` and `second` are the rule's state: momentum and nothing; first and
// second moments; mean squares and momentum. For Adam `a` and `b` are its betas, for RMSprop `b` is the decay of the squares; `momentum`
// is SGD's and RMSprop's.
int athanor_optimizer_step(int rule, at::Tensor* const* parameters, at::Tensor* const* gradients, at::Tensor* const* first,
                           at::Tensor* const* second, at::Tensor* const* steps, size_t count, double lr, double a, double b,
                           double momentum, double weight_decay, double eps, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    auto params = list(parameters, count);
    auto grads = list(gradients, count);
    auto state = list(first, count);
    auto step_list = list(steps, count);
    at::_foreach_add_(step_list, 1);
    switch (rule) {
      case 0:
        // A momentum of zero needs no buffer; a buffer of zeros makes the first step like any other.
        at::_fused_sgd_(params, grads, momentum > 0 ? at::TensorList(state) : at::TensorList(), weight_decay, momentum, lr,
                        /*dampening=*/0, /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/false);
        break;
      case 1:
        at::_fused_adam_(params, grads, state, list(second, count), {}, step_list, lr, a, b, weight_decay, eps,
                         /*amsgrad=*/false, /*maximize=*/false);
        break;
      case 2:
        at::_fused_adamw_(params, grads, state, list(second, count), {}, step_list, lr, a, b, weight_decay, eps,
                          /*amsgrad=*/false, /*maximize=*/false);
        break;
      case 3: {
        if (weight_decay != 0) at::_foreach_add_(grads, params, weight_decay);
        at::_foreach_mul_(state, b);
        at::_foreach_addcmul_(state, grads, grads, 1 - b);
        auto averages = at::_foreach_sqrt(state);
        at::_foreach_add_(averages, eps);
        if (momentum > 0) {
          auto buffers = list(second, count);
          at::_foreach_mul_(buffers, momentum);
          at::_foreach_addcdiv_(buffers, grads, averages);
          at::_foreach_add_(params, buffers, -lr);
        } else {
          at::_foreach_addcdiv_(params, grads, averages, -lr);
        }
        break;
      }
      default:
        TORCH_CHECK(false, "unknown rule ", rule);
    }
  });
}

// Adam on `rows` of a table from the step that `at` says to base + steps, at the learning rates of these steps; the last step has
// `gradients` [rows, columns], unless they are null, and all others have none. Weight decay is AdamW's.
int athanor_table_adam(at::Tensor* table, at::Tensor* first, at::Tensor* second, at::Tensor* gradients, const int64_t* rows,
                       size_t count, int64_t* at, int64_t base, const double* rates, size_t steps, double beta1, double beta2,
                       double epsilon, double weight_decay, char** message) {
  return guarded(message, [&] {
    for (auto* tensor : {table, first, second}) {
      TORCH_CHECK(tensor->device().is_cpu() && tensor->scalar_type() == at::kFloat && tensor->is_contiguous() && tensor->dim() == 2 &&
                      tensor->sizes() == table->sizes(),
                  "a table and its moments have to be alike, FP32, contiguous and on the CPU");
    }
    const int64_t columns = table->size(1);
    TORCH_CHECK(gradients == nullptr || (steps > 0 && gradients->is_contiguous() && gradients->scalar_type() == at::kFloat &&
                                         gradients->sizes() == at::IntArrayRef({static_cast<int64_t>(count), columns})),
                "gradients have to be a row for each row");
    for (size_t i = 0; i < count; i++) TORCH_CHECK(rows[i] >= 0 && rows[i] < table->size(0), "the table has no row ", rows[i]);
    std::vector<AdamStep> plan(steps);
    for (size_t i = 0; i < steps; i++) {
      const auto step = static_cast<double>(base) + static_cast<double>(i) + 1;
      plan[i] = {static_cast<float>(1 - rates[i] * weight_decay),
                 static_cast<float>(1 - beta1),
                 static_cast<float>(beta2),
                 static_cast<float>(1 - beta2),
                 static_cast<float>(rates[i] / (1 - std::pow(beta1, step))),
                 static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step))),
                 static_cast<float>(epsilon)};
    }
    float* w = table->mutable_data_ptr<float>();
    float* m = first->mutable_data_ptr<float>();
    float* v = second->mutable_data_ptr<float>();
    const float* g = gradients == nullptr ? nullptr : gradients->const_data_ptr<float>();
    const auto end = static_cast<int64_t>(steps);
    at::parallel_for(0, static_cast<int64_t>(count), 16, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++) {
        const int64_t row = rows[i], place = row * columns;
        int64_t step = at[row] - base;
        const int64_t idle = g == nullptr ? end : end - 1;
        const auto is_zero = [](float x) { return x == 0; };
        if (step < idle && std::all_of(v + place, v + place + columns, is_zero) && std::all_of(m + place, m + place + columns, is_zero)) {
          // Never read: it has no moments, and only decays.
          for (; step < idle; step++) athanor::scale_row(w + place, columns, plan[step].keep);
        }
        for (; step < idle; step++) athanor::adam_idle_row(w + place, m + place, v + place, columns, plan[step]);
        if (g != nullptr && step < end) athanor::adam_row(w + place, m + place, v + place, g + i * columns, columns, plan[step]);
        at[row] = base + end;
      }
    });
  });
}

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

// MKL, which `linear` calls in FP32, packs the weight anew in every call, and on AMD with slow code besides. oneDNN keeps it packed.
int athanor_linear_pack(at::Tensor* weight, int64_t rows, at::Tensor* into, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    static const auto reorder = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("mkldnn::_reorder_linear_weight", "")
                                    .typed<at::Tensor(const at::Tensor&, std::optional<int64_t>)>();
    *into = reorder.call(weight->detach().contiguous(), rows);
  });
}

// Rounds a weight [outputs, inputs] to eight bits by row. `into`: oneDNN's layout of it, the scale of each output, and their zeros.
int athanor_linear_quantize(at::Tensor* weight, at::Tensor* packed, at::Tensor* scales, at::Tensor* zeros, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    static const auto prepack = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("onednn::qlinear_prepack", "")
                                    .typed<at::Tensor(at::Tensor, std::optional<c10::List<int64_t>>)>();
    auto w = weight->detach().to(at::kFloat).contiguous();
    auto scale = w.abs().amax(1).div(127);
    auto q = w.div(scale.clamp_min(1e-30).unsqueeze(1)).round().clamp(-127, 127).to(at::kChar);
    *packed = prepack.call(q, std::nullopt);
    *scales = scale;
    *zeros = at::zeros({q.size(0)}, at::kInt);
  });
}
int athanor_linear_int8(at::Tensor* x, at::Tensor* packed, at::Tensor* scales, at::Tensor* zeros, at::Tensor* bias,
                        const char* activation, const char* algorithm, at::Tensor* into, char** message) {
  return guarded(message, [&] {
    torch::NoGradGuard no_grad;
    static const auto linear =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("onednn::qlinear_pointwise", "")
            .typed<at::Tensor(at::Tensor, double, int64_t, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, double,
                              int64_t, std::optional<c10::ScalarType>, std::string_view, c10::List<std::optional<at::Scalar>>,
                              std::string_view)>();
    auto shape = x->sizes().vec();
    auto rows = x->to(at::kFloat).contiguous().view({-1, shape.back()});
    int64_t count = rows.size(0), columns = rows.size(1);
    auto q = at::empty({count, columns}, at::kByte);
    auto row_scales = at::empty({count}, at::kFloat);
    const float* from = rows.const_data_ptr<float>();
    auto* to = q.mutable_data_ptr<uint8_t>();
    auto* scale = row_scales.mutable_data_ptr<float>();
    int64_t grain = std::max<int64_t>(1, 16384 / columns);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      athanor::quantize_rows(from + begin * columns, end - begin, columns, to + begin * columns, scale + begin);
    });
    const std::optional<at::Tensor> no_bias;
    auto y = linear.call(q, 1.0, 128, *packed, *scales, *zeros, no_bias, 1.0, 0, at::kFloat, "none",
                         c10::List<std::optional<at::Scalar>>(), "");
    int64_t outputs = y.size(1);
    auto* out = y.mutable_data_ptr<float>();
    const float* shift = bias->const_data_ptr<float>();
    at::parallel_for(0, count, std::max<int64_t>(1, 16384 / outputs), [&](int64_t begin, int64_t end) {
      athanor::scale_rows(out + begin * outputs, end - begin, outputs, scale + begin, shift);
    });
    std::string_view kind(activation);
    if (kind == "relu") {
      y.relu_();
    } else if (kind == "gelu") {
      at::gelu_(y, algorithm);
    }
    shape.back() = outputs;
    *into = y.view(shape);
  });
}
int athanor_linear_packed(at::Tensor* x, at::Tensor* packed, at::Tensor* bias, const char* activation, const char* algorithm,
                          at::Tensor* into, char** message) {
  return guarded(message, [&] {
    static const auto linear =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
            .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                              c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>)>();
    *into = linear.call(x->contiguous(), *packed, *bias, activation, c10::List<std::optional<at::Scalar>>(), algorithm);
  });
}

// libtorch draws the CPU's dropout masks number by number on one thread, a seventh of a BERT step; this vectorizes.
int athanor_dropout(at::Tensor* x, double p, at::Tensor* into, char** message) {
  return guarded(message, [&] {
    TORCH_CHECK(p >= 0 && p < 1, "dropout has to be in [0, 1)");
    const auto kind = x->scalar_type();
    if (!x->device().is_cpu() || (kind != at::kFloat && kind != at::kBFloat16) || x->numel() >= (int64_t{1} << 32)) {
      *into = at::dropout(*x, p, true);
      return;
    }
    int64_t seed;
    {
      auto generator = at::detail::getDefaultCPUGenerator();
      std::lock_guard<std::mutex> lock(generator.mutex());
      seed = static_cast<int64_t>(at::check_generator<at::CPUGeneratorImpl>(generator)->random64());
    }
    *into = Dropout::apply(*x, seed, p);
  });
}

int athanor_rng_get(at::Tensor* into, char** message) {
  return guarded(message, [&] {
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    *into = generator.get_state();
  });
}

int athanor_rng_set(at::Tensor* state, char** message) {
  return guarded(message, [&] {
    auto generator = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(*state);
  });
}

void athanor_exit_now(int code) { _exit(code); }

}  // extern "C"
