// Attention of a few queries over one key and value head of a paged cache. Included once for each instruction set.
//
// A block holds 16 positions of a layer: keys as [K, D / 2, 16, 2] and values as [K, 8, D rounded up to 16, 2], in BF16,
// for K heads of D numbers: pairs of numbers of a key, and pairs of positions of a number of the values, are side by side. So
// sixteen scores are computed at once, and so are sixteen numbers of a sum of values.
//
// With AVX512-BF16 queries and weights are rounded to BF16, and a pair of products is one instruction; else products are
// FP32. Either way a query's result is computed by the same operations in the same order whatever the other queries are.
#pragma once

constexpr int64_t kBlock = 16;

// Queries that share what is read, and blocks whose scores are computed together: enough sums at once to hide the latency
// of a product.
#if defined(__AVX512BF16__)
constexpr int kQueries = 8;
constexpr int kBlocks = 2;
#else
constexpr int kQueries = 4;
constexpr int kBlocks = 1;
#endif

struct CacheShape {
  int64_t heads = 0;       // K
  int64_t head_dim = 0;    // D
  int64_t value_width = 0; // D rounded up to 16

  int64_t key_block() const { return heads * head_dim * kBlock; }
  int64_t value_block() const { return heads * value_width * kBlock; }
};

// One query: [D] numbers, of which it sees positions begin to end - 1. `out`: [D].
struct Query {
  const float* q = nullptr;
  float* out = nullptr;
  int64_t begin = 0, end = 0;
};

// Numbers of scratch that `attend` needs: scores or weights [kQueries, capacity], queries in BF16 [kQueries, D].
static inline int64_t attention_scratch(const CacheShape& shape, int64_t capacity) {
  return kQueries * (capacity + shape.value_width);
}

// Stores a key and a value of one head at `slot` of a block. Other threads may store at the other slots. `scratch`: [D].
static inline void store_key_value(const CacheShape& shape, uint16_t* keys, uint16_t* values, int64_t head, int64_t slot,
                                   const float* key, const float* value, float* scratch) {
  auto* rounded = reinterpret_cast<uint16_t*>(scratch);
  to_bf16(key, shape.head_dim, rounded);
  uint16_t* k = keys + head * shape.head_dim * kBlock + slot * 2;
  for (int64_t pair = 0; pair < shape.head_dim / 2; ++pair) __builtin_memcpy(k + pair * kBlock * 2, rounded + pair * 2, 4);
  to_bf16(value, shape.head_dim, rounded);
  uint16_t* v = values + (head * kBlock + slot / 2 * 2) * shape.value_width + slot % 2;
  for (int64_t i = 0; i < shape.head_dim; ++i) v[i * 2] = rounded[i];
}

#if defined(__AVX512BF16__)

// 2^x with a relative error below 2^-14 for x <= 0, which is enough for BF16. NaN stays NaN, and -inf gives 0.
static inline f32x16 power_of_two(f32x16 x) {
  // The second operand is returned if one is NaN.
  const __m512 capped = _mm512_max_ps(_mm512_set1_ps(-200.0f), reinterpret_cast<__m512>(x));
  const __m512 whole = _mm512_roundscale_ps(capped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const f32x16 r = reinterpret_cast<f32x16>(_mm512_sub_ps(capped, whole));
  f32x16 p = fused(r, all(9.6181291e-3f), all(5.5504109e-2f));
  p = fused(p, r, all(2.4022651e-1f));
  p = fused(p, r, all(6.9314718e-1f));
  p = fused(p, r, all(1.0f));
  return reinterpret_cast<f32x16>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), whole));
}

// Products of N queries with the keys of B blocks.
template <int N, int B>
static inline void score_blocks(const CacheShape& shape, const uint16_t* const* keys, const Query*, const float* asked,
                                f32x16 (*dots)[N]) {
  f32x16 sums[B][N];
  for (int b = 0; b < B; ++b) {
    for (int n = 0; n < N; ++n) sums[b][n] = f32x16{};
  }
  for (int64_t pair = 0; pair < shape.head_dim / 2; ++pair) {
    u32x16 both[B];
    for (int b = 0; b < B; ++b) both[b] = load<u32x16>(keys[b] + pair * kBlock * 2);
    for (int n = 0; n < N; ++n) {
      const auto q = load<uint32_t>(asked + n * shape.value_width + pair);
      for (int b = 0; b < B; ++b) sums[b][n] = pair_product(sums[b][n], both[b], q);
    }
  }
  for (int b = 0; b < B; ++b) {
    for (int n = 0; n < N; ++n) dots[b][n] = sums[b][n];
  }
}

// Replaces a block's scores by weights, which take half the room: those of block b are 16 numbers of BF16 at 16 b.
static inline f32x16 weigh(float* scores, int64_t block, f32x16 top) {
  const f32x16 score = load<f32x16>(scores + block * kBlock);
  const u16x16 weights = (u16x16)_mm512_cvtneps_pbh(reinterpret_cast<__m512>(power_of_two((score - top) * 1.44269504f)));
  auto* to = reinterpret_cast<uint16_t*>(scores) + block * kBlock;
  store(to, weights);
  return load_bf16(to);
}

static inline void weigh_nothing(float* scores, int64_t block) {
  store(reinterpret_cast<uint16_t*>(scores) + block * kBlock, u16x16{});
}

// Adds two positions' values to the sums, [N][W].
template <int N, int W>
static inline void add_pair(const u32x16* both, const float* weights, int64_t capacity, int64_t place, f32x16 (*sums)[W]) {
  for (int n = 0; n < N; ++n) {
    const auto weight = load<uint32_t>(reinterpret_cast<const uint16_t*>(weights + n * capacity) + place);
    for (int w = 0; w < W; ++w) sums[n][w] = pair_product(sums[n][w], both[w], weight);
  }
}

#else

template <int N, int B>
static inline void score_blocks(const CacheShape& shape, const uint16_t* const* keys, const Query* queries, const float*,
                                f32x16 (*dots)[N]) {
  static_assert(B == 1);
  for (int n = 0; n < N; ++n) dots[0][n] = f32x16{};
  for (int64_t pair = 0; pair < shape.head_dim / 2; ++pair) {
    const u32x16 both = load<u32x16>(keys[0] + pair * kBlock * 2);
    const f32x16 even = bits(both << 16), odd = bits(both & 0xffff0000u);
    for (int n = 0; n < N; ++n) {
      dots[0][n] = fused(even, all(queries[n].q[pair * 2]), dots[0][n]);
      dots[0][n] = fused(odd, all(queries[n].q[pair * 2 + 1]), dots[0][n]);
    }
  }
}

// Replaces a block's scores by weights.
static inline f32x16 weigh(float* scores, int64_t block, f32x16 top) {
  const f32x16 weights = exponential(load<f32x16>(scores + block * kBlock) - top);
  store(scores + block * kBlock, weights);
  return weights;
}

static inline void weigh_nothing(float* scores, int64_t block) { store(scores + block * kBlock, f32x16{}); }

template <int N, int W>
static inline void add_pair(const u32x16* both, const float* weights, int64_t capacity, int64_t place, f32x16 (*sums)[W]) {
  for (int w = 0; w < W; ++w) {
    const f32x16 even = bits(both[w] << 16), odd = bits(both[w] & 0xffff0000u);
    for (int n = 0; n < N; ++n) {
      sums[n][w] = fused(even, all(weights[n * capacity + place]), sums[n][w]);
      sums[n][w] = fused(odd, all(weights[n * capacity + place + 1]), sums[n][w]);
    }
  }
}

#endif

// Sums of 16 W columns of the values from `column` on, by weights: they fill sixteen registers.
template <int N, int W>
static void add_values(const CacheShape& shape, const uint16_t* values, const uint32_t* blocks, int64_t head, const Query* queries,
                       const float* weights, int64_t capacity, const float* inverse, int64_t column, int64_t begin, int64_t end) {
  f32x16 sums[N][W];
  for (int n = 0; n < N; ++n) {
    for (int w = 0; w < W; ++w) sums[n][w] = f32x16{};
  }
  for (int64_t block = begin / kBlock; block * kBlock < end; ++block) {
    const uint16_t* v = values + blocks[block] * shape.value_block() + (head * kBlock * shape.value_width + column * 2);
    const int64_t from = std::max<int64_t>(begin - block * kBlock, 0), to = std::min(end - block * kBlock, kBlock);
    for (int64_t place = from / 2 * 2; place < to; place += 2) {
      const uint16_t* row = v + place * shape.value_width;
      u32x16 both[W];
      for (int w = 0; w < W; ++w) both[w] = load<u32x16>(row + w * 32);
      if (place < from || place + 1 >= to) {
        // No query sees one of the two: its weight is 0, but its value may be anything.
        const uint32_t seen = (place < from ? 0 : 0xffffu) | (place + 1 < to ? 0xffff0000u : 0);
        for (int w = 0; w < W; ++w) both[w] &= seen;
      }
      add_pair<N, W>(both, weights, capacity, block * kBlock + place, sums);
    }
  }
  const int64_t count = std::min<int64_t>(16 * W, shape.head_dim - column);
  for (int n = 0; n < N; ++n) {
    float whole[16 * W];
    for (int w = 0; w < W; ++w) store(whole + w * 16, sums[n][w] * inverse[n]);
    for (int64_t i = 0; i < count; ++i) queries[n].out[column + i] = whole[i];
  }
}

// `keys` and `values`: the layer's blocks. `scratch`: see `attention_scratch`; `capacity`: a multiple of 16.
template <int N>
static void attend(const CacheShape& shape, const uint16_t* keys, const uint16_t* values, const uint32_t* blocks, int64_t head,
                   float scale, const Query* queries, float* scratch, int64_t capacity) {
  int64_t begin = queries[0].begin, end = queries[0].end;
  // What all queries see.
  int64_t common_begin = begin, common_end = end;
  for (int n = 1; n < N; ++n) {
    begin = std::min(begin, queries[n].begin);
    end = std::max(end, queries[n].end);
    common_begin = std::max(common_begin, queries[n].begin);
    common_end = std::min(common_end, queries[n].end);
  }
  float *scores = scratch, *asked = scratch + kQueries * capacity;
#if defined(__AVX512BF16__)
  for (int n = 0; n < N; ++n) to_bf16(queries[n].q, shape.head_dim, reinterpret_cast<uint16_t*>(asked + n * shape.value_width));
#endif
  const int64_t first = begin / kBlock, last = (end + kBlock - 1) / kBlock;
  f32x16 most[N];
  for (int n = 0; n < N; ++n) most[n] = all(-INFINITY);
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const auto key = [&](int64_t block) { return keys + blocks[block] * shape.key_block() + head * shape.head_dim * kBlock; };
  const auto keep = [&](int64_t block, const f32x16* dots) {
    const bool is_seen = block * kBlock >= common_begin && (block + 1) * kBlock <= common_end;
    const i32x16 places = lanes + static_cast<int32_t>(block * kBlock);
    for (int n = 0; n < N; ++n) {
      f32x16 score = dots[n] * scale;
      if (!is_seen) {
        const auto seen = (places >= static_cast<int32_t>(queries[n].begin)) & (places < static_cast<int32_t>(queries[n].end));
        score = seen ? score : all(-INFINITY);
      }
      store(scores + n * capacity + block * kBlock, score);
      // A score that is NaN has to stay one: `larger` would lose it here, the exponentials below do not.
      most[n] = larger(most[n], score);
    }
  };
  int64_t block = first;
  for (; block + kBlocks <= last; block += kBlocks) {
    const uint16_t* k[kBlocks];
    for (int b = 0; b < kBlocks; ++b) k[b] = key(block + b);
    f32x16 dots[kBlocks][N];
    score_blocks<N, kBlocks>(shape, k, queries, asked, dots);
    for (int b = 0; b < kBlocks; ++b) keep(block + b, dots[b]);
  }
  for (; block < last; ++block) {
    const uint16_t* k = key(block);
    f32x16 dots[1][N];
    score_blocks<N, 1>(shape, &k, queries, asked, dots);
    keep(block, dots[0]);
  }
  float inverse[N];
  for (int n = 0; n < N; ++n) {
    const f32x16 top = all(largest(most[n]));
    const int64_t own_first = queries[n].begin / kBlock, own_last = (queries[n].end + kBlock - 1) / kBlock;
    float* own = scores + n * capacity;
    f32x16 total{};
    for (block = own_first; block < own_last; ++block) total += weigh(own, block, top);
    // Blocks that other queries see and this one does not.
    for (block = first; block < own_first; ++block) weigh_nothing(own, block);
    for (block = own_last; block < last; ++block) weigh_nothing(own, block);
    inverse[n] = 1.0f / sum(total);
  }
  constexpr int kColumns = N > 4 ? 2 : 4;
  for (int64_t column = 0; column < shape.value_width; column += 16 * kColumns) {
    const auto width = static_cast<int>(std::min<int64_t>(kColumns, (shape.value_width - column) / 16));
    const auto add = [&](auto columns) {
      add_values<N, columns()>(shape, values, blocks, head, queries, scores, capacity, inverse, column, begin, end);
    };
    if (width == 1) add(std::integral_constant<int, 1>{});
    if (width == 2) add(std::integral_constant<int, 2>{});
    if constexpr (kColumns > 2) {
      if (width == 3) add(std::integral_constant<int, 3>{});
      if (width == 4) add(std::integral_constant<int, 4>{});
    }
  }
}

// As `attend`, of `count` queries, at most kQueries.
static inline void attend_all(const CacheShape& shape, const uint16_t* keys, const uint16_t* values, const uint32_t* blocks, int64_t head,
                              float scale, const Query* queries, int64_t count, float* scratch, int64_t capacity) {
  for (int64_t done = 0; done < count;) {
    const auto some = [&](auto size) {
      attend<size()>(shape, keys, values, blocks, head, scale, queries + done, scratch, capacity);
      done += size();
    };
    switch (count - done) {
      case 1: some(std::integral_constant<int, 1>{}); break;
      case 2: some(std::integral_constant<int, 2>{}); break;
      case 3: some(std::integral_constant<int, 3>{}); break;
      case kQueries: some(std::integral_constant<int, kQueries>{}); break;
      default: some(std::integral_constant<int, 4>{}); break;
    }
  }
}
