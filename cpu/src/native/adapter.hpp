// Low-rank updates of products (LoRA). Included once for each instruction set.
//
// x A^T of a token is computed once for a matrix, sixteen ranks at a time. B is applied to a tile of outputs while its
// products are in registers. A token's result is computed by the same operations in the same order whatever the other
// tokens are.
#pragma once

// Tokens that share what is read of A: with four sums each they fill half of the registers.
#if defined(__AVX512F__)
constexpr int kLowRows = 4;
#else
constexpr int kLowRows = 1;
#endif

// Scaled products of N tokens with the ranks of a tile of A. `x`: [N, inputs]. `out`: [N, stride].
template <int N>
static inline void low_products(const LowRank& m, int64_t tile, const float* x, int64_t inputs, float* out, int64_t stride) {
  // Several sums, because a sum waits for the one before it.
  constexpr int kSums = 4;
  f32x16 sums[N][kSums];
  for (int n = 0; n < N; ++n) {
    for (int s = 0; s < kSums; ++s) sums[n][s] = f32x16{};
  }
  const uint16_t* a = m.a + tile * inputs * kTile;
  int64_t i = 0;
  for (; i + kSums <= inputs; i += kSums) {
    for (int s = 0; s < kSums; ++s) {
      const f32x16 weight = load_bf16(a + (i + s) * kTile);
      for (int n = 0; n < N; ++n) sums[n][s] = fused(weight, all(x[n * inputs + i + s]), sums[n][s]);
    }
  }
  for (; i < inputs; ++i) {
    const f32x16 weight = load_bf16(a + i * kTile);
    for (int n = 0; n < N; ++n) sums[n][0] = fused(weight, all(x[n * inputs + i]), sums[n][0]);
  }
  const f32x16 scale = load<f32x16>(m.scales + tile * kTile);
  for (int n = 0; n < N; ++n) {
    const f32x16 total = (sums[n][0] + sums[n][1]) + (sums[n][2] + sums[n][3]);
    store(out + n * stride + tile * kTile, total * scale);
  }
}

// Adds the products of N tokens' x A^T with a tile of B to their results. `low`: [N, stride].
template <int N>
static inline void add_low_rank(const LowRankTile& tile, const float* low, int64_t stride, f32x16* result) {
  if (tile.count == 0) return;
  f32x16 sums[N];
  for (int n = 0; n < N; ++n) sums[n] = f32x16{};
  const float* from = low + tile.first;
  for (int64_t i = 0; i < tile.count; ++i) {
    const f32x16 weight = load_bf16(tile.b + i * kTile);
    for (int n = 0; n < N; ++n) sums[n] = fused(weight, all(from[n * stride + i]), sums[n]);
  }
  for (int n = 0; n < N; ++n) result[n] += sums[n];
}
