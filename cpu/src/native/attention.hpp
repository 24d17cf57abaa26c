// Attention of a few queries over one key and value head of a paged cache. Included once for each instruction set.
//
// A block holds 16 positions of a layer: keys as [K, D / 2, 16, 2] and values as [K, 16, D rounded up to 16], in BF16, for
// K heads of D numbers. So sixteen scores are computed at once, and so are sixteen numbers of a sum of values.
#pragma once

constexpr int64_t kBlock = 16;
// Queries that share what is read.
constexpr int kQueries = 4;

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

// Stores a key and a value of one head at `slot` of a block.
static inline void store_key_value(const CacheShape& shape, uint16_t* keys, uint16_t* values, int64_t head, int64_t slot,
                                   const float* key, const float* value) {
  uint16_t* k = keys + head * shape.head_dim * kBlock + slot * 2;
  for (int64_t i = 0; i < shape.head_dim; ++i) k[i / 2 * kBlock * 2 + i % 2] = to_bf16(key[i]);
  uint16_t* v = values + (head * kBlock + slot) * shape.value_width;
  for (int64_t i = 0; i < shape.head_dim; ++i) v[i] = to_bf16(value[i]);
}

// Sums of 16 W columns of the values from `column` on, weighted by `scores`: with four queries they fill sixteen registers.
template <int N, int W>
static void add_values(const CacheShape& shape, const uint16_t* values, const uint32_t* blocks, int64_t head, const Query* queries,
                       const float* scores, int64_t capacity, const float* inverse, int64_t column, int64_t begin, int64_t end) {
  f32x16 sums[N][W];
  for (int n = 0; n < N; ++n) {
    for (int w = 0; w < W; ++w) sums[n][w] = f32x16{};
  }
  for (int64_t block = begin / kBlock; block * kBlock < end; ++block) {
    const uint16_t* v = values + blocks[block] * shape.value_block() + head * kBlock * shape.value_width + column;
    const int64_t first = std::max(begin, block * kBlock), last = std::min(end, (block + 1) * kBlock);
    for (int64_t place = first; place < last; ++place) {
      const uint16_t* row = v + place % kBlock * shape.value_width;
      for (int w = 0; w < W; ++w) {
        const f32x16 value = load_bf16(row + w * 16);
        for (int n = 0; n < N; ++n) sums[n][w] = fused(value, all(scores[n * capacity + place]), sums[n][w]);
      }
    }
  }
  const int64_t count = std::min<int64_t>(16 * W, shape.head_dim - column);
  for (int n = 0; n < N; ++n) {
    float whole[16 * W];
    for (int w = 0; w < W; ++w) store(whole + w * 16, sums[n][w] * inverse[n]);
    for (int64_t i = 0; i < count; ++i) queries[n].out[column + i] = whole[i];
  }
}

// `keys` and `values`: the layer's blocks. `scores`: scratch of [N][capacity] numbers, capacity a multiple of 16.
template <int N>
static void attend(const CacheShape& shape, const uint16_t* keys, const uint16_t* values, const uint32_t* blocks, int64_t head,
                   float scale, const Query* queries, float* scores, int64_t capacity) {
  int64_t begin = queries[0].begin, end = queries[0].end;
  for (int n = 1; n < N; ++n) {
    begin = queries[n].begin < begin ? queries[n].begin : begin;
    end = queries[n].end > end ? queries[n].end : end;
  }
  const int64_t first = begin / kBlock, last = (end + kBlock - 1) / kBlock;
  f32x16 most[N];
  for (int n = 0; n < N; ++n) most[n] = all(-INFINITY);
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t block = first; block < last; ++block) {
    const uint16_t* k = keys + blocks[block] * shape.key_block() + head * shape.head_dim * kBlock;
    f32x16 dots[N];
    for (int n = 0; n < N; ++n) dots[n] = f32x16{};
    for (int64_t pair = 0; pair < shape.head_dim / 2; ++pair) {
      const u32x16 both = load<u32x16>(k + pair * kBlock * 2);
      const f32x16 even = bits(both << 16), odd = bits(both & 0xffff0000u);
      for (int n = 0; n < N; ++n) {
        dots[n] = fused(even, all(queries[n].q[pair * 2]), dots[n]);
        dots[n] = fused(odd, all(queries[n].q[pair * 2 + 1]), dots[n]);
      }
    }
    const i32x16 places = lanes + static_cast<int32_t>(block * kBlock);
    for (int n = 0; n < N; ++n) {
      const auto seen = (places >= static_cast<int32_t>(queries[n].begin)) & (places < static_cast<int32_t>(queries[n].end));
      const f32x16 score = seen ? dots[n] * scale : all(-INFINITY);
      store(scores + n * capacity + block * kBlock, score);
      // A score that is NaN has to stay one: `larger` would lose it here, the exponentials below do not.
      most[n] = larger(most[n], score);
    }
  }
  float inverse[N];
  for (int n = 0; n < N; ++n) {
    const f32x16 top = all(largest(most[n]));
    f32x16 total{};
    for (int64_t block = queries[n].begin / kBlock; block < (queries[n].end + kBlock - 1) / kBlock; ++block) {
      float* at = scores + n * capacity + block * kBlock;
      const f32x16 weight = exponential(load<f32x16>(at) - top);
      store(at, weight);
      total += weight;
    }
    // Blocks that other queries see and this one does not.
    for (int64_t block = first; block < last; ++block) {
      if (block < queries[n].begin / kBlock || block >= (queries[n].end + kBlock - 1) / kBlock) {
        store(scores + n * capacity + block * kBlock, f32x16{});
      }
    }
    inverse[n] = 1.0f / sum(total);
  }
  for (int64_t column = 0; column < shape.value_width; column += 64) {
    switch (std::min<int64_t>(4, (shape.value_width - column) / 16)) {
      case 1: add_values<N, 1>(shape, values, blocks, head, queries, scores, capacity, inverse, column, begin, end); break;
      case 2: add_values<N, 2>(shape, values, blocks, head, queries, scores, capacity, inverse, column, begin, end); break;
      case 3: add_values<N, 3>(shape, values, blocks, head, queries, scores, capacity, inverse, column, begin, end); break;
      default: add_values<N, 4>(shape, values, blocks, head, queries, scores, capacity, inverse, column, begin, end); break;
    }
  }
}
