// Integer operations of the int8 cache: AVX2, with AVX-VNNI where the compiler has it switched on. What each one means is in int8_scalar.h.
#pragma once
#include "simd/avx2.h"

#ifdef __AVXVNNI__
#define OCTAVO_INT8_TARGET int8_avxvnni
#else
#define OCTAVO_INT8_TARGET int8_avx2
#endif

namespace octavo::OCTAVO_INT8_TARGET {

using namespace octavo::avx2;

struct Ints {
  __m256i a, b;
};

OCTAVO_INLINE __m256i broadcast_quad(const void* p) {
  std::int32_t quad;
  __builtin_memcpy(&quad, p, 4);
  return _mm256_set1_epi32(quad);
}
OCTAVO_INLINE __m256i half_of(const void* p, int half) { return _mm256_loadu_si256(static_cast<const __m256i*>(p) + half); }

#ifdef __AVXVNNI__

// 16 ymm registers: 8 sums, two vectors, one broadcast.
inline constexpr int kRows = 4;
constexpr int vecs(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

struct Unsigned {
  __m256i a, b;
};
using Signed = Unsigned;

OCTAVO_INLINE Unsigned load_unsigned(const std::uint8_t* p) { return {half_of(p, 0), half_of(p, 1)}; }
OCTAVO_INLINE Signed load_signed(const std::int8_t* p) { return {half_of(p, 0), half_of(p, 1)}; }
OCTAVO_INLINE Unsigned broadcast_unsigned(const std::uint8_t* p) { const __m256i q = broadcast_quad(p); return {q, q}; }
OCTAVO_INLINE Signed broadcast_signed(const std::int8_t* p) { const __m256i q = broadcast_quad(p); return {q, q}; }
// Not the intrinsic: around that, GCC 12 copies every sum of a loop twice.
OCTAVO_INLINE Ints dot(Ints acc, Unsigned u, Signed s) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.a) : "x"(u.a), "x"(s.a));
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.b) : "x"(u.b), "x"(s.b));
  return acc;
}

#else

// A vector takes four registers as words: 2 rows × 1 vector.
inline constexpr int kRows = 2;
constexpr int vecs(int) { return 1; }

// Bytes 0 and 2, and bytes 1 and 3, of each lane as 16-bit numbers.
struct Words {
  __m256i even_a, even_b, odd_a, odd_b;
};
using Unsigned = Words;
using Signed = Words;

OCTAVO_INLINE __m256i unsigned_even(__m256i b) { return _mm256_and_si256(b, _mm256_set1_epi16(255)); }
OCTAVO_INLINE __m256i unsigned_odd(__m256i b) { return _mm256_srli_epi16(b, 8); }
OCTAVO_INLINE __m256i signed_even(__m256i b) { return _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8); }
OCTAVO_INLINE __m256i signed_odd(__m256i b) { return _mm256_srai_epi16(b, 8); }
OCTAVO_INLINE Unsigned unsigned_words(__m256i a, __m256i b) { return {unsigned_even(a), unsigned_even(b), unsigned_odd(a), unsigned_odd(b)}; }
OCTAVO_INLINE Signed signed_words(__m256i a, __m256i b) { return {signed_even(a), signed_even(b), signed_odd(a), signed_odd(b)}; }
OCTAVO_INLINE Unsigned load_unsigned(const std::uint8_t* p) { return unsigned_words(half_of(p, 0), half_of(p, 1)); }
OCTAVO_INLINE Signed load_signed(const std::int8_t* p) { return signed_words(half_of(p, 0), half_of(p, 1)); }
OCTAVO_INLINE Unsigned broadcast_unsigned(const std::uint8_t* p) { const __m256i q = broadcast_quad(p); return unsigned_words(q, q); }
OCTAVO_INLINE Signed broadcast_signed(const std::int8_t* p) { const __m256i q = broadcast_quad(p); return signed_words(q, q); }
OCTAVO_INLINE Ints dot(Ints acc, Unsigned u, Signed s) {
  return {_mm256_add_epi32(acc.a, _mm256_add_epi32(_mm256_madd_epi16(u.even_a, s.even_a), _mm256_madd_epi16(u.odd_a, s.odd_a))),
          _mm256_add_epi32(acc.b, _mm256_add_epi32(_mm256_madd_epi16(u.even_b, s.even_b), _mm256_madd_epi16(u.odd_b, s.odd_b)))};
}

#endif

OCTAVO_INLINE Ints broadcast_int(std::int32_t value) { const __m256i v = _mm256_set1_epi32(value); return {v, v}; }
OCTAVO_INLINE Vec to_float(Ints a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
OCTAVO_INLINE void store_rounded(std::uint8_t* p, Vec x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
OCTAVO_INLINE __m256 larger_bits(__m256 a, __m256 b) { return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b))); }
OCTAVO_INLINE Vec max_bits(Vec a, Vec b) { return {larger_bits(a.a, b.a), larger_bits(a.b, b.b)}; }
OCTAVO_INLINE float maximum_bits(Vec x) {
  const __m256i eight = _mm256_castps_si256(larger_bits(x.a, x.b));
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
}
template <int Step>
OCTAVO_INLINE __m256 butterfly8(__m256 a) {
  __m256 other;
  if constexpr (Step == 1) other = _mm256_permute_ps(a, 0xb1);
  if constexpr (Step == 2) other = _mm256_permute_ps(a, 0x4e);
  if constexpr (Step == 4) other = _mm256_permute2f128_ps(a, a, 1);
  constexpr int turned = Step == 1 ? 0xaa : Step == 2 ? 0xcc : 0xf0;
  return _mm256_blend_ps(_mm256_add_ps(a, other), _mm256_sub_ps(other, a), turned);
}
template <int Step>
OCTAVO_INLINE Vec butterfly(Vec x) {
  if constexpr (Step == 8) {
    return {_mm256_add_ps(x.a, x.b), _mm256_sub_ps(x.a, x.b)};
  } else {
    return {butterfly8<Step>(x.a), butterfly8<Step>(x.b)};
  }
}

}  // namespace octavo::OCTAVO_INT8_TARGET
