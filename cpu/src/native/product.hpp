// Products of rows with a packed matrix. `pack.rs` has the layout: tiles of 16 outputs, groups of 32 inputs, four
// consecutive inputs of an output side by side. Included once for each instruction set.
//
// Rows are rounded to eight bits by groups of 32. A row's result is computed by the same operations in the same order
// whatever the other rows are, so that an answer does not depend on its batch.
#pragma once

constexpr int64_t kTile = 16;
constexpr int64_t kGroup = 32;

// Rows of activations, rounded to eight bits: value = scale * q.
struct Rounded {
  int64_t groups = 0;
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
    const float most = largest(larger(low < none ? -low : low, high < none ? -high : high));
    // Infinity and NaN times zero are NaN, finite numbers times zero are not.
    const float poison = sum(low * none + high * none);
    const float scale = most / 127.0f + poison;
    const float inverse = most > 1e-30f && poison == 0.0f ? 127.0f / most : 0.0f;
    int8_t* q = to.q + (row * to.groups + group) * kGroup;
    int32_t total = 0;
    const f32x16 a = low * inverse + 12582912.0f, b = high * inverse + 12582912.0f;
    const i32x16 c = reinterpret_cast<i32x16>(a) - 0x4b400000, d = reinterpret_cast<i32x16>(b) - 0x4b400000;
    int32_t whole[kGroup];
    store(whole, c);
    store(whole + 16, d);
    for (int64_t i = 0; i < kGroup; ++i) {
      q[i] = static_cast<int8_t>(poison == 0.0f ? whole[i] : 0);
      total += q[i];
    }
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

// Sums of products of one tile with R rows, [R][16].
template <int R, int F>
static inline void tile_product(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, f32x16* result) {
  const int64_t groups = matrix.groups();
  const uint8_t* numbers = matrix.tiles[tile].data;
  const auto* scales = reinterpret_cast<const uint16_t*>(numbers + groups * kNumbers<F>);
  const int8_t* rows[R];
  f32x16 totals[R];
  for (int r = 0; r < R; ++r) {
    rows[r] = x.row(first + r);
    totals[r] = f32x16{};
  }
  for (int64_t group = 0; group < groups; ++group) {
    __m512i sums[R];
    if constexpr (F == kInt4) {
      const __m512i mask = _mm512_set1_epi8(15);
      __m512i raw[4];
      for (int i = 0; i < 4; ++i) raw[i] = _mm512_load_si512(numbers + group * 256 + i * 64);
      for (int r = 0; r < R; ++r) sums[r] = _mm512_setzero_si512();
      for (int i = 0; i < 4; ++i) {
        const __m512i w = _mm512_and_si512(raw[i], mask);
        for (int r = 0; r < R; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], w, four(rows[r] + group * kGroup + i * 4));
      }
      for (int i = 0; i < 4; ++i) {
        const __m512i w = _mm512_and_si512(_mm512_srli_epi16(raw[i], 4), mask);
        for (int r = 0; r < R; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], w, four(rows[r] + group * kGroup + 16 + i * 4));
      }
    } else {
      for (int r = 0; r < R; ++r) sums[r] = _mm512_set1_epi32(x.starts[(first + r) * groups + group]);
      for (int i = 0; i < 8; ++i) {
        const __m512i w = _mm512_load_si512(numbers + group * 512 + i * 64);
        for (int r = 0; r < R; ++r) sums[r] = _mm512_dpbusd_epi32(sums[r], w, four(rows[r] + group * kGroup + i * 4));
      }
    }
    const f32x16 scale = load_half(scales + group * kScales<F>);
    f32x16 minimum{};
    if constexpr (F == kInt4) minimum = load_half(scales + group * 32 + 16);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (first + r) * groups + group;
      const f32x16 whole = reinterpret_cast<f32x16>(_mm512_cvtepi32_ps(sums[r]));
      totals[r] = fused(whole, scale * x.scales[at], totals[r]);
      if constexpr (F == kInt4) totals[r] = fused(minimum, all(x.sums[at]), totals[r]);
    }
  }
  for (int r = 0; r < R; ++r) result[r] = totals[r];
}

constexpr int kRows = 8;

#else

// Eight outputs: the sums of four products each. Sixteen bits hold 32 products of a weight of four bits, and two of one
// of eight if no weight is -128.
template <int R, int F>
static inline void tile_product(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, f32x16* result) {
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

constexpr int kRows = 2;

#endif

template <int R>
static inline void tile_rows(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, f32x16* result) {
  if (matrix.tiles[tile].format == kInt4) {
    tile_product<R, kInt4>(matrix, tile, x, first, result);
  } else {
    tile_product<R, kInt8>(matrix, tile, x, first, result);
  }
  if (matrix.bias != nullptr) {
    const f32x16 bias = load<f32x16>(matrix.bias + tile * kTile);
    for (int r = 0; r < R; ++r) result[r] += bias;
  }
}

// Calls `each(row, values)` for the tile's products with `count` rows from `first` on. The bias is added, and then what
// `adapt.template operator()<R>(row, values)` adds to R rows.
template <typename Adapt, typename Each>
static inline void adapted_tile_of_rows(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, int64_t count, Adapt adapt,
                                        Each each) {
  f32x16 result[kRows];
  int64_t row = first;
  const int64_t end = first + count;
  const auto rows = [&]<int R>() {
    tile_rows<R>(matrix, tile, x, row, result);
    adapt.template operator()<R>(row, result);
    for (int r = 0; r < R; ++r) each(row + r, result[r]);
    row += R;
  };
  while (row + kRows <= end) rows.template operator()<kRows>();
  if constexpr (kRows > 4) {
    while (row + 4 <= end) rows.template operator()<4>();
  }
  if constexpr (kRows > 2) {
    while (row + 2 <= end) rows.template operator()<2>();
  }
  while (row < end) rows.template operator()<1>();
}

// The same without what is added.
template <typename Each>
static inline void tile_of_rows(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, int64_t count, Each each) {
  adapted_tile_of_rows(matrix, tile, x, first, count, []<int R>(int64_t, f32x16*) {}, each);
}
