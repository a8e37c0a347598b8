// Sixteen lanes as one zmm register: AVX-512 F, BW, DQ and VL. What each operation means is in scalar.h.
#pragma once
#include <immintrin.h>

#include "kv/block_view.h"

#define OCTAVO_TARGET avx512
#define OCTAVO_INLINE inline __attribute__((always_inline))

namespace octavo::avx512 {

using Vec = __m512;
using Mask = __mmask16;

// 32 zmm registers: 16 accumulators hide the latency of two FMA ports (4 cycles each) twice over, and leave room for loads and broadcasts.
inline constexpr int kTileRows = 8;
constexpr int tile_vecs(int rows) { return rows <= 4 ? 4 : 2; }

OCTAVO_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
OCTAVO_INLINE void convert(float value, float* out) { *out = value; }
OCTAVO_INLINE void convert(float value, Half* out) { out->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
OCTAVO_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

OCTAVO_INLINE Mask below(int n) { return static_cast<Mask>(n <= 0 ? 0u : n >= kLanes ? 0xffffu : (1u << n) - 1u); }

OCTAVO_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
OCTAVO_INLINE Vec iota() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
OCTAVO_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
OCTAVO_INLINE Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
OCTAVO_INLINE Vec load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(below(n), p); }
OCTAVO_INLINE Vec load_partial(const Half* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(below(n), p)); }
OCTAVO_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
OCTAVO_INLINE void store_partial(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, below(n), x); }
OCTAVO_INLINE Vec add(Vec x, Vec y) { return _mm512_add_ps(x, y); }
OCTAVO_INLINE Vec sub(Vec x, Vec y) { return _mm512_sub_ps(x, y); }
OCTAVO_INLINE Vec mul(Vec x, Vec y) { return _mm512_mul_ps(x, y); }
OCTAVO_INLINE Vec div(Vec x, Vec y) { return _mm512_div_ps(x, y); }
OCTAVO_INLINE Vec fma(Vec x, Vec y, Vec z) { return _mm512_fmadd_ps(x, y, z); }
OCTAVO_INLINE Vec max(Vec x, Vec y) { return _mm512_max_ps(x, y); }
OCTAVO_INLINE Vec min(Vec x, Vec y) { return _mm512_min_ps(x, y); }
OCTAVO_INLINE Vec absolute(Vec x) { return _mm512_andnot_ps(_mm512_set1_ps(-0.0f), x); }
OCTAVO_INLINE Vec copy_sign(Vec x, Vec s) { return _mm512_or_ps(absolute(x), _mm512_and_ps(_mm512_set1_ps(-0.0f), s)); }
OCTAVO_INLINE Vec scale_by_power(Vec x, Vec t) {
  const __m512i power = _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(t), 23), _mm512_set1_epi32(0x3f800000));
  return _mm512_mul_ps(x, _mm512_castsi512_ps(power));
}
OCTAVO_INLINE Mask less(Vec x, Vec y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
OCTAVO_INLINE Mask equal(Vec x, Vec y) { return _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ); }
OCTAVO_INLINE Mask both(Mask x, Mask y) { return x & y; }
OCTAVO_INLINE unsigned bits(Mask x) { return x; }
OCTAVO_INLINE bool any(Mask x) { return x != 0; }
OCTAVO_INLINE Mask lanes(int lo, int hi) { return static_cast<Mask>(below(hi) & ~below(lo)); }
OCTAVO_INLINE Mask nonzero(const std::uint8_t* p, int n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(below(n), p);
  return _mm_test_epi8_mask(bytes, bytes);
}
OCTAVO_INLINE Vec select(Mask m, Vec x, Vec y) { return _mm512_mask_blend_ps(m, y, x); }
OCTAVO_INLINE float sum(Vec x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
OCTAVO_INLINE float maximum(Vec x) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

}  // namespace octavo::avx512
