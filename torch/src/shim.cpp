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

int athanor_group_new(int nccl, const char* store_host, uint16_t store_port, const char* bind_host, int rank, int world,
                      int64_t timeout_ms, Group** out, char** message) {
  return guarded(message, [&] {
    const auto timeout = std::chrono::milliseconds(timeout_ms);
    c10d::TCPStoreOptions options;
    options.port = store_port;
    options.isServer = rank == 0;
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

static_assert(sizeof(AdamStep) == 7 * sizeof(float), "ffi.rs declares AdamStep as seven floats");

// Adam on `rows` of a table, each from the step that `steps_of_row` says to base + steps; `recent` has the coefficients of the steps after
// `base`. The last step has `gradients` [rows, columns], unless they are null; all others have none. Weight decay is AdamW's.
int athanor_embedding_adam(at::Tensor* table, at::Tensor* first, at::Tensor* second, at::Tensor* gradients, const int64_t* rows,
                           size_t count, int64_t* steps_of_row, int64_t base, const AdamStep* recent, size_t steps, char** message) {
  return guarded(message, [&] {
    for (auto* tensor : {table, first, second}) {
      TORCH_CHECK(tensor->device().is_cpu() && tensor->scalar_type() == at::kFloat && tensor->is_contiguous() && tensor->dim() == 2 &&
                      tensor->sizes() == table->sizes(),
                  "a table and its moments must have one shape and be FP32, contiguous and on the CPU");
    }
    const int64_t columns = table->size(1);
    TORCH_CHECK(gradients == nullptr || (steps > 0 && gradients->is_contiguous() && gradients->scalar_type() == at::kFloat &&
                                         gradients->sizes() == at::IntArrayRef({static_cast<int64_t>(count), columns})),
                "gradients must have a row for each row of the step");
    for (size_t i = 0; i < count; i++) TORCH_CHECK(rows[i] >= 0 && rows[i] < table->size(0), "the table has no row ", rows[i]);
    float* w = table->mutable_data_ptr<float>();
    float* m = first->mutable_data_ptr<float>();
    float* v = second->mutable_data_ptr<float>();
    const float* g = gradients == nullptr ? nullptr : gradients->const_data_ptr<float>();
    const auto end = static_cast<int64_t>(steps);
    at::parallel_for(0, static_cast<int64_t>(count), 16, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++) {
        const int64_t row = rows[i], place = row * columns;
        int64_t step = steps_of_row[row] - base;
        const int64_t idle = g == nullptr ? end : end - 1;
        const auto is_zero = [](float x) { return x == 0; };
        if (step < idle && std::all_of(v + place, v + place + columns, is_zero) && std::all_of(m + place, m + place + columns, is_zero)) {
          // Never read: it has no moments, and only decays.
          for (; step < idle; step++) athanor::scale_row(w + place, columns, recent[step].keep);
        }
        for (; step < idle; step++) athanor::adam_idle_row(w + place, m + place, v + place, columns, recent[step]);
        if (g != nullptr && step < end) athanor::adam_row(w + place, m + place, v + place, g + i * columns, columns, recent[step]);
        steps_of_row[row] = base + end;
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
