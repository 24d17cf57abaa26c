// Loops over rows of numbers, each compiled for several instruction sets: the fastest that the machine has is taken when a program
// starts. Numbers are floats; rows of bfloat16 are widened into them and narrowed again.
#pragma once

#include <cstdint>

namespace athanor {

// Which numbers dropout keeps: a function of a seed and of a number's position, so that nothing is kept for the backward pass, and
// any number of threads draws the same. Nothing is dropped where the threshold is 0.
struct Drop {
  uint32_t key0 = 0, key1 = 0, threshold = 0;
  float scale = 1;

  Drop() = default;
  Drop(uint64_t seed, double p)
      : key0(static_cast<uint32_t>(seed)),
        key1(static_cast<uint32_t>(seed >> 32)),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}
};

// y[i] = x[i] * scale where it is kept, else 0; `begin` is the position of the first number. y may be x.
void drop(const float* x, float* y, int64_t count, int64_t begin, Drop drop);
void drop(const uint16_t* x, uint16_t* y, int64_t count, int64_t begin, Drop drop);

// bfloat16 as its bits; rounds to nearest even, as libtorch does, and NaN stays NaN.
void widen(const uint16_t* x, float* y, int64_t count);
void narrow(const float* x, uint16_t* y, int64_t count);

// y[i] = (x[i] + bias[i]) * factor. y may be x.
void add_scale(const float* x, const float* bias, float factor, float* y, int64_t count);
// sum[i] += x[i].
void add_to(const float* x, float* sum, int64_t count);

float sum_of_squares(const float* x, int64_t count);

// y = normalised * weight + shift, where `sum` is normalised to mean 0 and variance 1 in its place. Returns 1 / its deviation.
float layer_norm(float* sum, const float* weight, const float* shift, float eps, float* y, int64_t count);
// The gradient by the sum, in place of the gradient by y; those by weight and shift are added to `weights` and `shifts`.
void layer_norm_backward(float* gradient, const float* normalised, const float* weight, float reciprocal, float* weights,
                         float* shifts, int64_t count);

// softmax(scores + bias) over the columns that are allowed, in place; bias and allowed may be null.
void softmax(float* scores, const float* bias, const uint8_t* allowed, int64_t count);
// The gradient by the scores, in place of the one by the probabilities.
void softmax_backward(const float* probabilities, float* gradient, int64_t count);

// Rounds rows to whole numbers from -127 to 127, kept as 1 to 255 with 128 for zero; the largest of a row becomes +-127.
void quantize_rows(const float* x, int64_t rows, int64_t columns, uint8_t* q, float* scales);
// y = y * the row's scale + bias.
void scale_rows(float* y, int64_t rows, int64_t columns, const float* scales, const float* bias);

// The coefficients of Adam's step for a row; `ffi.rs` declares the same.
struct AdamStep {
  float keep, beta1_rest, beta2, beta2_rest, size, second_scale, epsilon;
};
void adam_row(float* w, float* m, float* v, const float* gradients, int64_t columns, AdamStep step);
// The same for gradients of zero.
void adam_idle_row(float* w, float* m, float* v, int64_t columns, AdamStep step);
void scale_row(float* w, int64_t columns, float keep);

}  // namespace athanor
