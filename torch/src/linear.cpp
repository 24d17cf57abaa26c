// Linear layers for inference on the CPU: weights in oneDNN's layout, in FP32 or rounded to eight bits. shim.hpp says
// what functions return.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>

#include "kernels.hpp"
#include "shim.hpp"

namespace {

// Rows of unsigned bytes, of which `zero` stands for 0, times a packed weight; FP32.
at::Tensor int8_product(const at::Tensor& q, int64_t zero, const at::Tensor& packed, const at::Tensor& scales, const at::Tensor& zeros) {
  static const auto linear =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("onednn::qlinear_pointwise", "")
          .typed<at::Tensor(at::Tensor, double, int64_t, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>, double,
                            int64_t, std::optional<c10::ScalarType>, std::string_view, c10::List<std::optional<at::Scalar>>,
                            std::string_view)>();
  return linear.call(q, 1.0, zero, packed, scales, zeros, std::nullopt, 1.0, 0, at::kFloat, "none",
                     c10::List<std::optional<at::Scalar>>(), "");
}

at::Tensor prepack(const at::Tensor& weight) {
  static const auto prepack = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow("onednn::qlinear_prepack", "")
                                  .typed<at::Tensor(at::Tensor, std::optional<c10::List<int64_t>>)>();
  return prepack.call(weight, std::nullopt);
}

// Without VNNI oneDNN adds two products of bytes in 16 bits, which saturates: 255 * 127 * 2 is too large, 127 * 127 * 2
// is not. Then rows are rounded to seven bits. What oneDNN does is found by the largest product that there is.
int activation_levels() {
  static const int levels = [] {
    const auto weight = at::full({64, 64}, 127, at::kChar), x = at::full({16, 64}, 255, at::kByte);
    const auto y = int8_product(x, 128, prepack(weight), at::ones({64}, at::kFloat), at::zeros({64}, at::kInt));
    return (y == 64.0 * 127 * 127).all().item<bool>() ? 127 : 63;
  }();
  return levels;
}

}  // namespace

extern "C" {

// MKL, which `linear` calls in FP32, packs the weight anew in every call, and on AMD with slow code besides. oneDNN
// keeps it packed.
int athanor_linear_pack(at::Tensor* weight, int64_t rows, at::Tensor* into, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    static const auto reorder = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("mkldnn::_reorder_linear_weight", "")
                                    .typed<at::Tensor(const at::Tensor&, std::optional<int64_t>)>();
    *into = reorder.call(weight->detach().contiguous(), rows);
  });
}

// Rounds a weight [outputs, inputs] to eight bits by row. `into`: oneDNN's layout of it, the scale of each output, and
// their zeros.
int athanor_linear_quantize(at::Tensor* weight, at::Tensor* packed, at::Tensor* scales, at::Tensor* zeros, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    auto w = weight->detach().to(at::kFloat).contiguous();
    auto scale = w.abs().amax(1).div(127);
    auto q = w.div(scale.clamp_min(1e-30).unsqueeze(1)).round().clamp(-127, 127).to(at::kChar);
    *packed = prepack(q);
    *scales = scale;
    *zeros = at::zeros({q.size(0)}, at::kInt);
  });
}

int athanor_linear_int8(at::Tensor* x, at::Tensor* packed, at::Tensor* scales, at::Tensor* zeros, at::Tensor* bias,
                        const char* activation, const char* algorithm, at::Tensor* into, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    auto shape = x->sizes().vec();
    auto rows = x->to(at::kFloat).contiguous().view({-1, shape.back()});
    int64_t count = rows.size(0), columns = rows.size(1);
    const int levels = activation_levels();
    auto q = at::empty({count, columns}, at::kByte);
    auto row_scales = at::empty({count}, at::kFloat);
    const float* from = rows.const_data_ptr<float>();
    auto* to = q.mutable_data_ptr<uint8_t>();
    auto* scale = row_scales.mutable_data_ptr<float>();
    int64_t grain = std::max<int64_t>(1, 16384 / columns);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      athanor::quantize_rows(from + begin * columns, end - begin, columns, levels, to + begin * columns, scale + begin);
    });
    auto y = int8_product(q, levels + 1, *packed, *scales, *zeros);
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

}  // extern "C"
