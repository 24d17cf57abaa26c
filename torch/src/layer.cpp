// A transformer layer that normalises behind each half, with its backward pass, for the CPU: what libtorch does in some sixty passes over
// memory is here matrix products and one pass between each two. Under autocast all that is kept and handed on is bfloat16; sums are
// floats.
//
// Shapes: B texts, T tokens, Q tokens of each text that have queries (all, or the first alone), C = hidden size, H heads of D = C / H,
// I = intermediate size. Rows are tokens.
#include <torch/torch.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels.hpp"
#include "shim.hpp"

namespace {

using athanor::Drop;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Sums over rows are of so many rows at a time, then of these sums: the result does not depend on the number of threads.
constexpr int64_t kRows = 32;

// The places of the parameters in a call.
enum Place { kQuery, kQueryBias, kKey, kKeyBias, kValue, kValueBias, kOut, kOutBias, kNorm, kNormBias, kInner, kInnerBias, kOuter,
             kOuterBias, kLastNorm, kLastNormBias, kParameters };

// A contiguous matrix of floats or bfloat16, row by row as floats.
struct Rows {
  explicit Rows(const at::Tensor& tensor, int64_t columns = 0)
      : data(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        half(tensor.scalar_type() == at::kBFloat16),
        columns(columns > 0 ? columns : tensor.size(-1)) {}

  // `count` numbers of a row from `from`: in their place, or widened into `scratch`.
  const float* read(int64_t row, float* scratch, int64_t from, int64_t count) const {
    const int64_t place = row * columns + from;
    if (!half) return reinterpret_cast<const float*>(data) + place;
    athanor::widen(reinterpret_cast<const uint16_t*>(data) + place, scratch, count);
    return scratch;
  }
  const float* read(int64_t row, float* scratch) const { return read(row, scratch, 0, columns); }
  // Always into `into`, to be changed there.
  float* copy(int64_t row, float* into) const {
    const float* from = read(row, into);
    if (from != into) std::copy_n(from, columns, into);
    return into;
  }
  void write(int64_t row, const float* from, int64_t to, int64_t count) const {
    const int64_t place = row * columns + to;
    if (half) {
      athanor::narrow(from, reinterpret_cast<uint16_t*>(data) + place, count);
    } else {
      std::copy_n(from, count, reinterpret_cast<float*>(data) + place);
    }
  }
  void write(int64_t row, const float* from) const { write(row, from, 0, columns); }

  char* data;
  bool half;
  int64_t columns;
};

// For each row in turn: `body(row, scratch, sums)`, where scratch has room for `scratch` floats; the sums of all blocks are returned,
// [sums], with zeros to begin with.
template <typename Body>
at::Tensor by_rows(int64_t rows, int64_t scratch, int64_t sums, const Body& body) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  auto partial = at::zeros({sums > 0 ? blocks : 0, sums}, at::kFloat);
  float* sum = partial.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> room(static_cast<size_t>(scratch));
    for (int64_t block = begin; block < end; block++)
      for (int64_t row = block * kRows; row < std::min(rows, (block + 1) * kRows); row++)
        body(row, room.data(), sum + block * sums);
  });
  return sums > 0 ? partial.sum(0) : at::Tensor();
}

const float* floats(const at::Tensor& tensor) { return tensor.const_data_ptr<float>(); }

struct Shape {
  int64_t b, t, q, c, h;
  int64_t d() const { return c / h; }
};

// y = norm(residual + drop(branch + bias)), [rows, C]. Row r of the branch belongs to row r * stride of the residual. Returns y, the
// normalised sum and the reciprocals of its deviations [rows].
std::array<at::Tensor, 3> add_norm(const at::Tensor& branch, const at::Tensor& bias, const at::Tensor& residual, int64_t stride,
                                   const at::Tensor& weight, const at::Tensor& shift, double eps, Drop drop) {
  const int64_t rows = branch.size(0), c = branch.size(1);
  auto y = at::empty_like(branch), normalised = at::empty_like(branch), reciprocals = at::empty({rows}, at::kFloat);
  const Rows from(branch), beside(residual, c), to(y), kept(normalised);
  const float *b = floats(bias), *w = floats(weight), *s = floats(shift);
  float* reciprocal = reciprocals.mutable_data_ptr<float>();
  by_rows(rows, 3 * c, 0, [&](int64_t row, float* sum, float*) {
    float *other = sum + c, *out = sum + 2 * c;
    athanor::add_scale(from.read(row, other), b, 1, sum, c);
    if (drop.threshold > 0) athanor::drop(sum, sum, c, row * c, drop);
    athanor::add_to(beside.read(row * stride, other), sum, c);
    reciprocal[row] = athanor::layer_norm(sum, w, s, static_cast<float>(eps), out, c);
    kept.write(row, sum);
    to.write(row, out);
  });
  return {y, normalised, reciprocals};
}

struct NormGradients {
  at::Tensor residual, branch, bias, weight, shift;
};

NormGradients add_norm_backward(const at::Tensor& gradient, const at::Tensor& normalised, const at::Tensor& reciprocals,
                                const at::Tensor& weight, Drop drop) {
  const int64_t rows = normalised.size(0), c = normalised.size(1);
  auto residual = at::empty_like(normalised), branch = drop.threshold > 0 ? at::empty_like(normalised) : residual;
  const Rows from(gradient, c), kept(normalised), beside(residual), to(branch);
  const float *w = floats(weight), *reciprocal = floats(reciprocals);
  auto sums = by_rows(rows, 2 * c, 3 * c, [&](int64_t row, float* scratch, float* sum) {
    float* by = from.copy(row, scratch);
    athanor::layer_norm_backward(by, kept.read(row, scratch + c), w, reciprocal[row], sum, sum + c, c);
    beside.write(row, by);
    if (drop.threshold > 0) {
      athanor::drop(by, by, c, row * c, drop);
      to.write(row, by);
    }
    athanor::add_to(by, sum + 2 * c, c);
  });
  return {residual, branch, sums.narrow(0, 2 * c, c), sums.narrow(0, 0, c), sums.narrow(0, c, c)};
}

// Columns of projections, from `at` on, to heads: (columns + bias) * factor, [rows of B x tokens, ...] to [B, H, tokens, D].
at::Tensor to_heads(const at::Tensor& projected, int64_t at, const at::Tensor& bias, float factor, const Shape& shape, int64_t tokens) {
  auto heads = at::empty({shape.b, shape.h, tokens, shape.d()}, projected.options());
  const Rows from(projected), to(heads);
  const float* b = floats(bias);
  by_rows(shape.b * tokens, shape.c, 0, [&](int64_t row, float* scratch, float*) {
    athanor::add_scale(from.read(row, scratch, at, shape.c), b, factor, scratch, shape.c);
    const int64_t text = row / tokens, token = row % tokens;
    for (int64_t head = 0; head < shape.h; head++)
      to.write((text * shape.h + head) * tokens + token, scratch + head * shape.d());
  });
  return heads;
}

// Back again, without a bias; returns the sums of the columns, [C].
at::Tensor from_heads(const at::Tensor& heads, float factor, const at::Tensor& into, int64_t at, const Shape& shape, int64_t tokens) {
  const Rows from(heads), to(into);
  const auto zeros = std::vector<float>(static_cast<size_t>(shape.c));
  return by_rows(shape.b * tokens, shape.c, shape.c, [&](int64_t row, float* scratch, float* sums) {
    const int64_t text = row / tokens, token = row % tokens, d = shape.d();
    for (int64_t head = 0; head < shape.h; head++) {
      float* part = scratch + head * d;
      athanor::add_scale(from.read((text * shape.h + head) * tokens + token, part), zeros.data(), factor, part, d);
    }
    athanor::add_to(scratch, sums, shape.c);
    to.write(row, scratch, at, shape.c);
  });
}

// Softmax over the scores [B * H, Q, T] in place; returns them dropped too. `relative` [H, Q, T] or undefined, `mask` [B, T] or undefined.
at::Tensor attend(at::Tensor& scores, const at::Tensor& relative, const at::Tensor& mask, const Shape& shape, Drop drop) {
  auto dropped = drop.threshold > 0 ? at::empty_like(scores) : scores;
  const Rows at(scores), to(dropped);
  const float* bias = relative.defined() ? floats(relative) : nullptr;
  const auto* allowed = mask.defined() ? reinterpret_cast<const uint8_t*>(mask.const_data_ptr<bool>()) : nullptr;
  const int64_t t = shape.t, q = shape.q;
  by_rows(shape.b * shape.h * q, t, 0, [&](int64_t row, float* scratch, float*) {
    at.copy(row, scratch);
    const int64_t head = row / q % shape.h, text = row / (q * shape.h);
    athanor::softmax(scratch, bias == nullptr ? nullptr : bias + (head * q + row % q) * t,
                     allowed == nullptr ? nullptr : allowed + text * t, t);
    at.write(row, scratch);
    if (drop.threshold == 0) return;
    athanor::drop(scratch, scratch, t, row * t, drop);
    to.write(row, scratch);
  });
  return dropped;
}

// Of the gradient by what `attend` returned, the gradient by the scores, in place.
void attend_backward(at::Tensor& gradient, const at::Tensor& probabilities, const Shape& shape, Drop drop) {
  const Rows at(gradient), kept(probabilities);
  const int64_t t = shape.t;
  by_rows(shape.b * shape.h * shape.q, 2 * t, 0, [&](int64_t row, float* by, float*) {
    at.copy(row, by);
    if (drop.threshold > 0) athanor::drop(by, by, t, row * t, drop);
    athanor::softmax_backward(kept.read(row, by + t), by, t);
    at.write(row, by);
  });
}

// The probabilities with the same numbers dropped as in the forward pass.
at::Tensor dropped_again(const at::Tensor& probabilities, const Shape& shape, Drop drop) {
  if (drop.threshold == 0) return probabilities;
  auto dropped = at::empty_like(probabilities);
  const Rows from(probabilities), to(dropped);
  const int64_t t = shape.t;
  by_rows(shape.b * shape.h * shape.q, t, 0, [&](int64_t row, float* scratch, float*) {
    athanor::drop(from.read(row, scratch), scratch, t, row * t, drop);
    to.write(row, scratch);
  });
  return dropped;
}

at::Tensor activated(const at::Tensor& x, int64_t activation) {
  return activation == 0 ? at::relu(x) : at::gelu(x, activation == 1 ? "none" : "tanh");
}
at::Tensor activated_backward(const at::Tensor& gradient, const at::Tensor& x, int64_t activation) {
  return activation == 0 ? at::threshold_backward(gradient, x, 0) : at::gelu_backward(gradient, x, activation == 1 ? "none" : "tanh");
}

struct Numbers {
  int64_t heads, first_token, activation;
  double attention_dropout, hidden_dropout, eps;
};

Drop drawn(double p) {
  if (p == 0) return {};
  auto generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard<std::mutex> lock(generator.mutex());
  return {at::check_generator<at::CPUGeneratorImpl>(generator)->random64(), p};
}

// A drop's numbers as autograd keeps them.
void save(AutogradContext* context, const char* name, const Drop& drop) {
  context->saved_data[name] = std::vector<int64_t>{drop.key0, drop.key1, drop.threshold};
  context->saved_data[std::string(name) + "_scale"] = static_cast<double>(drop.scale);
}
Drop saved(AutogradContext* context, const char* name) {
  const auto keys = context->saved_data[name].toIntVector();
  Drop drop;
  drop.key0 = static_cast<uint32_t>(keys[0]);
  drop.key1 = static_cast<uint32_t>(keys[1]);
  drop.threshold = static_cast<uint32_t>(keys[2]);
  drop.scale = static_cast<float>(context->saved_data[std::string(name) + "_scale"].toDouble());
  return drop;
}

struct Layer : torch::autograd::Function<Layer> {
  // x [B, T, C], parameters as `Place` says, relative [H, Q, T], mask [B, T] of bool; gives [B, Q, C].
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, at::TensorList parameters,
                            const std::optional<at::Tensor>& relative, const std::optional<at::Tensor>& mask, const Numbers& numbers) {
    // What is cast is cast here.
    const bool half = at::autocast::is_autocast_enabled(at::kCPU) && at::autocast::get_autocast_dtype(at::kCPU) == at::kBFloat16;
    const c10::impl::ExcludeDispatchKeyGuard plain(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
    const auto kind = half ? at::kBFloat16 : at::kFloat;
    const Shape shape{x.size(0), x.size(1), numbers.first_token != 0 ? 1 : x.size(1), x.size(2), numbers.heads};
    const auto weight = [&](int64_t place) { return parameters[static_cast<size_t>(place)].to(kind); };
    auto rows = x.to(kind).contiguous().view({-1, shape.c});
    auto joined = at::empty({3 * shape.c, shape.c}, rows.options());
    for (int64_t part = 0; part < 3; part++) joined.narrow(0, part * shape.c, shape.c).copy_(parameters[static_cast<size_t>(2 * part)]);
    const bool all = shape.q == shape.t;
    // Of the first token alone only its query is asked for, and only its residual.
    auto asking = all ? rows : rows.view({shape.b, shape.t, shape.c}).select(1, 0).contiguous();
    const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.d())));
    at::Tensor query, key, value;
    {
      auto projected = at::linear(rows, all ? joined : joined.narrow(0, shape.c, 2 * shape.c));
      auto queries = all ? projected : at::linear(asking, joined.narrow(0, 0, shape.c));
      const int64_t first = all ? shape.c : 0;
      query = to_heads(queries, 0, parameters[kQueryBias], scale, shape, shape.q);
      key = to_heads(projected, first, parameters[kKeyBias], 1, shape, shape.t);
      value = to_heads(projected, first + shape.c, parameters[kValueBias], 1, shape, shape.t);
    }
    const auto flat = [&](const at::Tensor& heads) { return heads.view({shape.b * shape.h, heads.size(2), shape.d()}); };
    const Drop attention_drop = drawn(numbers.attention_dropout), drop = drawn(numbers.hidden_dropout),
               last_drop = drawn(numbers.hidden_dropout);
    auto scores = at::bmm(flat(query), flat(key).transpose(1, 2));
    const auto bias = relative ? relative->to(at::kFloat).contiguous() : at::Tensor();
    auto attended = at::bmm(attend(scores, bias, mask.value_or(at::Tensor()), shape, attention_drop), flat(value));
    auto contexts = attended.view({shape.b, shape.h, shape.q, shape.d()}).transpose(1, 2).reshape({-1, shape.c});
    const auto out = weight(kOut), inner = weight(kInner), outer = weight(kOuter);
    auto [middle, normalised, reciprocals] = add_norm(at::linear(contexts, out), parameters[kOutBias], asking, 1, parameters[kNorm],
                                                      parameters[kNormBias], numbers.eps, drop);
    auto before = at::linear(middle, inner, parameters[kInnerBias].to(kind));
    auto [last, last_normalised, last_reciprocals] =
        add_norm(at::linear(activated(before, numbers.activation), outer), parameters[kOuterBias], middle, 1, parameters[kLastNorm],
                 parameters[kLastNormBias], numbers.eps, last_drop);
    context->save_for_backward({rows, asking, joined, query, key, value, scores, contexts, out, normalised, reciprocals, middle, inner,
                                before, outer, last_normalised, last_reciprocals, parameters[kNorm], parameters[kLastNorm]});
    save(context, "attention", attention_drop);
    save(context, "drop", drop);
    save(context, "last", last_drop);
    context->saved_data["shape"] = std::vector<int64_t>{shape.b, shape.t, shape.q, shape.c, shape.h, numbers.activation};
    context->saved_data["x"] = static_cast<int64_t>(x.scalar_type());
    context->saved_data["relative"] = relative && relative->requires_grad();
    return last.view({shape.b, shape.q, shape.c});
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const c10::impl::ExcludeDispatchKeyGuard plain(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
    const auto kept = context->get_saved_variables();
    const auto &rows = kept[0], &asking = kept[1], &joined = kept[2], &query = kept[3], &key = kept[4], &value = kept[5],
               &probabilities = kept[6], &contexts = kept[7], &out = kept[8], &normalised = kept[9], &reciprocals = kept[10],
               &middle = kept[11], &inner = kept[12], &before = kept[13], &outer = kept[14], &last_normalised = kept[15],
               &last_reciprocals = kept[16], &norm = kept[17], &last_norm = kept[18];
    const auto sizes = context->saved_data["shape"].toIntVector();
    const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
    const int64_t activation = sizes[5];
    const auto kind = rows.scalar_type();
    const Drop attention_drop = saved(context, "attention"), drop = saved(context, "drop"), last_drop = saved(context, "last");
    // By x, the parameters, relative, mask and numbers.
    variable_list by(1 + kParameters + 3);
    const auto of = [&](int place) -> at::Tensor& { return by[static_cast<size_t>(1 + place)]; };
    const auto give = [&](int place, const at::Tensor& gradient) { of(place) = gradient.to(at::kFloat); };
    const auto product = [&](int place, const at::Tensor& gradient, const at::Tensor& input) {
      give(place, at::mm(gradient.t(), input));
    };

    auto from_last = add_norm_backward(gradients[0].to(kind).contiguous(), last_normalised, last_reciprocals, last_norm, last_drop);
    of(kLastNorm) = from_last.weight;
    of(kLastNormBias) = from_last.shift;
    of(kOuterBias) = from_last.bias;
    product(kOuter, from_last.branch, activated(before, activation));
    auto by_before = activated_backward(at::mm(from_last.branch, outer), before, activation);
    product(kInner, by_before, middle);
    of(kInnerBias) = by_before.sum(0, false, at::kFloat);
    auto by_middle = from_last.residual.addmm_(by_before, inner);
    by_before.reset();

    auto from_norm = add_norm_backward(by_middle, normalised, reciprocals, norm, drop);
    of(kNorm) = from_norm.weight;
    of(kNormBias) = from_norm.shift;
    of(kOutBias) = from_norm.bias;
    product(kOut, from_norm.branch, contexts);
    const auto flat = [&](const at::Tensor& heads) { return heads.reshape({shape.b * shape.h, heads.size(2), shape.d()}); };
    auto by_contexts = flat(at::mm(from_norm.branch, out).view({shape.b, shape.q, shape.h, shape.d()}).transpose(1, 2));
    auto by_value = at::bmm(dropped_again(probabilities, shape, attention_drop).transpose(1, 2), by_contexts);
    auto by_scores = at::bmm(by_contexts, flat(value).transpose(1, 2));
    attend_backward(by_scores, probabilities, shape, attention_drop);
    if (context->saved_data["relative"].toBool())
      by[1 + kParameters] = by_scores.view({shape.b, shape.h, shape.q, shape.t}).sum(0, false, at::kFloat);
    auto by_query = at::bmm(by_scores, flat(key));
    auto by_key = at::bmm(by_scores.transpose(1, 2), flat(query));

    const bool all = shape.q == shape.t;
    const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape.d())));
    auto by_projected = at::empty({shape.b * shape.t, (all ? 3 : 2) * shape.c}, rows.options());
    auto by_queries = all ? by_projected : at::empty({shape.b, shape.c}, rows.options());
    const int64_t first = all ? shape.c : 0;
    of(kQueryBias) = from_heads(by_query.view({-1, shape.d()}), scale, by_queries, 0, shape, shape.q);
    of(kKeyBias) = from_heads(by_key.view({-1, shape.d()}), 1, by_projected, first, shape, shape.t);
    of(kValueBias) = from_heads(by_value.view({-1, shape.d()}), 1, by_projected, first + shape.c, shape, shape.t);
    const auto by_joined = at::mm(by_projected.t(), rows);
    at::Tensor by_x;
    if (all) {
      by_x = from_norm.residual.addmm_(by_projected, joined);
      give(kQuery, by_joined.narrow(0, 0, shape.c));
    } else {
      product(kQuery, by_queries, asking);
      by_x = at::mm(by_projected, joined.narrow(0, shape.c, 2 * shape.c));
      by_x.view({shape.b, shape.t, shape.c}).select(1, 0).add_(from_norm.residual.addmm_(by_queries, joined.narrow(0, 0, shape.c)));
    }
    give(kKey, by_joined.narrow(0, first, shape.c));
    give(kValue, by_joined.narrow(0, first + shape.c, shape.c));
    by[0] = by_x.view({shape.b, shape.t, shape.c}).to(static_cast<at::ScalarType>(context->saved_data["x"].toInt()));
    return by;
  }
};

}  // namespace

extern "C" {

int athanor_grad_enabled() { return at::GradMode::is_enabled(); }

// `activation`: 0 ReLU, 1 GELU, 2 its tanh approximation. `relative` and `mask` may be null.
int athanor_layer(at::Tensor* x, at::Tensor* const* parameters, at::Tensor* relative, at::Tensor* mask, int64_t heads, int first_token,
                  int activation, double attention_dropout, double hidden_dropout, double eps, at::Tensor* into, char** message) {
  return guarded(message, [&] {
    const auto given = list(parameters, kParameters);
    TORCH_CHECK(x->dim() == 3 && x->device().is_cpu() && heads > 0 && x->size(2) % heads == 0, "x has to be [B, T, C] on the CPU");
    const int64_t c = x->size(2), i = given[kInnerBias].numel();
    for (int place = 0; place < kParameters; place++) {
      const auto& parameter = given[static_cast<size_t>(place)];
      TORCH_CHECK(parameter.scalar_type() == at::kFloat && parameter.is_contiguous(), "parameters have to be FP32 and contiguous");
      const bool is_matrix = place == kQuery || place == kKey || place == kValue || place == kOut || place == kInner || place == kOuter;
      const int64_t outputs = place == kInner || place == kInnerBias ? i : c;
      TORCH_CHECK(is_matrix ? parameter.sizes() == at::IntArrayRef({outputs, place == kOuter ? i : c})
                            : parameter.sizes() == at::IntArrayRef({outputs}),
                  "parameter ", place, " has another shape");
    }
    for (double p : {attention_dropout, hidden_dropout}) TORCH_CHECK(p >= 0 && p < 1, "dropout has to be in [0, 1)");
    const int64_t b = x->size(0), t = x->size(1), q = first_token != 0 ? 1 : t;
    std::optional<at::Tensor> bias, allowed;
    if (relative != nullptr) {
      TORCH_CHECK(relative->sizes() == at::IntArrayRef({1, heads, t, t}), "a bias has to be [1, H, T, T]");
      bias = relative->squeeze(0).narrow(1, 0, q);
    }
    if (mask != nullptr) {
      TORCH_CHECK(mask->numel() == b * t && mask->scalar_type() == at::kBool, "a mask has to be [B, T]");
      allowed = mask->reshape({b, t}).contiguous();
    }
    const Numbers numbers{heads, first_token, activation, attention_dropout, hidden_dropout, eps};
    *into = Layer::apply(*x, at::TensorList(given), bias, allowed, numbers);
  });
}

}  // extern "C"
