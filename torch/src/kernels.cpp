#include "kernels.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#ifdef __x86_64__
#define VECTORIZED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORIZED
#endif

namespace athanor {
namespace {

// Sums are kept apart in so many lanes, alike on every machine: a sum may be vectorized only in an order that is written down.
constexpr int kLanes = 16;

// Random 32 bits of a position in a stream: two rounds of lowbias32 (Wellons 2018) with a key in each.
inline uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}
inline bool keeps(uint32_t position, const Drop& drop) {
  return mix32(mix32(position + drop.key0) ^ drop.key1) >= drop.threshold;
}

inline float wide(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t rounded(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0U : (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// e^x for x <= 0, to some 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, by the series of e^r. 0 below -87.
inline float exp_negative(float x) {
  const float clamped = x < -87.0F ? -87.0F : x;
  // The added number puts the sum where a float has no fraction: the addition itself rounds.
  const float n = (clamped * 1.44269504F + 12582912.0F) - 12582912.0F;
  const float r = (clamped - n * 0.693359375F) + n * 2.12194440e-4F;
  float e = 1.0F / 720;
  e = e * r + 1.0F / 120;
  e = e * r + 1.0F / 24;
  e = e * r + 1.0F / 6;
  e = e * r + 0.5F;
  e = e * r + 1.0F;
  e = e * r + 1.0F;
  const float power = std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0F ? 0.0F : e * power;
}

inline float total(const float (&lanes)[kLanes]) {
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

}  // namespace

VECTORIZED void drop(const float* x, float* y, int64_t count, int64_t begin, Drop drop) {
  for (int64_t i = 0; i < count; i++) y[i] = keeps(static_cast<uint32_t>(begin + i), drop) ? x[i] * drop.scale : 0.0F;
}

VECTORIZED void drop(const uint16_t* x, uint16_t* y, int64_t count, int64_t begin, Drop drop) {
  for (int64_t i = 0; i < count; i++) {
    const uint16_t scaled = rounded(wide(x[i]) * drop.scale);
    y[i] = keeps(static_cast<uint32_t>(begin + i), drop) ? scaled : 0;
  }
}

VECTORIZED void widen(const uint16_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i++) y[i] = wide(x[i]);
}
VECTORIZED void narrow(const float* x, uint16_t* y, int64_t count) {
  for (int64_t i = 0; i < count; i++) y[i] = rounded(x[i]);
}

VECTORIZED void add_scale(const float* x, const float* bias, float factor, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i++) y[i] = (x[i] + bias[i]) * factor;
}
VECTORIZED void add_to(const float* x, float* sum, int64_t count) {
  for (int64_t i = 0; i < count; i++) sum[i] += x[i];
}

VECTORIZED float sum_of_squares(const float* x, int64_t count) {
  const int64_t even = count - count % kLanes;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < even; i += kLanes)
    for (int j = 0; j < kLanes; j++) lanes[j] += x[i + j] * x[i + j];
  for (int64_t i = even; i < count; i++) lanes[i - even] += x[i] * x[i];
  return total(lanes);
}

VECTORIZED float layer_norm(float* sum, const float* weight, const float* shift, float eps, float* y, int64_t count) {
  const int64_t even = count - count % kLanes;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < even; i += kLanes)
    for (int j = 0; j < kLanes; j++) lanes[j] += sum[i + j];
  for (int64_t i = even; i < count; i++) lanes[i - even] += sum[i];
  const float mean = total(lanes) / static_cast<float>(count);
  float squares[kLanes] = {};
  for (int64_t i = 0; i < even; i += kLanes)
    for (int j = 0; j < kLanes; j++) {
      const float centred = sum[i + j] - mean;
      squares[j] += centred * centred;
    }
  for (int64_t i = even; i < count; i++) squares[i - even] += (sum[i] - mean) * (sum[i] - mean);
  const float reciprocal = 1.0F / std::sqrt(total(squares) / static_cast<float>(count) + eps);
  for (int64_t i = 0; i < count; i++) {
    const float normalised = (sum[i] - mean) * reciprocal;
    sum[i] = normalised;
    y[i] = normalised * weight[i] + shift[i];
  }
  return reciprocal;
}

VECTORIZED void layer_norm_backward(float* gradient, const float* normalised, const float* weight, float reciprocal, float* weights,
                                    float* shifts, int64_t count) {
  const int64_t even = count - count % kLanes;
  float sums[kLanes] = {}, products[kLanes] = {};
  for (int64_t i = 0; i < even; i += kLanes)
    for (int j = 0; j < kLanes; j++) {
      const float g = gradient[i + j], x = normalised[i + j], by = g * weight[i + j];
      weights[i + j] += g * x;
      shifts[i + j] += g;
      sums[j] += by;
      products[j] += by * x;
      gradient[i + j] = by;
    }
  for (int64_t i = even; i < count; i++) {
    const float g = gradient[i], x = normalised[i], by = g * weight[i];
    weights[i] += g * x;
    shifts[i] += g;
    sums[i - even] += by;
    products[i - even] += by * x;
    gradient[i] = by;
  }
  const float mean = total(sums) / static_cast<float>(count), slope = total(products) / static_cast<float>(count);
  for (int64_t i = 0; i < count; i++) gradient[i] = reciprocal * (gradient[i] - mean - normalised[i] * slope);
}

VECTORIZED void softmax(float* scores, const float* bias, const uint8_t* allowed, int64_t count) {
  constexpr float never = -std::numeric_limits<float>::infinity();
  if (bias != nullptr)
    for (int64_t i = 0; i < count; i++) scores[i] += bias[i];
  if (allowed != nullptr)
    for (int64_t i = 0; i < count; i++) scores[i] = allowed[i] != 0 ? scores[i] : never;
  const int64_t even = count - count % kLanes;
  float largest[kLanes];
  std::fill_n(largest, kLanes, never);
  for (int64_t i = 0; i < even; i += kLanes)
    for (int j = 0; j < kLanes; j++) largest[j] = largest[j] < scores[i + j] ? scores[i + j] : largest[j];
  for (int64_t i = even; i < count; i++) largest[i - even] = std::max(largest[i - even], scores[i]);
  const float top = *std::max_element(largest, largest + kLanes);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < even; i += kLanes)
    for (int j = 0; j < kLanes; j++) {
      const float e = exp_negative(scores[i + j] - top);
      scores[i + j] = e;
      lanes[j] += e;
    }
  for (int64_t i = even; i < count; i++) {
    scores[i] = exp_negative(scores[i] - top);
    lanes[i - even] += scores[i];
  }
  const float reciprocal = 1.0F / total(lanes);
  for (int64_t i = 0; i < count; i++) scores[i] *= reciprocal;
}

VECTORIZED void softmax_backward(const float* probabilities, float* gradient, int64_t count) {
  const int64_t even = count - count % kLanes;
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < even; i += kLanes)
    for (int j = 0; j < kLanes; j++) lanes[j] += probabilities[i + j] * gradient[i + j];
  for (int64_t i = even; i < count; i++) lanes[i - even] += probabilities[i] * gradient[i];
  const float mean = total(lanes);
  for (int64_t i = 0; i < count; i++) gradient[i] = probabilities[i] * (gradient[i] - mean);
}

VECTORIZED void quantize_rows(const float* x, int64_t rows, int64_t columns, uint8_t* q, float* scales) {
  for (int64_t row = 0; row < rows; row++) {
    const float* from = x + row * columns;
    uint8_t* to = q + row * columns;
    float largest = 0;
    for (int64_t i = 0; i < columns; i++) largest = std::max(largest, std::fabs(from[i]));
    float factor = largest > 0 ? 127 / largest : 0;
    scales[row] = largest / 127;
    // As in exp_negative, to even.
    for (int64_t i = 0; i < columns; i++) to[i] = static_cast<uint8_t>(static_cast<int32_t>(from[i] * factor + 12582912.0f - 12582912.0f) + 128);
  }
}

VECTORIZED void scale_rows(float* y, int64_t rows, int64_t columns, const float* scales, const float* bias) {
  for (int64_t row = 0; row < rows; row++) {
    float* at = y + row * columns;
    float scale = scales[row];
    for (int64_t i = 0; i < columns; i++) at[i] = at[i] * scale + bias[i];
  }
}

namespace {

inline void adam(float& w, float& m, float& v, float gradient, const AdamStep& step) {
  const float first = m + (gradient - m) * step.beta1_rest;
  const float second = v * step.beta2 + gradient * gradient * step.beta2_rest;
  m = first;
  v = second;
  w = w * step.keep - step.size * first / (std::sqrt(second) * step.second_scale + step.epsilon);
}

}  // namespace

VECTORIZED void adam_row(float* __restrict w, float* __restrict m, float* __restrict v, const float* __restrict gradients,
                         int64_t columns, AdamStep step) {
  for (int64_t i = 0; i < columns; i++) adam(w[i], m[i], v[i], gradients[i], step);
}

VECTORIZED void adam_idle_row(float* __restrict w, float* __restrict m, float* __restrict v, int64_t columns, AdamStep step) {
  for (int64_t i = 0; i < columns; i++) adam(w[i], m[i], v[i], 0.0F, step);
}

VECTORIZED void scale_row(float* w, int64_t columns, float keep) {
  for (int64_t i = 0; i < columns; i++) w[i] *= keep;
}

}  // namespace athanor
