// Dropout for the CPU and the state of its random generator. shim.hpp says what functions return.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels.hpp"
#include "shim.hpp"

namespace {

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

// The mask is a function of seed and position: nothing is kept for the backward pass, and any number of threads draws
// the same.
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

}  // namespace

extern "C" {

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

}  // extern "C"
