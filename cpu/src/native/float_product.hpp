// Products of rows with a packed matrix of BF16 or FP32. Included once for each instruction set.
//
// A tile's weights of FP32 are [inputs, 16], those of BF16 [inputs / 2, 16, 2]: two inputs of an output are side by side. With
// AVX512-BF16 rows are rounded to BF16 for weights of BF16, and a pair of products is one instruction; else rows are FP32. Either
// way sums are FP32, and a row's are computed in the order of its inputs whatever the other rows are.
#pragma once

#if defined(__AVX512BF16__)
constexpr bool kHasBF16 = true;
#else
constexpr bool kHasBF16 = false;
#endif

// Rows that are computed together, of two tiles with AVX512 and of one with AVX2: their sums fill most registers.
#if defined(__AVX512F__)
constexpr int kFloatRows = 8;
#else
constexpr int kFloatRows = 4;
#endif

// Copies a row of `count` numbers, with zeros behind them to a whole number of groups.
static inline void float_row_of(const float* x, int64_t count, Rounded& to, int64_t row) {
  const int64_t width = to.groups * kGroup;
  if (to.fp32 != nullptr) {
    std::copy(x, x + count, to.fp32 + row * width);
    std::fill(to.fp32 + row * width + count, to.fp32 + (row + 1) * width, 0.0f);
    return;
  }
  uint16_t* rounded = to.bf16 + row * width;
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= count; i += 16) store(rounded + i, (u16x16)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
  to_bf16(x + i, count - i, rounded + i);
  std::fill(rounded + count, rounded + width, static_cast<uint16_t>(0));
}

// A row in the format of `to`.
static inline void prepare_row(const float* x, int64_t count, Rounded& to, int64_t row) {
  if (to.bf16 != nullptr || to.fp32 != nullptr) {
    float_row_of(x, count, to, row);
  } else {
    round_row(x, count, to, row);
  }
}

#if defined(__AVX512F__)

// Products of T tiles with R rows and the bias, [T][R].
template <int F, int R, int T>
__attribute__((noinline)) static void float_product(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first,
                                                    f32x16 (*result)[R]) {
  const int64_t width = matrix.groups() * kGroup;
  f32x16 totals[T][R];
  const uint8_t* weights[T];
  for (int t = 0; t < T; ++t) {
    weights[t] = matrix.tiles[tile + t].data;
    const f32x16 bias = matrix.bias == nullptr ? f32x16{} : load<f32x16>(matrix.bias + (tile + t) * kTile);
    for (int r = 0; r < R; ++r) totals[t][r] = bias;
  }
  if constexpr (F == kBF16 && kHasBF16) {
#if defined(__AVX512BF16__)
    const uint16_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = x.bf16 + (first + r) * width;
    for (int64_t i = 0; i < width; i += 2) {
      u32x16 both[T];
      for (int t = 0; t < T; ++t) both[t] = load<u32x16>(weights[t] + i * 32);
      for (int r = 0; r < R; ++r) {
        const auto pair = load<uint32_t>(rows[r] + i);
        for (int t = 0; t < T; ++t) totals[t][r] = pair_product(totals[t][r], both[t], pair);
      }
    }
#endif
  } else {
    const float* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = x.fp32 + (first + r) * width;
    constexpr int kStep = F == kBF16 ? 2 : 1;
    for (int64_t i = 0; i < width; i += kStep) {
      f32x16 weight[kStep][T];
      for (int t = 0; t < T; ++t) {
        if constexpr (F == kBF16) {
          const auto both = load<u32x16>(weights[t] + i * 32);
          weight[0][t] = bits(both << 16);
          weight[1][t] = bits(both & 0xffff0000u);
        } else {
          weight[0][t] = load<f32x16>(weights[t] + i * 64);
        }
      }
      for (int s = 0; s < kStep; ++s) {
        for (int r = 0; r < R; ++r) {
          const f32x16 value = all(rows[r][i + s]);
          for (int t = 0; t < T; ++t) totals[t][r] = fused(weight[s][t], value, totals[t][r]);
        }
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < R; ++r) result[t][r] = totals[t][r];
  }
}

#else

template <int F, int R, int T>
__attribute__((noinline)) static void float_product(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first,
                                                    f32x16 (*result)[R]) {
  static_assert(T == 1);
  const int64_t width = matrix.groups() * kGroup;
  const uint8_t* weights = matrix.tiles[tile].data;
  __m256 totals[R][2];
  for (int half = 0; half < 2; ++half) {
    const __m256 bias = matrix.bias == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(matrix.bias + tile * kTile + half * 8);
    for (int r = 0; r < R; ++r) totals[r][half] = bias;
  }
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.fp32 + (first + r) * width;
  constexpr int kStep = F == kBF16 ? 2 : 1;
  for (int64_t i = 0; i < width; i += kStep) {
    __m256 weight[kStep][2];
    for (int half = 0; half < 2; ++half) {
      if constexpr (F == kBF16) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + i * 32 + half * 32));
        weight[0][half] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        weight[1][half] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
      } else {
        weight[0][half] = _mm256_loadu_ps(reinterpret_cast<const float*>(weights + i * 64 + half * 32));
      }
    }
    for (int s = 0; s < kStep; ++s) {
      for (int r = 0; r < R; ++r) {
        const __m256 value = _mm256_broadcast_ss(rows[r] + i + s);
        for (int half = 0; half < 2; ++half) totals[r][half] = _mm256_fmadd_ps(weight[s][half], value, totals[r][half]);
      }
    }
  }
  for (int r = 0; r < R; ++r) __builtin_memcpy(&result[0][r], totals[r], 64);
}

#endif

// Products of T tiles with `count` rows from `first` on, 1 to R. Calls `each(row, tile, y)`.
template <int T, int R, typename Each>
static inline void float_rows(const Matrix& matrix, int64_t tile, const Rounded& x, int64_t first, int64_t count, Each each) {
  if constexpr (R > 1) {
    if (count < R) return float_rows<T, R - 1>(matrix, tile, x, first, count, each);
  }
  f32x16 result[T][R];
  if (matrix.tiles[tile].format == kBF16) {
    float_product<kBF16, R, T>(matrix, tile, x, first, result);
  } else {
    float_product<kFP32, R, T>(matrix, tile, x, first, result);
  }
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) each(first + r, tile + t, result[t][r]);
  }
}

// Products of one or two tiles with `count` rows from `first` on. The rows are dealt evenly, because the sums of a few rows
// wait for each other. Calls `each(row, tile, y)`.
template <typename Each>
static inline void float_tiles(const Matrix& matrix, int64_t tile, int64_t tiles, const Rounded& x, int64_t first, int64_t count,
                               Each each) {
  for (int64_t parts = (count + kFloatRows - 1) / kFloatRows; parts > 0; --parts) {
    const int64_t rows = (count + parts - 1) / parts;
#if defined(__AVX512F__)
    if (tiles == 2) {
      float_rows<2, kFloatRows>(matrix, tile, x, first, rows, each);
    } else {
      float_rows<1, kFloatRows>(matrix, tile, x, first, rows, each);
    }
#else
    for (int64_t t = 0; t < tiles; ++t) float_rows<1, kFloatRows>(matrix, tile + t, x, first, rows, each);
#endif
    first += rows;
    count -= rows;
  }
}

// Row `token` of a table.
static inline void float_row(const Matrix& m, uint32_t token, float* to) {
  const uint8_t* weights = m.tiles[token / kTile].data;
  const int64_t lane = token % kTile;
  for (int64_t i = 0; i < m.inputs; ++i) {
    if (m.tiles[0].format == kFP32) {
      to[i] = load<float>(weights + (i * kTile + lane) * 4);
    } else {
      const uint32_t raw = load<uint16_t>(weights + (i / 2 * kTile + lane) * 4 + i % 2 * 2);
      to[i] = __builtin_bit_cast(float, raw << 16);
    }
  }
}
