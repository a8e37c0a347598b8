// Sixteen lanes as two ymm registers: AVX2, FMA and F16C. What each operation means is in scalar.h.
#pragma once
#include <immintrin.h>

#include "kv/block_view.h"

#define OCTAVO_TARGET avx2
#define OCTAVO_INLINE inline __attribute__((always_inline))

namespace octavo::avx2 {

struct Vec {
  __m256 a, b;
};
struct Mask {
  __m256 a, b;
};

// 16 ymm registers: accumulators take 8 (rows · vecs · 2), then two for the loaded vector and one for the broadcast.
inline constexpr int kTileRows = 4;
constexpr int tile_vecs(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

OCTAVO_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
OCTAVO_INLINE void convert(float value, float* out) { *out = value; }
OCTAVO_INLINE void convert(float value, Half* out) { out->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
OCTAVO_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

OCTAVO_INLINE __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
OCTAVO_INLINE __m256i below(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane_numbers()); }

OCTAVO_INLINE Vec broadcast(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
OCTAVO_INLINE Vec iota() { return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)}; }
OCTAVO_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OCTAVO_INLINE Vec load(const Half* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
OCTAVO_INLINE Vec load_partial(const float* p, int n) { return {_mm256_maskload_ps(p, below(n)), _mm256_maskload_ps(p + 8, below(n - 8))}; }
OCTAVO_INLINE Vec load_partial(const Half* p, int n) {
  alignas(32) Half padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}
OCTAVO_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
OCTAVO_INLINE void store_partial(float* p, Vec v, int n) {
  _mm256_maskstore_ps(p, below(n), v.a);
  _mm256_maskstore_ps(p + 8, below(n - 8), v.b);
}
OCTAVO_INLINE Vec add(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
OCTAVO_INLINE Vec sub(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
OCTAVO_INLINE Vec mul(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
OCTAVO_INLINE Vec div(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
OCTAVO_INLINE Vec fma(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
OCTAVO_INLINE Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
OCTAVO_INLINE Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
OCTAVO_INLINE Vec absolute(Vec x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
OCTAVO_INLINE Vec copy_sign(Vec x, Vec s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(sign, x.a), _mm256_and_ps(sign, s.a)), _mm256_or_ps(_mm256_andnot_ps(sign, x.b), _mm256_and_ps(sign, s.b))};
}
OCTAVO_INLINE __m256 power(__m256 t) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 23), _mm256_set1_epi32(0x3f800000)));
}
OCTAVO_INLINE Vec scale_by_power(Vec x, Vec t) { return mul(x, {power(t.a), power(t.b)}); }
OCTAVO_INLINE Mask less(Vec x, Vec y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)}; }
OCTAVO_INLINE Mask equal(Vec x, Vec y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)}; }
OCTAVO_INLINE Mask both(Mask x, Mask y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
OCTAVO_INLINE unsigned bits(Mask x) { return static_cast<unsigned>(_mm256_movemask_ps(x.a) | _mm256_movemask_ps(x.b) << 8); }
OCTAVO_INLINE bool any(Mask x) { return _mm256_movemask_ps(_mm256_or_ps(x.a, x.b)) != 0; }
OCTAVO_INLINE __m256 lanes8(int lo, int hi) {
  return _mm256_castsi256_ps(_mm256_andnot_si256(below(lo), below(hi)));
}
OCTAVO_INLINE Mask lanes(int lo, int hi) { return {lanes8(lo, hi), lanes8(lo - 8, hi - 8)}; }
OCTAVO_INLINE Mask nonzero(const std::uint8_t* p, int n) {
  alignas(32) std::int32_t wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = i < n && p[i] != 0 ? -1 : 0;
  const __m256i* q = reinterpret_cast<const __m256i*>(wide);
  return {_mm256_castsi256_ps(_mm256_load_si256(q)), _mm256_castsi256_ps(_mm256_load_si256(q + 1))};
}
OCTAVO_INLINE Vec select(Mask m, Vec x, Vec y) { return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)}; }
OCTAVO_INLINE float sum(Vec x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
OCTAVO_INLINE float maximum(Vec x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

}  // namespace octavo::avx2
