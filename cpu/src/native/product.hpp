// Products of rows with a packed matrix. `pack.rs` has the layout: tiles of 16 outputs, groups of 32 inputs, four
// consecutive inputs of an output side by side. Included once for each instruction set.
//
// Rows are rounded to eight bits by groups of 32; float_product.hpp has the products of others. A row's result is computed by
// the same operations in the same order whatever the other rows are, so that an answer does not depend on its batch.
#pragma once

constexpr int64_t kTile = 16;
constexpr int64_t kGroup = 32;

// Rows of activations, rounded to eight bits (value = scale * q), or one of `bf16` and `fp32`: see float_product.hpp.
struct Rounded {
  int64_t groups = 0;
  uint16_t* bf16 = nullptr;    // [rows, groups * 32]
  float* fp32 = nullptr;       // [rows, groups * 32]
  int8_t* q = nullptr;         // [rows, groups * 32]
  float* scales = nullptr;     // [rows, groups]
  float* sums = nullptr;       // [rows, groups], scale * (q[0] + ... + q[31])
  int32_t* starts = nullptr;   // [rows, groups], -128 * (q[0] + ... + q[31])

  const int8_t* row(int64_t index) const { return q + index * groups * kGroup; }
};

// Rounds a row of `count` numbers. A number that is not finite makes its group's scale NaN, and so the results.
static inline void round_row(const float* x, int64_t count, Rounded& to, int64_t row) {
  for (int64_t group = 0; group < to.groups; ++group) {
    float padded[kGroup];
    const float* from = x + group * kGroup;
    const int64_t present = count - group * kGroup;
    if (present < kGroup) {
      for (int64_t i = 0; i < kGroup; ++i) padded[i] = i < present ? from[i] : 0.0f;
      from = padded;
    }
    const f32x16 low = load<f32x16>(from), high = load<f32x16>(from + 16);
    const f32x16 none{};
    const f32x16 size[2] = {low < none ? -low : low, high < none ? -high : high};
    const float most = largest(larger(size[0], size[1]));
    // False for NaN as well.
    const bool finite = !any(~(size[0] <= std::numeric_limits<float>::max()) | ~(size[1] <= std::numeric_limits<float>::max()));
    const float scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
    const float inverse = most > 1e-30f && finite ? 127.0f / most : 0.0f;
    // 1.5 * 2^23: adding it rounds to a whole number, which the low bits then hold.
    i32x16 a = reinterpret_cast<i32x16>(low * inverse + 12582912.0f) - 0x4b400000;
    i32x16 b = reinterpret_cast<i32x16>(high * inverse + 12582912.0f) - 0x4b400000;
    if (!finite) a = b = i32x16{};
    int8_t* q = to.q + (row * to.groups + group) * kGroup;
    store(q, __builtin_convertvector(a, i8x16));
    store(q + 16, __builtin_convertvector(b, i8x16));
    const int32_t total = sum(a + b);
    const int64_t at = row * to.groups + group;
    to.scales[at] = scale;
    to.sums[at] = scale * static_cast<float>(total);
    to.starts[at] = -128 * total;
  }
}

// Bytes of the whole numbers of a group, and FP16 numbers behind them.
template <int F>
constexpr int64_t kNumbers = F == kInt4 ? 256 : 512;
template <int F>
constexpr int64_t kScales = F == kInt4 ? 32 : 16;

#if defined(__AVX512VNNI__)

static inline __m512i four(const int8_t* from) {
  int32_t value;
  __builtin_memcpy(&value, from, 4);
  return _mm512_set1_epi32(value);
}

// Sums of products of T tiles of one format with R rows, [T][R]. Two tiles share what is read of the rows.
template <int R, int F, int T>
static inline void tile_product(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, f32x16 (*result)[R]) {
  const int64_t groups = matrix.groups();
  const uint8_t* numbers[T];
  const uint16_t* scales[T];
  const int8_t* rows[R];
  f32x16 totals[T][R];
  for (int t = 0; t < T; ++t) {
    numbers[t] = matrix.tiles[tile + t].data;
    scales[t] = reinterpret_cast<const uint16_t*>(numbers[t] + groups * kNumbers<F>);
    for (int r = 0; r < R; ++r) totals[t][r] = f32x16{};
  }
  for (int r = 0; r < R; ++r) rows[r] = x.row(first + r);
  for (int64_t group = 0; group < groups; ++group) {
    __m512i sums[T][R];
    if constexpr (F == kInt4) {
      const __m512i mask = _mm512_set1_epi8(15);
      for (int t = 0; t < T; ++t) {
        for (int r = 0; r < R; ++r) sums[t][r] = _mm512_setzero_si512();
      }
      for (int i = 0; i < 4; ++i) {
        __m512i low[T], high[T];
        for (int t = 0; t < T; ++t) {
          const __m512i raw = _mm512_load_si512(numbers[t] + group * 256 + i * 64);
          low[t] = _mm512_and_si512(raw, mask);
          high[t] = _mm512_and_si512(_mm512_srli_epi16(raw, 4), mask);
        }
        for (int r = 0; r < R; ++r) {
          const __m512i value = four(rows[r] + group * kGroup + i * 4);
          for (int t = 0; t < T; ++t) sums[t][r] = _mm512_dpbusd_epi32(sums[t][r], low[t], value);
        }
        for (int r = 0; r < R; ++r) {
          const __m512i value = four(rows[r] + group * kGroup + 16 + i * 4);
          for (int t = 0; t < T; ++t) sums[t][r] = _mm512_dpbusd_epi32(sums[t][r], high[t], value);
        }
      }
    } else {
      for (int r = 0; r < R; ++r) {
        const __m512i start = _mm512_set1_epi32(x.starts[(first + r) * groups + group]);
        for (int t = 0; t < T; ++t) sums[t][r] = start;
      }
      for (int i = 0; i < 8; ++i) {
        __m512i w[T];
        for (int t = 0; t < T; ++t) w[t] = _mm512_load_si512(numbers[t] + group * 512 + i * 64);
        for (int r = 0; r < R; ++r) {
          const __m512i value = four(rows[r] + group * kGroup + i * 4);
          for (int t = 0; t < T; ++t) sums[t][r] = _mm512_dpbusd_epi32(sums[t][r], w[t], value);
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      const f32x16 scale = load_half(scales[t] + group * kScales<F>);
      f32x16 minimum{};
      if constexpr (F == kInt4) minimum = load_half(scales[t] + group * 32 + 16);
      for (int r = 0; r < R; ++r) {
        const int64_t at = (first + r) * groups + group;
        const f32x16 whole = reinterpret_cast<f32x16>(_mm512_cvtepi32_ps(sums[t][r]));
        totals[t][r] = fused(whole, scale * x.scales[at], totals[t][r]);
        if constexpr (F == kInt4) totals[t][r] = fused(minimum, all(x.sums[at]), totals[t][r]);
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) result[t][r] = totals[t][r];
  }
}

// Rows that are computed together: of one tile, and of two.
template <int T>
constexpr int kRows = T == 2 ? 4 : 8;

#else

// Eight outputs: the sums of four products each. Sixteen bits hold 32 products of a weight of four bits, and two of one
// of eight if no weight is -128.
template <int R, int F, int T>
static inline void tile_product(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, f32x16 (*results)[R]) {
  // Sixteen registers are too few for two tiles at once.
  if constexpr (T == 2) tile_product<R, F, 1>(matrix, tile + 1, x, first, results + 1);
  f32x16* result = results[0];
  const int64_t groups = matrix.groups();
  const uint8_t* numbers = matrix.tiles[tile].data;
  const auto* scales = reinterpret_cast<const uint16_t*>(numbers + groups * kNumbers<F>);
  const __m256i ones = _mm256_set1_epi16(1);
  for (int r = 0; r < R; ++r) result[r] = f32x16{};
  for (int64_t group = 0; group < groups; ++group) {
    __m256i sums[R][2];
    for (int half = 0; half < 2; ++half) {
      if constexpr (F == kInt4) {
        const __m256i mask = _mm256_set1_epi8(15);
        for (int r = 0; r < R; ++r) sums[r][half] = _mm256_setzero_si256();
        for (int i = 0; i < 4; ++i) {
          const __m256i raw = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers + group * 256 + i * 64 + half * 32));
          const __m256i low = _mm256_and_si256(raw, mask), high = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
          for (int r = 0; r < R; ++r) {
            const int8_t* row = x.row(first + r) + group * kGroup + i * 4;
            int32_t a, b;
            __builtin_memcpy(&a, row, 4);
            __builtin_memcpy(&b, row + 16, 4);
            sums[r][half] = _mm256_add_epi16(sums[r][half], _mm256_maddubs_epi16(low, _mm256_set1_epi32(a)));
            sums[r][half] = _mm256_add_epi16(sums[r][half], _mm256_maddubs_epi16(high, _mm256_set1_epi32(b)));
          }
        }
        for (int r = 0; r < R; ++r) sums[r][half] = _mm256_madd_epi16(sums[r][half], ones);
      } else {
        const __m256i flip = _mm256_set1_epi8(-128);
        for (int r = 0; r < R; ++r) sums[r][half] = _mm256_setzero_si256();
        for (int i = 0; i < 8; ++i) {
          const __m256i raw = _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers + group * 512 + i * 64 + half * 32));
          const __m256i w = _mm256_xor_si256(raw, flip);
          for (int r = 0; r < R; ++r) {
            int32_t a;
            __builtin_memcpy(&a, x.row(first + r) + group * kGroup + i * 4, 4);
            const __m256i value = _mm256_set1_epi32(a);
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(w, value));
            sums[r][half] = _mm256_add_epi32(sums[r][half], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
    }
    const f32x16 scale = load_half(scales + group * kScales<F>);
    f32x16 minimum{};
    if constexpr (F == kInt4) minimum = load_half(scales + group * 32 + 16);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (first + r) * groups + group;
      f32x16 whole;
      for (int half = 0; half < 2; ++half) {
        const __m256 part = _mm256_cvtepi32_ps(sums[r][half]);
        __builtin_memcpy(reinterpret_cast<char*>(&whole) + half * 32, &part, 32);
      }
      result[r] = fused(whole, scale * x.scales[at], result[r]);
      if constexpr (F == kInt4) result[r] = fused(minimum, all(x.sums[at]), result[r]);
    }
  }
}

template <int T>
constexpr int kRows = 2;

#endif

template <int R, int T>
static inline void tile_rows(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, f32x16 (*result)[R]) {
  if (matrix.tiles[tile].format == kInt4) {
    tile_product<R, kInt4, T>(matrix, tile, x, first, result);
  } else {
    tile_product<R, kInt8, T>(matrix, tile, x, first, result);
  }
  if (matrix.bias == nullptr) return;
  for (int t = 0; t < T; ++t) {
    const f32x16 bias = load<f32x16>(matrix.bias + (tile + t) * kTile);
    for (int r = 0; r < R; ++r) result[t][r] += bias;
  }
}

// Calls `each(row, y)` for `count` rows from `first` on, where y(t) are the row's products with tile `tile` + t, t < T; the
// bias is added. Two tiles have one format.
template <int T, int R, typename Each>
static inline void tiles_of_rows(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, int64_t count, Each each) {
  int64_t row = first;
  const int64_t end = first + count;
  for (; row + R <= end; row += R) {
    f32x16 result[T][R];
    tile_rows<R, T>(matrix, tile, x, row, result);
    for (int r = 0; r < R; ++r) each(row + r, [&](int t) { return result[t][r]; });
  }
  if constexpr (R > 1) tiles_of_rows<T, R / 2>(matrix, tile, x, row, end - row, each);
}

// Whether two tiles can be computed at once.
static inline bool alike(const Matrix& matrix, int64_t tile) { return matrix.tiles[tile].format == matrix.tiles[tile + 1].format; }
