// Low-rank updates of products (LoRA). Included once for each instruction set.
//
// x A^T of a token is computed once for a matrix, sixteen ranks at a time. B is applied to a tile of outputs while its products
// are in registers. Nothing depends on the other tokens of a step.
#pragma once

// Scaled products of a token with all ranks of A. `x`: [inputs]. `out`: [rank].
static inline void low_products(const LowRank& m, const float* x, int64_t inputs, float* out) {
  // Several sums, because a sum waits for the one before it.
  constexpr int kSums = 4;
  for (int64_t tile = 0; tile * kTile < m.rank; ++tile) {
    f32x16 sums[kSums] = {};
    const uint16_t* a = m.a + tile * inputs * kTile;
    int64_t i = 0;
    for (; i + kSums <= inputs; i += kSums) {
      for (int s = 0; s < kSums; ++s) sums[s] = fused(load_bf16(a + (i + s) * kTile), all(x[i + s]), sums[s]);
    }
    for (; i < inputs; ++i) sums[0] = fused(load_bf16(a + i * kTile), all(x[i]), sums[0]);
    const f32x16 total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    store(out + tile * kTile, total * load<f32x16>(m.scales + tile * kTile));
  }
}

// The products of a token with a tile, `y`, with those of its x A^T and a tile of B. `low`: [rank].
static inline f32x16 with_low_rank(const LowRankTile& tile, const float* low, f32x16 y) {
  f32x16 sum{};
  for (int64_t i = 0; i < tile.count; ++i) sum = fused(load_bf16(tile.b + i * kTile), all(low[tile.first + i]), sum);
  return y + sum;
}
