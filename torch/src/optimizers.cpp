// The backward pass, norms and penalties of gradients, and the update rules. shim.hpp says what functions return.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "kernels.hpp"
#include "shim.hpp"

using athanor::AdamStep;

namespace {

// The 2-norm of all numbers of contiguous tensors of floats on the CPU, where libtorch's takes one thread. Blocks have
// a fixed size, so that the sum does not depend on the number of threads.
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

}  // namespace

extern "C" {

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
    at::NoGradGuard no_grad;
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
    at::NoGradGuard no_grad;
    at::_foreach_mul_(list(tensors, count), factor);
  });
}

// Adds the gradient of l1 * |w| + l2 / 2 * w^2 to the gradients.
int athanor_add_penalty(at::Tensor* const* parameters, size_t count, double l1, double l2, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    for (size_t i = 0; i < count; i++) {
      auto& parameter = *parameters[i];
      auto& grad = parameter.mutable_grad();
      TORCH_CHECK(grad.defined(), "a parameter has no gradient");
      if (l2 != 0) grad.add_(parameter, l2);
      if (l1 != 0) grad.add_(parameter.sign(), l1);
    }
  });
}

// One step of rule 0 SGD, 1 Adam, 2 AdamW, 3 RMSprop. `first` and `second` are the rule's state: momentum and nothing;
// first and second moments; mean squares and momentum. For Adam `a` and `b` are its betas, for RMSprop `b` is the decay
// of the squares; `momentum` is SGD's and RMSprop's.
int athanor_optimizer_step(int rule, at::Tensor* const* parameters, at::Tensor* const* gradients, at::Tensor* const* first,
                           at::Tensor* const* second, at::Tensor* const* steps, size_t count, double lr, double a, double b,
                           double momentum, double weight_decay, double eps, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
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

// Adam on `rows` of a table, each from the step that `steps_of_row` says to base + steps; `recent` has the coefficients
// of the steps after `base`. The last step has `gradients` [rows, columns], unless they are null; all others have none.
// Weight decay is AdamW's.
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

}  // extern "C"
