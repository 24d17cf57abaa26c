// Sixteen numbers at a time, in the compiler's vector types: one register with AVX512, two with AVX2. Included once for
// each instruction set, inside a namespace of its own.
#pragma once

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

template <typename V>
static inline V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
static inline void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

static inline f32x16 all(float value) { return value - f32x16{}; }
static inline f32x16 bits(u32x16 value) { return reinterpret_cast<f32x16>(value); }

// a * b + c, rounded once.
static inline f32x16 fused(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32x16>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
  __m256 x[2], y[2], z[2];
  __builtin_memcpy(x, &a, 64);
  __builtin_memcpy(y, &b, 64);
  __builtin_memcpy(z, &c, 64);
  for (int half = 0; half < 2; ++half) z[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
  __builtin_memcpy(&c, z, 64);
  return c;
#endif
}

// FP16 to FP32.
static inline f32x16 load_half(const uint16_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<f32x16>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
  f32x16 value;
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)));
  __builtin_memcpy(&value, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&value) + 32, &high, 32);
  return value;
#endif
}

// BF16 to FP32.
static inline f32x16 load_bf16(const uint16_t* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return reinterpret_cast<f32x16>(_mm512_slli_epi32(wide, 16));
#else
  u32x16 wide;
  for (int half = 0; half < 2; ++half) {
    const __m256i part = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + half * 8))), 16);
    __builtin_memcpy(reinterpret_cast<char*>(&wide) + half * 32, &part, 32);
  }
  return bits(wide);
#endif
}

// FP32 to BF16, to nearest even. NaN stays NaN.
static inline u16x16 to_bf16(f32x16 value) {
  const u32x16 raw = reinterpret_cast<u32x16>(value);
  const u32x16 rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  return __builtin_convertvector(value != value ? u32x16{} + 0x7fc0 : rounded, u16x16);
}

// `count` numbers.
static inline void to_bf16(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, to_bf16(load<f32x16>(from + i)));
  if (i == count) return;
  float rest[16] = {};
  for (int64_t j = i; j < count; ++j) rest[j - i] = from[j];
  uint16_t rounded[16];
  store(rounded, to_bf16(load<f32x16>(rest)));
  for (int64_t j = i; j < count; ++j) to[j] = rounded[j - i];
}

#if defined(__AVX512BF16__)

// `to` and the products of sixteen pairs of BF16 with the pair `b`.
static inline f32x16 pair_product(f32x16 to, u32x16 a, uint32_t b) {
  const __m512i all = _mm512_set1_epi32(static_cast<int32_t>(b));
  return reinterpret_cast<f32x16>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(to), (__m512bh)a, (__m512bh)all));
}

#endif

static inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }

// Folds the sixteen numbers by halves, always in the same order.
template <typename Fold>
static inline float folded(f32x16 v, Fold fold) {
  const f32x8 eight = fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                           __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const f32x4 four = fold(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
  const f32x4 two = fold(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return fold(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}

static inline float sum(f32x16 v) {
  return folded(v, [](auto a, auto b) { return a + b; });
}

static inline float largest(f32x16 v) {
  return folded(v, [](auto a, auto b) { return a > b ? a : b; });
}

static inline int32_t sum(i32x16 v) {
  const i32x8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const i32x4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  const i32x4 two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
}

// Whether a lane is not zero.
static inline bool any(i32x16 v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(v), reinterpret_cast<__m512i>(v)) != 0;
#else
  __m256i half[2];
  __builtin_memcpy(half, &v, 64);
  const __m256i both = _mm256_or_si256(half[0], half[1]);
  return _mm256_testz_si256(both, both) == 0;
#endif
}

// e^x with a relative error below 2^-22 for x in [-87, 87]; 0 below, and the value at 87 above. NaN stays NaN.
static inline f32x16 exponential(f32x16 x) {
  const f32x16 none{};
  const auto tiny = x < -87.0f;
  const f32x16 capped = x > 87.0f ? all(87.0f) : x;
  // 1.5 * 2^23: adding it rounds to a whole number, which the low bits then hold.
  const f32x16 shifted = capped * 1.44269504f + 12582912.0f;
  const f32x16 whole = shifted - 12582912.0f;
  const f32x16 r = (capped - whole * 0.693359375f) - whole * -2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const i32x16 exponent = (reinterpret_cast<i32x16>(shifted) - 0x4b400000) << 23;
  const f32x16 scaled = reinterpret_cast<f32x16>(reinterpret_cast<i32x16>(p) + exponent);
  return tiny ? none : (x != x ? x : scaled);
}
